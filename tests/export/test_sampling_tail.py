"""The token chosen in the graph, by ONNX Runtime, against the host's sampler."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from export.lowerings.graph_editor import GraphEditor
from export.lowerings.sampling_tail import add_token_choice
from plugins.onnx_function import OPSET
from runtime.philox import uniform_numbers
from runtime.sampling import SamplingParams, eligible
from runtime.sampling_tail import TailInputs, tail_covers
from tests.sampling_cases import (
    KINDS,
    LARGEST_UNIFORM,
    draw_uniform,
    margin,
    peaked,
    sample_on_host,
)

# A number this close to where the token changes may fall on either side (docs/sampling.md).
BOUNDARY = 1e-6


def graph_with_logits(vocab_size, *, from_table=False):
    """A graph whose logits are its input, or a row of a table that `input_ids` names."""
    editor = GraphEditor(
        ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name="step"), ir_version=10)
    )
    if from_table:
        table = np.random.default_rng(0).normal(size=(vocab_size, vocab_size)).astype(np.float32)
        ids = ir.val("input_ids", ir.DataType.INT64, ["B", 1])
        editor.graph.inputs.append(ids)
        logits = editor.op("Gather", editor.initializer("table", table), ids, axis=0)
        logits.shape = ir.Shape(["B", 1, vocab_size])
        return editor, logits, table
    logits = ir.val("logits", ir.DataType.FLOAT, ["B", 1, vocab_size])
    editor.graph.inputs.append(logits)
    return editor, logits, None


def open_session(editor):
    editor.finish()
    model = ir.to_proto(editor.model)
    onnx.checker.check_model(model, full_check=True)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


@cache
def tail_session(vocab_size, width):
    editor, logits, _ = graph_with_logits(vocab_size)
    add_token_choice(editor, logits, vocab_size, width)
    return open_session(editor)


def choose(logits, uniform, params, width):
    """The graph's `next_id` [B] and `fits` [B] for logits [B, V]."""
    rows, vocab_size = logits.shape
    assert tail_covers(params, vocab_size=vocab_size, width=width) is None
    inputs = TailInputs.make(params, rows)
    inputs.uniform[:] = uniform
    next_id, fits = tail_session(vocab_size, width).run(
        ["next_id", "fits"], {"logits": logits[:, None], **inputs.feeds()}
    )
    assert next_id.shape == fits.shape == (rows, 1)
    assert next_id.dtype == np.int64
    return next_id[:, 0], fits[:, 0]


# --- 10,000 steps ---


@dataclass(frozen=True)
class Layout:
    """A vocabulary, the candidates, and how many steps to take of each kind."""

    vocab_size: int
    width: int
    steps: int


LAYOUTS = {
    "smaller than the candidates": Layout(7, 256, 150),
    "as large as the candidates": Layout(64, 64, 150),
    "one stage, no whole blocks": Layout(301, 16, 300),
    "two stages": Layout(4096, 32, 350),
    "two stages, no whole blocks": Layout(2053, 16, 350),
    "released": Layout(32768, 256, 15),
}


def draw_params(rng, layout):
    return SamplingParams(
        temperature=float(rng.choice([0.05, 0.3, 0.7, 1.0, 1.3, 2.0])),
        top_k=int(rng.choice([0, 0, 0, 1, 5, layout.width, layout.vocab_size])),
        top_p=float(rng.choice([1.0, 1.0, 0.95, 0.9, 0.5, 0.1])),
        min_p=float(rng.choice([0.0, 0.0, 0.0, 0.02, 0.3, 1.0])),
    )


def take_steps(kind, layout, seed):
    """Counts of steps: all, not decided in the graph, and decided otherwise near a boundary."""
    rng = np.random.default_rng(seed)
    counts = Counter(steps=0, unfit=0, excused=0)
    while counts["steps"] < layout.steps:
        rows = int(rng.integers(1, 4))
        logits = kind(rng, (rows, layout.vocab_size)).astype(np.float32)
        params, uniform = draw_params(rng, layout), draw_uniform(rng, rows)
        expected = sample_on_host(logits, uniform, params)
        actual, fits = choose(logits, uniform, params, layout.width)
        whole = layout.vocab_size <= layout.width or 0 < params.top_k <= layout.width
        assert fits.all() or not whole, f"{params} leave no more tokens than there are candidates"
        for row in np.flatnonzero(fits & (actual != expected)):
            distance = margin(logits[row], uniform[row], params)
            assert distance < BOUNDARY, (
                f"{actual[row]} for {expected[row]}, {uniform[row]}, {params}"
            )
        counts["steps"] += rows
        counts["unfit"] += int((~fits).sum())
        counts["excused"] += int((fits & (actual != expected)).sum())
    return counts


