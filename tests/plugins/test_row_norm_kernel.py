"""The norm of rows in Triton's interpreter, and compiled."""

from __future__ import annotations

import pytest
import torch

from plugins.row_norm.launches import MAX_COLUMNS, RowNorm
from tests.interpreter import InterpreterLauncher
from tests.kernel_runs import Guarded, guarded


@pytest.mark.parametrize("columns", [8, 64, 100, 256])
@pytest.mark.parametrize("tokens", [1, 3])
def test_rows_are_normed(columns, tokens):
    generator = torch.Generator().manual_seed(columns)
    x = guarded(3 * torch.randn(tokens, columns, generator=generator) + 1)
    weight = guarded(torch.randn(columns, generator=generator))
    output = Guarded((tokens, columns), torch.float32)
    norm = RowNorm(columns=columns, eps=1e-3)
    launcher = InterpreterLauncher([norm.spec])
    launcher.launch(
        norm.launch(tokens=tokens, x=x.address, weight=weight.address, output=output.address)
    )
    exact = x.tensor.double()
    exact = exact / (exact.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight.tensor.double()
    torch.testing.assert_close(output.tensor.double(), exact, rtol=1e-6, atol=1e-6)
    for name, array in {"x": x, "weight": weight, "output": output}.items():
        array.check(name)


@pytest.mark.parametrize("columns", [0, MAX_COLUMNS + 1])
def test_other_rows_are_refused(columns):
    with pytest.raises(ValueError, match=f"rows of {columns} numbers, expected 1 to"):
        RowNorm(columns=columns, eps=1e-6)
