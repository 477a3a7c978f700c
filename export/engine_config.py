"""What an engine is built for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from plugins.projection.matrix import MAX_BATCH
from runtime.backends.base import Limits
from runtime.kernel_step.formats import STEP_PRECISIONS
from runtime.kernel_step.step_model import SLOT_MULTIPLE
from runtime.tensorrt_module import PRODUCTS, Product

Precision = Literal["fp16", "bf16", "fp32", "int8", "int4", "fp8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
PluginChoice = Literal["none", "doge", "doge-aot", "layer"]
PLUGINS: tuple[PluginChoice, ...] = get_args(PluginChoice)
# Our kernels copy asynchronously and know bfloat16 from this GPU architecture on.
LEAST_TARGET = 80
# Types of activations and cached keys and values; int8, int4 and fp8 are weights alone.
DTYPES: dict[Precision, str] = {
    "fp16": "float16",
    "bf16": "bfloat16",
    "fp32": "float32",
    "int8": "float16",
    "int4": "float16",
    "fp8": "float16",
}


class EngineBuildError(Exception):
    """The engine could not be built; the message says at which stage, and the builder's reason."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What an engine is built for. Each field has a command-line flag of the same name.

    `sampling_tail` asks for a second engine beside it, the decode graph.
    """

    backend: Product = "tensorrt_rtx"
    targets: tuple[str, ...] = ("sm89",)
    precision: Precision = "fp16"
    plugin: PluginChoice = "none"
    sampling_tail: bool = False
    max_batch_size: int = 4
    max_input_len: int
    max_seq_len: int

    def __post_init__(self) -> None:
        problems = []
        if self.backend not in PRODUCTS:
            problems.append(f"backend must be one of {', '.join(PRODUCTS)}, got {self.backend!r}")
        if self.precision not in PRECISIONS:
            problems.append(
                f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}"
            )
        if self.plugin not in PLUGINS:
            problems.append(f"plugin must be one of {', '.join(PLUGINS)}, got {self.plugin!r}")
        if self.plugin == "doge-aot" and self.backend != "tensorrt":
            problems.append(
                f"plugin doge-aot needs backend tensorrt, got {self.backend!r}: TensorRT-RTX has "
                "no plugins whose kernels an engine holds; use plugin doge there"
            )
        if self.plugin == "doge-aot" and len(self.targets) != 1:
            problems.append("plugin doge-aot is built for the GPU present; name one target")
        if self.plugin == "layer":
            problems += self._layer_problems()
        if self.sampling_tail and self.plugin != "none":
            problems.append(
                f"sampling_tail needs plugin none, got {self.plugin!r}: a decode graph is built of "
                "TensorRT's own layers alone"
            )
        if not self.targets:
            problems.append("targets must name at least one GPU architecture, e.g. sm89")
        problems += [
            f"target must look like sm89, got {target!r}"
            for target in self.targets
            if not re.fullmatch(r"sm\d{2,3}", target)
        ]
        if len(set(self.targets)) != len(self.targets):
            problems.append(f"targets must differ, got {','.join(self.targets)}")
        problems += [
            f"{name} must be at least 1, got {getattr(self, name)}"
            for name in ("max_batch_size", "max_input_len", "max_seq_len")
            if getattr(self, name) < 1
        ]
        if self.max_seq_len < self.max_input_len:
            problems.append(
                f"max_seq_len ({self.max_seq_len}) must cover max_input_len ({self.max_input_len})"
            )
        if problems:
            raise ValueError("invalid EngineConfig: " + "; ".join(problems))

    def _layer_problems(self) -> list[str]:
        """What our kernels do not take, of what engines otherwise do."""
        problems = []
        if self.precision not in STEP_PRECISIONS:
            problems.append(
                f"plugin layer takes precision {', '.join(STEP_PRECISIONS)}, got {self.precision!r}"
            )
        if self.max_seq_len % SLOT_MULTIPLE:
            below = self.max_seq_len // SLOT_MULTIPLE * SLOT_MULTIPLE
            problems.append(
                f"plugin layer takes a max_seq_len that is a multiple of {SLOT_MULTIPLE}, got "
                f"{self.max_seq_len}; take {below or SLOT_MULTIPLE}"
            )
        if self.max_batch_size > MAX_BATCH:
            problems.append(
                f"plugin layer takes a max_batch_size of up to {MAX_BATCH}, got "
                f"{self.max_batch_size}"
            )
        problems += [
            f"plugin layer needs GPUs from sm{LEAST_TARGET} on, got {target!r}"
            for target in self.targets
            if re.fullmatch(r"sm\d{2,3}", target) and int(target.removeprefix("sm")) < LEAST_TARGET
        ]
        return problems

    @property
    def limits(self) -> Limits:
        """The limits that bundle and profiles share."""
        return Limits(
            max_batch_size=self.max_batch_size,
            max_input_len=self.max_input_len,
            max_seq_len=self.max_seq_len,
        )

    @property
    def file_name(self) -> str:
        """Name of the engine file in a bundle's `engines/`."""
        return f"{self._stem}.engine"

    @property
    def decode_file_name(self) -> str:
        """Likewise of the decode graph."""
        return f"{self._stem}.decode.engine"

    @property
    def variant_name(self) -> str:
        """Name of the engine among its backend's variants."""
        return f"{self.precision}-{'-'.join(self.targets)}{self._suffix}"

    @property
    def _stem(self) -> str:
        return f"{self.backend}-{'-'.join(self.targets)}-{self.precision}{self._suffix}"

    @property
    def _suffix(self) -> str:
        return "" if self.plugin == "none" else f"-{self.plugin}"
