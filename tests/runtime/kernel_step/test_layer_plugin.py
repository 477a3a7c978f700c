"""The plugin of a decoder layer: what it tells the builder, and a whole model through it.

Engines with it: tests/export/test_layer_engine.py. No GPU is needed, and none has run it.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import plugins.projection.launches as projection_launches
import plugins.projection.matrix as projection_matrix
from export.cuda_models import with_stored_weights
from export.step_weights import step_model_of
from model.checkpoint import load_checkpoint
from plugins.hosted_plugin import COUNTERS_FIELD, PluginFields
from plugins.plugin_host import PluginError
from runtime.backends.base import Limits
from runtime.backends.torch_backend import TorchBackend
from runtime.kernel_step.layer_plugin import layer_inputs
from runtime.kernel_step.layer_spec import LayerSpec, attribute_kinds
from runtime.kernel_step.layer_work import LayerMemory, work_of
from tests.engine_runs import prefill
from tests.layer_host import STREAM, HostBackend, HostLayers, aligned, described, trt
from tests.tiny_doge import MOE, write_checkpoint

LIMITS = Limits(max_batch_size=2, max_input_len=12, max_seq_len=24)
# Generation, overrides of its config, router mode.
MODELS = {
    "g1": ("g1", {}, None),
    "g3": ("g3", {}, None),
    "g4": ("g4", {"tie_word_embeddings": False}, None),
    "g4-window": ("g4", {"keep_window_size": 8}, None),
    "g4-moe": ("g4", MOE, "mixed"),
    "g4h": ("g4h", {}, None),
    "g4h-moe": ("g4h", {**MOE, "keep_window_size": 8}, "per_token"),
}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter runs programs one by one: fewer and larger ones compute the same."""
    monkeypatch.setattr(projection_launches, "ENOUGH_PROGRAMS", 1)
    monkeypatch.setattr(projection_launches, "ENOUGH_HEAD_PROGRAMS", 1)
    monkeypatch.setattr(projection_matrix, "_FEW_PROGRAMS", 1)
    work_of.cache_clear()
    yield
    work_of.cache_clear()


@pytest.fixture
def network_of(tmp_path):
    """Gives a network of two layers by name."""

    def make(name):
        generation, more, router = MODELS[name]
        overrides = {"num_hidden_layers": 2, **more}
        folder = write_checkpoint(tmp_path / "checkpoint", generation=generation, **overrides)
        return load_checkpoint(folder, router_mode=router)

    return make


def spec_of(network, precision="fp32", limits=LIMITS):
    return LayerSpec.of(step_model_of(network, limits.max_seq_len), precision, limits)


def logits_of(backend, lengths, steps):
    """Of a prefill of rows of these lengths, and of steps that follow, with tokens of a seed."""
    rng = np.random.default_rng(3)
    rows = [rng.integers(3, 97, length).tolist() for length in lengths]
    cache = backend.new_cache(len(rows))
    found = [prefill(backend, cache, *rows)]
    found += [backend.decode(rng.integers(3, 97, len(rows)), cache) for _ in range(steps)]
    return np.array(found)


def error_of(name, precision, network, folder, lengths=(9, 3)):
    """Of the logits, as a share of the largest."""
    host = HostBackend(network, spec_of(network, precision), folder, LIMITS)
    stored = with_stored_weights(network, host.layers.spec.formats)
    expected = logits_of(TorchBackend(stored, limits=LIMITS, variant="fp32"), lengths, 2)
    found = logits_of(host, lengths, 2)
    assert not host.layers.host.problems
    return np.abs(found - expected).max() / np.abs(expected).max()


# Those that differ from others by little that is a layer's.
SLOW = ("g3", "g4h", "g4h-moe")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in MODELS]
)
def test_model_of_layer_plugins_gives_the_references_logits(network_of, tmp_path, name):
    """Prompts of unequal rows, longer than a window, and steps of all rows."""
    assert error_of(name, "fp32", network_of(name), tmp_path) < 2e-5


