"""The reference backend: our PyTorch network on the bundle's checkpoint, independent of the export.

The only module of `runtime/` that imports torch.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from model.checkpoint import load_checkpoint
from model.contract import cache_kinds, layer_taps
from model.doge import DogeForCausalLM
from model.step_ops import LayerCache, no_tap
from runtime.backends.base import Backend, Cache, Ids, Limits, Logits
from runtime.bundle import Bundle
from runtime.cpu_threads import CpuThreads
from runtime.manifest import Variant

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class TorchCache(Cache):
    """A cache of torch tensors, by layer."""

    layers: list[LayerCache]


class TorchBackend(Backend):
    """Runs the step with `DogeForCausalLM` on the CPU, in float32."""

    name = "torch"

    def __init__(self, network: DogeForCausalLM, *, limits: Limits, variant: str) -> None:
        self.variant = variant
        self.limits = limits
        self.vocab_size = network.config.vocab_size
        self.router_mode = network.config.router_mode if network.config.is_moe else None
        self._network: DogeForCausalLM | None = network

    @classmethod
    def open(cls, bundle: Bundle, variant: Variant, threads: CpuThreads) -> Self:
        """Load the bundle's checkpoint.

        `threads` sets torch's own thread count, which is one number for the process. How they wait
        is decided by the environment when torch is imported, so that is said and not done.
        """
        if not threads.spinning:
            logger.warning(
                "--no-spinning is for onnxruntime: how torch's threads wait is set by the "
                "environment variable OMP_WAIT_POLICY"
            )
        if threads.count is not None:
            torch.set_num_threads(threads.count)
        network = load_checkpoint(
            bundle.path / variant.path, router_mode=bundle.manifest.router_mode
        )
        return cls(network, limits=bundle.limits, variant=variant.name)

    @classmethod
    def open_tapped(
        cls, bundle: Bundle, variant: Variant, threads: CpuThreads, names: Sequence[str]
    ) -> Self:
        """Open like `open`; the network has every named value."""
        backend = cls.open(bundle, variant, threads)
        backend.tap_values(names)
        return backend

    def tap_values(self, names: Sequence[str]) -> None:
        """Hand these of the network's named values to the observer."""
        network = self._open_network
        known = layer_taps(network.config, network.generation)
        self.taps = tuple(name for name in names if name in known)

    @classmethod
    def from_checkpoint(
        cls, folder: Path, *, router_mode: str | None = None, max_batch_size: int = 4
    ) -> Self:
        """Open the backend on a checkpoint folder, without a bundle and up to its context.

        Args:
            folder: config.json and safetensors.
            router_mode: overrides the config's router mode.
            max_batch_size: sequences in one step.

        Raises:
            FileNotFoundError: no such checkpoint.
            UnsupportedModelError: not one that this project runs.
        """
        network = load_checkpoint(folder, router_mode=router_mode)
        context = network.config.max_position_embeddings
        limits = Limits(max_batch_size=max_batch_size, max_input_len=context, max_seq_len=context)
        return cls(network, limits=limits, variant="fp32")

    def new_cache(self, batch_size: int, capacity: int | None = None) -> TorchCache:
        """Zeroed cache of exactly `capacity` slots."""
        slots = self.check_cache_size(batch_size, capacity)
        return TorchCache(
            capacity=slots,
            lengths=np.zeros(batch_size, np.int64),
            layers=self._open_network.new_cache(batch_size, slots),
        )

    def cached(self, cache: Cache) -> Mapping[str, npt.NDArray[Any]]:
        """What the cache holds, by the names of the step's inputs; not copies."""
        if not isinstance(cache, TorchCache):
            raise TypeError(f"a cache of {type(cache).__name__} does not belong to this backend")
        kinds = cache_kinds(self._open_network.generation)
        return {
            f"past_key_values.{index}.{kind}": part.numpy()
            for index, layer in enumerate(cache.layers)
            for kind, part in zip(kinds, layer, strict=True)
        }

    def close(self) -> None:
        """Drop the network."""
        self._network = None

    @property
    def _open_network(self) -> DogeForCausalLM:
        if self._network is None:
            raise ValueError("this backend is closed; open another")
        return self._network

    def _step(
        self, input_ids: Ids, write_index: Ids, logits_index: Ids, cache: Cache, row: int | None
    ) -> Logits:
        if not isinstance(cache, TorchCache):
            raise TypeError(f"a cache of {type(cache).__name__} does not belong to this backend")
        layers = cache.layers
        if row is not None:
            layers = [tuple(part[row : row + 1] for part in layer) for layer in layers]
        position_ids = write_index[:, None] + np.arange(input_ids.shape[1])
        tokens = (input_ids, position_ids, write_index, logits_index)
        observed: dict[str, npt.NDArray[Any]] = {}

        def collect(value: torch.Tensor, name: str) -> torch.Tensor:
            if name in self.taps:
                observed[name] = value.float().numpy().copy()
            return value

        with torch.inference_mode():
            logits, _ = self._open_network(
                *(torch.from_numpy(np.ascontiguousarray(array)) for array in tokens),
                layers,
                no_tap if self.observer is None else collect,
            )
        if self.observer is not None:
            self.observer(observed)
        result: Logits = logits.numpy()
        return result
