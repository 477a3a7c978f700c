"""A checkpoint's tokenizer: text to ids and back, special tokens, chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import tokenizers

_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


class Tokenizer:
    """Wraps the `tokenizers` library with what the other files of a tokenizer folder say.

    Attributes:
        special_tokens: e.g. `bos_token` to its text, as chat templates ask for them.
        chat_template: jinja source, None when the checkpoint has none.
        bos_token_id: id that a text begins with, None when there is none.
        eos_token_ids: end-of-text ids, those of generation_config.json first.
    """

    def __init__(
        self,
        library: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str],
        chat_template: str | None,
        generation_config: Mapping[str, Any],
    ) -> None:
        self.library = library
        self.special_tokens = special_tokens
        self.chat_template = chat_template
        self.bos_token_id = self._id_of("bos_token")
        eos = generation_config.get("eos_token_id", self._id_of("eos_token"))
        self.eos_token_ids = _as_ids(eos)

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Read the tokenizer in `folder`.

        Raises:
            FileNotFoundError: there is no tokenizer.json.
            ValueError: a file cannot be read.
        """
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise FileNotFoundError(f"{folder} has no tokenizer.json")
        try:
            library = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{file} is not a tokenizer: {error}") from error
        config = _read_json(folder / "tokenizer_config.json")
        named = {**_read_json(folder / "special_tokens_map.json"), **config}
        special = {name: text for name in _SPECIAL if (text := _token_text(named.get(name)))}
        return cls(
            library,
            special,
            _read_template(folder, config),
            _read_json(folder / "generation_config.json"),
        )

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return self.library.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text; with `add_special_tokens` what the tokenizer puts around it."""
        return self.library.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        return self.library.decode(list(ids), skip_special_tokens=True)

    def _id_of(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self.library.token_to_id(text)


def read_generation_config(folder: Path) -> dict[str, Any]:
    """Sampling values of generation_config.json, by their names in `SamplingParams`.

    `do_sample: false`, transformers' word for greedy, becomes temperature 0.

    Raises:
        ValueError: the file is not JSON.
    """
    config = _read_json(folder / "generation_config.json")
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    values = {name: config[name] for name in names if config.get(name) is not None}
    if config.get("max_new_tokens") is not None:
        values["max_tokens"] = config["max_new_tokens"]
    if config.get("do_sample") is False:
        values["temperature"] = 0.0
    return values


def _as_ids(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in values):
        raise ValueError(f"eos_token_id must be one id or a list of ids, got {value!r}")
    return tuple(values)


def _read_json(file: Path) -> dict[str, Any]:
    """The object in a file; empty when there is no such file."""
    if not file.is_file():
        return {}
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{file} must hold one JSON object")
    return data


def _token_text(value: object) -> str | None:
    """A special token's text; files spell it as a string or as an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _read_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template: its own file, or tokenizer_config.json's, a string or a named list."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None