# A cache of 16 bits rounds keys and values, and so does the head its inputs.
@pytest.mark.parametrize(
    ("name", "precision", "tolerance"),
    [("g4", "fp16", 3e-3), ("g3", "int8", 5e-3), ("g4", "int4", 2e-2)],
)
def test_narrow_weights_give_the_logits_of_the_stored_numbers(
    network_of, tmp_path, name, precision, tolerance
):
    assert error_of(name, precision, network_of(name), tmp_path, (5, 2)) < tolerance


def test_bfloat16_steps_of_one_token_give_the_logits_of_the_stored_numbers(network_of, tmp_path):
    """Prompts are left out: the interpreter multiplies bit patterns of bfloat16 (`tl.dot`)."""
    assert error_of("g4", "bf16", network_of("g4"), tmp_path, (1, 1)) < 3e-2


def test_rotation_follows_the_positions_and_not_the_slots(network_of, tmp_path):
    network = network_of("g3")
    host = HostBackend(network, spec_of(network), tmp_path, LIMITS)
    ids, index = np.array([[5, 9, 11], [7, 8, 3]]), np.array([[2], [1]])
    past = network.new_cache(2, LIMITS.max_seq_len)
    cache = host.new_cache(2)
    # A gap between the passes: only distances between positions count.
    for first, gap in ((np.array([0, 0]), 0), (np.array([3, 2]), 5)):
        positions = first[:, None] + np.array([[4, 5, 6], [1, 2, 3]]) + gap
        tokens = (ids, positions, first, index)
        with torch.inference_mode():
            expected, past = network(*(torch.from_numpy(array) for array in tokens), past)
        found = host.run(*tokens, cache.arrays)
        assert np.abs(found - expected.numpy()).max() < 2e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["g1", "g4-window", "g4-moe", "g4h-moe"])
@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_a_layer_is_put_together_again_from_whole_numbers_and_floats(network_of, name, precision):
    spec = spec_of(network_of(name), precision)
    numbers = spec.attributes
    kinds = attribute_kinds()
    assert list(numbers) == list(kinds)
    assert all((kinds[n] == "FLOAT") == isinstance(number, float) for n, number in numbers.items())
    # As TensorRT keeps them.
    stored = {
        n: (np.float32(v) if kinds[n] == "FLOAT" else np.int32(v)).item()
        for n, v in numbers.items()
    }
    again = LayerSpec.from_attributes(stored)
    assert again.model.eps == pytest.approx(spec.model.eps, rel=1e-7)
    exact = dataclasses.replace(again.model, eps=spec.model.eps)
    assert dataclasses.replace(again, model=exact) == spec
    assert repr(exact) == repr(spec.model)  # truth values are not numbers again


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": 9}, "precision is 9, expected a whole number below 5"),
        ({"max_seq_len": 21}, "multiple of 8 for our kernels; build with --max-seq-len 16"),
        ({"max_seq_len": 5}, "build with --max-seq-len 8"),
        ({"max_batch_size": 9}, "up to 8 sequences, max_batch_size is 9"),
    ],
)
def test_numbers_that_no_layer_has_are_refused(network_of, changes, message):
    spec = spec_of(network_of("g3"))
    with pytest.raises(ValueError, match=message):
        LayerSpec.from_attributes({**spec.attributes, **changes})


class Layer:
    """One layer's plugin, and what TensorRT hands it; memory is all zero."""

    def __init__(self, spec):
        self.spec = spec
        self.layers = HostLayers(spec)

    def plugin(self, **changes):
        fields = PluginFields(trt, attribute_kinds(), {**self.spec.attributes, **changes})
        build = trt.TensorRTPhase.BUILD
        return self.layers.creator.create_plugin("layer", fields.collection, build)

    def inputs(self, batch, tokens):
        model = self.spec.model
        rows = (batch, model.key_heads, model.slots, model.head_size)
        kept = self.spec.formats.float_kind
        shapes = {
            "x": ((batch, tokens, model.hidden), np.float32),
            "write_index": ((batch,), np.int64),
            "position": ((batch,), np.int64),
            "past.key": (rows, kept),
            "past.value": (rows, kept),
            "past.score": ((batch, model.score_heads, model.slots, 1), np.float32),
        }
        shapes |= {name: (tensor.shape, tensor.dtype) for name, tensor in self.spec.weights.items()}
        return [aligned(np.zeros(*shapes[name])) for name in layer_inputs(self.spec)]

    def profile(self, tokens=3):
        """Descriptors of the profile's inputs and outputs, up to the built batch."""
        return self.layers._profile(self.plugin(), self.inputs(2, tokens), tokens)

    def step(self, batch, tokens):
        """Inputs, outputs and their descriptors in a step."""
        inputs, plugin = self.inputs(batch, tokens), self.plugin()
        places = [plugin.get_aliased_input(output) for output in range(1, plugin.num_outputs)]
        outputs = [aligned(inputs[0]), *(inputs[place] for place in places)]
        return inputs, outputs, [described(a) for a in inputs], [described(a) for a in outputs]


