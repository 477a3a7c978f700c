"""The ONNX functions of the custom ops, each as the body of a model with a single node."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from export.functions import attach_functions
from plugins.custom_op import DOMAIN, PLUGIN_NAMESPACE, PLUGIN_VERSION, CustomOp
from plugins.dynamic_mask_attention.function import FloatType, make_function
from plugins.dynamic_mask_attention.op import dynamic_mask_attention_definition
from plugins.expert_gather.op import expert_gather_definition
from plugins.onnx_function import OPSET
from plugins.registry import DYNAMIC_MASK_ATTENTION, EXPERT_GATHER, OPS, VALUE_GATHER
from plugins.value_gather.op import value_gather_definition
from tests.op_cases import (
    ATTENTION_CASES,
    EXPERT_CASES,
    VALUE_CASES,
    AttentionCase,
    ExpertCase,
    ValueCase,
)


def one_node_model(
    custom_op: CustomOp,
    inputs: tuple[Tensor, ...],
    output_shape: tuple[int, ...],
    attributes: dict[str, int | float],
    attention_dtype: FloatType = "float32",
) -> onnx.ModelProto:
    """The op's node with its function, built as the export builds it."""
    values = [
        ir.Value(
            name=name,
            type=ir.TensorType(ir.DataType.from_numpy(tensor.numpy().dtype)),
            shape=ir.Shape(tensor.shape),
        )
        for name, tensor in zip(custom_op.inputs, inputs, strict=True)
    ]
    result = ir.Value(name=custom_op.outputs[0], type=values[0].type, shape=ir.Shape(output_shape))
    node = ir.node(
        custom_op.name,
        values,
        domain=DOMAIN,
        attributes={
            **attributes,
            "plugin_namespace": PLUGIN_NAMESPACE,
            "plugin_version": PLUGIN_VERSION,
        },
        outputs=[result],
        name="node",
    )
    graph = ir.Graph(values, [result], nodes=[node], opset_imports={"": OPSET}, name="one")
    model = ir.Model(graph, ir_version=11)
    attach_functions(model, attention_dtype)
    proto: onnx.ModelProto = ir.to_proto(model)
    return proto


def attention_model(case: AttentionCase, dtype: FloatType = "float32") -> onnx.ModelProto:
    inputs = case.inputs(getattr(torch, dtype))
    shape = (len(case.write_index), case.S, case.Nq * case.D)
    attributes: dict[str, int | float] = {"scale": case.scale, "keep_window_size": case.W}
    return one_node_model(DYNAMIC_MASK_ATTENTION, inputs, shape, attributes, dtype)


def expert_model(case: ExpertCase, dtype: torch.dtype = torch.float32) -> onnx.ModelProto:
    attributes: dict[str, int | float] = {
        "top_k": case.K,
        "weight_inside": int(case.weight_inside),
        "normalize": int(case.normalize),
    }
    return one_node_model(EXPERT_GATHER, case.inputs(dtype), (case.T, case.H), attributes)


def value_model(case: ValueCase, dtype: torch.dtype = torch.float32) -> onnx.ModelProto:
    attributes: dict[str, int | float] = {"top_k": case.K, "subset_sums": int(case.subset_sums)}
    return one_node_model(VALUE_GATHER, case.inputs(dtype), (case.T, case.H), attributes)


def feeds(custom_op: CustomOp, inputs: tuple[Tensor, ...]) -> dict[str, npt.NDArray[Any]]:
    return {n: tensor.numpy() for n, tensor in zip(custom_op.inputs, inputs, strict=True)}


def run_in_onnxruntime(
    model: onnx.ModelProto, custom_op: CustomOp, inputs: tuple[Tensor, ...]
) -> Tensor:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    result: npt.NDArray[Any] = session.run(None, feeds(custom_op, inputs))[0]
    return torch.from_numpy(result)


def run_in_reference(
    model: onnx.ModelProto, custom_op: CustomOp, inputs: tuple[Tensor, ...]
) -> Tensor:
    results: Any = ReferenceEvaluator(model).run(None, feeds(custom_op, inputs))
    return torch.from_numpy(results[0])


