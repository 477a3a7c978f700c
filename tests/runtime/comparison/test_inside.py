"""What a look inside a run tells: by hand, by brute force, and by the ops' own definitions."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.checkpoint import load_checkpoint
from model.config import DogeConfig
from plugins.dynamic_mask_attention.op import keep_largest_scores
from plugins.expert_gather.op import pick_experts
from runtime.comparison import inside
from runtime.comparison.inside import HeadWindow, look_inside, print_inside
from runtime.comparison.record import PromptRun, Run, Subject
from tests.runtime.comparison.planted_faults import PROMPTS, STEPS, run_torch

Golden = Callable[[str], Path]
DENSE = DogeConfig(
    vocab_size=9,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    max_position_embeddings=64,
    keep_window_size=2,
)
MOE = dataclasses.replace(
    DENSE, is_moe=True, num_experts=5, num_experts_per_tok=2, router_mode="per_token"
)


def recorded(
    prompts: Sequence[Sequence[Mapping[str, npt.ArrayLike]]], generation: str = "g4"
) -> Run:
    """A run whose steps gave these values; the first step's score or router says how long."""
    found = []
    for steps in prompts:
        values = [{k: np.asarray(v, np.float32) for k, v in step.items()} for step in steps]
        first = values[0]
        length = (
            first["layers.0.score"].shape[1]
            if "layers.0.score" in first
            else len(first["layers.0.router_scores"])
        )
        found.append(
            PromptRun(
                prompt=(1,) * length,
                tokens=np.ones(len(steps) - 1, np.int64),
                logits=np.zeros((len(steps), 9), np.float32),
                tapped_logits=None,
                values=tuple(values),
            )
        )
    subject = Subject(
        rung="torch:fp32",
        precision="fp32",
        weights_sha256="0" * 64,
        config={},
        generation=generation,
        max_input_len=64,
        max_seq_len=64,
    )
    return Run(
        subject=subject, steps=len(prompts[0]) - 1, taps=(), missing=(), prompts=tuple(found)
    )


def scored(*steps: npt.ArrayLike) -> list[dict[str, npt.ArrayLike]]:
    """Steps of [N, S] scores."""
    return [{"layers.0.score": np.asarray(step, np.float32)[..., None]} for step in steps]


def heads_of(run: Run, config: DogeConfig = DENSE) -> tuple[HeadWindow, ...]:
    window = look_inside(run, config, selects=True).window
    assert window is not None
    return window.layers[0].heads


def test_a_window_worked_out_by_hand() -> None:
    # W = 2. Slot 2 sees 9 1 5 and keeps slots 0, 2. Slot 3 sees 9 1 5 5 and keeps 0 and, of the
    # equal ones, the lower slot 2. Slot 4 sees 9 1 5 5 7 and keeps 0 and 4.
    (head,) = heads_of(recorded([scored([[9, 1, 5]], [[5]], [[7]])]))
    assert head == HeadWindow(
        head=0,
        queries=3,
        left_out=0,
        kept_share=pytest.approx((2 / 3 + 2 / 4 + 2 / 5) / 3),
        age_mean=pytest.approx((2 + 0 + 3 + 1 + 4 + 0) / 6),
        age_median=1,  # of 0 0 1 2 3 4, half do not exceed 1
        age_p95=4,
        age_max=4,
        # Age over what is visible: 2/3 0 | 3/4 1/4 | 4/5 0.
        age_quarters=pytest.approx((2 / 6, 1 / 6, 1 / 6, 2 / 6)),  # type: ignore[arg-type]
        # Of the two newest: slot 2 of 1 2, slot 2 of 2 3, slot 4 of 3 4.
        recent_share=pytest.approx(1 / 2),
        never_kept_share=pytest.approx(2 / 5),  # slots 1 and 3
    )


def test_rising_scores_are_a_sliding_window_and_falling_ones_keep_the_beginning() -> None:
    rising, falling = np.arange(30.0)[None], -np.arange(30.0)[None]
    (slides,) = heads_of(recorded([scored(rising)]))
    assert (slides.recent_share, slides.age_max) == (1, 1)
    assert slides.never_kept_share == pytest.approx(1 / 30)  # slot 0: slot 2 is the first to choose
    (stays,) = heads_of(recorded([scored(falling)]))
    assert stays.age_max == 29
    assert stays.never_kept_share == pytest.approx(28 / 30)


