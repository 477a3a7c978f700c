"""The backend of our kernels on a stand-in for CUDA, each kernel in Triton's interpreter."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from export.step_weights import step_model_of, write_step_weights
from model.checkpoint import load_checkpoint
from model.doge import DogeForCausalLM
from plugins.kernel_spec import KernelSpec, Launch
from plugins.launcher import LaunchError
from runtime.backends.base import Limits
from runtime.backends.cuda_backend import CudaBackend
from runtime.backends.torch_backend import TorchBackend
from runtime.bundle import Bundle
from runtime.gpu.cuda_runtime import CudaRuntime
from runtime.kernel_library import KERNEL_MANIFEST, KernelEntry, KernelLibrary, source_sha256
from runtime.kernel_step.formats import StepFormats, StepPrecision
from runtime.kernel_step.step_kernels import StepKernels
from runtime.kernel_step.variant import BACKEND, variant_details, weights_path
from runtime.manifest import FileRole, Variant
from tests.fake_bundle import fake_manifest, write_fake_bundle
from tests.fake_tensorrt.cuda import FakeCuda, Memory, Work
from tests.interpreter import InterpreterLauncher


class FakeLauncher:
    """Puts launches on the streams of a stand-in, which runs them when it is waited for.

    Attributes:
        launched: every launch that was run, in order.
        put: names of the kernels that were put on a stream or into a graph.
        refuses: name of a kernel whose launch fails.
        read_only: memory that no launch writes, which streams may share.
        closed: how often it was closed.
    """

    def __init__(self, cuda: FakeCuda, specs: Iterable[KernelSpec]) -> None:
        self._cuda = cuda
        self._specs = {spec.name: spec for spec in specs}
        self._interpreter = InterpreterLauncher(self._specs.values())
        self.put: list[str] = []
        self.refuses: str | None = None
        self.read_only: list[Memory] = []
        self.closed = 0

    @property
    def launched(self) -> list[Launch]:
        return self._interpreter.launched

    def launch(self, launch: Launch, stream: int) -> None:
        if self.refuses is not None and self.refuses in launch.kernel:
            raise LaunchError(f"{launch.kernel}: cuLaunchKernel failed with CUDA_ERROR_TEST")
        pointers = {
            name: int(launch.arguments[name])
            for name, kind in self._specs[launch.kernel].arguments.items()
            if kind.startswith("*") and launch.arguments[name]
        }
        memory = [
            self._cuda.find("device memory", address, 1, f"{name} of {launch.kernel}")
            for name, address in pointers.items()
        ]
        memory = [used for used in memory if used not in self.read_only]
        self.put.append(launch.kernel)
        self._cuda.put(
            stream, Work(launch.kernel, lambda: self._interpreter.launch(launch), memory)
        )

    def zeros(self, count: int) -> int:
        raise AssertionError("a step's counters are in its own memory")

    def close(self) -> None:
        self.closed += 1


@dataclass
class PackedBundle:
    """What the backend asks of a bundle, around packed weights in a folder."""

    path: Path
    network: DogeForCausalLM
    limits: Limits
    variant: Variant
    kernels: StepKernels
    files: list[str] = field(default_factory=list)

    @property
    def config(self):
        return self.network.config

    @property
    def generation(self):
        return self.network.generation

    def file(self, relative: str) -> Path:
        return self.path / relative

    @classmethod
    def make(
        cls,
        folder: Path,
        checkpoint: Path,
        precision: StepPrecision,
        limits: Limits,
        router_mode: str | None = None,
    ) -> PackedBundle:
        network = load_checkpoint(checkpoint, router_mode=router_mode)
        model = step_model_of(network, limits.max_seq_len)
        formats = StepFormats.of(precision)
        path = folder / weights_path(precision)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_step_weights(path, network, model, formats)
        variant = Variant(
            backend=BACKEND,
            name=precision,
            path=weights_path(precision),
            precision=precision,
            details=variant_details(model),
        )
        return cls(folder, network, limits, variant, StepKernels(model, formats, limits))

    def torch(self) -> TorchBackend:
        """The reference on the same checkpoint."""
        return TorchBackend(self.network, limits=self.limits, variant="fp32")

    def open(self, cuda: FakeCuda | None = None) -> tuple[CudaBackend, FakeCuda, FakeLauncher]:
        """The backend on a machine of its own, or the one given."""
        cuda = FakeCuda() if cuda is None else cuda
        launcher = FakeLauncher(cuda, self.kernels.specs)
        backend = CudaBackend(CudaRuntime(cuda), launcher, self, self.variant)  # type: ignore[arg-type]
        weights = backend._weights.address("embedding.weights")
        launcher.read_only.append(cuda.find("device memory", weights, 1, "weights"))
        return backend, cuda, launcher

    def with_kernels(
        self,
        folder: Path,
        targets: Sequence[str] = ("sm89",),
        *,
        limits: Limits | None = None,
        leave_out: Sequence[str] = (),
    ) -> Bundle:
        """A whole bundle: a manifest, the packed weights, and kernels whose code is a few bytes.

        Args:
            folder: of the bundle.
            targets: GPU architectures that there is code for.
            limits: what the manifest says; those that it was made for if None.
            leave_out: kernels whose name begins so have no code for the first target.
        """
        entries = [
            _entry(spec, target)
            for target in targets
            for spec in self.kernels.specs
            if target != targets[0] or not spec.name.startswith(tuple(leave_out))
        ]
        library = KernelLibrary(
            folder=folder / "kernels", triton_version="3.9.0", uses=(), entries=tuple(entries)
        )
        path = self.variant.path
        more: dict[str, tuple[FileRole, bytes]] = {
            f"kernels/{entry.file}": ("kernels", _code(entry.name, entry.target))
            for entry in entries
        }
        more[KERNEL_MANIFEST] = ("kernels", library.to_json().encode())
        more[path] = ("weights", self.file(path).read_bytes())
        manifest = fake_manifest(self.config, limits or self.limits)
        manifest = dataclasses.replace(manifest, variants=(self.variant,))
        return Bundle.open(write_fake_bundle(folder, manifest, more))


def _code(name: str, target: str) -> bytes:
    return f"code of {name} for {target}".encode()


def _entry(spec: KernelSpec, target: str) -> KernelEntry:
    return KernelEntry(
        name=spec.name,
        target=target,
        file=f"{spec.name}.{target}.cubin",
        sha256=hashlib.sha256(_code(spec.name, target)).hexdigest(),
        entry="entry",
        threads=32 * spec.num_warps,
        shared_bytes=0,
        arguments=tuple(spec.arguments.items()),
        constants=dict(spec.constants),
        grid=spec.grid,
        toolkit="12.9",
        source_sha256=source_sha256(spec.function),
    )
