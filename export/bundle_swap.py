"""Replace one folder by another in one go, so that whoever is killed leaves the old or the new one.

Beside the target `X` two more names are used:

    X.building   the work folder; becomes X when it is complete
    X.old        the folder that stood at X, while the new one takes its place

The lock is a file in the work folder. There it needs no place of its own, two targets in one parent
do not block each other, and it disappears with the folder. After the swap it lies in the new `X`
until `X.old` is gone, which also marks that `X.old` is ours to delete. The kernel gives the lock
back when its holder dies.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from runtime.manifest import MANIFEST_NAME, Manifest

logger = logging.getLogger(__name__)

LOCK_NAME = ".build-lock"
# First parts of the paths that bundles use, for one whose manifest can no longer be read.
_BUNDLE_PARTS = frozenset(
    ["model.onnx", "model.onnx.data", "checkpoint", "tokenizer", "cpu", "engines", "kernels"]
)


class BundleWriteError(Exception):
    """A bundle cannot be written at the place asked for; the message says why and what to do."""


def work_folder_of(output: Path) -> Path:
    """The folder in which a bundle for `output` grows."""
    return output.with_name(f"{output.name}.building")


def old_folder_of(output: Path) -> Path:
    """Where the bundle at `output` stands while its successor takes its place."""
    return output.with_name(f"{output.name}.old")


def recover(output: Path) -> None:
    """Tidy up after a build for `output` that was killed; does nothing when none was.

    Afterwards `output` is the old bundle or the new one, whole, and its two side folders are gone.

    Raises:
        BundleWriteError: another build is writing `output`, or a folder with the name of a side
            folder is not from a build.
    """
    output = output.resolve()
    traces = (work_folder_of(output), old_folder_of(output), output / LOCK_NAME)
    if any(trace.exists() for trace in traces):
        with locked_work_folder(output):
            pass


@contextlib.contextmanager
def locked_work_folder(output: Path) -> Iterator[Path]:
    """An empty work folder for `output`, held alone; removed at the end unless it was swapped in.

    Recovers from a killed build first.

    Raises:
        BundleWriteError: as `recover`.
    """
    folder = work_folder_of(output)
    if importlib.util.find_spec("fcntl") is None:
        raise BundleWriteError(
            "this system cannot lock files (its Python has no fcntl); build on Linux and copy the "
            "bundle"
        )
    try:
        lock = _take_lock(output, folder)
    except OSError as error:
        raise BundleWriteError(f"cannot make and lock the work folder {folder}: {error}") from error
    try:
        try:
            _restore(output)
            _empty(folder)
        except OSError as error:
            raise BundleWriteError(
                f"cannot tidy up after an interrupted build of {output}: {error}"
            ) from error
        yield folder
    finally:
        try:
            # A swapped folder has another name; what has the old name belongs to the next build.
            if _is_file_of(lock, folder / LOCK_NAME):
                _empty(folder)
                (folder / LOCK_NAME).unlink()
                with contextlib.suppress(OSError):  # the next build may have moved in already
                    folder.rmdir()
        except OSError as error:  # the next build tries again; what ended this one matters more
            logger.warning("the work folder %s could not be removed: %s", folder, error)
        finally:
            os.close(lock)


def swap(output: Path) -> None:
    """Put the complete work folder in the place of `output`.

    Interrupted, it leaves either folder there, whole.

    Raises:
        OSError: a folder cannot be moved; `output` is as it was.
    """
    folder, old = work_folder_of(output), old_folder_of(output)
    sync_tree(folder)
    move_aside = output.exists() and any(output.iterdir())
    try:
        if move_aside:
            output.rename(old)
        folder.rename(output)
    except BaseException:
        if move_aside and not output.exists():
            old.rename(output)
        raise
    try:
        _sync(output.parent)
        _finish(output)
    except OSError as error:
        logger.warning("%s is complete, but %s could not be deleted: %s", output, old, error)


def sync_tree(folder: Path) -> None:
    """Have every file and folder below `folder` written to the disk."""
    for root, _, names in os.walk(folder):
        for name in names:
            _sync(Path(root, name))
        _sync(Path(root))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}:  # cannot be asked for
            raise
    finally:
        os.close(handle)


def _take_lock(output: Path, folder: Path) -> int:
    """Make the work folder and lock it; the open file that holds the lock."""
    while True:
        folder.mkdir(exist_ok=True)
        file = folder / LOCK_NAME
        if not file.exists() and any(folder.iterdir()):
            raise BundleWriteError(
                f"{folder} is needed for the build, but holds files that no build put there; "
                "give it another name"
            )
        try:
            lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            continue  # its holder has just removed the folder
        if not _lock_at_once(lock):
            os.close(lock)
            raise BundleWriteError(f"another build is writing {output}; wait for it to end")
        if _is_file_of(lock, file):
            return lock
        os.close(lock)  # its holder has just swapped or removed the folder


def _lock_at_once(handle: int) -> bool:
    import fcntl  # Windows has none, and must be able to say so

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_file_of(handle: int, path: Path) -> bool:
    """Whether `path` still names the open file."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _restore(output: Path) -> None:
    """Bring `output` and `output.old` into order; the caller holds the lock.

    A build killed between its two moves has left a complete work folder too. Without one,
    `output.old` may be a bundle that somebody put aside by hand under the name that people give to
    such things: restored, the build would replace it.
    """
    old, mark = old_folder_of(output), output / LOCK_NAME
    complete = (work_folder_of(output) / MANIFEST_NAME).is_file()
    if mark.is_file():
        handle = os.open(mark, os.O_RDWR)
        try:
            if not _lock_at_once(handle):
                raise BundleWriteError(f"another build is writing {output}; wait for it to end")
            _finish(output)
        finally:
            os.close(handle)
    elif complete and (old / MANIFEST_NAME).is_file() and not output.exists():
        old.rename(output)
        logger.warning("a build of %s was interrupted: restored the bundle that was there", output)
    elif old.exists():
        raise BundleWriteError(
            f"{old} is needed for the build, but is not from one that was interrupted; give it "
            "another name"
        )


