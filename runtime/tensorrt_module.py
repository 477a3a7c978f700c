"""The one place that imports `tensorrt` or `tensorrt_rtx`: one API, two products.

What differs between them is probed with `hasattr` where it is used, never by product name.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from pathlib import Path
from typing import Any, Literal, get_args

from runtime.backends.base import BackendUnavailableError

Product = Literal["tensorrt_rtx", "tensorrt"]
PRODUCTS: tuple[Product, ...] = get_args(Product)
_EXTRA = {"tensorrt_rtx": "rtx", "tensorrt": "tensorrt"}


def load_tensorrt(product: Product) -> Any:
    """Import a TensorRT product.

    Returns:
        The module `tensorrt_rtx` or `tensorrt`.

    Raises:
        BackendUnavailableError: it is not installed, cannot be loaded, or its installation lacks a
            link that cannot be made.
    """
    if importlib.util.find_spec(product) is None:
        raise BackendUnavailableError(
            f"{product} is not installed; run: pip install 'doge-tensorrt[{_EXTRA[product]}]'"
        )
    if product == "tensorrt_rtx":
        _link_library_name()
    try:
        return importlib.import_module(product)
    except (ImportError, OSError) as error:
        raise BackendUnavailableError(
            f"{product} is installed but cannot be loaded: {error}"
        ) from error


def load_plugin_module(trt: Any) -> Any:
    """Import a product's module of plugins that an engine can hold, `tensorrt.plugin`.

    Raises:
        BackendUnavailableError: the product has none.
    """
    name = trt.__name__
    if not hasattr(trt, "QuickPluginCreationRequest"):
        raise BackendUnavailableError(
            f"{name} {trt.__version__} has no plugins whose kernels an engine holds: these are the "
            "ahead-of-time plugins of tensorrt.plugin, in standard TensorRT. Build with --backend "
            "tensorrt, or with --plugin doge"
        )
    try:
        return importlib.import_module(f"{name}.plugin")
    except (ImportError, OSError) as error:
        raise BackendUnavailableError(f"{name}.plugin cannot be loaded: {error}") from error


def _link_library_name() -> None:
    """Make the unversioned name by which the ONNX parser opens its own library.

    The wheel of TensorRT-RTX 1.7.1 ships `libtensorrt_rtx.so.1`; its parser opens
    `libtensorrt_rtx.so` and the process dies in std::terminate when there is none. Drop this once a
    wheel ships both names.
    """
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    for folder in map(Path, folders):
        for library in folder.glob("libtensorrt_rtx.so.*"):
            link = folder / "libtensorrt_rtx.so"
            if link.exists():
                return
            try:
                _symlink_atomically(library.name, link)
            except OSError as error:
                raise BackendUnavailableError(
                    f"TensorRT-RTX's parser needs {link} (a link to {library.name}), and it cannot "
                    f"be made: {error.strerror}. Where the installation is read-only, have its "
                    f"owner run: ln -s {library.name} {link}"
                ) from error
            return


def _symlink_atomically(target: str, link: Path) -> None:
    """Two processes may do this at once, and a dangling link may be in the way."""
    temporary = link.with_name(f"{link.name}.{os.getpid()}")
    temporary.symlink_to(target)
    temporary.replace(link)