@pytest.mark.slow
def test_ten_thousand_steps_equal_those_of_the_host():
    total, by_kind = Counter(), {}
    for name, layout in LAYOUTS.items():
        for number, kind in enumerate(KINDS):
            counts = take_steps(kind, layout, seed=number)
            total += counts
            by_kind.setdefault(kind.__name__, Counter()).update(counts)
            print(f"{name}, {kind.__name__}: {dict(counts)}")
    for kind_name, counts in by_kind.items():
        print(f"{kind_name}: {dict(counts)}")
    assert total["steps"] >= 10_000
    assert total["excused"] <= 10
    assert by_kind["peaked"]["unfit"] <= 0.01 * by_kind["peaked"]["steps"]
    assert by_kind["spread"]["unfit"] <= 0.1 * by_kind["spread"]["steps"]


@pytest.mark.parametrize("kind", KINDS)
def test_few_steps_equal_those_of_the_host(kind):
    for layout in (Layout(7, 16, 12), Layout(301, 16, 12), Layout(2053, 16, 24)):
        assert take_steps(kind, layout, seed=100)["excused"] <= 1


# --- one rule at a time ---


def test_equal_logits_are_drawn_by_id_through_all_blocks():
    for vocab_size in (301, 2053):
        logits = np.zeros((1, vocab_size), np.float32)
        for rank in range(16):
            uniform = np.float32((rank + 0.5) / vocab_size)
            assert choose(logits, uniform, SamplingParams(), 16) == (rank, True)
        assert not choose(logits, 16.5 / vocab_size, SamplingParams(), 16)[1]


def test_ties_at_the_last_candidate_go_to_the_lower_ids_of_any_block():
    logits = np.zeros((1, 2048), np.float32)
    logits[0, [2047, 3, 1000]] = 1
    logits[0, [2046, 1500, 40, 70, 71, 5]] = 0.5
    order = [3, 1000, 2047, 5, 40, 70, 71, 1500, 2046, 0, 1, 2, 4, 6, 7, 8]
    for top_k in (2, 5, 8, 12, 16):
        params = SamplingParams(temperature=1000, top_k=top_k)  # nearly equal shares
        drawn = [
            int(choose(logits, (rank + 0.5) / top_k, params, 16)[0][0]) for rank in range(top_k)
        ]
        assert drawn == order[:top_k]


def test_token_is_certain_though_the_nucleus_goes_on_behind_the_candidates():
    logits = np.zeros((1, 2053), np.float32)
    logits[0, 77] = 8  # 0.59 of the mass
    assert choose(logits, 0.5, SamplingParams(), 16) == (77, True)
    assert choose(logits, 0.5, SamplingParams(top_p=0.95), 16) == (77, True)
    assert not choose(logits, 0.7, SamplingParams(top_p=0.95), 16)[1]
    # With min_p nobody knows how much lies behind, only that it is between 0 and the rest.
    assert choose(logits, 0.5, SamplingParams(min_p=1e-4), 16) == (77, True)
    assert not choose(logits, 0.6, SamplingParams(min_p=1e-4), 16)[1]
    # Cut within the candidates: nothing behind matters.
    assert choose(logits, LARGEST_UNIFORM, SamplingParams(min_p=0.1), 16) == (77, True)
    assert choose(logits, LARGEST_UNIFORM, SamplingParams(top_p=0.5), 16) == (77, True)


def test_number_on_a_boundary_takes_the_next_token():
    logits = np.zeros((1, 4), np.float32)
    for token in range(4):
        assert choose(logits, token / 4, SamplingParams(), 16) == (token, True)
        below = np.nextafter(np.float32((token + 1) / 4), np.float32(0))
        assert choose(logits, below, SamplingParams(), 16) == (token, True)


def test_shares_are_right_to_the_millionth_where_a_float32_sum_is_not():
    # Terms of one size round alike: summed in float32, half of the mass is off by 1e-5.
    logits = np.full((1, 32768), -10.4, np.float32)
    logits[0, 5] = 0
    ids, shares = eligible(logits[0], SamplingParams())
    for rank, boundary in enumerate(np.cumsum(shares)[:250:15]):
        for side in (-BOUNDARY, BOUNDARY):
            expected = ids[15 * rank + (side > 0)]
            assert choose(logits, boundary + side, SamplingParams(), 256) == (expected, True)