def _finish(output: Path) -> None:
    """Delete `output.old` after a swap, then the mark. May be repeated when interrupted.

    Files in it that its manifest does not list are somebody's own: they move into `output`.
    """
    old = old_folder_of(output)
    if old.exists():
        _move_own_files(old, output)
        _delete(old)
    (output / LOCK_NAME).unlink(missing_ok=True)


def _move_own_files(old: Path, output: Path) -> None:
    is_bundle_file = _bundle_files(old)
    for root, folders, names in os.walk(old):
        links = [name for name in folders if Path(root, name).is_symlink()]
        for name in [*names, *links]:
            place = Path(root, name)
            relative = place.relative_to(old)
            target = output / relative
            if is_bundle_file(relative) or os.path.lexists(target):
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            place.rename(target)
            logger.info("kept %s, which is not part of the bundle", target)


def _bundle_files(old: Path) -> Callable[[Path], bool]:
    """Tells which relative paths belong to the bundle, by its manifest or else by their names."""
    try:
        text = (old / MANIFEST_NAME).read_text(encoding="utf-8")
        listed = {file.path for file in Manifest.from_json(text).files}
    except (OSError, ValueError):
        own = _BUNDLE_PARTS | {MANIFEST_NAME, LOCK_NAME}
        return lambda relative: relative.parts[0] in own
    listed |= {MANIFEST_NAME, LOCK_NAME}
    return lambda relative: relative.as_posix() in listed


def _empty(folder: Path) -> None:
    """Delete everything in `folder` but the lock."""
    for entry in folder.iterdir():
        if entry.name != LOCK_NAME:
            _delete(entry)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
