"""What an engine's precision loses against the float32 model, measured where no engine can run.

Weights of 8 and 4 bits, and float16: the model that TensorRT is given runs in ONNX Runtime, which
computes in float16 with the same narrow weights. ONNX Runtime has no bfloat16 on the CPU, so there
the PyTorch network runs in it. What an engine adds to this, its order of sums, is not measured.
"""

from __future__ import annotations

import logging
from math import prod
from pathlib import Path

import torch

from export.engine_config import DTYPES, EngineConfig, Precision
from export.lowerings.engine_weights import WEIGHT_FORMAT_BITS, weight_format
from export.quality import Quality, QualityError, measure_quality, text_windows
from export.sources import Checkpoint
from model.checkpoint import load_checkpoint
from model.contract import step_contract
from runtime.backends.base import Backend, Limits
from runtime.backends.onnxruntime_backend import OnnxRuntimeBackend, make_session
from runtime.backends.torch_backend import TorchBackend
from runtime.scoring import ScoreMode

logger = logging.getLogger(__name__)

# Numbers of weights up to which float16 and bfloat16 are measured unasked: their loss is small, and
# a CPU that lacks bfloat16 takes minutes for it.
MEASURED_HALF_UP_TO = 10_000_000
# Without this ONNX Runtime takes activations of 8 bits to products with narrow weights, which an
# engine does not, and which loses as much as the 8 bits of the weights.
_SETTINGS = {"session.disable_quant_qdq": "1"}


class EngineQuality:
    """Measures the lowered models of one build."""

    def __init__(
        self,
        canonical: Path,
        checkpoint: Checkpoint,
        limits: Limits,
        *,
        trained: bool,
        eval_text: Path | None,
    ) -> None:
        """Name what engines are made of.

        Args:
            canonical: the canonical model.
            checkpoint: what that was made of.
            limits: of every model of the build.
            trained: whether the weights mean anything; quality is measured only then, or on a text.
            eval_text: a text to measure on; None samples one.
        """
        self._canonical = canonical
        self._checkpoint = checkpoint
        self._limits = limits
        self._trained = trained
        self._eval_text = eval_text

    def why_not(self, config: EngineConfig) -> str | None:
        """Why the quality of an engine is not measured, or None where it is."""
        precision = config.precision
        if precision == "fp32":
            return "an engine of fp32 is the float32 model"
        if self._eval_text is not None:
            return None
        if not self._trained:
            return "it says nothing of random weights"
        if weight_format(precision) is not None or self._numbers() <= MEASURED_HALF_UP_TO:
            return None
        return (
            f"that takes long for {precision} and more than {MEASURED_HALF_UP_TO:,} numbers; ask "
            "for it by --eval-text"
        )

    def measure(self, config: EngineConfig, lowered: Path, *, force: bool) -> Quality:
        """Compare a lowered model with the canonical one.

        Args:
            config: of the engine.
            lowered: the model that TensorRT is given.
            force: accept what loses more than its bound.

        Raises:
            QualityError: it loses more than its bound, and `force` is not set.
        """
        precision, variant = config.precision, config.variant_name
        reference = self._onnxruntime(self._canonical, "float32")
        candidate = self._candidate(precision, lowered)
        windows = None
        if self._eval_text is not None:
            windows = text_windows(self._eval_text, self._checkpoint, self._limits)
        weights = weight_format(precision)
        quality = measure_quality(
            reference,
            candidate,
            bits=16 if weights is None else WEIGHT_FORMAT_BITS[weights],
            first_token=self._checkpoint.config.bos_token_id,
            windows=windows,
            mode=self._mode(),
        )
        for backend in (reference, candidate):
            backend.close()
        if not quality.accepted and not force:
            raise QualityError(
                f"{variant} loses more than its bound: {quality}. Take more bits (--precision), "
                "measure on a text of your own (--eval-text), or accept it with --force"
            )
        logger.info("%s: %s", variant, quality)
        return quality

    def _mode(self) -> ScoreMode:
        """All tokens at once where that is the same model as token by token, and much faster."""
        config = self._checkpoint.config
        return "decode" if config.is_moe and config.router_mode == "mixed" else "prefill"

    def _numbers(self) -> int:
        return sum(prod(shape) for shape in self._checkpoint.header.shapes.values())

    def _candidate(self, precision: Precision, lowered: Path) -> Backend:
        if precision != "bf16":
            return self._onnxruntime(lowered, DTYPES[precision])
        network = load_checkpoint(
            self._checkpoint.folder, torch.bfloat16, self._checkpoint.config.router_mode
        )
        return TorchBackend(network, limits=self._limits, variant=precision)

    def _onnxruntime(self, path: Path, cache_dtype: str) -> OnnxRuntimeBackend:
        config = self._checkpoint.config
        contract = step_contract(
            config,
            self._checkpoint.generation,
            max_seq_len=self._limits.max_seq_len,
            cache_dtype=cache_dtype,
        )
        return OnnxRuntimeBackend(
            make_session(str(path), settings=_SETTINGS),
            contract,
            limits=self._limits,
            variant=path.stem,
            vocab_size=config.vocab_size,
            router_mode=config.router_mode if config.is_moe else None,
        )
