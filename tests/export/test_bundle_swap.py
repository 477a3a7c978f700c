import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from export import bundle_swap
from export.bundle_swap import BundleWriteError, recover
from export.bundle_writer import BundleWriter
from tests.fake_bundle import build_fake_bundle as build
from tests.fake_bundle import names_in, weights_of

REPOSITORY = Path(__file__).parents[2]


@contextmanager
def killed_builder(output: Path, code: str) -> Iterator[subprocess.Popen[str]]:
    """A process that holds a writer for `output`, runs `code` and waits; killed at the end."""
    script = (
        "import sys, time; from pathlib import Path\n"
        "from export.bundle_writer import BundleWriter\n"
        "with BundleWriter(Path(sys.argv[1])) as writer:\n"
        f"    {code}\n"
        "    print('ready', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(output)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            process.kill()


def test_somebodys_own_files_in_a_bundle_survive_the_next_build(tmp_path):
    output = build(tmp_path / "tiny", b"old").path
    (output / "notes.txt").write_text("mine")
    (output / "prompts").symlink_to(tmp_path)
    (output / "runs" / "monday").mkdir(parents=True)
    (output / "runs" / "monday" / "logits.npy").write_text("mine too")
    build(output, b"new")
    assert weights_of(output) == b"new"
    assert (output / "notes.txt").read_text() == "mine"
    assert (output / "runs/monday/logits.npy").read_text() == "mine too"
    assert (output / "prompts").is_symlink()
    assert (tmp_path / "tiny").is_dir()


def test_a_bundle_put_aside_by_hand_as_old_is_neither_restored_nor_replaced(tmp_path):
    build(tmp_path / "tiny", b"backup").path.rename(tmp_path / "tiny.old")
    for action in (build, recover):
        with pytest.raises(BundleWriteError, match=r"tiny.old is needed .* give it another name"):
            action(tmp_path / "tiny")
    assert names_in(tmp_path) == ["tiny.old"]
    assert weights_of(tmp_path / "tiny.old") == b"backup"


@pytest.mark.parametrize("suffix", ["old", "building"])
def test_a_folder_of_somebody_with_the_name_of_a_side_folder_is_left_alone(tmp_path, suffix):
    build(tmp_path / "tiny", b"old")
    (tmp_path / f"tiny.{suffix}").mkdir()
    (tmp_path / f"tiny.{suffix}" / "thesis.txt").write_text("mine")
    for action in (build, recover):
        with pytest.raises(
            BundleWriteError, match=rf"tiny.{suffix} is needed .* give it another name"
        ):
            action(tmp_path / "tiny")
    assert (tmp_path / f"tiny.{suffix}" / "thesis.txt").read_text() == "mine"
    assert weights_of(tmp_path / "tiny") == b"old"
    assert names_in(tmp_path) == ["tiny", f"tiny.{suffix}"]


def test_a_folder_that_cannot_be_moved_into_place_leaves_the_old_bundle_there(
    tmp_path, monkeypatch
):
    build(tmp_path / "tiny", b"old")
    rename = Path.rename

    def refuse(self, target):
        if self.name == "tiny.building":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(BundleWriteError, match=r"cannot put the bundle at .*busy"):
        build(tmp_path / "tiny", b"new")
    assert weights_of(tmp_path / "tiny") == b"old"
    assert names_in(tmp_path) == ["tiny"]


def test_an_old_bundle_that_cannot_be_deleted_is_told_and_deleted_by_the_next_build(
    tmp_path, monkeypatch, caplog
):
    build(tmp_path / "tiny", b"old")

    def refuse(path):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    with monkeypatch.context() as patch:
        patch.setattr(bundle_swap, "_delete", refuse)
        build(tmp_path / "tiny", b"new")
    assert "tiny.old could not be deleted" in caplog.text
    assert weights_of(tmp_path / "tiny") == b"new"
    recover(tmp_path / "tiny")
    assert weights_of(tmp_path / "tiny") == b"new"
    assert names_in(tmp_path) == ["tiny"]


def test_a_system_that_cannot_lock_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.raises(BundleWriteError, match="cannot lock files"):
        build(tmp_path / "tiny")
    assert names_in(tmp_path) == []


def test_a_work_folder_that_cannot_be_removed_does_not_hide_what_ended_the_build(
    tmp_path, monkeypatch, caplog
):
    def refuse(folder):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    with (
        pytest.raises(RuntimeError, match="export failed"),
        monkeypatch.context() as patch,
        BundleWriter(tmp_path / "tiny"),
    ):
        patch.setattr(bundle_swap, "_empty", refuse)
        raise RuntimeError("export failed")
    assert "tiny.building could not be removed" in caplog.text
    build(tmp_path / "tiny")
    assert names_in(tmp_path) == ["tiny"]


def test_a_second_builder_of_the_same_bundle_is_refused_until_the_first_ends(tmp_path):
    output = build(tmp_path / "tiny", b"old").path
    with BundleWriter(output):
        with pytest.raises(BundleWriteError, match=f"another build is writing {output}"):
            build(output)
        with pytest.raises(BundleWriteError, match="another build is writing"):
            recover(output)
        build(tmp_path / "neighbour")
    build(output, b"new")
    assert weights_of(output) == b"new"


def test_a_builder_in_another_process_holds_the_lock_until_it_is_killed(tmp_path):
    output = build(tmp_path / "tiny", b"old").path
    with killed_builder(output, "writer.path_for('model.onnx').write_bytes(b'half')"):
        with pytest.raises(BundleWriteError, match="another build is writing"):
            build(output, b"new")
        assert weights_of(output) == b"old"
    assert names_in(tmp_path) == ["tiny", "tiny.building"]
    recover(output)
    assert names_in(tmp_path) == ["tiny"]
    assert weights_of(output) == b"old"


KILLED, INTERRUPTED = -signal.SIGKILL, 130


def build_until(ending: int, output: Path, content: bytes, events: int) -> bool:
    """Build in a child that is ended at its file operation number `events`; whether it was.

    Interrupted, it gets to tidy up as after Ctrl+C.
    """
    child = os.fork()
    if child == 0:
        seen = 0
        changes = ("os.", "open", "shutil.")

        def count(event: str, arguments: object) -> None:
            nonlocal seen
            if event.startswith(changes) and str(output) in repr(arguments):
                seen += 1
                if seen == events and ending == INTERRUPTED:
                    raise KeyboardInterrupt
                if seen == events:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(count)
            build(output, content)
            os._exit(0)
        except KeyboardInterrupt:
            os._exit(INTERRUPTED)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    found = os.waitstatus_to_exitcode(status)
    assert found in {0, ending}
    return found == ending


def test_interrupted_at_any_moment_a_whole_bundle_is_there_before_any_recovery(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(bundle_swap, "sync_tree", lambda folder: None)  # changes nothing, but slow
    seen = set()
    events, running = 0, True
    while running:
        events += 1
        output = build(tmp_path / str(events) / "tiny", b"old").path
        running = build_until(INTERRUPTED, output, b"new", events)
        found = weights_of(output)
        recover(output)
        assert weights_of(output) == found
        assert names_in(output.parent) == ["tiny"]
        seen.add(found)
    assert events > 30
    assert seen == {b"old", b"new"}


@pytest.mark.parametrize("first", [True, False], ids=["nothing before", "a bundle before"])
def test_killed_at_any_moment_the_old_or_the_new_bundle_is_there_after_recovery(
    tmp_path, monkeypatch, first
):
    monkeypatch.setattr(bundle_swap, "sync_tree", lambda folder: None)  # changes nothing, but slow
    seen = set()
    events, running = 0, True
    while running:
        events += 1
        output = tmp_path / str(events) / "tiny"
        if not first:
            build(output, b"old")
            (output / "notes.txt").write_text("mine")
        running = build_until(KILLED, output, b"new", events)
        moved_aside = not output.exists() and output.with_name("tiny.old").exists()
        recover(output)
        if output.exists():
            content = weights_of(output)
            assert content in ({b"new"} if first else {b"old", b"new"})
            assert first or (output / "notes.txt").read_text() == "mine"
            assert names_in(output.parent) == ["tiny"]
            assert not (output / bundle_swap.LOCK_NAME).exists()
            seen.add((content, moved_aside))
        else:
            assert first
            assert not output.parent.exists() or names_in(output.parent) == []
    assert events > 30
    assert weights_of(output) == b"new"
    assert seen == (
        {(b"new", False)} if first else {(b"old", False), (b"old", True), (b"new", False)}
    )


def test_the_next_build_recovers_by_itself_from_one_killed_between_the_two_moves(tmp_path, caplog):
    output = build(tmp_path / "tiny", b"old").path
    code = (
        "(writer.folder / 'manifest.json').touch(); "
        "writer.output.rename(writer.output.with_name('tiny.old'))"
    )
    with killed_builder(output, code):
        pass
    assert names_in(tmp_path) == ["tiny.building", "tiny.old"]
    with BundleWriter(output) as writer:
        assert writer.previous is not None
        assert weights_of(output) == b"old"
    assert "restored the bundle that was there" in caplog.text
    assert names_in(tmp_path) == ["tiny"]


def test_recovering_where_nothing_happened_changes_nothing(tmp_path):
    recover(tmp_path / "nowhere" / "tiny")
    build(tmp_path / "tiny")
    recover(tmp_path / "tiny")
    assert names_in(tmp_path) == ["tiny"]
