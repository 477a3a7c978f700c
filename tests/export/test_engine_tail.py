"""An engine's choice of tokens, by ONNX Runtime, against the host's sampler.

The graph must be right whatever order its TopK gives equal values, and with less exact arithmetic
than ONNX Runtime's: both are put into the graph here.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.lowerings.engine_tail import MOST_CANDIDATES, add_engine_tail
from export.lowerings.graph_editor import GraphEditor
from plugins.onnx_function import OPSET
from runtime.sampling import SamplingParams
from runtime.sampling_tail import EngineTailInputs, engine_tail_covers
from tests.sampling_cases import KINDS, LARGEST_UNIFORM, draw_uniform, sample_on_host

GREEDY = SamplingParams(temperature=0)


def shuffle_candidates(editor, seed):
    """Let TopK meet the vocabulary in another order, and give its candidates in any."""
    graph = editor.graph
    (top,) = (node for node in graph if node.op_type == "TopK")
    logits, count = top.inputs
    rng = np.random.default_rng(seed)
    vocab_size = editor.model.graph.inputs[0].shape[2]
    order = editor.initializer("order", rng.permutation(vocab_size))
    places = editor.initializer("places", rng.permutation(int(editor.array(count)[0])))
    mixed = editor.op("Gather", logits, order, axis=1)
    values, ids = editor.op_outputs("TopK", 2, mixed, count, axis=1)
    ids = editor.op("Gather", order, ids, axis=0)
    for old, new in zip(top.outputs, (values, ids), strict=True):
        old.replace_all_uses_with(editor.op("Gather", new, places, axis=1))


def coarsen(editor, seed, sizes):
    """Divide by a reciprocal, and let each power but that of 0 be off by up to 2^-19."""
    rng = np.random.default_rng(seed)
    nodes = list(editor.graph)
    for node in nodes:
        if node.op_type == "Div":
            number, temperature = node.inputs
            inverse = editor.op("Reciprocal", temperature)
            node.outputs[0].replace_all_uses_with(editor.op("Mul", number, inverse))
    powers = [node.outputs[0] for node in nodes if node.op_type == "Exp"]
    for power, size in zip(powers, sizes, strict=False):
        users = power.uses()
        noise = (1 + rng.uniform(-1, 1, (1, size)) * 2.0**-19).astype(np.float32)
        noisy = editor.op("Mul", power, editor.initializer(f"noise {size}", noise))
        coarse = editor.op("Where", editor.op("Equal", power, editor.float(1.0)), power, noisy)
        for user, place in users:
            user.replace_input_with(place, coarse)


@cache
def session(vocab_size, width, order=None, coarse=None):
    editor = GraphEditor(
        ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name="step"), ir_version=10)
    )
    logits = ir.val("logits", ir.DataType.FLOAT, ["B", 1, vocab_size])
    editor.graph.inputs.append(logits)
    tail = add_engine_tail(editor, logits, vocab_size, width)
    editor.graph.outputs.extend([tail.next_id, tail.fits])
    if order is not None and width < vocab_size:
        shuffle_candidates(editor, order)
    if coarse is not None:
        coarsen(editor, coarse, (min(width, vocab_size), vocab_size))
    editor.finish()
    model = ir.to_proto(editor.model)
    onnx.checker.check_model(model, full_check=True)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def choose(logits, uniform, params, width, order=None, coarse=None):
    """The graph's `next_id` [B] and `fits` [B] for logits [B, V]."""
    rows, vocab_size = logits.shape
    assert engine_tail_covers(params, vocab_size=vocab_size, width=width) is None
    inputs = EngineTailInputs.make(params, rows)
    if params.temperature:
        inputs.uniform[:] = uniform
    next_id, fits = session(vocab_size, width, order, coarse).run(
        ["next_id", "fits"], {"logits": logits[:, None], **inputs.feeds()}
    )
    assert next_id.shape == fits.shape == (rows, 1)
    assert next_id.dtype == np.int64
    assert ((next_id >= 0) & (next_id < vocab_size)).all(), "the next step looks its row up"
    return next_id[:, 0], fits[:, 0]


