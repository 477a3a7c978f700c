"""Models for our kernels within a build: pack the weights, measure what that loses, compile."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from export.bundle_writer import BundleWriter
from export.kernel_build import write_kernels
from export.progress import BuildProgress
from export.quality import Quality, QualityError, measure_quality, text_windows
from export.sources import Checkpoint
from export.step_weights import step_model_of, write_step_weights
from model.doge import DogeForCausalLM
from plugins.projection.packing import WeightFormat, pack_weights, unpack_weights
from runtime.backends.base import Limits
from runtime.backends.torch_backend import TorchBackend
from runtime.bundle import Bundle
from runtime.kernel_step.formats import STEP_PRECISIONS, StepFormats, StepPrecision
from runtime.kernel_step.packed_weights import read_bytes_per_token
from runtime.kernel_step.step_kernels import StepKernels
from runtime.kernel_step.variant import BACKEND, variant_details, weights_path
from runtime.manifest import Variant

logger = logging.getLogger(__name__)

_BITS = {"fp16": 16, "bf16": 16, "int8": 8, "int4": 4}
# The kernels copy asynchronously and know bfloat16 from here on.
_LEAST_TARGET = 80


@dataclass(frozen=True, kw_only=True)
class CudaRequest:
    """Which model for our kernels to build.

    Attributes:
        precision: of its weights.
        targets: GPU architectures that its kernels are compiled for, `sm89`.
    """

    precision: StepPrecision = "fp16"
    targets: tuple[str, ...] = ("sm89",)

    def __post_init__(self) -> None:
        problems = []
        if self.precision not in STEP_PRECISIONS:
            problems.append(
                f"precision must be one of {', '.join(STEP_PRECISIONS)}, got {self.precision!r}"
            )
        if not self.targets:
            problems.append("targets must name at least one GPU architecture, e.g. sm89")
        for target in self.targets:
            if not re.fullmatch(r"sm\d{2,3}", target):
                problems.append(f"target must look like sm89, got {target!r}")
            elif int(target.removeprefix("sm")) < _LEAST_TARGET:
                problems.append(f"our kernels need sm{_LEAST_TARGET} or later, got {target}")
        if problems:
            raise ValueError("invalid CudaRequest: " + "; ".join(problems))

    @property
    def path(self) -> str:
        """Where the packed weights stand in the bundle."""
        return weights_path(self.precision)


@dataclass(frozen=True, kw_only=True)
class BuiltCudaModel:
    """What a build adds to a bundle.

    Attributes:
        variant: the runnable model.
        checks: name of a check to its result.
        quality: what is lost against float32; None where it was not measured.
    """

    variant: Variant
    checks: dict[str, dict[str, Any]]
    quality: Quality | None


class CudaModelBuilder:
    """Makes models for our kernels in a bundle's folder."""

    def __init__(
        self,
        writer: BundleWriter,
        checkpoint: Checkpoint,
        limits: Limits,
        progress: BuildProgress,
        *,
        adopted: Bundle | None,
        trained: bool,
        eval_text: Path | None,
    ) -> None:
        """Name what is built from.

        Args:
            writer: its folder gets the weights and the kernels.
            checkpoint: what is built.
            limits: of every model in the folder.
            progress: is told the stages.
            adopted: the bundle whose parts are taken over, None for none.
            trained: whether the weights mean anything; quality is measured only then, or on a text.
            eval_text: a text to measure on; None samples one.
        """
        self._writer = writer
        self._checkpoint = checkpoint
        self._limits = limits
        self._progress = progress
        self._adopted = adopted
        self._trained = trained
        self._eval_text = eval_text

    def build(
        self, request: CudaRequest, load_network: Callable[[], DogeForCausalLM], *, force: bool
    ) -> BuiltCudaModel:
        """Pack the weights, compile the kernels and find out how good the result is.

        Args:
            request: which model.
            load_network: the checkpoint's network.
            force: accept what loses more than its bound.

        Raises:
            BackendUnavailableError: Triton is not installed.
            KernelCompileError: a kernel does not compile.
            QualityError: the precision loses more than its bound, and `force` is not set.
            ValueError: a model, limits or weights that our kernels do not cover.
        """
        network = load_network()
        formats = StepFormats.of(request.precision)
        model = step_model_of(network, self._limits.max_seq_len)
        kernels = StepKernels(model, formats, self._limits)
        quality = self._measure(request, network, force=force)
        with self._progress.stage(f"pack weights as {request.precision}"):
            path = self._writer.path_for(request.path)
            write_step_weights(path, network, model, formats)
            self._writer.add_file("weights", request.path)
        with self._progress.stage(f"compile kernels for {', '.join(request.targets)}"):
            write_kernels(
                (), request.targets, self._writer, self._adopted, step_specs=kernels.specs
            )
        details: dict[str, Any] = {
            **variant_details(model),
            "targets": list(request.targets),
            "cache_dtype": formats.float_kind,
            "score_dtype": "float32",
            "kernels": [spec.name for spec in kernels.specs],
            "read_bytes_per_token": read_bytes_per_token(model, formats),
            "quality": None if quality is None else quality.as_dict(),
        }
        variant = Variant(
            backend=BACKEND,
            name=request.precision,
            path=request.path,
            precision=request.precision,
            details=details,
        )
        checks = {}
        if quality is not None:
            checks[check_name(request)] = {"passed": quality.accepted, **quality.as_dict()}
        return BuiltCudaModel(variant=variant, checks=checks, quality=quality)

    def _measure(
        self, request: CudaRequest, network: DogeForCausalLM, *, force: bool
    ) -> Quality | None:
        """What the stored weights lose; the kernels' own arithmetic is float32, as the network's.

        Cached keys and values are of 16 bits on the GPU and of 32 here, which is not measured.
        """
        if request.precision == "fp32" or not (self._trained or self._eval_text):
            logger.info(
                "the quality of %s is not measured: %s",
                request.precision,
                "it is the float32 model"
                if request.precision == "fp32"
                else "it says nothing of random weights",
            )
            return None
        with self._progress.stage(f"measure the quality of {request.precision}"):
            return measure_stored_weights(
                f"{BACKEND}:{request.precision}",
                network,
                StepFormats.of(request.precision),
                self._checkpoint,
                self._limits,
                eval_text=self._eval_text,
                force=force,
            )


