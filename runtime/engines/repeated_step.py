"""A step that is put on a stream again and again: as it is, or as a CUDA graph once it has run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from runtime.gpu.device_memory import CapturedGraph, Stream

logger = logging.getLogger(__name__)


@dataclass
class Capturing:
    """Whether a lane's steps become graphs of ours.

    Attributes:
        wanted: false where the library captures by itself, and for good once a capture fails.
    """

    wanted: bool


class RepeatedStep:
    """A step of one shape and fixed addresses."""

    def __init__(
        self, stream: Stream, enqueue: Callable[[], None], capturing: Capturing, *, worth: bool
    ) -> None:
        """Put nothing on the stream yet.

        Args:
            stream: where it runs.
            enqueue: puts it on the stream.
            capturing: of the lane.
            worth: whether it will be repeated often.
        """
        self._stream, self._enqueue = stream, enqueue
        self._capturing, self._worth = capturing, worth
        self._has_run = False
        self._graph: CapturedGraph | None = None

    def put(self) -> None:
        """Put it on the stream."""
        # The first time it must run as it is: the library prepares for the shape in it, which
        # cannot be captured.
        if self._graph is None and self._has_run and self._worth and self._capturing.wanted:
            self._capture()
        self._has_run = True
        if self._graph is not None:
            self._stream.launch(self._graph)
        else:
            self._enqueue()

    def close(self) -> None:
        """Give the graph back, if there is one."""
        graph, self._graph = self._graph, None
        if graph is not None:
            graph.close()

    def _capture(self) -> None:
        try:
            self._graph = self._stream.capture(self._enqueue)
        except RuntimeError as error:
            self._capturing.wanted = False
            logger.warning("decoding runs without a CUDA graph: %s", str(error))
