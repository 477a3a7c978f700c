"""What an engine is built for, and building it; needs no GPU with TensorRT-RTX."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import onnx_ir as ir

from export.aot_build import register_aot
from export.builder_callbacks import (
    BuildLog,
    ProgressSink,
    interrupt_flag,
    make_logger,
    make_progress_monitor,
)
from export.profiles import Profile, step_profiles
from model.contract import StepContract
from plugins.custom_op import DOMAIN
from plugins.tensorrt_plugin import deregister_plugins, register_plugins
from runtime.backends.base import Limits
from runtime.tensorrt_module import PRODUCTS, Product, load_plugin_module, load_tensorrt

Precision = Literal["fp16", "bf16", "fp32"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
PluginChoice = Literal["none", "doge", "doge-aot"]
PLUGINS: tuple[PluginChoice, ...] = get_args(PluginChoice)
DTYPES: dict[Precision, str] = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


class EngineBuildError(Exception):
    """The engine could not be built; the message says at which stage, and the builder's reason."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What an engine is built for. Each field has a command-line flag of the same name."""

    backend: Product = "tensorrt_rtx"
    targets: tuple[str, ...] = ("sm89",)
    precision: Precision = "fp16"
    plugin: PluginChoice = "none"
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
        return f"{self.backend}-{'-'.join(self.targets)}-{self.precision}{self._suffix}.engine"

    @property
    def variant_name(self) -> str:
        """Name of the engine among its backend's variants."""
        return f"{self.precision}-{'-'.join(self.targets)}{self._suffix}"

    @property
    def _suffix(self) -> str:
        return "" if self.plugin == "none" else f"-{self.plugin}"


@dataclass(frozen=True, kw_only=True)
class EngineReport:
    """What went into an engine, counted in the parsed network.

    Attributes:
        layers: number of network layers by type.
        attention: layers of the built-in attention, one per decoder layer unless a plugin took it.
        cache_updates: in-place cache writes.
        plugin_layers: layers run by plugins.
        kernels: names of the kernels that the plugins may launch.
        fused_attention: entries of the compiled plan that are one fused attention kernel, by
            profile; None where the builder's log does not show the plan.
        profiles: the optimization profiles.
        builder_version: version of the product that built it.
    """

    layers: dict[str, int]
    attention: int
    cache_updates: int
    plugin_layers: int
    kernels: tuple[str, ...]
    fused_attention: int | None
    profiles: tuple[Profile, ...]
    builder_version: str


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
    contract: StepContract,
    sink: ProgressSink,
    *,
    kernels: frozenset[str] = frozenset(),
) -> BuiltEngine:
    """Parse a lowered model and build its engine.

    Args:
        onnx_path: model whose types are already those of `config.precision`.
        config: targets and limits.
        contract: inputs and outputs in the engine's types; the network must match it.
        sink: where progress is shown.
        kernels: names of the kernels that will be there where the engine runs, for plugins.

    Raises:
        BackendUnavailableError: the product is not installed or cannot be loaded.
        EngineBuildError: parsing or building failed, or the network is not what it should be.
        KeyboardInterrupt: Ctrl-C during the build.
    """
    trt = load_tensorrt(config.backend)
    if config.plugin == "none":
        deregister_plugins(trt)
        return _build(trt, onnx_path, config, contract, sink)
    if config.plugin == "doge-aot":
        deregister_plugins(trt)
        return _build_with_kernels_inside(trt, onnx_path, config, contract, sink)
    host = register_plugins(trt)
    host.known, host.used = kernels, set()
    try:
        built = _build(trt, onnx_path, config, contract, sink)
    finally:
        host.known = None
    return replace(built, report=replace(built.report, kernels=tuple(sorted(host.used))))


