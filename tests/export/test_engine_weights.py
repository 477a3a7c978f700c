"""Weights of 8 and 4 bits in an engine: the rounding, which weights, and models made of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
import pytest

from export.engine import EngineConfig, build_engine
from export.estimate import estimate
from export.lowerings.engine_weights import (
    WEIGHT_FORMATS,
    NarrowWeight,
    WeightFormat,
    format_in_engine,
    narrow_bytes,
    narrow_engine_weights,
    narrowed,
    weight_format,
)
from export.lowerings.graph_editor import GraphEditor
from export.lowerings.narrow_weights import round_blocks
from export.lowerings.tensorrt import lower_for_tensorrt
from export.progress import BuildProgress
from model.released import RELEASED_SHAPES
from plugins.onnx_function import OPSET
from runtime.backends.onnxruntime_backend import OnnxRuntimeBackend, make_session
from runtime.cpu_threads import CpuThreads
from tests.export.conftest import Exported

Weights = npt.NDArray[np.float32]
E4M3 = ml_dtypes.float8_e4m3fn


def random_weight(rows: int, inputs: int, size: float = 1.0) -> Weights:
    numbers = np.random.default_rng(0).standard_normal((rows, inputs)) * size
    return numbers.astype(np.float16).astype(np.float32)


def wide_scales(narrow: NarrowWeight) -> Weights:
    """The scale of each number of the weight."""
    scales = narrow.scales.astype(np.float32)
    if narrow.block_size:
        return np.repeat(scales, narrow.block_size, axis=narrow.axis)
    shape = [1, 1]
    shape[narrow.axis] = -1
    return np.broadcast_to(scales.reshape(shape), narrow.stored.shape)


def restored(narrow: NarrowWeight) -> Weights:
    """What the stored numbers stand for, by the definition of DequantizeLinear."""
    result: Weights = narrow.stored.astype(np.float32) * wide_scales(narrow)
    return result


def of_graph(graph: ir.Graph) -> dict[str, NarrowWeight]:
    """Every DequantizeLinear of a stored tensor, by the name of the weight."""
    found = {}
    for node in graph:
        if node.op_type == "DequantizeLinear":
            stored, scales = node.inputs
            assert stored is not None
            assert stored.const_value is not None
            assert scales is not None
            assert scales.const_value is not None
            blocks = (
                node.attributes["block_size"].as_int() if "block_size" in node.attributes else 0
            )
            found[(stored.name or "").rpartition(".")[0]] = NarrowWeight(
                stored=stored.const_value.numpy(),
                scales=scales.const_value.numpy(),
                axis=node.attributes["axis"].as_int(),
                block_size=blocks,
            )
    return found


@pytest.mark.parametrize("inputs_axis", [1, 0])
@pytest.mark.parametrize("size", [30.0, 0.02, 1e-3, 1e-5])
def test_int8_is_off_by_half_a_step_of_its_output_at_most(size: float, inputs_axis: int) -> None:
    """Also where the scales are among the smallest numbers of float16."""
    weight = random_weight(24, 80, size)
    weight[7] *= np.float32(0.125)
    weight = weight if inputs_axis == 1 else np.ascontiguousarray(weight.T)
    narrow = narrowed(weight, "int8", inputs_axis)
    assert narrow.stored.dtype == np.int8
    assert narrow.scales.dtype == np.float16
    assert narrow.scales.shape == (24,)
    assert (narrow.axis, narrow.block_size) == (1 - inputs_axis, 0)
    assert narrow.stored.min() >= -127  # symmetric
    assert (np.abs(restored(narrow) - weight) <= wide_scales(narrow) * 0.5001).all()
    # The step is the finest that reaches the largest number, but for the rounding of the scale.
    largest = np.abs(weight).max(inputs_axis)
    scales = narrow.scales.astype(np.float32)
    assert (scales * 127 >= largest).all()
    assert (scales <= largest / 127 * 1.001 + 6e-8).all()


@pytest.mark.parametrize("inputs_axis", [1, 0])
@pytest.mark.parametrize("size", [30.0, 0.02, 1e-3, 1e-5])
def test_fp8_is_off_by_half_a_step_at_most(size: float, inputs_axis: int) -> None:
    """Three bits behind the leading one, down to 2^-9 of a scale."""
    weight = random_weight(24, 80, size)
    weight = weight if inputs_axis == 1 else np.ascontiguousarray(weight.T)
    narrow = narrowed(weight, "fp8", inputs_axis)
    assert narrow.stored.dtype == E4M3
    assert np.isfinite(narrow.stored.astype(np.float32)).all()
    assert (narrow.axis, narrow.scales.shape) == (1 - inputs_axis, (24,))
    half_step = np.maximum(np.abs(weight) / 16, wide_scales(narrow) * 2.0**-10)
    assert (np.abs(restored(narrow) - weight) <= half_step * 1.001).all()
    largest = np.abs(weight).max(inputs_axis)
    assert (narrow.scales.astype(np.float32) <= largest / 448 * 1.001 + 6e-8).all()


@pytest.mark.parametrize("inputs_axis", [1, 0])
@pytest.mark.parametrize(("inputs", "block"), [(128, 64), (64, 64), (96, 32), (80, 16)])
def test_int4_is_off_by_half_a_step_where_it_does_not_cut(
    inputs: int, block: int, inputs_axis: int
) -> None:
    """Blocks run along the inputs, and where 64 does not divide them, are smaller."""
    weight = random_weight(24, inputs)
    weight = weight if inputs_axis == 1 else np.ascontiguousarray(weight.T)
    narrow = narrowed(weight, "int4", inputs_axis)
    assert narrow.stored.dtype == ml_dtypes.int4
    assert (narrow.axis, narrow.block_size) == (inputs_axis, block)
    shape = [24, inputs // block]
    assert list(narrow.scales.shape) == (shape if inputs_axis == 1 else shape[::-1])
    levels = narrow.stored.astype(np.int32)
    error = np.abs(restored(narrow) - weight)
    inside = (levels > -8) & (levels < 7)
    assert (error[inside] <= wide_scales(narrow)[inside] * 0.501).all()
    assert inside.mean() > 0.85
    # No more is lost than by the scale that just reaches the largest number.
    rows = weight if inputs_axis == 1 else weight.T
    blocks = rows.reshape(-1, block)
    reach = np.abs(blocks).max(1, keepdims=True) / 7
    nearest = ((np.clip(np.rint(blocks / reach), -8, 7) * reach - blocks) ** 2).sum()
    assert (error**2).sum() < 0.93 * nearest


@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_few_positive_scales_leave_nearly_the_least_error_of_1000(block_size: int) -> None:
    blocks = random_weight(64, block_size)
    levels, scales = round_blocks(blocks, 4, positive=True)
    assert (scales > 0).all()
    found = ((levels * scales[:, None] - blocks) ** 2).sum()
    reach = np.abs(blocks).max(1)
    least = np.full(64, np.inf)
    for part in np.linspace(0.3, 1.2, 1000):
        scale = (reach / 7 * part)[:, None]
        error = ((np.clip(np.rint(blocks / scale), -8, 7) * scale - blocks) ** 2).sum(1)
        least = np.minimum(least, error)
    assert found < least.sum() * 1.015


@pytest.mark.parametrize("weights", WEIGHT_FORMATS)
def test_a_row_of_zeros_stays_one_and_its_scale_is_not_zero(weights: WeightFormat) -> None:
    """TensorRT refuses scales of 0."""
    weight = random_weight(8, 64)
    weight[3] = 0
    narrow = narrowed(weight, weights, 1)
    assert (narrow.scales > 0).all()
    assert not restored(narrow)[3].any()
    assert restored(narrow)[[0, 1, 2, 4, 5, 6, 7]].any(axis=1).all()


@pytest.mark.parametrize("weights", WEIGHT_FORMATS)
@pytest.mark.filterwarnings("error")
def test_the_smallest_numbers_of_float16_keep_finite_positive_scales(
    weights: WeightFormat,
) -> None:
    weight = random_weight(4, 64, 1.0)
    weight[1] = np.sign(weight[1]) * np.float32(6e-8)
    weight[2] *= np.float32(65504 / np.abs(weight[2]).max())
    narrow = narrowed(weight.astype(np.float16).astype(np.float32), weights, 1)
    assert (narrow.scales > 0).all()
    assert np.isfinite(restored(narrow)).all()


def test_inputs_that_no_block_divides_are_an_error_that_names_the_weight() -> None:
    with pytest.raises(ValueError, match=r"40 inputs are no multiple of 16.*--precision int8"):
        narrowed(random_weight(4, 40), "int4", 1)
    assert narrowed(random_weight(4, 40), "int8", 1).stored.shape == (4, 40)
    model = product_model(random_weight(8, 40), transposed=True)
    with pytest.raises(ValueError, match=r"^weight: 40 inputs"):
        narrow_engine_weights(model, "int4")


def product_model(weight: Weights, *, transposed: bool, gemm: bool = False) -> ir.Model:
    """y = x · weight, of a weight as it is stored or transposed by a node or by Gemm."""
    graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name="product")
    editor = GraphEditor(ir.Model(graph, ir_version=11))
    half = ir.TensorType(ir.DataType.FLOAT16)
    inputs = weight.shape[1] if transposed else weight.shape[0]
    x = ir.Value(name="x", type=half, shape=ir.Shape([3, inputs]))
    graph.inputs.append(x)
    stored = editor.initializer("weight", weight.astype(np.float16))
    if gemm:
        y = editor.op("Gemm", x, stored, transB=int(transposed))
    else:
        if transposed:
            stored = editor.op("Transpose", stored, perm=(1, 0))
            stored.type = half
        y = editor.op("MatMul", x, stored)
    y.name, y.type = "y", half
    graph.outputs.append(y)
    return editor.model


def run_half(model: ir.Model, **feeds: npt.NDArray[np.generic]) -> Weights:
    options = onnxruntime.SessionOptions()
    # Without this it rounds activations to 8 bits in products that it recognises.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    result: Weights = session.run(None, feeds)[0].astype(np.float32)
    return result


@pytest.mark.parametrize("weights", WEIGHT_FORMATS)
@pytest.mark.parametrize("gemm", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_product_is_that_of_the_rounded_weight(
    weights: WeightFormat, transposed: bool, gemm: bool
) -> None:
    weight = random_weight(48, 64)  # not square: a wrong axis cannot pass
    model = product_model(weight, transposed=transposed, gemm=gemm)
    assert narrow_engine_weights(model, weights) == ("weight",)
    narrow = narrowed(weight, weights, 1 if transposed else 0)
    rounded = restored(narrow)
    assert "weight" not in model.graph.initializers
    x = random_weight(3, 64 if transposed else 48)
    expected = x @ (rounded.T if transposed else rounded)
    actual = run_half(model, x=x.astype(np.float16))
    np.testing.assert_allclose(actual, expected, atol=0.02)  # float16, up to 30
    assert np.abs(actual - x @ (weight.T if transposed else weight)).max() > 1e-3


@pytest.mark.parametrize("transposed", [False, True])
def test_weight_that_another_node_reads_too_stays_float16(transposed: bool) -> None:
    """As a tied embedding; here the product comes first."""
    model = product_model(random_weight(32, 64), transposed=transposed)
    editor = GraphEditor(model)
    rows = ir.Value(name="rows", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([2]))
    model.graph.inputs.append(rows)
    weight = model.graph.initializers["weight"]
    looked_up = editor.op("Gather", weight, rows, axis=0)
    looked_up.type = ir.TensorType(ir.DataType.FLOAT16)
    model.graph.outputs.append(looked_up)
    with pytest.raises(ValueError, match="no product of the model"):
        narrow_engine_weights(model, "int8")
    assert model.graph.initializers["weight"] is weight


def test_model_without_products_of_float16_is_an_error() -> None:
    model = product_model(random_weight(16, 16), transposed=False)
    model.graph.initializers["weight"].const_value = ir.tensor(random_weight(16, 16))
    model.graph.initializers["weight"].dtype = ir.DataType.FLOAT
    with pytest.raises(ValueError, match="no product of the model has a stored float16 weight"):
        narrow_engine_weights(model, "int8")


Lowered = Callable[[str, WeightFormat | None], Path]


@pytest.fixture(scope="module")
def lowered(
    exported_case: Callable[[str], Exported], tmp_path_factory: pytest.TempPathFactory
) -> Lowered:
    """Gives a golden case as it is lowered for TensorRT, each once; not to be changed."""
    made: dict[tuple[str, str | None], Path] = {}

    def get(case: str, weights: WeightFormat | None) -> Path:
        if (case, weights) not in made:
            folder = tmp_path_factory.mktemp(f"{case}-{weights}")
            path = exported_case(case).path
            made[case, weights] = lower_for_tensorrt(path, folder, "float16", weights=weights)
        return made[case, weights]

    return get


# What each layer's products read, after all lowerings, and what stands alone there with int4.
FFN = "model.layers.{i}.mlp.gate_proj.weight model.layers.{i}.mlp.up_proj.weight"
G1, G3 = "model.layers.{i}.attn.", "model.layers.{i}.feed_forward."
NARROW = {
    "g1": [
        f"{G1}value_gate.weight layers.{{i}}.attention_inputs.weight",
        f"{G1}o_proj.weight",
        f"{G3}up_proj.weight {G3}router_gate.weight",
        f"{G3}down_proj.weight",
    ],
    "g3_moe": [
        "layers.{i}.attention_inputs.weight",
        "model.layers.{i}.self_attn.o_proj.weight",
        f"{G3}gate_proj.weight {G3}up_proj.weight {G3}router_gate.weight",
        f"{G3}down_proj.weight",
    ],
    "g4": [
        "layers.{i}.attention_inputs.weight",
        "model.layers.{i}.self_attn.o_proj.weight",
        FFN,
        "model.layers.{i}.mlp.down_proj.weight",
    ],
    "g4_untied_mha": [
        "layers.{i}.attention_inputs.weight",
        "model.layers.{i}.self_attn.o_proj.weight",
        FFN,
        "model.layers.{i}.mlp.down_proj.weight",
    ],
}
KEPT = {
    "g1": ["model.word_embed.weight", ".down_embed.weight"],
    "g3_moe": ["model.word_embed.weight", ".up_embed.weight"],
    "g4": ["model.embed_tokens.weight"],
    "g4_untied_mha": ["model.embed_tokens.weight"],
}
EIGHT_BITS = ("lm_head", "router_gate", "value_gate", "o_proj")


@pytest.mark.parametrize("weights", WEIGHT_FORMATS)
@pytest.mark.parametrize("case", NARROW)
def test_linear_layers_become_narrow_and_nothing_else(
    exported_case: Callable[[str], Exported], lowered: Lowered, case: str, weights: WeightFormat
) -> None:
    config = exported_case(case).network.config
    graph = ir.load(lowered(case, weights)).graph
    found = of_graph(graph)
    layers = range(config.num_hidden_layers)
    expected = {name.format(i=i) for name in NARROW[case] for i in layers}
    if weights == "int4":  # what routes tokens is int8 and no part of another product
        expected = {part for name in expected for part in _alone(name)}
    if not config.tie_word_embeddings:
        expected.add("lm_head.weight")
    assert set(found) == expected
    types = {"int8": np.int8, "int4": ml_dtypes.int4, "fp8": E4M3}
    for name, narrow in found.items():
        own = weights
        if weights == "int4" and any(part in name for part in EIGHT_BITS):
            own = "int8"
        assert narrow.stored.dtype == types[own], name
        assert narrow.scales.dtype == np.float16, name
        assert (narrow.scales > 0).all(), name
    for node in graph:
        if node.op_type == "DequantizeLinear":
            assert len(node.inputs) == 2  # no zero points
    wide = {
        name
        for name, value in graph.initializers.items()
        if value.dtype == ir.DataType.FLOAT16 and len(value.shape or ()) == 2
        if not name.endswith(".scale")
    }
    assert not [name for name in wide if any(part in name for part in EIGHT_BITS)]
    for part in KEPT[case]:
        assert any(name.endswith(part) or part in name for name in wide), part
    assert not [name for name in wide if "_proj" in name and "dt_proj" not in name]


@pytest.mark.parametrize("weights", WEIGHT_FORMATS)
@pytest.mark.parametrize("case", ["g3_moe", "g4", "g4_untied_mha"])  # not g1: its routers are made
def test_names_and_shapes_alone_tell_the_size_of_the_narrow_weights(
    exported_case: Callable[[str], Exported], lowered: Lowered, case: str, weights: WeightFormat
) -> None:
    network = exported_case(case).network
    config, generation = network.config, network.generation
    graph = ir.load(lowered(case, weights)).graph
    formats = {
        name: (shape, format_in_engine(name, shape, weights, tied=config.tie_word_embeddings))
        for name, shape in generation.tensor_shapes(config).items()
    }
    told = sum(narrow_bytes(shape, f) for shape, f in formats.values() if f is not None)
    # What scores are made of stands in the product as a whole head.
    head = narrow_bytes((config.head_dim, config.hidden_size), weights)
    told += config.num_hidden_layers * head
    counted = 0
    for narrow in of_graph(graph).values():
        bits = 4 if narrow.stored.dtype == ml_dtypes.int4 else 8
        counted += narrow.stored.size * bits // 8 + narrow.scales.size * 2
    assert told == counted


def _alone(name: str) -> list[str]:
    """A joined weight without its router, and the router."""
    names = name.split(" ")
    routers = [one for one in names if "_gate." in one]
    return [" ".join(one for one in names if one not in routers), *routers]


@pytest.mark.parametrize("weights", WEIGHT_FORMATS)
@pytest.mark.parametrize("case", NARROW)
def test_no_value_is_multiplied_with_narrow_and_with_float16_weights(
    lowered: Lowered, case: str, weights: WeightFormat
) -> None:
    """TensorRT-RTX would widen the narrow one in every step to make both one product."""
    graph = ir.load(lowered(case, weights)).graph
    readers: dict[ir.Value, set[str]] = {}
    for node in graph:
        if node.op_type == "MatMul" and node.inputs[0] is not None and node.inputs[1] is not None:
            weight: ir.Value | None = node.inputs[1]
            while weight is not None and (made := weight.producer()) is not None:
                if made.op_type == "DequantizeLinear":
                    break
                weight = made.inputs[0]
            narrow = weight is not None and weight.producer() is not None
            readers.setdefault(node.inputs[0], set()).add("narrow" if narrow else "wide")
    assert readers
    mixed = {value.name for value, kinds in readers.items() if len(kinds) > 1}
    assert not mixed


def with_restored_weights(path: Path, folder: Path) -> Path:
    """A copy of a model whose DequantizeLinear nodes are replaced by what they stand for."""
    model = ir.load(path)
    editor = GraphEditor(model)
    restored_weights = {name: restored(n) for name, n in of_graph(model.graph).items()}
    for node in list(model.graph):
        if node.op_type == "DequantizeLinear" and node.inputs[0] is not None:
            name = (node.inputs[0].name or "").rpartition(".")[0]
            wide = editor.initializer(f"{name}.restored", restored_weights[name].astype(np.float16))
            node.outputs[0].replace_all_uses_with(wide)
    editor.finish()
    result = folder / "restored.onnx"
    ir.save(model, result, external_data="restored.onnx.data")
    return result


def exact_backend(exported: Exported, path: Path) -> OnnxRuntimeBackend:
    """ONNX Runtime on a lowered model, with activations of float16 whatever the weights are."""
    backend = exported.backend_on(path, exported.contract_with("float16"))
    settings = {"session.disable_quant_qdq": "1"}
    backend._session = make_session(str(path), CpuThreads(1), settings=settings)
    return backend


# Of the logits' largest, the median error against the float16 model of random weights.
LOSS = {"int8": 0.01, "fp8": 0.04, "int4": 0.25}
# Of g1 more: its narrow routers pick other experts and values, of which random ones have no likes.
LOSS_OF_SEED = {"int8": 0.05, "fp8": 0.1, "int4": 0.25}


@pytest.mark.parametrize("weights", WEIGHT_FORMATS)
@pytest.mark.parametrize("case", NARROW)
def test_narrow_model_is_near_the_float16_one_and_is_that_of_its_rounded_weights(
    exported_case: Callable[[str], Exported],
    lowered: Lowered,
    tmp_path: Path,
    case: str,
    weights: WeightFormat,
) -> None:
    exported = exported_case(case)
    half, narrow = lowered(case, None), lowered(case, weights)
    ids = exported.golden["input_ids"][:1]
    lengths = np.array([ids.shape[1]])

    def logits(path: Path) -> Weights:
        backend = exact_backend(exported, path)
        result: Weights = backend.score(ids, lengths, backend.new_cache(1))
        return result

    expected, actual = logits(half), logits(narrow)
    largest = np.abs(expected).max()
    loss = (LOSS_OF_SEED if case == "g1" else LOSS)[weights]
    assert 1e-5 < np.median(np.abs(actual - expected)) / largest < loss
    same = logits(with_restored_weights(narrow, tmp_path))
    assert np.median(np.abs(actual - same)) / largest < 1e-3  # of float16


@pytest.mark.parametrize("name", ["doge-20m", "doge-160m", "doge-120m-moe", "doge-76m"])
def test_estimated_engine_is_smaller_the_fewer_bits_it_has(name: str) -> None:
    shape = RELEASED_SHAPES[name]
    found = {
        precision: estimate(
            shape.config,
            shape.generation,
            EngineConfig(precision=precision, max_input_len=2048, max_seq_len=2048),
        )
        for precision in ("fp16", "int8", "fp8", "int4")
    }
    assert found["fp8"] == found["int8"]
    for field in ("engine_bytes", "read_bytes_per_token", "floor_us"):
        values = [getattr(found[p], field) for p in ("fp16", "int8", "int4")]
        assert values[0] > values[1] > values[2], field
    assert found["int4"].kv_bytes == found["fp16"].kv_bytes


def test_only_narrow_precisions_have_a_format_of_weights() -> None:
    assert [weight_format(p) for p in ("fp16", "bf16", "fp32")] == [None, None, None]
    assert [weight_format(p) for p in ("int8", "int4", "fp8")] == ["int8", "int4", "fp8"]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["g1", "g3_moe", "g4"])
def test_engine_for_sm89_holds_narrow_weights(
    exported_case: Callable[[str], Exported], lowered: Lowered, case: str
) -> None:
    exported = exported_case(case)
    weight_bytes = {}
    for precision in ("fp16", "int8", "int4", "fp8"):
        weights = weight_format(precision)
        path = lowered(case, weights)
        config = EngineConfig(
            precision=precision,  # type: ignore[arg-type]
            max_input_len=exported.slots,
            max_seq_len=exported.slots,
        )
        contract = exported.contract_with("float16")
        built = build_engine(path, config, contract, BuildProgress(quiet=True))
        assert built.report.plan is not None
        dequantized = 0 if weights is None else len(of_graph(ir.load(path).graph))
        assert built.report.layers.get("DEQUANTIZE", 0) == dequantized
        weight_bytes[precision] = built.report.plan.weights_bytes
    assert weight_bytes["int8"] == weight_bytes["fp8"]
    assert weight_bytes["fp16"] > weight_bytes["int8"] > weight_bytes["int4"]
