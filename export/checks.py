"""The exported model against its contract and against PyTorch, after every export."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from model.contract import StepContract, TensorSpec
from model.doge import DogeForCausalLM
from plugins.custom_op import DOMAIN
from plugins.onnx_function import OPSET
from plugins.registry import OPS
from runtime.backends.base import Backend, Limits
from runtime.backends.onnxruntime_backend import OnnxRuntimeBackend, make_session
from runtime.backends.torch_backend import TorchBackend
from runtime.comparison import TOLERANCES, compare_backends

CHECK_STEPS = 6
CHECK_PROMPT_LENGTHS = (1, 13)


class ExportCheckError(Exception):
    """The exported model is not what it should be; a bug here or a change in the exporter."""


def check_structure(path: Path, contract: StepContract, network: DogeForCausalLM) -> dict[str, Any]:
    """Compare the model's opset, inputs, outputs, nodes and parameters with what they must be.

    Returns:
        Counts for the manifest.

    Raises:
        ExportCheckError: lists every difference.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportCheckError(f"the ONNX checker refuses the exported model: {error}") from error
    exported = onnx.load(str(path), load_external_data=False)
    problems = [
        *_opset_problems(exported),
        *_tensor_problems("input", contract.inputs, list(exported.graph.input)),
        *_tensor_problems("output", contract.outputs, list(exported.graph.output)),
        *_parameter_problems(exported, network),
    ]
    found = Counter(n.op_type for n in exported.graph.node if n.domain == DOMAIN)
    wanted = Counter(op for m in network.modules() for op in getattr(m, "custom_ops", ()))
    counts, expected = ({op.name: ops[op.name] for op in OPS} for ops in (found, wanted))
    if counts != expected:
        problems.append(f"{DOMAIN} nodes are {counts}, expected {expected}")
    if problems:
        raise ExportCheckError("the exported model breaks its contract: " + "; ".join(problems))
    return {"passed": True, "nodes": len(exported.graph.node), "doge_nodes": counts}


def check_numbers(
    path: Path,
    contract: StepContract,
    network: DogeForCausalLM,
    limits: Limits,
    *,
    rows_alone: bool = False,
) -> dict[str, Any]:
    """Run a float32 model in ONNX Runtime beside PyTorch: prefills and decode steps, same tokens.

    Args:
        path: the canonical model, or one lowered for the CPU.
        contract: of that model.
        network: as the checkpoint stores it.
        limits: of both.
        rows_alone: whether the model takes several tokens of one row only.

    Returns:
        The comparison for the manifest.

    Raises:
        ExportCheckError: they differ by more than float32 explains.
        BackendUnavailableError: onnxruntime is not installed.
    """
    config = network.config
    router_mode = config.router_mode if config.is_moe else None
    reference: Backend = TorchBackend(network, limits=limits, variant="fp32")
    candidate: Backend = OnnxRuntimeBackend(
        make_session(str(path)),
        contract,
        limits=limits,
        variant="fp32",
        vocab_size=config.vocab_size,
        router_mode=router_mode,
        rows_alone=rows_alone,
    )
    atol, rtol = TOLERANCES["fp32"]
    reports = [
        compare_backends(reference, candidate, [prompt], steps, atol=atol, rtol=rtol)
        for prompt, steps in _check_runs(network, limits)
    ]
    candidate.close()
    failed = [report.reason for report in reports if report.verdict == "fail"]
    if failed:
        raise ExportCheckError(f"ONNX Runtime and PyTorch disagree: {'; '.join(failed)}")
    worst = max(reports, key=lambda report: report.max_abs)
    positions = sum(report.positions for report in reports)
    return {"passed": True, "positions": positions, **worst.as_dict()["logits"]}


def _check_runs(network: DogeForCausalLM, limits: Limits) -> Iterator[tuple[list[int], int]]:
    """Prompts of distinct ids, and how many greedy decode steps follow each.

    A repeated token has the same mask score as its first occurrence, up to the rounding of a matrix
    product, which may differ from row to row and from library to library. Beyond the keep window
    such a near tie keeps another key, and logits part by more than rounding. So decode steps, whose
    greedy tokens may repeat, stay within the window; what is beyond it is checked in one pass.
    """
    window, context = network.config.keep_window_size, limits.max_seq_len
    generator = np.random.default_rng(0)
    longest = min(limits.max_input_len, context, network.config.vocab_size)
    lengths = [min(length, longest) for length in CHECK_PROMPT_LENGTHS]
    if window < longest:
        lengths.append(min(window + 8, longest))
    for length in lengths:
        ids = generator.permutation(network.config.vocab_size)[:length]
        steps = max(0, min(CHECK_STEPS, min(window, context) - length))
        yield [int(i) for i in ids], steps


def _opset_problems(exported: onnx.ModelProto) -> list[str]:
    opsets = {entry.domain: entry.version for entry in exported.opset_import}
    expected = {"": OPSET, DOMAIN: 1}
    wrong = {d: opsets.get(d) for d, v in expected.items() if opsets.get(d) != v}
    return [f"opset of domain {d!r} is {v}, expected {expected[d]}" for d, v in wrong.items()]


def _tensor_problems(
    kind: str, expected: tuple[TensorSpec, ...], found: list[onnx.ValueInfoProto]
) -> list[str]:
    described = [_describe(value) for value in found]
    wanted = [(spec.name, spec.dtype, spec.shape) for spec in expected]
    if described == wanted:
        return []
    differing = [f"{a} instead of {b}" for a, b in zip(described, wanted, strict=False) if a != b]
    return [f"{kind}s ({len(described)}, expected {len(wanted)}): {', '.join(differing[:4])}"]


def _describe(value: onnx.ValueInfoProto) -> tuple[str, str, tuple[int | str, ...]]:
    tensor = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    shape = tuple(d.dim_param or d.dim_value for d in tensor.shape.dim)
    return value.name, dtype, shape


def _parameter_problems(exported: onnx.ModelProto, network: DogeForCausalLM) -> list[str]:
    """Every parameter is an initializer of the same name and shape."""
    found = {tensor.name: tuple(tensor.dims) for tensor in exported.graph.initializer}
    return [
        f"parameter {name} is {found.get(name)}, expected {tuple(parameter.shape)}"
        for name, parameter in network.published_parameters().items()
        if found.get(name) != tuple(parameter.shape)
    ]
