"""All plugins whose kernels are in the engine."""

from __future__ import annotations

from plugins.aot_plugin import AotPlugin
from plugins.dynamic_mask_attention.aot import ATTEND_SHARES, JOIN_SHARES
from plugins.expert_gather.aot import GATHER_EXPERTS, ROUTE_EXPERTS
from plugins.value_gather.aot import GATHER_VALUES

AOT_PLUGINS: tuple[AotPlugin, ...] = (
    ATTEND_SHARES,
    JOIN_SHARES,
    ROUTE_EXPERTS,
    GATHER_EXPERTS,
    GATHER_VALUES,
)
