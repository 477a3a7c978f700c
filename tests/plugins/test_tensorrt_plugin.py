"""The TensorRT plugins: what they tell the builder, what they serialize, and `enqueue` itself.

`enqueue` runs on host memory through Triton's interpreter; descriptors are those that TensorRT-RTX
hands over, in form. No GPU is needed. Engines with plugins: tests/export/test_plugin_engine.py.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from plugins import tensorrt_plugin
from plugins.registry import DYNAMIC_MASK_ATTENTION, EXPERT_GATHER, OPS, VALUE_GATHER
from plugins.tensorrt_plugin import (
    COUNTERS_FIELD,
    PluginError,
    PluginFields,
    PluginHost,
    make_creator,
    make_plugin_class,
)
from runtime.tensorrt_module import load_tensorrt
from tests.interpreter import InterpreterLauncher
from tests.op_cases import ATTENTION_CASES, EXPERT_CASES, VALUE_CASES, AttentionCase

trt = load_tensorrt("tensorrt_rtx")
KINDS = {
    torch.float32: trt.DataType.FLOAT,
    torch.float16: trt.DataType.HALF,
    torch.int64: trt.DataType.INT64,
}


def descriptor(tensor):
    return SimpleNamespace(
        dims=tuple(tensor.shape), type=KINDS[tensor.dtype], format=trt.TensorFormat.LINEAR
    )


def dynamic(tensor):
    desc = descriptor(tensor)
    return SimpleNamespace(desc=desc, min=(1,) * tensor.dim(), opt=desc.dims, max=desc.dims)


def aligned(tensor):
    """A copy at an address that is a multiple of 16, as every device allocation is."""
    place = torch.empty(tensor.nbytes + 16, dtype=torch.uint8)
    shift = -place.data_ptr() % 16
    copy = place[shift : shift + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    copy.copy_(tensor)
    return copy


class HostMemoryLauncher(InterpreterLauncher):
    """Counters are host memory, too."""

    def __init__(self, specs):
        super().__init__(specs)
        self.counters = []

    def zeros(self, count):
        self.counters.append(aligned(torch.zeros(max(count, 1), dtype=torch.int32)))
        return self.counters[-1].data_ptr()

    def launch(self, launch, stream=0):
        assert stream == 1234, "the stream that TensorRT gave"
        super().launch(launch)


def run_plugin(op, attributes, inputs, host=None):
    """The op's result through the calls that TensorRT makes, from node to `enqueue`."""
    host = PluginHost() if host is None else host
    creator = make_creator(trt, op, host)
    fields = PluginFields(trt, op.attributes, attributes)
    built = creator.create_plugin("node", fields.collection, trt.TensorRTPhase.BUILD)
    inputs = [aligned(tensor) for tensor in inputs]
    expected = op.load_definition()(
        *(t.double() if t.is_floating_point() else t for t in inputs),
        **{name: attributes[name] for name in op.attributes},
    )
    output = aligned(torch.full(expected.shape, float("nan"), dtype=inputs[0].dtype))
    tensors = [dynamic(tensor) for tensor in inputs], [dynamic(output)]
    built.clone().configure_plugin(*tensors)  # state of one clone is not another's
    built.configure_plugin(*tensors)
    workspace = aligned(torch.full((max(built.get_workspace_size(*tensors), 16),), 255).byte())

    loaded = creator.create_plugin(
        "layer", built.get_fields_to_serialize(), trt.TensorRTPhase.RUNTIME
    )
    kernels = op.make_kernels(
        attributes,
        {n: t.shape for n, t in zip((*op.inputs, *op.outputs), (*inputs, output), strict=True)},
        {
            name: str(tensor.dtype).removeprefix("torch.")
            for name, tensor in zip((*op.inputs, *op.outputs), (*inputs, output), strict=True)
        },
    )
    launcher = HostMemoryLauncher(kernels.specs)
    host.launchers.append((frozenset(spec.name for spec in kernels.specs), launcher))
    attached = loaded.attach_to_context(None)
    descs = [descriptor(tensor) for tensor in inputs], [descriptor(output)]
    attached.on_shape_change(*descs)
    for _ in range(2):  # a step leaves nothing behind that the next one would see
        output.fill_(float("nan"))
        attached.enqueue(
            *descs,
            [tensor.data_ptr() for tensor in inputs],
            [output.data_ptr()],
            workspace.data_ptr(),
            1234,
        )
        assert not any(counters.any() for counters in launcher.counters)
    return output, expected


def close(op, output, expected):
    tolerance = op.tolerances[str(output.dtype).removeprefix("torch.")]
    torch.testing.assert_close(output.double(), expected, **tolerance.as_kwargs())


@pytest.mark.parametrize(
    "case",
    [case for case in ATTENTION_CASES if case.D % 8 == 0],
    ids=lambda case: case.label,
)
def test_attention_on_host_memory(case):
    dtype = torch.float16 if case.S == 1 or case.shared else torch.float32
    attributes = {"scale": case.scale, "keep_window_size": case.W}
    close(
        DYNAMIC_MASK_ATTENTION,
        *run_plugin(DYNAMIC_MASK_ATTENTION, attributes, case.inputs(dtype)),
    )


