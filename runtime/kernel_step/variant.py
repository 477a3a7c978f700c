"""What a bundle's manifest remembers of a model that our kernels run."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from runtime.kernel_step.formats import STEP_PRECISIONS, StepFormats, StepPrecision
from runtime.kernel_step.layer_spec import LayerSpec
from runtime.kernel_step.layer_work import LayerWork, work_of
from runtime.kernel_step.step_kernels import StepKernels
from runtime.kernel_step.step_model import InnerValues, StepModel

if TYPE_CHECKING:
    from runtime.bundle import Bundle
    from runtime.manifest import Variant

BACKEND = "cuda"
# What an engine's `--plugin` is called whose decoder layers are our kernels.
LAYER_PLUGIN = "layer"
# What a variant with a persistent kernel is called behind its precision, and remembers.
PERSISTENT = "persistent"


def variant_details(model: StepModel) -> dict[str, Any]:
    """What `read_variant` needs beside the bundle's config, JSON-ready."""
    inner = model.inner_values
    return {} if inner is None else {"inner_values": asdict(inner)}


def weights_path(precision: StepPrecision) -> str:
    """Where the packed weights of a precision stand in a bundle."""
    return f"{BACKEND}/{precision}.safetensors"


def read_variant(bundle: Bundle, variant: Variant) -> tuple[StepModel, StepPrecision]:
    """The numbers and the precision of a variant.

    Raises:
        ValueError: the variant is not what a build writes.
    """
    label = f"variant {variant.backend}:{variant.name}"
    if variant.precision not in STEP_PRECISIONS:
        raise ValueError(
            f"{label} has precision {variant.precision!r}, expected one of "
            f"{', '.join(STEP_PRECISIONS)}; build it again"
        )
    inner = variant.details.get("inner_values")
    values = None
    if inner is not None:
        names = {part.name for part in fields(InnerValues)}
        if not isinstance(inner, dict) or inner.keys() != names:
            raise ValueError(f"{label} has inner values {inner!r}, expected {sorted(names)}")
        if any(type(number) is not int or number < 1 for number in inner.values()):
            raise ValueError(f"{label} has inner values {inner}, expected whole numbers above 0")
        values = InnerValues(**inner)
    model = StepModel.make(bundle.config, bundle.generation, bundle.limits.max_seq_len, values)
    return model, variant.precision


def layers_of_variant(bundle: Bundle, variant: Variant) -> LayerWork:
    """The kernels of the layers of an engine that has a plugin for each.

    Raises:
        ValueError: the variant is not what a build writes.
    """
    model, precision = read_variant(bundle, variant)
    return work_of(LayerSpec.of(model, precision, bundle.limits))


def kernels_of_variant(bundle: Bundle, variant: Variant) -> StepKernels:
    """The kernels of a variant's steps.

    Raises:
        ValueError: the variant is not what a build writes.
    """
    model, precision = read_variant(bundle, variant)
    persistent = variant.details.get(PERSISTENT, False)
    if not isinstance(persistent, bool):
        raise ValueError(
            f"variant {variant.backend}:{variant.name} has {PERSISTENT} {persistent!r}, expected "
            "true or false"
        )
    formats = StepFormats.of(precision)
    return StepKernels(model, formats, bundle.limits, persistent=persistent)
