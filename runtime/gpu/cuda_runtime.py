"""CUDA's runtime through cuda-python: which GPU, how much memory, and calls that fail in words."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runtime.backends.base import BackendUnavailableError

# TensorRT-RTX 1.7 and this cuda-python are built against CUDA 13, which takes a driver of 13.0 on.
_CUDA_SERIES = 13


def load_cuda() -> Any:
    """Import CUDA's runtime bindings and make sure that a GPU answers.

    Returns:
        The module `cuda.bindings.runtime`.

    Raises:
        BackendUnavailableError: cuda-python, the driver or a GPU is missing.
    """
    if importlib.util.find_spec("cuda") is None:
        raise BackendUnavailableError(
            "cuda-python is not installed; run: pip install 'doge-tensorrt[cuda]'"
        )
    from cuda.bindings import runtime as cudart

    require_gpu(cudart)
    return cudart


def require_gpu(cudart: Any) -> None:
    """Make sure that a driver of CUDA 13 and a GPU answer.

    Raises:
        BackendUnavailableError: one does not.
    """
    errors = cudart.cudaError_t
    status, count = cudart.cudaGetDeviceCount()
    if status == errors.cudaErrorInsufficientDriver:
        _, version = cudart.cudaDriverGetVersion()
        if version:  # 0 where there is no driver at all
            raise BackendUnavailableError(
                f"the NVIDIA driver here goes up to CUDA {version // 1000}.{version % 1000 // 10}, "
                f"engines need one of the CUDA {_CUDA_SERIES} series; install a newer driver "
                "(nvidia-smi shows which is there), here --backend onnxruntime runs"
            )
        raise BackendUnavailableError(
            "no NVIDIA driver of the CUDA 13 series was found; engines run on a machine with the "
            "GPU and its driver, here --backend onnxruntime does"
        )
    if status != errors.cudaSuccess or not count:
        raise BackendUnavailableError(
            f"no usable NVIDIA GPU: {status.name if count else 'the driver finds none'}; here "
            "--backend onnxruntime runs"
        )


@dataclass(frozen=True, kw_only=True)
class GpuFacts:
    """The current GPU.

    Attributes:
        name: what its driver calls it.
        compute_capability: (8, 9) for an RTX 4090.
        driver: CUDA version up to which the driver goes, (13, 0).
    """

    name: str
    compute_capability: tuple[int, int]
    driver: tuple[int, int]

    @property
    def target(self) -> str:
        """What `--target` calls it, e.g. sm89."""
        return "sm{}{}".format(*self.compute_capability)

    @property
    def file_word(self) -> str:
        """Its name in letters that every file system takes."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")

    def __str__(self) -> str:
        return f"{self.name} ({self.target}, driver up to CUDA {self.driver[0]}.{self.driver[1]})"


class CudaRuntime:
    """Calls of `cuda.bindings.runtime`, whose status codes become errors.

    Attributes:
        module: the bindings.
    """

    def __init__(self, module: Any) -> None:
        """Take the bindings; a GPU must answer (`load_cuda`)."""
        self.module = module

    def call(self, name: str, *arguments: Any) -> Any:
        """What the function `name` returns beside its status.

        Raises:
            RuntimeError: any other status than success.
        """
        status, value = self.attempt(name, *arguments)
        if status != self.module.cudaError_t.cudaSuccess:
            raise RuntimeError(f"{name} failed: {status.name}")
        return value

    def attempt(self, name: str, *arguments: Any) -> tuple[Any, Any]:
        """Likewise, with the status instead of an error; of several values, a tuple."""
        status, *values = getattr(self.module, name)(*arguments)
        return status, values[0] if len(values) == 1 else tuple(values)

    def gpu(self) -> GpuFacts:
        """The current GPU."""
        found = self.call("cudaGetDeviceProperties", self.call("cudaGetDevice"))
        version = self.call("cudaDriverGetVersion")
        name = found.name
        return GpuFacts(
            name=name.split(b"\0")[0].decode() if isinstance(name, bytes) else str(name),
            compute_capability=(found.major, found.minor),
            driver=(version // 1000, version % 1000 // 10),
        )

    def free_bytes(self) -> int:
        """Device memory that the driver calls free now."""
        free, _ = self.call("cudaMemGetInfo")
        return int(free)

    def require_free(self, needs: Mapping[str, int], advice: str) -> None:
        """Make sure before anything is allocated that there is memory for it.

        Args:
            needs: bytes by what they are for.
            advice: what to do where there are too few.

        Raises:
            BackendUnavailableError: fewer bytes are free.
        """
        free, needed = self.free_bytes(), sum(needs.values())
        if needed > free:
            parts = ", ".join(f"{what} {megabytes(size)}" for what, size in needs.items())
            raise BackendUnavailableError(
                f"too little GPU memory: {megabytes(needed)} are needed ({parts}), "
                f"{megabytes(free)} are free; {advice}"
            )


def megabytes(size: int) -> str:
    """A number of bytes in words, rounded up."""
    return f"{-(-size // 100_000) / 10:,.1f} MB"
