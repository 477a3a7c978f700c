import dataclasses
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import onnx_ir as ir
import pytest

from export import bundle_writer
from export.bundle_writer import BundleWriteError, BundleWriter, same_source
from runtime.bundle import Bundle
from tests.fake_bundle import (
    CONFIG,
    FILES,
    LIMITS,
    SOURCE,
    fake_manifest,
    names_in,
    weights_of,
    write_fake_bundle,
)
from tests.fake_bundle import build_fake_bundle as build

REPOSITORY = Path(__file__).parents[2]


def test_a_published_bundle_opens_and_nothing_else_is_left(tmp_path):
    output = tmp_path / "build" / "tiny"
    bundle = build(output)
    assert bundle.path == output
    assert weights_of(output) == b"weights"
    assert names_in(tmp_path / "build") == ["tiny"]
    assert sorted(file.path for file in bundle.manifest.files) == sorted(FILES)
    listed = {file.path for file in bundle.manifest.files} | {"manifest.json"}
    found = {p.relative_to(output).as_posix() for p in output.rglob("*") if p.is_file()}
    assert found == listed


def test_the_manifest_is_the_same_for_the_same_content(tmp_path):
    first = build(tmp_path / "a").path / "manifest.json"
    second = build(tmp_path / "b").path / "manifest.json"
    assert first.read_bytes() == second.read_bytes()


def test_a_second_build_replaces_the_first(tmp_path):
    build(tmp_path / "tiny", b"old")
    build(tmp_path / "tiny", b"new")
    assert weights_of(tmp_path / "tiny") == b"new"
    assert names_in(tmp_path) == ["tiny"]


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "tiny").mkdir()
    build(tmp_path / "tiny")
    assert weights_of(tmp_path / "tiny") == b"weights"
    assert names_in(tmp_path) == ["tiny"]


def test_a_place_that_is_a_link_stays_a_link(tmp_path):
    build(tmp_path / "tiny", b"old")
    (tmp_path / "latest").symlink_to("tiny")
    build(tmp_path / "latest", b"new")
    assert (tmp_path / "latest").is_symlink()
    assert weights_of(tmp_path / "tiny") == b"new"


@pytest.mark.parametrize("error", [RuntimeError("export failed"), KeyboardInterrupt()])
def test_leaving_by_an_exception_keeps_the_old_bundle_and_removes_the_work_folder(tmp_path, error):
    build(tmp_path / "tiny", b"old")
    with pytest.raises(type(error)), BundleWriter(tmp_path / "tiny") as writer:
        writer.path_for("cpu/fp32.onnx").write_bytes(b"half")
        raise error
    assert weights_of(tmp_path / "tiny") == b"old"
    assert names_in(tmp_path) == ["tiny"]


def test_leaving_without_publish_writes_nothing(tmp_path):
    with BundleWriter(tmp_path / "tiny") as writer:
        assert writer.previous is None
    assert names_in(tmp_path) == []


def test_a_manifest_that_does_not_fit_the_files_replaces_nothing(tmp_path):
    build(tmp_path / "tiny", b"old")
    with (
        pytest.raises(ValueError, match="no listed file is"),
        BundleWriter(tmp_path / "tiny") as writer,
    ):
        writer.path_for("model.onnx").write_bytes(b"graph")
        writer.add_file("onnx", "model.onnx")
        writer.publish(fake_manifest())
    assert weights_of(tmp_path / "tiny") == b"old"
    assert names_in(tmp_path) == ["tiny"]


def test_a_file_written_but_not_added_is_pointed_out(tmp_path):
    with (
        pytest.raises(ValueError, match=r"not added to it: cpu/fp32.onnx"),
        BundleWriter(tmp_path / "tiny") as writer,
    ):
        writer.path_for("cpu/fp32.onnx").write_bytes(b"graph")
        writer.publish(fake_manifest())


def test_a_file_added_before_it_is_written_twice_or_outside_is_refused(tmp_path):
    with BundleWriter(tmp_path / "tiny") as writer:
        with pytest.raises(FileNotFoundError, match=r"no file model.onnx to add"):
            writer.add_file("onnx", "model.onnx")
        writer.path_for("model.onnx").touch()
        writer.add_file("onnx", "model.onnx")
        with pytest.raises(ValueError, match=r"model.onnx is in the bundle already"):
            writer.add_file("onnx", "model.onnx")
        with pytest.raises(ValueError, match=r"contains `..`"):
            writer.path_for("../model.onnx")


