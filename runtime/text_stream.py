"""Tokens of one sequence to text as they come: whole characters, nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.tokenizer import Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Decodes one sequence incrementally.

    Pieces are decoded with the tokens before them as context, since a decoder may treat the first
    token of a text in its own way; the context is short, so a token's cost does not grow.

    Attributes:
        text: what has been shown so far.
        stopped: whether a stop string has been found; it and what follows are not shown.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.text = ""
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._context: list[int] = []
        self._pending: list[int] = []
        self._held = ""

    def push(self, token_id: int) -> str:
        """Take a token and give the text that may be shown now, possibly none."""
        if self.stopped:
            return ""
        self._pending.append(token_id)
        piece = self._decode_pending()
        # A decoder shows the bytes of an unfinished character so. Where the text really ends so,
        # it is shown with what follows, or at the end.
        if not piece or piece.endswith(_REPLACEMENT):
            return ""
        self._settle()
        return self._show(piece, final=False)

    def finish(self) -> str:
        """Give what was held back: an unfinished character, the beginning of a stop string."""
        if self.stopped:
            return ""
        piece = self._decode_pending()
        self._settle()
        return self._show(piece, final=True)

    def _decode_pending(self) -> str:
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._pending)[len(before) :]

    def _settle(self) -> None:
        if self._pending:
            self._context, self._pending = self._pending, []

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
        self.text += shown
        return shown

    def _stop_beginning(self) -> int:
        """Length of the longest end of the held text that a stop string begins with."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            tail = self._held[-length:]
            if any(stop.startswith(tail) for stop in self._stop):
                return length
        return 0