def test_queries_that_see_no_more_than_the_window_are_left_out() -> None:
    (head,) = heads_of(recorded([scored([[3, 4]])]))
    assert (head.queries, head.left_out) == (0, 0)
    assert head.kept_share is head.age_max is head.age_quarters is head.never_kept_share is None
    (head,) = heads_of(recorded([scored([[3, 4]]), scored([[3, 4, 5]])]))
    assert head.queries == 1
    assert head.never_kept_share == pytest.approx(1 / 3)  # the short prompt's keys do not count


def test_queries_behind_a_score_that_is_no_number_are_counted_and_told_nothing_of() -> None:
    good = [5.0, 1, 4, 2, 3, 0]
    (whole,) = heads_of(recorded([scored([good[:4]])]))
    (cut,) = heads_of(recorded([scored([[*good[:4], np.nan, 0]])]))
    assert dataclasses.replace(cut, left_out=0) == whole
    assert cut.left_out == 2
    (none,) = heads_of(recorded([scored([[5, np.inf, 4, 2]])]))
    assert (none.queries, none.left_out) == (0, 2)
    (short,) = heads_of(recorded([scored([[np.inf]])]))
    assert (short.queries, short.left_out) == (0, 0)


def brute_force(scores: npt.NDArray[Any], W: int) -> dict[str, Any]:
    """One head over prompts, query by query, as the op's docstring has it."""
    shares, recents, ages, quarters = [], [], [], [0] * 4
    never = seen = 0
    for score in scores:
        kept_once = set()
        for i in range(W, len(score)):
            kept = [
                j
                for j in range(i + 1)
                if sum(
                    score[k] > score[j] or (score[k] == score[j] and k < j) for k in range(i + 1)
                )
                < W
            ]
            kept_once |= set(kept)
            shares.append(len(kept) / (i + 1))
            recents.append(len([j for j in kept if j > i - W]) / W)
            for j in kept:
                ages.append(i - j)
                quarters[int((i - j) / (i + 1) * 4)] += 1
        if len(score) > W:
            seen += len(score)
            never += len(score) - len(kept_once)
    return {
        "queries": len(shares),
        "kept_share": np.mean(shares),
        "age_mean": np.mean(ages),
        "age_median": np.percentile(ages, 50, method="inverted_cdf"),
        "age_p95": np.percentile(ages, 95, method="inverted_cdf"),
        "age_max": max(ages),
        "age_quarters": [count / len(ages) for count in quarters],
        "recent_share": np.mean(recents),
        "never_kept_share": never / seen,
    }


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    window=st.integers(1, 9),
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=3),
    steps=st.integers(0, 6),
    block=st.integers(1, 8),
)
def test_numbers_equal_a_count_query_by_query(
    seed: int, window: int, lengths: list[int], steps: int, block: int
) -> None:
    generator = np.random.default_rng(seed)
    config = dataclasses.replace(
        DENSE, num_attention_heads=4, num_key_value_heads=2, keep_window_size=window
    )
    scores = [generator.integers(0, 6, (2, n + steps)).astype(np.float32) for n in lengths]
    run = recorded(
        [
            scored(score[:, :n], *(score[:, n + s : n + s + 1] for s in range(steps)))
            for n, score in zip(lengths, scores, strict=True)
        ]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inside, "_BLOCK", block)
        heads = heads_of(run, config)
    assert [head.head for head in heads] == [0, 1]
    for index, head in enumerate(heads):
        if max(lengths) + steps <= window:
            assert head.queries == 0
            continue
        expected = brute_force([score[index] for score in scores], window)  # type: ignore[arg-type]
        found = dataclasses.asdict(head)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-12, err_msg=name)


