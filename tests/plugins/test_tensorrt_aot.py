"""Registering plugins that an engine holds, against a stand-in for `tensorrt.plugin`."""

from __future__ import annotations

import pytest

from plugins import tensorrt_aot
from plugins.aot_plugin import AotCode, Sizes
from plugins.aot_registry import AOT_PLUGINS
from plugins.dynamic_mask_attention.aot import ATTEND_SHARES, JOIN_SHARES
from plugins.expert_gather.aot import GATHER_EXPERTS, ROUTE_EXPERTS, router_scratch
from plugins.tensorrt_aot import register_aot_plugins
from plugins.tensorrt_plugin import PluginError
from plugins.value_gather.aot import GATHER_VALUES
from tests.fake_tensorrt_plugin import BuiltLayer, FakeTensorRt, number

KEY = ("B", 3, 2048, 128)
# Attributes, dimensions and types of a layer's inputs, and a step.
LAYERS = {
    "AttendShares": (
        {"scale": 0.125, "max_splits": 32, "one_score_row": 0},
        {
            "query": ("B", 6, "S", 128),
            "key": KEY,
            "value": KEY,
            "score": ("B", 3, 2048, 1),
            "write_index": ("B",),
        },
        {"query": "HALF", "key": "HALF", "value": "HALF", "score": "FLOAT", "write_index": "INT64"},
    ),
    "JoinShares": (
        {"max_splits": 32},
        {
            "query": ("B", 6, "S", 128),
            "values": ("shares", "B", "S", 6, 128),
            "masses": ("shares", "B", "S", 6, 2),
        },
        {"query": "HALF", "values": "FLOAT", "masses": "FLOAT"},
    ),
    "RouteExperts": (
        {"top_k": 8, "normalize": 0, "scratch_size": router_scratch(8, 32)},
        {"scores_x": ("T", 2, 32), "scores_y": ("T", 2, 32)},
        {"scores_x": "BF16", "scores_y": "BF16"},
    ),
    "GatherExperts": (
        {"weight_inside": 1},
        {
            "hidden": ("T", 256),
            "down": (1024, 256),
            "up": (1024, 256),
            "experts": ("T", 2, 8),
            "weights": ("T", 2, 8),
        },
        {"hidden": "BF16", "down": "BF16", "up": "BF16", "experts": "INT32", "weights": "FLOAT"},
    ),
    "GatherValues": (
        {"top_k": 2, "subset_sums": 0},
        {"scores": ("T", 2, 4), "table": (4, 600)},
        {"scores": "FLOAT", "table": "FLOAT"},
    ),
}
STEP = {"B": 2, "S": 3, "T": 7, "shares": 6}
OUTPUT_TYPES = {
    "AttendShares": ["FLOAT", "FLOAT"],
    "JoinShares": ["HALF"],
    "RouteExperts": ["INT32", "FLOAT", "FLOAT"],
    "GatherExperts": ["BF16"],
    "GatherValues": ["FLOAT"],
}
NUMPY_TYPES = {
    "FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT32": "int32", "INT64": "int64"
}  # fmt: skip


class EveryCode(dict):
    """Code of any kernel, which says whose it is."""

    def __contains__(self, name):
        return True

    def __getitem__(self, name):
        return AotCode(entry="kernel", ptx=f"// {name}", threads=96, shared_bytes=1024)


@pytest.fixture
def trt(monkeypatch):
    monkeypatch.setattr(tensorrt_aot, "_HOSTS", {})
    return FakeTensorRt()


@pytest.fixture
def host(trt):
    host = register_aot_plugins(trt, trt.plugin)
    host.codes = EveryCode()
    return host


def in_a_step(sizes):
    return tuple(STEP.get(size, size) for size in sizes)


def test_every_plugin_has_the_three_functions(trt, host):
    assert set(trt.registered) == {plugin.name for plugin in AOT_PLUGINS}
    for functions in trt.registered.values():
        assert set(functions) == {"register", "autotune", "aot_impl"}


def test_registering_twice_registers_once(trt, host):
    assert register_aot_plugins(trt, trt.plugin) is host  # the stand-in refuses a second time