@pytest.fixture
def layer(network_of):
    return Layer(spec_of(network_of("g4-window"), "fp16"))


def test_every_number_is_serialized_with_the_counters(layer):
    plugin = layer.plugin()
    found = {item.name: np.asarray(item.data).item() for item in plugin.get_fields_to_serialize()}
    assert found.pop("eps") == pytest.approx(layer.spec.model.eps)
    expected = {name: value for name, value in layer.spec.attributes.items() if name != "eps"}
    assert found == {**expected, COUNTERS_FIELD: plugin.work.counters}
    assert plugin.work.counters > 0


@pytest.mark.parametrize("lost", [*attribute_kinds(), COUNTERS_FIELD])
def test_engine_that_lacks_a_number_is_refused(layer, lost):
    kinds = {**attribute_kinds(), COUNTERS_FIELD: "INT"}
    del kinds[lost]
    fields = PluginFields(trt, kinds, {**layer.spec.attributes, COUNTERS_FIELD: 1}).collection
    with pytest.raises(PluginError, match=lost):
        layer.layers.creator.create_plugin("layer", fields, trt.TensorRTPhase.RUNTIME)


def test_numbers_of_no_layer_are_the_plugins_error(layer):
    with pytest.raises(PluginError, match="DecoderLayer: max_seq_len is 21"):
        layer.plugin(max_seq_len=21)
    assert "max_seq_len is 21" in layer.layers.host.problems[-1]


def test_cache_is_written_where_it_is_read(layer):
    plugin = layer.plugin()
    names = layer_inputs(layer.spec)
    aliases = [plugin.get_aliased_input(output) for output in range(plugin.num_outputs)]
    assert aliases[0] == -1
    assert [names[place] for place in aliases[1:]] == ["past.key", "past.value", "past.score"]
    types = [f"type {name}" for name in names]
    expected = ["type x", "type past.key", "type past.value", "type past.score"]
    assert plugin.get_output_data_types(types) == expected


@pytest.mark.parametrize(
    ("name", "changes", "accepted"),
    [
        ("x", {}, True),
        ("x", {"type": trt.DataType.HALF}, False),
        ("write_index", {"type": trt.DataType.INT32}, False),
        ("position", {"type": trt.DataType.INT32}, False),
        ("past.key", {"type": trt.DataType.FLOAT}, False),
        ("past.score", {"type": trt.DataType.HALF}, False),
        ("qkv.weights", {"type": trt.DataType.FLOAT}, False),
        ("input_norm", {"type": trt.DataType.HALF}, False),
        ("past.value", {"format": trt.TensorFormat.CHW32}, False),
    ],
)
def test_layout_is_linear_and_types_are_those_of_the_kernels(layer, name, changes, accepted):
    place = layer_inputs(layer.spec).index(name)
    inputs, outputs = layer.profile()
    for field, value in changes.items():
        setattr(inputs[place].desc, field, value)
    tensors = [*inputs, *outputs]
    plugin = layer.plugin()
    assert plugin.supports_format_combination(place, tensors, len(inputs)) is accepted
    assert not plugin.supports_format_combination(place, tensors, len(inputs) - 1)


