"""Named values of the published G4 code: transformers' network, looked into by hooks.

Queries, keys and mask scores after rotation and exponential are no module's output there: keys
and values are read from its cache, scores are made from what `dt_proj` gives, and queries there
are none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.transformers_reference import (
    Ids,
    Logits,
    TransformersConversation,
    TransformersReference,
    TransformersUnavailableError,
)

__all__ = ["TappedConversation", "TappedTransformers", "TransformersUnavailableError"]

# Kind of a tap to the module of a layer whose output it is; `pre:` takes what the module is given.
_MODULES = {
    "attention_norm": "input_layernorm",
    "score": "self_attn.dt_proj",
    "value": "self_attn.v_proj",
    "attention_output": "self_attn",
    "attention_residual": "pre:post_attention_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "router_scores": "mlp.router_gate",
    "mlp_output": "mlp",
    "output": "",
}
_OUTSIDE = {"embedding": "embed_tokens", "final_norm": "norm"}


class TappedTransformers(TransformersReference):
    """A reference whose named values can be had."""

    def has(self, name: str) -> bool:
        """Whether a tap is the input or output of one of its modules."""
        try:
            self._module(name)
        except (AttributeError, KeyError):
            return False
        return True

    def converse(self, names: tuple[str, ...]) -> TappedConversation:
        """One empty sequence that gives these of its named values."""
        return TappedConversation(self, names)

    def _module(self, name: str) -> torch.nn.Module:
        """The module that a tap is the input or output of."""
        network: torch.nn.Module = self.network.model
        if name in _OUTSIDE:
            return network.get_submodule(_OUTSIDE[name])
        layer, _, kind = name.rpartition(".")
        path = _MODULES[kind].removeprefix("pre:")
        return network.get_submodule(f"{layer}.{path}" if path else layer)

    @contextmanager
    def observed(self, names: tuple[str, ...]) -> Iterator[dict[str, Tensor]]:
        """A dictionary that one pass of the network fills, [1, S, …] each."""
        found: dict[str, Tensor] = {}
        handles = []
        for name in names:
            module = self._module(name)
            if _MODULES.get(name.rpartition(".")[2], "").startswith("pre:"):
                handles.append(module.register_forward_pre_hook(_keep_input(found, name)))
            else:
                handles.append(module.register_forward_hook(_keep_output(found, name)))
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()


def _keep_input(found: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook(module: Any, inputs: tuple[Tensor, ...]) -> None:
        found[name] = inputs[0].clone()

    return hook


def _keep_output(found: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook(module: Any, inputs: Any, output: Tensor | tuple[Tensor, ...]) -> None:
        found[name] = (output[0] if isinstance(output, tuple) else output).clone()

    return hook


class TappedConversation:
    """One sequence in transformers' cache.

    Attributes:
        names: the named values that `append` gives.
    """

    def __init__(self, reference: TappedTransformers, names: tuple[str, ...]) -> None:
        self.names = names
        self._reference = reference
        self._inner = TransformersConversation(reference)

    def append(
        self, tokens: Ids, logits_index: Ids
    ) -> tuple[Logits, Mapping[str, npt.NDArray[Any]]]:
        """Feed the next tokens in one pass.

        Args:
            tokens: [S].
            logits_index: [M], whose logits and final norm are wanted.

        Returns:
            [M, V], and the named values with a batch of one, in the shapes of docs/contract.md.
        """
        with self._reference.observed(self.names) as found:
            (logits,) = self._inner.append([tokens])
        values = {
            name: self._shaped(name, value[:, -len(tokens) :].float(), logits_index)
            for name, value in found.items()
        }
        return logits[logits_index], values

    def cached(self) -> Mapping[str, npt.NDArray[Any]]:
        """Keys and values of every layer, [1, Nkv, T, D] by the names of the step's inputs."""
        past = self._inner.past
        if past is None:
            return {}
        return {
            f"past_key_values.{index}.{kind}": getattr(layer, f"{kind}s").numpy()
            for index, layer in enumerate(past.layers)
            for kind in ("key", "value")
        }

    def _shaped(self, name: str, value: Tensor, logits_index: Ids) -> npt.NDArray[np.float32]:
        layer, _, kind = name.rpartition(".")
        network = self._reference.network
        if kind == "final_norm":
            value = value[:, torch.from_numpy(logits_index)]
        elif kind == "value":
            B, S, _ = value.shape
            value = value.view(B, S, network.config.num_key_value_heads, -1).transpose(1, 2)
        elif kind == "score":
            A = network.model.get_submodule(layer).self_attn.A
            score = torch.exp(A * torch.nn.functional.softplus(value))
            value = score.transpose(1, 2).unsqueeze(-1)
        array: npt.NDArray[np.float32] = value.detach().numpy()
        return array
