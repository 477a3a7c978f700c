"""Greedy decoding in PyTorch on one device, in the ways that it is run: what others are held to.

growing    the cache grows by concatenation, and the host reads each token, as in transformers'
           `generate`
eager      the cache is allocated once and appended to in place; attention sees the filled slots,
           and tokens stay on the device until they are asked for
compiled   `torch.compile(mode="reduce-overhead")` over a step of fixed shapes, on a GPU one CUDA
           graph: all slots of the cache, position and token on the device
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from model.checkpoint import load_checkpoint
from model.doge import DogeForCausalLM
from model.step_ops import LayerCache

Ids = npt.NDArray[np.int64]
Mode = Literal["growing", "eager", "compiled"]
MODES: tuple[Mode, ...] = get_args(Mode)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Tokens of one pass of a prompt: attention's definition holds a number for each pair of tokens.
_CHUNK = 512


def missing_device(device: str) -> str | None:
    """Why torch cannot run on a device, None where it can."""
    if torch.device(device).type != "cuda" or torch.cuda.is_available():
        return None
    return f"PyTorch {torch.__version__} sees no CUDA device"


class TorchDecoding:
    """Continues prompts of one length, each token the largest logit's.

    Attributes:
        mode: how.
        batch_size: B.
        capacity: C, slots of the cache.
    """

    def __init__(
        self, network: DogeForCausalLM, *, mode: Mode, batch_size: int, capacity: int
    ) -> None:
        """Allocate a cache where the network is, in its dtype; compiling waits for the first step.

        Raises:
            ValueError: an unknown mode.
        """
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}, expected one of {', '.join(MODES)}")
        self.mode, self.batch_size, self.capacity = mode, batch_size, capacity
        self._network = network
        self._state = _StaticStep(network, batch_size, 0 if mode == "growing" else capacity)
        self._compiled: Callable[[], None] | None = None
        if mode == "compiled":
            self._compiled = torch.compile(self._state, mode="reduce-overhead", fullgraph=True)
        self._prompt_layers: list[LayerCache] = []
        self._layers: list[LayerCache] = []
        self._first = torch.zeros_like(self._state.token)
        self._prompt_length = self._filled = 0
        self._read: list[list[int]] = []

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        dtype: str,
        device: str,
        router_mode: str | None,
        mode: Mode,
        batch_size: int,
        capacity: int,
    ) -> Self:
        """Load a checkpoint onto a device, in a dtype of `DTYPES`.

        Raises:
            FileNotFoundError, UnsupportedModelError: as `load_checkpoint`.
            ValueError: an unknown mode or dtype.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
        network = load_checkpoint(folder, DTYPES[dtype], router_mode).to(torch.device(device))
        return cls(network, mode=mode, batch_size=batch_size, capacity=capacity)

    def prefill(self, prompts: Ids) -> None:
        """Begin anew with prompts [B, S], S below `capacity`, and choose a token behind each.

        Raises:
            ValueError: another number of rows, or more tokens than there is room for.
        """
        rows, length = prompts.shape
        if rows != self.batch_size or not 1 <= length < self.capacity:
            raise ValueError(
                f"prompts of shape {prompts.shape} for {self.batch_size} rows of 1 to "
                f"{self.capacity - 1} tokens"
            )
        self._prompt_length = length
        with torch.inference_mode():
            layers = self._state.layers()
            if self.mode == "growing":
                layers = self._network.new_cache(rows, length)
            self._prompt_layers = layers
            ids = torch.from_numpy(prompts).to(self._state.token.device)
            config = self._network.config
            whole = config.is_moe and config.router_mode == "mixed"
            # That router wants each prompt alone and in one pass.
            for part in [slice(row, row + 1) for row in range(rows)] if whole else [slice(rows)]:
                for begin in range(0, length, length if whole else _CHUNK):
                    end = min(length, begin + (length if whole else _CHUNK))
                    self._first[part] = self._pass(ids[part, begin:end], layers, part, begin, end)
        self.rewind()

    def rewind(self) -> None:
        """Forget all tokens but the prompts, and the first behind each."""
        state = self._state
        self._filled = self._prompt_length
        self._layers = self._prompt_layers
        with torch.inference_mode():
            state.token.copy_(self._first)
            state.position.fill_(self._prompt_length)
            state.chosen[:, self._prompt_length] = self._first
        self._read = []

    def decode(self, count: int) -> None:
        """Choose `count` tokens more for each row; on a GPU they may not be there yet.

        Raises:
            ValueError: the cache has no room for so many.
        """
        if self._filled + count > self.capacity:
            raise ValueError(
                f"{self._filled} tokens are cached, {count} more exceed the {self.capacity} slots"
            )
        for _ in range(count):
            self._filled += 1
            if self._compiled is not None:
                with torch.no_grad():
                    self._compiled()
                continue
            with torch.inference_mode():
                if self.mode == "eager":
                    self._state(filled=self._filled)
                else:
                    self._layers = [tuple(map(_one_slot_more, layer)) for layer in self._layers]
                    self._state.step(self._layers)
                    self._read.append(self._state.token.tolist())

    def wait(self) -> None:
        """Wait until all that was asked for is done."""
        if self._state.token.is_cuda:
            torch.cuda.synchronize(self._state.token.device)

    def tokens(self) -> Ids:
        """[B, tokens] int64, what was chosen since the prompts, the first behind each included."""
        found = self._state.chosen[:, self._prompt_length : self._filled + 1]
        result: Ids = found.cpu().numpy().copy()
        return result

    def compiler_facts(self) -> dict[str, Any]:
        """JSON-ready: what the compiler counted in this process; nothing without one."""
        if self._compiled is None:
            return {}
        from torch._dynamo.utils import counters

        return {
            "graphs": int(counters["stats"]["unique_graphs"]),
            "cuda_graph_skips": int(counters["inductor"]["cudagraph_skips"]),
        }

    def _pass(
        self, ids: Tensor, layers: list[LayerCache], rows: slice, begin: int, end: int
    ) -> Tensor:
        """The tokens behind ids [b, end - begin], which stand from slot `begin` on."""
        start = torch.full((len(ids),), begin, dtype=torch.int64, device=ids.device)
        positions = torch.arange(begin, end, device=ids.device).expand(len(ids), -1)
        last = torch.full_like(start, end - begin - 1)[:, None]
        seen = [tuple(part[rows, :, :end] for part in layer) for layer in layers]
        logits, _ = self._network(ids, positions, start, last, seen)
        chosen: Tensor = logits[:, 0].argmax(-1)
        return chosen