def draw_params(rng, vocab_size, width):
    return SamplingParams(
        temperature=float(rng.choice([0, 0.05, 0.3, 0.5, 0.7, 1.0, 1.3, 2.0])),
        top_k=int(rng.choice([0, 0, 0, 1, 5, min(width, vocab_size), vocab_size])),
        top_p=float(rng.choice([1.0, 1.0, 0.95, 0.9, 0.5, 0.1])),
        min_p=float(rng.choice([0.0, 0.0, 0.0, 0.02, 0.3, 1.0])),
    )


def draw_logits(rng, shape):
    """Rows of any kind, some of them made of values that are common or extreme."""
    logits = KINDS[rng.integers(len(KINDS))](rng, shape).astype(np.float32)
    change = rng.integers(5)
    if change == 0:
        return logits.clip(-6e4, 6e4).astype(np.float16).astype(np.float32)
    if change == 1:  # many ties at the top
        highest = logits.max(axis=1, keepdims=True)
        return np.where(rng.random(shape) < 0.05, highest, logits).astype(np.float32)
    if change == 2:
        return (logits * np.float32(10.0 ** rng.integers(-3, 4))).astype(np.float32)
    if change == 3:
        logits[:, rng.integers(1, shape[1], 5)] = -np.inf
    return logits


