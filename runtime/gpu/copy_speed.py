"""How fast a GPU copies its own memory: what its decode steps are held against."""

from __future__ import annotations

import time
from contextlib import ExitStack
from statistics import median

from runtime.gpu.cuda_runtime import CudaRuntime
from runtime.gpu.device_memory import DeviceBuffer, Stream

# Beyond the last cache of every GPU that engines are built for.
COPIED_BYTES = 256 << 20
_COPIES, _PASSES = 8, 5


def copy_bytes_per_s(cuda: CudaRuntime, size: int = COPIED_BYTES) -> float | None:
    """Bytes read and written a second, by the host's clock; the median of a few passes.

    Args:
        cuda: the GPU.
        size: bytes of a copy.

    Returns:
        None where there is no memory for both sides of a copy.

    Raises:
        RuntimeError: a call of CUDA failed.
    """
    if cuda.free_bytes() < 2 * size:
        return None
    with ExitStack() as owned:
        buffers = []
        for what in ("what is copied", "a copy"):
            buffers.append(DeviceBuffer(cuda, what, size))
            owned.callback(buffers[-1].close)
        stream = Stream(cuda)
        owned.callback(stream.close)
        stream.zero(buffers[0])
        stream.copy(buffers[1].address, buffers[0].address, size)  # a first one that does not count
        stream.wait()
        seconds = []
        for _ in range(_PASSES):
            begin = time.perf_counter()
            for _ in range(_COPIES):
                stream.copy(buffers[1].address, buffers[0].address, size)
            stream.wait()
            seconds.append(time.perf_counter() - begin)
        return 2 * size * _COPIES / median(seconds)