def test_a_checkpoint_file_is_linked_and_a_link_to_it_is_followed(tmp_path):
    blob = tmp_path / "blob"
    blob.write_bytes(b"tensors")
    (tmp_path / "model.safetensors").symlink_to(blob)
    with BundleWriter(tmp_path / "tiny") as writer:
        path = "checkpoint/model.safetensors"
        target = writer.link_or_copy(tmp_path / "model.safetensors", path, "checkpoint")
        assert not target.is_symlink()
        assert target.samefile(blob)


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK])
def test_a_checkpoint_file_is_copied_where_it_cannot_be_linked(tmp_path, monkeypatch, number):
    def refuse(source, target):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "source").write_bytes(b"tensors")
    with BundleWriter(tmp_path / "tiny") as writer:
        target = writer.link_or_copy(tmp_path / "source", "checkpoint/weights", "checkpoint")
        assert target.read_bytes() == b"tensors"
        assert not target.samefile(tmp_path / "source")


def test_a_missing_checkpoint_file_is_named(tmp_path):
    with BundleWriter(tmp_path / "tiny") as writer, pytest.raises(FileNotFoundError, match="gone"):
        writer.link_or_copy(tmp_path / "gone", "checkpoint/gone", "checkpoint")


def add_variant(output: Path) -> Bundle:
    """Build another engine into a bundle and keep everything else."""
    with BundleWriter(output) as writer:
        assert writer.previous is not None
        writer.adopt(writer.previous, lambda file: file.role != "engine")
        path = "engines/tensorrt_rtx-sm89-fp16.engine"
        writer.path_for(path).write_bytes(b"new machine code")
        writer.add_file("engine", path)
        return writer.publish(fake_manifest())


def test_adopted_files_keep_their_hashes_and_are_links_but_for_onnx_models(tmp_path):
    old = build(tmp_path / "tiny")
    inodes = {path: old.file(path).stat().st_ino for path in FILES}
    new = add_variant(tmp_path / "tiny")
    linked = {path for path in FILES if new.file(path).stat().st_ino == inodes[path]}
    assert linked == {
        path for path, (role, _) in FILES.items() if role in {"checkpoint", "tokenizer"}
    }
    assert new.altered_files() == ()
    assert new.executable_file(new.variant("tensorrt_rtx")).read_bytes() == b"new machine code"


def test_adopted_weights_can_be_read_by_onnx_while_the_previous_bundle_is_there(tmp_path):
    build(tmp_path / "tiny")
    values = numpy.arange(100, dtype=numpy.float32)
    with BundleWriter(tmp_path / "tiny") as writer:
        tensor = ir.Value(name="w", const_value=ir.tensor(values, name="w"))
        graph = ir.Graph([], [], nodes=[], initializers=[tensor], opset_imports={"": 24})
        path = writer.path_for("model.onnx")
        weights = writer.path_for("model.onnx.data")
        ir.save(ir.Model(graph, ir_version=10), path, external_data=weights.name)
        for role, name in (("onnx", path.name), ("weights", weights.name)):
            writer.add_file(role, name)
        assert writer.previous is not None
        writer.adopt(writer.previous)
        writer.publish(fake_manifest())
    with BundleWriter(tmp_path / "tiny") as writer:
        assert writer.previous is not None
        writer.adopt(writer.previous)
        initializer = ir.load(writer.folder / "model.onnx").graph.initializers["w"]
        assert initializer.const_value is not None
        numpy.testing.assert_array_equal(initializer.const_value.numpy(), values)


def test_a_file_damaged_since_the_last_build_does_not_pass_for_a_good_one_when_adopted(tmp_path):
    build(tmp_path / "tiny").file("model.onnx.data").write_bytes(b"WEIGHTS")
    (problem,) = add_variant(tmp_path / "tiny").altered_files()
    assert problem.startswith("model.onnx.data has sha256")


def test_writing_a_file_anew_after_adopting_it_leaves_the_previous_bundle_alone(tmp_path):
    build(tmp_path / "tiny", b"old")
    with BundleWriter(tmp_path / "tiny") as writer:
        assert writer.previous is not None
        writer.adopt(writer.previous)
        writer.path_for("model.onnx.data").write_bytes(b"new")
        assert weights_of(tmp_path / "tiny") == b"old"
        writer.add_file("weights", "model.onnx.data")
        writer.publish(fake_manifest())
    assert weights_of(tmp_path / "tiny") == b"new"


def test_a_broken_bundle_is_replaced_with_one_warning(tmp_path, caplog):
    output = build(tmp_path / "tiny").path
    (output / "manifest.json").write_text((output / "manifest.json").read_text()[:-20])
    (output / "notes.txt").write_text("mine")
    with BundleWriter(output) as writer:
        assert writer.previous is None
    assert len(caplog.messages) == 1
    assert "will be replaced" in caplog.messages[0]
    build(output, b"new")
    assert weights_of(output) == b"new"
    assert (output / "notes.txt").read_text() == "mine"
    assert names_in(tmp_path) == ["tiny"]


def test_a_file_at_the_place_is_refused(tmp_path):
    (tmp_path / "tiny").write_text("mine")
    with pytest.raises(BundleWriteError, match="tiny is a file"):
        build(tmp_path / "tiny")
    assert (tmp_path / "tiny").read_text() == "mine"
    assert names_in(tmp_path) == ["tiny"]


