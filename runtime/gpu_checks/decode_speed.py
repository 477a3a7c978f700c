"""Section: how fast steps of our kernels decode, beside PyTorch and the bandwidth of this GPU."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plugins.launcher import LaunchError
from runtime.backends.base import BackendUnavailableError
from runtime.bundle import Bundle
from runtime.gpu_checks.decode_pace import Pace
from runtime.gpu_checks.section import CheckedBundle, Report, Subject, combined
from runtime.gpu_checks.step_profile import HOW as PROFILE_HOW
from runtime.gpu_checks.step_profile import profile_step
from runtime.gpu_checks.worker_process import run_worker
from runtime.kernel_step.variant import PERSISTENT
from runtime.manifest import Variant
from runtime.roofline import step_bytes

_WORKER = "runtime.gpu_checks.decode_timing"
_PROMPTS = (128, 1900)
_TORCH_DTYPES = ("float16", "bfloat16")
_TORCH_MODES = ("growing", "eager", "compiled")
# A compiler's time for the largest models, and as much again.
_MOST_S = 300.0
_HOW = (
    "Greedy decoding of random prompts, the host's clock, each system and batch size in a process "
    "of its own; nothing is compared here, the section of engines does that. `step_ms`: a token of "
    "each row, the median of the continuations that count; the first tokens of each, and the first "
    "continuation, do not. `cuda:...`: Backend.decode_many, every token read by the host. "
    "`torch:...`: the bundle's checkpoint in that type; `growing`, the cache is concatenated and "
    "each token read; `eager`, the cache is appended to in place, attention sees the filled slots "
    'and tokens are read at the end; `compiled`, torch.compile(mode="reduce-overhead") of a step '
    "of fixed shapes over all slots, `compiler` counts its graphs and what kept CUDA graphs from "
    "being used. `times_torch`: torch's `step_ms` by ours, same batch and prompt. `floor_ms`: the "
    "bytes a step must read (weights of one token, the cache at its mean length) by the copies of "
    "the bandwidth section; `of_bandwidth`: `floor_ms` by `step_ms`. `times_graph`: the `step_ms` "
    "of recorded steps by that of a persistent variant of the same weights. Weights that fit into "
    "the L2 cache need not come from memory, so it may exceed 1."
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Timed:
    """One system with one batch size.

    Attributes:
        bundle: whose model.
        variant: of backend `cuda`; None for PyTorch.
        system: `cuda:fp16` or `torch:float16:eager`.
        batch_size: B.
    """

    bundle: CheckedBundle
    variant: Variant | None
    system: str
    batch_size: int

    @property
    def label(self) -> str:
        """What messages call it."""
        return f"{self.bundle.name}, {self.system}, batch {self.batch_size}"


class DecodeSpeedSection:
    """Every variant of backend `cuda`, and PyTorch on the same checkpoint.

    Attributes:
        name: `decode_speed`.
    """

    name = "decode_speed"

    def __init__(
        self, pace: Pace | None = None, prompts: Sequence[int] = _PROMPTS, device: str = "cuda"
    ) -> None:
        """Time at this pace, behind prompts of these lengths or what room there is for.

        Args:
            pace: how much is timed; the default's when None.
            prompts: tokens.
            device: where PyTorch runs.
        """
        self._pace = Pace() if pace is None else pace
        self._prompts = prompts
        self._device = device

    def plan(self, bundles: Sequence[CheckedBundle]) -> list[str]:
        """A line for each bundle and batch size."""
        lines = []
        for bundle in bundles:
            if not _variants(bundle.bundle) or not self._lengths(bundle.bundle):
                continue
            lengths = " and ".join(map(str, self._lengths(bundle.bundle)))
            for batch in _batches(bundle.bundle):
                systems = [t.system for t in _systems(bundle, batch)]
                lines.append(
                    f"time decoding of {bundle.name}, batch {batch}, behind {lengths} tokens: "
                    f"{', '.join(systems)}"
                )
        return lines or ["time no decoding: no bundle has a model for backend cuda"]

    def run(self, subject: Subject, earlier: Mapping[str, Report]) -> Report:
        """Profile the steps of one sequence, then time every system."""
        left_out = [
            f"{bundle.name}: max_seq_len {bundle.bundle.limits.max_seq_len} leaves no room for "
            f"{self._pace.needed} tokens behind a prompt"
            for bundle in subject.bundles
            if _variants(bundle.bundle) and not self._lengths(bundle.bundle)
        ]
        left_out += [
            f"{bundle.name}: no PyTorch beside it, the bundle has no checkpoint (--no-checkpoint)"
            for bundle in subject.bundles
            if _variants(bundle.bundle) and not bundle.bundle.variants("torch")
        ]
        profiles = list(self._profiles(subject, left_out))
        cases = self._cases(subject, left_out)
        gb_per_s = earlier.get("bandwidth", {}).get("gb_per_s")
        for bundle in subject.bundles:
            own = [case for case in cases if case["bundle"] == bundle.name]
            self._relate(bundle.bundle, own, gb_per_s)
        for profile in profiles:
            if "position" in profile:
                profile["token_us"] = _token_us(profile, cases, self._pace.warmup)
        return {
            "verdict": combined([found["verdict"] for found in (*cases, *profiles)]),
            "how": _HOW,
            "pace": {
                "warmup": self._pace.warmup,
                "tokens": self._pace.tokens,
                "repeats": self._pace.repeats,
            },
            "cases": cases,
            "profiles_how": PROFILE_HOW,
            "profiles": profiles,
            "left_out": left_out,
        }

    def _lengths(self, bundle: Bundle) -> list[int]:
        """Prompts that fit, each once."""
        limits = bundle.limits
        room = limits.max_seq_len - self._pace.needed
        if bundle.manifest.router_mode == "mixed":  # takes a prompt in one pass
            room = min(room, limits.max_input_len)
        return sorted({min(length, room) for length in self._prompts}) if room >= 1 else []

    def _profiles(self, subject: Subject, left_out: list[str]) -> Iterator[dict[str, Any]]:
        for bundle in subject.bundles:
            for variant in _variants(bundle.bundle) if self._lengths(bundle.bundle) else ():
                label = f"{bundle.name}, parts of a step of {_name(variant)}"
                if subject.deadline.passed:
                    left_out.append(f"{label}: the time was up")
                    continue
                if not subject.device.answers():
                    left_out.append(f"{label}: the GPU no longer answers")
                    continue
                logger.info("timing %s", label)
                about = {"bundle": bundle.name, "system": _name(variant)}
                try:
                    found = profile_step(
                        subject.device,
                        subject.launchers[bundle.name],
                        bundle.bundle,
                        variant,
                        [length + self._pace.warmup for length in self._lengths(bundle.bundle)],
                        subject.rhythm,
                    )
                except (BackendUnavailableError, LaunchError, ValueError) as error:
                    yield {**about, "verdict": "fail", "problems": [str(error)]}
                    continue
                yield from ({**about, "verdict": "pass", **profile} for profile in found)

    def _cases(self, subject: Subject, left_out: list[str]) -> list[dict[str, Any]]:
        cases: list[dict[str, Any]] = []
        no_torch: str | None = None
        for timed in self._order(subject.bundles):
            if subject.deadline.passed:
                left_out.append(f"{timed.label}: the time was up")
                continue
            if timed.variant is None and no_torch is not None:
                left_out.append(f"{timed.label}: {no_torch}")
                continue
            logger.info("timing %s", timed.label)
            seconds = min(subject.deadline.remaining_s, _MOST_S)
            found = self._time(timed, subject.seed, seconds)
            if found is None:
                left_out.append(f"{timed.label}: it took longer than the {seconds:.0f} s it had")
                continue
            cases += found
            if timed.variant is None and found[0]["verdict"] == "skipped":
                no_torch = (found[0]["said"] or "skipped").splitlines()[-1]
        return cases

    def _order(self, bundles: Sequence[CheckedBundle]) -> list[Timed]:
        """What tells most comes first: one sequence, ours, float16, then the rest."""
        found = [
            (rank, _rank(timed), timed)
            for bundle in bundles
            if self._lengths(bundle.bundle)
            for rank, batch in enumerate(_batches(bundle.bundle))
            for timed in _systems(bundle, batch)
        ]
        return [timed for _, _, timed in sorted(found, key=lambda entry: entry[:2])]

    def _time(self, timed: Timed, seed: int, seconds: float) -> list[dict[str, Any]] | None:
        """A case for each prompt that was timed, or one for what went wrong."""
        pace = self._pace
        lengths = self._lengths(timed.bundle.bundle)
        arguments = [
            str(timed.bundle.bundle.path), timed.system,
            "--batch-size", str(timed.batch_size), "--lengths", ",".join(map(str, lengths)),
            "--pace", f"{pace.warmup},{pace.tokens},{pace.repeats}",
            "--seed", str(seed), "--device", self._device,
        ]  # fmt: skip
        result = run_worker(_WORKER, arguments, seconds)
        if result is None:
            return None
        about = {
            "bundle": timed.bundle.name, "system": timed.system, "batch": timed.batch_size,
        }  # fmt: skip
        compiler = result.found.get("compiler")
        measured = [
            {**about, "verdict": "pass", **case, **({"compiler": compiler} if compiler else {})}
            for case in result.found.get("measured", [])
        ]
        if result.verdict == "pass":
            return measured
        return [*measured, {**about, "verdict": result.verdict, "said": result.said}]

    def _relate(
        self, bundle: Bundle, cases: Sequence[dict[str, Any]], gb_per_s: float | None
    ) -> None:
        """Hold what was measured of our variants to PyTorch's time and to the bandwidth."""
        measured = [case for case in cases if "step_ms" in case]
        for variant in _variants(bundle):
            for case in (c for c in measured if c["system"] == _name(variant)):
                context = self._pace.context(case["prompt_tokens"])
                needed = step_bytes(bundle, variant, case["batch"], context)
                case["read_bytes"] = None if needed is None else round(needed)
                if needed is not None and gb_per_s:
                    floor_ms = needed / gb_per_s / 1e6
                    case["floor_ms"] = round(floor_ms, 5)
                    case["of_bandwidth"] = round(floor_ms / case["step_ms"], 4)
                same = ("batch", "prompt_tokens")
                case["times_torch"] = {
                    other["system"].removeprefix("torch:"): round(
                        other["step_ms"] / case["step_ms"], 2
                    )
                    for other in measured
                    if other["system"].startswith("torch:")
                    and all(other[key] == case[key] for key in same)
                }
                if variant.details.get(PERSISTENT, False):
                    beside = _name(variant).removesuffix(f"-{PERSISTENT}")
                    for other in measured:
                        if other["system"] == beside and all(other[k] == case[k] for k in same):
                            ratio = other["step_ms"] / case["step_ms"]
                            case["times_graph"] = round(ratio, 2)