def defined_attention(case: AttentionCase, inputs: tuple[Tensor, ...]) -> Tensor:
    query, key, value, score, write_index = inputs
    return dynamic_mask_attention_definition(
        query, key, value, score, write_index, case.scale, case.W
    )


def defined_experts(case: ExpertCase, inputs: tuple[Tensor, ...]) -> Tensor:
    hidden, scores_x, scores_y, down, up = inputs
    return expert_gather_definition(
        hidden, scores_x, scores_y, down, up, case.K, case.weight_inside, case.normalize
    )


def defined_values(case: ValueCase, inputs: tuple[Tensor, ...]) -> Tensor:
    return value_gather_definition(*inputs, case.K, case.subset_sums)


def assert_close(custom_op: CustomOp, actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    tolerance = custom_op.tolerances[str(expected.dtype).removeprefix("torch.")]
    torch.testing.assert_close(actual, expected, atol=tolerance.atol, rtol=tolerance.rtol)


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=lambda case: case.label)
def test_attention_function_equals_the_definition(case: AttentionCase) -> None:
    inputs = case.inputs()
    actual = run_in_onnxruntime(attention_model(case), DYNAMIC_MASK_ATTENTION, inputs)
    assert_close(DYNAMIC_MASK_ATTENTION, actual, defined_attention(case, inputs))


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=lambda case: case.label)
def test_attention_function_equals_the_definition_in_half_precision(case: AttentionCase) -> None:
    inputs = case.inputs(torch.float16)
    actual = run_in_onnxruntime(attention_model(case, "float16"), DYNAMIC_MASK_ATTENTION, inputs)
    assert_close(DYNAMIC_MASK_ATTENTION, actual, defined_attention(case, inputs))


@pytest.mark.parametrize("case", ATTENTION_CASES[4:6], ids=lambda case: case.label)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_attention_function_means_the_same_to_the_onnx_evaluator(
    case: AttentionCase, dtype: FloatType
) -> None:
    inputs = case.inputs(getattr(torch, dtype))
    actual = run_in_reference(attention_model(case, dtype), DYNAMIC_MASK_ATTENTION, inputs)
    assert_close(DYNAMIC_MASK_ATTENTION, actual, defined_attention(case, inputs))


def test_scores_beyond_half_precision_are_selected_by_their_float32_value() -> None:
    # In float16 all four would be the largest number, and the lowest slots would win.
    case = AttentionCase(label="", S=1, C=5, W=1, write_index=(3,), Nq=1, Nkv=1, N=1)
    query, key, value, _, write_index = case.inputs(torch.float16)
    score = torch.tensor([1e5, 2e5, 4e5, 3e5, 9e5]).reshape(1, 1, 5, 1)
    actual = run_in_onnxruntime(
        attention_model(case, "float16"),
        DYNAMIC_MASK_ATTENTION,
        (query, key, value, score, write_index),
    )
    torch.testing.assert_close(actual[0, 0], value[0, 0, 2])


def test_slots_behind_the_query_may_hold_anything_finite() -> None:
    case = AttentionCase(label="", S=3, C=11, W=4, write_index=(2,))
    query, key, value, score, write_index = case.inputs()
    model = attention_model(case)
    before = run_in_onnxruntime(model, DYNAMIC_MASK_ATTENTION, case.inputs())
    key[:, :, 5:], value[:, :, 5:], score[:, :, 5:] = 100.0, -100.0, 1e30
    inputs = (query, key, value, score, write_index)
    assert torch.equal(before, run_in_onnxruntime(model, DYNAMIC_MASK_ATTENTION, inputs))


