"""A checkpoint's tokenizer: text to ids and back, special tokens, chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import tokenizers

_SPECIAL = (
    "bos_token",
    "eos_token",
    "pad_token",
    "unk_token",
    "sep_token",
    "cls_token",
    "mask_token",
)
# Keys of generation_config.json: the name in `SamplingParams` and what JSON may hold there.
_SAMPLING_KEYS: Mapping[str, tuple[str, tuple[type, ...]]] = {
    "temperature": ("temperature", (int, float)),
    "top_k": ("top_k", (int,)),
    "top_p": ("top_p", (int, float)),
    "min_p": ("min_p", (int, float)),
    "repetition_penalty": ("repetition_penalty", (int, float)),
    "max_new_tokens": ("max_tokens", (int,)),
    "min_new_tokens": ("min_tokens", (int,)),
}


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
        # A text is one sequence of its own length, whatever the checkpoint was trained with.
        library.no_padding()
        library.no_truncation()
        self.library = library
        self.special_tokens = special_tokens
        self.chat_template = chat_template
        self.bos_token_id = self._id_of("bos_token")
        eos = generation_config.get("eos_token_id", self._id_of("eos_token"))
        self.eos_token_ids = _as_ids(eos)
        added = library.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        self._bytes = _byte_tokens(library)

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
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError("the text is not valid UTF-8") from error
        return self.library.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ids, special tokens left out unless asked for; unknown ids give nothing."""
        return self.library.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def is_silent(self, token_id: int) -> bool:
        """Whether an id gives no text: a special token, or one that the tokenizer does not know.

        A model's vocabulary may be padded beyond its tokenizer's.
        """
        return token_id in self._special_ids or self.library.id_to_token(token_id) is None

    def byte_of(self, token_id: int) -> int | None:
        """The byte that a byte-fallback token stands for, None for every other token."""
        return self._bytes.get(token_id)

    @cached_property
    def prepends_bos(self) -> bool:
        """Whether a plain text's ids begin with begin-of-text."""
        return self.bos_token_id is not None and self.encode("")[:1] == [self.bos_token_id]

    def _id_of(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self.library.token_to_id(text)


def read_generation_config(folder: Path) -> dict[str, Any]:
    """Sampling values of generation_config.json, by their names in `SamplingParams`.

    `do_sample: false`, transformers' word for greedy, becomes temperature 0.

    Raises:
        FileNotFoundError: the checkpoint has no such file.
        ValueError: the file is not JSON, or a value is not a number.
    """
    file = folder / "generation_config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} has no generation_config.json; leave out --generation-config"
        )
    config = _read_json(file)
    given = {key: config[key] for key in _SAMPLING_KEYS if config.get(key) is not None}
    wrong = [
        f"{key} must be {'a whole number' if kinds == (int,) else 'a number'}, got {given[key]!r}"
        for key, (_, kinds) in _SAMPLING_KEYS.items()
        if key in given and type(given[key]) not in kinds
    ]
    if wrong:
        raise ValueError(f"{file}: {'; '.join(wrong)}")
    values = {_SAMPLING_KEYS[key][0]: value for key, value in given.items()}
    if config.get("do_sample") is False:
        values["temperature"] = 0.0
    return values


def _byte_tokens(library: tokenizers.Tokenizer) -> dict[int, int]:
    """Byte-fallback tokens, id to byte; empty where the decoder shows them as they are spelled."""
    ids = {library.token_to_id(f"<0x{byte:02X}>"): byte for byte in range(256)}
    found = {i: byte for i, byte in ids.items() if i is not None}
    first = next((i for i, byte in found.items() if byte == ord("A")), None)
    return found if first is not None and library.decode([first]) == "A" else {}


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
        entries = [entry for entry in template if isinstance(entry, dict)]
        named = {entry.get("name"): entry.get("template") for entry in entries}
        template = named.get("default")
    return template if isinstance(template, str) else None
