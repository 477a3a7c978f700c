"""The launch manifest of a bundle's kernels, and what a GPU is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from plugins.kernel_spec import KernelSpec
from plugins.launcher import Device
from runtime.backends.base import BackendUnavailableError
from runtime.kernel_library import (
    KERNEL_FOLDER,
    KERNEL_MANIFEST,
    KernelEntry,
    KernelLibrary,
    OpUse,
    source_sha256,
)

SPEC = KernelSpec(
    name="k",
    function="plugins.value_gather.kernel:k",
    arguments={"x": "*fp16", "n": "i32"},
    constants={"BLOCK": 64, "SELECT": False},
    grid=("ceil(n / 64)", "1", "1"),
)
ADA = Device(name="an RTX 4090", compute_capability=(8, 9), driver_version=(13, 0))
USE = OpUse(
    op="ValueGather",
    attributes={"top_k": 2, "subset_sums": 0},
    shapes={"scores": (-1, 2, 4), "table": (4, 64), "inner_values": (-1, 64)},
    dtypes=dict.fromkeys(("scores", "table", "inner_values"), "float16"),
    nodes=3,
)


def cubin(target, name="k"):
    return f"{name} for {target}".encode()


def entry(target="sm89", name="k", toolkit="12.9"):
    return KernelEntry(
        name=name,
        target=target,
        file=f"{name}.{target}.cubin",
        sha256=hashlib.sha256(cubin(target, name)).hexdigest(),
        entry="k_entry",
        threads=128,
        shared_bytes=0,
        arguments=tuple(SPEC.arguments.items()),
        constants=dict(SPEC.constants),
        grid=SPEC.grid,
        toolkit=toolkit,
        source_sha256=source_sha256(SPEC.function),
    )


@pytest.fixture
def written(tmp_path):
    """Writes a library of these entries; gives the bundle's folder."""

    def write(*entries):
        folder = tmp_path / KERNEL_FOLDER
        folder.mkdir()
        library = KernelLibrary(folder=folder, triton_version="3.9.0", uses=(USE,), entries=entries)
        for item in entries:
            (folder / item.file).write_bytes(cubin(item.target, item.name))
        (tmp_path / KERNEL_MANIFEST).write_text(library.to_json())
        return tmp_path

    return write


def altered(folder, change):
    path = folder / KERNEL_MANIFEST
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    return folder


def test_library_is_read_as_it_was_written(written):
    entries = (entry("sm86"), entry("sm89"))
    library = KernelLibrary.open(written(*entries))
    assert library.entries == entries
    assert library.uses == (USE,)
    assert library.targets == ("sm86", "sm89")
    (spec,) = library.uses[0].make_kernels().specs
    assert spec.function.startswith("plugins.value_gather.kernel:")


def test_code_of_the_nearest_older_target_is_chosen(written):
    library = KernelLibrary.open(written(entry("sm80"), entry("sm86"), entry("sm90")))
    (binary,) = library.binaries_for(ADA)
    assert binary.cubin == cubin("sm86")
    assert (binary.threads, binary.arguments) == (128, SPEC.arguments)


def test_gpu_older_than_the_code_is_refused_with_the_command(written):
    library = KernelLibrary.open(written(entry("sm89"), entry("sm120")))
    turing = Device(name="a T4", compute_capability=(7, 5), driver_version=(13, 0))
    with pytest.raises(BackendUnavailableError) as refusal:
        library.binaries_for(turing)
    assert "a T4 is sm75, the bundle's kernels are for sm120, sm89" in str(refusal.value)
    assert "--target sm75 --precision fp16" in str(refusal.value)


def test_gpu_that_has_code_for_some_kernels_only_is_refused(written):
    library = KernelLibrary.open(written(entry("sm89"), entry("sm90", name="other")))
    with pytest.raises(BackendUnavailableError, match="1 of 2 have no code"):
        library.binaries_for(ADA)


def test_code_for_a_later_architecture_is_for_that_very_gpu(written):
    library = KernelLibrary.open(written(entry("sm120")))
    spark = Device(name="a GB10", compute_capability=(12, 1), driver_version=(13, 0))
    with pytest.raises(BackendUnavailableError, match="--target sm121"):
        library.binaries_for(spark)


def test_only_the_kernels_that_are_wanted_must_have_code(written):
    library = KernelLibrary.open(written(entry("sm89"), entry("sm90", name="other")))
    (binary,) = library.binaries_for(ADA, frozenset(["k"]))
    assert binary.name == "k"


def test_driver_too_old_for_the_code_is_refused(written):
    library = KernelLibrary.open(written(entry("sm90", toolkit="13.4")))
    old = Device(name="an H100", compute_capability=(9, 0), driver_version=(12, 8))
    with pytest.raises(BackendUnavailableError, match=r"up to CUDA 12\.8.*by CUDA 13"):
        library.binaries_for(old)