@settings(max_examples=250, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    layout=st.sampled_from([(257, 16), (257, 256), (300, 300), (7, 64), (1000, 128), (2053, 512)]),
    order=st.sampled_from([None, 1, 2, 3]),
    coarse=st.sampled_from([None, 1, 2]),
)
def test_a_certain_token_is_the_hosts_in_any_order_and_with_coarse_arithmetic(
    seed, layout, order, coarse
):
    vocab_size, width = layout
    rng = np.random.default_rng(seed)
    logits = draw_logits(rng, (4, vocab_size))
    params, uniform = draw_params(rng, vocab_size, width), draw_uniform(rng, 4)
    expected = sample_on_host(logits, uniform, params)
    actual, fits = choose(logits, uniform, params, width, order, coarse)
    assert (actual == expected)[fits].all(), (actual, expected, fits, uniform, params)


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32), side=st.integers(-40, 40), coarse=st.sampled_from([None, 1, 2]))
def test_numbers_beside_a_boundary_are_left_to_the_host_or_right(seed, side, coarse):
    """Where a token's share begins; the numbers that random draws nearly never hit."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (1, 300)).astype(np.float32)
    params = draw_params(rng, 300, 64)
    if params.temperature == 0:
        return
    weights = np.sort(np.exp(logits[0].astype(np.float64) / params.temperature))[::-1]
    share = np.cumsum(weights)[rng.integers(0, 20)] / weights.sum()
    uniform = np.float32(min(max(share + side * 2.0**-24, 0), LARGEST_UNIFORM))
    expected = sample_on_host(logits, [uniform], params)
    actual, fits = choose(logits, uniform, params, 64, coarse=coarse)
    assert not fits[0] or actual[0] == expected[0]


@pytest.mark.slow
@pytest.mark.parametrize("order", [None, 7])
def test_thousands_of_steps_of_a_released_vocabulary_equal_the_hosts(order):
    rng = np.random.default_rng(11)
    steps = unfit = 0
    for _ in range(150):
        logits = draw_logits(rng, (3, 32768))
        params, uniform = draw_params(rng, 32768, 512), draw_uniform(rng, 3)
        expected = sample_on_host(logits, uniform, params)
        actual, fits = choose(logits, uniform, params, 512, order)
        assert (actual == expected)[fits].all()
        steps, unfit = steps + 3, unfit + int((~fits).sum())
    assert unfit < 0.7 * steps  # most kinds have more ties than there are candidates


def test_tokens_of_a_usual_distribution_are_nearly_all_certain():
    rng = np.random.default_rng(3)
    logits = (rng.normal(0, 1.5, (250, 2048)) + 12 * (rng.random((250, 2048)) < 0.003)).astype(
        np.float32
    )
    uniform = rng.random(250).astype(np.float32)
    for params, share in (
        (GREEDY, 1.0),
        (SamplingParams(temperature=0.7, top_k=50, top_p=0.9), 0.99),
        (SamplingParams(temperature=0.8, min_p=0.05), 0.99),
        (SamplingParams(), 0.97),
    ):
        actual, fits = choose(logits, uniform, params, 512)
        assert fits.mean() >= share, params
        assert (actual == sample_on_host(logits, uniform, params))[fits].all()


def test_greedy_takes_the_lowest_of_many_equal_ids_in_any_order():
    rng = np.random.default_rng(5)
    for tied in (1, 2, 40, 127):
        logits = rng.normal(0, 1, (2, 1000)).astype(np.float32)
        for row in logits:
            row[rng.choice(1000, tied, replace=False)] = 9
        for order in (None, 1, 2):
            token, fits = choose(logits, 0, GREEDY, 128, order)
            assert fits.all()
            assert token.tolist() == logits.argmax(axis=1).tolist()


def test_more_ties_than_candidates_are_left_to_the_host():
    logits = np.zeros((1, 1000), np.float32)
    assert not choose(logits, 0, GREEDY, 128)[1]
    logits[0, 700] = 1
    assert choose(logits, 0, GREEDY, 128) == (700, True)
    # Of those that equal the last candidate some are missing, also where top_k ends there.
    assert not choose(logits, 0.9, SamplingParams(top_k=5), 128)[1]
    assert choose(logits, 0.1, SamplingParams(top_k=5), 128) == (700, True)


def test_ties_that_the_temperature_makes_are_left_to_the_host():
    lower = np.float32(1.9) + np.arange(64, dtype=np.float32) * np.float32(2**-23)
    higher = np.nextafter(lower, np.float32(2))
    at = np.flatnonzero(lower / np.float32(1.3) == higher / np.float32(1.3))[0]
    logits = np.zeros((1, 2053), np.float32)
    logits[0, 40], logits[0, 1900] = lower[at], higher[at]
    assert not choose(logits, 0.1, SamplingParams(temperature=1.3, top_k=2), 16)[1]
    # The other way round both orders are one, and by a power of two nothing collapses.
    logits[0, 40], logits[0, 1900] = higher[at], lower[at]
    assert choose(logits, 0.1, SamplingParams(temperature=1.3, top_k=2), 16) == (40, True)
    logits[0, 40], logits[0, 1900] = lower[at], higher[at]
    assert choose(logits, 0.1, SamplingParams(temperature=2.0, top_k=2), 16) == (1900, True)


def test_ties_that_the_temperature_makes_with_a_token_that_is_no_candidate_are_left_to_the_host():
    """Of tokens 2 and 250 one is a candidate; the host sorts 2 before all others."""
    higher = np.float32(1.90000463)
    lower = np.nextafter(higher, np.float32(0))
    params = SamplingParams(temperature=0.3, top_k=16)
    assert lower / np.float32(0.3) == higher / np.float32(0.3)
    logits = np.zeros((1, 257), np.float32)
    logits[0, 100:115] = higher
    logits[0, [2, 250]] = lower
    assert sample_on_host(logits, [0.1], params) == 100  # the second of 16
    for order in range(8):
        token, fits = choose(logits, 0.1, params, 16, order)
        assert not fits[0] or token[0] == 100


def test_only_one_token_left_is_certain_whatever_the_number():
    logits = np.zeros((1, 300), np.float32)
    logits[0, 77] = 8
    for params in (SamplingParams(top_k=1), SamplingParams(top_p=0.5), SamplingParams(min_p=1.0)):
        for uniform in (0, 0.5, LARGEST_UNIFORM):
            assert choose(logits, uniform, params, 16) == (77, True)


def test_a_nucleus_beyond_the_candidates_is_bounded():
    logits = np.zeros((1, 2053), np.float32)
    logits[0, 77] = 8  # 0.59 of the mass
    assert choose(logits, 0.5, SamplingParams(), 16) == (77, True)
    assert choose(logits, 0.5, SamplingParams(top_p=0.95), 16) == (77, True)
    assert not choose(logits, 0.7, SamplingParams(top_p=0.95), 16)[1]
    assert choose(logits, 0.5, SamplingParams(min_p=1e-4), 16) == (77, True)
    assert not choose(logits, 0.6, SamplingParams(min_p=1e-4), 16)[1]


@pytest.mark.parametrize("broken", ["nan", "all nan", "inf", "all -inf"])
@pytest.mark.parametrize("params", [GREEDY, SamplingParams(top_k=3)], ids=["greedy", "drawn"])
@pytest.mark.parametrize("vocab_size", [7, 2053])
def test_a_row_that_the_host_refuses_never_fits(vocab_size, params, broken):
    rng = np.random.default_rng(3)
    for _ in range(5):
        logits = rng.normal(0, 3, (2, vocab_size)).astype(np.float32)
        if broken.startswith("all"):
            logits[1] = float(broken.removeprefix("all "))
        else:
            logits[1, rng.integers(vocab_size)] = float(broken)
        assert choose(logits, 0.0, params, 16)[1].tolist() == [True, False]


def test_a_nan_that_topk_sorts_last_is_seen_all_the_same():
    editor = GraphEditor(
        ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name="step"), ir_version=10)
    )
    logits = ir.val("logits", ir.DataType.FLOAT, ["B", 1, 300])
    editor.graph.inputs.append(logits)
    tail = add_engine_tail(editor, logits, 300, 16)
    editor.graph.outputs.extend([tail.next_id, tail.fits])
    (top,) = (node for node in editor.graph if node.op_type == "TopK")
    given = top.inputs[0]
    hidden = editor.op("Where", editor.op("IsNaN", given), editor.float(-np.inf), given)
    top.replace_input_with(0, hidden)
    editor.finish()
    model = ir.to_proto(editor.model).SerializeToString()
    broken = np.random.default_rng(1).normal(0, 3, (2, 1, 300)).astype(np.float32)
    broken[1, 0, 40] = np.nan
    feeds = {"logits": broken, **EngineTailInputs.make(GREEDY, 2).feeds()}
    run = ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run
    assert run(["fits"], feeds)[0].tolist() == [[True], [False]]


def test_rows_do_not_see_each_other():
    rng = np.random.default_rng(5)
    logits = rng.normal(0, 3, (3, 2053)).astype(np.float32)
    uniform = draw_uniform(rng, 3)
    params = SamplingParams(top_p=0.9)
    together = choose(logits, uniform, params, 64)
    for row in range(3):
        alone = choose(logits[row : row + 1], uniform[row : row + 1], params, 64)
        assert [a[0] for a in alone] == [t[row] for t in together]


@pytest.mark.parametrize(("vocab_size", "width"), [(5000, MOST_CANDIDATES + 1), (2**17 + 1, 8)])
def test_what_the_nodes_cannot_hold_is_refused(vocab_size, width):
    editor = GraphEditor(
        ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name="step"), ir_version=10)
    )
    logits = ir.val("logits", ir.DataType.FLOAT, ["B", 1, vocab_size])
    with pytest.raises(ValueError, match=r"a tail compares 1 to 3840 candidates of at most 131072"):
        add_engine_tail(editor, logits, vocab_size, width)


def test_no_node_is_double_or_looks_at_the_order_of_candidates():
    """TensorRT has no float64, no If that a CUDA graph holds, and promises no order."""
    model = onnx.load_model_from_string(session_model(2053, 64))
    names = {node.op_type for node in model.graph.node}
    assert not names & {"If", "CumSum", "ArgMax", "GatherElements", "Gather"}
    kinds = {init.data_type for init in model.graph.initializer}
    assert kinds <= {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}
    casts = {a.i for n in model.graph.node if n.op_type == "Cast" for a in n.attribute}
    assert casts <= {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}


def session_model(vocab_size, width):
    editor = GraphEditor(
        ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name="step"), ir_version=10)
    )
    logits = ir.val("logits", ir.DataType.FLOAT, ["B", 1, vocab_size])
    editor.graph.inputs.append(logits)
    tail = add_engine_tail(editor, logits, vocab_size, width)
    editor.graph.outputs.extend([tail.next_id, tail.fits])
    editor.finish()
    return ir.to_proto(editor.model).SerializeToString()
