"""Building an engine; needs no GPU with TensorRT-RTX."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from export.aot_build import register_aot
from export.builder_callbacks import (
    BuildLog,
    ProgressSink,
    interrupt_flag,
    make_logger,
    make_progress_monitor,
)
from export.engine_config import (
    DTYPES,
    PLUGINS,
    PRECISIONS,
    EngineBuildError,
    EngineConfig,
    Precision,
)
from export.engine_network import (
    allow_decomposed_attention,
    check_cache_in_place,
    check_network,
    check_plugins,
)
from export.plan.entries import READ_VERSION, PlanError, read_plan
from export.plan.summary import PlanSummary, summarize
from export.profiles import Profile, step_profiles
from plugins.tensorrt_plugin import deregister_plugins, register_plugins, take_problems
from runtime.engines.decode_graph import EngineInterface
from runtime.kernel_step.layer_plugin import make_layer_creator
from runtime.tensorrt_module import load_plugin_module, load_tensorrt

__all__ = [
    "DTYPES",
    "PLUGINS",
    "PRECISIONS",
    "BuiltEngine",
    "EngineBuildError",
    "EngineConfig",
    "EngineReport",
    "Precision",
    "build_engine",
    "check_builder",
    "read_plan_of_build",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EngineReport:
    """What went into an engine, counted in the parsed network.

    Attributes:
        layers: number of network layers by type.
        attention: layers of the built-in attention, one per decoder layer unless a plugin took it.
        cache_updates: in-place cache writes.
        plugin_layers: layers run by plugins.
        kernels: names of the kernels that the plugins may launch.
        plan: the compiled plan in numbers; None where the builder's log does not show it in a
            form that is known.
        profiles: the optimization profiles.
        builder_version: version of the product that built it.
    """

    layers: dict[str, int]
    attention: int
    cache_updates: int
    plugin_layers: int
    kernels: tuple[str, ...]
    plan: PlanSummary | None
    profiles: tuple[Profile, ...]
    builder_version: str

    @property
    def fused_attention(self) -> int | None:
        """Plan entries of all profiles that are one fused attention; None without a plan."""
        return None if self.plan is None else self.plan.fused_attention


@dataclass(frozen=True, kw_only=True)
class BuiltEngine:
    """A serialized engine and what is known about it."""

    blob: bytes = field(repr=False)
    report: EngineReport


def check_builder(config: EngineConfig) -> None:
    """Find out before any long work whether the engine's builder is there and knows the targets.

    Raises:
        BackendUnavailableError: the product is not installed or cannot be loaded.
        EngineBuildError: a target that the product does not build for.
    """
    trt = load_tensorrt(config.backend)
    if config.plugin == "doge-aot":
        load_plugin_module(trt)
    if hasattr(trt, "ComputeCapability"):
        _compute_capabilities(trt, config.targets)


def build_engine(
    onnx_path: Path,
    config: EngineConfig,
    contract: EngineInterface,
    sink: ProgressSink,
    *,
    profiles: tuple[Profile, ...] | None = None,
    kernels: frozenset[str] = frozenset(),
    plugin_launches: int = 1,
) -> BuiltEngine:
    """Parse a lowered model and build its engine.

    Args:
        onnx_path: model whose types are already those of `config.precision`.
        config: targets and limits.
        contract: inputs and outputs in the engine's types; the network must match it.
        sink: where progress is shown.
        profiles: the optimization profiles, the decode profile first; None for those of a step.
        kernels: names of the kernels that will be there where the engine runs, for plugins.
        plugin_launches: how many of them a plugin starts in a decode step, for the report.

    Raises:
        BackendUnavailableError: the product is not installed or cannot be loaded.
        EngineBuildError: parsing or building failed, or the network is not what it should be.
        KeyboardInterrupt: Ctrl-C during the build.
    """
    trt = load_tensorrt(config.backend)
    asked = step_profiles(config.limits) if profiles is None else profiles
    if config.plugin == "none":
        deregister_plugins(trt)
        return _build(trt, onnx_path, config, contract, sink, asked)
    if config.plugin == "doge-aot":
        deregister_plugins(trt)
        aot = register_aot(trt, onnx_path, config.targets).host
        try:
            built = _build(trt, onnx_path, config, contract, sink, asked)
        except EngineBuildError as error:
            raise _with_problems(error, aot.problems) from error
        return replace(built, report=replace(built.report, kernels=tuple(sorted(aot.used))))
    host = register_plugins(trt, *([make_layer_creator] if config.plugin == "layer" else []))
    host.known, host.used = kernels, set()
    take_problems(trt)  # of builds before
    try:
        built = _build(trt, onnx_path, config, contract, sink, asked, plugin_launches)
    except EngineBuildError as error:
        raise _with_problems(error, take_problems(trt)) from error
    finally:
        host.known = None
    return replace(built, report=replace(built.report, kernels=tuple(sorted(host.used))))


def _with_problems(error: EngineBuildError, problems: Iterable[str]) -> EngineBuildError:
    """The error with what plugins have raised, which the builder swallows."""
    return EngineBuildError("; ".join(dict.fromkeys([str(error), *problems])))


def _build(
    trt: Any,
    onnx_path: Path,
    config: EngineConfig,
    contract: EngineInterface,
    sink: ProgressSink,
    profiles: tuple[Profile, ...],
    plugin_launches: int = 1,
) -> BuiltEngine:
    """Parse and build with whatever plugins are registered."""
    log = BuildLog()
    logger = make_logger(trt, log)
    builder = trt.Builder(logger)
    network = builder.create_network()
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx_path)):
        reasons = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise EngineBuildError(
            f"{config.backend} cannot parse the {config.precision} model: "
            + "; ".join(reasons or log.errors)
        )
    check_network(network, contract)
    check_cache_in_place(network, contract, config.plugin)
    allow_decomposed_attention(trt, network)
    layers = Counter(network.get_layer(i).type.name for i in range(network.num_layers))
    check_plugins(onnx_path, config, layers["PLUGIN_V3"])

    builder_config = builder.create_builder_config()
    builder_config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    # One stream: the kernels stay the same (docs/plan.md), and none waits for another stream.
    builder_config.max_aux_streams = 0
    if config.plugin == "layer":  # whose outputs are the cache that they read
        builder_config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    _set_targets(trt, builder_config, config)
    for profile in profiles:
        _add_profile(builder, builder_config, profile, contract)
    with interrupt_flag() as interrupted:
        builder_config.progress_monitor = make_progress_monitor(trt, sink, interrupted)
        blob = builder.build_serialized_network(network, builder_config)
    if blob is None:
        raise EngineBuildError(
            f"{config.backend} could not build the engine: "
            + ("; ".join(log.errors[-3:]) or "no reason was given")
        )
    return BuiltEngine(
        blob=bytes(blob),
        report=EngineReport(
            layers=dict(sorted(layers.items())),
            attention=layers["ATTENTION_OUTPUT"],
            cache_updates=layers["KV_CACHE_UPDATE"],
            plugin_layers=layers["PLUGIN_V3"],
            kernels=(),
            plan=read_plan_of_build(trt, log, profiles, contract, plugin_launches),
            profiles=profiles,
            builder_version=str(trt.__version__),
        ),
    )


def read_plan_of_build(
    trt: Any,
    log: BuildLog,
    profiles: tuple[Profile, ...],
    contract: EngineInterface,
    plugin_launches: int = 1,
) -> PlanSummary | None:
    """The plan from the builder's log, which must have the form that is known for its version.

    Raises:
        EngineBuildError: the version is known, and the form is another.
    """
    try:
        plan = read_plan(log.messages, len(profiles))
    except PlanError as error:
        if trt.__name__ == "tensorrt_rtx" and trt.__version__ == READ_VERSION:
            raise EngineBuildError(f"the engine was built, but not its report: {error}") from error
        logger.warning("no plan in the report of %s %s: %s", trt.__name__, trt.__version__, error)
        return None
    slots = int(contract.past[0].shape[2])
    summary = summarize(
        plan,
        [profile.name for profile in profiles],
        layers=len({spec.name.split(".")[1] for spec in contract.past}),
        cache_bytes=contract.bytes_per_token() * slots,
        plugin_launches=plugin_launches,
    )
    if summary.unknown_kinds:
        kinds = ", ".join(summary.unknown_kinds)
        logger.warning("plan entries of unknown kinds are counted as kernels: %s", kinds)
    return summary


def _compute_capabilities(trt: Any, targets: tuple[str, ...]) -> list[Any]:
    known = [name for name in dir(trt.ComputeCapability) if re.fullmatch(r"SM\d+", name)]
    unknown = [target for target in targets if target.upper() not in known]
    if unknown:
        raise EngineBuildError(
            f"{trt.__name__} {trt.__version__} does not build for {', '.join(unknown)}; it builds "
            f"for {', '.join(name.lower() for name in known)}"
        )
    return [getattr(trt.ComputeCapability, target.upper()) for target in targets]


def _set_targets(trt: Any, builder_config: Any, config: EngineConfig) -> None:
    """Name the GPUs to build for, where the product can; else it is the GPU present."""
    if not hasattr(builder_config, "set_compute_capability"):
        return
    capabilities = _compute_capabilities(trt, config.targets)
    builder_config.num_compute_capabilities = len(capabilities)
    for index, capability in enumerate(capabilities):
        builder_config.set_compute_capability(capability, index)


def _add_profile(
    builder: Any, builder_config: Any, profile: Profile, contract: EngineInterface
) -> None:
    built = builder.create_optimization_profile()
    for spec in contract.inputs:
        built.set_shape(spec.name, *profile.shapes(spec))
    if builder_config.add_optimization_profile(built) < 0:
        raise EngineBuildError(f"the builder refused the {profile.name} profile")
