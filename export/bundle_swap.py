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
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from runtime.manifest import MANIFEST_NAME, Manifest

logger = logging.getLogger(__name__)

LOCK_NAME = ".build-lock"


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
        # A swapped folder has another name now; what has the old name belongs to the next build.
        if _is_file_of(lock, folder / LOCK_NAME):
            _empty(folder)
            (folder / LOCK_NAME).unlink()
            with contextlib.suppress(OSError):  # the next build may have moved in already
                folder.rmdir()
        os.close(lock)


def swap(output: Path) -> None:
    """Put the complete work folder in the place of `output`.

    Raises:
        OSError: a folder cannot be moved; `output` is as it was.
    """
    folder, old = work_folder_of(output), old_folder_of(output)
    sync_tree(folder)
    move_aside = output.exists() and any(output.iterdir())
    if move_aside:
        output.rename(old)
    try:
        folder.rename(output)
    except OSError:
        if move_aside:
            old.rename(output)
        raise
    _sync(output.parent)
    try:
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
                f"{folder} is needed for the build, but holds files that no build put there; move "
                "it away"
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
    """Bring `output` and `output.old` into order; the caller holds the lock."""
    old, mark = old_folder_of(output), output / LOCK_NAME
    if mark.is_file():
        handle = os.open(mark, os.O_RDWR)
        try:
            if not _lock_at_once(handle):
                raise BundleWriteError(f"another build is writing {output}; wait for it to end")
            _finish(output)
        finally:
            os.close(handle)
    elif (old / MANIFEST_NAME).is_file() and not output.exists():
        old.rename(output)
        logger.warning("a build of %s was interrupted: restored the bundle that was there", output)
    elif old.exists():
        raise BundleWriteError(
            f"{old} is needed for the build, but is not from one that was interrupted; move it away"
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
    try:
        text = (old / MANIFEST_NAME).read_text(encoding="utf-8")
        bundle_files = {file.path for file in Manifest.from_json(text).files}
    except (OSError, ValueError):
        return
    bundle_files |= {MANIFEST_NAME, LOCK_NAME}
    for root, _, names in os.walk(old):
        for name in names:
            place = Path(root, name)
            relative = place.relative_to(old)
            target = output / relative
            if relative.as_posix() in bundle_files or target.exists():
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            place.rename(target)
            logger.info("kept %s, which is not part of the bundle", target)


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
