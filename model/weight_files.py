"""The names that weight files have in a checkpoint, and the index of several. No PyTorch.

What an index says is data from elsewhere: only names of safetensors files beside it are taken.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from model.config import UnsupportedModelError

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_SHARD = re.compile(r"\w[\w.-]*\.safetensors", re.ASCII)


def read_index(index: Path, described: str) -> dict[str, str]:
    """Which file beside the index holds each tensor.

    Args:
        index: the index file.
        described: what to call it in an error.

    Raises:
        UnsupportedModelError: not an index, an empty one, or names that are not those of
            safetensors files in its folder.
    """
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {str(tensor): str(file) for tensor, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnsupportedModelError(
            f"{described} is not an index of shards (an object with `weight_map`): {error}"
        ) from error
    if not files:
        raise UnsupportedModelError(f"{described} names no tensor; download it again")
    if outside := sorted({f for f in files.values() if Path(f).name != f or f in {".", ".."}}):
        raise UnsupportedModelError(f"{described} points out of its folder: {listed(outside)}")
    if pickles := sorted({f for f in files.values() if f.endswith(PICKLE_SUFFIXES)}):
        raise UnsupportedModelError(f"{described} names {pickle_reason(pickles)}")
    if wrong := sorted({f for f in files.values() if not _SHARD.fullmatch(f)}):
        raise UnsupportedModelError(
            f"{described} names {listed(wrong)}, expected safetensors files beside it"
        )
    return files


def pickle_reason(files: Iterable[str]) -> str:
    """Why these files are not read, and what to do."""
    return (
        f"{listed(files)}: pickle, which can run code when it is read, and is not; convert it to "
        "safetensors, or ask its authors to"
    )


def listed(names: Iterable[str]) -> str:
    """The first few names; others wrote them, so what a terminal would obey is escaped."""
    shown = [name if name.isprintable() else repr(name) for name in names]
    more = f" and {len(shown) - 5} more" if len(shown) > 5 else ""
    return ", ".join(shown[:5]) + more
