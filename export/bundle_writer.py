"""Build a bundle beside its place and put it there in one go, or leave what was there untouched."""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from export.bundle_swap import (
    LOCK_NAME,
    BundleWriteError,
    locked_work_folder,
    old_folder_of,
    recover,
    swap,
    work_folder_of,
)
from model.config import DogeConfig
from runtime.backends.base import Limits
from runtime.bundle import Bundle, sha256_of
from runtime.manifest import MANIFEST_NAME, BundleFile, FileRole, Manifest, Source, path_fault

__all__ = ["BundleWriteError", "BundleWriter", "recover", "same_source"]

logger = logging.getLogger(__name__)

# Many formats have a manifest.json with a version of the format; together these are ours alone.
_OUR_KEYS = ("format_version", "project_version", "weights_sha256")
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# onnx 1.23 and onnx-ir 1.1 refuse to read external data that has a second hard link.
_NEVER_LINKED = frozenset[FileRole](["onnx", "weights", "cpu"])
# Another file system, one without hard links, a file too often linked, or one that the kernel's
# fs.protected_hardlinks keeps others from linking.
_CANNOT_LINK = {errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}


class BundleWriter:
    """Builds one bundle: files go into `folder`, `publish` moves it to its place.

    Used as a context manager. Left without `publish`, by an exception or otherwise, it removes the
    work folder and the bundle that was at the place stays as it was.

    Attributes:
        output: where the bundle will be.
        folder: the work folder beside it.
        previous: the bundle that is there now, None when there is none or a broken one.
    """

    def __init__(self, output: Path, *, checkpoint: Path | None = None) -> None:
        """Name the place; nothing happens before the context is entered.

        Args:
            output: folder of the bundle; made, with its parents, when it does not exist.
            checkpoint: the checkpoint it is made from, which the bundle must not overlap.

        Raises:
            BundleWriteError: `output` cannot be a bundle's folder.
        """
        self.output = output.resolve()
        self.folder = work_folder_of(self.output) if self.output.name else self.output
        self.previous: Bundle | None = None
        self._files: dict[str, FileRole | BundleFile] = {}
        self._stack = ExitStack()
        self._published = False
        if not self.output.name:
            raise BundleWriteError(f"{output} cannot be a bundle's folder; choose one below it")
        if checkpoint is not None:
            _check_apart(self.output, checkpoint.resolve())

    def __enter__(self) -> Self:
        """Lock the place, tidy up after a killed build and open the bundle that is there.

        Raises:
            BundleWriteError: another build is at work, a file or a folder of something else is at
                the place, or nothing can be written there.
        """
        if self.output.exists() and not self.output.is_dir():
            raise BundleWriteError(f"{self.output} is a file, expected a folder or nothing")
        try:
            self.output.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BundleWriteError(
                f"cannot make the folder {self.output.parent}: {error}"
            ) from error
        with ExitStack() as stack:
            stack.enter_context(locked_work_folder(self.output))
            self.previous = _open_previous(self.output)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Remove the work folder unless it was published.

        Raises:
            BundleWriteError: the context was left because the disk is full.
        """
        cause = None if error is None or self._published else _disk_full_cause(error)
        report = "" if cause is None else self._disk_full_report(cause)  # before space is freed
        self._stack.close()
        if report:
            raise BundleWriteError(report) from error

    def path_for(self, relative: str) -> Path:
        """Where to write the new file `relative`: its folder is there, the file is not.

        A file adopted under that name is let go of. Writing into it would alter the previous bundle
        too, of which it is a hard link.
        """
        path = self.folder / _plain(relative)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        self._files.pop(relative, None)
        return path

    def add_file(self, role: FileRole, relative: str) -> None:
        """List a file that has been written into `folder`.

        Raises:
            FileNotFoundError: it is not there.
            ValueError: the bundle has a file of that name already.
        """
        if relative in self._files:
            raise ValueError(f"{relative} is in the bundle already")
        if not (self.folder / _plain(relative)).is_file():
            raise FileNotFoundError(f"{self.folder} has no file {relative} to add")
        self._files[relative] = role

    def link_or_copy(self, source: Path, relative: str, role: FileRole) -> Path:
        """Put `source` into the bundle: a hard link where that is possible and does, else a copy.

        Raises:
            FileNotFoundError: `source` is no file.
        """
        real = source.resolve()
        if not real.is_file():
            raise FileNotFoundError(f"{source} is no file, so it cannot go into the bundle")
        target = self.path_for(relative)
        _link_or_copy(real, target, role)
        self._files[relative] = role
        return target

    def adopt(
        self, previous: Bundle, wanted: Callable[[BundleFile], bool] = lambda file: True
    ) -> tuple[BundleFile, ...]:
        """Take the `wanted` files of an earlier bundle over, except those this one has already.

        They keep the hashes that the earlier manifest gives, so a file that was damaged since then
        does not pass for a good one.

        Returns:
            The files taken over.
        """
        taken = tuple(
            file
            for file in previous.manifest.files
            if file.path not in self._files and wanted(file)
        )
        for file in taken:
            target = self.path_for(file.path)
            _link_or_copy(previous.file(file.path).resolve(), target, file.role)
            self._files[file.path] = file
        return taken

    def publish(self, manifest: Manifest) -> Bundle:
        """Write the manifest and move the finished bundle to its place.

        Args:
            manifest: everything but `files`, which are filled in here.

        Returns:
            The bundle at its place.

        Raises:
            ValueError: the work folder holds a file that was not added, or the result would not
                open as a bundle; nothing is replaced.
            BundleWriteError: the folder cannot be moved to its place.
        """
        present = set(_files_below(self.folder))
        stray = sorted(present - set(self._files))
        if stray:
            raise ValueError(f"written into the bundle but not added to it: {', '.join(stray)}")
        files = tuple(self._describe(path) for path in sorted(self._files))
        text = dataclasses.replace(manifest, files=files).to_json()
        (self.folder / MANIFEST_NAME).write_text(text, encoding="utf-8")
        Bundle.open(self.folder)
        try:
            swap(self.output)
        except OSError as error:
            if error.errno in _DISK_FULL:
                raise
            raise BundleWriteError(f"cannot put the bundle at {self.output}: {error}") from error
        self._published = True
        return Bundle.open(self.output)

    def _describe(self, path: str) -> BundleFile:
        known = self._files[path]
        if isinstance(known, BundleFile):
            return known
        place = self.folder / path
        return BundleFile(
            path=path, bytes=place.stat().st_size, sha256=sha256_of(place), role=known
        )

    def _disk_full_report(self, error: BaseException) -> str:
        name = error.filename if isinstance(error, OSError) else None
        place = Path(os.fsdecode(name)).parent if isinstance(name, str | bytes) else self.folder
        place = place if place.is_dir() else self.output.parent
        free = shutil.disk_usage(place).free / 2**20
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        kept = f"; the bundle at {self.output} is as it was" if self.output.exists() else ""
        return (
            f"cannot write the bundle: {reason}, {free:,.0f} MiB are free in {place}; make room or "
            f"choose another --output{kept}"
        )


def same_source(
    previous: Manifest, source: Source, generation: str, config: DogeConfig, limits: Limits
) -> bool:
    """Whether files of the bundle `previous` still fit a build, so that it may add to them.

    If not, the build replaces the whole bundle.

    Args:
        previous: manifest of the bundle that is there.
        source: the checkpoint now built from; where it lies does not matter, its weights do.
        generation: name of its generation, which the weights alone may not tell.
        config: its architecture with the router mode asked for.
        limits: the limits asked for.
    """
    return (
        previous.source.weights_sha256 == source.weights_sha256
        and previous.generation == generation
        and previous.config == config.as_dict()
        and previous.limits == limits
    )


def _check_apart(output: Path, checkpoint: Path) -> None:
    for folder in (output, work_folder_of(output), old_folder_of(output)):
        if folder.is_relative_to(checkpoint) or checkpoint.is_relative_to(folder):
            raise BundleWriteError(
                f"the bundle at {output} would overlap the checkpoint {checkpoint}, which a build "
                "never changes; choose another --output"
            )


def _open_previous(output: Path) -> Bundle | None:
    """The bundle at `output`; None when nothing is there, or a broken bundle, which is told.

    Anything that is not known to be a bundle of ours is refused: a build never deletes it.
    """
    if not output.exists() or not any(output.iterdir()):
        return None
    try:
        return Bundle.open(output)
    except FileNotFoundError as error:
        raise BundleWriteError(
            f"{output} holds files but no {MANIFEST_NAME}, so it is no bundle and is not replaced; "
            "choose another --output or empty it"
        ) from error
    except ValueError as error:
        text = (output / MANIFEST_NAME).read_text(encoding="utf-8", errors="replace")
        if not all(f'"{key}"' in text for key in _OUR_KEYS):
            raise BundleWriteError(
                f"{output} holds a {MANIFEST_NAME} that cannot be told to be a bundle's, so it is "
                "not replaced; choose another --output, or delete it yourself"
            ) from error
        logger.warning("nothing of the earlier bundle can be kept, it will be replaced: %s", error)
        return None


def _plain(relative: str) -> str:
    fault = path_fault(relative)
    if fault:
        raise ValueError(f"path {relative!r} {fault}")
    return relative


def _link_or_copy(source: Path, target: Path, role: FileRole) -> None:
    if role in _NEVER_LINKED:
        shutil.copyfile(source, target)
        return
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _CANNOT_LINK:
            raise
        shutil.copyfile(source, target)


def _files_below(folder: Path) -> Iterator[str]:
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root, name).relative_to(folder).as_posix()
            if path not in {LOCK_NAME, MANIFEST_NAME}:
                yield path


def _disk_full_cause(error: BaseException) -> BaseException | None:
    """The error in the chain that says that a disk is full, a quota used up or a file too large.

    Libraries written in Rust, like safetensors, give the number in the text of their own errors.
    """
    link: BaseException | None = error
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        number = re.search(r"\(os error (\d+)\)", str(link))
        if isinstance(link, OSError) and link.errno in _DISK_FULL:
            return link
        if number is not None and int(number[1]) in _DISK_FULL:
            return link
        link = link.__cause__ or link.__context__
    return None
