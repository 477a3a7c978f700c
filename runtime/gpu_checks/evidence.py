"""The evidence file: what one run on one GPU found, to be kept in the repository."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from runtime.gpu_checks.section import VERDICTS, Report, Verdict
from runtime.strict_json import KIND_NAMES, Kinds, kind_of, parse_json, read_object

EVIDENCE_FORMAT = 1
_LINE_WIDTH = 160
_KINDS: Kinds = {
    "format": (int,),
    "gpu": (str,),
    "compute_capability": (str,),
    "driver_cuda": (str,),
    "project_version": (str,),
    "commit": (str, type(None)),
    "command": (str,),
    "date": (str,),
    "seed": (int,),
    "seconds": (float, int),
    "verdict": (str,),
    "sections": (dict,),
}
_PATTERNS = {
    "compute_capability": (r"\d+\.\d+", "one like 8.9"),
    "driver_cuda": (r"\d+\.\d+", "one like 13.0"),
    "commit": (r"[0-9a-f]{40}(\+changes)?", "40 hexadecimal digits, +changes"),
    "date": (r"\d{4}-\d\d-\d\d", "one like 2026-12-31"),
}


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """One run of the GPU check.

    Attributes:
        gpu: what its driver calls it.
        compute_capability: `8.9`.
        driver_cuda: CUDA version up to which the driver goes, `13.0`.
        project_version: of this project.
        commit: of the checkout, with `+changes` where files differed from it; None outside of one.
        command: that made this, with the seed.
        date: of the run, UTC.
        seed: of the random inputs.
        seconds: of the whole run.
        verdict: on everything.
        sections: every section's report by name; each has a `verdict`.
        format: of this file.
    """

    gpu: str
    compute_capability: str
    driver_cuda: str
    project_version: str
    commit: str | None
    command: str
    date: str
    seed: int
    seconds: float
    verdict: Verdict
    sections: Mapping[str, Report]
    format: int = EVIDENCE_FORMAT

    @property
    def file_name(self) -> str:
        """One name for each model of a GPU."""
        return f"evidence-{re.sub(r'[^a-z0-9]+', '-', self.gpu.lower()).strip('-')}.json"

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)

    def write(self, folder: Path) -> Path:
        """Write the file, in place of one that is there, and give its path.

        Raises:
            OSError: the folder cannot be made or written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / self.file_name
        text = _dumped(self.as_dict())
        part = path.with_name(f"{path.name}.part")
        part.write_text(text + "\n", encoding="utf-8")
        os.replace(part, path)
        return path

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what `write` writes.

        Raises:
            OSError: the file cannot be read.
            ValueError: another format, or every problem at once.
        """
        try:
            return cls.from_dict(parse_json(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"evidence {path} is broken: {error}") from error

    @classmethod
    def from_dict(cls, data: object) -> Self:
        """Read what `as_dict` gives.

        Raises:
            ValueError: as `read`.
        """
        found = data.get("format") if isinstance(data, dict) else None
        if isinstance(data, dict) and (found != EVIDENCE_FORMAT or isinstance(found, bool)):
            raise ValueError(
                f"format is {found!r}, this version of the project reads {EVIDENCE_FORMAT}"
            )
        problems: list[str] = []
        values = read_object(data, "", _KINDS, problems)
        problems += _pattern_problems(values)
        problems += _verdict_problems("verdict", values.get("verdict", VERDICTS[0]))
        for name, section in values.get("sections", {}).items():
            problems += _section_problems(f"sections.{name}", section)
        if problems:
            raise ValueError("; ".join(problems))
        return cls(**values)


def _dumped(value: Any, depth: int = 0) -> str:
    """JSON in which whatever fits on a line stands on one: files that can be read and compared."""
    line = json.dumps(value, allow_nan=False, ensure_ascii=False)
    if depth + len(line) <= _LINE_WIDTH or not isinstance(value, dict | list):
        return line
    inner, outer = "\n" + " " * (depth + 1), "\n" + " " * depth
    if isinstance(value, list):
        return f"[{inner}{f',{inner}'.join(_dumped(item, depth + 1) for item in value)}{outer}]"
    members = (
        f"{json.dumps(name, ensure_ascii=False)}: {_dumped(item, depth + 1)}"
        for name, item in value.items()
    )
    return f"{{{inner}{f',{inner}'.join(members)}{outer}}}"


def _pattern_problems(values: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} is {values[name]!r}, expected {example}"
        for name, (pattern, example) in _PATTERNS.items()
        if values.get(name) is not None and not re.fullmatch(pattern, values[name])
    ]


def _section_problems(where: str, section: object) -> list[str]:
    """A section may hold anything beside its verdict, and those of its cases."""
    if not isinstance(section, dict):
        return [f"{where} is {kind_of(section)}, expected {KIND_NAMES[dict]}"]
    problems = _verdict_problems(f"{where}.verdict", section.get("verdict"))
    cases = section.get("cases", [])
    if not isinstance(cases, list):
        return [*problems, f"{where}.cases is {kind_of(cases)}, expected {KIND_NAMES[list]}"]
    for number, case in enumerate(cases):
        verdict = case.get("verdict") if isinstance(case, dict) else None
        problems += _verdict_problems(f"{where}.cases[{number}].verdict", verdict)
    return problems


def _verdict_problems(where: str, verdict: object) -> list[str]:
    if verdict in VERDICTS:
        return []
    return [f"{where} is {verdict!r}, expected one of {', '.join(VERDICTS)}"]
