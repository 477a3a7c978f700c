"""What TensorRT says while an engine loads and runs, kept so that errors can give its reason."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

logger = logging.getLogger(__name__)

# Of one failure the library says several things; the first ones are the reason.
_KEPT = 8


class EngineLog:
    """The library's errors since they were last taken.

    Attributes:
        errors: oldest first. Threads of the library may append.
    """

    def __init__(self, problems: Callable[[], Iterable[str]] = tuple) -> None:
        """Begin empty.

        Args:
            problems: what plugins have raised since it was last asked; the library swallows that.
        """
        self.errors: deque[str] = deque(maxlen=_KEPT)
        self._problems = problems

    def said(self) -> str:
        """The errors in one line, after which there are none; empty where nothing was said."""
        said = [*self._problems(), *self.errors]
        self.errors.clear()
        return "; ".join(dict.fromkeys(" ".join(text.split()) for text in said))

    def reasons(self) -> str:
        """Likewise, in words where nothing was said."""
        return self.said() or "no reason was given"


def make_logger(trt: Any, log: EngineLog) -> Any:
    """A logger of the product that keeps errors and passes the rest on at debug level."""

    class Logger(trt.ILogger):  # type: ignore[misc]  # the base class is untyped
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            if severity in {trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR}:
                log.errors.append(msg)
            logger.debug("%s", msg)

    return Logger()
