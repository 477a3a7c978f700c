"""Which bundles are checked, and whether their kernels are those of this version of the project."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from runtime.bundle import Bundle
from runtime.gpu_checks.section import CheckedBundle
from runtime.gpu_checks.workloads import WORKLOADS
from runtime.kernel_library import KERNEL_MANIFEST
from runtime.kernel_step.variant import BACKEND, kernels_of_variant
from runtime.manifest import MANIFEST_NAME


def open_bundles(paths: Sequence[Path], folder: Path) -> tuple[CheckedBundle, ...]:
    """Open bundles and their kernels; whatever is wrong with one is told before anything runs.

    Args:
        paths: folders of bundles; none means all below `folder` that have kernels.
        folder: where builds go.

    Raises:
        FileNotFoundError: no bundle.
        BackendUnavailableError: one without kernels.
        ValueError: a broken bundle, altered kernels, or kernels of another version of the project.
    """
    chosen = list(paths) or _bundles_below(folder)
    bundles: dict[str, CheckedBundle] = {}
    for path in chosen:
        name = _name(path)
        if name in bundles:
            raise ValueError(f"two bundles are called {name}; give each once")
        bundle = Bundle.open(path)
        library = bundle.kernel_library()
        for use in library.uses:
            library.require(use.make_kernels().specs)
            if use.op not in WORKLOADS:
                raise ValueError(f"bundle {path} uses {use.op}, on which nothing is checked yet")
        for variant in bundle.variants(BACKEND):
            library.require(kernels_of_variant(bundle, variant).specs)
        bundles[name] = CheckedBundle(name=name, bundle=bundle, library=library)
    return tuple(bundles.values())


def _bundles_below(folder: Path) -> list[Path]:
    """Every bundle with kernels."""
    manifests = sorted(folder.rglob(MANIFEST_NAME))
    found = [path.parent for path in manifests if (path.parent / KERNEL_MANIFEST).is_file()]
    if not found:
        raise FileNotFoundError(
            f"there is no bundle with kernels below {folder}/; build one with: python "
            "export/build_engine.py --backend none, then python export/build_kernels.py "
            f"{folder}/doge-tiny"
        )
    return found


def _name(path: Path) -> str:
    """What reports call a bundle; nothing of this machine's folders gets into the evidence."""
    inside = not path.is_absolute() and ".." not in path.parts and len(path.parts) > 0
    return path.as_posix() if inside else path.resolve().name
