"""The definition of a custom op on numpy's arrays, for those who do not import PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from plugins.custom_op import CustomOp


def run_definition(
    op: CustomOp, attributes: Mapping[str, int | float], inputs: Mapping[str, npt.NDArray[Any]]
) -> npt.NDArray[np.float64]:
    """What the op is by definition.

    Args:
        op: which.
        attributes: of its node.
        inputs: by the op's names, float64 but for integers; a softmax is float32 all the same where
            the definition says so.

    Returns:
        The output, float64.
    """
    definition = op.load_definition()
    tensors = [torch.from_numpy(np.ascontiguousarray(inputs[name])) for name in op.inputs]
    with torch.inference_mode():
        result: npt.NDArray[np.float64] = definition(*tensors, **attributes).double().numpy()
    return result