class _StaticStep(nn.Module):
    """A step whose every input and output is a tensor that stays where it is.

    Attributes:
        token: [B] int64, the last one chosen.
        position: [B] int64, its slot.
        chosen: [B, C + 1] int64 by slot.
    """

    token: Tensor
    position: Tensor
    chosen: Tensor
    logits_index: Tensor

    def __init__(self, network: DogeForCausalLM, batch_size: int, slots: int) -> None:
        super().__init__()
        self.network = network
        device = network.model.norm.weight.device
        context = max(slots, network.config.max_position_embeddings)
        state = {
            "token": (batch_size,),
            "position": (batch_size,),
            "chosen": (batch_size, context + 1),
            "logits_index": (batch_size, 1),
        }
        tensors = {
            name: torch.zeros(size, dtype=torch.int64, device=device)
            for name, size in state.items()
        }
        self._names: list[tuple[str, ...]] = []
        for index, layer in enumerate(network.new_cache(batch_size, slots) if slots else ()):
            named = {f"cache_{index}_{part}": tensor for part, tensor in enumerate(layer)}
            self._names.append(tuple(named))
            tensors |= named
        for name, tensor in tensors.items():
            # A CUDA graph of the compiler's may write what it knows to stay where it is.
            torch._dynamo.mark_static_address(tensor)
            self.register_buffer(name, tensor, persistent=False)

    def layers(self) -> list[LayerCache]:
        """The cache, by layer."""
        return [tuple(getattr(self, name) for name in names) for names in self._names]

    def forward(self, filled: int | None = None) -> None:
        """One step on the cache, of which attention sees `filled` slots; all when None."""
        layers = self.layers()
        if filled is not None:
            layers = [tuple(part[:, :, :filled] for part in layer) for layer in layers]
        self.step(layers)

    def step(self, layers: list[LayerCache]) -> None:
        """One step on any cache: append the token, choose the next."""
        ids, slots = self.token[:, None], self.position[:, None]
        logits, _ = self.network(ids, slots, self.position, self.logits_index, layers)
        token = logits[:, 0].argmax(-1)
        self.position.add_(1)
        self.token.copy_(token)
        self.chosen.scatter_(1, self.position[:, None], token[:, None])


def _one_slot_more(part: Tensor) -> Tensor:
    """A cache tensor [B, heads, C, size] with one empty slot behind the others, as a copy."""
    B, heads, _, size = part.shape
    return torch.cat([part, part.new_zeros(B, heads, 1, size)], dim=2)