def test_logits_that_the_temperature_makes_equal_are_ordered_by_id():
    lower = np.float32(1.9) + np.arange(64, dtype=np.float32) * np.float32(2**-23)
    higher = np.nextafter(lower, np.float32(2))
    scale = np.float32(1.3)
    at = np.flatnonzero(lower / scale == higher / scale)[0]
    logits = np.zeros((1, 2053), np.float32)
    logits[0, 40], logits[0, 1900] = lower[at], higher[at]
    params = SamplingParams(temperature=1.3, top_k=2)
    assert [int(choose(logits, u, params, 16)[0][0]) for u in (0.25, 0.75)] == [40, 1900]
    assert choose(logits, 0.0, SamplingParams(temperature=0), 16) == (1900, True)


def test_rows_do_not_see_each_other():
    rng = np.random.default_rng(5)
    logits = rng.normal(0, 3, (3, 2053)).astype(np.float32)
    uniform = draw_uniform(rng, 3)
    params = SamplingParams(top_p=0.9)
    together = choose(logits, uniform, params, 16)
    for row in range(3):
        alone = choose(logits[row : row + 1], uniform[row : row + 1], params, 16)
        assert [a[0] for a in alone] == [t[row] for t in together]


def test_greedy_token_is_the_first_of_the_largest():
    rng = np.random.default_rng(2)
    greedy = SamplingParams(temperature=0, top_k=40)
    for vocab_size in (1, 7, 128, 301, 2053, 4096):
        for kind in KINDS:
            for rows in (1, 3):
                if vocab_size < 12 and kind is peaked:
                    continue
                logits = kind(rng, (rows, vocab_size)).astype(np.float32)
                token, fits = choose(logits, 0.99, greedy, 16)
                assert fits.all()
                assert token.tolist() == logits.argmax(axis=1).tolist()
                assert token.tolist() == sample_on_host(logits, np.zeros(rows), greedy).tolist()


def test_zeros_of_either_sign_are_equal():
    logits = np.array([[-1, -0.0, 0.0, -0.0]], np.float32)
    assert choose(logits, 0, SamplingParams(temperature=0), 16) == (1, True)
    assert choose(logits, 0.5, SamplingParams(top_k=3), 16) == (2, True)


@pytest.mark.parametrize("vocab_size", [7, 301, 2053])
@pytest.mark.parametrize("top_k", [0, 3])
@pytest.mark.parametrize("broken", ["nan", "all nan", "inf", "two inf", "all -inf"])
def test_row_that_the_host_refuses_is_left_to_it(vocab_size, top_k, broken):
    rng = np.random.default_rng(3)
    for _ in range(5):
        logits = rng.normal(0, 3, (2, vocab_size)).astype(np.float32)
        if broken.startswith("all"):
            logits[1] = float(broken.removeprefix("all "))
        else:
            places = rng.choice(vocab_size, 2 if broken.startswith("two") else 1, replace=False)
            logits[1, places] = float(broken.removeprefix("two "))
        params = SamplingParams(top_k=top_k)
        with pytest.raises(ValueError, match="row 1 has no token"):
            sample_on_host(logits, [0.3, 0.3], params)
        uniform = 0.0  # decided by the first candidate alone
        assert choose(logits, uniform, params, 16)[1].tolist() == [True, False]
        if broken != "nan":
            greedy = choose(logits, uniform, SamplingParams(temperature=0), 16)[1]
            assert greedy.tolist() == [True, False]


def test_next_id_may_be_bound_to_the_buffer_of_input_ids():
    editor, logits, table = graph_with_logits(301, from_table=True)
    add_token_choice(editor, logits, 301, 16)
    session = open_session(editor)
    for params in (SamplingParams(temperature=0), SamplingParams(temperature=0.5, top_k=16)):
        inputs = TailInputs.make(params, 2)
        values = {name: ort.OrtValue.ortvalue_from_numpy(a) for name, a in inputs.feeds().items()}
        ids = np.array([[5], [9]])
        buffer = ort.OrtValue.ortvalue_from_numpy(ids)
        binding = session.io_binding()
        binding.bind_ortvalue_input("input_ids", buffer)
        binding.bind_ortvalue_output("next_id", buffer)
        binding.bind_output("fits")
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for step in range(20):
            inputs.uniform[:] = uniform_numbers(1, np.arange(2), np.full(2, step))
            expected = sample_on_host(table[ids[:, 0]], inputs.uniform, params)
            session.run_with_iobinding(binding)
            assert ids[:, 0].tolist() == expected.tolist()