def test_a_parent_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "build").write_text("mine")
    with pytest.raises(BundleWriteError, match=r"cannot make the folder .*build"):
        build(tmp_path / "build" / "tiny")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("thesis.txt", "mine", "no bundle and is not replaced"),
        ("manifest.json", json.dumps({"name": "a browser extension"}), "cannot be told"),
        ("manifest.json", json.dumps({"format_version": 2, "header": {}}), "cannot be told"),
        ("manifest.json", "name: x", "cannot be told"),
    ],
)
def test_a_folder_that_is_no_bundle_is_never_replaced(tmp_path, name, text, message):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "model.onnx").write_text("mine too")
    (tmp_path / "work" / name).write_text(text)
    with pytest.raises(BundleWriteError, match=message):
        build(tmp_path / "work")
    assert (tmp_path / "work" / name).read_text() == text
    assert (tmp_path / "work" / "model.onnx").read_text() == "mine too"
    assert names_in(tmp_path) == ["work"]


@pytest.mark.parametrize("place", ["checkpoint", "checkpoint/bundle", ".", "link"])
def test_a_place_that_overlaps_the_checkpoint_is_refused(tmp_path, place):
    checkpoint = tmp_path / "models" / "checkpoint"
    checkpoint.mkdir(parents=True)
    (checkpoint.parent / "link").symlink_to(checkpoint)
    with pytest.raises(BundleWriteError, match="would overlap the checkpoint"):
        build(checkpoint.parent / place, checkpoint=checkpoint)
    assert names_in(checkpoint) == []


def test_a_bundle_beside_its_checkpoint_is_built(tmp_path):
    (tmp_path / "tiny-checkpoint").mkdir()
    build(tmp_path / "tiny", checkpoint=tmp_path / "tiny-checkpoint")
    assert weights_of(tmp_path / "tiny") == b"weights"


def test_the_root_is_refused():
    with pytest.raises(BundleWriteError, match="cannot be a bundle's folder"):
        BundleWriter(Path("/"))


def test_the_error_of_a_full_disk_says_how_much_is_free_and_keeps_the_old_bundle(
    tmp_path, monkeypatch
):
    build(tmp_path / "tiny", b"old")

    def fill(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(bundle_writer, "sha256_of", fill)
    with pytest.raises(BundleWriteError, match=r"No space left on device, [\d,]+ MiB are free in"):
        build(tmp_path / "tiny", b"new")
    assert weights_of(tmp_path / "tiny") == b"old"
    assert names_in(tmp_path) == ["tiny"]


def test_a_full_disk_is_seen_through_the_errors_of_libraries(tmp_path):
    with pytest.raises(BundleWriteError, match="os error 28"), BundleWriter(tmp_path / "tiny"):
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    with pytest.raises(BundleWriteError, match="No space left"), BundleWriter(tmp_path / "tiny"):
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise RuntimeError("the exporter failed") from error


def test_another_error_of_the_system_stays_what_it_is(tmp_path):
    with pytest.raises(IsADirectoryError), BundleWriter(tmp_path / "tiny"):
        tmp_path.read_bytes()


def test_a_limit_on_the_size_of_files_ends_the_build_and_keeps_the_old_bundle(tmp_path):
    build(tmp_path / "tiny", b"old")
    script = (
        "import resource, sys; from pathlib import Path\n"
        "from export.bundle_writer import BundleWriteError, BundleWriter\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n"
        "    with BundleWriter(Path(sys.argv[1])) as writer:\n"
        "        writer.path_for('model.onnx.data').write_bytes(bytes(200_000))\n"
        "except BundleWriteError as error:\n"
        "    print(error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "tiny")],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert "File too large" in result.stdout, result.stderr
    assert "is as it was" in result.stdout
    assert weights_of(tmp_path / "tiny") == b"old"
    assert names_in(tmp_path) == ["tiny"]


def test_files_are_kept_for_the_same_weights_architecture_and_limits_alone(tmp_path):
    manifest = Bundle.open(write_fake_bundle(tmp_path / "tiny")).manifest
    moved = dataclasses.replace(SOURCE, kind="hub", name="org/tiny", revision="main")
    assert same_source(manifest, SOURCE, "g4", CONFIG, LIMITS)
    assert same_source(manifest, moved, "g4", CONFIG, LIMITS)
    others = [
        (dataclasses.replace(SOURCE, weights_sha256="1" * 64), "g4", CONFIG, LIMITS),
        (SOURCE, "g4h", CONFIG, LIMITS),
        (SOURCE, "g4", dataclasses.replace(CONFIG, rope_theta=5000.0), LIMITS),
        (SOURCE, "g4", CONFIG.with_router_mode("per_token"), LIMITS),
        (SOURCE, "g4", CONFIG, dataclasses.replace(LIMITS, max_batch_size=8)),
    ]
    assert not any(same_source(manifest, *other) for other in others)
