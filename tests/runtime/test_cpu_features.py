"""What is said of a CPU without the instructions for narrow weights."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from runtime.cpu_features import missing_instructions, warn_of_missing_instructions

X86 = "processor\t: 0\nmodel name\t: some\nflags\t\t: fpu sse4_2 avx {}\n\nprocessor\t: 1\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd {}\nCPU implementer\t: 0x41\n"


@pytest.mark.parametrize(
    ("cpuinfo", "missing"),
    [
        (X86.format("avx2 fma"), None),
        (X86.format("fma"), "avx2"),
        (X86.format("avx2x"), "avx2"),  # a name that only begins alike
        (ARM.format("asimddp sve"), None),
        (ARM.format("crc32"), "asimddp"),
        ("processor: 0\nisa: rv64gc\n", None),
        ("", None),
    ],
)
def test_missing_instructions(cpuinfo: str, missing: str | None) -> None:
    assert missing_instructions(cpuinfo) == missing


def test_it_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(X86.format("fma"))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            warn_of_missing_instructions(path)
    (message,) = caplog.messages
    assert "no avx2 instructions" in message
    assert "--variant fp32" in message


def test_where_nothing_is_told_nothing_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_missing_instructions(tmp_path / "missing")
    assert not caplog.messages
