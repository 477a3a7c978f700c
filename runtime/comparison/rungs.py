"""Rungs of a bundle, opened and run: from BACKEND:VARIANT to a `Run`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

from runtime.backends import open_backend, open_tapped_backend
from runtime.backends.base import Ids
from runtime.bundle import Bundle
from runtime.comparison.record import Run, Subject, record_run
from runtime.comparison.taps import TapName, comparison_taps, select_taps, sources_of
from runtime.manifest import Variant


def bundle_taps(bundle: Bundle, wanted: str) -> tuple[TapName, ...]:
    """The taps of a bundle's models that `--taps` asks for, with the errors of `select_taps`."""
    selects = bundle.limits.max_seq_len > bundle.config.keep_window_size
    return select_taps(comparison_taps(bundle.config, bundle.generation, selects=selects), wanted)


def run_rung(
    bundle: Bundle,
    variant: Variant,
    taps: Sequence[TapName],
    prompts: Sequence[Sequence[int]],
    steps: int,
    *,
    tokens: Sequence[Ids] | None = None,
    insist: bool = False,
) -> Run:
    """Run a variant of a bundle twice, without taps and with them.

    Args:
        bundle: holds the model.
        variant: which.
        taps: what to record.
        prompts: token ids.
        steps: decode steps after each prefill.
        tokens: what to feed, None for the rung's own greedy tokens.
        insist: whether a tap that the rung lacks is an error: it was asked for by name.

    Raises:
        BackendUnavailableError: the rung cannot run here.
        ValueError: as `record_run`, or a tap that the rung lacks.
    """
    subject = _subject(bundle, variant)
    names = sources_of(taps)
    untapped = open_backend(variant.backend, bundle, variant=variant.name)
    tapped = open_tapped_backend(variant.backend, bundle, names, variant=variant.name)
    with closing(untapped), closing(tapped):
        run = record_run(subject, untapped, tapped, taps, prompts, steps, tokens=tokens)
    if insist and run.missing:
        raise ValueError(
            f"{subject.rung} gives no {', '.join(run.missing)}; --taps all compares those that "
            "both rungs give and lists the rest"
        )
    return run


def _subject(bundle: Bundle, variant: Variant) -> Subject:
    manifest = bundle.manifest
    return Subject(
        rung=f"{variant.backend}:{variant.name}",
        precision=variant.precision,
        weights_sha256=manifest.source.weights_sha256,
        config=manifest.config,
        generation=manifest.generation,
        max_input_len=bundle.limits.max_input_len,
        max_seq_len=bundle.limits.max_seq_len,
    )


def check_same_checkpoint(bundle: Bundle, other: Bundle) -> None:
    """Refuse to look for the first layer that parts where all of them do.

    Raises:
        ValueError: the bundles were made of different checkpoints, or route experts differently.
    """
    found = bundle.manifest.source.weights_sha256, other.manifest.source.weights_sha256
    if found[0] != found[1] or bundle.manifest.config != other.manifest.config:
        raise ValueError(
            f"the bundles {bundle.path} and {other.path} are of different checkpoints (weights "
            f"{found[0][:12]} and {found[1][:12]}) or configurations; taps are compared between "
            "bundles of one checkpoint, logits alone without --taps"
        )
