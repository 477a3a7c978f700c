"""The expert gather as plugins whose kernels are in the engine: route, then gather.

One program gathers for a token: picks are not split, as there is nowhere to count arrivals. No
Triton, no PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping

from plugins.aot_plugin import AotPlugin, Attributes
from plugins.expert_gather.launches import HIDDEN_MULTIPLE, make_kernels
from plugins.kernel_spec import KernelSpec, Shapes

_MODULE = "plugins.expert_gather.aot_kernel"


def router_scratch(top_k: int, num_keys: int) -> int:
    """Numbers of scratch memory for each token and head, for the attribute `scratch_size`."""
    per_axis = min(top_k, num_keys)
    pairs = sum(min(top_k // (i + 1), per_axis) for i in range(per_axis))
    return 4 * per_axis + pairs


def _base_kernels(
    heads: int,
    num_keys: int,
    hidden: int,
    attributes: Attributes,
    score_dtype: str,
    hidden_dtype: str,
    row_dtype: str,
) -> dict[str, KernelSpec]:
    """The kernels that a plugin of the other form launches, one program per token: by function."""
    scores, rows = (-1, heads, num_keys), (num_keys**2, hidden)
    kernels = make_kernels(
        {"top_k": 1, "weight_inside": 0, "normalize": 0, **attributes},
        {
            "hidden": (-1, hidden),
            "scores_x": scores,
            "scores_y": scores,
            "down": rows,
            "up": rows,
            "expert_output": (-1, hidden),
        },
        {
            **dict.fromkeys(("scores_x", "scores_y"), score_dtype),
            **dict.fromkeys(("hidden", "expert_output"), hidden_dtype),
            **dict.fromkeys(("down", "up"), row_dtype),
        },
    )
    return {
        spec.function.rpartition(":")[2]: spec
        for spec in kernels.specs
        if spec.constants.get("SPLITS", 1) == 1
    }


def _route_kernels(
    attributes: Attributes, shapes: Shapes, dtypes: Mapping[str, str]
) -> tuple[KernelSpec]:
    _, heads, num_keys = shapes["scores_x"]
    picking = {name: attributes[name] for name in ("top_k", "normalize")}
    base = _base_kernels(
        heads, num_keys, HIDDEN_MULTIPLE, picking, dtypes["scores_x"], "float32", "float32"
    )["route_experts"]
    scratch = router_scratch(int(attributes["top_k"]), num_keys)
    if attributes["scratch_size"] != scratch:
        raise ValueError(
            f"RouteExperts: scratch_size is {attributes['scratch_size']}, expected {scratch}"
        )
    return (
        KernelSpec(
            name=base.name.replace("route_experts", "route_experts_aot"),
            function=f"{_MODULE}:route_experts_aot",
            arguments={
                "scores_x": base.arguments["scores_x"],
                "scores_y": base.arguments["scores_y"],
                "heads": "i32",
                "experts": "*i32",
                "weights": "*fp32",
                "scratch": "*fp32",
            },
            constants=base.constants,
            grid=("heads", "1", "1"),
            num_warps=base.num_warps,
            num_stages=base.num_stages,
        ),
    )


ROUTE_EXPERTS = AotPlugin(
    name="RouteExperts",
    inputs=("scores_x", "scores_y"),
    outputs=("experts", "weights", "scratch"),
    attributes={"top_k": "INT", "normalize": "INT", "scratch_size": "INT"},
    sizes={"heads": "scores_x.0 * scores_x.1"},
    extras=("heads",),
    output_shapes={
        "experts": ("scores_x.0", "scores_x.1", "top_k"),
        "weights": ("scores_x.0", "scores_x.1", "top_k"),
        "scratch": ("scores_x.0", "scores_x.1", "scratch_size"),
    },
    output_types={"experts": "int32", "weights": "float32", "scratch": "float32"},
    kernels=_route_kernels,
)


def _gather_kernels(
    attributes: Attributes, shapes: Shapes, dtypes: Mapping[str, str]
) -> tuple[KernelSpec]:
    _, heads, top_k = shapes["experts"]
    base = _base_kernels(
        heads,
        top_k,  # how many keys there are has no influence here
        shapes["hidden"][1],
        {"top_k": top_k, "weight_inside": attributes["weight_inside"]},
        "float32",
        dtypes["hidden"],
        dtypes["down"],
    )["gather_experts"]
    return (
        KernelSpec(
            name=base.name.replace("gather_experts", "gather_experts_aot"),
            function=f"{_MODULE}:gather_experts_aot",
            arguments={
                "hidden": base.arguments["hidden"],
                "down": base.arguments["down"],
                "up": base.arguments["up"],
                "experts": "*i32",
                "weights": "*fp32",
                "tokens": "i32",
                "expert_output": base.arguments["output"],
            },
            constants={
                name: value
                for name, value in base.constants.items()
                if name not in ("SPLITS", "PICKS_PER_SPLIT")
            },
            grid=("tokens", "1", "1"),
            num_warps=base.num_warps,
            num_stages=base.num_stages,
        ),
    )


GATHER_EXPERTS = AotPlugin(
    name="GatherExperts",
    inputs=("hidden", "down", "up", "experts", "weights"),
    outputs=("expert_output",),
    attributes={"weight_inside": "INT"},
    sizes={"tokens": "hidden.0"},
    extras=("tokens",),
    output_shapes={"expert_output": ("hidden.0", "hidden.1")},
    output_types={"expert_output": "like hidden"},
    kernels=_gather_kernels,
)
