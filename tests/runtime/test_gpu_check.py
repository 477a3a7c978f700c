"""The command: without a GPU, with bad input, and against a stand-in for the driver."""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from runtime import gpu_check
from runtime.backends.base import Limits
from runtime.bundle import Bundle
from runtime.command import FAILURE, NEGATIVE, USAGE
from runtime.gpu_checks.evidence import Evidence
from runtime.kernel_library import (
    KERNEL_FOLDER,
    KERNEL_MANIFEST,
    KernelEntry,
    KernelLibrary,
    OpUse,
    source_sha256,
)
from tests.fake_bundle import fake_manifest, write_fake_bundle
from tests.gpu_check_subject import value_use
from tests.speed_bundle import speed_bundle

USE = value_use()
# A token alone and a prompt of two.
LIMITS = Limits(max_batch_size=1, max_input_len=2, max_seq_len=64)


def entries_of(use: OpUse, target: str, toolkit: str) -> list[KernelEntry]:
    """What a build would write of the use's kernels; the code is none."""
    return [
        KernelEntry(
            name=spec.name,
            target=target,
            file=f"{spec.name}.{target}.cubin",
            sha256=hashlib.sha256(cubin(spec.name)).hexdigest(),
            entry=f"{spec.name}_entry",
            threads=32 * spec.num_warps,
            shared_bytes=0,
            arguments=tuple(spec.arguments.items()),
            constants=dict(spec.constants),
            grid=spec.grid,
            toolkit=toolkit,
            source_sha256=source_sha256(spec.function),
        )
        for spec in use.make_kernels().specs
    ]


def cubin(name: str) -> bytes:
    return b"\177ELF" + name.encode()


def write_bundle(
    folder: Path,
    *,
    targets: Sequence[str] = ("sm89",),
    toolkit: str = "12.9",
    engines: bool = False,
    **changes: object,
) -> Path:
    """A bundle with kernels of a value gather; `changes` are made to the launch manifest."""
    entries = [entry for target in targets for entry in entries_of(USE, target, toolkit)]
    library = KernelLibrary(
        folder=folder, triton_version="3.9.0", uses=(USE,), entries=tuple(entries)
    )
    launches = json.dumps({**library.as_dict(), **changes}).encode()
    files = {f"{KERNEL_FOLDER}/{e.file}": ("kernels", cubin(e.name)) for e in entries}
    manifest = fake_manifest(limits=LIMITS)
    if not engines:
        kept = tuple(v for v in manifest.variants if v.backend != "tensorrt_rtx")
        manifest = dataclasses.replace(manifest, variants=kept)
    return write_fake_bundle(folder, manifest, {KERNEL_MANIFEST: ("kernels", launches), **files})


@pytest.fixture
def no_driver():
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    pytest.skip("this machine has a driver")


@pytest.fixture
def call(capsys):
    """Runs the command; gives its exit status and what it printed."""

    def run(*arguments):
        status = gpu_check.main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return run


# --- without a GPU ---


def test_without_a_gpu_it_says_so_and_what_it_would_do(call, tmp_path, no_driver):
    bundle = write_bundle(tmp_path / "b", engines=True)
    status, out, err = call(bundle, "--output", tmp_path / "evidence")
    assert status == FAILURE
    (line,) = err.splitlines()
    assert line.startswith("gpu_check: no NVIDIA driver was found")
    assert "nothing was checked" in line
    for text in (
        "load 1 kernels of b, compiled for sm89",
        "measure bandwidth",
        "compare and time ValueGather of b in float16, 2 cases: decode; prompt of 2",
        "compare b, tensorrt_rtx:fp16 against torch:fp32",
        "write evidence-<gpu>.json to",
    ):
        assert text in out
    assert not (tmp_path / "evidence").exists()


def test_the_plan_has_the_sections_that_are_asked_for(call, tmp_path, no_driver):
    _, out, _ = call(write_bundle(tmp_path / "b"), "--sections", "decode_speed")
    assert "time no decoding: no bundle has a model for backend cuda" in out
    assert "measure bandwidth" not in out


def test_without_a_gpu_json_is_an_error(call, tmp_path, no_driver):
    status, out, err = call(write_bundle(tmp_path / "b"), "--json")
    assert status == FAILURE
    error = json.loads(out)["error"]
    assert error["kind"] == "LaunchError"
    assert err == f"gpu_check: {error['message']}\n"


