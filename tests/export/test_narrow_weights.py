"""Weights of 8 and 4 bits: the rounding itself, and models made of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from export.lowerings.cpu import lower_for_cpu
from export.lowerings.graph_editor import GraphEditor
from export.lowerings.narrow_weights import (
    Bits,
    fitting_block_size,
    narrow_weights,
    quantize_blocks,
)
from plugins.onnx_function import OPSET
from tests.export.conftest import Exported

Weights = npt.NDArray[np.float32]


def restored(levels: npt.NDArray[np.uint8], scales: Weights, bits: Bits) -> Weights:
    """What the integers stand for."""
    if bits == 4:
        levels = np.stack([levels & 15, levels >> 4], axis=-1).reshape(*levels.shape[:2], -1)
    numbers = (levels.astype(np.float32) - 2 ** (bits - 1)) * scales[..., None]
    result: Weights = numbers.reshape(len(levels), -1)
    return result


def random_weight(rows: int, inputs: int) -> Weights:
    return np.random.default_rng(0).standard_normal((rows, inputs)).astype(np.float32)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_rounding_is_off_by_half_a_step_at_most(bits: Bits, block_size: int) -> None:
    weight = random_weight(7, 192)
    levels, scales = quantize_blocks(weight, bits, block_size)
    assert levels.shape == (7, 192 // block_size, block_size * bits // 8)
    step = np.repeat(np.abs(scales), block_size, axis=1)
    error = np.abs(restored(levels, scales, bits) - weight)
    # The end of the range without the additional number may be cut by up to one step.
    assert (error <= step * 1.001).all()
    assert np.mean(error <= step * 0.501) > 0.97


@pytest.mark.parametrize("bits", [8, 4])
def test_largest_number_of_a_block_and_zeros_are_kept_exactly(bits: Bits) -> None:
    weight = random_weight(5, 32)
    weight[2] = 0
    weight[3, 4] = -9
    restored_weight = restored(*quantize_blocks(weight, bits, 32), bits)
    assert not restored_weight[2].any()
    assert restored_weight[3, 4] == pytest.approx(-9)
    places = np.abs(weight).argmax(1)
    np.testing.assert_allclose(
        restored_weight[np.arange(5), places], weight[np.arange(5), places], rtol=1e-6
    )


@pytest.mark.parametrize(
    ("inputs", "wanted", "found"), [(256, 128, 128), (96, 128, 32), (64, 32, 32), (48, 64, 16)]
)
def test_block_is_the_largest_that_divides_the_inputs(inputs: int, wanted: int, found: int) -> None:
    assert fitting_block_size(inputs, wanted) == found


def test_inputs_that_no_block_divides_are_an_error() -> None:
    with pytest.raises(ValueError, match="40 inputs are no multiple of 16"):
        fitting_block_size(40, 128)


@pytest.mark.parametrize("bits", [8, 4])
def test_product_and_rows_are_those_of_the_rounded_weight(bits: Bits) -> None:
    weight = random_weight(24, 64)
    x = np.random.default_rng(1).standard_normal((1, 3, 64)).astype(np.float32)
    model = ir.Model(
        ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name="two"), ir_version=11
    )
    editor = GraphEditor(model)
    inputs = [
        ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, 3, 64])),
        ir.Value(name="rows", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([4])),
    ]
    editor.graph.inputs.extend(inputs)
    stored = editor.initializer("weight", weight)
    product = editor.contrib("FusedMatMul", inputs[0], stored, transB=1)
    gathered = editor.op("Gather", stored, inputs[1], axis=0)
    for value, name in ((product, "product"), (gathered, "gathered")):
        value.name, value.type = name, ir.TensorType(ir.DataType.FLOAT)
    editor.graph.outputs.extend([product, gathered])
    narrow_weights(editor, bits, 32)
    editor.finish()
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    results = session.run(None, {"x": x, "rows": np.array([0, 23, 5, 5])})
    rounded = restored(*quantize_blocks(weight, bits, 32), bits)
    np.testing.assert_allclose(results[1], rounded[[0, 23, 5, 5]], rtol=1e-5, atol=1e-6)
    # Activations are rounded to 8 bits inside the product.
    np.testing.assert_allclose(results[0], x @ rounded.T, atol=0.15)


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("case", ["g1", "g4_moe"])
def test_narrow_model_holds_narrow_weights_where_it_should(
    exported_case: Callable[[str], Exported], tmp_path: Path, case: str, precision: str
) -> None:
    exported = exported_case(case)
    path = tmp_path / "narrow.onnx"
    lowered = lower_for_cpu(
        exported.path,
        path,
        exported.network.config,
        slots=exported.slots,
        precision=precision,  # type: ignore[arg-type]
    )
    graph = onnx.load(str(path), load_external_data=False).graph
    counts = Counter(node.op_type for node in graph.node)
    assert counts["GatherBlockQuantized"] == 1 + 2 * 3  # the embedding, and each layer's experts
    products = {"g1": 3 * 4 + 1, "g4_moe": 3 * 4 + 1}[case]
    assert counts["MatMulNBits"] == products
    large = [t for t in graph.initializer if t.data_type == 1 and np.prod(t.dims) > 64 * 28 * 2]
    assert not large, [tensor.name for tensor in large]
    backend = exported.backend_on(
        path, exported.contract_with(score_heads=lowered.score_heads), rows_alone=True
    )
    ids = exported.golden["input_ids"][:1]
    lengths = np.array([ids.shape[1]])
    expected = exported.golden["prefill_logits"][:1]
    actual = backend.score(ids, lengths, backend.new_cache(1))
    error = np.median(np.abs(actual - expected)) / np.abs(expected).max()
    assert 1e-5 < error < {"int8": 0.02, "int4": 0.3}[precision]
