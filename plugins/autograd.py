"""When an op's definition runs instead of the op itself."""

from __future__ import annotations

import torch
from torch import Tensor


def runs_definition(*inputs: Tensor) -> bool:
    """Whether autograd records and any input asks for a gradient, or a compiler looks on.

    The ops have no autograd formula of their own: autograd differentiates their definitions. And
    `torch.compile` makes kernels of a definition, where an op would be a wall to it; an export
    wants the op.
    """
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        return True
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
