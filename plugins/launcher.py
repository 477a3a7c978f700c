"""Loads compiled kernels and launches them on a GPU's stream; needs cuda-python, not Triton.

The kernels' machine code is for one GPU architecture. Whoever opens a launcher has chosen the code
for the GPU present and checked its hash (`runtime/kernel_library.py`).
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from plugins.kernel_spec import (
    MOST_PROCESSORS,
    POINTER_ALIGNMENT,
    PROCESSORS,
    Launch,
    grid_of,
)

# A block gets this much shared memory without asking.
_DEFAULT_SHARED_BYTES = 48 * 1024
# Triton appends two pointers to a kernel's parameters, unused by kernels without its own scratch.
_HIDDEN = (0, 0)
_CTYPES = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}


class LaunchError(Exception):
    """A kernel could not be loaded or launched; the message has the driver's reason."""


@dataclass(frozen=True, kw_only=True)
class KernelBinary:
    """Machine code of one kernel variant, and how to launch it.

    Attributes:
        name: of the variant.
        entry: of the function in the code.
        cubin: the code.
        threads: of a block.
        shared_bytes: dynamic shared memory of a block.
        arguments: type of each runtime argument by name, in order (`KernelSpec.arguments`).
        grid: `KernelSpec.grid`.
    """

    name: str
    entry: str
    cubin: bytes = field(repr=False)
    threads: int
    shared_bytes: int
    arguments: Mapping[str, str]
    grid: tuple[str, str, str]


class Launcher(Protocol):
    """What runs launches: a GPU's, or in tests an interpreter on host memory."""

    def launch(self, launch: Launch, stream: int) -> None:
        """Put one launch on a stream; returns at once."""

    def zeros(self, count: int) -> int:
        """Address of `count` new int32 counters, all zero, freed by `close`."""

    def close(self) -> None:
        """Free code and counters; harmless when called again."""


def pack_arguments(
    arguments: Mapping[str, str], launch: Launch
) -> tuple[tuple[int | float, ...], tuple[Any, ...]]:
    """Values and C types of a launch, in the kernel's order, with Triton's two hidden pointers.

    Args:
        arguments: type of each argument by name, in order.
        launch: its values by name.

    Raises:
        LaunchError: an argument is missing or unknown, or an address is not aligned.
    """
    given = launch.arguments
    if given.keys() != arguments.keys():
        missing, unknown = arguments.keys() - given.keys(), given.keys() - arguments.keys()
        raise LaunchError(
            f"{launch.kernel} takes {', '.join(arguments)}; missing: "
            f"{', '.join(sorted(missing)) or 'none'}, unknown: "
            f"{', '.join(sorted(unknown)) or 'none'}"
        )
    for name, kind in arguments.items():
        if kind.startswith("*") and int(given[name]) % POINTER_ALIGNMENT:
            raise LaunchError(
                f"{launch.kernel}: {name} lies at {given[name]:#x}, which is no multiple of "
                f"{POINTER_ALIGNMENT}; its loads need that"
            )
    values = (*(given[name] for name in arguments), *_HIDDEN)
    types = (*(_CTYPES.get(kind, ctypes.c_void_p) for kind in arguments.values()),)
    return values, (*types, ctypes.c_void_p, ctypes.c_void_p)


