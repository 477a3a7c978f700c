"""Engines within a build: lower the canonical model, measure what that loses, build, describe."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.build_setting import BuildSetting
from export.decode_graph import WIDTH, write_decode_graph
from export.engine import (
    DTYPES,
    EngineConfig,
    EngineReport,
    build_engine,
)
from export.engine_quality import EngineQuality
from export.estimate import estimate
from export.graph import MODEL_NAME
from export.kernel_build import op_uses, write_kernels
from export.layer_engine import LayerEngine
from export.lowerings.engine_weights import weight_format
from export.lowerings.tensorrt import lower_for_tensorrt
from export.profiles import step_profiles
from export.quality import Quality
from model.contract import StepContract, step_contract
from runtime.engines.decode_graph import DECODE_GRAPH, DecodeGraphContract, EngineInterface
from runtime.manifest import Variant

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BuiltEngineModel:
    """What a build adds to a bundle.

    Attributes:
        variant: the runnable engine.
        files: paths of the new files.
        checks: name of a check to its result.
        quality: what is lost against float32; None where it was not measured.
        report: the engine's part of the build's JSON.
    """

    variant: Variant
    files: tuple[str, ...]
    checks: dict[str, dict[str, Any]]
    quality: Quality | None
    report: dict[str, Any]


class EngineModelBuilder:
    """Makes engines of the canonical model in a bundle's folder."""

    def __init__(self, setting: BuildSetting) -> None:
        """Name what is built from."""
        self._setting = setting

    def build(self, config: EngineConfig, *, force: bool) -> BuiltEngineModel:
        """Lower the canonical model, find out how good the result is, and build the engine.

        Args:
            config: which engine.
            force: accept what loses more than its bound.

        Raises:
            EngineBuildError: the engine could not be built.
            QualityError: the precision loses more than its bound, and `force` is not set.
        """
        dtype = DTYPES[config.precision]
        contract = self._contract(dtype)
        layers = (
            LayerEngine(self._setting.load_network(), config) if config.plugin == "layer" else None
        )
        with tempfile.TemporaryDirectory(dir=self._setting.writer.folder) as scratch:
            with self._setting.progress.stage(f"lower to {config.precision}"):
                lowered = self._lower(config, layers, Path(scratch))
            quality = self._measure(config, layers, lowered, force=force)
            kernels = self._kernels(config, layers, dtype)
            with self._setting.progress.stage("build engine"):
                built = build_engine(
                    lowered,
                    config,
                    contract,
                    self._setting.progress,
                    kernels=kernels,
                    plugin_launches=1 if layers is None else layers.decode_launches,
                )
            graph = None
            if config.sampling_tail:
                graph = self._decode_graph(config, lowered, contract)
        relative = f"engines/{config.file_name}"
        self._setting.writer.path_for(relative).write_bytes(built.blob)
        files = [relative]
        details = _engine_details(config, built.report, contract, dtype)
        if graph is not None:
            details[DECODE_GRAPH] = graph
            files.append(graph["path"])
        measured = None if quality is None else self._said_of(config, quality)
        details["quality"] = measured
        if weight_format(config.precision) is not None:
            shape = (self._setting.checkpoint.config, self._setting.checkpoint.generation)
            details["read_bytes_per_token"] = estimate(*shape, config).read_bytes_per_token
        if layers is not None:
            details |= layers.details()
        keys = ("targets", "layers", "plugin_layers", "fused_attention", "plan")
        return BuiltEngineModel(
            variant=Variant(
                backend=config.backend,
                name=config.variant_name,
                path=relative,
                precision=config.precision,
                details=details,
            ),
            files=tuple(files),
            checks={}
            if quality is None
            else {check_name(config): {"passed": quality.accepted, **quality.as_dict()}},
            quality=quality,
            report={
                "backend": config.backend,
                "precision": config.precision,
                "cache_updates": built.report.cache_updates,
                "attention": built.report.attention,
                "quality": measured,
                **{key: details[key] for key in keys},
                DECODE_GRAPH: graph,
            },
        )

    def _decode_graph(
        self, config: EngineConfig, lowered: Path, step: StepContract
    ) -> dict[str, Any]:
        """Build the decode graph; what the manifest says of it."""
        contract = DecodeGraphContract(step)
        with self._setting.progress.stage("build decode graph"):
            model = write_decode_graph(lowered)
            profiles = step_profiles(config.limits)[:1]
            built = build_engine(model, config, contract, self._setting.progress, profiles=profiles)
        path = f"engines/{config.decode_file_name}"
        self._setting.writer.path_for(path).write_bytes(built.blob)
        return {"path": path, "width": WIDTH, **_network_details(built.report, contract)}

    def _contract(self, cache_dtype: str) -> StepContract:
        return step_contract(
            self._setting.checkpoint.config,
            self._setting.checkpoint.generation,
            max_seq_len=self._setting.limits.max_seq_len,
            cache_dtype=cache_dtype,
        )

    def _lower(self, config: EngineConfig, layers: LayerEngine | None, folder: Path) -> Path:
        if layers is not None:
            return layers.write(folder)
        return lower_for_tensorrt(
            self._setting.writer.folder / MODEL_NAME,
            folder,
            DTYPES[config.precision],
            weights=weight_format(config.precision),
            plugins=config.plugin == "doge",
            aot_plugins=config.plugin == "doge-aot",
        )

    def _measure(
        self, config: EngineConfig, layers: LayerEngine | None, lowered: Path, *, force: bool
    ) -> Quality | None:
        """Measure what the engine's precision loses, before the long build."""
        name = config.variant_name
        canonical = self._setting.writer.folder / MODEL_NAME
        measured = EngineQuality(
            canonical,
            self._setting.checkpoint,
            self._setting.limits,
            trained=self._setting.trained,
            eval_text=self._setting.eval_text,
        )
        reason = measured.why_not(config)
        if reason is not None:
            logger.info("the quality of %s is not measured: %s", name, reason)
            return None
        with self._setting.progress.stage(f"measure the quality of {name}"):
            if layers is not None:
                text = self._setting.eval_text
                return layers.measure(name, self._setting.checkpoint, eval_text=text, force=force)
            if config.plugin == "doge-aot":  # ONNX Runtime lacks these plugins; the weights count
                folder = lowered.with_suffix("")
                folder.mkdir()
                dtype, weights = DTYPES[config.precision], weight_format(config.precision)
                lowered = lower_for_tensorrt(canonical, folder, dtype, weights=weights)
            return measured.measure(config, lowered, force=force)

    def _said_of(self, config: EngineConfig, quality: Quality) -> Mapping[str, Any]:
        return {"variant": f"{config.backend}:{config.variant_name}", **quality.as_dict()}

    def _kernels(
        self, config: EngineConfig, layers: LayerEngine | None, dtype: str
    ) -> frozenset[str]:
        """Compile what the engine's plugins launch into the bundle; their names."""
        if config.plugin not in ("doge", "layer"):
            return frozenset()
        uses = op_uses(self._setting.writer.folder / MODEL_NAME, dtype) if layers is None else ()
        specs = () if layers is None else layers.kernels
        with self._setting.progress.stage(f"compile kernels for {', '.join(config.targets)}"):
            library = write_kernels(
                uses, config.targets, self._setting.writer, self._setting.adopted, step_specs=specs
            )
        return library.names


def check_name(config: EngineConfig) -> str:
    """What the manifest calls the check of an engine's quality."""
    return f"engine_{config.variant_name}_quality"


def _engine_details(
    config: EngineConfig, report: EngineReport, contract: StepContract, dtype: str
) -> dict[str, Any]:
    return {
        "targets": list(config.targets),
        "builder_version": report.builder_version,
        "cache_dtype": dtype,
        "score_dtype": "float32",
        "plugin": config.plugin,
        "kernels": list(report.kernels),
        **_network_details(report, contract),
    }


def _network_details(report: EngineReport, contract: EngineInterface) -> dict[str, Any]:
    """What an engine and a decode graph each have of their own."""
    return {
        "profiles": [profile.as_dict(contract) for profile in report.profiles],
        "contract": contract.as_dict(),
        "layers": report.layers,
        "attention": report.attention,
        "cache_updates": report.cache_updates,
        "plugin_layers": report.plugin_layers,
        "fused_attention": report.fused_attention,
        "plan": None if report.plan is None else report.plan.as_dict(),
    }
