"""Rungs of a bundle, opened and run: from BACKEND:VARIANT to a `Run`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace

from runtime.backends import open_backend, open_tapped_backend
from runtime.backends.base import Backend, BackendUnavailableError, Ids
from runtime.bundle import Bundle
from runtime.comparison.published import PUBLISHED, open_published
from runtime.comparison.record import Run, Subject, record_run
from runtime.comparison.taps import TapName, comparison_taps, select_taps, sources_of
from runtime.comparison.tolerances import coarser
from runtime.cpu_threads import usable_cpus
from runtime.environment import cpu_name, describe_versions, system_name
from runtime.manifest import Variant
from runtime.options import split_backend

# Transformers is a rung as well, so its version matters.
_PACKAGES = ("transformers", "onnx")
# Backends that need a GPU: where they cannot run, a run of theirs can be made elsewhere.
_ELSEWHERE = ("tensorrt_rtx", "tensorrt", "cuda")


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One way of computing a bundle's model, not opened yet.

    Attributes:
        bundle: holds the model.
        subject: what its run is of.
        open: the backend as it generates.
        open_tapped: the backend that gives named values.
    """

    bundle: Bundle
    subject: Subject
    open: Callable[[], Backend]
    open_tapped: Callable[[Sequence[str]], Backend]


def rung_of(bundle: Bundle, name: str) -> Rung:
    """The rung `BACKEND[:VARIANT]`, or `published[:eager|sdpa]`, of a bundle.

    Raises:
        ValueError: an unknown backend, or a variant that the bundle has not.
    """
    backend, _, attention = name.partition(":")
    if backend == PUBLISHED:
        return _published_rung(bundle, attention or "eager")
    return variant_rung(bundle, bundle.variant(*split_backend(name, also=(PUBLISHED,))))


def variant_rung(bundle: Bundle, variant: Variant) -> Rung:
    """The rung that a variant of a bundle is."""
    cache = "int8" if variant.details.get("cache_dtype") == "int8" else variant.precision
    precision = coarser((variant.precision, cache))
    return Rung(
        bundle=bundle,
        subject=_subject(bundle, f"{variant.backend}:{variant.name}", precision),
        open=lambda: open_backend(variant.backend, bundle, variant=variant.name),
        open_tapped=lambda names: open_tapped_backend(
            variant.backend, bundle, names, variant=variant.name
        ),
    )


def _published_rung(bundle: Bundle, attention: str) -> Rung:
    def open_tapped(names: Sequence[str]) -> Backend:
        backend = open_published(bundle, attention)
        backend.tap_values(names)
        return backend

    return Rung(
        bundle=bundle,
        subject=_subject(bundle, f"{PUBLISHED}:{attention}", "fp32"),
        open=lambda: open_published(bundle, attention),
        open_tapped=open_tapped,
    )


def bundle_taps(bundle: Bundle, wanted: str) -> tuple[TapName, ...]:
    """The taps of a bundle's models that `--taps` asks for, with the errors of `select_taps`."""
    selects = bundle.limits.max_seq_len > bundle.config.keep_window_size
    return select_taps(comparison_taps(bundle.config, bundle.generation, selects=selects), wanted)


def run_rung(
    rung: Rung,
    taps: Sequence[TapName],
    prompts: Sequence[Sequence[int]],
    steps: int,
    *,
    tokens: Sequence[Ids] | None = None,
    windows: Sequence[Sequence[int]] = (),
    insist: bool = False,
) -> Run:
    """Run a rung without taps and, where there are any, with them.

    Args:
        rung: which.
        taps: what to record; none records logits alone.
        prompts: token ids.
        steps: decode steps after each prefill.
        tokens: what to feed, None for the rung's own greedy tokens.
        windows: those of a text, each scored alone.
        insist: whether a tap that the rung lacks is an error: it was asked for by name.

    Raises:
        BackendUnavailableError: the rung cannot run here; of an engine, says what can be done.
        ValueError: as `record_run`, or a tap that the rung lacks.
    """
    subject = rung.subject
    with ExitStack() as opened:
        try:
            untapped = opened.enter_context(closing(rung.open()))
            tapped = None
            if taps:
                tapped = opened.enter_context(closing(rung.open_tapped(sources_of(taps))))
        except BackendUnavailableError as error:
            if not subject.rung.startswith(_ELSEWHERE):
                raise
            raise BackendUnavailableError(
                f"{subject.rung} cannot run here: {error}. On a machine where it can: compare.py "
                f"BUNDLE --reference {subject.rung} --save RUN; then here: compare.py BUNDLE "
                "--load RUN --candidate BACKEND"
            ) from error
        run = record_run(
            subject, untapped, tapped, taps, prompts, steps, tokens=tokens, windows=windows
        )
    if insist and run.missing:
        raise ValueError(
            f"{subject.rung} gives no {', '.join(run.missing)}; --taps all compares those that "
            "both rungs give and lists the rest"
        )
    return run


def recorded_subject(bundle: Bundle) -> Subject:
    """What recorded results of published code are of: nothing is known of where they were made."""
    subject = _subject(bundle, f"{PUBLISHED}:recorded", "fp32")
    return replace(subject, versions={}, machine={})


def _subject(bundle: Bundle, rung: str, precision: str) -> Subject:
    manifest = bundle.manifest
    return Subject(
        rung=rung,
        precision=precision,
        weights_sha256=manifest.source.weights_sha256,
        config=manifest.config,
        generation=manifest.generation,
        max_input_len=bundle.limits.max_input_len,
        max_seq_len=bundle.limits.max_seq_len,
        router_mode=manifest.router_mode,
        versions=describe_versions(*_PACKAGES),
        machine={"system": system_name(), "processor": cpu_name(), "cores": usable_cpus()},
    )