def test_attention_function_needs_no_fixed_batch_or_length() -> None:
    case = AttentionCase(label="", S=5, C=23, W=6, write_index=(0, 17, 4))
    model = attention_model(case)
    for value in (model.graph.input[0], *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "B"
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "S"
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "S"
    for value in model.graph.input[1:]:
        value.type.tensor_type.shape.dim[0].dim_param = "B"
    for other in (case, AttentionCase(label="", S=1, C=23, W=6, write_index=(22,))):
        inputs = other.inputs()
        actual = run_in_onnxruntime(model, DYNAMIC_MASK_ATTENTION, inputs)
        assert_close(DYNAMIC_MASK_ATTENTION, actual, defined_attention(other, inputs))


@pytest.mark.parametrize("case", EXPERT_CASES, ids=lambda case: case.label)
def test_expert_function_equals_the_definition(case: ExpertCase) -> None:
    inputs = case.inputs()
    actual = run_in_onnxruntime(expert_model(case), EXPERT_GATHER, inputs)
    assert_close(EXPERT_GATHER, actual, defined_experts(case, inputs))


def test_expert_function_equals_the_definition_in_half_precision() -> None:
    case = ExpertCase(label="", n=4, K=16)  # every expert, so rounding cannot change the picks
    inputs = case.inputs(torch.float16)
    actual = run_in_onnxruntime(expert_model(case, torch.float16), EXPERT_GATHER, inputs)
    assert_close(EXPERT_GATHER, actual, defined_experts(case, inputs))


def test_equal_expert_scores_that_are_all_picked_change_nothing() -> None:
    case = ExpertCase(label="", n=4, K=16)
    hidden, scores_x, scores_y, down, up = case.inputs()
    inputs = (hidden, scores_x.round(), scores_y.round(), down, up)
    actual = run_in_onnxruntime(expert_model(case), EXPERT_GATHER, inputs)
    assert_close(EXPERT_GATHER, actual, defined_experts(case, inputs))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("case", ATTENTION_CASES[4:6], ids=lambda case: case.label)
def test_checker_accepts_the_attention_function(case: AttentionCase, dtype: FloatType) -> None:
    onnx.checker.check_model(attention_model(case, dtype), full_check=True)


@pytest.mark.parametrize("case", EXPERT_CASES[8:11], ids=lambda case: case.label)
def test_checker_accepts_the_expert_function(case: ExpertCase) -> None:
    onnx.checker.check_model(expert_model(case), full_check=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", VALUE_CASES, ids=lambda case: case.label)
def test_value_function_equals_the_definition(case: ValueCase, dtype: torch.dtype) -> None:
    inputs = case.inputs(dtype)
    actual = run_in_onnxruntime(value_model(case, dtype), VALUE_GATHER, inputs)
    assert_close(VALUE_GATHER, actual, defined_values(case, inputs))


@pytest.mark.parametrize("case", VALUE_CASES[5:9], ids=lambda case: case.label)
def test_checker_and_evaluator_accept_the_value_function(case: ValueCase) -> None:
    model, inputs = value_model(case), case.inputs()
    onnx.checker.check_model(model, full_check=True)
    actual = run_in_reference(model, VALUE_GATHER, inputs)
    assert_close(VALUE_GATHER, actual, defined_values(case, inputs))


def test_selection_is_in_the_graph_only_where_it_can_drop_a_key() -> None:
    def op_types(window: int) -> set[str]:
        function = make_function(scale=1.0, keep_window_size=window, query_heads=4, score_heads=2)
        return {node.op_type for node in function}

    assert "TopK" in op_types(4)
    assert "TopK" not in op_types(0)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_function_declares_the_names_that_the_registry_gives(op: CustomOp) -> None:
    model = {
        DYNAMIC_MASK_ATTENTION.name: attention_model(ATTENTION_CASES[4]),
        EXPERT_GATHER.name: expert_model(EXPERT_CASES[0]),
        VALUE_GATHER.name: value_model(VALUE_CASES[0]),
    }[op.name]
    (function,) = model.functions
    assert (function.domain, function.name) == (DOMAIN, op.name)
    assert tuple(function.input) == op.inputs
    assert tuple(function.output) == op.outputs
    assert {"plugin_namespace", "plugin_version"} <= set(function.attribute)
    assert {entry.domain: entry.version for entry in function.opset_import} == {"": OPSET}
    assert set(function.attribute) == {a.name for a in model.graph.node[0].attribute}