def test_all_bundles_with_kernels_below_build_are_checked(call, tmp_path, monkeypatch, no_driver):
    monkeypatch.chdir(tmp_path)
    for name in ("build/one", "build/more/two"):
        write_bundle(tmp_path / name)
    write_fake_bundle(tmp_path / "build" / "without")
    _, out, _ = call()
    found = [line.split()[4] for line in out.splitlines() if line.startswith("  load")]
    assert found == ["build/more/two,", "build/one,"]
    assert "write evidence-<gpu>.json to ." in out
    (tmp_path / "docs").mkdir()
    assert "write evidence-<gpu>.json to docs/evidence" in call()[1]


# --- bad input: told before anything runs ---


def test_no_bundle_with_kernels(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = call()
    assert status == FAILURE
    assert "there is no bundle with kernels below build/" in err
    assert "export/build_kernels.py" in err


def test_a_bundle_without_kernels(call, tmp_path):
    status, _, err = call(write_fake_bundle(tmp_path))
    assert status == FAILURE
    assert "has no kernels; build them with: python export/build_kernels.py" in err


def test_an_altered_cubin(call, tmp_path):
    folder = write_bundle(tmp_path)
    (file,) = (folder / KERNEL_FOLDER).glob("*.cubin")
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    status, _, err = call(folder)
    assert status == FAILURE
    assert "refusing to load the kernels" in err
    assert "sha256" in err
    assert len(err.splitlines()) == 1


def test_a_launch_manifest_of_another_format(call, tmp_path):
    status, _, err = call(write_bundle(tmp_path, format=99))
    assert status == FAILURE
    assert "has format 99, this version of the project reads" in err


def test_kernels_of_another_version_of_the_project(call, tmp_path):
    folder = write_bundle(tmp_path)
    kernels = json.loads((folder / KERNEL_MANIFEST).read_text())["kernels"]
    kernels[0]["constants"]["TOP_K"] = 3
    status, _, err = call(write_bundle(tmp_path, kernels=kernels))
    assert status == FAILURE
    assert "was made by another version of the project" in err


def test_steps_whose_kernels_are_not_there(call, tmp_path, monkeypatch):
    checked, packed = speed_bundle(tmp_path)
    monkeypatch.setattr(Bundle, "kernel_library", lambda bundle: checked.library)
    status, _, err = call(checked.bundle.path)
    assert status == FAILURE
    assert "do not serve this model" in err
    assert f"{packed.kernels.specs[0].name} is missing" in err


def test_a_bundle_that_is_given_twice(call, tmp_path):
    folder = write_bundle(tmp_path / "b")
    status, _, err = call(folder, folder)
    assert status == FAILURE
    assert "two bundles are called b" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--time-limit", "0"), "--time-limit must be positive"),
        (("--time-limit", "nan"), "--time-limit must be positive"),
        (("--seed", "-1"), "--seed must be at least 0"),
        (("--sections", "kernels,speed"), "there is no 'speed'; there are environment, bandwidth"),
    ],
)
def test_wrong_usage(call, arguments, message):
    status, _, err = call(*arguments)
    assert status == USAGE
    assert message in err


# --- against a stand-in for the driver, which runs no kernel ---


@pytest.fixture
def check(stand_in_driver, tmp_path):
    """Runs the command on a GPU that is none; gives the process and its evidence."""

    def run(folder, *arguments, **driver):
        types = {
            entry.entry: [*dict(entry.arguments).values(), "*scratch", "*scratch"]
            for entry in Bundle.open(folder).kernel_library().entries
        }
        words = [*map(str, (folder, "--output", tmp_path / "evidence")), *map(str, arguments)]
        code = f"import sys\nfrom runtime.gpu_check import main\nsys.exit(main({words}))"
        if driver.pop("without_torch", False):
            code = f"import sys\nsys.modules['torch'] = None\n{code}"
        done = stand_in_driver.run(code, kernels=types, **driver)
        file = tmp_path / "evidence" / "evidence-stand-in-gpu.json"
        return done, Evidence.read(file) if file.exists() else None

    return run