def rows_of_eight(cases):
    """What kernels cover: rows read 16 bytes at a time in half precision."""
    return [case for case in cases if case.H % 8 == 0]


@pytest.mark.parametrize("case", rows_of_eight(EXPERT_CASES), ids=lambda case: case.label)
def test_experts_on_host_memory(case):
    attributes = {
        "top_k": case.K,
        "weight_inside": int(case.weight_inside),
        "normalize": int(case.normalize),
    }
    close(EXPERT_GATHER, *run_plugin(EXPERT_GATHER, attributes, case.inputs()))


@pytest.mark.parametrize("case", rows_of_eight(VALUE_CASES), ids=lambda case: case.label)
def test_values_on_host_memory(case):
    attributes = {"top_k": case.K, "subset_sums": int(case.subset_sums)}
    close(VALUE_GATHER, *run_plugin(VALUE_GATHER, attributes, case.inputs()))


def test_scratch_and_counters_are_those_of_the_largest_shapes():
    case = AttentionCase(label="many slots", S=1, C=2048, W=64, write_index=(3, 4))
    inputs = case.inputs(torch.float16)
    output = torch.empty(2, 1, case.Nq * case.D, dtype=torch.float16)
    plugin = make_plugin_class(trt, DYNAMIC_MASK_ATTENTION, PluginHost())(
        {"scale": 1.0, "keep_window_size": case.W}
    )
    tensors = [dynamic(tensor) for tensor in inputs], [dynamic(output)]
    plugin.configure_plugin(*tensors)
    kernels = plugin._make_kernels([tensor.desc for part in tensors for tensor in part])
    largest = plugin._named([(*tensor.shape,) for tensor in (*inputs, output)])
    assert plugin.counter_count == kernels.counters(largest) == 2 * case.Nkv
    assert plugin.get_workspace_size(*tensors) == kernels.workspace_bytes(largest) > 0
    smaller = [dynamic(tensor[:1]) for tensor in inputs], [dynamic(output[:1])]
    plugin.configure_plugin(*smaller)  # another profile
    assert plugin.counter_count == 2 * case.Nkv


EXPERTS = {"top_k": 3, "weight_inside": 1, "normalize": 0}


def expert_plugin(host=None):
    plugin_class = make_plugin_class(trt, EXPERT_GATHER, host or PluginHost())
    return plugin_class(EXPERTS)


def expert_tensors(dtype=torch.float32):
    inputs = EXPERT_CASES[0].inputs(dtype)
    return [dynamic(tensor) for tensor in inputs], [dynamic(torch.empty_like(inputs[0]))]


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_every_attribute_is_serialized_with_the_counters(op):
    attributes = {name: index + 2 for index, name in enumerate(op.attributes)}
    plugin = make_plugin_class(trt, op, PluginHost())(attributes, 7)
    found = {item.name: np.asarray(item.data).item() for item in plugin.get_fields_to_serialize()}
    assert found == {**attributes, COUNTERS_FIELD: 7}


@pytest.mark.parametrize("lost", [*EXPERTS, COUNTERS_FIELD])
def test_engine_that_lacks_a_field_is_refused(lost):
    kinds = {**EXPERT_GATHER.attributes, COUNTERS_FIELD: "INT"}
    del kinds[lost]
    fields = PluginFields(trt, kinds, {**EXPERTS, COUNTERS_FIELD: 1}).collection
    creator = make_creator(trt, EXPERT_GATHER, PluginHost())
    with pytest.raises(PluginError, match=lost):
        creator.create_plugin("layer", fields, trt.TensorRTPhase.RUNTIME)


@pytest.mark.parametrize(
    ("place", "changes", "accepted"),
    [
        (0, {}, True),
        (1, {}, True),
        (1, {"type": trt.DataType.HALF}, False),  # another type than the first input's
        (5, {"type": trt.DataType.HALF}, False),
        (0, {"type": trt.DataType.INT32}, False),
        (3, {"format": trt.TensorFormat.CHW32}, False),
    ],
)
def test_formats_are_linear_and_of_one_float_type(place, changes, accepted):
    inputs, outputs = expert_tensors()
    tensors = [*inputs, *outputs]
    for name, value in changes.items():
        setattr(tensors[place].desc, name, value)
    assert expert_plugin().supports_format_combination(place, tensors, 5) is accepted


@pytest.mark.parametrize(
    ("place", "kind", "accepted"),
    [(3, "FLOAT", True), (3, "HALF", False), (4, "INT64", True), (4, "INT32", False)],
)
def test_scores_are_float32_and_write_index_int64_beside_half_precision(place, kind, accepted):
    case = ATTENTION_CASES[1]
    plugin = make_plugin_class(trt, DYNAMIC_MASK_ATTENTION, PluginHost())(
        {"scale": 1.0, "keep_window_size": 0}
    )
    inputs = [dynamic(tensor) for tensor in case.inputs(torch.float16)]
    inputs[place].desc.type = getattr(trt.DataType, kind)
    tensors = [*inputs, dynamic(torch.empty(1, 1, 32).half())]
    assert plugin.supports_format_combination(place, tensors, 5) is accepted


