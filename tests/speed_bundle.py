"""A bundle with models for backend `cuda` that are small enough for the interpreter."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from model.checkpoint import inspect_checkpoint
from runtime.backends.base import Limits
from runtime.bundle import Bundle
from runtime.gpu_checks.section import CheckedBundle
from runtime.kernel_library import KernelLibrary
from runtime.kernel_step.formats import StepPrecision
from runtime.manifest import FileRole, Variant
from tests.fake_bundle import fake_manifest, write_fake_bundle
from tests.fake_kernels import PackedBundle
from tests.tiny_doge import write_checkpoint

LIMITS = Limits(max_batch_size=2, max_input_len=8, max_seq_len=32)
# The cache is counted as what it is.
DETAILS = {"cache_dtype": "float16", "score_dtype": "float32", "read_bytes_per_token": 100_000}


def speed_bundle(
    folder: Path,
    *,
    precisions: Sequence[StepPrecision] = ("fp16",),
    limits: Limits = LIMITS,
    checkpoint: bool = True,
    router_mode: str | None = None,
    **overrides: object,
) -> tuple[CheckedBundle, PackedBundle]:
    """The bundle, and the packed weights of its first precision.

    Args:
        folder: an empty one.
        precisions: of its variants.
        limits: of the models.
        checkpoint: whether there is one that PyTorch could run.
        router_mode: of a mixture of experts.
        overrides: fields of config.json.
    """
    numbers = {"num_hidden_layers": 1, "tie_word_embeddings": False, **overrides}
    source = write_checkpoint(folder / "source", **numbers)
    packed = [
        PackedBundle.make(folder / "packed", source, precision, limits, router_mode)
        for precision in precisions
    ]
    more: dict[str, tuple[FileRole, bytes]] = {
        f"checkpoint/{file.name}": ("checkpoint", file.read_bytes()) for file in source.iterdir()
    }
    for made in packed:
        more[made.variant.path] = ("weights", made.file(made.variant.path).read_bytes())
    variants = [
        dataclasses.replace(made.variant, details={**made.variant.details, **DETAILS})
        for made in packed
    ]
    if checkpoint:
        variants.append(Variant(backend="torch", name="fp32", path="checkpoint", precision="fp32"))
    config, _, _ = inspect_checkpoint(source, router_mode)
    manifest = dataclasses.replace(fake_manifest(config, limits), variants=tuple(variants))
    bundle = Bundle.open(write_fake_bundle(folder / "bundle", manifest, more))
    library = KernelLibrary(
        folder=folder / "bundle" / "kernels", triton_version="3.9.0", uses=(), entries=()
    )
    return CheckedBundle(name="tiny", bundle=bundle, library=library), packed[0]
