"""One sequence in host memory, decoded by the persistent kernel on the CPU or by torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from export.cuda_models import with_stored_weights
from export.step_weights import packed_arrays, step_model_of
from model.checkpoint import load_checkpoint
from model.doge import DogeForCausalLM
from model.step_ops import no_tap
from plugins.kernel_spec import Launch
from runtime.kernel_step.areas import cache_areas
from runtime.kernel_step.decode_step import RING
from runtime.kernel_step.formats import StepFormats, StepPrecision
from runtime.kernel_step.persistent import TOKENS_PER_LAUNCH, PersistentDecode
from runtime.kernel_step.places import Places
from tests.persistent_shim import Shim, compile_shim

ALIGNMENT = 256
GUARD = 1 << 14
UNTOUCHED = 0xFF  # of which every float type makes NaN
# A block of two warps, and shares of a few keys: small models have all cases of large ones.
SMALL = {"THREADS": 64, "SHARE_STEP": 4, "MAX_SPLITS": 8}
_TORCH_FLOATS = {
    "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16,
}  # fmt: skip


class Memory:
    """Named pieces of memory, each among bytes that must stay as they are."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self.sizes = sizes
        self._offsets: dict[str, int] = {}
        end = GUARD
        for name, size in sizes.items():
            self._offsets[name] = end
            end += -(-size // ALIGNMENT) * ALIGNMENT + GUARD
        self._bytes = np.full(end + ALIGNMENT, UNTOUCHED, np.uint8)
        self._base = -self._bytes.ctypes.data % ALIGNMENT

    def address(self, name: str) -> int:
        return self._bytes.ctypes.data + self._base + self._offsets[name]

    def bytes(self, name: str) -> np.ndarray:
        begin = self._base + self._offsets[name]
        return self._bytes[begin : begin + self.sizes[name]]

    def check(self) -> None:
        """Nothing was written beside a piece."""
        inside = np.zeros(self._bytes.size, bool)
        for name, size in self.sizes.items():
            begin = self._base + self._offsets[name]
            inside[begin : begin + size] = True
        written = np.flatnonzero(~inside & (self._bytes != UNTOUCHED))
        assert not written.size, f"written outside: at {written[:4]} of {self._offsets}"


class HostSequence:
    """A model's packed weights and one sequence's cache.

    Attributes:
        decode: the kernel's launches.
        reference: the network whose weights are the stored numbers, in float32.
    """

    def __init__(
        self,
        checkpoint: Path,
        precision: StepPrecision,
        max_seq_len: int,
        change: Callable[[DogeForCausalLM], None] | None = None,
    ) -> None:
        self.network = load_checkpoint(checkpoint)
        if change is not None:
            with torch.no_grad():
                change(self.network)
        self.formats = StepFormats.of(precision)
        self.model = step_model_of(self.network, max_seq_len)
        self.decode = PersistentDecode(self.model, self.formats)
        self.reference = self.network
        if precision != "fp32":
            self.reference = with_stored_weights(self.network, self.formats)
        arrays = dict(packed_arrays(self.network, self.model, self.formats))
        self.weights = Memory({name: array.nbytes for name, array in arrays.items()})
        for name, array in arrays.items():
            self.weights.bytes(name)[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._weights_before = self.weights._bytes.copy()

    def compile(self, folder: Path, source: str | None = None, **constants: int) -> Shim:
        """The kernel for the CPU, of a source in place of the file's where one is given."""
        kernel = self.decode.kernel
        macros = kernel.constants | SMALL | constants
        return compile_shim(folder, macros, kernel.spec.arguments, source)

    def begin(self, prompt: Sequence[int]) -> None:
        """Prefill all of a prompt but its last token, which is the first that a step reads."""
        model = self.model
        self.cache = Memory(cache_areas(model, self.formats, 1))
        self.areas = Memory(
            {
                "tokens": 8, "positions": 8, "ring": 8 * RING, "step": 4, "x": 4 * model.hidden,
                "rows": 4 * model.row_numbers, "inner": 4 * model.inner, **self.decode.areas,
            }
        )  # fmt: skip
        floats = _TORCH_FLOATS[self.formats.float_kind]
        filled = len(prompt) - 1
        layers = self.forward(self.reference, prompt[:-1], self._as_cached)[1] if filled else []
        for layer, kinds in enumerate(layers):
            for kind, tensor in zip(("key", "value", "score"), kinds, strict=True):
                kept = self._cached(layer, kind)
                kept[:, :filled] = tensor[0].to(kept.dtype).view(*kept[:, :filled].shape)
                assert kept.dtype == (torch.float32 if kind == "score" else floats)
        self._put("tokens", prompt[-1], np.int64)
        self._put("positions", filled, np.int64)
        self._put("step", 1, np.int32)
        self._put("barrier", 0, np.uint32)

    def launch(self, steps: int) -> Launch:
        """So many steps."""
        places = Places(
            weight=lambda name: self.weights.address(name) if name in self.weights.sizes else 0,
            area=self.areas.address,
            cache=lambda layer, kind: self.cache.address(f"layers.{layer}.{kind}"),
        )
        return self.decode.launch(places, steps)

    def run(self, shim: Shim, steps: int, blocks: int, seed: int = 0) -> list[int]:
        """Run them in as few launches as there can be, and check the memory; the tokens."""
        chosen: list[int] = []
        while len(chosen) < steps:
            count = min(TOKENS_PER_LAUNCH, steps - len(chosen))
            shim.run(self.launch(count), blocks, seed + len(chosen))
            chosen += self.area("chosen", np.int64)[:count].tolist()
        for memory in (self.weights, self.cache, self.areas):
            memory.check()
        assert (self.weights._bytes == self._weights_before).all(), "weights were written"
        return chosen

    def area(self, name: str, dtype: type) -> np.ndarray:
        """The numbers of an area."""
        return self.areas.bytes(name).view(dtype)

    def cached(self, slots: int) -> dict[str, torch.Tensor]:
        """What is in the first slots of every cache tensor, float32 [heads, slots, numbers]."""
        found = {}
        for layer in range(self.model.layers):
            for kind in ("key", "value", "score"):
                tensor = self._cached(layer, kind)[:, :slots].float()
                found[f"layers.{layer}.{kind}"] = tensor
        return found

    def expected(self, prompt: Sequence[int], steps: int) -> tuple[list[int], dict, float]:
        """Tokens, cache and the last step's largest logit by the reference, without a cache."""
        tokens = list(prompt)
        largest = 0.0
        for _ in range(steps):
            logits, layers = self.forward(self.reference, tokens, self._as_cached)
            largest = float(logits.max())
            tokens.append(int(logits.argmax()))
        cache = {
            f"layers.{layer}.{kind}": tensor[0].reshape(tensor.shape[1], tensor.shape[2], -1)
            for layer, kinds in enumerate(layers)
            for kind, tensor in zip(("key", "value", "score"), kinds, strict=True)
        }
        return tokens[len(prompt) :], cache, largest

    def _as_cached(self, value: torch.Tensor, name: str) -> torch.Tensor:
        """Keys and values as the cache holds them, for every token that attends to them."""
        if name.endswith((".key", ".value")):
            return value.to(_TORCH_FLOATS[self.formats.float_kind]).float()
        return value

    def _cached(self, layer: int, kind: str) -> torch.Tensor:
        model = self.model
        dtype = torch.float32 if kind == "score" else _TORCH_FLOATS[self.formats.float_kind]
        heads = model.score_heads if kind == "score" else model.key_heads
        raw = torch.from_numpy(self.cache.bytes(f"layers.{layer}.{kind}"))
        return raw.view(dtype).view(heads, model.slots, -1)

    def _put(self, name: str, number: int, dtype: type) -> None:
        self.areas.bytes(name).view(dtype)[0] = number

    @staticmethod
    @torch.no_grad()
    def forward(network, tokens, tap=no_tap):
        """Logits [V] behind tokens, and the cache tensors of every layer."""
        ids = torch.tensor([list(tokens)])
        last = torch.tensor([[len(tokens) - 1]])
        logits, layers = network(
            ids, torch.arange(len(tokens))[None], torch.zeros(1, dtype=torch.int64), last, None, tap
        )
        return logits[0, 0], layers
