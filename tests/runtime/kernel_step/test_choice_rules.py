"""What the device reads to choose by is what the host would choose by."""

from __future__ import annotations

import numpy as np
import pytest

from plugins.token_choice.launches import GENERATED, IN_PROMPT, PARAMETERS
from runtime.kernel_step.choice_rules import ChoiceRules
from runtime.sampling import SamplingParams, make_sampler
from runtime.token_chooser import TokenChooser

VOCAB = 11


def chooser(params, stop_ids=()):
    """Two rows, the second prompt is the fourth of its request; each has got a token."""
    ids = np.array([[3, 4, 3], [5, 0, 0]])
    choice = TokenChooser(
        make_sampler(params, VOCAB), ids, np.array([3, 1]), np.array([0, 3]), frozenset(stop_ids)
    )
    choice.history.append(np.array([7, 8]), np.ones(2, bool))
    return choice


def rules_of(params, stop_ids=(), steps=70):
    choice = chooser(params, stop_ids)
    return choice, ChoiceRules.of(choice, vocab_size=VOCAB, rows=2, width=3, steps=steps)


def test_greedy_needs_nothing():
    _, rules = rules_of(SamplingParams(temperature=0.0))
    assert (rules.ending, rules.areas) == ("greedy", {})


def test_each_step_has_the_uniform_numbers_of_its_rows():
    params = SamplingParams(temperature=0.5, top_k=3, top_p=0.75, min_p=0.25, seed=9)
    choice, rules = rules_of(params)
    assert rules.ending == "drawn"
    assert rules.areas.keys() == {"parameters", "uniforms"}
    uniforms = rules.areas["uniforms"]
    assert (uniforms.shape, uniforms.dtype) == ((71, 3), np.float32)
    for count in range(1, 71):
        assert uniforms[count, :2].tolist() == choice.uniform(count).tolist()
    assert len(np.unique(uniforms[1:, :2])) == 140
    block = rules.areas["parameters"]
    assert (block.shape, block.dtype) == ((3, len(PARAMETERS)), np.float32)
    for name, value in (("temperature", 0.5), ("top_k", 3), ("top_p", 0.75), ("min_p", 0.25)):
        assert (block[:, PARAMETERS.index(name)] == value).all()


@pytest.mark.parametrize(
    "changes",
    [{"logit_bias": {2: 1.5}}, {"repetition_penalty": 1.5}, {"frequency_penalty": 0.5},
     {"presence_penalty": 0.5}, {"min_tokens": 2}],
)  # fmt: skip
@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_any_other_rule_takes_the_end_with_every_rule(changes, temperature):
    _, rules = rules_of(SamplingParams(temperature=temperature, **changes), (4, 1))
    assert rules.ending == "ruled"
    expected = np.zeros(VOCAB, np.float32)
    expected[2] = 1.5 if "logit_bias" in changes else 0
    assert rules.areas["bias"].tolist() == expected.tolist()
    forbidden = [1, 4] if "min_tokens" in changes else []
    stop_ids = rules.areas["stop_ids"]
    assert stop_ids.tolist() == forbidden + [-1] * (len(stop_ids) - len(forbidden))
    counts = np.zeros((3, VOCAB), np.int32)
    if "repetition_penalty" in changes:
        counts[0, [3, 4, 7]] = counts[1, [5, 8]] = IN_PROMPT
    if changes.keys() & {"frequency_penalty", "presence_penalty"}:
        counts[0, 7] = counts[1, 8] = GENERATED
    assert rules.areas["counts"].tolist() == counts.tolist()
