"""Whether a bundle is as it was built, and which of its models can run on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from plugins.launcher import LaunchError
from runtime.backends import open_backend
from runtime.backends.base import BackendUnavailableError
from runtime.bundle import Bundle
from runtime.manifest import Variant


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Whether one variant can run here.

    Attributes:
        backend: key of the backend.
        variant: its name.
        runs: whether the backend opened it.
        reason: why not, in one sentence; None where it runs.
    """

    backend: str
    variant: str
    runs: bool
    reason: str | None


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The verdict of `--verify`.

    Attributes:
        files: how many files were hashed.
        problems: one sentence for each that is not as the manifest says.
        fits: of every variant, in the manifest's order.
    """

    files: int
    problems: tuple[str, ...]
    fits: tuple[Fit, ...]

    @property
    def passed(self) -> bool:
        """No file was altered, and something can run here."""
        return not self.problems and any(fit.runs for fit in self.fits)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {
            "verdict": "pass" if self.passed else "fail",
            "files": self.files,
            "problems": list(self.problems),
            "fits": [asdict(fit) for fit in self.fits],
        }


def verify_bundle(bundle: Bundle) -> Verification:
    """Hash every file and open every variant whose bundle is whole.

    Opening is what `generate` does first, so a variant that passes here loads there.
    """
    problems = bundle.altered_files()
    return Verification(
        files=len(bundle.manifest.files),
        problems=problems,
        fits=tuple(
            _fit(bundle, variant, altered=bool(problems)) for variant in bundle.manifest.variants
        ),
    )


def _fit(bundle: Bundle, variant: Variant, *, altered: bool) -> Fit:
    reason = None
    if altered:
        reason = "not opened, because files of the bundle were altered"
    else:
        try:
            open_backend(variant.backend, bundle, variant=variant.name).close()
        except (BackendUnavailableError, LaunchError, OSError, ValueError) as error:
            reason = str(error)
    return Fit(backend=variant.backend, variant=variant.name, runs=reason is None, reason=reason)


def printed_verification(verified: Verification) -> Sequence[str]:
    """The verdict as lines of text."""
    lines = [f"hashes       {verified.files} files, {len(verified.problems)} altered"]
    lines += [f"  altered    {problem}" for problem in verified.problems]
    for fit in verified.fits:
        verdict = "runs here" if fit.runs else f"cannot run here: {fit.reason}"
        lines.append(f"fit          {fit.backend}:{fit.variant} {verdict}")
    lines.append(f"verdict      {'pass' if verified.passed else 'fail'}")
    return lines
