"""What the plugins of one process share, and what became of their callbacks."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from plugins.kernel_spec import KernelSpec
from plugins.launcher import Launcher

_Call = TypeVar("_Call", bound=Callable[..., Any])
# Of one failure every plugin of an engine may say the same.
_KEPT_PROBLEMS = 8


class PluginError(Exception):
    """A plugin cannot do what TensorRT asks; the message says why."""


class HasKernels(Protocol):
    """What knows its kernels, such as an `OpKernels`."""

    @property
    def specs(self) -> tuple[KernelSpec, ...]:
        """Every variant that it may launch."""


@dataclass(kw_only=True)
class PluginHost:
    """What plugins of one process share.

    Attributes:
        known: names of the kernel variants that will be there at run time, checked at build time;
            None checks nothing.
        launchers: what runs kernels, each with those that it has.
        used: kernel variants that plugins asked for.
        problems: what plugins raised. TensorRT turns an exception into a failure without a reason.
    """

    known: frozenset[str] | None = None
    launchers: list[tuple[frozenset[str], Launcher]] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    problems: deque[str] = field(default_factory=lambda: deque(maxlen=_KEPT_PROBLEMS))

    def check(self, kernels: HasKernels) -> None:
        """Note the variants of a plugin.

        Raises:
            PluginError: some are not known.
        """
        names = {spec.name for spec in kernels.specs}
        self.used |= names
        if self.known is not None and (missing := names - self.known):
            raise PluginError(
                f"no kernel {', '.join(sorted(missing))} was compiled; there are "
                f"{', '.join(sorted(self.known)) or 'none'}"
            )

    def launcher_of(self, kernels: Iterable[str]) -> Launcher:
        """The launcher that has all of these kernels.

        Raises:
            PluginError: none has.
        """
        wanted = set(kernels)
        for names, launcher in self.launchers:
            if wanted <= names:
                return launcher
        raise PluginError(
            f"no kernels {', '.join(sorted(wanted))} are loaded; open the bundle that the engine "
            "belongs to, whose kernels/ has them"
        )


def told(method: _Call) -> _Call:
    """Note what a callback of a plugin raises, since TensorRT does not pass it on."""

    @functools.wraps(method)
    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        try:
            return method(self, *arguments, **named)
        except Exception as error:
            self.host.problems.append(str(error))
            raise

    return call  # type: ignore[return-value]  # of the same signature
