import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, trainers

from runtime.text_stream import TextStream
from runtime.tokenizer import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
SAMPLE = "the cat sat on the mat. 日本語 naïve 👩‍👩‍👧 the theme\n\n"


def byte_level() -> Tokenizer:
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator([SAMPLE] * 3, trainer)
    return Tokenizer(library, {"bos_token": "<s>"}, None, {})


def byte_fallback() -> Tokenizer:
    """In the manner of SentencePiece: ▁ for a space, one dropped at the beginning, byte tokens."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["▁", "▁the", "▁cat", "t", "h", "e", "th", "the", "日", "▁日本", "\n", REPLACEMENT]
    vocab = {word: i for i, word in enumerate(words)}
    merges = [("t", "h"), ("th", "e"), ("▁", "the")]
    library = Library(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return Tokenizer(library, {"bos_token": "<s>"}, None, {})


def metaspace() -> Tokenizer:
    vocab = {word: i for i, word in enumerate(["▁the", "▁cat", "s", "▁", "é", "👩"])}
    library = Library(models.BPE(vocab, []))
    library.decoder = decoders.Metaspace()
    return Tokenizer(library, {}, None, {})


TOKENIZERS = {
    "byte_level": byte_level(),
    "byte_fallback": byte_fallback(),
    "metaspace": metaspace(),
}
each_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=list(TOKENIZERS))


def streamed(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...] = ()):
    stream = TextStream(tokenizer, stop)
    pieces = []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    consumed = len(pieces)
    pieces.append(stream.finish())
    return stream, pieces, consumed


def naive_stop(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...]):
    """Decode everything again after each token and search all of it."""
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:count])
        found = [i for s in stop if (i := text.find(s)) >= 0]
        if found:
            return text[: min(found)], count
    return tokenizer.decode(ids), None


def any_ids(tokenizer: Tokenizer):
    return st.lists(st.integers(0, tokenizer.vocab_size + 1), max_size=60)


@each_tokenizer
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_pieces_make_the_decoded_text_for_any_ids(tokenizer, data):
    ids = data.draw(any_ids(tokenizer))
    stream, pieces, _ = streamed(tokenizer, ids)
    assert "".join(pieces) == stream.text == tokenizer.decode(ids)
    assert not stream.stopped


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
@given(text=st.text(max_size=60))
@settings(max_examples=100, deadline=None)
def test_pieces_of_real_text_hold_whole_characters(name, text):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text, add_special_tokens=False)
    _, pieces, _ = streamed(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    if REPLACEMENT not in text:
        assert not any(REPLACEMENT in piece for piece in pieces)


@each_tokenizer
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_stop_strings_cut_where_a_search_of_the_whole_text_does(tokenizer, data):
    ids = data.draw(any_ids(tokenizer))
    whole = tokenizer.decode(ids).replace(REPLACEMENT, "")
    pieces_of_text = st.builds(
        lambda begin, size: whole[begin : begin + size] or "zz",
        st.integers(0, max(0, len(whole) - 1)),
        st.integers(1, 6),
    )
    letters = st.text(alphabet="the cat日👩\n", min_size=1, max_size=4)
    stop = tuple(data.draw(st.lists(pieces_of_text | letters, min_size=1, max_size=3)))
    expected, count = naive_stop(tokenizer, ids, stop)
    stream, pieces, consumed = streamed(tokenizer, ids, stop)
    assert "".join(pieces) == stream.text == expected
    assert stream.stopped == (count is not None)
    assert count is None or consumed == count
    assert all(s not in stream.text for s in stop)


def test_character_of_several_tokens_comes_with_its_last_byte():
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode("€", add_special_tokens=False)
    assert len(ids) == 3
    stream = TextStream(tokenizer)
    assert [stream.push(token) for token in ids] == ["", "", "€"]


def test_unfinished_character_comes_as_a_replacement_at_the_end():
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode("a€", add_special_tokens=False)[:-1]
    stream = TextStream(tokenizer)
    assert [stream.push(token) for token in ids] == ["a", "", ""]
    assert stream.finish() == REPLACEMENT
    assert stream.finish() == ""


def test_real_replacement_character_is_shown():
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode(f"{REPLACEMENT}a", add_special_tokens=False)
    _, pieces, _ = streamed(tokenizer, ids)
    assert "".join(pieces) == f"{REPLACEMENT}a"


def test_beginning_of_a_stop_string_is_held_back_until_it_is_none():
    tokenizer = TOKENIZERS["byte_level"]
    tokens = {c: tokenizer.encode(c, add_special_tokens=False)[0] for c in "xyz"}
    stream = TextStream(tokenizer, ["xyx"])
    assert [stream.push(tokens[c]) for c in "xyz"] == ["", "", "xyz"]
    assert [stream.push(tokens[c]) for c in "xyx"] == ["", "", ""]
    assert stream.stopped
    assert stream.text == "xyz"


def test_overlapping_beginnings_do_not_hide_a_stop_string():
    tokenizer = TOKENIZERS["byte_level"]
    tokens = {c: tokenizer.encode(c, add_special_tokens=False)[0] for c in "xy"}
    stream, pieces, _ = streamed(tokenizer, [tokens[c] for c in "xxxxy"], ("xxy",))
    assert stream.stopped
    assert "".join(pieces) == "xx"


def test_held_back_beginning_comes_at_the_end():
    tokenizer = TOKENIZERS["byte_level"]
    token = tokenizer.encode("x", add_special_tokens=False)[0]
    stream = TextStream(tokenizer, ["xyz"])
    assert stream.push(token) == ""
    assert stream.finish() == "x"


def test_newline_as_a_byte_token_stops_at_once():
    tokenizer = TOKENIZERS["byte_fallback"]
    newline = tokenizer.library.token_to_id("<0x0A>")
    stream = TextStream(tokenizer, ["\n"])
    assert stream.push(tokenizer.library.token_to_id("▁cat")) == "cat"
    assert stream.push(newline) == ""
    assert stream.stopped
    assert stream.finish() == ""


@pytest.mark.parametrize("last", ["<0xFF>", "▁cat"])
def test_dropped_space_at_the_beginning_makes_no_stop_string(last):
    tokenizer = TOKENIZERS["byte_fallback"]
    ids = [tokenizer.library.token_to_id(token) for token in ("<0x20>", "<0x61>", last)]
    stream, pieces, _ = streamed(tokenizer, ids, (" a",))
    assert not stream.stopped
    assert "".join(pieces) == stream.text == tokenizer.decode(ids)


def test_nothing_follows_a_stop_string():
    tokenizer = TOKENIZERS["metaspace"]
    stream = TextStream(tokenizer, ["cat"])
    assert [stream.push(token) for token in (0, 1, 2)] == ["the", " ", ""]
    assert stream.text == "the "
    assert stream.finish() == ""


@pytest.mark.parametrize(
    ("name", "token"),
    [("byte_level", "ÿ"), ("byte_level", "e"), ("byte_fallback", "<0xFF>"), ("metaspace", "▁the")],
)
def test_cost_of_a_token_does_not_grow_with_the_text(name, token):
    tokenizer = TOKENIZERS[name]
    token_id = tokenizer.library.token_to_id(token)
    calls: list[int] = []
    decode = tokenizer.library.decode

    class Counting:
        def __getattr__(self, attribute):
            return getattr(tokenizer.library, attribute)

        def decode(self, ids, skip_special_tokens):
            calls.append(len(ids))
            return decode(ids, skip_special_tokens=skip_special_tokens)

    counted = Tokenizer(tokenizer.library, {}, None, {})
    counted.library = Counting()  # type: ignore[assignment]
    stream = TextStream(counted, ["stop"])
    begin = time.perf_counter()
    for _ in range(3000):
        stream.push(token_id)
    assert time.perf_counter() - begin < 5
    assert sum(calls) < 3000 * 20
