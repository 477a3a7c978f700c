"""Read JSON of our own: every key known, none missing, every type right, all problems told."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

JsonObject = dict[str, Any]
# Names of an object's members and the Python types that each may have.
Kinds = Mapping[str, tuple[type, ...]]

KIND_NAMES: Mapping[type, str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "an object",
    list: "a list",
    type(None): "null",
}


def parse_json(text: str) -> Any:
    """The value that `text` spells.

    Raises:
        ValueError: not one whole JSON value, a key that stands twice in one object, or a number
            that JSON does not know, such as NaN.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_repeats, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not whole, valid JSON: {error}") from error


def kind_of(value: object) -> str:
    """What a JSON value is, in words."""
    return KIND_NAMES.get(type(value), type(value).__name__)


def read_object(data: object, where: str, kinds: Kinds, problems: list[str]) -> JsonObject:
    """The members of an object that are as expected.

    Args:
        data: the value that should be an object.
        where: what messages call it; empty for the whole file.
        kinds: its members, all of them needed.
        problems: gets a sentence for each thing that is not as expected.

    Returns:
        Only what is right; all members when there was no problem.
    """
    if not isinstance(data, dict):
        problems.append(f"{where} is {kind_of(data)}, expected an object")
        return {}
    prefix = f"{where}." if where else ""
    problems += [f"{prefix}{name} is missing" for name in kinds if name not in data]
    problems += [f"{prefix}{name} is an unknown key" for name in sorted(set(data) - set(kinds))]
    values = {}
    for name, allowed in kinds.items():
        if name not in data:
            continue
        value = data[name]
        if type(value) in allowed:  # not isinstance: true and false are no whole numbers
            values[name] = value
        else:
            expected = " or ".join(KIND_NAMES[kind] for kind in allowed)
            problems.append(f"{prefix}{name} is {kind_of(value)}, expected {expected}")
    return values


def read_list(
    data: Sequence[object], where: str, kinds: Kinds, problems: list[str]
) -> list[JsonObject]:
    """`read_object` of every item."""
    return [
        read_object(item, f"{where}[{index}]", kinds, problems) for index, item in enumerate(data)
    ]


def _without_repeats(pairs: Sequence[tuple[str, Any]]) -> JsonObject:
    """An object, refused when a key stands twice: readers would differ on which one counts."""
    values: JsonObject = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"key {name!r} is given more than once")
        values[name] = value
    return values


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
