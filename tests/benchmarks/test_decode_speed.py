"""The script that builds and measures the released shapes: the commands that it gives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from model.released import released_shape
from runtime import gpu_check
from runtime.gpu_checks import SECTIONS

ROOT = Path(__file__).parents[2]


def run(*arguments):
    return subprocess.run(
        [sys.executable, "benchmarks/decode_speed.py", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_bundles_that_are_missing_are_named_with_the_command(tmp_path):
    done = run("--shapes", "doge-20m,doge-60m", "--folder", tmp_path)
    assert done.returncode == 1
    assert f"there is no {tmp_path / 'doge-20m'}, {tmp_path / 'doge-60m'}; build" in done.stderr


@pytest.mark.slow
def test_a_build_that_fails_does_not_end_the_others(tmp_path):
    done = run("--build", "--shapes", "doge-1", "--precisions", "fp16,int8", "--folder", tmp_path)
    lines = [line for line in done.stdout.splitlines() if line.startswith("+ ")]
    assert len(lines) == 2
    assert done.returncode != 0
    assert lines[1] == (
        "+ python export/build_engine.py --random-weights doge-1 --backend cuda --cpu none "
        f"--precision int8 --target sm90,sm89 --output {tmp_path / 'doge-1'}"
    )


def test_the_check_is_one_that_gpu_check_takes(tmp_path):
    (tmp_path / "doge-20m").mkdir()
    done = run("--shapes", "doge-20m", "--folder", tmp_path, "--time-limit", 60)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("+ "))
    words = line.split()[3:]
    args = gpu_check.make_parser().parse_args(words)
    assert set(args.sections.split(",")) <= {section.name for section in SECTIONS}
    assert (args.bundles, args.time_limit) == ([tmp_path / "doge-20m"], 60)
    assert done.returncode != 0, "the folder is empty"


def test_shapes_are_released_ones():
    help_text = " ".join(run("--help").stdout.split())
    shapes = "doge-20m,doge-60m,doge-160m,doge-320m,doge-20m-moe,doge-120m-moe"
    assert shapes in help_text.replace(" ", "")
    for shape in shapes.split(","):
        assert released_shape(shape).config.num_hidden_layers > 0