def _token_us(
    profile: Mapping[str, Any], cases: Sequence[Mapping[str, Any]], warmup: int
) -> float | None:
    """What the host saw of a token of one sequence behind the prompt of a profile."""
    for case in cases:
        about = ("bundle", "system")
        if (
            all(case[key] == profile[key] for key in about)
            and case["batch"] == 1
            and case.get("prompt_tokens") == profile["position"] - warmup
        ):
            return round(1e3 * float(case["step_ms"]), 3)
    return None


def _variants(bundle: Bundle) -> tuple[Variant, ...]:
    return tuple(bundle.variants("cuda"))


def _batches(bundle: Bundle) -> list[int]:
    """One sequence, and as many as the bundle takes."""
    return sorted({1, bundle.limits.max_batch_size})


def _systems(bundle: CheckedBundle, batch_size: int) -> Iterator[Timed]:
    variants = _variants(bundle.bundle)
    for variant in variants:
        if batch_size > 1 and variant.details.get(PERSISTENT, False):
            continue  # it has recorded steps there, as the variant beside it
        yield Timed(bundle=bundle, variant=variant, system=_name(variant), batch_size=batch_size)
    if not variants or not bundle.bundle.variants("torch"):
        return
    for dtype in _TORCH_DTYPES:
        for mode in _TORCH_MODES:
            system = f"torch:{dtype}:{mode}"
            yield Timed(bundle=bundle, variant=None, system=system, batch_size=batch_size)


def _rank(timed: Timed) -> int:
    if timed.variant is not None:
        return 0
    dtype = timed.system.split(":")[1]
    return 1 + _TORCH_DTYPES.index(dtype)


def _name(variant: Variant) -> str:
    return f"{variant.backend}:{variant.name}"
