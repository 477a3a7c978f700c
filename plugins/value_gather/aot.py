"""The value gather as a plugin whose kernel is in the engine. No Triton, no PyTorch."""

from __future__ import annotations

from collections.abc import Mapping

from plugins.aot_plugin import AotPlugin, Attributes
from plugins.kernel_spec import KernelSpec, Shapes
from plugins.value_gather.launches import make_kernels


def _value_kernels(
    attributes: Attributes, shapes: Shapes, dtypes: Mapping[str, str]
) -> tuple[KernelSpec]:
    (base,) = make_kernels(
        attributes,
        {**shapes, "inner_values": (shapes["scores"][0], shapes["table"][1])},
        {**dtypes, "inner_values": dtypes["table"]},
    ).specs
    return (
        KernelSpec(
            name=base.name.replace("gather_values", "gather_values_aot"),
            function="plugins.value_gather.aot_kernel:gather_values_aot",
            arguments={
                "scores": base.arguments["scores"],
                "table": base.arguments["table"],
                "tokens": "i32",
                "inner_values": base.arguments["output"],
            },
            constants=base.constants,
            grid=base.grid,
            num_warps=base.num_warps,
            num_stages=base.num_stages,
        ),
    )


GATHER_VALUES = AotPlugin(
    name="GatherValues",
    inputs=("scores", "table"),
    outputs=("inner_values",),
    attributes={"top_k": "INT", "subset_sums": "INT"},
    sizes={"tokens": "scores.0"},
    extras=("tokens",),
    output_shapes={"inner_values": ("scores.0", "table.1")},
    output_types={"inner_values": "like table"},
    kernels=_value_kernels,
)
