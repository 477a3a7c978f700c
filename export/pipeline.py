"""The whole build: checkpoint, canonical ONNX, lowered model, engine, bundle."""

from __future__ import annotations

import importlib.metadata
import logging
import resource
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from export.build_setting import BuildSetting
from export.bundle_writer import BundleWriter, same_source
from export.checks import check_numbers, check_structure
from export.cpu_models import CpuModelBuilder, CpuRequest
from export.cuda_models import CudaModelBuilder, CudaRequest
from export.cuda_models import check_name as cuda_check_name
from export.engine import PRECISIONS, EngineConfig, check_builder
from export.engine_models import EngineModelBuilder, check_name
from export.graph import MODEL_NAME, export_onnx
from export.lowerings.cpu import CPU_PRECISIONS
from export.progress import BuildProgress
from export.sources import Checkpoint, describe_source, read_checkpoint, write_random
from model.checkpoint import load_checkpoint
from model.contract import StepContract, step_contract
from model.doge import DogeForCausalLM
from model.hub import ModelLocation
from model.seed_rewrites import rewrite_for_export
from runtime.backends.base import Limits
from runtime.bundle import Bundle
from runtime.manifest import BundleFile, Manifest, Source, Variant

logger = logging.getLogger(__name__)

# What the variant of ONNX Runtime is called that runs the canonical model as it is.
CANONICAL = "canonical"
# Packages whose version can change what a build gives.
_PACKAGES = (
    "torch",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "tensorrt-rtx-cu13",
    "tensorrt",
)


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """What to build.

    Attributes:
        location: the checkpoint, or None for random weights.
        random_shape: name of a released shape for random weights, or None.
        output: folder of the bundle.
        engine: the engine to build, None for none.
            cpu: the model lowered for the CPU, None for none.
        cuda: the model for our own kernels, None for none.
        limits: limits of every model in the bundle.
        router_mode: overrides the checkpoint's, None keeps it.
        keep_checkpoint: put the checkpoint into the bundle, for backend torch.
        force: build everything anew instead of adding to a bundle of the same source.
        eval_text: a text on which an engine's precision is measured; None samples one.
    """

    location: ModelLocation | None
    random_shape: str | None
    output: Path
    engine: EngineConfig | None
    cpu: CpuRequest | None
    cuda: CudaRequest | None
    limits: Limits
    router_mode: str | None
    keep_checkpoint: bool
    force: bool
    eval_text: Path | None = None


@dataclass(kw_only=True)
class BuildResult:
    """What a build gave; `as_dict` is the JSON of the command.

    Attributes:
        output: the bundle's folder, as it was asked for.
        bundle: the finished bundle.
        timings: seconds by stage.
        engine: the engine's part of the report, None when none was built.
        quality: what narrow weights lose, None when no narrow model was built or measured. Where
            the CPU's model and the engine were, the CPU's; `engine` has its own.
        warnings: what the user should know.
    """

    output: Path
    bundle: Bundle
    timings: dict[str, float]
    engine: dict[str, Any] | None
    quality: dict[str, Any] | None
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {
            "bundle": str(self.output),
            "files": [asdict(file) for file in self.bundle.manifest.files],
            "timings": {stage: round(seconds, 3) for stage, seconds in self.timings.items()},
            "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
            "engine": self.engine,
            "quality": self.quality,
            "warnings": self.warnings,
        }


def build_bundle(request: BuildRequest, progress: BuildProgress) -> BuildResult:
    """Run the build; an existing bundle stays as it is until the new one is whole.

    Raises:
        FileNotFoundError: no such checkpoint.
        UnsupportedModelError: the checkpoint cannot be read or is of no known generation.
        BackendUnavailableError: the engine's builder or onnxruntime is missing.
        EngineBuildError: the engine could not be built.
        ExportCheckError: the exported model is wrong.
        QualityError: narrow weights lose more than their bound, and `force` is not set.
        BundleWriteError: the bundle cannot be written where it should go.
    """
    if request.engine is not None:
        check_builder(request.engine)
    folder = None if request.location is None else request.location.folder
    with BundleWriter(request.output, checkpoint=folder) as writer, progress.shown():
        with progress.stage("read checkpoint"):
            checkpoint = _checkpoint(request, writer)
            source = describe_source(checkpoint, request.random_shape)
        build = _Build(request, checkpoint, source, writer, progress)
        kept = build.adopt_previous()
        if not kept:
            build.export()
        build.cpu_model()
        build.cuda_model()
        engine = build.engine() if request.engine is not None else None
        with progress.stage("write bundle"):
            build.copy_checkpoint()
            bundle = writer.publish(build.manifest())
    return BuildResult(
        output=request.output,
        bundle=bundle,
        timings=progress.timings,
        engine=engine,
        quality=build.quality,
        warnings=build.warnings,
    )