def _build_with_kernels_inside(
    trt: Any, onnx_path: Path, config: EngineConfig, contract: StepContract, sink: ProgressSink
) -> BuiltEngine:
    """Build with ahead-of-time plugins, which swallow the reason when one of them fails."""
    host = register_aot(trt, onnx_path, config.targets).host
    try:
        built = _build(trt, onnx_path, config, contract, sink)
    except EngineBuildError as error:
        if host.problems:
            raise EngineBuildError(f"{error}; {'; '.join(host.problems)}") from error
        raise
    return replace(built, report=replace(built.report, kernels=tuple(sorted(host.used))))


def _build(
    trt: Any, onnx_path: Path, config: EngineConfig, contract: StepContract, sink: ProgressSink
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
    _check_network(network, contract)
    _allow_decomposed_attention(trt, network)
    layers = Counter(network.get_layer(i).type.name for i in range(network.num_layers))
    _check_plugins(onnx_path, config, layers["PLUGIN_V3"])

    profiles = step_profiles(config.limits)
    builder_config = builder.create_builder_config()
    builder_config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
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
            fused_attention=count_fused_attention(log.verbose),
            profiles=profiles,
            builder_version=str(trt.__version__),
        ),
    )


def _check_network(network: Any, contract: StepContract) -> None:
    """The parsed network's inputs and outputs must be the contract's, name by name."""
    found_inputs = [network.get_input(i).name for i in range(network.num_inputs)]
    found_outputs = [network.get_output(i).name for i in range(network.num_outputs)]
    expected_inputs = [spec.name for spec in contract.inputs]
    expected_outputs = [spec.name for spec in contract.outputs]
    if found_inputs != expected_inputs or found_outputs != expected_outputs:
        raise EngineBuildError(
            f"the parsed network has inputs {found_inputs} and outputs {found_outputs}, the "
            f"contract {expected_inputs} and {expected_outputs}"
        )


def _check_plugins(onnx_path: Path, config: EngineConfig, found: int) -> None:
    """Every custom op must have become a plugin layer, or none must have.

    When the parser finds no plugin for a node it expands the function without a word, and the
    engine is merely slow.
    """
    nodes = Counter(node.op_type for node in ir.load(onnx_path).graph if node.domain == DOMAIN)
    expected = 0 if config.plugin == "none" else nodes.total()
    if found != expected:
        counts = ", ".join(f"{count} {name}" for name, count in sorted(nodes.items()))
        raise EngineBuildError(
            f"the model has {counts or 'no custom ops'}, and --plugin {config.plugin} asks for "
            f"{expected} plugin layers; the parsed network has {found}. The parser expands the "
            "function of a node whose plugin it does not find: its name, version or namespace "
            "differs from the node's"
        )


def _allow_decomposed_attention(trt: Any, network: Any) -> None:
    """Let the builder take several kernels for an attention that no fused one fits.

    Without this, a head count, a fixed length of 1 or float32 can fail the whole build. Layers
    arrive as plain ILayer; the class gives access to the attention behind one.
    """
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_OUTPUT:
            layer.__class__ = trt.IAttentionOutputLayer
            layer.attention.decomposable = True


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
    builder: Any, builder_config: Any, profile: Profile, contract: StepContract
) -> None:
    built = builder.create_optimization_profile()
    for spec in contract.inputs:
        built.set_shape(spec.name, *profile.shapes(spec))
    if builder_config.add_optimization_profile(built) < 0:
        raise EngineBuildError(f"the builder refused the {profile.name} profile")


def count_fused_attention(verbose: list[str]) -> int | None:
    """Fused attention kernels in the compiled plan, over all profiles.

    The plan stands only in the builder's verbose log, in a text that is not documented (seen in
    TensorRT-RTX 1.7.1): one line per entry in a section `Layers:`, fused attention named
    `…_gemm_mha_v2…` or `…_gemv_mha_v1…`.

    Returns:
        The count, or None when the log holds no such section.
    """
    text = "\n".join(verbose)
    if "Layers:" not in text:
        return None
    plan = text[text.index("Layers:") :]
    return sum(1 for line in plan.splitlines() if re.search(r"_gem[mv]_mha_v\d", line))