def test_copies_of_a_score_that_a_lowered_model_stores_are_one_head() -> None:
    config = dataclasses.replace(DENSE, num_attention_heads=4, num_key_value_heads=2)
    score = np.random.default_rng(1).standard_normal((2, 12))
    own, copies = recorded([scored(score)]), recorded([scored(np.repeat(score, 2, 0))])
    assert heads_of(own, config) == heads_of(copies, config)
    assert len(heads_of(own, config)) == 2
    per_query = recorded([scored(np.repeat(score, 2, 0))], generation="g3")  # one per query head
    assert len(heads_of(per_query, config)) == 4
    with pytest.raises(ValueError, match=r"has 3 heads, expected 2 or a multiple"):
        heads_of(recorded([scored(np.ones((3, 12)))]), config)


def test_experts_worked_out_by_hand() -> None:
    # n = 2, E = 4 of 5 rows, K = 2. Scores x0 x1 y0 y1; expert 2i + j has x_i + y_j.
    first = [[4, 0, 1, 0], [0, 4, 0, 1]]  # picks 0 and 1, then 3 and 2
    second = [[4, 0, 1, 0]]  # 0 and 1
    run = recorded([[{"layers.0.router_scores": first}, {"layers.0.router_scores": second}]])
    report = look_inside(run, MOE, selects=False)
    assert report.window is None
    assert report.queries == 3
    assert report.experts is not None
    assert (report.experts.experts, report.experts.unreachable) == (4, 1)
    (layer,) = report.experts.layers
    assert (layer.heads, layer.picks, layer.counts) == (1, 6, (2, 2, 1, 1))
    assert (layer.dead, layer.dead_share, layer.top_share) == ((), 0, pytest.approx(2 / 6))
    assert layer.expected_dead == pytest.approx(4 * (1 / 2) ** 3)  # half are picked each time
    share = np.array([2, 2, 1, 1]) / 6
    assert layer.effective == pytest.approx(np.exp(-(share * np.log(share)).sum()))
    alone = look_inside(recorded([[{"layers.0.router_scores": second}]]), MOE, selects=False)
    assert alone.experts is not None
    (layer,) = alone.experts.layers
    assert (layer.dead, layer.dead_share) == ((2, 3), 0.5)
    assert layer.effective == pytest.approx(2)


def test_the_share_of_the_most_used_hundredth_counts_at_least_one_expert() -> None:
    config = dataclasses.replace(MOE, num_experts=400, num_experts_per_tok=1)  # n = 20
    scores = np.zeros((10, 40))
    scores[np.arange(10), [0] * 5 + [1, 2, 3, 4, 5]] = 1  # five times the same row of the grid
    run = recorded([[{"layers.0.router_scores": scores}]])
    report = look_inside(run, config, selects=False)
    assert report.experts is not None
    assert report.experts.layers[0].top_share == pytest.approx((5 + 1 + 1 + 1) / 10)  # 4 of 400
    assert len(report.experts.layers[0].dead) == 394


def test_tokens_whose_router_scores_are_no_numbers_are_counted_and_left_out() -> None:
    good, bad = [[4, 0, 1, 0]], [[4, 0, np.nan, 0]]
    run = recorded([[{"layers.0.router_scores": good}, {"layers.0.router_scores": bad}]])
    report = look_inside(run, MOE, selects=False)
    assert report.experts is not None
    (layer,) = report.experts.layers
    assert (layer.picks, layer.left_out) == (2, 1)
    none = look_inside(recorded([[{"layers.0.router_scores": bad}]]), MOE, selects=False)
    assert none.experts is not None
    (layer,) = none.experts.layers
    assert (layer.picks, layer.effective, layer.top_share) == (0, None, None)


