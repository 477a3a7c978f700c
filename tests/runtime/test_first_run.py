"""docs/first-run-on-a-gpu.md: its commands give what it promises, over the stand-in of a GPU.

The commands that build are run as a user would in other tests; `gpu_check` has a stand-in of its
own (tests/runtime/test_gpu_check.py). Here the engine is float32, so its text is the CPU's.
"""

from __future__ import annotations

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

from tests.fake_tensorrt.engine_file import add_fake_engine

DOCUMENT = Path(__file__).parents[2] / "docs" / "first-run-on-a-gpu.md"
BLOCKS = re.findall(r"```\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
LINES = [line for block in BLOCKS for line in block.splitlines() if line.startswith("python ")]


@pytest.fixture
def place(engine_source, tmp_path, monkeypatch, gpu):
    """A folder with the bundles that the commands name, each with an engine that runs here."""
    for name in ("doge-tiny", "doge-160m"):
        add_fake_engine(engine_source, tmp_path / "build" / name, decode_width=64)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("runtime.gpu.copy_speed.copy_bytes_per_s.__defaults__", (1 << 20,))
    return tmp_path


def run(name, place, capsys, **replaced):
    """Run the document's commands of this name; their outputs, in order."""
    outputs = []
    for line in (line for line in LINES if line.startswith(f"python runtime/{name}.py ")):
        for shown, taken in replaced.items():
            line = line.replace(shown, taken)
        command, _, file = line.partition(" > ")
        capsys.readouterr()
        status = importlib.import_module(f"runtime.{name}").main(shlex.split(command)[2:])
        printed = capsys.readouterr()
        assert status == 0, printed.err
        outputs.append(printed.out)
        if file:
            (place / file).write_text(printed.out, encoding="utf-8")
    assert outputs, "the document has no such command"
    return outputs


def test_verify_prints_the_promised_lines(place, capsys):
    (said,) = run("inspect_bundle", place, capsys)
    (promised,) = (block for block in BLOCKS if block.startswith("hashes "))
    for line in promised.splitlines():
        pattern = re.escape(line).replace(r"\ N\ ", r"\ \d+\ ").replace("fp16", r"fp\d+")
        assert re.search(rf"^ *{pattern}$", said, re.MULTILINE), said


def test_the_engines_text_is_the_cpus_and_kernels_are_kept(place, capsys):
    first, *others = run("generate", place, capsys)
    assert len(others) == 2
    assert [*map(str.strip, others)] == [first.strip()] * 2
    assert [*(place / "build/doge-tiny/runtime_cache").iterdir()]


def test_the_comparison_passes_and_writes_its_page(place, capsys):
    run("compare", place, capsys)
    found = json.loads((place / "first.json").read_text(encoding="utf-8"))
    assert found["verdict"] == "pass"
    assert "first_token" in found
    assert "<html" in (place / "first.html").read_text(encoding="utf-8")


def test_the_benchmark_has_the_promised_line_and_is_warm_the_second_time(place, capsys, here):
    form = next(line for block in BLOCKS for line in block.splitlines() if "runtime cache" in line)
    pattern = re.escape(form).replace(re.escape("(sm89, driver up to CUDA 13.0)"), r"\(.*\)")
    pattern = pattern.replace("GPU\\ ", r".*\ ").replace(r"\ N\ ", r"\ [\d?]+\ ")
    pattern = pattern.replace(r"fp16\-sm89", r"fp\d+\-sm89").replace("of\\ 16", r"of\ \d+")
    for state in ("cold", "warm"):
        # Prompts that fit into the small bundle which stands for the large one, and few tokens.
        fewer = {"16,512": "16,100", "--output-len 64": "--output-len 4 --repeats 2"}
        (said,) = run("benchmark", place, capsys, **fewer)
        told = [line for line in said.splitlines() if "runtime cache" in line]
        assert len(told) == 2, said
        for line in told:
            assert re.fullmatch(pattern.replace("cold", state), line), line
