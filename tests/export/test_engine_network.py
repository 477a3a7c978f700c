"""What the parsed network must be before it is built: the cache is never copied in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from export.builder_callbacks import BuildLog, make_logger
from export.decode_graph import write_decode_graph
from export.engine_config import EngineBuildError
from export.engine_network import check_cache_in_place
from export.lowerings.engine_weights import WeightFormat
from export.lowerings.graph_editor import GraphEditor
from export.lowerings.tensorrt import lower_for_tensorrt
from model.contract import cache_kinds
from runtime.engines.decode_graph import DecodeGraphContract
from runtime.tensorrt_module import load_tensorrt
from tests.export.conftest import Exported


@contextmanager
def parsed(path: Path) -> Iterator[Any]:
    """The network of a model, by the real parser; nothing is built."""
    trt = load_tensorrt("tensorrt_rtx")
    logger = make_logger(trt, BuildLog())
    builder = trt.Builder(logger)
    network = builder.create_network()
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(path)), parser.get_error(0).desc()
    yield network


@pytest.mark.parametrize(
    ("case", "dtype", "weights"),
    [
        ("g4", "float16", None),
        ("g4", "float16", "int4"),
        ("g4", "bfloat16", None),
        ("g4", "float32", None),
        ("g4_window", "float16", None),
        ("g3_moe", "float16", "int8"),
        ("g1", "float16", None),
    ],
)
def test_no_layer_copies_the_cache(
    exported_case: Callable[[str], Exported],
    tmp_path: Path,
    case: str,
    dtype: str,
    weights: WeightFormat | None,
) -> None:
    exported = exported_case(case)
    contract = exported.contract_with(dtype)
    path = lower_for_tensorrt(exported.path, tmp_path, dtype, weights=weights)
    layers = exported.network.config.num_hidden_layers
    with parsed(path) as network:
        check_cache_in_place(network, contract, "none")
        kinds = [network.get_layer(i).type.name for i in range(network.num_layers)]
        tensors = len(cache_kinds(exported.network.generation)) * layers
        assert kinds.count("KV_CACHE_UPDATE") == tensors == len(contract.aliases)
    with parsed(write_decode_graph(path)) as network:
        check_cache_in_place(network, DecodeGraphContract(contract), "none")
        outputs = {network.get_output(i).name for i in range(network.num_outputs)}
        assert "logits" not in outputs


def key_of_attention(editor: GraphEditor) -> tuple[ir.Node, ir.Value]:
    node = next(n for n in editor.graph if n.op_type == "DynamicMaskAttention")
    key = node.inputs[1]
    assert key is not None
    assert key.name == "present.0.key"
    return node, key


def typed(value: ir.Value, like: ir.Value) -> ir.Value:
    value.type, value.shape = like.type, like.shape
    return value


def scale_each_number(editor: GraphEditor) -> None:
    """Attention reads keys that another layer has written out."""
    node, key = key_of_attention(editor)
    sizes = np.linspace(1, 2, 16).astype(np.float16)
    node.replace_input_with(1, typed(editor.op("Mul", key, editor.initializer("s", sizes)), key))


def scale_each_number_of_values(editor: GraphEditor) -> None:
    """Likewise values, which attention then reads with no layer between."""
    node, _ = key_of_attention(editor)
    value = node.inputs[2]
    assert value is not None
    sizes = editor.initializer("s", np.linspace(1, 2, 16).astype(np.float16))
    node.replace_input_with(2, typed(editor.op("Mul", value, sizes), value))


def scale_by_one_number_and_read_twice(editor: GraphEditor) -> None:
    """By one number, as the parser does, but not for attention alone."""
    node, key = key_of_attention(editor)
    half = editor.initializer("half", np.array([0.5], np.float16))
    scaled = typed(editor.op("Mul", key, half), key)
    node.replace_input_with(1, scaled)
    total = editor.op("ReduceMax", scaled, editor.ints(1, 2, 3), keepdims=0)
    add_to_logits(editor, total)


def reverse_slots(editor: GraphEditor) -> None:
    """The values are put into another order."""
    node, _ = key_of_attention(editor)
    value = node.inputs[2]
    assert value is not None
    order = editor.initializer("order", np.arange(int(str(value.shape[2])))[::-1].copy())
    node.replace_input_with(2, typed(editor.op("Gather", value, order, axis=2), value))


def read_the_past(editor: GraphEditor) -> None:
    """Something reads scores from before the write."""
    (past,) = (v for v in editor.graph.inputs if v.name == "past_key_values.0.score")
    add_to_logits(editor, editor.op("ReduceMax", past, editor.ints(1, 2, 3), keepdims=0))


def add_to_logits(editor: GraphEditor, number: ir.Value) -> None:
    """So that the parser does not drop what nothing reads; `number` is [B]."""
    (logits,) = (v for v in editor.graph.outputs if v.name == "logits")
    wide = editor.op("Cast", editor.op("Unsqueeze", number, editor.ints(1, 2)), to=1)
    maker = logits.producer()
    assert maker is not None
    logits.name = "logits.before"
    result = typed(editor.op("Add", logits, wide), logits)
    result.name = "logits"
    editor.graph.outputs[editor.graph.outputs.index(logits)] = result


@pytest.mark.parametrize(
    ("plant", "said"),
    [
        (scale_each_number, r"present\.0\.key is read by ELEMENTWISE .*-1, 2, "),
        (scale_each_number_of_values, r"present\.0\.value is read by ELEMENTWISE"),
        (scale_by_one_number_and_read_twice, r"present\.0\.key is read by ELEMENTWISE"),
        (reverse_slots, r"present\.0\.value is read by GATHER"),
        (read_the_past, r"past_key_values\.0\.score is read by \['KV_CACHE_UPDATE', "),
    ],
)
def test_a_copy_is_found_and_named(
    exported_case: Callable[[str], Exported],
    tmp_path: Path,
    plant: Callable[[GraphEditor], None],
    said: str,
) -> None:
    exported = exported_case("g4")
    path = lower_for_tensorrt(exported.path, tmp_path, "float16")
    editor = GraphEditor(ir.load(path))
    plant(editor)
    editor.finish()
    copied = tmp_path / "copied.onnx"
    ir.save(editor.model, copied, external_data="copied.onnx.data")
    contract = exported.contract_with("float16")
    with parsed(copied) as network, pytest.raises(EngineBuildError, match=said):
        check_cache_in_place(network, contract, "none")


def test_a_cache_written_by_plugins_is_expected_of_layer_plugins_alone(
    exported_case: Callable[[str], Exported], tmp_path: Path
) -> None:
    exported = exported_case("g4")
    path = lower_for_tensorrt(exported.path, tmp_path, "float16")
    with (
        parsed(path) as network,
        pytest.raises(EngineBuildError, match=r"\['KV_CACHE_UPDATE'\], expected one PLUGIN_V3"),
    ):
        check_cache_in_place(network, exported.contract_with("float16"), "layer")
