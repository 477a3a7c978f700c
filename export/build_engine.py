"""Checkpoint to bundle: python export/build_engine.py --model DIR|ORG/NAME. Needs no GPU."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from export.bundle_writer import BundleWriteError
from export.checks import ExportCheckError
from export.cpu_models import KV_CACHE_DTYPES, CpuRequest
from export.cuda_models import CudaRequest
from export.engine import PLUGINS, PRECISIONS, EngineBuildError, EngineConfig
from export.estimate import estimate
from export.kernel_compiler import KernelCompileError
from export.lowerings.cpu import CPU_PRECISIONS
from export.pipeline import BuildRequest, BuildResult, build_bundle
from export.progress import BuildProgress
from export.quality import QualityError
from export.sources import locate_checkpoint, read_checkpoint
from model.config import DogeConfig, UnsupportedModelError
from model.generations import Generation
from model.hub import CheckpointDownloadError, ModelLocation
from model.released import RELEASED_SHAPES, released_shape
from runtime.backends.base import BackendUnavailableError
from runtime.command import SUCCESS, CommandParser, UsageError, print_json, run_command
from runtime.kernel_step.formats import STEP_PRECISIONS
from runtime.kernel_step.variant import BACKEND as CUDA
from runtime.tensorrt_module import PRODUCTS

ERRORS = (
    BackendUnavailableError,
    BundleWriteError,
    CheckpointDownloadError,
    EngineBuildError,
    ExportCheckError,
    KernelCompileError,
    OSError,
    QualityError,
    UnsupportedModelError,
    ValueError,
)


def make_parser() -> CommandParser:
    """The command's flags; defaults that depend on the checkpoint are said in words."""
    parser = CommandParser("build_engine", "Build a bundle from a Doge checkpoint.")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--model",
        metavar="DIR|ORG/NAME[@REV]",
        help="checkpoint folder, or repository of the Hugging Face hub (the bundled doge-tiny)",
    )
    source.add_argument(
        "--random-weights", metavar="NAME", help=f"one of {', '.join(RELEASED_SHAPES)}"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="bundle folder (build/<name>)")
    parser.add_argument(
        "--backend",
        choices=[*PRODUCTS, CUDA, "none"],
        default="tensorrt_rtx",
        help="engine to build, or cuda for steps of our own kernels",
    )
    parser.add_argument("--target", default="sm89", help="GPU architectures, e.g. sm89,sm86")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="fp16",
        help="number format of the engine; int8, int4 and fp8 are of the weights of its products, "
        "over fp16",
    )
    parser.add_argument(
        "--plugin",
        choices=PLUGINS,
        default="none",
        help="what our kernels run in the engine: nothing (none), the custom ops (doge), the same "
        "from inside the engine (doge-aot, standard TensorRT only), whole decoder layers (layer)",
    )
    parser.add_argument(
        "--persistent",
        action="store_true",
        help="with --backend cuda, add a variant that decodes one sequence greedily by one launch "
        "for several tokens (small dense models; not measured yet)",
    )
    parser.add_argument(
        "--sampling-tail",
        action=argparse.BooleanOptionalAction,
        help="build a second engine that chooses tokens by itself, which takes the weights' memory "
        "twice (with --plugin none)",
    )
    parser.add_argument(
        "--cpu",
        choices=[*CPU_PRECISIONS, "none"],
        default="fp32",
        help="weights of the model for ONNX Runtime on the CPU",
    )
    parser.add_argument(
        "--kv-cache-dtype",
        choices=KV_CACHE_DTYPES,
        default="auto",
        help="number format of cached keys and values on the CPU (auto: float32)",
    )
    parser.add_argument(
        "--eval-text",
        type=Path,
        metavar="FILE",
        help="text on which what is narrow is measured (one that the float32 model samples)",
    )
    parser.add_argument("--max-batch-size", type=int, default=4, help="sequences side by side")
    parser.add_argument("--max-input-len", type=int, help="tokens of one pass (max-seq-len)")
    parser.add_argument(
        "--max-seq-len", type=int, help="prompt plus new tokens (the checkpoint's positions)"
    )
    parser.add_argument(
        "--router", choices=["mixed", "per_token"], help="expert routing (the checkpoint's)"
    )
    parser.add_argument(
        "--no-checkpoint", action="store_true", help="leave out what backend torch loads"
    )
    parser.add_argument("--dry-run", action="store_true", help="print sizes and steps, write none")
    parser.add_argument(
        "--force",
        action="store_true",
        help="keep nothing of an existing bundle; accept narrow weights beyond their quality bound",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Build, or estimate with `--dry-run`, and print the result."""
    location, config, generation, name = _read_shape(args)
    engine = _engine_config(args, config)
    output = args.output or Path("build") / name
    if args.dry_run:
        _print_estimate(args, config, generation, engine, output)
        return SUCCESS
    request = BuildRequest(
        location=location,
        random_shape=args.random_weights,
        output=output,
        engine=engine if args.backend in PRODUCTS else None,
        cpu=_cpu_request(args),
        cuda=_cuda_request(args),
        limits=engine.limits,
        router_mode=args.router,
        keep_checkpoint=not args.no_checkpoint,
        force=args.force,
        eval_text=args.eval_text,
    )
    result = build_bundle(request, BuildProgress(quiet=args.quiet))
    if args.json:
        print_json(result.as_dict())
    else:
        _print_result(result)
    return SUCCESS


def _read_shape(
    args: argparse.Namespace,
) -> tuple[ModelLocation | None, DogeConfig, Generation, str]:
    """Where the checkpoint is, architecture, generation and the bundle's short name."""
    if args.random_weights is not None:
        shape = released_shape(args.random_weights)
        config = shape.config
        if args.router is not None:
            config = config.with_router_mode(args.router)
        return None, config, shape.generation, args.random_weights
    checkpoint = read_checkpoint(locate_checkpoint(args.model, quiet=args.quiet), args.router)
    return checkpoint.location, checkpoint.config, checkpoint.generation, checkpoint.name


def _engine_config(args: argparse.Namespace, config: DogeConfig) -> EngineConfig:
    """The engine's settings, which are also the bundle's limits."""
    max_seq_len = config.max_position_embeddings if args.max_seq_len is None else args.max_seq_len
    if max_seq_len > config.max_position_embeddings:
        raise UsageError(
            f"--max-seq-len {max_seq_len} exceeds the {config.max_position_embeddings} tokens up "
            "to which the checkpoint is defined (docs/reference.md, Length)"
        )
    return EngineConfig(
        backend=args.backend if args.backend in PRODUCTS else "tensorrt_rtx",
        targets=tuple(args.target.split(",")),
        precision=args.precision,
        plugin=args.plugin,
        sampling_tail=_sampling_tail(args),
        max_batch_size=args.max_batch_size,
        max_input_len=max_seq_len if args.max_input_len is None else args.max_input_len,
        max_seq_len=max_seq_len,
    )


def _sampling_tail(args: argparse.Namespace) -> bool:
    """Whether the engine gets a decode graph: unless told otherwise, where it can have one."""
    if args.backend not in PRODUCTS:
        if args.sampling_tail:
            raise UsageError(
                f"--sampling-tail is for engines, --backend {args.backend} builds none"
            )
        return False
    return args.plugin == "none" if args.sampling_tail is None else bool(args.sampling_tail)


def _cuda_request(args: argparse.Namespace) -> CudaRequest | None:
    if args.backend != CUDA:
        if args.persistent:
            raise UsageError(f"--persistent is for --backend {CUDA}, not {args.backend}")
        return None
    if args.precision not in STEP_PRECISIONS:
        raise UsageError(
            f"--precision {args.precision} is for engines; --backend {CUDA} takes "
            f"{', '.join(STEP_PRECISIONS)}"
        )
    if args.plugin != "none":
        raise UsageError(
            f"--plugin {args.plugin} is for engines; --backend {CUDA} is nothing but our kernels"
        )
    return CudaRequest(
        precision=args.precision,
        targets=tuple(args.target.split(",")),
        persistent=args.persistent,
    )


def _cpu_request(args: argparse.Namespace) -> CpuRequest | None:
    if args.cpu != "none":
        return CpuRequest(
            precision=args.cpu, kv_cache_dtype=args.kv_cache_dtype, eval_text=args.eval_text
        )
    if args.kv_cache_dtype != "auto":
        raise UsageError(
            f"--kv-cache-dtype {args.kv_cache_dtype} is for models on the CPU and --cpu none "
            "builds none; an engine caches in its own precision"
        )
    return None


def _print_estimate(
    args: argparse.Namespace,
    config: DogeConfig,
    generation: Generation,
    engine: EngineConfig,
    output: Path,
) -> None:
    found = estimate(config, generation, engine)
    steps = ["read checkpoint", "export ONNX", "check ONNX"]
    request = _cpu_request(args)
    if request is not None:
        steps.append(f"lower to {request.name} for the CPU")
    cuda = _cuda_request(args)
    if cuda is not None:
        steps.append(f"pack weights as {cuda.precision}")
        steps.append(f"compile kernels for {', '.join(cuda.targets)}")
    if args.backend in PRODUCTS:
        steps.append(f"lower to {engine.precision}")
        if engine.plugin != "none":
            steps.append(f"compile kernels for {', '.join(engine.targets)}")
        steps.append(f"build engine for {', '.join(engine.targets)}")
        if engine.sampling_tail:
            steps.append("build decode graph")
    steps.append("write bundle")
    if args.json:
        print_json({"bundle": str(output), "steps": steps, **found.as_dict()})
        return
    mib = 2**20
    print(f"bundle                {output} (not written)")
    print(f"generation            {generation.name}, {found.parameters:,} parameters")
    print(f"steps                 {' -> '.join(steps)}")
    print(f"model.onnx.data       {found.onnx_bytes / mib:.1f} MiB")
    print(f"engine weights        {found.engine_bytes / mib:.1f} MiB ({engine.precision})")
    print(f"KV cache              {found.kv_bytes_per_token:,} bytes per token and sequence")
    print(
        f"KV cache, full        {found.kv_bytes / mib:.1f} MiB for {engine.max_batch_size} "
        f"sequences of {engine.max_seq_len}"
    )
    print(
        f"floor on an RTX 4090  {found.floor_us:.0f} us per token at batch 1 and full context "
        "(1008 GB/s by its data sheet)"
    )


def _print_result(result: BuildResult) -> None:
    print(f"bundle {result.output}")
    for file in result.bundle.manifest.files:
        print(f"  {file.bytes:>13,}  {file.path}")
    if result.engine is not None:
        engine = result.engine
        print(
            f"engine {engine['backend']} {engine['precision']} for {', '.join(engine['targets'])}: "
            f"{engine['attention']} attention layers ({engine['fused_attention']} fused kernels in "
            f"the plans of both profiles), {engine['cache_updates']} cache updates, "
            f"{engine['plugin_layers']} plugin layers"
        )
        graph = engine["decode_graph"]
        if graph is not None:
            print(
                f"decode graph chooses tokens: {graph['attention']} attention layers, "
                f"{graph['cache_updates']} cache updates, no logits"
            )
    if result.quality is not None:
        quality = result.quality
        print(
            f"quality {quality['variant']}: perplexity {quality['increase']:+.2%} "
            f"(at most {quality['bound']:+.0%}) on {quality['tokens']} tokens of "
            f"{quality['text']} text"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run_command(make_parser(), run, argv, ERRORS)


if __name__ == "__main__":
    sys.exit(main())
