"""Device buffers and a stream through cuda-python, without torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.backends.base import BackendUnavailableError


def load_cuda() -> Any:
    """Import CUDA's runtime bindings and make sure that a GPU answers.

    Returns:
        The module `cuda.bindings.runtime`.

    Raises:
        BackendUnavailableError: cuda-python, the driver or a GPU is missing.
    """
    if importlib.util.find_spec("cuda") is None:
        raise BackendUnavailableError(
            "cuda-python is not installed; run: pip install 'doge-tensorrt[rtx]'"
        )
    from cuda.bindings import runtime as cudart

    status, count = cudart.cudaGetDeviceCount()
    if status == cudart.cudaError_t.cudaErrorInsufficientDriver:
        raise BackendUnavailableError(
            "no NVIDIA driver of the CUDA 13 series was found; engines run on a machine with the "
            "GPU and its driver, here --backend onnxruntime does"
        )
    if status != cudart.cudaError_t.cudaSuccess or not count:
        raise BackendUnavailableError(
            f"no usable NVIDIA GPU: {status.name}; here --backend onnxruntime runs"
        )
    return cudart


class DeviceMemory:
    """Owns buffers and one stream of the current device; `close` frees them all."""

    def __init__(self, cudart: Any) -> None:
        self._cudart = cudart
        self._buffers: list[int] = []
        self.stream = int(self._call("cudaStreamCreate"))

    def zeros(self, size: int) -> int:
        """Address of a new zeroed buffer of `size` bytes."""
        address = int(self._call("cudaMalloc", max(size, 1)))
        self._buffers.append(address)
        self._call("cudaMemsetAsync", address, 0, max(size, 1), self.stream)
        return address

    def free(self, addresses: Sequence[int]) -> None:
        """Free buffers that `zeros` made, after the stream has passed them."""
        self.synchronize()
        for address in addresses:
            self._buffers.remove(address)
            self._call("cudaFree", address)

    def upload(self, address: int, array: npt.NDArray[Any]) -> None:
        """Copy a contiguous host array to the device, in stream order."""
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, self.stream)

    def download(self, array: npt.NDArray[Any], address: int) -> None:
        """Copy device memory into a contiguous host array and wait for it."""
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, self.stream)
        self.synchronize()  # the caller reads the array

    def synchronize(self) -> None:
        """Wait until the stream has done all that was put on it."""
        self._call("cudaStreamSynchronize", self.stream)

    def close(self) -> None:
        """Free every buffer and the stream; harmless when called again."""
        if self.stream:
            self.free(list(self._buffers))
            self._call("cudaStreamDestroy", self.stream)
            self.stream = 0

    def _call(self, name: str, *arguments: Any) -> Any:
        status, *values = getattr(self._cudart, name)(*arguments)
        if status != self._cudart.cudaError_t.cudaSuccess:
            raise RuntimeError(f"{name} failed: {status.name}")
        return values[0] if values else None


def as_bytes_size(shape: Sequence[int], item_size: int) -> int:
    """Bytes of an array of `shape` with items of `item_size` bytes."""
    return int(np.prod(shape, dtype=np.int64)) * item_size
