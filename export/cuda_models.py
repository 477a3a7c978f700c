"""Models for our kernels within a build: pack the weights, measure what that loses, compile."""

from __future__ import annotations

import copy
import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from export.build_setting import BuildSetting
from export.kernel_build import write_kernels
from export.quality import Quality, QualityError, measure_quality, text_windows
from export.sources import Checkpoint
from export.step_weights import (
    mask_score_rows,
    seed_router_rows,
    step_model_of,
    value_score_rows,
    write_step_weights,
)
from model.doge import DogeAttention, DogeForCausalLM
from model.seed import InnerFunctionAttention, SeedMoE
from plugins.projection.packing import WeightFormat, pack_weights, unpack_weights
from runtime.backends.base import Limits
from runtime.backends.torch_backend import TorchBackend
from runtime.kernel_step.formats import STEP_PRECISIONS, StepFormats, StepPrecision
from runtime.kernel_step.packed_weights import read_bytes_per_token
from runtime.kernel_step.step_kernels import StepKernels
from runtime.kernel_step.variant import BACKEND, PERSISTENT, variant_details, weights_path
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
        persistent: whether to add a second variant, of the same weights, that decodes one sequence
            greedily by a persistent kernel.
    """

    precision: StepPrecision = "fp16"
    targets: tuple[str, ...] = ("sm89",)
    persistent: bool = False

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
        persistent: the same with a persistent kernel, where it was asked for.
        checks: name of a check to its result.
        quality: what is lost against float32; None where it was not measured.
    """

    variant: Variant
    persistent: Variant | None
    checks: dict[str, dict[str, Any]]
    quality: Quality | None

    @property
    def variants(self) -> list[Variant]:
        """What the manifest lists."""
        return [self.variant, *([] if self.persistent is None else [self.persistent])]


class CudaModelBuilder:
    """Makes models for our kernels in a bundle's folder."""

    def __init__(self, setting: BuildSetting) -> None:
        """Name what is built from."""
        self._setting = setting

    def build(self, request: CudaRequest, *, force: bool) -> BuiltCudaModel:
        """Pack the weights, compile the kernels and find out how good the result is.

        Args:
            request: which model.
            force: accept what loses more than its bound.

        Raises:
            BackendUnavailableError: Triton, or what compiles a persistent kernel, is missing.
            KernelCompileError: a kernel does not compile.
            QualityError: the precision loses more than its bound, and `force` is not set.
            ValueError: a model, limits or weights that our kernels do not cover.
        """
        network = self._setting.load_network()
        formats = StepFormats.of(request.precision)
        model = step_model_of(network, self._setting.limits.max_seq_len)
        kernels = StepKernels(model, formats, self._setting.limits, persistent=request.persistent)
        quality = self._measure(request, network, force=force)
        with self._setting.progress.stage(f"pack weights as {request.precision}"):
            path = self._setting.writer.path_for(request.path)
            write_step_weights(path, network, model, formats)
            self._setting.writer.add_file("weights", request.path)
        with self._setting.progress.stage(f"compile kernels for {', '.join(request.targets)}"):
            write_kernels(
                (),
                request.targets,
                self._setting.writer,
                self._setting.adopted,
                step_specs=kernels.specs,
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
        persistent = None
        if kernels.persistent is not None:
            added = {spec.name for spec in kernels.persistent.specs}
            details["kernels"] = [name for name in details["kernels"] if name not in added]
            persistent = replace(
                variant,
                name=f"{request.precision}-{PERSISTENT}",
                details={
                    **details, PERSISTENT: True, "kernels": [spec.name for spec in kernels.specs],
                },
            )  # fmt: skip
        checks = {}
        if quality is not None:
            checks[check_name(request)] = {"passed": quality.accepted, **quality.as_dict()}
        return BuiltCudaModel(
            variant=variant, persistent=persistent, checks=checks, quality=quality
        )

    def _measure(
        self, request: CudaRequest, network: DogeForCausalLM, *, force: bool
    ) -> Quality | None:
        """What the stored weights lose; the kernels' own arithmetic is float32, as the network's.

        Cached keys and values are of 16 bits on the GPU and of 32 here, which is not measured.
        """
        if request.precision == "fp32" or not (self._setting.trained or self._setting.eval_text):
            logger.info(
                "the quality of %s is not measured: %s",
                request.precision,
                "it is the float32 model"
                if request.precision == "fp32"
                else "it says nothing of random weights",
            )
            return None
        with self._setting.progress.stage(f"measure the quality of {request.precision}"):
            return measure_stored_weights(
                f"{BACKEND}:{request.precision}",
                network,
                StepFormats.of(request.precision),
                self._setting.checkpoint,
                self._setting.limits,
                eval_text=self._setting.eval_text,
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
    """A float32 copy of the network whose matrices hold the numbers that are stored.

    Matrices that are stored as one (what mask scores are computed from, and what the seed picks
    values and experts by) are multiplied first and then rounded, as in `packed_arrays`.
    """
    rounded = copy.deepcopy(network)
    small = re.compile(r"(router_gate|value_gate|down_embed|up_embed)$")
    with torch.no_grad():
        for module in list(rounded.modules()):
            _merge_products(module, formats)
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


def _merge_products(module: nn.Module, formats: StepFormats) -> None:
    """Put one matrix in place of two that are stored as their product, before either is rounded."""
    if isinstance(module, DogeAttention) and module.scored:
        rows = _stored(mask_score_rows(module), formats.small)
        module.add_module("dt_proj", _ScoreRows(module.v_proj, rows))
    elif isinstance(module, InnerFunctionAttention):
        module.value_gate = _linear(value_score_rows(module))
        module.v_queries = module.v_keys = None
    elif isinstance(module, SeedMoE):
        module.router_gate = _linear(seed_router_rows(module))
        module.queries = module.keys = None


class _ScoreRows(nn.Module):
    """In place of `dt_proj`: mask scores are computed from a product with v_proj's input."""

    def __init__(self, v_proj: nn.Linear, rows: npt.NDArray[np.float32]) -> None:
        super().__init__()
        self._rows = torch.from_numpy(rows)
        v_proj.register_forward_pre_hook(self._note)

    def _note(self, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        (self._input,) = inputs

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """[B, S, N], of the input that `value` was just computed from."""
        return nn.functional.linear(self._input, self._rows)


def check_name(request: CudaRequest) -> str:
    """What the manifest calls the check of a model's quality."""
    return f"{BACKEND}_{request.precision}_quality"


def _linear(rows: npt.NDArray[np.float32]) -> nn.Linear:
    layer = nn.Linear(rows.shape[1], rows.shape[0], bias=False)
    layer.weight.copy_(torch.from_numpy(rows))
    return layer


def _stored(
    numbers: npt.NDArray[np.float32], weight_format: WeightFormat
) -> npt.NDArray[np.float32]:
    return unpack_weights(pack_weights([numbers], weight_format))
