"""Tokens of one sequence to text as they come: whole characters, nothing of a stop string.

`tokenizers.decoders.DecodeStream` is not used: it never gives back what it still holds when a text
ends, and fails on byte tokens that form no character.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from runtime.tokenizer import Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# Tokens that are decoded again as context of the next one. A character has at most four bytes and a
# token at least one, so after four tokens a byte-level decoder is in step wherever it began; every
# other decoder needs one token, to know that a text does not begin here.
_CONTEXT = 4
_WINDOW = 16


class TextStream:
    """Decodes one sequence incrementally; a token's cost does not grow with the text.

    The pieces of `push` and `finish` together are the decoded text of all tokens, up to the first
    stop string.

    Attributes:
        stopped: whether a stop string has been found; it and what follows are not shown.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._longest_stop = max(map(len, self._stop), default=0)
        self._shown: list[str] = []
        self._held = ""  # certain, but a stop string may begin in it
        self._window: list[int] = []  # the last tokens
        self._taken = 0  # characters of the decoded window that are in `_shown` or `_held`
        self._bytes: _ByteRun | None = None

    @property
    def text(self) -> str:
        """What has been shown so far."""
        return "".join(self._shown)

    def push(self, token_id: int) -> str:
        """Take a token and give the text that may be shown now, possibly none."""
        if self.stopped or self._tokenizer.is_silent(token_id):
            return ""
        self._window.append(token_id)
        byte = self._tokenizer.byte_of(token_id)
        if byte is not None:
            return self._push_byte(byte)
        self._bytes = None
        piece = self._new_text(_certain(self._tokenizer.decode(self._window)))
        if len(self._window) > _WINDOW:
            self._window = self._window[-_CONTEXT:]
            self._taken = len(_certain(self._tokenizer.decode(self._window)))
        return self._show(piece, final=False)

    def finish(self) -> str:
        """Give what was held back: an unfinished character, the beginning of a stop string."""
        if self.stopped:
            return ""
        return self._show(self._new_text(self._tokenizer.decode(self._window)), final=True)

    def _push_byte(self, byte: int) -> str:
        """Take a byte token, whose text is certain only when another kind of token follows.

        A decoder with byte fallback turns a whole run of byte tokens into replacement characters
        when it is not valid UTF-8. Until then the run is only watched for a stop string.
        """
        if not self._stop:
            return ""
        if self._bytes is None:
            self._bytes = _ByteRun(self._held)
        tail = self._bytes.push(byte, self._longest_stop)
        if not any(stop in tail for stop in self._stop):
            return ""
        taken, held = self._taken, self._held
        shown = self._show(self._new_text(self._tokenizer.decode(self._window)), final=False)
        if not self.stopped:  # the decoder left out a space at the text's beginning
            self._shown.pop()
            self._taken, self._held = taken, held
            return ""
        return shown

    def _new_text(self, decoded: str) -> str:
        """What the decoded window holds beyond the characters taken before, which grow by it."""
        piece = decoded[self._taken :]
        self._taken = len(decoded)
        return piece

    def _show(self, piece: str, *, final: bool) -> str:
        """Move text from held back to shown, up to a stop string or what may become one."""
        self._held += piece
        found = [i for stop in self._stop if (i := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            keep = min(found)
        else:
            keep = len(self._held) - (0 if final else self._stop_beginning())
        shown, self._held = self._held[:keep], self._held[keep:]
        self._shown.append(shown)
        return shown

    def _stop_beginning(self) -> int:
        """Length of the longest end of the held text that a stop string begins with."""
        for length in range(min(self._longest_stop - 1, len(self._held)), 0, -1):
            tail = self._held[-length:]
            if any(stop.startswith(tail) for stop in self._stop):
                return length
        return 0


class _ByteRun:
    """The end of the text that a run of byte tokens would give, were it to end now."""

    def __init__(self, before: str) -> None:
        self._tail = before
        self._decoder = codecs.getincrementaldecoder("utf-8")("strict")
        self._valid = True

    def push(self, byte: int, length: int) -> str:
        """Take a byte; give `length` characters or more, empty unless it completes a character."""
        if not self._valid:
            return ""
        try:
            character = self._decoder.decode(bytes([byte]))
        except UnicodeDecodeError:
            self._valid = False
            return ""
        if not character:
            return ""
        self._tail = self._tail[-length:] + character
        return self._tail


def _certain(text: str) -> str:
    """Decoded text without a last character that the next token may still complete.

    A decoder shows the bytes of an unfinished character as one replacement character at the end. If
    the text really has one there, it is shown with what follows, or at the end.
    """
    return text.removesuffix(_REPLACEMENT)