class CudaLauncher:
    """Launches kernels through the CUDA driver on the current device."""

    def __init__(self, driver: Any, binaries: Iterable[KernelBinary]) -> None:
        """Load every kernel, so that a launch later neither loads nor allocates.

        Args:
            driver: `cuda.bindings.driver`; a context is current, or the first device's is made so.
            binaries: code for this device.

        Raises:
            LaunchError: a kernel does not load.
        """
        self._driver = driver
        self._libraries: list[Any] = []
        self._counters: list[Any] = []
        self._loaded: dict[str, tuple[KernelBinary, Any]] = {}
        self._processors = 0  # known once a cooperative kernel is loaded
        try:
            for binary in binaries:
                self._loaded[binary.name] = (binary, self._load(binary))
        except LaunchError:
            self.close()
            raise

    def launch(self, launch: Launch, stream: int) -> None:
        """Put one launch on a stream; returns at once, and can be captured in a CUDA graph.

        Raises:
            LaunchError: an unknown kernel, wrong arguments, or the driver's refusal.
        """
        if launch.kernel not in self._loaded:
            raise LaunchError(f"no kernel {launch.kernel} was loaded; there are {self._names()}")
        binary, function = self._loaded[launch.kernel]
        values = pack_arguments(binary.arguments, launch)
        if PROCESSORS in binary.grid:
            x, y, z = grid_of(binary.grid, {**launch.sizes, PROCESSORS: self._processors})
            self._call(
                "cuLaunchCooperativeKernel", function, x, y, z, binary.threads, 1, 1,
                binary.shared_bytes, self._driver.CUstream(stream), values, about=launch.kernel,
            )  # fmt: skip
            return
        x, y, z = grid_of(binary.grid, launch.sizes)
        self._call(
            "cuLaunchKernel", function, x, y, z, binary.threads, 1, 1, binary.shared_bytes,
            self._driver.CUstream(stream), values, 0, about=launch.kernel,
        )  # fmt: skip

    def zeros(self, count: int) -> int:
        """Address of `count` new int32 counters, all zero, freed by `close`."""
        address = self._call("cuMemAlloc", max(count, 1) * 4, about="counters")
        self._counters.append(address)
        self._call("cuMemsetD32", address, 0, max(count, 1), about="counters")
        self._call("cuCtxSynchronize", about="counters")  # other streams do not wait for it
        return int(address)

    def close(self) -> None:
        """Free code and counters; harmless when called again."""
        while self._counters:
            self._driver.cuMemFree(self._counters.pop())
        self._loaded.clear()
        while self._libraries:
            self._driver.cuLibraryUnload(self._libraries.pop())

    def _load(self, binary: KernelBinary) -> Any:
        driver, name = self._driver, binary.name
        library = self._call("cuLibraryLoadData", binary.cubin, [], [], 0, [], [], 0, about=name)
        self._libraries.append(library)
        kernel = self._call("cuLibraryGetKernel", library, binary.entry.encode(), about=name)
        if binary.shared_bytes > _DEFAULT_SHARED_BYTES:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            device = self._call("cuCtxGetDevice", about=name)
            self._call(
                "cuKernelSetAttribute", attribute, binary.shared_bytes, kernel, device, about=name
            )
        function = self._call("cuKernelGetFunction", kernel, about=name)
        if PROCESSORS in binary.grid:
            self._check_resident(binary, function)
        return function

    def _check_resident(self, binary: KernelBinary, function: Any) -> None:
        """A block on each multiprocessor, all at once: they wait for each other."""
        name, kinds = binary.name, self._driver.CUdevice_attribute
        device = self._call("cuCtxGetDevice", about=name)
        cooperative = kinds.CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH
        if not self._call("cuDeviceGetAttribute", cooperative, device, about=name):
            raise LaunchError(
                f"{name}: this GPU, or what shares it, does not launch kernels whose blocks wait "
                "for each other (cooperative launch); use the variant without a persistent kernel"
            )
        blocks = self._call(
            "cuOccupancyMaxActiveBlocksPerMultiprocessor", function, binary.threads,
            binary.shared_bytes, about=name,
        )  # fmt: skip
        if blocks < 1:
            raise LaunchError(
                f"{name}: a block of {binary.threads} threads does not fit on a multiprocessor; "
                "use the variant without a persistent kernel"
            )
        count = kinds.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
        found = self._call("cuDeviceGetAttribute", count, device, about=name)
        self._processors = min(int(found), MOST_PROCESSORS)

    def _names(self) -> str:
        return ", ".join(sorted(self._loaded)) or "none"

    def _call(self, function: str, *arguments: Any, about: str) -> Any:
        status, *values = getattr(self._driver, function)(*arguments)
        if status != self._driver.CUresult.CUDA_SUCCESS:
            raise LaunchError(f"{about}: {function} failed with {status.name}")
        return values[0] if values else None


@dataclass(frozen=True, kw_only=True)
class Device:
    """The GPU that launches go to.

    Attributes:
        name: what its driver calls it.
        compute_capability: (8, 9) for an RTX 4090.
        driver_version: CUDA version up to which the driver goes, (13, 0).
    """

    name: str
    compute_capability: tuple[int, int]
    driver_version: tuple[int, int]


def open_driver() -> Any:
    """Import CUDA's driver bindings and make a context current: the present one, else GPU 0's.

    Returns:
        The module `cuda.bindings.driver`.

    Raises:
        LaunchError: cuda-python, the driver or a GPU is missing.
    """
    if importlib.util.find_spec("cuda") is None:
        raise LaunchError("cuda-python is not installed; run: pip install 'doge-tensorrt[cuda]'")
    from cuda.bindings import driver

    try:
        (status,) = driver.cuInit(0)
    except Exception as error:  # the bindings' own error when there is no libcuda to open
        raise LaunchError(f"no NVIDIA driver was found ({type(error).__name__})") from error
    _expect(driver, status, "cuInit")
    status, context = driver.cuCtxGetCurrent()
    _expect(driver, status, "cuCtxGetCurrent")
    if not int(context):
        status, device = driver.cuDeviceGet(0)
        _expect(driver, status, "cuDeviceGet")
        status, context = driver.cuDevicePrimaryCtxRetain(device)
        _expect(driver, status, "cuDevicePrimaryCtxRetain")
        (status,) = driver.cuCtxSetCurrent(context)
        _expect(driver, status, "cuCtxSetCurrent")
    return driver


def current_device(driver: Any) -> Device:
    """The GPU of the current context.

    Raises:
        LaunchError: the driver does not tell.
    """
    status, device = driver.cuCtxGetDevice()
    _expect(driver, status, "cuCtxGetDevice")
    status, name = driver.cuDeviceGetName(128, device)
    _expect(driver, status, "cuDeviceGetName")
    kinds = driver.CUdevice_attribute
    numbers = []
    for kind in (
        kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
        kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
    ):
        status, number = driver.cuDeviceGetAttribute(kind, device)
        _expect(driver, status, "cuDeviceGetAttribute")
        numbers.append(number)
    status, version = driver.cuDriverGetVersion()
    _expect(driver, status, "cuDriverGetVersion")
    return Device(
        name=name.split(b"\0")[0].decode(),
        compute_capability=(numbers[0], numbers[1]),
        driver_version=(version // 1000, version % 1000 // 10),
    )


def _expect(driver: Any, status: Any, function: str) -> None:
    if status != driver.CUresult.CUDA_SUCCESS:
        raise LaunchError(f"{function} failed with {status.name}; is there an NVIDIA GPU?")
