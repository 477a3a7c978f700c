"""What every part of a build starts from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from export.bundle_writer import BundleWriter
from export.progress import BuildProgress
from export.sources import Checkpoint
from model.doge import DogeForCausalLM
from runtime.backends.base import Limits
from runtime.bundle import Bundle


@dataclass(frozen=True, kw_only=True)
class BuildSetting:
    """One build: where it writes, what of, and what its models are held to.

    Attributes:
        writer: its folder holds the canonical model and gets what is made of it.
        checkpoint: what is built.
        limits: of every model in the folder.
        progress: is told the stages.
        adopted: the bundle whose parts are taken over, None for none.
        trained: whether the weights mean anything; quality is measured only then, or on a text.
        eval_text: a text to measure on; None samples one.
        load_network: the checkpoint's network, loaded when it is first asked for.
    """

    writer: BundleWriter
    checkpoint: Checkpoint
    limits: Limits
    progress: BuildProgress
    adopted: Bundle | None
    trained: bool
    eval_text: Path | None
    load_network: Callable[[], DogeForCausalLM]
