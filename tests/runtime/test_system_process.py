from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from runtime.system_process import SystemProcess, SystemProcessError
from tests.fake_system import die, fail_strangely, open_dying, open_fake, refuse

ROOT = Path(__file__).parents[2]
PROMPTS = np.array([[1, 2, 3]])


def test_system_runs_in_another_process_and_is_closed_with_the_block(tmp_path, capfd):
    log = tmp_path / "log"
    with SystemProcess("a system", partial(open_fake, "fake", log)) as process:
        assert (process.opened.backend, process.opened.variant) == ("fake", "fp32")
        assert process.opened.load_s >= 0
        timing = process.run(PROMPTS, 3)
        assert process.peak_rss_mb() > 1
    assert timing.step_s == (0.25, 0.25)
    assert log.read_text().splitlines() == ["fake 1,2,3", "fake closed"]
    assert capfd.readouterr().out == ""


def test_memory_of_the_starting_process_is_not_counted(tmp_path):
    ballast = np.ones(400 << 20, np.uint8)
    with SystemProcess("a system", partial(open_fake, "fake", tmp_path / "log")) as process:
        assert process.peak_rss_mb() < len(ballast) >> 20


def test_error_while_opening_keeps_its_class_and_names_the_system():
    with pytest.raises(ValueError, match=r"^a system: nothing to open$"):
        SystemProcess("a system", refuse)


def test_error_that_cannot_travel_arrives_as_text():
    with pytest.raises(RuntimeError, match="StrangeError: oddness"):
        SystemProcess("a system", fail_strangely)


def test_process_that_dies_is_described(tmp_path):
    with pytest.raises(SystemProcessError, match="a system: its process ended with exit code 3"):
        SystemProcess("a system", die)
    with (
        pytest.raises(SystemProcessError, match="exit code 7"),
        SystemProcess("a system", partial(open_dying, "fake", tmp_path / "log")) as process,
    ):
        process.run(PROMPTS, 1)


def test_process_ends_when_the_one_that_started_it_is_killed(tmp_path):
    program = "\n".join(
        [
            "import os, signal, sys",
            "from functools import partial",
            "from pathlib import Path",
            "from runtime.system_process import SystemProcess",
            "from tests.fake_system import open_fake",
            f"open_system = partial(open_fake, 'fake', Path({str(tmp_path)!r}, 'log'))",
            "process = SystemProcess('x', open_system)",
            "print(process._process.pid, flush=True)",
            "os.kill(os.getpid(), signal.SIGKILL)",
        ]
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    pid = int(done.stdout)
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"process {pid} outlived the one that started it")
    assert (tmp_path / "log").read_text() == "fake closed\n"
