"""What an engine that was built with plugins needs in the process before it is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from plugins.launcher import LaunchError
from plugins.plugin_host import PluginError
from plugins.tensorrt_plugin import CreatorMaker, register_plugins, take_problems
from runtime.backends.base import BackendUnavailableError
from runtime.kernel_step.layer_plugin import make_layer_creator
from runtime.kernel_step.variant import LAYER_PLUGIN, layers_of_variant

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
        BackendUnavailableError: the bundle has no kernels for this GPU, the driver is too old or
            refuses one, or TensorRT does not take the plugins.
        ValueError: a kernel that the engine needs is missing, altered, or of another version of the
            project.
    """
    plugin = variant.details.get("plugin", "none")
    if plugin not in ("doge", LAYER_PLUGIN):
        return
    library = bundle.kernel_library()
    needed = frozenset(variant.details.get("kernels", []))
    if missing := needed - library.names:
        raise ValueError(
            f"engine {variant.name} needs kernels that bundle {bundle.path} lacks: "
            f"{', '.join(sorted(missing))}; build it again with: python export/build_engine.py "
            f"--plugin {plugin}"
        )
    more: list[CreatorMaker] = []
    if plugin == LAYER_PLUGIN:
        specs = layers_of_variant(bundle, variant).specs
        if {spec.name for spec in specs} != needed:
            raise ValueError(
                f"engine {variant.name} launches other kernels than this version of the project; "
                "build it again with: python export/build_engine.py --plugin layer"
            )
        more.append(make_layer_creator)
    else:
        specs = tuple(spec for use in library.uses for spec in use.make_kernels().specs)
    library.require(spec for spec in specs if spec.name in needed)
    try:
        host = register_plugins(trt, *more)
        if not any(needed <= names for names, _ in host.launchers):
            host.launchers.append((needed, library.open_launcher(needed)))
    except (LaunchError, PluginError) as error:
        raise BackendUnavailableError(
            f"the plugins of {variant.name} cannot run here: {error}"
        ) from error


def plugin_problems(trt: Any) -> Sequence[str]:
    """What plugins of a product have raised in TensorRT's calls since it was last asked.

    TensorRT turns an exception of a plugin into a failure without a reason.
    """
    return take_problems(trt)
