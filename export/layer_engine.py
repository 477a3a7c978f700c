"""What an engine with a plugin for each decoder layer takes within a build."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from export.cuda_models import measure_stored_weights
from export.engine_config import EngineConfig
from export.layer_model import write_layer_model
from export.quality import Quality
from export.sources import Checkpoint
from export.step_weights import step_model_of
from model.doge import DogeForCausalLM
from plugins.kernel_spec import KernelSpec
from runtime.kernel_step.formats import STEP_PRECISIONS
from runtime.kernel_step.layer_spec import LayerSpec
from runtime.kernel_step.layer_work import work_of
from runtime.kernel_step.packed_weights import read_bytes_per_token
from runtime.kernel_step.variant import variant_details


class LayerEngine:
    """The model of one engine, and the kernels that its layers launch.

    Attributes:
        spec: what the layers depend on.
    """

    def __init__(self, network: DogeForCausalLM, config: EngineConfig) -> None:
        """Choose the kernels.

        Args:
            network: in float32.
            config: of the engine.

        Raises:
            ValueError: a precision, targets or limits that our kernels do not cover.
        """
        if config.precision not in STEP_PRECISIONS:
            raise ValueError(
                f"plugin layer takes precision {', '.join(STEP_PRECISIONS)}, got "
                f"{config.precision!r}"
            )
        self._network, self._limits = network, config.limits
        model = step_model_of(network, config.max_seq_len)
        self.spec = LayerSpec.of(model, config.precision, config.limits)
        self._work = work_of(self.spec)

    @property
    def kernels(self) -> tuple[KernelSpec, ...]:
        """Every kernel of a layer."""
        return self._work.specs

    @property
    def decode_launches(self) -> int:
        """Kernels that one layer starts in a step of one token of one sequence."""
        return self._work.count_launches(batch=1, tokens=1)

    def write(self, folder: Path) -> Path:
        """Write the model that TensorRT is given into a folder.

        Raises:
            ValueError: weights that the precision cannot hold.
        """
        return write_layer_model(self._network, self.spec, folder / f"{self.spec.precision}.onnx")

    def measure(
        self, name: str, checkpoint: Checkpoint, *, eval_text: Path | None, force: bool
    ) -> Quality:
        """What the stored numbers lose; the kernels' own arithmetic is float32.

        Raises:
            QualityError: they lose more than their bound, and `force` is not set.
        """
        return measure_stored_weights(
            name,
            self._network,
            self.spec.formats,
            checkpoint,
            self._limits,
            eval_text=eval_text,
            force=force,
        )

    def details(self) -> dict[str, Any]:
        """What the manifest remembers of the layers, beside what it says of every engine."""
        return {
            **variant_details(self.spec.model),
            "layer_launches": self.decode_launches,
            "read_bytes_per_token": read_bytes_per_token(self.spec.model, self.spec.formats),
        }
