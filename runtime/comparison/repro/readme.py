"""The README of a folder that shows a difference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runtime.comparison.repro.pieces import SIDES, WHOLE_STEP, Attempt
from runtime.comparison.repro.replay import Side
from runtime.comparison.repro.target import Target


def describe_piece(
    attempt: Attempt, sides: tuple[Side, Side], cut: int, polygraphy: str | None
) -> str:
    """README.md of a folder with a model.

    Args:
        attempt: the piece.
        sides: reference and candidate.
        cut: which of them the model is of.
        polygraphy: a command that judges it as well, None where there is none.
    """
    rungs = [side.run.subject.rung for side in sides]
    compared = 1 - cut
    lines = [
        *_what_parts(attempt.target, sides),
        "## Run it",
        "",
        "```",
        "python run.py",
        "```",
        "",
        (
            "needs numpy and onnxruntime. Exit status 0: agrees; 3: differs; 1: could not run. "
            f"It runs `model.onnx` on `inputs.npz` and compares `{attempt.check['output']}` with "
            f"`{SIDES[compared]}.npz`. When this was written, it said:"
        ),
        "",
        f"> {'differs' if attempt.judgement.differs else 'agrees'}: {attempt.judgement.sentence}",
        "",
        *_how_judged(attempt.check),
        *_by_polygraphy(polygraphy),
        "## What is here",
        "",
        (
            f"- `model.onnx`: cut out of the model of {rungs[cut]}, {attempt.size}. "
            f"{attempt.piece.nodes} nodes, weights: {_weights(attempt)}."
        ),
        f"- `inputs.npz`: {_origins(attempt)}",
        *(
            f"- `{word}.npz`: what the {word}, {rungs[i]}, gave"
            for i, word in enumerate(SIDES)
            if word in attempt.given
        ),
        (
            "- `check.json`: the rule; `choices.py`: how scores choose keys and experts; "
            "`versions.json`: packages, rungs, weights and machines"
        ),
        "",
        *_what_it_means(attempt, rungs, cut),
        *attempt.notes,
    ]
    return "\n".join(lines).rstrip() + "\n"


def _what_parts(target: Target, sides: tuple[Side, Side]) -> list[str]:
    found = target.found
    rungs = [side.run.subject.rung for side in sides]
    return [
        f"# {rungs[1]} differs from {rungs[0]} at {found.tap}",
        "",
        (
            f"In the comparison: {found.sentence()}. Step 0 is the prompt's pass, each decoded "
            "token is one more."
        ),
        "",
    ]


def _how_judged(check: Mapping[str, Any]) -> list[str]:
    if check["rule"] != "numeric":
        return [
            (
                "The output holds scores. Judged is what they choose (`choices.py`): any other "
                "choice differs, however close the scores are."
            ),
            "",
        ]
    of = "of all" if check["token_axis"] is None else "of the token"
    return [
        f"Tolerated is {check['atol']:g} + {check['rtol']:g} · the largest expected number {of}.",
        "",
    ]


def _by_polygraphy(command: str | None) -> list[str]:
    if command is None:
        return []
    return [
        "Or with Polygraphy, whose tolerance is one number for all tokens, here the smallest:",
        "",
        "```",
        command,
        "```",
        "",
    ]


def _weights(attempt: Attempt) -> str:
    large = [name for name, size in attempt.piece.weights.items() if size > 64]
    return ", ".join(f"`{name}`" for name in sorted(large)) or "none"


def _origins(attempt: Attempt) -> str:
    """The inputs by where they come from."""
    names: dict[str, list[str]] = {}
    for name, origin in attempt.fed.origins.items():
        names.setdefault(origin, []).append(f"`{name}`")
    return "; ".join(f"of {origin}: {', '.join(held)}" for origin, held in names.items())


def _what_it_means(attempt: Attempt, rungs: list[str], cut: int) -> list[str]:
    lines = []
    if not attempt.judgement.differs:
        reach = "Even this, the largest piece" if attempt.size == WHOLE_STEP else "This piece"
        lines += [
            (
                f"**{reach}, agrees when it runs alone on these inputs.** So the difference is "
                "not in this step's graph by itself: look at what the step was handed (its "
                "cache), at values in front of the piece that differ within their tolerance, or "
                "at how the whole model is fused."
            ),
            "",
        ]
    if cut == 0:
        lines += [
            (
                f"The model is that of the reference: {rungs[1]} has none that can be cut. "
                "`candidate.npz` is what it gave for the same; put there what a mended one gives, "
                "and run.py tells whether it agrees."
            ),
            "",
        ]
    return lines


def describe_numbers(target: Target, sides: tuple[Side, Side]) -> str:
    """README.md of a folder without a model."""
    found = target.found
    run = sides[0].run.prompts[found.prompt]
    ids = ",".join(str(i) for i in run.prompt)
    rungs = [side.run.subject.rung for side in sides]
    taps = f" --taps {found.tap}" if run.values else ""
    lines = [
        *_what_parts(target, sides),
        "## Make it again",
        "",
        (
            "Neither rung has an ONNX model that could be cut, so there is nothing here to run "
            "alone. With the bundle (its weights' hash is in `versions.json`):"
        ),
        "",
        "```",
        (
            f"python runtime/compare.py BUNDLE --reference {rungs[0]} --candidate {rungs[1]} "
            f"--prompt-ids {ids} --steps {found.step}{taps}"
        ),
        "```",
        "",
        "Exit status 3 says that they differ.",
        "",
        "## What is here",
        "",
        "- `reference.npz`, `candidate.npz`: what each gave at that step",
        "- `inputs.npz`: the prompt's tokens and those that were fed in the steps behind it",
        "- `versions.json`: packages, rungs, weights and machines",
    ]
    return "\n".join(lines) + "\n"