def _checkpoint(request: BuildRequest, writer: BundleWriter) -> Checkpoint:
    if request.random_shape is not None:
        return write_random(writer.folder / "checkpoint", request.random_shape, request.router_mode)
    if request.location is None:
        raise AssertionError("a request has a checkpoint or a shape")
    return read_checkpoint(request.location, request.router_mode)


class _Build:
    """One build while it runs: the parts that the manifest will list."""

    def __init__(
        self,
        request: BuildRequest,
        checkpoint: Checkpoint,
        source: Source,
        writer: BundleWriter,
        progress: BuildProgress,
    ) -> None:
        self.warnings: list[str] = []
        self.quality: dict[str, Any] | None = None
        self._request = request
        self._checkpoint = checkpoint
        self._source = source
        self._writer = writer
        self._progress = progress
        self._checks: dict[str, dict[str, Any]] = {}
        self._variants: list[Variant] = []
        self._versions = _installed_versions()
        self._network: DogeForCausalLM | None = None
        self._adopted: Bundle | None = None

    def contract(
        self, cache_dtype: str = "float32", score_heads: int | None = None
    ) -> StepContract:
        """The step contract with keys and values cached as `cache_dtype`."""
        return step_contract(
            self._checkpoint.config,
            self._checkpoint.generation,
            max_seq_len=self._request.limits.max_seq_len,
            cache_dtype=cache_dtype,
            score_heads=score_heads,
        )

    def network(self) -> DogeForCausalLM:
        """The checkpoint's network, loaded when it is first asked for."""
        if self._network is None:
            with self._progress.stage("load checkpoint"):
                self._network = load_checkpoint(
                    self._checkpoint.folder, router_mode=self._request.router_mode
                )
        return self._network

    def _setting(self) -> BuildSetting:
        return BuildSetting(
            writer=self._writer,
            checkpoint=self._checkpoint,
            limits=self._request.limits,
            progress=self._progress,
            adopted=self._adopted,
            trained=self._request.random_shape is None,
            eval_text=self._request.eval_text,
            load_network=self.network,
        )

    def adopt_previous(self) -> bool:
        """Take over what a bundle of the same source holds; whether the ONNX model is in it."""
        previous = self._writer.previous
        if previous is None or self._request.force:
            return False
        manifest = previous.manifest
        config, limits = self._checkpoint.config, self._request.limits
        generation = self._checkpoint.generation.name
        if not same_source(manifest, self._source, generation, config, limits):
            self._warn(f"replaces the bundle of {manifest.source.name} with other settings")
            return False
        if manifest.versions != self._versions:
            self._warn("other package versions than the bundle's: everything is built anew")
            return False
        rebuilt = self._rebuilt_paths()
        self._writer.adopt(previous, lambda file: _is_kept(file, rebuilt))
        self._adopted = previous
        self._checks = {name: dict(result) for name, result in manifest.checks.items()}
        self._variants = [
            v for v in manifest.variants if v.path not in rebuilt and v.backend != "torch"
        ]
        logger.info("the ONNX model of the bundle is kept; --force builds it anew")
        return True

    def export(self) -> None:
        """Write and check the canonical model."""
        progress, request, network = self._progress, self._request, self.network()
        with progress.stage("export ONNX"):
            slots = request.limits.max_seq_len
            rewritten, rewrites = rewrite_for_export(network, slots)
            for rewrite in rewrites:
                logger.info("%s", rewrite)
            path = self._writer.path_for(MODEL_NAME)
            export_onnx(rewritten, path, max_seq_len=slots)
        with progress.stage("check ONNX"):
            contract = self.contract()
            self._checks["onnx_structure"] = check_structure(path, contract, rewritten)
            self._checks["onnxruntime_against_torch"] = check_numbers(
                path, contract, network, request.limits
            )
        if rewrites:
            self._checks["rewrites"] = {
                rewrite.name: {"applied": rewrite.applied, "reason": rewrite.reason}
                for rewrite in rewrites
            }
        self._writer.add_file("onnx", MODEL_NAME)
        self._writer.add_file("weights", f"{MODEL_NAME}.data")
        self._variants.append(
            Variant(backend="onnxruntime", name=CANONICAL, path=MODEL_NAME, precision="fp32")
        )

    def cpu_model(self) -> None:
        """Add the model for the CPU, unless the bundle has it already."""
        request = self._request.cpu
        if request is None or any(variant.path == request.path for variant in self._variants):
            return
        built = CpuModelBuilder(self._setting()).build(request, force=self._request.force)
        for file in built.files:
            self._writer.add_file("cpu", file)
        self._checks |= built.checks
        self._variants.append(built.variant)
        self._variants.sort(key=_preference)
        if built.quality is not None:
            name = f"{built.variant.backend}:{built.variant.name}"
            self.quality = {"variant": name, **built.quality.as_dict()}
            if not built.quality.accepted:
                self._warn(f"{name} loses more than its bound: {built.quality}")

    def cuda_model(self) -> None:
        """Add the model for our own kernels."""
        request = self._request.cuda
        if request is None:
            return
        self._checks.pop(cuda_check_name(request), None)
        built = CudaModelBuilder(self._setting()).build(request, force=self._request.force)
        self._checks |= built.checks
        self._variants += built.variants
        self._variants.sort(key=_preference)
        if built.quality is not None:
            name = f"{built.variant.backend}:{built.variant.name}"
            self.quality = self.quality or {"variant": name, **built.quality.as_dict()}
            if not built.quality.accepted:
                self._warn(f"{name} loses more than its bound: {built.quality}")

    def engine(self) -> dict[str, Any]:
        """Build the engine that is asked for; its part of the report."""
        request, config = self._request, self._request.engine
        if config is None:
            raise AssertionError("no engine was asked for")
        self._checks.pop(check_name(config), None)
        built = EngineModelBuilder(self._setting()).build(config, force=request.force)
        for file in built.files:
            self._writer.add_file("engine", file)
        self._checks |= built.checks
        self._variants.append(built.variant)
        self._variants.sort(key=_preference)
        if built.quality is not None:
            self.quality = self.quality or built.report["quality"]
            if not built.quality.accepted:
                name = f"{built.variant.backend}:{built.variant.name}"
                self._warn(f"{name} loses more than its bound: {built.quality}")
        return built.report

    def copy_checkpoint(self) -> None:
        """Link the checkpoint and its tokenizer into the bundle, unless adopted already."""
        writer, checkpoint = self._writer, self._checkpoint
        if self._request.keep_checkpoint:
            for file in checkpoint.files:
                relative = f"checkpoint/{file.name}"
                if self._request.random_shape is not None:
                    writer.add_file("checkpoint", relative)
                else:
                    writer.link_or_copy(file, relative, "checkpoint")
            self._variants.append(
                Variant(backend="torch", name="fp32", path="checkpoint", precision="fp32")
            )
        elif self._request.random_shape is not None:
            shutil.rmtree(checkpoint.folder)
        for file in checkpoint.tokenizer_files:
            writer.link_or_copy(file, f"tokenizer/{file.name}", "tokenizer")

    def manifest(self) -> Manifest:
        """The manifest of what was built, without the files that the writer adds."""
        config = self._checkpoint.config
        return Manifest(
            project_version=importlib.metadata.version("doge-tensorrt"),
            source=self._source,
            generation=self._checkpoint.generation.name,
            config=config.as_dict(),
            router_mode=config.router_mode if config.is_moe else None,
            limits=self._request.limits,
            contract=self.contract().as_dict(),
            variants=tuple(self._variants),
            versions=self._versions,
            checks=self._checks,
        )

    def _rebuilt_paths(self) -> frozenset[str]:
        """What is built now, and so not taken over."""
        engine, cuda = self._request.engine, self._request.cuda
        names = [] if engine is None else [engine.file_name, engine.decode_file_name]
        paths = [f"engines/{name}" for name in names]
        return frozenset([*paths, *([] if cuda is None else [cuda.path])])

    def _warn(self, message: str) -> None:
        logger.warning("%s", message)
        self.warnings.append(message)


def _preference(variant: Variant) -> int:
    """Place among a backend's variants, of which the first is its default.

    Engines: fp16 before bf16 before fp32 before narrow weights, TensorRT's own layers before
    plugins. The CPU: lowered models before the canonical one, fp32 before narrow ones, a cache of
    float32 before one of 8 bits.
    """
    if variant.name == CANONICAL:
        return 2 * (len(PRECISIONS) + len(CPU_PRECISIONS))
    order = CPU_PRECISIONS if variant.backend == "onnxruntime" else PRECISIONS
    place = [*order].index(variant.precision) if variant.precision in order else len(order)
    later = (
        variant.details.get("cache_dtype") == "int8"
        or variant.details.get("plugin", "none") != "none"
    )
    return 2 * place + later


def _is_kept(file: BundleFile, rebuilt: frozenset[str]) -> bool:
    """Checkpoint and tokenizer are linked anew, what is built now is replaced."""
    return file.role not in {"checkpoint", "tokenizer"} and file.path not in rebuilt


def _installed_versions() -> dict[str, str]:
    installed = {}
    for package in _PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed
