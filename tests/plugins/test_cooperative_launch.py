"""Launching a kernel whose blocks wait for each other, against a stand-in for the driver."""

from __future__ import annotations

import struct

import pytest

ARGUMENTS = {"barrier": "*i32", "count": "i32", "scale": "fp32"}
PRELUDE = f"""
from plugins.kernel_spec import Launch
from plugins.launcher import CudaLauncher, KernelBinary, open_driver
binary = KernelBinary(name="steps", entry="steps", cubin=b"\\177ELF" + bytes(60), threads=384,
                      shared_bytes=0, arguments={ARGUMENTS!r}, grid=("processors", "1", "1"))
launcher = CudaLauncher(open_driver(), [binary])
launch = Launch(kernel="steps", sizes={{}},
                arguments={{"barrier": 0x10000, "count": 3, "scale": 0.5}})
launcher.launch(launch, 0xABC)
launcher.launch(launch, 0xABC)
"""
KERNELS = {"steps": (*ARGUMENTS.values(), "*scratch", "*scratch")}


def test_there_is_a_block_for_each_multiprocessor(stand_in_driver):
    done = stand_in_driver.run(PRELUDE, kernels=KERNELS)
    assert done.returncode == 0, done.stderr
    loaded, asked, *launches = stand_in_driver.calls()
    assert (loaded, asked) == ("load", "occupancy steps 384 0"), "before the first launch"
    sent = [struct.pack("<q", 0x10000), struct.pack("<i", 3), struct.pack("<f", 0.5), bytes(8)]
    words = [value.hex() for value in (*sent, bytes(8))]
    # The stand-in has two multiprocessors.
    line = f"cooperative steps grid 2 1 1 block 384 1 1 shared 0 stream 0xabc {' '.join(words)}"
    assert launches == [line, line]


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("STAND_IN_COOPERATIVE", "does not launch kernels whose blocks wait for each other"),
        ("STAND_IN_OCCUPANCY", "a block of 384 threads does not fit on a multiprocessor"),
    ],
)
def test_a_gpu_that_cannot_is_named_before_anything_is_launched(
    stand_in_driver, monkeypatch, variable, message
):
    monkeypatch.setenv(variable, "0")
    done = stand_in_driver.run(PRELUDE, kernels=KERNELS)
    assert (
        f"LaunchError: steps: {'this GPU, or what shares it, ' if 'wait' in message else ''}"
        in (done.stderr)
    )
    assert message in done.stderr
    assert "use the variant without a persistent kernel" in done.stderr
    calls = [line.split()[0] for line in stand_in_driver.calls()]
    assert "cooperative" not in calls
    assert calls.count("unload") == 1
