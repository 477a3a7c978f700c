"""Models for ONNX Runtime on the CPU within a build: lower, calibrate, check, measure."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from export.build_setting import BuildSetting
from export.cache_scales import calibrate_cache
from export.checks import check_numbers
from export.graph import MODEL_NAME
from export.lowerings.cpu import (
    CHUNK_LENGTH,
    CPU_BITS,
    CPU_PRECISIONS,
    CpuModel,
    CpuPrecision,
    lower_for_cpu,
)
from export.lowerings.grouped_query_attention import CacheScales
from export.quality import Quality, QualityError, measure_quality, sample_text, text_windows
from export.token_choice import WIDTH, export_token_choice
from model.contract import StepContract, step_contract
from runtime.backends.narrow_cache import save_scales
from runtime.backends.onnxruntime_backend import OnnxRuntimeBackend, make_session
from runtime.manifest import Variant

logger = logging.getLogger(__name__)

KVCacheDtype = Literal["auto", "int8"]
KV_CACHE_DTYPES: tuple[KVCacheDtype, ...] = get_args(KVCacheDtype)
TOKEN_CHOICE = "cpu/token_choice.onnx"
# Shorter prompts go through the cache of 8 bits: what the second model saves there does not pay for
# opening it.
PROMPT_MODEL_FROM = 256


@dataclass(frozen=True, kw_only=True)
class CpuRequest:
    """Which model for the CPU to build.

    Attributes:
        precision: of its weights.
        kv_cache_dtype: of cached keys and values; `auto` is float32.
        eval_text: a text on which what is narrow is measured; None samples one.
    """

    precision: CpuPrecision = "fp32"
    kv_cache_dtype: KVCacheDtype = "auto"
    eval_text: Path | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.precision not in CPU_PRECISIONS:
            problems.append(
                f"precision must be one of {', '.join(CPU_PRECISIONS)}, got {self.precision!r}"
            )
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            problems.append(
                f"kv_cache_dtype must be one of {', '.join(KV_CACHE_DTYPES)}, "
                f"got {self.kv_cache_dtype!r}"
            )
        if problems:
            raise ValueError("invalid CpuRequest: " + "; ".join(problems))

    @property
    def name(self) -> str:
        """The variant's name, e.g. `int4` or, with a cache of 8 bits, `int4-kv8`."""
        return self.precision if self.kv_cache_dtype == "auto" else f"{self.precision}-kv8"

    @property
    def path(self) -> str:
        """Where the model stands in the bundle."""
        return f"cpu/{self.name}.onnx"

    @property
    def prompt_path(self) -> str:
        """Where the model of long prompts stands, beside a cache of 8 bits."""
        return f"cpu/{self.name}.prompt.onnx"

    @property
    def scales_path(self) -> str:
        """Where the scales of a cache of 8 bits stand."""
        return f"cpu/{self.name}.scales.npy"


@dataclass(frozen=True, kw_only=True)
class BuiltCpuModel:
    """What a build adds to a bundle.

    Attributes:
        variant: the runnable model.
        files: paths of the new files.
        checks: name of a check to its result.
        quality: what is lost against float32; None where it was not measured.
    """

    variant: Variant
    files: tuple[str, ...]
    checks: dict[str, dict[str, Any]]
    quality: Quality | None