@pytest.mark.parametrize(
    ("name", "largest", "message"),
    [
        ("x", (3, 3, 64), "x has 3 x 3 tokens, expected at most 2 x 12"),
        ("x", (2, 13, 64), "x has 2 x 13 tokens, expected at most 2 x 12"),
        ("x", (2, 3, 65), r"x is \[2, 3, 65\], expected \[2, 3, 64\]"),
        ("past.key", (2, 2, 32, 16), r"past.key is \[2, 2, 32, 16\], expected \[2, 2, 24, 16\]"),
        ("past.score", (2, 4, 24, 1), "past.score is"),
        ("position", (1,), r"position is \[1\], expected \[2\]"),
        ("down.weights", (64, 64), r"down.weights is \[64, 64\], expected \[64, 96\]"),
        ("cos", (24, 16), "cos is"),
    ],
)
def test_profile_of_other_shapes_stops_the_build(layer, name, largest, message):
    inputs, outputs = layer.profile()
    inputs[layer_inputs(layer.spec).index(name)].max = largest
    with pytest.raises(PluginError, match=message):
        layer.plugin().configure_plugin(inputs, outputs)


def test_kernel_that_was_not_compiled_stops_the_build(layer):
    host = layer.layers.host
    host.known = frozenset(["other"])
    with pytest.raises(PluginError, match="was compiled; there are other"):
        layer.plugin().configure_plugin(*layer.profile())
    assert host.used == {spec.name for spec in layer.plugin().work.specs}


def test_scratch_memory_is_that_of_the_largest_shapes(layer):
    plugin = layer.plugin()
    decode, prompt = (plugin.get_workspace_size(*layer.profile(tokens)) for tokens in (1, 12))
    assert (decode, prompt) == tuple(plugin.work.workspace_bytes(2, n) for n in (1, 12))
    assert prompt > decode > plugin.work.workspace_bytes(1, 1)


@pytest.mark.parametrize("name", ["g1", "g4-window", "g4-moe"])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (2, 1), (1, 3)])
def test_areas_lie_apart_and_aligned_within_the_scratch_memory(network_of, name, batch, tokens):
    work = work_of(spec_of(network_of(name), "fp16"))
    model, begin, every = work.spec.model, 1 << 20, batch * tokens
    memory = LayerMemory(
        x=1, x_out=2, write_index=3, position=4, cache={}, weights={}, workspace=begin, counters=5
    )  # fmt: skip
    places = work._places(memory, batch, tokens)
    attended = model.query_heads * model.head_size
    steps = [step.layer_workspace_bytes for step in work._steps.values()]
    sizes = {
        "x_between": 4 * every * model.hidden,
        "rows": 4 * every * model.row_numbers,
        "query": 2 * every * attended,
        "attended": 4 * every * attended,
        "inner": 4 * every * model.inner,
        "workspace": max(steps) if tokens == 1 else max(*steps, work._prompt.workspace_bytes),
    }
    if model.experts is not None:
        sizes["router"] = 4 * every * model.experts.router_rows
        sizes |= dict.fromkeys(("normed", "experts"), 4 * every * model.hidden)
    if model.inner_values is not None:
        sizes["value_scores"] = 4 * every * model.inner_values.score_rows
    spans = sorted((places.area(name), size) for name, size in sizes.items())
    assert spans[0][0] == begin
    assert all(address % 256 == 0 for address, _ in spans)
    ends = [address + size for address, size in spans]
    assert all(end <= after for end, (after, _) in zip(ends, spans[1:], strict=False))
    assert ends[-1] <= begin + work.workspace_bytes(batch, tokens)
    named = [places.area(name) for name in ("x", "x_out", "positions", "counters")]
    assert [*named, places.position] == [1, 2, 3, 5, 4]


def test_router_that_mixes_tokens_takes_the_prompt_of_one_sequence(network_of):
    layer = Layer(spec_of(network_of("g4-moe")))
    plugin = layer.plugin().attach_to_context(None)
    _, _, *descs = layer.step(2, 3)
    with pytest.raises(PluginError, match="2 x 3 tokens, expected at most 1 x 12: its router"):
        plugin.on_shape_change(*descs)
    for batch, tokens in ((2, 1), (1, 3)):
        _, _, *descs = layer.step(batch, tokens)
        plugin.on_shape_change(*descs)
    work = plugin.work
    assert work.workspace_bytes(2, 12) == work.workspace_bytes(1, 12)
    assert work.workspace_bytes(2, 1) > work.workspace_bytes(1, 1)


