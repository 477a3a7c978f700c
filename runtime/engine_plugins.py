"""What an engine that was built with plugins needs in the process before it is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from plugins.tensorrt_plugin import register_plugins

if TYPE_CHECKING:
    from runtime.bundle import Bundle
    from runtime.manifest import Variant


def prepare_plugins(trt: Any, bundle: Bundle, variant: Variant) -> None:
    """Load the bundle's kernels and register the plugins, if the engine needs any.

    Args:
        trt: the TensorRT module that will load the engine.
        bundle: where the kernels are.
        variant: the engine.

    Raises:
        BackendUnavailableError: the bundle has no kernels for this GPU, or the driver is too old.
        LaunchError: no driver or GPU, or the driver refuses a kernel.
        ValueError: a kernel that the engine needs is missing, altered, or of another version of the
            project.
    """
    if variant.details.get("plugin", "none") != "doge":
        return
    library = bundle.kernel_library()
    needed = set(variant.details.get("kernels", []))
    if missing := needed - library.names:
        raise ValueError(
            f"engine {variant.name} needs kernels that bundle {bundle.path} lacks: "
            f"{', '.join(sorted(missing))}; build it again with: python export/build_engine.py "
            f"--plugin {variant.details['plugin']}"
        )
    library.require(spec for use in library.uses for spec in use.make_kernels().specs)
    host = register_plugins(trt)
    if not any(needed <= names for names, _ in host.launchers):
        host.launchers.append((library.names, library.open_launcher()))
