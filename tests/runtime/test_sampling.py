import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.sampling import (
    SamplingParams,
    boundary_distance,
    eligible,
    log_probabilities,
    make_sampler,
    pick,
    top_logprobs,
)

# Probabilities 1/2, 1/4, 1/8, 1/8 in shuffled ids: the order of drawing is 2, 0, 1, 3.
HALVES = np.log(np.array([0.25, 0.125, 0.5, 0.125], np.float32))


def next_token(params, logits, *, uniform=0.0, prompt=(0,), generated=(), forbidden=()):
    row = np.asarray(logits, np.float32)[None]
    sampler = make_sampler(params, row.shape[1])
    history = sampler.start_history(np.array([prompt], np.int64), np.array([len(prompt)]))
    for token in generated:
        history.append(np.array([token]), np.array([True]))
    before = row.copy()
    token = sampler(row, history, np.array([uniform], np.float32), forbidden)
    assert np.array_equal(row, before), "the caller's logits were changed"
    assert token.dtype == np.int64
    return int(token[0])


def kept(logits, **values):
    ids, probabilities = eligible(np.asarray(logits, np.float32), SamplingParams(**values))
    assert probabilities.sum() == pytest.approx(1)
    return ids.tolist()


def slow_reference(logits, uniform, params, seen, counts):
    """The rules once more, in Python numbers: nothing shared with the code under test."""
    f = np.float32
    values = [f(x) + f(params.logit_bias.get(i, 0)) for i, x in enumerate(logits)]
    for i in range(len(values)):
        if i in seen and params.repetition_penalty != 1:
            r = f(params.repetition_penalty)
            values[i] = values[i] / r if values[i] > 0 else values[i] * r
        if counts.get(i):
            values[i] = values[i] - f(params.frequency_penalty) * f(counts[i])
            values[i] = values[i] - f(params.presence_penalty)
    if params.temperature == 0:
        return max(range(len(values)), key=lambda i: (values[i], -i)), math.inf
    values = [v / f(params.temperature) for v in values]
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    if params.top_k:
        order = order[: params.top_k]
    margin = math.inf

    def weights(ids):
        powers = [Fraction(math.exp(float(values[i]) - float(values[ids[0]]))) for i in ids]
        return [p / sum(powers) for p in powers]

    if params.top_p < 1:
        total, count = Fraction(0), 0
        for p in weights(order):
            if total >= Fraction(params.top_p):
                break
            total, count = total + p, count + 1
            margin = min(margin, abs(float(total - Fraction(params.top_p))))
        order = order[:count]
    shares = weights(order)
    margin = min([margin, *(abs(float(p - Fraction(params.min_p) * shares[0])) for p in shares)])
    order = [
        i for i, p in zip(order, shares, strict=True) if p >= Fraction(params.min_p) * shares[0]
    ]
    total = Fraction(0)
    chosen = None
    for i, p in zip(order, weights(order), strict=True):
        total += p
        if i != order[-1]:
            margin = min(margin, abs(float(total - Fraction(uniform))))
        if chosen is None and total > Fraction(uniform):
            chosen = i
    return order[-1] if chosen is None else chosen, margin


float32 = st.floats(-20, 20, width=32)


@st.composite
def problems(draw):
    size = draw(st.integers(1, 12))
    ids = st.integers(0, size - 1)
    # Few distinct values: ties are the rule.
    logits = draw(st.lists(st.integers(-4, 4).map(float) | float32, min_size=size, max_size=size))
    params = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.5, 1.0, 1.7])),
        top_k=draw(st.integers(0, size + 1)),
        top_p=draw(st.sampled_from([0.1, 0.5, 0.9, 1.0])),
        min_p=draw(st.sampled_from([0.0, 0.05, 0.4])),
        repetition_penalty=draw(st.sampled_from([0.5, 1.0, 1.3])),
        presence_penalty=draw(st.sampled_from([-1.0, 0.0, 0.75])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.3])),
        logit_bias=draw(st.dictionaries(ids, st.sampled_from([-5.0, 2.0]), max_size=2)),
    )
    prompt = draw(st.lists(ids, min_size=1, max_size=4))
    generated = draw(st.lists(ids, max_size=5))
    return logits, params, prompt, generated, draw(st.integers(0, 2**24 - 1)) / 2**24


