"""Tokenizer folders as checkpoints have them: which file says what, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from runtime.tokenizer import Tokenizer, read_generation_config

WORDS = ["<bos>", "<eos>", "<pad>", "the", "cat", "<tool>"]


def word_library(*, bos: bool = False) -> tokenizers.Tokenizer:
    """One token per word; `<tool>` is an added token that is not special."""
    vocab = {word: i for i, word in enumerate(WORDS)}
    library = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.add_special_tokens(["<bos>", "<eos>", "<pad>"])
    library.add_tokens(["<tool>"])
    if bos:
        library.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 0)]
        )
    return library


def byte_library(*, fallback: bool) -> tokenizers.Tokenizer:
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "x"]
    vocab = {word: i for i, word in enumerate(words)}
    library = tokenizers.Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    library.decoder = decoders.ByteFallback() if fallback else decoders.Fuse()
    return library


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    word_library(bos=True).save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write(folder: Path, name: str, data: object) -> None:
    (folder / name).write_text(json.dumps(data), encoding="utf-8")


def test_ids_and_text_with_and_without_special_tokens(folder: Path) -> None:
    tokenizer = Tokenizer.open(folder)
    assert tokenizer.encode("the cat") == [0, 3, 4]
    assert tokenizer.encode("the cat", add_special_tokens=False) == [3, 4]
    assert tokenizer.decode([0, 3, 4, 1]) == "the cat"
    assert tokenizer.decode([0, 3, 1], skip_special_tokens=False) == "<bos> the <eos>"
    assert tokenizer.decode([3, 99, 4]) == "the cat"
    assert tokenizer.vocab_size == len(WORDS)


def test_padding_and_truncation_of_the_file_are_switched_off(tmp_path: Path) -> None:
    library = word_library()
    library.enable_padding(length=8, pad_id=2, pad_token="<pad>")
    library.enable_truncation(2)
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.open(tmp_path)
    assert tokenizer.encode("the cat the cat the") == [3, 4, 3, 4, 3]
    assert tokenizer.encode("cat") == [4]


def test_folder_of_nothing_but_the_tokenizer_has_no_special_tokens(folder: Path) -> None:
    tokenizer = Tokenizer.open(folder)
    assert tokenizer.special_tokens == {}
    assert tokenizer.bos_token_id is None
    assert tokenizer.eos_token_ids == ()
    assert tokenizer.chat_template is None
    assert not tokenizer.prepends_bos


def test_special_tokens_are_read_in_both_spellings(folder: Path) -> None:
    write(
        folder,
        "tokenizer_config.json",
        {"bos_token": "<bos>", "eos_token": {"content": "<eos>", "lstrip": False}, "pad_token": ""},
    )
    tokenizer = Tokenizer.open(folder)
    assert tokenizer.special_tokens == {"bos_token": "<bos>", "eos_token": "<eos>"}
    assert tokenizer.bos_token_id == 0
    assert tokenizer.eos_token_ids == (1,)
    assert tokenizer.prepends_bos


def test_tokenizer_config_goes_before_the_special_tokens_map(folder: Path) -> None:
    write(folder, "special_tokens_map.json", {"bos_token": "<pad>", "eos_token": "<eos>"})
    write(folder, "tokenizer_config.json", {"bos_token": "<bos>"})
    tokenizer = Tokenizer.open(folder)
    assert tokenizer.special_tokens == {"bos_token": "<bos>", "eos_token": "<eos>"}


@pytest.mark.parametrize(("value", "ids"), [(5, (5,)), ([4, 1], (4, 1)), (None, ())])
def test_generation_config_says_what_ends_a_text(
    folder: Path, value: object, ids: tuple[int, ...]
) -> None:
    write(folder, "tokenizer_config.json", {"eos_token": "<eos>"})
    write(folder, "generation_config.json", {"eos_token_id": value})
    assert Tokenizer.open(folder).eos_token_ids == ids


@pytest.mark.parametrize("value", ["<eos>", [1, "2"], True, 1.0])
def test_end_of_text_that_is_no_id_is_an_error(folder: Path, value: object) -> None:
    write(folder, "generation_config.json", {"eos_token_id": value})
    with pytest.raises(ValueError, match="eos_token_id must be one id or a list of ids, got "):
        Tokenizer.open(folder)


def test_prepends_bos_is_what_the_tokenizer_does_not_what_it_names() -> None:
    assert not Tokenizer(word_library(), {"bos_token": "<bos>"}, None, {}).prepends_bos
    assert not Tokenizer(word_library(bos=True), {"bos_token": "<eos>"}, None, {}).prepends_bos


def test_special_and_unknown_ids_are_silent() -> None:
    tokenizer = Tokenizer(word_library(), {}, None, {})
    silent = [tokenizer.is_silent(i) for i in range(len(WORDS) + 1)]
    assert silent == [True, True, True, False, False, False, True]


def test_byte_tokens_are_known_where_the_decoder_makes_bytes_of_them() -> None:
    tokenizer = Tokenizer(byte_library(fallback=True), {}, None, {})
    assert [tokenizer.byte_of(1 + byte) for byte in range(256)] == [*range(256)]
    assert tokenizer.byte_of(0) is None
    assert tokenizer.byte_of(257) is None
    spelled = Tokenizer(byte_library(fallback=False), {}, None, {})
    assert spelled.byte_of(1 + ord("A")) is None


def test_chat_template_is_a_string_or_the_default_of_a_list(folder: Path) -> None:
    write(folder, "tokenizer_config.json", {"chat_template": "a string"})
    assert Tokenizer.open(folder).chat_template == "a string"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    write(folder, "tokenizer_config.json", {"chat_template": named})
    assert Tokenizer.open(folder).chat_template == "d"
    write(folder, "tokenizer_config.json", {"chat_template": named[:1]})
    assert Tokenizer.open(folder).chat_template is None


def test_chat_template_of_its_own_file_goes_first(folder: Path) -> None:
    write(folder, "tokenizer_config.json", {"chat_template": "a string"})
    (folder / "chat_template.jinja").write_text("a file", encoding="utf-8")
    assert Tokenizer.open(folder).chat_template == "a file"


def test_folder_without_a_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json"):
        Tokenizer.open(tmp_path)


def test_file_that_is_no_tokenizer_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, "tokenizer.json", {"model": "none"})
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer: "):
        Tokenizer.open(tmp_path)


@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "special_tokens_map.json", "generation_config.json"]
)
@pytest.mark.parametrize(
    ("content", "problem"), [("{", "is not JSON"), ("[]", "must hold one JSON object")]
)
def test_broken_file_beside_the_tokenizer_is_named(
    folder: Path, name: str, content: str, problem: str
) -> None:
    (folder / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=f"{name} {problem}"):
        Tokenizer.open(folder)


# --- the sampling values of generation_config.json ---


def test_sampling_values_come_by_the_names_of_the_parameters(tmp_path: Path) -> None:
    write(
        tmp_path,
        "generation_config.json",
        {
            "do_sample": True,
            "temperature": 0.6,
            "top_k": 20,
            "top_p": 0.9,
            "min_p": None,
            "repetition_penalty": 1,
            "max_new_tokens": 50,
            "min_new_tokens": 2,
            "eos_token_id": 1,
            "length_penalty": 2.0,
        },
    )
    assert read_generation_config(tmp_path) == {
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.9,
        "repetition_penalty": 1,
        "max_tokens": 50,
        "min_tokens": 2,
    }


def test_no_sampling_is_temperature_zero(tmp_path: Path) -> None:
    write(tmp_path, "generation_config.json", {"do_sample": False, "temperature": 0.6})
    assert read_generation_config(tmp_path) == {"temperature": 0.0}


def test_sampling_values_of_another_type_are_named_together(tmp_path: Path) -> None:
    write(tmp_path, "generation_config.json", {"temperature": "hot", "top_k": 2.5, "top_p": True})
    with pytest.raises(ValueError, match=r"generation_config\.json: ") as caught:
        read_generation_config(tmp_path)
    assert "temperature must be a number, got 'hot'" in str(caught.value)
    assert "top_k must be a whole number, got 2.5" in str(caught.value)
    assert "top_p must be a number, got True" in str(caught.value)


def test_checkpoint_without_a_generation_config_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="leave out --generation-config"):
        read_generation_config(tmp_path)
