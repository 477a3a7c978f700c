"""What a run's numbers depend on: GPU, machine, versions, kernels; and bandwidth."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess

import pytest

from runtime.gpu_checks.bandwidth import BandwidthSection
from runtime.gpu_checks.cuda_device import kernel_module_version
from runtime.gpu_checks.environment import EnvironmentSection, checkout_commit, describe_gpu
from runtime.kernel_library import KernelEntry
from tests.gpu_check_subject import checked_bundle, subject_of, value_use
from tests.host_device import FACTS, HostDevice


def entry(target):
    code = target.encode()
    return KernelEntry(
        name="k", target=target, file=f"k.{target}.cubin", entry="k",
        sha256=hashlib.sha256(code).hexdigest(), threads=32, shared_bytes=0, arguments=(),
        constants={}, grid=("1", "1", "1"), toolkit="12.9",
        source_sha256="0" * 64,
    )  # fmt: skip


@pytest.fixture
def bundle(tmp_path):
    found = checked_bundle(tmp_path, [value_use()])
    entries = tuple(entry(target) for target in ("sm86", "sm89", "sm90"))
    found.library.folder.mkdir()
    for item in entries:
        (found.library.folder / item.file).write_bytes(item.target.encode())
    library = dataclasses.replace(found.library, entries=entries)
    return dataclasses.replace(found, library=library)


def test_the_kernels_that_run_are_named_with_their_hash(bundle):
    report = EnvironmentSection().run(subject_of(HostDevice(), bundle), {})
    assert report["verdict"] == "pass"
    (described,) = report["bundles"]
    assert described["name"] == "tiny"
    assert described["kernels"] == [
        {"name": "k", "target": "sm89", "toolkit": "12.9", "sha256": entry("sm89").sha256}
    ]
    assert {"python", "numpy", "torch", "cuda-bindings"} <= report["versions"].keys()
    json.dumps(report, allow_nan=False)


def test_bandwidth_of_the_memory_follows_from_clock_and_bus():
    # An RTX 4090: 10501 MHz, 384 bits.
    facts = dataclasses.replace(FACTS, memory_clock_khz=10_501_000, memory_bus_bits=384)
    assert describe_gpu(facts)["memory_bandwidth_gb_per_s"] == 1008.1
    unknown = dataclasses.replace(FACTS, memory_clock_khz=0)
    assert describe_gpu(unknown)["memory_bandwidth_gb_per_s"] is None


def test_plans_name_kernels_and_targets(bundle):
    assert EnvironmentSection().plan([bundle])[1:] == [
        "load 1 kernels of tiny, compiled for sm86, sm89, sm90"
    ]


def test_the_commit_says_whether_files_were_changed(tmp_path, monkeypatch):
    monkeypatch.setattr("runtime.gpu_checks.environment._CHECKOUT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert checkout_commit() is None
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    (tmp_path / "file").write_text("one")
    for command in (["init", "-q"], ["add", "file"], [*identity, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    commit = checkout_commit()
    assert commit is not None
    assert len(commit) == 40
    (tmp_path / "new").write_text("not known to git")
    assert checkout_commit() == commit
    (tmp_path / "file").write_text("two")
    assert checkout_commit() == f"{commit}+changes"


def test_the_kernel_module_tells_its_version(tmp_path):
    file = tmp_path / "version"
    file.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.82.07  Release Build\n"
        "GCC version:  gcc version 13.3.0\n"
    )
    assert kernel_module_version(file) == "580.82.07"
    file.write_text("nothing\n")
    assert kernel_module_version(file) is None
    assert kernel_module_version(tmp_path / "absent") is None


def test_bandwidth_is_measured(tmp_path):
    device = HostDevice()
    subject = subject_of(device, checked_bundle(tmp_path, [value_use()]))
    report = BandwidthSection().run(subject, {})
    assert report["verdict"] == "pass"
    assert report["buffer_bytes"] == device.free_bytes() // 4
    assert report["gb_per_s"] > 0
    assert report["fill_gb_per_s"] > 0
    assert device.allocated == 0


def test_bandwidth_counts_each_byte_of_a_copy_twice(tmp_path):
    class Clock(HostDevice):
        def time(self, enqueue, *, warmup, replays):
            enqueue()
            return [8.0, 4.0, 4.0]

    subject = subject_of(Clock(), checked_bundle(tmp_path, [value_use()]))
    report = BandwidthSection().run(subject, {})
    size = 16 << 20  # a copy takes 1 ms
    assert report["gb_per_s"] == round(2 * size / 1e6, 2)
    assert report["fill_gb_per_s"] == round(size / 1e6, 2)
    assert report["node_us"] == 20.0