@pytest.mark.parametrize("plugin", AOT_PLUGINS, ids=lambda plugin: plugin.name)
def test_symbols_give_what_plain_numbers_give(trt, host, plugin):
    attributes, shapes, types = LAYERS[plugin.name]
    layer = BuiltLayer(trt, plugin, attributes, shapes, types)
    concrete = {name: in_a_step(shape) for name, shape in shapes.items()}
    specs = plugin.make_kernels(
        attributes, concrete, {name: NUMPY_TYPES[kind] for name, kind in types.items()}
    )
    assert list(layer.kernels) == ([1, 2] if plugin.tactics == 2 else [0])
    for spec, (name, ptx, launch, extras) in zip(specs, layer.kernels.values(), strict=True):
        sizes = Sizes(plugin, attributes, concrete, spec=spec)
        assert (name, ptx) == (b"kernel", f"// {spec.name}".encode())
        grid = (launch.grid_x, launch.grid_y, launch.grid_z)
        assert tuple(number(size, STEP) for size in grid) == sizes.grid(spec)
        assert (launch.block_x, launch.block_y, launch.block_z) == (96, 1, 1)
        assert launch.shared_mem == 1024
        assert tuple(number(size, STEP) for size in extras.items) == sizes.extras()
        for output, tensor in layer.outputs.items():
            found = tuple(number(size, STEP) for size in tensor.shape_expr)
            assert found == sizes.output_shape(output)
    assert host.problems == []
    assert host.used == {spec.name for spec in specs}


@pytest.mark.parametrize("plugin", AOT_PLUGINS, ids=lambda plugin: plugin.name)
def test_types_are_those_of_the_network_and_layouts_linear(trt, host, plugin):
    attributes, shapes, types = LAYERS[plugin.name]
    layer = BuiltLayer(trt, plugin, attributes, shapes, types)
    assert [tensor.dtype.name for tensor in layer.outputs.values()] == OUTPUT_TYPES[plugin.name]
    kinds = [*types.values(), *OUTPUT_TYPES[plugin.name]]
    text = {"FLOAT": "FP32", "HALF": "FP16"}
    assert layer.combination.io_types == [text.get(kind, kind) for kind in kinds]
    assert layer.combination.layouts == "LINEAR"


def test_kernel_that_was_not_compiled_is_named(trt, host):
    host.codes = {}
    with pytest.raises(PluginError, match="no kernel gather_values_aot-fp32-h600"):
        BuiltLayer(trt, GATHER_VALUES, *LAYERS["GatherValues"])
    assert host.problems[0].startswith("GatherValues: no kernel gather_values_aot-fp32-h600")


def test_type_that_no_kernel_takes_is_named(trt, host):
    attributes, shapes, types = LAYERS["JoinShares"]
    with pytest.raises(PluginError, match="FP8"):
        BuiltLayer(trt, JOIN_SHARES, attributes, shapes, {**types, "query": "FP8"})


def test_shapes_that_no_kernel_covers_are_named(trt, host):
    attributes, shapes, types = LAYERS["GatherExperts"]
    wide = {**shapes, "hidden": ("T", 12), "down": (1024, 12), "up": (1024, 12)}
    with pytest.raises(ValueError, match="H is 12"):
        BuiltLayer(trt, GATHER_EXPERTS, attributes, wide, types)
    assert "H is 12" in host.problems[0]


def test_cache_of_a_fixed_batch_is_as_good(trt, host):
    """Where a dimension is fixed in the network, TensorRT's expression of it is a constant."""
    attributes, shapes, types = LAYERS["AttendShares"]
    fixed = {name: tuple(2 if size == "B" else size for size in s) for name, s in shapes.items()}
    layer = BuiltLayer(trt, ATTEND_SHARES, attributes, fixed, types)
    _, _, launch, extras = layer.kernels[1]
    assert number(launch.grid_x, STEP) == 6
    assert [number(size, STEP) for size in extras.items] == [3, 2048, 6]


def test_router_needs_its_attributes_from_the_node(trt, host):
    attributes, shapes, types = LAYERS["RouteExperts"]
    with pytest.raises(ValueError, match="scratch_size is 1"):
        BuiltLayer(trt, ROUTE_EXPERTS, {**attributes, "scratch_size": 1}, shapes, types)
