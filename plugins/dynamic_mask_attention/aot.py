"""Dynamic mask attention as plugins whose kernels are in the engine: shares, then their join.

They never select keys: a model whose window is smaller than its cache is not covered. No Triton,
no PyTorch.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

from plugins.aot_plugin import AotPlugin, Attributes
from plugins.dynamic_mask_attention.launches import make_kernels
from plugins.kernel_spec import TRITON_TYPES, Constant, KernelSpec, Shapes

_MODULE = "plugins.dynamic_mask_attention.aot_kernel"
# Constants of kernels that are launched by plugins of the other form, which these do not have.
_DROPPED = ("MAX_SPLITS", "SELECT", "APPEND", "QK_NORM", "ROTATE_QUERY", "ROTATE_KEY", "SCORE")
# Keys are addressed within their head by 32-bit numbers.
_MOST_NUMBERS = 2**31 - 1
# Programs that a lone query gets, which has one for each key/value head and share.
_TARGET_PROGRAMS = 256
# Joining more shares than that takes longer than reading a share.
_MOST_SPLITS = 32


def max_splits(shares: KernelSpec, slots: int) -> int:
    """Shares of a lone query's keys, for the attribute `max_splits` of both plugins.

    Args:
        shares: the first kernel of `ATTEND_SHARES`.
        slots: C.
    """
    fitting = -(-slots // int(shares.constants["SHARE_STEP"]))
    return max(1, min(fitting, _MOST_SPLITS, _TARGET_PROGRAMS // int(shares.constants["NKV"])))


def _share_kernels(
    attributes: Attributes, shapes: Shapes, dtypes: Mapping[str, str]
) -> tuple[KernelSpec, KernelSpec]:
    """For few queries, and for many; each serves any number."""
    (B, Nq, S, D), C = shapes["query"], shapes["key"][2]
    if C * D > _MOST_NUMBERS:
        raise ValueError(f"C is {C}, expected at most {_MOST_NUMBERS // D} slots of {D} numbers")
    decode, prompt = make_kernels(
        {"scale": attributes["scale"], "keep_window_size": 0},
        {**shapes, "attention_output": (B, S, Nq * D)},
        {**dtypes, "attention_output": dtypes["query"]},
    ).specs
    options = {
        "SCALE": _as_float32(float(attributes["scale"])),
        "ONE_SCORE_ROW": bool(attributes["one_score_row"]),
    }
    key_heads = str(decode.constants["NKV"])
    return (
        _share_kernel(
            "attend_shares_aot", decode, options, decode.num_warps, ("rows", key_heads, "splits")
        ),
        _prompt_kernel(prompt, options),
    )


def _prompt_kernel(base: KernelSpec, options: Mapping[str, Constant]) -> KernelSpec:
    """With tiles that fit into `SHARED_LIMIT`: rows of 512 bytes and more need smaller ones."""
    row_bytes = int(base.constants["BLOCK_D"]) * (4 if base.arguments["query"] == "*fp32" else 2)
    if row_bytes < 512:
        tile, num_warps, grid = {}, base.num_warps, base.grid
    else:
        block_m, num_warps = (16, 4) if row_bytes > 512 else (32, 4)
        tile = {"BLOCK_M": block_m, "BLOCK_N": 16}
        grid = (f"ceil(pairs / {block_m})", *base.grid[1:])
    return _share_kernel("attend_prompt_aot", base, {**options, **tile}, num_warps, grid)


def _share_kernel(
    function: str,
    base: KernelSpec,
    options: Mapping[str, Constant],
    num_warps: int,
    grid: tuple[str, str, str],
) -> KernelSpec:
    """A kernel with the constants of `base`, which a plugin of the other form launches."""
    kept = {name: value for name, value in base.constants.items() if name not in _DROPPED}
    tensors = ("query", "key", "value", "score", "write_index")
    _, _, variant = base.name.partition("-")
    one_row = "-one_row" if options["ONE_SCORE_ROW"] else ""
    return KernelSpec(
        name=f"{function}-{variant}-scale{options['SCALE']:.9g}{one_row}",
        function=f"{_MODULE}:{function}",
        arguments={
            **{name: base.arguments[name] for name in tensors},
            **dict.fromkeys(("tokens", "slots", "splits"), "i32"),
            **dict.fromkeys(("values", "masses"), "*fp32"),
        },
        constants={**kept, **options},
        grid=grid,
        num_warps=num_warps,
        num_stages=base.num_stages,
    )


ATTEND_SHARES = AotPlugin(
    name="AttendShares",
    inputs=("query", "key", "value", "score", "write_index"),
    outputs=("values", "masses"),
    # Whether the batch shares one row of scores is an attribute, since a batch of one looks alike.
    attributes={"scale": "FLOAT", "max_splits": "INT", "one_score_row": "INT"},
    sizes={
        "batch": "query.0",
        "tokens": "query.2",
        "rows": "query.0 * query.2",
        "slots": "key.2",
        # The more queries, the fewer shares of each: always about as many programs.
        "splits": "ceil(max_splits / rows)",
        "pairs": "tokens * HEADS",
    },
    extras=("tokens", "slots", "splits"),
    output_shapes={
        "values": ("splits", "batch", "tokens", "query.1", "query.3"),
        "masses": ("splits", "batch", "tokens", "query.1", "2"),
    },
    output_types={"values": "float32", "masses": "float32"},
    kernels=_share_kernels,
    tactics=2,
)


def _join_kernels(
    attributes: Attributes, shapes: Shapes, dtypes: Mapping[str, str]
) -> tuple[KernelSpec]:
    kind, size = f"*{TRITON_TYPES[dtypes['query']]}", shapes["query"][3]
    splits = _power_of_two(int(attributes["max_splits"]))
    return (
        KernelSpec(
            name=f"join_shares_aot-{kind[1:]}-d{size}-splits{splits}",
            function=f"{_MODULE}:join_shares_aot",
            arguments={
                "query": kind,
                "values": "*fp32",
                "masses": "*fp32",
                "splits": "i32",
                "attention_output": kind,
            },
            constants={"D": size, "BLOCK_D": _power_of_two(size), "MAX_SPLITS": splits},
            grid=("heads", "1", "1"),
            num_warps=4,
        ),
    )


JOIN_SHARES = AotPlugin(
    name="JoinShares",
    inputs=("query", "values", "masses"),
    outputs=("attention_output",),
    attributes={"max_splits": "INT"},
    sizes={"splits": "values.0", "heads": "query.0 * query.1 * query.2"},
    extras=("splits",),
    output_shapes={"attention_output": ("query.0", "query.2", "query.1 * query.3")},
    output_types={"attention_output": "like query"},
    kernels=_join_kernels,
)


def _as_float32(number: float) -> float:
    """As an ONNX attribute stores it: one node has one kernel, wherever its attributes are read."""
    rounded: float = struct.unpack("f", struct.pack("f", number))[0]
    return rounded


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not below the number."""
    return 1 << (number - 1).bit_length()