def test_altered_cubin_is_refused(written):
    folder = written(entry())
    library = KernelLibrary.open(folder)
    (folder / KERNEL_FOLDER / entry().file).write_bytes(b"other machine code")
    with pytest.raises(ValueError, match=r"refusing to load .*sha256 is"):
        library.binaries_for(ADA)


def test_missing_cubin_is_named(written):
    folder = written(entry())
    (folder / KERNEL_FOLDER / entry().file).unlink()
    with pytest.raises(ValueError, match=r"k\.sm89\.cubin is missing"):
        KernelLibrary.open(folder).binaries_for(ADA)


def test_manifest_of_another_format_is_refused(written):
    folder = altered(written(entry()), lambda data: data.update(format=7))
    with pytest.raises(ValueError, match="has format 7, this version of the project reads 1"):
        KernelLibrary.open(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data["kernels"][0].pop("grid"), r"kernels\[0\]\.grid is missing"),
        (lambda data: data["kernels"][0].update(target="ada"), "target 'ada'"),
        (lambda data: data["kernels"][0].update(file="../k.cubin"), "expected a plain name"),
        (lambda data: data["kernels"][0].update(grid=["n"]), "expected three rules"),
        (lambda data: data["kernels"][0].update(arguments=[["x"]]), "no pairs"),
        (lambda data: data["kernels"][0].update(toolkit="new"), "toolkit 'new'"),
        (lambda data: data.update(extra=1), "extra is an unknown key"),
        (lambda data: data["uses"][0].update(nodes="3"), r"uses\[0\]\.nodes is text"),
    ],
)
def test_broken_manifest_says_what_is_wrong(written, change, message):
    folder = altered(written(entry()), change)
    with pytest.raises(ValueError, match=message):
        KernelLibrary.open(folder)


def test_bundle_without_kernels_says_how_to_build_them(tmp_path):
    with pytest.raises(BackendUnavailableError, match=r"build_kernels\.py BUNDLE --target sm89"):
        KernelLibrary.open(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "other"}, "other is missing"),
        ({"constants": {"BLOCK": 32, "SELECT": False}}, "by another version"),
        ({"arguments": {"n": "i32", "x": "*fp16"}}, "by another version"),
        ({"grid": ("n", "1", "1")}, "by another version"),
        ({"num_warps": 8}, "by another version"),
        ({"function": "plugins.expert_gather.kernel:k"}, "by another version"),
    ],
)
def test_kernels_of_another_specification_do_not_serve(written, changes, message):
    library = KernelLibrary.open(written(entry()))
    library.require([SPEC])
    values = {name: getattr(SPEC, name) for name in SPEC.__dataclass_fields__} | changes
    with pytest.raises(ValueError, match=message):
        library.require([KernelSpec(**values)])


def test_unknown_op_is_named():
    use = OpUse(op="Other", attributes={}, shapes={}, dtypes={}, nodes=1)
    with pytest.raises(ValueError, match="no custom op is called Other"):
        use.make_kernels()


def test_a_kernels_hash_is_of_all_source_of_ours_that_it_takes(tmp_path, monkeypatch):
    sources = {
        "one": "import triton\nfrom some_ops.two import a\n",
        "two": "from some_ops.three import b\n",
        "three": "from some_ops.one import c\nfrom os import path\n",
        "four": "",
    }
    folder = tmp_path / "some_ops"
    folder.mkdir()
    for name, text in {"__init__": "", **sources}.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))

    def hash_now():
        source_sha256.cache_clear()
        return source_sha256("some_ops.one:a_kernel")

    before = hash_now()
    assert hash_now() == before
    changed = set()
    for name, text in sources.items():
        (folder / f"{name}.py").write_text(text + "# changed\n")
        if hash_now() != before:
            changed.add(name)
        (folder / f"{name}.py").write_text(text)
    assert changed == {"one", "two", "three"}
    (folder / "two.py").unlink()
    with pytest.raises(ValueError, match=r"no source of the kernels in some_ops\.two"):
        hash_now()
    source_sha256.cache_clear()


def test_kernels_that_share_code_notice_its_change(monkeypatch):
    read = Path.read_bytes
    edited = Path("plugins/projection/kernel.py")

    def read_edited(path):
        return read(path) + (b"#" if path.parts[-3:] == edited.parts else b"")

    functions = ("plugins.expert_down.kernel:f", "plugins.row_norm.kernel:f")
    source_sha256.cache_clear()
    before = [source_sha256(function) for function in functions]
    source_sha256.cache_clear()
    monkeypatch.setattr(Path, "read_bytes", read_edited)
    after = [source_sha256(function) for function in functions]
    source_sha256.cache_clear()
    assert [a == b for a, b in zip(after, before, strict=True)] == [False, True]
