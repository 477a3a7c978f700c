"""Tokens that a GPU chooses, against the host's picks: what is wrong must show."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from runtime.backends.base import Backend, Cache, Limits
from runtime.gpu_checks.chosen_tokens import check_chosen_tokens
from runtime.sampling import boundary_distance, make_sampler
from runtime.token_chooser import TokenChooser

VOCAB = 50
PROMPT = [3, 1, 4]
TOLERANCE = (1e-3, 1e-4)


class Choosing(Backend):
    """Logits of a token are random numbers; a subclass chooses ahead by its own rules."""

    name, variant, router_mode, vocab_size = "choosing", "fp32", None, VOCAB
    # Well apart, so that an error of a thousandth makes no other token.
    table = 3 * np.random.default_rng(5).permuted(
        np.tile(np.linspace(-1, 1, VOCAB, dtype=np.float32), (VOCAB, 1)), axis=1
    )

    def __init__(self, slots=128):
        self.limits = Limits(max_batch_size=1, max_input_len=16, max_seq_len=slots)

    @classmethod
    def open(cls, bundle, variant, threads):
        raise NotImplementedError

    def new_cache(self, batch_size, capacity=None):
        slots = self.check_cache_size(batch_size, capacity)
        return Cache(capacity=slots, lengths=np.zeros(batch_size, np.int64))

    def _step(self, input_ids, write_index, logits_index, cache, row):
        return self.table[np.take_along_axis(input_ids, logits_index, 1)]

    def close(self):
        pass

    def decode_many(self, input_ids, cache, choice, active):
        choice = self.other_rules(choice)
        tokens = input_ids
        for count in itertools.count(1):
            logits = self.other_logits(self.decode(tokens, cache, active), count)
            tokens = choice.choose(logits, self.other_count(count), active)
            yield tokens

    def other_rules(self, choice):
        return choice

    def other_logits(self, logits, count):
        return logits

    def other_count(self, count):
        return count


def verdicts(backend, prompt=PROMPT):
    found = check_chosen_tokens(backend, prompt, 7, TOLERANCE)
    json.dumps(found, allow_nan=False)
    rules = {case["rule"]: case for case in found["rules"]}
    wrong = [name for name, case in rules.items() if case["verdict"] == "fail"]
    assert found["verdict"] == ("fail" if wrong else "pass")
    return wrong, rules


def test_the_hosts_tokens_pass():
    wrong, rules = verdicts(Choosing())
    assert wrong == []
    for case in rules.values():
        assert (case["steps"], case["equal"], case["distance"]) == (64, 64, 0.0)
        assert case["first_parting"] is None
        assert case["token_ms"] > 0
    # Else nothing is shown: another token follows from each set of rules.
    backend = Choosing()
    texts = []
    original = backend.decode_many

    def watched(*arguments):
        texts.append([])
        for tokens in original(*arguments):
            texts[-1].append(int(tokens[0]))
            yield tokens

    backend.decode_many = watched
    check_chosen_tokens(backend, PROMPT, 7, TOLERANCE)
    assert len({tuple(text) for text in texts}) == 3


def test_the_second_best_token_fails():
    class SecondBest(Choosing):
        def other_logits(self, logits, count):
            best = logits.argmax(-1)
            return np.where(np.arange(VOCAB) == best[:, None], -9, logits)

    wrong, rules = verdicts(SecondBest())
    assert wrong == ["greedy", "drawn", "every rule"]
    assert rules["greedy"]["first_parting"]["step"] == 1
    assert rules["greedy"]["distance"] == pytest.approx(6 / (VOCAB - 1), rel=1e-3)


def test_a_uniform_number_of_another_step_fails():
    class OneLate(Choosing):
        def other_count(self, count):
            return count + 1

    assert verdicts(OneLate())[0] == ["drawn", "every rule"]


def test_penalties_that_are_left_out_fail():
    class WithoutPenalties(Choosing):
        def other_rules(self, choice):
            params = choice.sampler.params
            kept = {k: getattr(params, k) for k in ("temperature", "top_k", "top_p", "seed")}
            sampler = make_sampler(type(params)(**kept, max_tokens=params.max_tokens), VOCAB)
            return TokenChooser(sampler, np.array([PROMPT]), np.array([3]), np.zeros(1, np.int64))

    assert verdicts(WithoutPenalties())[0] == ["every rule"]


def test_one_greedy_token_beyond_rounding_fails_and_one_within_does_not():
    class Once(Choosing):
        def __init__(self, error):
            super().__init__()
            self.error = error

        def other_logits(self, logits, count):
            if count != 40:
                return logits
            second = np.argsort(-logits[0])[1]
            found = logits.copy()
            found[0, second] = logits.max() + self.error
            return found

    class Tied(Once):
        # The two best of each row are nearly alike.
        table = np.where(
            Choosing.table == np.sort(Choosing.table, -1)[:, -2:-1],
            Choosing.table.max() - np.float32(5e-4),
            Choosing.table,
        )

    wrong, rules = verdicts(Once(error=0.01))
    assert wrong == ["greedy"]
    assert (rules["greedy"]["equal"], rules["greedy"]["first_parting"]["step"]) == (63, 40)
    wrong, rules = verdicts(Tied(error=5e-4))
    assert wrong == []
    assert rules["greedy"]["equal"] == 63
    assert rules["greedy"]["distance"] == pytest.approx(5e-4, rel=0.01)


def test_the_distance_of_a_drawn_token_is_to_its_share_and_the_largest_is_told():
    """Of two tokens with half of the mass each: the wrong one is as far as the uniform number."""

    class Coin(Choosing):
        table = np.full((VOCAB, VOCAB), -50, np.float32)
        table[:, 7] = table[:, 9] = 3.0

    class Swapped(Coin):
        """Takes the other side of the coin at two steps."""

        def decode_many(self, input_ids, cache, choice, active):
            tokens = input_ids
            for count in itertools.count(1):
                logits = self.decode(tokens, cache, active)
                tokens = choice.choose(logits, count, active)
                if count in (6, 20) and choice.sampler.params.temperature == 1:
                    tokens = 16 - tokens  # 7 for 9, 9 for 7
                    self.uniform.append(float(choice.uniform(count)[0]))
                yield tokens

    backend = Swapped()
    backend.uniform = []
    wrong, rules = verdicts(backend)
    assert wrong == []  # 62 of 64
    drawn = rules["drawn"]
    assert drawn["equal"] == 62
    distances = [abs(number - 0.5) for number in backend.uniform]
    assert min(distances) > 0.01
    assert {number < 0.5 for number in backend.uniform} == {True, False}, "one on each side"
    assert drawn["first_parting"]["distance"] == pytest.approx(distances[0], abs=1e-6)
    assert drawn["distance"] == pytest.approx(max(distances), abs=1e-6)


def test_behind_a_parting_the_rules_look_at_what_the_gpu_chose():
    """It takes the other side of a coin once, and goes on by its own history."""

    class Coin(Choosing):
        table = np.full((VOCAB, VOCAB), -50, np.float32)
        table[:, 7] = table[:, 9] = 3.0
        distance = None

        def decode_many(self, input_ids, cache, choice, active):
            tokens, history = input_ids, choice.history
            for count in itertools.count(1):
                logits = self.decode(tokens, cache, active)
                adjusted = choice.sampler.adjust(logits, history)
                tokens = choice.choose(logits, count, active)
                if count == 7 and history.counts is not None:
                    history.counts[0, tokens[0]] -= 1
                    tokens = 16 - tokens
                    history.append(tokens, active)
                    self.distance = boundary_distance(
                        adjusted[0], float(choice.uniform(count)[0]), choice.sampler.params
                    )
                yield tokens

    backend = Coin()
    _, rules = verdicts(backend)
    assert [case["equal"] for case in rules.values()] == [64, 64, 63]
    assert rules["every rule"]["distance"] == pytest.approx(backend.distance, abs=1e-6)


def test_the_seed_is_that_of_the_run_and_tokens_of_the_host_are_counted():
    class Seen(Choosing):
        host_choices = 100

        def other_rules(self, choice):
            seeds.append(choice.sampler.params.seed)
            return choice

        def other_count(self, count):
            self.host_choices += count == 3
            return count

    seeds = []
    _, rules = verdicts(Seen())
    assert seeds == [7, 7, 7]
    assert [case["chosen_by_host"] for case in rules.values()] == [1, 1, 1]


def test_one_token_beyond_is_enough_though_others_are_within():
    second = np.sort(Choosing.table, -1)[:, -2:-1]

    class Near(Choosing):
        table = np.where(Choosing.table == second, np.float32(2.9995), Choosing.table)

        def other_logits(self, logits, count):
            if count not in (10, 30):
                return logits
            order = np.argsort(-logits[0])
            taken = order[2] if count == 10 else order[1]
            return np.eye(VOCAB, dtype=np.float32)[[taken]]

    wrong, rules = verdicts(Near())
    assert (wrong, rules["greedy"]["equal"]) == (["greedy"], 62)


@pytest.mark.parametrize(("share", "passes"), [(1.9, True), (2.1, False)])
def test_a_greedy_token_may_lack_twice_the_tolerance_of_its_row(share, passes):
    """Each of two engines may be off by atol and rtol of the largest logit."""
    atol, rtol = 1e-2, 1e-2
    largest = float(Choosing.table.max())
    lacking = share * (atol + rtol * largest)

    class Near(Choosing):
        table = np.where(
            Choosing.table == np.sort(Choosing.table, -1)[:, -2:-1],
            np.float32(largest - lacking),
            Choosing.table,
        )

        def other_logits(self, logits, count):
            if count not in (10, 30):
                return logits
            return np.where(logits == logits.max(), -9, logits).astype(np.float32)

    found = check_chosen_tokens(Near(), PROMPT, 7, (atol, rtol))
    greedy = found["rules"][0]
    assert (greedy["equal"], greedy["verdict"]) == (62, "pass" if passes else "fail")
    assert greedy["distance"] == pytest.approx(lacking, rel=1e-3)


def test_a_drawn_token_that_could_not_be_has_no_distance_in_json():
    class Worst(Choosing):
        def other_logits(self, logits, count):
            return -logits

    _, rules = verdicts(Worst())
    assert rules["drawn"]["distance"] is None
    assert rules["drawn"]["first_parting"]["distance"] is None


@pytest.mark.parametrize(("slots", "steps"), [(3, 0), (4, 1), (10, 7)])
def test_it_takes_no_more_steps_than_there_is_room_for(slots, steps):
    found = check_chosen_tokens(Choosing(slots), PROMPT, 7, TOLERANCE)
    assert found["verdict"] == ("pass" if steps else "skipped")
    assert [case["steps"] for case in found["rules"]] == [steps] * (3 if steps else 0)
