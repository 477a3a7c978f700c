"""TensorRT engines, of either product. **Never executed on a GPU yet**: none has been at hand.

Tests run this code over a stand-in for TensorRT-RTX and CUDA that enforces their documented rules
(tests/fake_tensorrt); what an engine of ours does when it runs is unverified until an evidence file
from a machine with such a GPU says otherwise. docs/tensorrt_runtime.md tells what happens when.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from runtime.backends.base import Cache, Ids, Logits
from runtime.backends.lane_backend import LaneBackend, mebibytes
from runtime.engines.ahead import ahead_bytes
from runtime.engines.decode_graph import DecodeGraphContract, decode_graph_of
from runtime.engines.engine_file import EngineFile
from runtime.engines.lane import AheadRun, EngineLane, lane_needs
from runtime.engines.loaded_engine import LoadedEngine
from runtime.engines.plugins import plugin_problems, prepare_plugins
from runtime.gpu.cuda_runtime import CudaRuntime, load_cuda
from runtime.gpu.lane_pool import LanePool
from runtime.sampling_tail import EngineTailInputs, engine_tail_covers
from runtime.tensorrt_module import Product, load_tensorrt

if TYPE_CHECKING:
    from runtime.bundle import Bundle
    from runtime.cpu_threads import CpuThreads
    from runtime.manifest import Variant
    from runtime.token_chooser import TokenChooser

logger = logging.getLogger(__name__)

_GRAPH_WEIGHTS = "weights of the decode graph, which --no-sampling-tail leaves out"


class _EngineBackend(LaneBackend[EngineLane]):
    """Runs an engine of the bundle; a subclass names the product.

    Attributes:
        host_choices: tokens that the host chose because the decode graph was not certain.
    """

    product: ClassVar[Product]

    def __init__(
        self,
        trt: Any,
        cuda: CudaRuntime,
        blob: bytes,
        bundle: Bundle,
        variant: Variant,
        decode_blob: bytes | None = None,
    ) -> None:
        """Load a variant whose engines' bytes are those of the bundle.

        Args:
            trt: the TensorRT module.
            cuda: the GPU.
            blob: the engine.
            bundle: where it is from.
            variant: which.
            decode_blob: its decode graph, None where it has none.

        Raises:
            BackendUnavailableError: it cannot run here; says what to install or change.
            ValueError: it is not what the manifest says.
        """
        config, gpu = bundle.config, cuda.gpu()
        super().__init__(cuda)
        self.variant = variant.name
        self.limits = bundle.limits
        self.vocab_size = config.vocab_size
        self.router_mode = config.router_mode if config.is_moe else None
        self.host_choices = 0
        self._told: set[str] = set()
        self._width = 0
        contract = bundle.contract_of(variant)
        file = EngineFile(trt, self.product, gpu, bundle, variant, blob)
        needs = {
            "weights": file.weight_bytes,
            **_activations(variant, "activations"),
            **lane_needs(contract, self.limits, self.vocab_size, 1),
        }
        problems = partial(plugin_problems, trt)
        engine = LoadedEngine(trt, cuda, variant, contract, problems)
        graph, graph_file, graph_needs = None, None, {}
        described = decode_graph_of(variant)
        if described is not None and decode_blob is not None:
            self._width = int(described.details["width"])
            decode = DecodeGraphContract(contract)
            graph_file = EngineFile(trt, self.product, gpu, bundle, described, decode_blob)
            graph_needs = {
                _GRAPH_WEIGHTS: graph_file.weight_bytes,
                **_activations(described, "activations of the decode graph"),
                "the choice of tokens": ahead_bytes(decode, self.limits),
            }
            graph = LoadedEngine(trt, cuda, described, decode, problems)
        self._engines: list[LoadedEngine[Any]]
        self._engines = [engine, *([] if graph is None else [graph])]

        limits, vocab_size = self.limits, self.vocab_size

        def make(rows: int) -> EngineLane:
            return EngineLane(engine, cuda, limits, vocab_size, rows, graph)

        self._own(
            LanePool(
                make,
                first=[loaded.save_runtime_cache for loaded in reversed(self._engines)],
                last=[loaded.close for loaded in reversed(self._engines)],
            )
        )
        try:
            engine.load(file.blob, file.fit, file.cache_file, {**needs, **graph_needs})
            if graph is not None and graph_file is not None:
                graph.load(graph_file.blob, graph_file.fit, graph_file.cache_file, graph_needs)
            self._lanes.add()  # now: what is missing shows before any prompt
        except BaseException:
            self.close()
            raise

    def device_facts(self) -> dict[str, Any]:
        """What a benchmark tells of the GPU, JSON-ready; memory is what is taken now, in MiB.

        `activations_mb` is of one batch's contexts, `runtime_cache_mb` what earlier starts saved,
        `verdicts` the library's on each engine (null: it gives none).
        """
        engines = self._engines
        return {
            **super().device_facts(),
            "runtime_cache": {None: "none", False: "cold", True: "warm"}[engines[0].starts_warm],
            "runtime_cache_mb": mebibytes(sum(engine.runtime_cache_bytes for engine in engines)),
            "verdicts": [engine.verdict for engine in engines],
            "activations_mb": mebibytes(sum(engine.context_bytes for engine in engines)),
        }

    @classmethod
    def open(cls, bundle: Bundle, variant: Variant, threads: CpuThreads) -> Self:
        """Check the engine file's hash, then load it on the GPU.

        Raises:
            BackendUnavailableError: no product, driver or GPU, or the engine does not load here.
            LaunchError: the driver refuses a kernel of the engine's plugins.
            ValueError: the engine file was altered, or is not what the manifest says.
        """
        trt = load_tensorrt(cls.product)
        cuda = CudaRuntime(load_cuda())
        described = decode_graph_of(variant)
        blobs = [
            bundle.executable_file(part).read_bytes()
            for part in (variant, described)
            if part is not None
        ]
        prepare_plugins(trt, bundle, variant)
        return cls(trt, cuda, blobs[0], bundle, variant, *blobs[1:])

    def decode_many(
        self,
        input_ids: Ids,
        cache: Cache,
        choice: TokenChooser,
        active: npt.NDArray[np.bool_],
    ) -> Iterator[Ids]:
        """As in the base class; where the decode graph can choose, steps run ahead of the host."""
        lane = self._lane_of(cache)
        reason = self._why_host_chooses(lane, choice)
        if reason is None:
            return self._choose_ahead(input_ids, cache, choice, active)
        if reason not in self._told:
            self._told.add(reason)
            logger.info("the host chooses each token, which waits for every step: %s", reason)
        return super().decode_many(input_ids, cache, choice, active)

    def _why_host_chooses(self, lane: EngineLane, choice: TokenChooser) -> str | None:
        if not lane.runs_ahead:
            return "this variant has no decode graph"
        return engine_tail_covers(
            choice.sampler.params, vocab_size=self.vocab_size, width=self._width
        )

    def _choose_ahead(
        self,
        input_ids: Ids,
        cache: Cache,
        choice: TokenChooser,
        active: npt.NDArray[np.bool_],
    ) -> Iterator[Ids]:
        rules = EngineTailInputs.make(choice.sampler.params, cache.batch_size)
        run = AheadRun(rules=rules, uniform=choice.uniform)
        # Rows that take no part feed on whatever they have; it only has to be an id.
        tokens = np.where(active, input_ids, 0)
        while True:
            self.check_decoding(tokens, cache, active, 1)
            lane, before = self._lane_of(cache), tokens
            tokens, certain = lane.step_ahead(run, before, cache.lengths, active, cache.capacity)
            run.count += 1
            uncertain = np.flatnonzero(active & ~certain)
            if uncertain.size:
                # The same step once more, on the engine that has logits: it writes the same slots.
                self.host_choices += uncertain.size
                logits = self.decode(before, cache, active)
                tokens[uncertain] = choice.choose_rows(logits[uncertain], run.count, uncertain)
            else:
                cache.lengths += active
            yield tokens

    def _step(
        self, input_ids: Ids, write_index: Ids, logits_index: Ids, cache: Cache, row: int | None
    ) -> Logits:
        return self._lane_of(cache).step(input_ids, write_index, logits_index, row)


def _activations(variant: Variant, what: str) -> dict[str, int]:
    """What a context takes by the plan in the manifest, under this name; nothing without a plan."""
    plan = variant.details.get("plan") or {}
    sizes = [int(profile["activation_bytes"]) for profile in plan.get("profiles", [])]
    return {what: max(sizes)} if sizes else {}


class TensorRTRTXBackend(_EngineBackend):
    """Engines of TensorRT-RTX, which are built on any machine."""

    name = "tensorrt_rtx"
    product = "tensorrt_rtx"


class TensorRTBackend(_EngineBackend):
    """Engines of standard TensorRT, which are built where the GPU is."""

    name = "tensorrt"
    product = "tensorrt"
