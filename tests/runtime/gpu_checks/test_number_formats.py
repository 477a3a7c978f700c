"""Numbers as a GPU stores them, against PyTorch's types."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from runtime.gpu_checks.number_formats import STORAGE, from_storage, to_storage

VALUES = np.concatenate(
    [
        np.random.default_rng(0).standard_normal(5000) * 50,
        [0.0, -0.0, 1.0, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-9, 255.5, 3.0e-39, 1e-7, 65000.0],
    ]
).astype(np.float32)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rounding_is_that_of_pytorch(dtype):
    expected = torch.from_numpy(VALUES).to(getattr(torch, dtype))
    stored = to_storage(VALUES, dtype)
    assert stored.dtype == STORAGE[dtype]
    assert stored.tobytes() == expected.view(torch.uint8).numpy().tobytes()
    assert np.array_equal(from_storage(stored, dtype), expected.double().numpy())


def test_poison_is_no_number_in_any_float_type():
    for dtype in ("float32", "float16", "bfloat16"):
        poison = np.full(8, 0xFF, np.uint8).view(STORAGE[dtype])
        assert np.isnan(from_storage(poison, dtype)).all()


def test_integers_stay_integers():
    stored = to_storage(np.array([0, 2**40]), "int64")
    assert from_storage(stored, "int64").tolist() == [0, 2**40]
