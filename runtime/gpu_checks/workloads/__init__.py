"""What each custom op is checked on: shapes, random inputs, and the bytes that it must move."""

from __future__ import annotations

from collections.abc import Mapping

from runtime.gpu_checks.workloads.attention import AttentionWorkload
from runtime.gpu_checks.workloads.experts import ExpertWorkload
from runtime.gpu_checks.workloads.values import ValueWorkload
from runtime.gpu_checks.workloads.workload import Case, Workload

__all__ = ["WORKLOADS", "Case", "Workload"]

# By the op's ONNX name. An op that is not here has kernels that no check covers, which is an error.
WORKLOADS: Mapping[str, Workload] = {
    "DynamicMaskAttention": AttentionWorkload(),
    "ExpertGather": ExpertWorkload(),
    "ValueGather": ValueWorkload(),
}
