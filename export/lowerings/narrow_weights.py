"""Weights of 8 or 4 bits for ONNX Runtime: symmetric, one scale per block, rounded to nearest.

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
# Parts of names of what stays float32.
KEPT = ("score_proj", "router_gate", "value_gate", "value_sums", "v_embed", "queries", "keys")
BLOCK_SIZE = 128


def narrow_weights(editor: GraphEditor, bits: Bits, block_size: int = BLOCK_SIZE) -> None:
    """Rewrite every product with a stored weight and every gather of stored rows.

    Args:
        editor: on a model lowered for the CPU, in float32.
        bits: of each weight.
        block_size: inputs that share a scale; where it does not divide a weight's inputs, the
            largest power of two below it that does, and at least 16, is taken.

    Raises:
        ValueError: the inputs of a weight are no multiple of 16.
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
        and [rows, inputs / block_size] float32 scales.
    """
    zero = 1 << (bits - 1)
    blocks = weight.reshape(len(weight), -1, block_size)
    # The number of largest magnitude takes the end of the range that has one more value.
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1, keepdims=True), -1)
    scales = largest / -zero
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    levels = np.clip(np.rint(blocks * inverse) + zero, 0, 2 * zero - 1).astype(np.uint8)
    if bits == 4:
        levels = levels[..., 0::2] | (levels[..., 1::2] << 4)
    return levels, scales[..., 0].astype(np.float32)


def fitting_block_size(inputs: int, block_size: int) -> int:
    """The largest power of two up to `block_size` that divides `inputs`.

    Raises:
        ValueError: none of at least 16 does.
    """
    while block_size >= 16:
        if inputs % block_size == 0:
            return block_size
        block_size //= 2
    raise ValueError(f"{inputs} inputs are no multiple of 16, which narrow weights need")


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