@given(problems())
@settings(max_examples=150, deadline=None)
def test_token_equals_that_of_a_slow_reference(problem):
    logits, params, prompt, generated, uniform = problem
    counts = {i: generated.count(i) for i in generated}
    expected, margin = slow_reference(logits, uniform, params, {*prompt, *generated}, counts)
    actual = next_token(params, logits, uniform=uniform, prompt=prompt, generated=generated)
    # A share within 1e-6 of a bound may fall on either side.
    assert actual == expected or 0 < margin < 1e-6


def test_sweep_of_the_uniform_number_gives_the_distribution():
    steps = 4096
    drawn = [pick(HALVES, (i + 0.5) / steps, SamplingParams()) for i in range(steps)]
    counts = np.bincount(drawn, minlength=4) / steps
    assert counts == pytest.approx([0.25, 0.125, 0.5, 0.125], abs=1 / steps)
    # Likeliest first, equal ones by id.
    assert [drawn[0], drawn[steps * 5 // 8], drawn[steps * 13 // 16], drawn[-1]] == [2, 0, 1, 3]


def test_uniform_number_on_a_boundary_takes_the_next_token():
    even = [0.0] * 4
    assert [pick(np.zeros(4, np.float32), u, SamplingParams()) for u in (0, 0.25, 0.5, 0.75)] == [
        0,
        1,
        2,
        3,
    ]
    assert next_token(SamplingParams(), even, uniform=np.nextafter(np.float32(0.25), 0)) == 0


def test_largest_uniform_number_reaches_no_token_beyond_its_share():
    # A float32 sum over so many tokens ends far from 1, and the last token would get the rest.
    logits = np.linspace(0, -1, 50_000, dtype=np.float32)
    uniform = np.float32(1 - 2**-24)
    assert pick(logits, uniform, SamplingParams()) >= 49_990
    head = np.full(50_000, -16, np.float32)
    head[0] = 0
    share = 1 / (1 + 49_999 * math.exp(-16))
    assert pick(head, share - 1e-6, SamplingParams()) == 0
    assert pick(head, share + 1e-6, SamplingParams()) < 60


def test_greedy_takes_the_lower_id_of_equal_logits_whatever_the_number():
    for uniform in (0.0, 0.5, 0.99):
        assert next_token(SamplingParams(temperature=0), [1, 3, 3, 2], uniform=uniform) == 1


def test_greedy_sees_bias_and_penalties_but_no_cut():
    bias = SamplingParams(temperature=0, logit_bias={0: 5.0}, top_k=1, top_p=0.01, min_p=1)
    assert next_token(bias, [0, 3, 4]) == 0
    penalty = SamplingParams(temperature=0, repetition_penalty=2.0)
    assert next_token(penalty, [4, 3, 1], prompt=[0]) == 1


def test_top_k_keeps_exactly_that_many_with_ties_to_the_lower_id():
    assert kept([1, 2, 2, 2, 0], top_k=2) == [1, 2]
    assert kept([1, 1, 1], top_k=1) == [0]
    assert kept([0, 1, 2], top_k=0) == [2, 1, 0]
    assert kept([0, 1, 2], top_k=9) == [2, 1, 0]


@given(st.lists(st.sampled_from([-2.5, -1e-30, -0.0, 0.0, 1e-30, 1.0, 3e38]), min_size=1))
def test_order_is_by_logit_then_id(values):
    expected = sorted(range(len(values)), key=lambda i: (-values[i], i))
    logits = np.array(values, np.float32)
    best = [i for i, _ in top_logprobs(logits, 0, len(values))[1]]
    assert best == expected
    for count in range(len(values)):
        assert [i for i, _ in top_logprobs(logits, 0, count)[1]] == expected[:count]


def test_top_p_keeps_the_token_that_reaches_the_bound_and_always_one():
    assert kept(HALVES, top_p=0.6) == [2, 0]
    assert kept(HALVES, top_p=0.8) == [2, 0, 1]
    assert kept(HALVES, top_p=0.001) == [2]
    assert kept(np.zeros(4), top_p=0.5) == [0, 1]  # reached exactly
    assert kept(np.zeros(4), top_p=0.51) == [0, 1, 2]


def test_min_p_compares_with_the_likeliest():
    assert kept(HALVES, min_p=0.49) == [2, 0]
    assert kept(HALVES, min_p=0.2) == [2, 0, 1, 3]
    assert kept([0, 0, -1], min_p=1) == [0, 1]


def test_top_p_counts_only_what_top_k_left():
    # Of the two that stay, the first has 2/3.
    assert kept(HALVES, top_k=2, top_p=0.66) == [2]
    assert kept(HALVES, top_p=0.66) == [2, 0]


def test_temperature_comes_before_top_p():
    assert kept(HALVES, temperature=0.5, top_p=0.7) == [2]  # its share is 8/11
    assert kept(HALVES, temperature=2.0, top_p=0.7) == [2, 0, 1]


def test_repetition_counts_the_prompt_and_the_other_penalties_do_not():
    greedy = {"temperature": 0}
    logits = [2.0, 1.5]
    assert next_token(SamplingParams(**greedy, repetition_penalty=2.0), logits, prompt=[0]) == 1
    assert next_token(SamplingParams(**greedy, presence_penalty=1.0), logits, prompt=[0]) == 0
    assert next_token(SamplingParams(**greedy, presence_penalty=1.0), logits, generated=[0]) == 1
    frequency = SamplingParams(**greedy, frequency_penalty=0.3)
    assert next_token(frequency, logits, generated=[0]) == 0
    assert next_token(frequency, logits, generated=[0, 0]) == 1


def test_repetition_penalty_lowers_negative_logits_too():
    params = SamplingParams(temperature=0, repetition_penalty=2.0)
    assert next_token(params, [-1.0, -1.5], prompt=[0]) == 1


def test_padding_behind_a_prompt_is_not_seen():
    sampler = make_sampler(SamplingParams(repetition_penalty=1.5), 4)
    history = sampler.start_history(np.array([[1, 2], [3, 0]]), np.array([2, 1]))
    assert history.seen.tolist() == [[False, True, True, False], [False, False, False, True]]
    assert history.counts is None


def test_history_grows_only_in_active_rows():
    sampler = make_sampler(SamplingParams(frequency_penalty=0.5, repetition_penalty=2), 3)
    history = sampler.start_history(np.array([[0], [0]]), np.array([1, 1]))
    history.append(np.array([1, 1]), np.array([True, False]))
    history.append(np.array([1, 2]), np.array([True, True]))
    assert history.counts.tolist() == [[0, 2, 0], [0, 0, 1]]
    assert history.seen.tolist() == [[True, True, False], [True, False, True]]


def test_history_holds_nothing_that_no_rule_asks_for():
    history = make_sampler(SamplingParams(), 5).start_history(np.array([[1]]), np.array([1]))
    assert history.seen is None
    assert history.counts is None


def test_rows_are_drawn_each_with_its_own_number():
    sampler = make_sampler(SamplingParams(), 4)
    history = sampler.start_history(np.zeros((3, 1), np.int64), np.ones(3, np.int64))
    numbers = np.array([0.0, 0.6, 0.99], np.float32)
    assert sampler(np.stack([HALVES] * 3), history, numbers).tolist() == [2, 0, 3]


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_forbidden_ids_are_never_taken(temperature):
    params = SamplingParams(temperature=temperature)
    taken = {next_token(params, HALVES, uniform=u / 64, forbidden=(2, 3)) for u in range(64)}
    assert taken == ({0} if temperature == 0 else {0, 1})


@pytest.mark.parametrize("logits", [[math.nan, 1.0], [math.inf, 0.0], [-math.inf, -math.inf]])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_logits_without_a_largest_are_an_error(logits, temperature):
    with pytest.raises(ValueError, match="row 0 has no token to pick"):
        next_token(SamplingParams(temperature=temperature), logits)


def test_forbidding_everything_is_an_error():
    with pytest.raises(ValueError, match="every token is forbidden"):
        next_token(SamplingParams(), [0.0, 1.0], forbidden=(0, 1))


def test_lowest_temperature_acts_like_greedy():
    assert next_token(SamplingParams(temperature=1e-6), [1e4, 1e4 - 1, -1e4], uniform=0.999) == 0


def test_greedy_is_told_apart():
    assert make_sampler(SamplingParams(temperature=0), 3).greedy
    assert not make_sampler(SamplingParams(top_k=1), 3).greedy


def test_log_probabilities_sum_to_one_even_of_huge_logits():
    logits = np.array([[1000.0, 999.0, -1000.0], [0.0, 0.0, 0.0]], np.float32)
    found = log_probabilities(logits)
    assert found.dtype == np.float32
    assert np.exp(found).sum(axis=-1) == pytest.approx([1, 1])
    assert found[0, 0] == pytest.approx(-math.log1p(math.exp(-1)))
    assert found[1].tolist() == pytest.approx([-math.log(3)] * 3)


def test_top_logprobs_order_equal_ones_by_id():
    chosen, best = top_logprobs(HALVES, 3, 3)
    assert chosen == pytest.approx(math.log(0.125))
    assert [i for i, _ in best] == [2, 0, 1]
    assert [math.exp(x) for _, x in best] == pytest.approx([0.5, 0.25, 0.125])


@pytest.mark.parametrize(("count", "expected"), [(0, 0), (1, 1), (4, 4), (9, 4)])
def test_top_logprobs_give_as_many_as_asked_for(count, expected):
    _, best = top_logprobs(HALVES, 0, count)
    assert len(best) == expected


def test_boundary_distance_is_to_the_nearest_inner_boundary():
    # Boundaries at 1/2, 3/4, 7/8; neither 0 nor 1 is one.
    assert boundary_distance(HALVES, 0.55, SamplingParams()) == pytest.approx(0.05, abs=1e-6)
    assert boundary_distance(HALVES, 0.0, SamplingParams()) == pytest.approx(0.5, abs=1e-6)
    assert boundary_distance(HALVES, 0.99, SamplingParams()) == pytest.approx(0.115, abs=1e-6)
    assert boundary_distance(HALVES, 0.5, SamplingParams(top_k=1)) == math.inf


def test_all_problems_are_named_at_once():
    with pytest.raises(ValueError) as error:
        SamplingParams(
            max_tokens=0,
            min_tokens=5,
            temperature=math.nan,
            top_k=-1,
            top_p=0,
            min_p=1.5,
            repetition_penalty=math.inf,
            presence_penalty=3,
            frequency_penalty=-3,
            seed=2**64,
            stop=("",),
            stop_token_ids=(-1,),
            logit_bias={0: math.inf},
            logprobs=-1,
        )
    for name in [
        "max_tokens",
        "min_tokens",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "seed",
        "stop",
        "stop_token_ids",
        "logit_bias",
        "logprobs",
    ]:
        assert f"{name} must be" in str(error.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "name",
    [
        "temperature",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
    ],
)
def test_no_number_may_be_nan_or_infinite(name, value):
    with pytest.raises(ValueError, match=f"{name} must be"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    "values",
    [{"temperature": -0.1}, {"temperature": 1e-9}, {"top_p": 1.01}, {"seed": -1}, {"stop": "end"}],
)
def test_values_just_outside_are_refused(values):
    with pytest.raises(ValueError, match="invalid sampling parameters"):
        SamplingParams(**values)


def test_extreme_values_inside_are_taken():
    SamplingParams(
        max_tokens=1,
        min_tokens=1,
        top_p=1,
        min_p=1,
        seed=2**64 - 1,
        presence_penalty=-2,
        logprobs=0,
    )


def test_ids_outside_the_vocabulary_are_named():
    params = SamplingParams(stop_token_ids=(1, 9), logit_bias={12: 1.0})
    with pytest.raises(ValueError, match=r"stop_token_ids: 9; logit_bias: 12"):
        make_sampler(params, 9)