def test_kernels_that_write_nothing_are_found_out(check, stand_in_driver, tmp_path):
    done, evidence = check(write_bundle(tmp_path / "b"), "--seed", 5, "--json")
    assert done.returncode == NEGATIVE, done.stderr
    printed = json.loads(done.stdout)
    assert printed.pop("evidence").endswith("evidence-stand-in-gpu.json")
    assert Evidence.from_dict(printed) == evidence
    assert evidence.verdict == "fail"
    assert evidence.gpu == "Stand-in GPU"
    assert (evidence.compute_capability, evidence.driver_cuda) == ("8.9", "13.0")
    assert evidence.command == "python runtime/gpu_check.py b --seed 5"
    kernels = evidence.sections["kernels"]
    assert [case["problems"] for case in kernels["cases"]] == [
        ["16 numbers were not written or are not finite"],
        ["32 numbers were not written or are not finite"],
    ]
    assert evidence.sections["environment"]["bundles"][0]["kernels"][0]["target"] == "sm89"
    assert evidence.sections["engines"]["verdict"] == "skipped"
    calls = [line.split()[0] for line in stand_in_driver.calls()]
    assert calls.count("launch") == 4, "each of two cases twice"
    assert calls.count("alloc") == calls.count("free")
    assert calls.count("event") == 2 * 20 * 3, "around each replay of three measurements"
    assert calls.count("load") == calls.count("unload") == 1


def test_the_summary_is_for_people(check, tmp_path):
    done, evidence = check(write_bundle(tmp_path / "b"))
    assert done.returncode == NEGATIVE
    assert "b, ValueGather, float16, decode: 16 numbers were not written" in done.stdout
    assert "fail: environment pass, bandwidth pass, kernels fail" in done.stdout
    assert "evidence-stand-in-gpu.json" in done.stdout.splitlines()[-1]
    assert evidence.command.endswith(f"--seed {evidence.seed}")


def test_a_fault_of_the_gpu_is_evidence_too(check, tmp_path):
    done, evidence = check(write_bundle(tmp_path / "b"), fault=True)
    assert done.returncode == NEGATIVE, done.stderr
    kernels = evidence.sections["kernels"]
    assert [case["problems"] for case in kernels["cases"]] == [
        ["cuStreamSynchronize failed with CUDA_ERROR_ILLEGAL_ADDRESS"]
    ]
    assert kernels["left_out"] == [
        "b, ValueGather float16, prompt of 2: not compared, the GPU no longer answers"
    ]


def test_sections_that_are_asked_for_run_alone_and_need_no_torch(check, tmp_path):
    done, evidence = check(
        write_bundle(tmp_path / "b"), "--sections", "decode_speed,bandwidth", "--seed", 5,
        without_torch=True,
    )  # fmt: skip
    assert done.returncode == NEGATIVE, done.stderr
    assert list(evidence.sections) == ["bandwidth", "decode_speed"]
    assert evidence.sections["decode_speed"]["verdict"] == evidence.verdict == "skipped"
    assert evidence.command == (
        "python runtime/gpu_check.py b --sections decode_speed,bandwidth --seed 5"
    )


def test_what_no_time_is_left_for_is_not_passed(check, tmp_path):
    done, evidence = check(write_bundle(tmp_path / "b"), "--time-limit", "1e-9")
    assert done.returncode == NEGATIVE
    assert evidence.verdict == "skipped"
    assert evidence.command.endswith("--time-limit 1e-09")
    assert len(evidence.sections["kernels"]["left_out"]) == 2


@pytest.mark.parametrize(
    ("bundle", "driver", "message"),
    [
        ({}, {"capability": 86}, "Stand-in GPU is sm86, the bundle's kernels are for sm89"),
        ({}, {"capability": 75}, "Stand-in GPU is sm75, the bundle's kernels are for sm89"),
        (
            {"toolkit": "13.0"},
            {"version": 12090},
            "the NVIDIA driver goes up to CUDA 12.9, the kernels were assembled by CUDA 13",
        ),
        (
            {},
            {"without_torch": True},
            "PyTorch, which is not installed; run: pip install 'doge-tensorrt[torch]'",
        ),
    ],
)
def test_what_cannot_run_here_is_one_line(
    check, stand_in_driver, tmp_path, bundle, driver, message
):
    done, evidence = check(write_bundle(tmp_path / "b", **bundle), **driver)
    assert done.returncode == FAILURE
    (line,) = done.stderr.splitlines()
    assert message in line
    assert evidence is None
    assert not [call for call in stand_in_driver.calls() if call.startswith("launch")]