@pytest.mark.parametrize("case", ["g4_window", "g4h_window"])
def test_the_ops_keep_what_the_report_counts(golden: Golden, case: str) -> None:
    network = load_checkpoint(golden(case))
    config, run = network.config, run_torch(network)
    report = look_inside(run, config, selects=True)
    assert report.window is not None
    N, W = network.generation.num_score_heads(config), config.keep_window_size
    T = len(PROMPTS[0]) + STEPS
    assert report.queries == len(PROMPTS) * T
    visible = torch.ones(T, T, dtype=torch.bool).tril()[None, None]
    for layer in report.window.layers:
        assert len(layer.heads) == N
        for head in layer.heads:
            ages: list[int] = []
            for prompt in run.prompts:
                score = np.concatenate(
                    [step[f"layers.{layer.layer}.score"] for step in prompt.values], 1
                )
                kept = keep_largest_scores(torch.from_numpy(score[None, ..., 0]), visible, W)
                query, key = np.nonzero(kept[0, head.head, W:].numpy())
                ages += (query + W - key).tolist()
            assert head.queries == len(PROMPTS) * (T - W)
            assert head.age_mean == pytest.approx(np.mean(ages))
            assert head.age_max == max(ages)


@pytest.mark.parametrize("case", ["g1", "g3_moe", "g4_moe"])
def test_the_op_picks_the_experts_that_the_report_counts(
    golden: Golden, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import model.layers
    import model.seed

    picked: list[npt.NDArray[np.int64]] = []
    module = model.seed if case == "g1" else model.layers
    original = module.expert_gather

    def listening(hidden: Any, x: Any, y: Any, *rest: Any, top_k: int, **options: Any) -> Any:
        picked.append(pick_experts(x, y, top_k)[1].numpy().ravel())
        return original(hidden, x, y, *rest, top_k=top_k, **options)

    monkeypatch.setattr(module, "expert_gather", listening)
    network = load_checkpoint(golden(case))
    assert case == "g1" or network.config.router_mode == "mixed"
    run = run_torch(network)
    report = look_inside(run, network.config, selects=False)
    assert report.experts is not None
    E, layers = report.experts.experts, network.config.num_hidden_layers
    # The backend runs untapped and then tapped: every pass twice.
    for layer in report.experts.layers:
        seen = np.concatenate(picked[layer.layer :: layers])
        np.testing.assert_array_equal(np.bincount(seen, minlength=E), 2 * np.array(layer.counts))


@pytest.mark.parametrize(
    ("case", "window", "experts"),
    [
        ("g1", False, True),
        ("g3", False, False),
        ("g3_moe", False, True),
        ("g4_moe", False, True),
        ("g4_window", True, False),
        ("g4h_window", True, False),
    ],
)
def test_a_report_has_the_parts_that_its_model_has(
    golden: Golden, case: str, window: bool, experts: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    network = load_checkpoint(golden(case))
    report = look_inside(run_torch(network), network.config, selects=case.endswith("window"))
    found = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert (found["window"] is not None, found["experts"] is not None) == (window, experts)
    assert found["rung"] == "torch:fp32"
    print_inside(report)
    lines = capsys.readouterr().out.splitlines()
    assert ("window              no key can be dropped" in lines) != window
    assert ("experts             none, a dense model" in lines) != experts
    for part in ("window", "experts"):
        if found[part] is not None:
            assert [layer["layer"] for layer in found[part]["layers"]] == [0, 1, 2]
    if experts:
        layer = found["experts"]["layers"][0]
        assert len(layer["counts"]) == found["experts"]["experts"]
        tokens = found["queries"]
        assert layer["picks"] == tokens * layer["heads"] * found["experts"]["per_token"]


def test_a_seed_with_room_for_a_window_has_none(golden: Golden) -> None:
    network = load_checkpoint(golden("g1"))
    assert look_inside(run_torch(network), network.config, selects=True).window is None


def test_a_run_without_scores_says_what_to_record() -> None:
    run = recorded([scored([[1, 2, 3]])])
    without = dataclasses.replace(run, prompts=(dataclasses.replace(run.prompts[0], values=()),))
    with pytest.raises(
        ValueError, match=r"holds no score of any layer.*--taps all or --taps score"
    ):
        look_inside(without, DENSE, selects=True)
    with pytest.raises(ValueError, match=r"holds no router_scores of any layer"):
        look_inside(run, MOE, selects=True)
    two = dataclasses.replace(DENSE, num_hidden_layers=2)
    window = look_inside(run, two, selects=True).window
    assert window is not None
    assert [layer.layer for layer in window.layers] == [0]  # those that were recorded