class CpuModelBuilder:
    """Makes models for the CPU of the canonical model in a folder."""

    def __init__(self, setting: BuildSetting) -> None:
        """Name what is built from."""
        self._setting = setting

    def build(self, request: CpuRequest, *, force: bool) -> BuiltCpuModel:
        """Lower the canonical model and find out how good the result is.

        Args:
            request: which model.
            force: accept what loses more than its bound.

        Raises:
            ExportCheckError: a float32 model differs from PyTorch.
            QualityError: a narrow one loses more than its bound, and `force` is not set.
        """
        path = self._setting.writer.folder / request.path
        path.parent.mkdir(exist_ok=True)
        scales = self._cache_scales(request) if request.kv_cache_dtype == "int8" else None
        details: dict[str, Any] = {}
        files = [request.path, f"{request.path}.data"]
        with self._setting.progress.stage(f"lower to {request.name} for the CPU"):
            lowered = self._lower(request, path, cache_scales=scales)
            if scales is not None:
                details["prompt_model"] = self._add_prompt_model(request, scales)
                files += [request.prompt_path, request.scales_path]
        checks: dict[str, dict[str, Any]] = {}
        quality = None
        if request.name == "fp32":
            network = self._setting.load_network()
            with self._setting.progress.stage("check the CPU model"):
                checks["cpu_fp32_against_torch"] = check_numbers(
                    path, self._contract(lowered), network, self._setting.limits, rows_alone=True
                )
        elif self._setting.trained or request.eval_text is not None:
            quality = self._measure(request, path, lowered, force=force)
            checks[f"cpu_{request.name}_quality"] = {
                "passed": quality.accepted,
                **quality.as_dict(),
            }
        else:
            logger.info("quality is not measured: it says nothing of random weights")
        return BuiltCpuModel(
            variant=Variant(
                backend="onnxruntime",
                name=request.name,
                path=request.path,
                precision=request.precision,
                details={
                    **lowered.as_details(),
                    **details,
                    "token_choice": {"path": TOKEN_CHOICE, "width": WIDTH},
                },
            ),
            files=(*files, *self._token_choice()),
            checks=checks,
            quality=quality,
        )

    def _lower(self, request: CpuRequest, path: Path, **options: Any) -> CpuModel:
        return lower_for_cpu(
            self._setting.writer.folder / MODEL_NAME,
            path,
            self._setting.checkpoint.config,
            slots=self._setting.limits.max_seq_len,
            precision=request.precision,
            **options,
        )

    def _add_prompt_model(
        self, request: CpuRequest, scales: Sequence[CacheScales]
    ) -> dict[str, Any]:
        """Write what fills a cache of 8 bits from a float32 one; returns the variant's detail."""
        weights = self._setting.writer.folder / request.path
        self._lower(request, self._setting.writer.folder / request.prompt_path, weights_of=weights)
        save_scales(
            self._setting.writer.folder / request.scales_path,
            np.stack([np.stack([layer.key, layer.value]) for layer in scales]),
        )
        return {
            "path": request.prompt_path,
            "scales": request.scales_path,
            "from_tokens": PROMPT_MODEL_FROM,
        }

    def _token_choice(self) -> tuple[str, ...]:
        """Write the model that chooses tokens, which all CPU models share, if it is not there."""
        path = self._setting.writer.folder / TOKEN_CHOICE
        if path.exists():
            return ()
        export_token_choice(path, self._setting.checkpoint.config.vocab_size)
        return (TOKEN_CHOICE,)

    def _cache_scales(self, request: CpuRequest) -> list[CacheScales]:
        reference = self._canonical()
        with self._setting.progress.stage("calibrate the cache"):
            windows = self._windows(request)
            if windows is None:
                windows = sample_text(reference, self._setting.checkpoint.config.bos_token_id)
            scales = calibrate_cache(reference, windows)
        reference.close()
        return scales

    def _measure(
        self, request: CpuRequest, path: Path, lowered: CpuModel, *, force: bool
    ) -> Quality:
        reference = self._canonical()
        candidate = self._backend(
            path, self._contract(lowered), rows_alone=True, chunk_length=CHUNK_LENGTH
        )
        with self._setting.progress.stage(f"measure the quality of {request.name}"):
            quality = measure_quality(
                reference,
                candidate,
                bits=CPU_BITS.get(request.precision, 8),
                first_token=self._setting.checkpoint.config.bos_token_id,
                windows=self._windows(request),
            )
        for backend in (reference, candidate):
            backend.close()
        if not quality.accepted and not force:
            raise QualityError(
                f"{request.name} loses more than its bound: {quality}. Take more bits, measure on "
                "a text of your own (--eval-text), or accept it with --force"
            )
        logger.info("%s: %s", request.name, quality)
        return quality

    def _canonical(self) -> OnnxRuntimeBackend:
        checkpoint = self._setting.checkpoint
        contract = step_contract(
            checkpoint.config, checkpoint.generation, max_seq_len=self._setting.limits.max_seq_len
        )
        return self._backend(self._setting.writer.folder / MODEL_NAME, contract)

    def _contract(self, lowered: CpuModel) -> StepContract:
        return step_contract(
            self._setting.checkpoint.config,
            self._setting.checkpoint.generation,
            max_seq_len=self._setting.limits.max_seq_len,
            cache_dtype=lowered.cache_dtype,
            score_heads=lowered.score_heads,
        )

    def _backend(self, path: Path, contract: StepContract, **options: Any) -> OnnxRuntimeBackend:
        config = self._setting.checkpoint.config
        return OnnxRuntimeBackend(
            make_session(str(path)),
            contract,
            limits=self._setting.limits,
            variant=path.stem,
            vocab_size=config.vocab_size,
            router_mode=config.router_mode if config.is_moe else None,
            **options,
        )

    def _windows(self, request: CpuRequest) -> Sequence[Sequence[int]] | None:
        if request.eval_text is None:
            return None
        return text_windows(request.eval_text, self._setting.checkpoint, self._setting.limits)
