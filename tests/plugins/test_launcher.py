"""Loading and launching compiled kernels, against a stand-in for the NVIDIA driver."""

from __future__ import annotations

import ctypes
import struct

import pytest

from plugins.kernel_spec import Launch
from plugins.launcher import LaunchError, open_driver, pack_arguments

ARGUMENTS = {"x": "*fp16", "n": "i32", "scale": "fp32", "stride": "i64", "out": "*fp32"}
LAUNCH = Launch(
    kernel="k",
    sizes={"n": 100, "rows": 3},
    arguments={"x": 0x10000, "n": -7, "scale": 0.5, "stride": 1 << 40, "out": 0},
)
PRELUDE = f"""
from plugins.kernel_spec import Launch
from plugins.launcher import CudaLauncher, KernelBinary, current_device, open_driver
def binary(**changes):
    values = dict(name="k", entry="k_entry", cubin=b"\\177ELF" + bytes(60), threads=128,
                  shared_bytes=0, arguments={ARGUMENTS!r}, grid=("ceil(n/64)", "2", "rows"))
    return KernelBinary(**(values | changes))
launch = {LAUNCH!r}
"""
KERNELS = {"k_entry": (*ARGUMENTS.values(), "*scratch", "*scratch")}


def test_launch_hands_over_grid_block_and_every_argument(stand_in_driver):
    done = stand_in_driver.run(
        PRELUDE + "CudaLauncher(open_driver(), [binary()]).launch(launch, 0xABC)", kernels=KERNELS
    )
    assert done.returncode == 0, done.stderr
    (call,) = [line for line in stand_in_driver.calls() if line.startswith("launch")]
    words = call.split()
    assert words[:13] == [
        "launch",
        "k_entry",
        "grid",
        "2",
        "2",
        "3",
        "block",
        "128",
        "1",
        "1",
        "shared",
        "0",
        "stream",
    ]
    assert words[13] == "0xabc"
    sent = [
        struct.pack("<q", 0x10000), struct.pack("<i", -7), struct.pack("<f", 0.5),
        struct.pack("<q", 1 << 40), bytes(8), bytes(8), bytes(8),
    ]  # fmt: skip
    assert words[14:] == [value.hex() for value in sent]


def test_a_kernel_that_wants_much_shared_memory_asks_for_it_once(stand_in_driver):
    code = """
launcher = CudaLauncher(open_driver(), [binary(shared_bytes=60000)])
launcher.launch(launch, 0); launcher.launch(launch, 0)
"""
    assert stand_in_driver.run(PRELUDE + code, kernels=KERNELS).returncode == 0
    calls = [line.split()[0] for line in stand_in_driver.calls()]
    assert calls == ["load", "attribute", "launch", "launch"]
    assert "attribute k_entry 8 60000" in stand_in_driver.calls()


def test_counters_are_zeroed_and_everything_is_freed_once(stand_in_driver):
    code = """
launcher = CudaLauncher(open_driver(), [binary(), binary(name="other")])
assert launcher.zeros(5) != launcher.zeros(0)
launcher.close(); launcher.close()
"""
    done = stand_in_driver.run(PRELUDE + code, kernels=KERNELS)
    assert done.returncode == 0, done.stderr
    assert stand_in_driver.calls() == [
        "load", "load", "alloc 20", "memset 0 5", "alloc 4", "memset 0 1",
        "free", "free", "unload", "unload",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("binary", "message"),
    [
        (
            'binary(cubin=b"no machine code" * 9)',
            "cuLibraryLoadData failed with CUDA_ERROR_INVALID",
        ),
        ('binary(entry="other")', "cuLibraryGetKernel failed with CUDA_ERROR_NOT_FOUND"),
    ],
)
def test_kernel_that_does_not_load_is_named(stand_in_driver, binary, message):
    code = f"CudaLauncher(open_driver(), [binary(name='first'), {binary}])"
    done = stand_in_driver.run(PRELUDE + code, kernels=KERNELS)
    assert f"LaunchError: k: {message}" in done.stderr
    assert stand_in_driver.calls().count("unload") == stand_in_driver.calls().count("load")


def test_device_is_described(stand_in_driver):
    done = stand_in_driver.run(
        PRELUDE + "print(current_device(open_driver()))", version=12090, capability=120
    )
    assert "Stand-in GPU" in done.stdout
    assert "compute_capability=(12, 0), driver_version=(12, 9)" in done.stdout


def test_without_a_driver_the_error_says_so():
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        pass
    else:
        pytest.skip("this machine has a driver")
    with pytest.raises(LaunchError, match="no NVIDIA driver was found"):
        open_driver()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": 0x10008}, "x lies at 0x10008, which is no multiple of 16"),
        ({"surplus": 1}, "unknown: surplus"),
    ],
)
def test_wrong_arguments_are_refused(changes, message):
    launch = Launch(kernel="k", sizes={}, arguments={**LAUNCH.arguments, **changes})
    with pytest.raises(LaunchError, match=message):
        pack_arguments(ARGUMENTS, launch)


def test_missing_argument_is_named():
    launch = Launch(kernel="k", sizes={}, arguments={"x": 0})
    with pytest.raises(LaunchError, match="missing: n, out, scale, stride"):
        pack_arguments(ARGUMENTS, launch)
