"""A tokenizer folder: which files say what, and what is wrong with a broken one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from runtime.sampling import SamplingParams
from runtime.tokenizer import Tokenizer, read_generation_config

SPECIAL = ["<s>", "</s>", "<pad>", "<end>"]
BOS, EOS, _, END = range(4)


def library(*, bos: bool = True) -> Library:
    made = Library(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["the cat sat on the mat"] * 3, trainer)
    if bos:
        made.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", BOS)])
    return made


def write(folder: Path, files: dict[str, Any], *, bos: bool = True) -> Path:
    library(bos=bos).save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def opened(folder: Path, files: dict[str, Any], *, bos: bool = True) -> Tokenizer:
    return Tokenizer.open(write(folder, files, bos=bos))


CONFIG = {"bos_token": "<s>", "eos_token": "</s>"}


def test_text_survives_a_round_trip(tmp_path: Path) -> None:
    tokenizer = opened(tmp_path, {})
    text = "the cat, 猫 🐈\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_put_around_only_when_asked_for(tmp_path: Path) -> None:
    tokenizer = opened(tmp_path, {"tokenizer_config.json": CONFIG})
    with_bos = tokenizer.encode("the")
    assert with_bos == [BOS, *tokenizer.encode("the", add_special_tokens=False)]
    assert tokenizer.decode(with_bos) == "the"
    assert tokenizer.decode(with_bos, skip_special_tokens=False) == "<s>the"


def test_vocabulary_size_counts_added_tokens(tmp_path: Path) -> None:
    assert opened(tmp_path, {}).vocab_size == library().get_vocab_size(with_added_tokens=True)


def test_tokenizer_json_alone_is_enough(tmp_path: Path) -> None:
    tokenizer = opened(tmp_path, {})
    assert tokenizer.chat_template is None
    assert tokenizer.eos_token_ids == ()
    assert dict(tokenizer.special_tokens) == {}


def test_special_tokens_are_read_as_text_or_as_objects(tmp_path: Path) -> None:
    config = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>"}
    tokenizer = opened(tmp_path, {"tokenizer_config.json": config | {"unk_token": None}})
    assert dict(tokenizer.special_tokens) == {"bos_token": "<s>", "eos_token": "</s>"}
    assert tokenizer.bos_token_id == BOS
    assert tokenizer.eos_token_ids == (EOS,)


def test_special_tokens_map_fills_what_the_config_lacks(tmp_path: Path) -> None:
    files = {
        "tokenizer_config.json": {"bos_token": "<s>"},
        "special_tokens_map.json": {"bos_token": "<end>", "pad_token": {"content": "<pad>"}},
    }
    tokenizer = opened(tmp_path, files)
    assert dict(tokenizer.special_tokens) == {"bos_token": "<s>", "pad_token": "<pad>"}


@pytest.mark.parametrize(("value", "expected"), [(END, (END,)), ([EOS, END], (EOS, END))])
def test_end_of_text_ids_come_from_generation_config_first(
    tmp_path: Path, value: object, expected: tuple[int, ...]
) -> None:
    files = {"tokenizer_config.json": CONFIG, "generation_config.json": {"eos_token_id": value}}
    assert opened(tmp_path, files).eos_token_ids == expected


def test_end_of_text_id_falls_back_to_the_tokenizers(tmp_path: Path) -> None:
    files = {"tokenizer_config.json": CONFIG, "generation_config.json": {"bos_token_id": BOS}}
    assert opened(tmp_path, files).eos_token_ids == (EOS,)


def test_end_of_text_id_of_another_type_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="eos_token_id"):
        opened(tmp_path, {"generation_config.json": {"eos_token_id": "</s>"}})


@pytest.mark.parametrize(("bos", "expected"), [(True, True), (False, False)])
def test_tells_whether_begin_of_text_is_prepended(
    tmp_path: Path, bos: bool, expected: bool
) -> None:
    assert opened(tmp_path, {"tokenizer_config.json": CONFIG}, bos=bos).prepends_bos is expected


def test_chat_template_is_a_text_of_the_config(tmp_path: Path) -> None:
    tokenizer = opened(tmp_path, {"tokenizer_config.json": {"chat_template": "hello"}})
    assert tokenizer.chat_template == "hello"


def test_chat_template_named_default_is_taken_from_a_list(tmp_path: Path) -> None:
    templates = [
        {"name": "tool_use", "template": "tools"},
        {"name": "default", "template": "plain"},
    ]
    tokenizer = opened(tmp_path, {"tokenizer_config.json": {"chat_template": templates}})
    assert tokenizer.chat_template == "plain"


def test_chat_template_file_goes_before_the_config(tmp_path: Path) -> None:
    files = {"tokenizer_config.json": {"chat_template": "old"}, "chat_template.jinja": "new"}
    assert opened(tmp_path, files).chat_template == "new"


def test_truncation_and_padding_of_the_file_are_switched_off(tmp_path: Path) -> None:
    made = library()
    made.enable_truncation(4)
    made.enable_padding(length=50, pad_id=2, pad_token="<pad>")
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.open(tmp_path)
    text = "the cat sat on the mat and the mat"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("the")) < 10


def test_missing_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        Tokenizer.open(tmp_path)


def test_broken_tokenizer_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.open(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("content", ["{", "[1]"])
def test_broken_file_beside_the_tokenizer_is_named(tmp_path: Path, name: str, content: str) -> None:
    with pytest.raises(ValueError, match=name):
        opened(tmp_path, {name: content})


# --- generation_config.json ---


def generation_config(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    (folder / "generation_config.json").write_text(json.dumps(content))
    return read_generation_config(folder)


def test_sampling_values_get_the_names_of_sampling_parameters(tmp_path: Path) -> None:
    content = {
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 20,
        "repetition_penalty": 1.1,
        "max_new_tokens": 100,
        "do_sample": True,
        "eos_token_id": 1,
        "transformers_version": "4.48.0",
    }
    values = generation_config(tmp_path, content)
    assert values == {
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 20,
        "repetition_penalty": 1.1,
        "max_tokens": 100,
    }
    assert SamplingParams(**values).max_tokens == 100


def test_no_sampling_means_greedy(tmp_path: Path) -> None:
    values = generation_config(tmp_path, {"do_sample": False, "temperature": 0.6})
    assert values["temperature"] == 0


def test_null_values_are_not_given(tmp_path: Path) -> None:
    assert generation_config(tmp_path, {"temperature": None, "top_k": None}) == {}


def test_value_that_is_no_number_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="temperature"):
        generation_config(tmp_path, {"temperature": "hot"})


def test_missing_generation_config_is_an_error_that_names_the_flag(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--generation-config"):
        read_generation_config(tmp_path)


# --- ids without text and ids of bytes ---


def test_special_ids_and_ids_beyond_the_vocabulary_are_silent(tmp_path: Path) -> None:
    made = library()
    made.add_tokens(["<tool>"])  # added, but not special
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.open(tmp_path)
    assert all(tokenizer.is_silent(i) for i in range(len(SPECIAL)))
    assert not any(tokenizer.is_silent(i) for i in range(len(SPECIAL), tokenizer.vocab_size))
    assert tokenizer.is_silent(tokenizer.vocab_size)
    assert tokenizer.decode([tokenizer.vocab_size]) == ""


@pytest.mark.parametrize("fallback", [True, False])
def test_byte_tokens_are_bytes_where_the_decoder_makes_bytes_of_them(fallback: bool) -> None:
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "x"]
    vocab = {word: i for i, word in enumerate(words)}
    made = Library(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    made.decoder = decoders.ByteFallback() if fallback else decoders.Fuse()
    tokenizer = Tokenizer(made, {}, None, {})
    expected = [*range(256)] if fallback else [None] * 256
    assert [tokenizer.byte_of(1 + byte) for byte in range(256)] == expected
    assert tokenizer.byte_of(0) is None
    assert tokenizer.byte_of(257) is None


def test_every_sampling_value_of_another_type_is_named(tmp_path: Path) -> None:
    wrong = {"temperature": "hot", "top_k": 2.5, "top_p": True}
    with pytest.raises(ValueError, match=r"generation_config\.json: ") as caught:
        generation_config(tmp_path, wrong)
    assert "temperature must be a number, got 'hot'" in str(caught.value)
    assert "top_k must be a whole number, got 2.5" in str(caught.value)
    assert "top_p must be a number, got True" in str(caught.value)


def test_text_that_is_not_unicode_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not valid UTF-8"):
        opened(tmp_path, {}).encode("a\udcffb")
