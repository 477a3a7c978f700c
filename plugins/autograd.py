"""When an op's definition runs instead of the op itself."""

from __future__ import annotations

import torch
from torch import Tensor


def wants_gradient(*inputs: Tensor) -> bool:
    """Whether autograd records and any input asks for a gradient.

    The ops have no autograd formula of their own: autograd differentiates their definitions.
    """
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
