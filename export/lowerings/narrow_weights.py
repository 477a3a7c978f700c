"""Weights of 8 or 4 bits for ONNX Runtime: symmetric, one scale per block.

Of 8 bits they are rounded to nearest. Of 4 bits each block takes the scale, of several tried, that
leaves the least squared error: on doge-tiny a fifth less loss than rounding to nearest. The method
is that of llama.cpp's k-quants (`make_qx_quants` in ggml-quants.c) without its weighting by size;
more scales, weights from activations and zero points were measured and gave little or nothing
(docs/benchmarks.md, "Rounding to 4 bits").

Projections and the head become MatMulNBits with int8 activations (accuracy level 4); the embedding
and the expert tables become GatherBlockQuantized. What is small and decides much stays float32:
norms, residual scales, mask scores, and what routes tokens to experts or picks values.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from export.lowerings.graph_editor import GraphEditor

Bits = Literal[4, 8]
BLOCK_SIZES = (16, 32, 64, 128, 256)  # what MatMulNBits has
# Parts of names of what stays float32.
KEPT = ("score_proj", "router_gate", "value_gate", "value_sums", "v_embed", "queries", "keys")
BLOCK_SIZE = 128
# Scales tried for a block of 4 bits, as parts of the one that just reaches its largest number: some
# cut that number off so that all others are finer. Either sign of the scale gives the largest
# number the end of the range that has one value more.
_PARTS_OF_SCALE = tuple(sign * part for part in np.linspace(0.7, 1.05, 8) for sign in (1, -1))
# Likewise where scales are positive: from one that cuts the largest number off to one whose -8, if
# the largest number is negative, just reaches it.
_POSITIVE_PARTS = tuple(np.linspace(0.65, 1.0, 16))
_CHUNK = 1 << 18  # weights rounded at a time, which bounds the memory of the search


def narrow_weights(editor: GraphEditor, bits: Bits, block_size: int = BLOCK_SIZE) -> None:
    """Rewrite every product with a stored weight and every gather of stored rows.

    Args:
        editor: on a model lowered for the CPU, in float32.
        bits: of each weight.
        block_size: inputs that share a scale; where it does not divide a weight's inputs, the
            largest power of two below it that does, and at least 16, is taken.

    Raises:
        ValueError: a block size that MatMulNBits does not have, or the inputs of a weight are no
            multiple of 16.
    """
    for node in list(editor.graph):
        if node.op_type in {"MatMul", "FusedMatMul"}:
            _narrow_product(editor, node, bits, block_size)
        elif node.op_type == "Gather" and _stored_rows(node) is not None:
            _narrow_gather(editor, node, bits, block_size)


def quantize_blocks(
    weight: npt.NDArray[np.float32], bits: Bits, block_size: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Round each block of a row to integers around a zero point of half the range.

    Args:
        weight: [rows, inputs], inputs a multiple of `block_size`.
        bits: 8 or 4.
        block_size: inputs that share a scale.

    Returns:
        [rows, inputs / block_size, block_size · bits / 8] uint8, of 4 bits the lower half first,
        and [rows, inputs / block_size] float32 scales, of either sign. A weight is its scale times
        (its integer - half the range).

    Raises:
        ValueError: a block size that MatMulNBits does not have, or that does not divide the inputs.
    """
    _check_block_size(block_size)
    if weight.shape[1] % block_size:
        raise ValueError(
            f"blocks of {block_size} inputs do not divide {weight.shape[1]} inputs, expected a "
            "size that does; fitting_block_size finds it"
        )
    levels, scales = round_blocks(weight.reshape(-1, block_size), bits)
    stored = (levels.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
    if bits == 4:
        stored = np.bitwise_or(stored[:, 0::2], np.left_shift(stored[:, 1::2], np.uint8(4)))
    return stored.reshape(len(weight), -1, stored.shape[1]), scales.reshape(len(weight), -1)


def round_blocks(
    blocks: npt.NDArray[np.float32], bits: Bits, *, positive: bool = False
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Whole numbers around zero and scales whose products are near the blocks.

    Args:
        blocks: [n, block] numbers, each block with a scale of its own.
        bits: 8 rounds to nearest, 4 searches for the scale.
        positive: allow no negative scales, which TensorRT refuses. The additional number at the
            end of the range then serves negative numbers alone.

    Returns:
        [n, block] int8, from -2^(bits-1) to 2^(bits-1) - 1, and [n] scales.
    """
    levels = np.empty(blocks.shape, np.int8)
    scales = np.empty(len(blocks), np.float32)
    step = max(1, _CHUNK // blocks.shape[1])
    for start in range(0, len(blocks), step):
        part = slice(start, start + step)
        levels[part], scales[part] = _round_blocks(blocks[part], bits, positive=positive)
    return levels, scales


def _round_blocks(
    blocks: npt.NDArray[np.float32], bits: Bits, *, positive: bool
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1, keepdims=True), -1)[:, 0]
    end = 1 << (bits - 1)
    parts = _PARTS_OF_SCALE
    reach, reached = largest, -end
    if positive:
        parts, reach, reached = _POSITIVE_PARTS, np.abs(largest), end - 1
    scales = reach / np.float32(reached)
    levels = levels_of(blocks, scales, bits)
    if bits == 8:
        return levels, scales
    error = _squared_error(blocks, levels, scales)
    for part in parts:
        tried = levels_of(blocks, reach / np.float32(reached / part), bits)
        # The best scale for these levels is the least-squares one.
        norms = (tried * tried).sum(-1)
        fitted = (blocks * tried).sum(-1) / np.maximum(norms, 1)  # norms are whole numbers
        tried_error = _squared_error(blocks, tried, fitted)
        better = tried_error < error
        levels[better], scales[better] = tried[better], fitted[better]
        error = np.minimum(error, tried_error)
    return levels, scales


def levels_of(
    blocks: npt.NDArray[np.float32], scales: npt.NDArray[np.float32], bits: Bits
) -> npt.NDArray[np.float32]:
    """Whole numbers in the range of `bits` that, times the scales [n], come nearest the blocks."""
    # Of a subnormal scale the inverse may be infinite; what it would reach is as good as zero.
    normal = np.abs(scales) >= np.finfo(np.float32).tiny
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=normal)
    end = 1 << (bits - 1)
    levels: npt.NDArray[np.float32] = np.rint(blocks * inverse[:, None])
    return np.clip(levels, -end, end - 1, out=levels)


def _squared_error(
    blocks: npt.NDArray[np.float32],
    levels: npt.NDArray[np.float32],
    scales: npt.NDArray[np.float32],
) -> npt.NDArray[np.float32]:
    difference = levels * scales[:, None] - blocks
    error: npt.NDArray[np.float32] = np.einsum("nb,nb->n", difference, difference)
    return error


def fitting_block_size(inputs: int, block_size: int) -> int:
    """The largest power of two up to `block_size` that divides `inputs`.

    Raises:
        ValueError: none of at least 16 does, or `block_size` is not one of `BLOCK_SIZES`.
    """
    _check_block_size(block_size)
    while block_size >= 16:
        if inputs % block_size == 0:
            return block_size
        block_size //= 2
    raise ValueError(
        f"{inputs} inputs are no multiple of 16, which narrow weights need; build with float32 "
        "weights (--cpu fp32)"
    )


def _check_block_size(block_size: int) -> None:
    if block_size not in BLOCK_SIZES:
        raise ValueError(
            f"blocks of {block_size} inputs, expected 16, 32, 64, 128 or 256; MatMulNBits has no "
            "others, so take one of these"
        )


def _narrow_product(editor: GraphEditor, node: ir.Node, bits: Bits, block_size: int) -> None:
    value, weight = node.inputs
    if weight is None or weight.const_value is None or _is_kept(weight):
        return
    array = editor.array(weight)
    if array.ndim != 2:
        return
    transposed = "transB" in node.attributes and node.attributes["transB"].as_int()
    rows = array if transposed else array.T  # [out, in]
    outputs, inputs = rows.shape
    block = fitting_block_size(inputs, block_size)
    levels, scales = quantize_blocks(np.ascontiguousarray(rows), bits, block)
    product = editor.contrib(
        "MatMulNBits",
        value,
        editor.initializer(f"{weight.name}.int{bits}", levels),
        editor.initializer(f"{weight.name}.int{bits}.scale", scales),
        N=outputs,
        K=inputs,
        bits=bits,
        block_size=block,
        accuracy_level=4,
    )
    editor.replace(node.outputs[0], product)


def _narrow_gather(editor: GraphEditor, node: ir.Node, bits: Bits, block_size: int) -> None:
    table, rows = node.inputs
    if table is None:
        raise AssertionError("a gather has a table")
    array = editor.array(table)
    block = fitting_block_size(array.shape[1], block_size)
    levels, scales = quantize_blocks(array, bits, block)
    gathered = editor.contrib(
        "GatherBlockQuantized",
        editor.initializer(f"{table.name}.rows.int{bits}", levels.reshape(len(array), -1)),
        rows,
        editor.initializer(f"{table.name}.rows.int{bits}.scale", scales),
        bits=bits,
        block_size=block,
        gather_axis=0,
        quantize_axis=1,
    )
    editor.replace(node.outputs[0], gathered)


def _stored_rows(node: ir.Node) -> ir.Value | None:
    """The table of float rows that a Gather reads, or None."""
    table = node.inputs[0]
    if table is None or table.const_value is None or _is_kept(table):
        return None
    if table.dtype != ir.DataType.FLOAT or len(table.const_value.shape) != 2:
        return None
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    return table if axis == 0 else None


def _is_kept(value: ir.Value) -> bool:
    return any(part in (value.name or "") for part in KEPT)
