"""The published G4 code, transformers' `DogeForCausalLM`, on a checkpoint. numpy in, numpy out.

Only safetensors are read and no code of the checkpoint is run. transformers is imported when a
reference is opened: nothing else needs it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Self, get_args

import numpy as np
import numpy.typing as npt
import torch

from model.config import DogeConfig

Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]
AttentionName = Literal["eager", "sdpa"]
ATTENTIONS: tuple[AttentionName, ...] = get_args(AttentionName)

# Before 5.18 attention without padding saw the future under sdpa, and experts raised a TypeError
# (transformers issue 48748).
LEAST_VERSION = (5, 18)
# Tokens beyond the original length that scaled rotary embedding is tried with.
_TOKENS_BEYOND = 16


class TransformersUnavailableError(Exception):
    """The published code cannot run this checkpoint here; the message says why."""


class TransformersReference:
    """transformers' network in float32 on the CPU.

    Attributes:
        name: `transformers, ` and the attention.
        vocab_size: V.
        context: tokens up to which rotary embedding is plain.
        longest: tokens of the longest sequence to ask for; beyond `context` where the checkpoint
            has scaled rotary embedding, which the published code then changes as it goes.
        router: `published` for a mixture of experts: the tokens of a whole batch are mixed, padding
            included; None for a dense model.
        keep_window_size: keys that a query keeps.
        ties_by_slot: False; which of equal scores is kept is up to the device.
    """

    def __init__(self, network: Any, config: DogeConfig, attention: AttentionName) -> None:
        scaled = network.config.rope_parameters["rope_type"] != "default"
        self.name = f"transformers, {attention}"
        self.vocab_size = config.vocab_size
        self.context = config.max_position_embeddings
        self.longest = self.context + (_TOKENS_BEYOND if scaled else 0)
        self.router: Literal["published"] | None = "published" if config.is_moe else None
        self.keep_window_size = config.keep_window_size
        self.ties_by_slot = False
        self.network = network

    @classmethod
    def open(cls, folder: Path, attention: AttentionName, config: DogeConfig | None = None) -> Self:
        """Load the checkpoint in `folder`, which must be of generation G4.

        Args:
            folder: config.json and safetensors.
            attention: which of transformers' implementations runs.
            config: what config.json says, where it has been read before.

        Raises:
            TransformersUnavailableError: transformers is missing, too old, or does not load it.
            UnsupportedModelError: config.json is not one that this project reads.
        """
        if config is None:
            config = DogeConfig.from_pretrained(folder)
        library = import_transformers()
        try:
            with _silent(library):
                network, report = library.DogeForCausalLM.from_pretrained(
                    folder,
                    attn_implementation=attention,
                    dtype=torch.float32,
                    local_files_only=True,
                    use_safetensors=True,
                    trust_remote_code=False,
                    output_loading_info=True,
                )
        except Exception as error:  # whatever the library raises is the finding
            raise TransformersUnavailableError(
                f"transformers {library.__version__} does not load it: {_first_line(error)}"
            ) from error
        odd = [name for kind in ("missing_keys", "unexpected_keys") for name in report[kind]]
        odd += [str(entry) for entry in report["mismatched_keys"]]
        if odd:
            raise TransformersUnavailableError(
                f"transformers {library.__version__} expects other tensors: "
                + ", ".join(sorted(odd)[:4])
                + (f" and {len(odd) - 4} more" if len(odd) > 4 else "")
            )
        return cls(network.eval(), config, attention)

    def one_pass(self, rows: Sequence[Ids], *, last_only: bool = False) -> list[Logits]:
        """Logits without a cache.

        Args:
            rows: B arrays [S_b]; unequal ones are padded on the left.
            last_only: give the logits of each row's last token alone.

        Returns:
            B arrays [S_b, V]; [1, V] with `last_only`.
        """
        ids, mask = _left_padded(rows)
        output = self._run(ids, mask, use_cache=False, logits_to_keep=int(last_only))
        return _real(output.logits, rows)

    def start(self, batch_size: int, capacity: int) -> TransformersConversation:
        """An empty cache; `batch_size` and `capacity` are whatever is fed into it."""
        del batch_size, capacity
        return TransformersConversation(self)

    def _run(self, ids: Ids, mask: Ids, **arguments: Any) -> Any:
        """The network on ids [B, S] behind a cache; `mask` [B, P + S] is 0 at padding.

        Without padding neither mask nor positions are given, as people call it.
        """
        if not mask.all():
            positions = np.clip(np.cumsum(mask, axis=1) - 1, 0, None)[:, -ids.shape[1] :]
            arguments["attention_mask"] = torch.from_numpy(mask)
            arguments["position_ids"] = torch.from_numpy(np.ascontiguousarray(positions))
        with torch.inference_mode():
            return self.network(torch.from_numpy(ids), **arguments)


class TransformersConversation:
    """Sequences that grow side by side in transformers' cache.

    Attributes:
        past: that cache, None before the first pass.
    """

    def __init__(self, reference: TransformersReference) -> None:
        self._reference = reference
        self.past: Any = None
        self._mask: Ids | None = None

    def append(self, rows: Sequence[Ids], *, last_only: bool = False) -> list[Logits]:
        """Feed each row's next tokens in one pass; as `TransformersReference.one_pass`."""
        ids, mask = _left_padded(rows)
        self._mask = mask if self._mask is None else np.concatenate([self._mask, mask], axis=1)
        output = self._reference._run(
            ids,
            self._mask,
            use_cache=True,
            past_key_values=self.past,
            logits_to_keep=int(last_only),
        )
        self.past = output.past_key_values
        return _real(output.logits, rows)


def import_transformers() -> ModuleType:
    """The installed transformers.

    Raises:
        TransformersUnavailableError: it is missing or older than `LEAST_VERSION`.
    """
    try:
        import transformers
    except ImportError as error:
        raise TransformersUnavailableError(
            "transformers is not installed; pip install '.[export]'"
        ) from error
    found = tuple(int(part) for part in re.findall(r"\d+", transformers.__version__)[:2])
    if found < LEAST_VERSION:
        least = ".".join(map(str, LEAST_VERSION))
        raise TransformersUnavailableError(
            f"transformers {transformers.__version__} is too old: before {least} its attention "
            "saw the future under sdpa and its experts raised an error; install a newer one"
        )
    module: ModuleType = transformers
    return module


@contextmanager
def _silent(library: ModuleType) -> Iterator[None]:
    """Without transformers' progress bars and warnings, which would stand between our lines."""
    logging = library.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _left_padded(rows: Sequence[Ids]) -> tuple[Ids, Ids]:
    """Ids [B, S] and a mask [B, S] that is 0 at padding, which stands before the tokens."""
    width = max(map(len, rows))
    ids = np.zeros((len(rows), width), np.int64)
    mask = np.zeros_like(ids)
    for row, tokens in enumerate(rows):
        ids[row, width - len(tokens) :] = tokens
        mask[row, width - len(tokens) :] = 1
    return ids, mask


def _real(logits: torch.Tensor, rows: Sequence[Ids]) -> list[Logits]:
    array: Logits = logits.float().numpy()
    return [of_row[-len(tokens) :] for of_row, tokens in zip(array, rows, strict=True)]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
