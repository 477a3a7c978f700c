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
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

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


def squared_errors(weight: Weights, bits: Bits, block_size: int) -> Weights:
    difference = restored(*quantize_blocks(weight, bits, block_size), bits) - weight
    result: Weights = (difference.reshape(len(weight), -1, block_size) ** 2).sum(-1)
    return result


def errors_of_rounding_to_nearest(weight: Weights, block_size: int) -> Weights:
    """Of 4 bits, the largest number of a block at the end of the range."""
    blocks = weight.reshape(len(weight), -1, block_size)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1, keepdims=True), -1)
    scales = np.where(largest == 0, 1, largest / -8)
    levels = np.clip(np.rint(blocks / scales), -8, 7)
    result: Weights = ((levels * scales - blocks) ** 2).sum(-1)
    return result


@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_8_bits_are_off_by_half_a_step_at_most(block_size: int) -> None:
    weight = random_weight(7, 192)
    levels, scales = quantize_blocks(weight, 8, block_size)
    assert levels.shape == (7, 192 // block_size, block_size)
    step = np.repeat(np.abs(scales), block_size, axis=1)
    error = np.abs(restored(levels, scales, 8) - weight)
    # The end of the range without the additional number may be cut by up to one step.
    assert (error <= step * 1.001).all()
    assert np.mean(error <= step * 0.501) > 0.97


@given(
    arrays(np.float32, (3, 64), elements=st.floats(-100, 100, width=32, allow_subnormal=False)),
    st.sampled_from([16, 32, 64]),
)
def test_4_bits_lose_no_block_more_than_rounding_to_nearest(
    weight: Weights, block_size: int
) -> None:
    found = squared_errors(weight, 4, block_size)
    nearest = errors_of_rounding_to_nearest(weight, block_size)
    size = (weight.reshape(3, -1, block_size) ** 2).sum(-1)
    assert (found <= nearest * (1 + 1e-4) + size * 1e-9).all()


@pytest.mark.parametrize("block_size", [32, 128])
def test_4_bits_lose_a_good_part_less_of_normal_weights(block_size: int) -> None:
    """By 10 and 13 %; without a search by nothing."""
    weight = random_weight(64, 256)
    found = squared_errors(weight, 4, block_size).sum()
    assert found < 0.92 * errors_of_rounding_to_nearest(weight, block_size).sum()


@pytest.mark.parametrize("sign", [1, -1])
def test_what_4_bits_can_say_is_said_exactly(sign: int) -> None:
    levels = np.random.default_rng(0).integers(-8, 8, (6, 64))
    levels[:, ::32] = -8
    weight = (levels * sign * 0.37).astype(np.float32)
    np.testing.assert_allclose(
        restored(*quantize_blocks(weight, 4, 32), 4), weight, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("bits", [8, 4])
def test_a_block_of_zeros_stays_one(bits: Bits) -> None:
    weight = random_weight(5, 32)
    weight[2] = 0
    rounded = restored(*quantize_blocks(weight, bits, 32), bits)
    assert not rounded[2].any()
    assert rounded[[0, 1, 3, 4]].any(axis=1).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("size", [1e-45, 1e-40, 3e-38])
@pytest.mark.filterwarnings("error")
def test_numbers_too_small_for_an_inverse_stay_small(bits: Bits, size: float) -> None:
    """As rows that weight decay has worn down; an infinite inverse times zero is no number."""
    weight = random_weight(2, 32) * np.float32(size)
    weight[:, ::3] = 0
    rounded = restored(*quantize_blocks(weight, bits, 32), bits)
    assert (np.abs(rounded - weight) <= np.abs(weight).max()).all()


@pytest.mark.parametrize(("block_size", "part"), [(32, 0.97), (128, 0.99)])
def test_few_scales_leave_nearly_the_least_error_of_4000(block_size: int, part: float) -> None:
    """One sign, no fit to the levels or rounding to nearest leaves more than that."""
    weight = random_weight(16, 128)
    found = squared_errors(weight, 4, block_size).sum()
    blocks = weight.reshape(-1, 1, block_size)
    scales = np.linspace(-0.6, 0.6, 4000, dtype=np.float32)[:, None]
    levels = np.clip(np.rint(blocks / scales), -8, 7)
    least = ((levels * scales - blocks) ** 2).sum(-1).min(1).sum()
    assert found < least / part


def test_8_bits_keep_the_largest_number_of_a_block_exactly() -> None:
    weight = random_weight(5, 32)
    weight[3, 4] = -9
    rounded = restored(*quantize_blocks(weight, 8, 32), 8)
    places = np.abs(weight).argmax(1)
    np.testing.assert_allclose(
        rounded[np.arange(5), places], weight[np.arange(5), places], rtol=1e-6
    )


def test_rounding_a_large_weight_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(33, 64)
    whole = quantize_blocks(weight, 4, 32)
    monkeypatch.setattr("export.lowerings.narrow_weights._CHUNK", 7 * 32)
    for one, other in zip(whole, quantize_blocks(weight, 4, 32), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("block_size", [-32, 0, 8, 48, 512])
def test_block_size_that_the_product_does_not_have_is_an_error(block_size: int) -> None:
    with pytest.raises(ValueError, match=f"blocks of {block_size} inputs, expected 16, 32"):
        fitting_block_size(768, block_size)
    with pytest.raises(ValueError, match=f"blocks of {block_size} inputs, expected 16, 32"):
        quantize_blocks(random_weight(2, 1536), 4, block_size)


# Of the second shape the blocks come out even over all rows, not within one.
@pytest.mark.parametrize(("rows", "inputs"), [(3, 48), (4, 80)])
def test_rounding_in_blocks_that_do_not_divide_the_inputs_is_an_error(
    rows: int, inputs: int
) -> None:
    with pytest.raises(ValueError, match=f"blocks of 32 inputs do not divide {inputs} inputs"):
        quantize_blocks(random_weight(rows, inputs), 8, 32)


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