def measure_stored_weights(
    name: str,
    network: DogeForCausalLM,
    formats: StepFormats,
    checkpoint: Checkpoint,
    limits: Limits,
    *,
    eval_text: Path | None,
    force: bool,
) -> Quality:
    """What the network with the numbers that are stored loses against the network.

    Args:
        name: what messages call it.
        network: in float32.
        formats: of the stored numbers.
        checkpoint: the network's.
        limits: of the model.
        eval_text: a text to measure on; None samples one.
        force: accept what loses more than its bound.

    Raises:
        QualityError: it loses more than its bound, and `force` is not set.
    """
    windows = None if eval_text is None else text_windows(eval_text, checkpoint, limits)
    backends = [
        TorchBackend(model, limits=limits, variant=formats.precision)
        for model in (network, with_stored_weights(network, formats))
    ]
    quality = measure_quality(
        *backends,
        bits=_BITS[formats.precision],
        first_token=checkpoint.config.bos_token_id,
        windows=windows,
    )
    if not quality.accepted and not force:
        raise QualityError(
            f"{name} loses more than its bound: {quality}. Take more bits (--precision), measure "
            "on a text of your own (--eval-text), or accept it with --force"
        )
    logger.info("%s: %s", name, quality)
    return quality


def with_stored_weights(network: DogeForCausalLM, formats: StepFormats) -> DogeForCausalLM:
    """A float32 copy of the network whose projections and tables hold the numbers that are stored.

    Products of two matrices that are stored as one (mask scores, the seed's routers) are rounded
    here before they are multiplied, and there after it.
    """
    rounded = copy.deepcopy(network)
    small = re.compile(r"(dt_proj|router_gate|queries|v_queries|down_embed|up_embed)$")
    with torch.no_grad():
        for name, module in rounded.named_modules():
            if isinstance(module, nn.Embedding | nn.Linear):
                weight = module.weight
                if small.search(name):
                    weight_format = formats.small
                elif name.endswith(("embed_tokens", "lm_head")):
                    weight_format = formats.table
                elif name.endswith("v_embed"):
                    continue
                else:
                    weight_format = formats.projection(weight.shape[1])
                weight.copy_(torch.from_numpy(_stored(weight.numpy(), weight_format)))
    return rounded


def check_name(request: CudaRequest) -> str:
    """What the manifest calls the check of a model's quality."""
    return f"{BACKEND}_{request.precision}_quality"


def _stored(numbers: Any, weight_format: WeightFormat) -> Any:
    return unpack_weights(pack_weights([numbers], weight_format))
