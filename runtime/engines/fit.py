"""Whether an engine can run on this machine, and what to do where it cannot.

Each way in which an engine can fail to load has its sentence here. What the header and the manifest
tell is checked before the library sees the engine; the library's own verdict comes behind.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from runtime.backends.base import BackendUnavailableError
from runtime.engines.header import (
    MAGIC,
    EngineHeader,
    EngineHeaderError,
    read_engine_header,
)
from runtime.gpu.cuda_runtime import GpuFacts
from runtime.tensorrt_module import Product

if TYPE_CHECKING:
    from runtime.bundle import Bundle
    from runtime.manifest import Variant

logger = logging.getLogger(__name__)

_COPY_AGAIN = "copy the bundle again, or build the engine again"
_MORE_DRIVER = "install a newer NVIDIA driver (nvidia-smi shows which is there)"
# What each bit of trt.EngineInvalidityDiagnostics means for whoever has the engine.
_DIAGNOSTICS = {
    "VERSION_MISMATCH": "it was built by another version of the library",
    "UNSUPPORTED_CC": "it was not built for this GPU",
    "OLD_CUDA_DRIVER": f"the driver is too old; {_MORE_DRIVER}",
    "OLD_CUDA_RUNTIME": (
        "the CUDA runtime is too old; run: pip install --upgrade 'doge-tensorrt[rtx]'"
    ),
    "INSUFFICIENT_GPU_MEMORY": "the GPU has too little memory; end other programs on it",
    "MALFORMED_ENGINE": f"it is damaged; {_COPY_AGAIN}",
    "CUDA_ERROR": "CUDA does not work here; nvidia-smi says whether the driver does",
}


class EngineFit:
    """Checks of one engine of a bundle."""

    def __init__(self, trt: Any, product: Product, bundle: Bundle, variant: Variant) -> None:
        """Check nothing yet.

        Args:
            trt: the TensorRT module.
            product: which it is.
            bundle: where the engine is from.
            variant: the engine.
        """
        self._trt = trt
        self._product = product
        self._bundle = bundle
        self._variant = variant
        self._label = f"engine {variant.path}"
        # TensorRT-RTX alone has it; the layout is its (runtime/engines/header.py).
        self._has_header = hasattr(trt.Runtime, "engine_header_size")

    def check_blob(self, blob: bytes, gpu: GpuFacts) -> EngineHeader | None:
        """Compare the header with the file, the manifest, the library and the GPU.

        Args:
            blob: the whole engine.
            gpu: where it shall run.

        Returns:
            The header; None for standard TensorRT, whose header is not known.

        Raises:
            ValueError: the file is not what the bundle says.
            BackendUnavailableError: another version or another GPU.
        """
        details = self._variant.details
        if not self._has_header:
            if blob.startswith(MAGIC):
                raise BackendUnavailableError(
                    f"{self._label} is one of TensorRT-RTX, and the bundle says {self._product}; "
                    f"an engine runs in the product that built it. {self._again()}"
                )
            self._check_version(str(details.get("builder_version")))
            self._check_target([*details.get("targets", [])], gpu)
            return None
        try:
            header = read_engine_header(blob)
        except EngineHeaderError as error:
            raise BackendUnavailableError(
                f"{self._label} is no engine of TensorRT-RTX: {error}. It is damaged or of another "
                f"product. {self._again()}"
            ) from error
        if header.file_bytes != len(blob):
            raise BackendUnavailableError(
                f"{self._label} has {len(blob)} bytes, its header says {header.file_bytes}: it is "
                f"truncated or has something behind it; {_COPY_AGAIN}. {self._again()}"
            )
        self._check_manifest(header)
        self._check_version(header.version)
        self._check_target([*header.targets], gpu)
        return header

    def check_validity(self, state: Any, bits: int, said: str) -> None:
        """Judge what the library says of the engine's first bytes.

        Args:
            state: a `trt.EngineValidity`.
            bits: of `trt.EngineInvalidityDiagnostics`.
            said: what it told its logger meanwhile.

        Raises:
            BackendUnavailableError: it calls the engine invalid.
        """
        reasons = "; ".join(filter(None, [*self._words(bits), said])) or "it gives no reason"
        if state.name == "INVALID":
            raise BackendUnavailableError(
                f"{self._name()} calls {self._label} invalid here: {reasons}. {self._again()}"
            )
        if state.name != "VALID":
            verdict = state.name.lower()
            logger.info("%s calls %s %s here: %s", self._name(), self._label, verdict, reasons)

    def not_loaded(self, reasons: str) -> BackendUnavailableError:
        """The error for an engine that passed every check and still does not load."""
        details = self._variant.details
        plugins = (
            "; it has plugins, whose kernels this bundle must hold (python "
            f"export/build_kernels.py {self._bundle.path})"
            if details.get("plugin", "none") != "none"
            else ""
        )
        return BackendUnavailableError(
            f"{self._name()} cannot load {self._label}, built with "
            f"{details.get('builder_version', 'an unknown version')} for "
            f"{', '.join(details.get('targets', []))}: {reasons}{plugins}. {self._again()}"
        )

    def _check_manifest(self, header: EngineHeader) -> None:
        """The hash says that file and manifest belong together; this, that both are right."""
        details: Mapping[str, Any] = self._variant.details
        listed = {"targets": details.get("targets"), "version": details.get("builder_version")}
        found = {"targets": [*header.targets], "version": header.version}
        wrong = [
            f"{name} {found[name]}, the manifest {listed[name]}"
            for name, same in {
                "targets": set(listed["targets"] or ()) == set(header.targets),
                "version": listed["version"] == header.version,
            }.items()
            if not same
        ]
        if wrong or header.unknown_targets:
            unknown = f"; target bits {header.unknown_targets:#x} are unknown"
            raise ValueError(
                f"{self._label} says {'; '.join(wrong) or 'more than is known'}"
                f"{unknown if header.unknown_targets else ''}; {_COPY_AGAIN}. {self._again()}"
            )

    def _check_version(self, built: str) -> None:
        if built != str(self._trt.__version__):
            package = "tensorrt-rtx-cu13" if self._has_header else "tensorrt"
            raise BackendUnavailableError(
                f"{self._label} was built by {self._product} {built}, here is "
                f"{self._trt.__version__}, and an engine runs in the version that built it. "
                f"Install that one: pip install {package}=={built}; or: {self._again()}"
            )

    def _check_target(self, targets: list[str], gpu: GpuFacts) -> None:
        if gpu.target in targets:
            return
        built_for = f"{self._label} was built for {', '.join(targets)}, here is {gpu}"
        known = getattr(self._trt, "ComputeCapability", None)
        if known is not None and not hasattr(known, gpu.target.upper()):
            raise BackendUnavailableError(
                f"{built_for}, for which {self._name()} builds none. Standard TensorRT may, where "
                "the GPU is (export/build_engine.py --backend tensorrt); here --backend "
                "onnxruntime runs"
            )
        raise BackendUnavailableError(f"{built_for}. {self._again(gpu.target)}")

    def _words(self, bits: int) -> list[str]:
        kinds = getattr(self._trt, "EngineInvalidityDiagnostics", None)
        members = {} if kinds is None else dict(kinds.__members__)
        words = []
        for name, member in members.items():
            if bits & int(member):
                bits &= ~int(member)
                words.append(_DIAGNOSTICS.get(name, name))
        return [*words, f"unknown reason {bits:#x}"] if bits else words

    def _again(self, target: str | None = None) -> str:
        """The command that builds such an engine, for `target` instead where one is given."""
        precision, plugin = self._variant.precision, self._variant.details.get("plugin", "none")
        targets = [target] if target else [*self._variant.details.get("targets", [])]
        name = "-".join([precision, *targets, *([] if plugin == "none" else [str(plugin)])])
        return self._bundle.how_to_add(self._variant.backend, name)

    def _name(self) -> str:
        return f"{self._product} {self._trt.__version__}"