def test_kernel_that_was_not_compiled_stops_the_build():
    plugin = expert_plugin(PluginHost(known=frozenset(["other"])))
    with pytest.raises(PluginError, match="was compiled; there are other"):
        plugin.configure_plugin(*expert_tensors())


def test_shapes_that_no_kernel_covers_stop_the_build():
    inputs, outputs = expert_tensors()
    plugin = make_plugin_class(trt, EXPERT_GATHER, PluginHost())({**EXPERTS, "top_k": 65})
    with pytest.raises(PluginError, match=r"ExpertGather: .*65"):
        plugin.configure_plugin(inputs, outputs)


def test_engine_without_its_kernels_is_refused_before_anything_runs():
    plugin = expert_plugin(PluginHost(launchers=[(frozenset(["other"]), None)]))
    inputs, outputs = expert_tensors()
    with pytest.raises(PluginError, match=r"open the bundle that the engine\s+belongs to"):
        plugin.on_shape_change(
            [tensor.desc for tensor in inputs], [tensor.desc for tensor in outputs]
        )


def test_enqueue_before_shapes_are_known_is_refused():
    with pytest.raises(PluginError, match="enqueue before attach_to_context and on_shape_change"):
        expert_plugin().enqueue([], [], [], [], 0, 0)


def test_more_counters_than_the_profiles_had_are_refused():
    case = AttentionCase(label="many slots", S=1, C=2048, W=0)
    inputs = case.inputs(torch.float16)
    output = torch.empty(1, 1, case.Nq * case.D, dtype=torch.float16)
    descs = [descriptor(tensor) for tensor in inputs], [descriptor(output)]
    host = PluginHost()
    plugin = make_plugin_class(trt, DYNAMIC_MASK_ATTENTION, host)(
        {"scale": 1.0, "keep_window_size": 0}
    )
    kernels = plugin._make_kernels([*descs[0], *descs[1]])
    host.launchers.append(
        (frozenset(spec.name for spec in kernels.specs), HostMemoryLauncher(kernels.specs))
    )
    attached = plugin.attach_to_context(None)
    attached.on_shape_change(*descs)
    assert kernels.counters(attached._shapes) > 0
    with pytest.raises(PluginError, match="the profiles were built for 0"):
        attached.enqueue(*descs, [0] * 5, [0], 0, 1234)


def test_counters_that_could_not_be_had_never_reach_a_launch():
    inputs, outputs = expert_tensors()
    descs = [tensor.desc for tensor in inputs], [tensor.desc for tensor in outputs]
    host = PluginHost()
    plugin = expert_plugin(host)
    kernels = plugin._make_kernels([*descs[0], *descs[1]])
    launcher = HostMemoryLauncher(kernels.specs)
    launcher.zeros = lambda count: 1 / 0
    host.launchers.append((frozenset(spec.name for spec in kernels.specs), launcher))
    with pytest.raises(ZeroDivisionError):
        plugin.attach_to_context(None)
    plugin.on_shape_change(*descs)
    with pytest.raises(PluginError, match="enqueue before attach_to_context"):
        plugin.enqueue(*descs, [0] * 5, [0], 0, 1234)
    assert not launcher.launched


def test_what_callbacks_raise_is_kept_since_tensorrt_drops_it(monkeypatch):
    host = PluginHost()
    monkeypatch.setitem(tensorrt_plugin._HOSTS, trt.__name__, (host, []))
    inputs, outputs = expert_tensors()
    descs = [tensor.desc for tensor in inputs], [tensor.desc for tensor in outputs]
    unfit = make_plugin_class(trt, EXPERT_GATHER, host)({**EXPERTS, "top_k": 65})
    creator = tensorrt_plugin.make_creator(trt, EXPERT_GATHER, host)
    host.launchers.append((frozenset(["other"]), None))
    calls = {
        "covers": lambda: unfit.configure_plugin(inputs, outputs),
        "top_k is 65": lambda: unfit.get_workspace_size(inputs, outputs),
        "zeros": lambda: unfit.attach_to_context(None),
        "belongs to": lambda: expert_plugin(host).on_shape_change(*descs),
        "enqueue before": lambda: expert_plugin(host).enqueue(*descs, [0] * 4, [0], 0, 1),
        "was given": lambda: creator.create_plugin("one", [], trt.TensorRTPhase.BUILD),
    }
    for said, call in calls.items():
        with pytest.raises((PluginError, AttributeError)):
            call()
        (problem,) = tensorrt_plugin.take_problems(trt)
        assert said in problem
    assert tensorrt_plugin.take_problems(trt) == ()
