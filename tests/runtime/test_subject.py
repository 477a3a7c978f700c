"""Prompts of the audit, and a backend as its subject."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from runtime.backends.torch_backend import TorchBackend
from runtime.subject import BackendSubject, base_prompts, feed, make_prompts, prefill_and_decode
from tests.tiny_doge import MOE, write_checkpoint


def open_subject(folder: Path, router_mode: str | None = None) -> BackendSubject:
    return BackendSubject(
        "ours", TorchBackend.from_checkpoint(folder, router_mode=router_mode), None
    )


@pytest.mark.parametrize(("vocab_size", "length"), [(97, 32), (64, 32), (40, 32), (20, 32), (2, 8)])
def test_prompts_repeat_no_token_where_the_vocabulary_allows_it(
    vocab_size: int, length: int
) -> None:
    for prompt in make_prompts(vocab_size, 4, length):
        assert len(prompt.ids) == len(prompt.others) == length
        assert ((prompt.ids >= 0) & (prompt.ids < vocab_size)).all()
        assert (prompt.ids != prompt.others).all()
        assert prompt.repeats == max(0, length - vocab_size)
        if 2 * length <= vocab_size:
            assert len({*prompt.ids, *prompt.others}) == 2 * length


def test_prompts_are_the_same_at_every_call() -> None:
    first, second = (make_prompts(97, 4, 32) for _ in range(2))
    assert all((a.ids == b.ids).all() for a, b in zip(first, second, strict=True))
    assert len({tuple(prompt.ids) for prompt in first}) == 4


def test_model_too_small_to_audit_is_an_error(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, max_position_embeddings=7)
    with pytest.raises(ValueError, match=r"a context of 7 tokens .* at least 8"):
        base_prompts(open_subject(tmp_path))


def test_backend_takes_its_whole_context(tiny_dense: Path) -> None:
    subject = open_subject(tiny_dense)
    assert (subject.context, subject.longest, subject.vocab_size) == (256, 256, 97)
    assert subject.router is None
    with pytest.raises(ValueError, match="outside 1 to 256"):
        subject.start(1, 257)


@pytest.mark.parametrize("mode", ["mixed", "per_token"])
def test_router_mode_is_that_of_the_backend(tiny_moe: Path, mode: str) -> None:
    assert open_subject(tiny_moe, mode).router == mode


def test_last_only_gives_the_last_of_all_logits(tiny_dense: Path) -> None:
    subject = open_subject(tiny_dense)
    rows = [
        prompt.ids[:length]
        for prompt, length in zip(make_prompts(97, 3, 9), (9, 1, 4), strict=True)
    ]
    every = subject.one_pass(rows)
    last = subject.one_pass(rows, last_only=True)
    for row, all_of_row, last_of_row in zip(rows, every, last, strict=True):
        assert all_of_row.shape == (len(row), 97)
        assert last_of_row.shape == (1, 97)
        np.testing.assert_allclose(last_of_row[0], all_of_row[-1], atol=1e-4)


def test_feeding_gives_the_logits_of_every_token(tmp_path: Path) -> None:
    subject = open_subject(write_checkpoint(tmp_path, **MOE), "per_token")
    ids = make_prompts(97, 1, 12)[0].ids
    whole = subject.one_pass([ids])[0]
    for found in (feed(subject, [ids], [5, 1, 1, 5])[0], prefill_and_decode(subject, [ids])[0]):
        np.testing.assert_allclose(found, whole, atol=1e-4)