@pytest.mark.parametrize(("batch", "tokens"), [(3, 1), (1, 13)])
def test_more_tokens_than_the_kernels_were_made_for_are_refused(layer, batch, tokens):
    plugin = layer.plugin().attach_to_context(None)
    _, _, *descs = layer.step(batch, tokens)
    with pytest.raises(
        PluginError, match=f"x has {batch} x {tokens} tokens, expected at most 2 x 12"
    ):
        plugin.on_shape_change(*descs)


def test_shapes_that_the_builder_does_not_know_yet_change_nothing(layer):
    plugin = layer.plugin()
    _, _, inputs, outputs = layer.step(1, 1)
    inputs[0].dims = (-1, 1, 64)
    plugin.on_shape_change(inputs, outputs)
    with pytest.raises(PluginError, match="enqueue before attach_to_context and on_shape_change"):
        plugin.enqueue([], [], [], [], 0, 0)


def test_engine_without_its_kernels_is_refused_before_anything_runs(layer):
    layer.layers.host.launchers[:] = [(frozenset(["other"]), None)]
    _, _, *descs = layer.step(1, 1)
    with pytest.raises(PluginError, match=r"open the bundle that the engine\s+belongs to"):
        layer.plugin().on_shape_change(*descs)


def test_cache_at_two_addresses_is_refused_and_nothing_is_launched(layer):
    plugin = layer.plugin().attach_to_context(None)
    inputs, outputs, *descs = layer.step(1, 1)
    plugin.on_shape_change(*descs)
    addresses = [array.ctypes.data for array in inputs], [array.ctypes.data for array in outputs]
    addresses[1][2] += 256
    with pytest.raises(PluginError, match="the cached value is read at one address and written at"):
        plugin.enqueue(*descs, *addresses, 4096, STREAM)
    assert not layer.layers.launcher.launched


def test_more_counters_than_the_profiles_had_are_refused(layer):
    fields = PluginFields(
        trt,
        {**attribute_kinds(), COUNTERS_FIELD: "INT"},
        {**layer.spec.attributes, COUNTERS_FIELD: 1},
    )
    runtime = trt.TensorRTPhase.RUNTIME
    loaded = layer.layers.creator.create_plugin("layer", fields.collection, runtime)
    attached = loaded.attach_to_context(None)
    inputs, outputs, *descs = layer.step(1, 1)
    attached.on_shape_change(*descs)
    addresses = [array.ctypes.data for array in inputs], [array.ctypes.data for array in outputs]
    with pytest.raises(PluginError, match="counters are needed, the profiles were built for 1"):
        attached.enqueue(*descs, *addresses, 4096, STREAM)
    assert not layer.layers.launcher.launched


def test_not_attached_plugin_launches_nothing(layer):
    plugin = layer.plugin()
    inputs, outputs, *descs = layer.step(1, 1)
    plugin.on_shape_change(*descs)
    addresses = [array.ctypes.data for array in inputs], [array.ctypes.data for array in outputs]
    with pytest.raises(PluginError, match="enqueue before attach_to_context"):
        plugin.enqueue(*descs, *addresses, 4096, STREAM)


@pytest.mark.parametrize(
    ("name", "launches"),
    [("g3", 5), ("g4", 5), ("g4-window", 7), ("g4-moe", 5), ("g4h", 5), ("g1", 6)],
)
def test_layer_starts_five_kernels_in_a_decode_step(network_of, name, launches):
    work = work_of(spec_of(network_of(name), "fp16"))
    assert work.count_launches(batch=1, tokens=1) == launches
    assert not work.spec.rows_alone or work.count_launches(batch=1, tokens=12) > launches
    with pytest.raises(ValueError, match="a step of 1 x 13 tokens"):
        work.count_launches(batch=1, tokens=13)
