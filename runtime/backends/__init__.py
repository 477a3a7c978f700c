"""The backends that run a bundle's step, in the order in which one is chosen by itself."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from runtime.backends.base import Backend, BackendUnavailableError
from runtime.cpu_threads import THE_BACKENDS_CHOICE, CpuThreads

if TYPE_CHECKING:
    from runtime.bundle import Bundle

logger = logging.getLogger(__name__)

# Where each backend's class stands. Modules are imported when a backend is opened: none of their
# packages is needed to read a bundle, and torch must stay unimported unless it is asked for.
BACKENDS: dict[str, str] = {
    "tensorrt_rtx": "runtime.backends.tensorrt_backend:TensorRTRTXBackend",
    "tensorrt": "runtime.backends.tensorrt_backend:TensorRTBackend",
    "cuda": "runtime.backends.cuda_backend:CudaBackend",
    "onnxruntime": "runtime.backends.onnxruntime_backend:OnnxRuntimeBackend",
    "torch": "runtime.backends.torch_backend:TorchBackend",
}


def open_backend(
    name: str | None,
    bundle: Bundle,
    *,
    variant: str | None = None,
    threads: CpuThreads = THE_BACKENDS_CHOICE,
) -> Backend:
    """Open a backend on a bundle.

    Args:
        name: key of `BACKENDS`; None takes the first whose files are in the bundle and that can
            run here, and says which and why in one line of the log.
        bundle: what to run.
        variant: which of the bundle's models for that backend; None takes its first.
        threads: CPU threads of one step.

    Raises:
        ValueError: an unknown backend or variant.
        BackendUnavailableError: the backend cannot run here; says what to install or change.
    """
    if name is not None:
        return _backend_class(name).open(bundle, bundle.variant(name, variant), threads)
    reasons = []
    missing: ValueError | None = None
    for candidate in BACKENDS:
        if not bundle.variants(candidate):
            continue
        try:
            chosen = bundle.variant(candidate, variant)
        except ValueError as error:
            missing = error
            continue
        try:
            backend = _backend_class(candidate).open(bundle, chosen, threads)
        except BackendUnavailableError as error:
            reasons.append(f"{candidate}: {error}")
            continue
        because = f" ({'; '.join(reasons)})" if reasons else ""
        logger.info("backend %s, variant %s%s", candidate, backend.variant, because)
        return backend
    if missing is not None and not reasons:
        raise missing
    raise BackendUnavailableError(
        "no backend can run this bundle here: " + ("; ".join(reasons) or "it holds no model")
    )


def open_tapped_backend(
    name: str,
    bundle: Bundle,
    names: Sequence[str],
    *,
    variant: str | None = None,
    threads: CpuThreads = THE_BACKENDS_CHOICE,
) -> Backend:
    """Open a backend that lets one look at named values; arguments and errors as `open_backend`."""
    backend_class = _backend_class(name)
    return backend_class.open_tapped(bundle, bundle.variant(name, variant), threads, names)


def _backend_class(name: str) -> type[Backend]:
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; there are {', '.join(BACKENDS)}")
    module, _, attribute = BACKENDS[name].partition(":")
    found: type[Backend] = getattr(importlib.import_module(module), attribute)
    return found
