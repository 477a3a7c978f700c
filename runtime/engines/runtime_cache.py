"""Kernels that TensorRT-RTX compiled for the GPU present, kept in the bundle for the next start.

The library compiles at the first run; a saved runtime cache spares the next process that. It is
worth nothing on another machine and may be deleted at any time. A file is written beside its place
and renamed into it, so that a process that dies meanwhile leaves the old one or none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from runtime.gpu.cuda_runtime import megabytes

logger = logging.getLogger(__name__)

CACHE_FOLDER = "runtime_cache"
_FORMAT = "doge runtime cache 1"
_UNFINISHED = ".unfinished"
# A file that a killed process left unfinished is removed when it is this old.
_LEFT_BEHIND_S = 3600


@dataclass(frozen=True, kw_only=True)
class CacheKey:
    """What a cache is good for; the library checks more of the machine by itself.

    Attributes:
        product: `tensorrt_rtx`.
        version: the product's.
        gpu: its name, in letters that a file name may have.
        target: its architecture, e.g. sm89.
        driver: CUDA version of the driver, e.g. 13.0.
        engine: sha256 of the engine.
    """

    product: str
    version: str
    gpu: str
    target: str
    driver: str
    engine: str

    @property
    def file_name(self) -> str:
        """The name of the cache's file."""
        words = (self.product, self.version, self.gpu, self.target, f"cuda{self.driver}")
        return "-".join((*words, self.engine[:16])) + ".cache"


class RuntimeCacheFile:
    """The file of one cache. Nothing that goes wrong with it is an error: one line of the log.

    Attributes:
        path: where it lies.
    """

    def __init__(self, bundle: Path, key: CacheKey) -> None:
        """Name the file in a bundle's folder; nothing is opened."""
        self.path = bundle / CACHE_FOLDER / key.file_name
        self._key = key
        self._read: bytes | None = None

    def read(self) -> bytes | None:
        """The cache as it was saved, None where there is none that fits."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self._refused(f"it cannot be read: {error.strerror}")
            return None
        head, _, payload = content.partition(b"\n")
        try:
            found = json.loads(head)
        except ValueError:
            self._refused("it is damaged")
            return None
        if found != self._head(payload):
            damaged = isinstance(found, dict) and found.get("key") == asdict(self._key)
            self._refused("it is damaged" if damaged else "it belongs to something else")
            return None
        self._read = payload
        return payload

    def refused(self) -> None:
        """Note that the library did not take what `read` gave."""
        self._read = None
        self._refused("the library does not take it (another driver, GPU or version)")

    def write(self, payload: bytes) -> None:
        """Save a cache, unless it is what `read` gave."""
        if payload == self._read:
            return
        head = json.dumps(self._head(payload), sort_keys=True).encode()
        try:
            self.path.parent.mkdir(exist_ok=True)
            self._remove_left_behind()
            self._replace(head + b"\n" + payload)
        except OSError as error:
            logger.info(
                "the runtime cache is not saved, the next start compiles again: %s: %s",
                self.path.parent,
                error.strerror,
            )
            return
        self._read = payload
        logger.info("runtime cache of %s saved: %s", megabytes(len(payload)), self.path)

    def _replace(self, content: bytes) -> None:
        handle, name = tempfile.mkstemp(_UNFINISHED, f"{self.path.name}.", self.path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise

    def _remove_left_behind(self) -> None:
        for path in self.path.parent.glob(f"*{_UNFINISHED}"):
            with contextlib.suppress(OSError):  # another process may remove it, too
                if time.time() - path.stat().st_mtime > _LEFT_BEHIND_S:
                    path.unlink()

    def _head(self, payload: bytes) -> dict[str, object]:
        return {
            "format": _FORMAT,
            "key": asdict(self._key),
            "sha256": hashlib.sha256(payload).hexdigest(),
        }

    def _refused(self, reason: str) -> None:
        logger.info("runtime cache %s is not used, the first run compiles: %s", self.path, reason)
