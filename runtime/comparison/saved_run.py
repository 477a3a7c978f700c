"""A run as one file, to be compared on another machine: arrays in an .npz and a header in JSON.

No pickle: whatever the file holds, reading it runs nothing. docs/compare.md has the layout.
"""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.comparison.record import PromptRun, Run, Subject, Values
from runtime.comparison.text import TextRun

FORMAT_VERSION = 1
_HEADER = "header"
_SUBJECT_FIELDS = tuple(field.name for field in dataclasses.fields(Subject))
_Arrays = Mapping[str, npt.NDArray[Any]]


def save_run(run: Run, path: Path) -> None:
    """Write a run to `path`, whatever its name ends in; whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    names = sorted(run.prompts[0].values[0]) if run.prompts[0].values else []
    header = {
        "format_version": FORMAT_VERSION,
        "subject": dataclasses.asdict(run.subject),
        "steps": run.steps,
        "taps": run.taps,
        "missing": run.missing,
        "prompts": [prompt.prompt for prompt in run.prompts],
        "values": names,
        "windows": [] if run.text is None else run.text.windows,
    }
    arrays: dict[str, npt.NDArray[Any]] = {
        _HEADER: np.frombuffer(json.dumps(header, sort_keys=True).encode(), np.uint8)
    }
    for number, prompt in enumerate(run.prompts):
        arrays |= {f"{number}/{name}": array for name, array in _arrays(prompt, names).items()}
    if run.text is not None:
        arrays |= {f"text/{number}": logits for number, logits in enumerate(run.text.logits)}
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with beside.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _arrays(prompt: PromptRun, names: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
    """A prompt's arrays; a value's steps, whose shapes differ, stand in a row behind each other."""
    found: dict[str, npt.NDArray[Any]] = {"tokens": prompt.tokens, "logits": prompt.logits}
    if prompt.own_tokens is not None:
        found["own_tokens"] = prompt.own_tokens
    if prompt.tapped_logits is not None:
        found["tapped_logits"] = prompt.tapped_logits
    for name in names:
        parts = [np.asarray(step[name]) for step in prompt.values]
        found[f"shapes/{name}"] = np.array([part.shape for part in parts], np.int64)
        found[f"values/{name}"] = np.concatenate([part.ravel() for part in parts])
    return found


def load_run(path: Path) -> Run:
    """Read what `save_run` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no run, a damaged one, or one of another format version.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no run {path}; write one with compare.py --save {path}")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is no saved run, or a truncated one; write one with --save")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            header = json.loads(bytes(arrays[_HEADER]).decode())
            if header["format_version"] == FORMAT_VERSION:
                return _read(header, arrays)
    except (
        AttributeError,
        EOFError,
        IndexError,
        KeyError,
        TypeError,
        ValueError,
        zipfile.BadZipFile,
    ) as error:
        raise ValueError(
            f"{path} is no saved run or a damaged one ({error}); write one with compare.py --save"
        ) from error
    raise ValueError(
        f"the run {path} has format version {header['format_version']}, this version of the "
        f"project reads {FORMAT_VERSION}; save it again with the version that compares it"
    )


def _read(header: Mapping[str, Any], arrays: _Arrays) -> Run:
    steps = int(header["steps"])
    prompts = tuple(
        _read_prompt(f"{number}/", tuple(prompt), steps, header["values"], arrays)
        for number, prompt in enumerate(header["prompts"])
    )
    if not prompts:
        raise ValueError("it holds no prompt")
    windows = tuple(tuple(window) for window in header["windows"])
    logits = tuple(arrays[f"text/{number}"] for number in range(len(windows)))
    if any(len(a) != len(b) for a, b in zip(windows, logits, strict=True)):
        raise ValueError("a window of its text has another length than its logits")
    return Run(
        subject=Subject(**{name: header["subject"][name] for name in _SUBJECT_FIELDS}),
        steps=steps,
        taps=tuple(header["taps"]),
        missing=tuple(header["missing"]),
        prompts=prompts,
        text=TextRun(windows=windows, logits=logits) if windows else None,
    )


def _read_prompt(
    prefix: str, prompt: tuple[int, ...], steps: int, names: Sequence[str], arrays: _Arrays
) -> PromptRun:
    values: list[dict[str, npt.NDArray[np.float32]]] = [{} for _ in range(steps + 1)]
    for name in names:
        shapes = arrays[f"{prefix}shapes/{name}"]
        ends = shapes.prod(-1).cumsum()
        flat = arrays[f"{prefix}values/{name}"]
        if len(shapes) != steps + 1 or len(flat) != ends[-1]:
            raise ValueError(f"{name} has {len(shapes)} steps instead of {steps + 1}")
        for step, part in enumerate(np.split(flat, ends[:-1])):
            values[step][name] = part.reshape(shapes[step])
    tokens, logits = arrays[f"{prefix}tokens"], arrays[f"{prefix}logits"]
    if len(tokens) != steps or len(logits) != steps + 1:
        raise ValueError(f"a prompt has {len(tokens)} tokens and {len(logits)} logits")
    kept: tuple[Values, ...] = tuple(values) if names else ()
    return PromptRun(
        prompt=prompt,
        tokens=tokens,
        logits=logits,
        tapped_logits=arrays.get(f"{prefix}tapped_logits"),
        values=kept,
        own_tokens=arrays.get(f"{prefix}own_tokens"),
    )


def check_comparable(reference: Run, candidate: Run) -> None:
    """Refuse runs whose differences would mean nothing.

    Raises:
        ValueError: other checkpoints, limits, router modes, prompts, steps, tokens or texts; says
            which and what to do.
    """
    check_subjects(reference.subject, candidate.subject)
    prompts = [[p.prompt for p in run.prompts] for run in (reference, candidate)]
    tokens = [[p.tokens.tolist() for p in run.prompts] for run in (reference, candidate)]
    texts = [None if run.text is None else run.text.windows for run in (reference, candidate)]
    differing = [
        name
        for name, (a, b) in (("prompts", prompts), ("steps or tokens", tokens), ("texts", texts))
        if a != b
    ]
    if differing:
        raise ValueError(
            f"the runs were fed different {' and '.join(differing)}; record the second with --load "
            "of the first and --save, which feeds it the same"
        )


def check_subjects(a: Subject, b: Subject) -> None:
    """Refuse to look for the first layer that parts where all of them do.

    Raises:
        ValueError: other checkpoints, configurations, limits or router modes.
    """
    if (a.weights_sha256, a.config) != (b.weights_sha256, b.config):
        raise ValueError(
            f"{a.rung} and {b.rung} are of different checkpoints (weights {a.weights_sha256[:12]} "
            f"and {b.weights_sha256[:12]}) or configurations; build both bundles of one checkpoint"
        )
    flags = {"max_input_len": "--max-input-len", "max_seq_len": "--max-seq-len"}
    for name, flag in (flags | {"router_mode": "--router"}).items():
        if getattr(a, name) != getattr(b, name):
            raise ValueError(
                f"{a.rung} and {b.rung} have different limits: {name} is {getattr(a, name)} and "
                f"{getattr(b, name)}; build both bundles with the same {flag}"
            )
