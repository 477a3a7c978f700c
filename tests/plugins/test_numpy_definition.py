"""The definitions on numpy's arrays are the definitions."""

from __future__ import annotations

import numpy as np
import torch

from plugins.dynamic_mask_attention.op import dynamic_mask_attention_definition
from plugins.numpy_definition import run_definition
from plugins.registry import DYNAMIC_MASK_ATTENTION, EXPERT_GATHER
from tests.op_cases import ATTENTION_CASES, ExpertCase


def test_inputs_and_attributes_arrive_by_name():
    case = next(case for case in ATTENTION_CASES if case.label == "three rows, window")
    tensors = case.inputs(torch.float64)
    named = dict(zip(DYNAMIC_MASK_ATTENTION.inputs, tensors, strict=True))
    inputs = {name: named[name].numpy() for name in reversed(named)}
    attributes = {"keep_window_size": case.W, "scale": case.scale}
    found = run_definition(DYNAMIC_MASK_ATTENTION, attributes, inputs)
    expected = dynamic_mask_attention_definition(*tensors, case.scale, case.W)
    assert found.dtype == np.float64
    assert np.array_equal(found, expected.double().numpy())


def test_arrays_need_not_be_contiguous():
    tensors = ExpertCase(label="").inputs(torch.float64)
    inputs = {
        name: np.asfortranarray(tensor.numpy())
        for name, tensor in zip(EXPERT_GATHER.inputs, tensors, strict=True)
    }
    attributes = {"top_k": 3, "weight_inside": 0, "normalize": 0}
    found = run_definition(EXPERT_GATHER, attributes, inputs)
    expected = EXPERT_GATHER.load_definition()(*tensors, 3, False, False)
    assert np.array_equal(found, expected.numpy())
