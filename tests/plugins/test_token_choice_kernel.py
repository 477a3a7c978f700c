"""The kernel that chooses tokens, interpreted, against the host's sampler on the same logits."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plugins.projection.packing import PackedMatrix, WeightFormat, pack_weights, unpack_weights
from plugins.token_choice.launches import GENERATED, IN_PROMPT, PARAMETERS, TokenChoice
from runtime.sampling import SamplingParams, TokenHistory, make_sampler
from runtime.token_chooser import TokenChooser
from tests.interpreter import InterpreterLauncher
from tests.kernel_runs import Guarded, guarded
from tests.sampling_cases import KINDS, LARGEST_UNIFORM, draw_uniform, margin, peaked, spread, tied

# A number this close to where the token changes may fall on either side (docs/sampling.md).
BOUNDARY = 1e-6
LAST_SLOT = 40
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # infinities, on purpose


def parameter_block(params: list[SamplingParams]) -> Tensor:
    rows = [[float(getattr(one, name)) for name in PARAMETERS] for one in params]
    return torch.tensor(rows, dtype=torch.float32)


@dataclass
class Device:
    """The memory of a choice, and its launches."""

    choice: TokenChoice
    arrays: dict[str, Guarded] = field(default_factory=dict)

    def put(self, **tensors: Tensor | np.ndarray) -> None:
        for name, tensor in tensors.items():
            self.arrays[name] = guarded(torch.as_tensor(tensor))

    def __getitem__(self, name: str) -> Tensor:
        return self.arrays[name].tensor

    def start(self, rows: int, step: int = 0, positions: int = 5) -> None:
        choice = self.choice
        dtype = torch.int32 if choice.token == "int32" else torch.int64
        self.put(
            positions=torch.full((rows,), positions),
            step=torch.tensor([step], dtype=torch.int32),
            counters=torch.zeros(choice.counters, dtype=torch.int32),
        )
        self.arrays["ring"] = Guarded((choice.ring, choice.batch), dtype)
        self.arrays["tokens"] = Guarded((rows,), dtype)
        if choice.embedding is not None:
            self.arrays["next_x"] = Guarded((rows, choice.columns), torch.float32)

    def launch(self, logits: np.ndarray, *, twice: bool = False) -> list[int]:
        """One step; `twice` runs it on a copy of the memory first, which must get the same bits."""
        self.put(logits=np.ascontiguousarray(logits, np.float32))
        copy = Device(self.choice, {name: guarded(a.tensor) for name, a in self.arrays.items()})
        if twice:
            copy._launch(len(logits))
        self._launch(len(logits))
        for name, array in self.arrays.items():
            array.check(name)
            if twice:
                same = torch.equal(array.tensor.view(torch.uint8), copy[name].view(torch.uint8))
                assert same, f"{name} differs the second time"
        assert self["counters"].tolist() == [0]
        return self["tokens"].tolist()

    def _launch(self, rows: int) -> None:
        workspace = Guarded((self.choice.workspace_bytes,), torch.uint8)
        launch = self.choice.launch(
            batch=rows,
            last_slot=LAST_SLOT,
            workspace=workspace.address,
            **{name: array.address for name, array in self.arrays.items()},
        )
        InterpreterLauncher([self.choice.spec]).launch(launch)
        workspace.check("workspace")


def choose(
    logits: np.ndarray, params: SamplingParams | list[SamplingParams], uniform: Any
) -> list[int]:
    """Tokens of one step without history."""
    rows = len(logits)
    device = Device(TokenChoice(vocab_size=logits.shape[1], batch=rows, ring=2, uniforms=1))
    device.start(rows)
    device.put(
        parameters=parameter_block(params if isinstance(params, list) else [params] * rows),
        uniforms=np.broadcast_to(np.float32(uniform), (1, rows)).copy(),
    )
    return device.launch(logits)


def random_params(rng: np.random.Generator, vocab_size: int, *, history: bool) -> SamplingParams:
    values: dict[str, Any] = {
        "temperature": rng.choice([0.0, 0.05, 0.3, 0.7, 1.0, 1.3, 2.0]),
        "top_p": rng.choice([1.0, 1.0, 0.95, 0.9, 0.5, 0.1]),
        "min_p": rng.choice([0.0, 0.0, 0.0, 0.02, 0.3, 1.0]),
    }
    if history:
        values["repetition_penalty"] = rng.choice([1.0, 1.1, 0.7, 1.3])
        values["presence_penalty"] = rng.choice([0.0, 0.3, -1.1])
        values["frequency_penalty"] = rng.choice([0.0, 0.7, -0.2])
    top_k = int(rng.choice([0, 0, 0, 1, 5, 50, vocab_size - 1, vocab_size, 10**6]))
    numbers = {name: float(value) for name, value in values.items()}
    return SamplingParams(top_k=top_k, max_tokens=64, **numbers)


def random_history(rng: np.random.Generator, rows: int, vocab_size: int) -> TokenHistory:
    history = TokenHistory(
        rng.integers(0, vocab_size, (rows, 30)), np.full(rows, 30), vocab_size,
        seen=True, counts=True,
    )  # fmt: skip
    for _ in range(40):
        history.append(rng.integers(0, vocab_size // 8, rows), np.ones(rows, bool))
    return history


def count_table(history: TokenHistory) -> np.ndarray:
    assert history.seen is not None and history.counts is not None
    return (IN_PROMPT * history.seen + GENERATED * history.counts).astype(np.int32)


def take_step(kind: Any, vocab_size: int, seed: int, *, rules: bool) -> Counter[str]:
    """Rows of a step, and how many got another token than the host's near a boundary."""
    rng = np.random.default_rng(seed)
    rows = int(rng.integers(1, 3))
    logits = kind(rng, (rows, vocab_size)).astype(np.float32)
    params = random_params(rng, vocab_size, history=rules)
    uniform = draw_uniform(rng, rows).astype(np.float32)
    step = int(rng.integers(0, 200))
    bias = rng.normal(0, 1, vocab_size).astype(np.float32) if rules else None
    stop_ids = rng.integers(0, vocab_size, 3)
    if rules:
        # Penalties leave -inf as it is, and so do bias and stop ids.
        params = replace(params, max_tokens=400, min_tokens=int(rng.choice([0, step, step + 1])))
        assert bias is not None
        params = replace(params, logit_bias={i: float(b) for i, b in enumerate(bias)})
    history = random_history(rng, rows, vocab_size)
    device = Device(
        TokenChoice(
            vocab_size=vocab_size, batch=3, ring=7, uniforms=5, history=rules,
            bias="shared" if rules else "none", stop_ids=5 if rules else 0,
        )
    )  # fmt: skip
    device.start(rows, step)
    ring = np.full((5, 3), np.nan, np.float32)
    ring[step % 5, :rows] = uniform
    device.put(parameters=parameter_block([params] * rows), uniforms=ring)
    if rules:
        table = count_table(history)
        stops = np.array([*stop_ids[:2], -1, stop_ids[2], -1], np.int32)
        device.put(bias=bias, counts=table.copy(), stop_ids=stops)
    else:
        history = TokenHistory(np.zeros((rows, 0), int), [], vocab_size, seen=False, counts=False)
    tokens = device.launch(logits)
    if rules:
        table[np.arange(rows), tokens] += GENERATED
        assert device["counts"].tolist() == table.tolist()

    forbidden = stop_ids.tolist() if step < params.min_tokens else []
    sampler = make_sampler(params, vocab_size)
    expected = sampler(logits, history, uniform, forbidden).tolist()
    adjusted = sampler.adjust(logits, history, forbidden)
    counts = Counter(rows=rows)
    for row in range(rows):
        if tokens[row] != expected[row]:
            assert params.temperature > 0
            assert margin(adjusted[row], uniform[row], params) < BOUNDARY, (params, uniform[row])
            counts["excused"] += 1
    return counts


@pytest.mark.parametrize("rules", [False, True], ids=["plain", "rules"])
@settings(max_examples=8, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    vocab_size=st.sampled_from([257, 300, 512, 1031]),
    seed=st.integers(0, 2**32 - 1),
)
def test_tokens_are_those_of_the_host(rules: bool, kind: Any, vocab_size: int, seed: int) -> None:
    take_step(kind, vocab_size, seed, rules=rules)


def test_host_and_kernel_hardly_ever_part_at_a_boundary() -> None:
    counts: Counter[str] = Counter()
    for number in range(16):
        kind = KINDS[number % len(KINDS)]
        counts += take_step(kind, 259, 10_000 + number, rules=number % 3 == 0)
    assert counts["rows"] > 16
    assert counts["excused"] <= 1


@pytest.mark.parametrize("kind", [spread, peaked, tied], ids=lambda kind: kind.__name__)
def test_tokens_of_a_large_vocabulary_are_those_of_the_host(kind: Any) -> None:
    take_step(kind, 32768, 5, rules=kind is tied)


def on_host(logits: np.ndarray, params: list[SamplingParams], uniform: Any) -> list[int]:
    """Tokens of one step without history, by rules of each row's own."""
    tokens = []
    for row, one in enumerate(params):
        sampler = make_sampler(one, logits.shape[1])
        history = sampler.start_history(np.zeros((1, 0), np.int64), np.zeros(1, np.int64))
        number = np.full(1, uniform[row], np.float32)
        tokens.append(int(sampler(logits[row : row + 1], history, number)[0]))
    return tokens


def test_equal_logits_share_the_numbers_evenly() -> None:
    """A draw among equals depends on no sum, so the id is known."""
    logits = np.full((8, 1000), -3.25, np.float32)
    uniform = np.array([0, 0.001001, 0.50001, LARGEST_UNIFORM, 0.50001, 0.9989, 0.5, 0.9989])
    # top_p keeps the token that reaches it: 251 of 1000.
    params = [*[SamplingParams()] * 4, *[SamplingParams(top_k=10)] * 2]
    params += [SamplingParams(top_p=0.2505)] * 2
    tokens = choose(logits, params, uniform)
    assert tokens == [0, 1, 500, 999, 5, 9, 125, 250] == on_host(logits, params, uniform)


@pytest.mark.parametrize("uniform", [0.4, 0.97])
def test_both_cuts_may_fall_among_equals(uniform: float) -> None:
    logits = np.repeat(np.array([[2.0, 1.0, 0.0, 1.0, 2.0]], np.float32), 8, axis=0)
    cuts = [(1, 0.9), (2, 0.35), (2, 0.6), (3, 0.6), (3, 0.9), (4, 0.35), (4, 0.9), (5, 0.96)]
    params = [SamplingParams(top_k=top_k, top_p=top_p) for top_k, top_p in cuts]
    assert choose(logits, params, uniform) == on_host(logits, params, [uniform] * 8)


def test_rows_follow_rules_of_their_own() -> None:
    rng = np.random.default_rng(3)
    logits = np.repeat(rng.normal(0, 3, (1, 300)).astype(np.float32), 6, axis=0)
    params = [
        SamplingParams(temperature=0),
        SamplingParams(temperature=0.4),
        SamplingParams(top_k=3),
        SamplingParams(top_p=0.4),
        SamplingParams(min_p=0.5),
        SamplingParams(temperature=2.0, top_k=100, top_p=0.8, min_p=0.01),
    ]
    tokens = choose(logits, params, 0.9)
    assert len(set(tokens)) > 2
    assert tokens == on_host(logits, params, [0.9] * 6)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_without_a_token_to_pick_are_marked(temperature: float) -> None:
    logits = np.random.default_rng(1).normal(size=(6, 40)).astype(np.float32)
    logits[0, 7] = np.nan
    logits[1, 39] = np.inf
    logits[2] = -np.inf
    logits[3, 1:] = -np.inf
    logits[4, :] = np.nan
    params = SamplingParams(temperature=temperature)
    tokens = choose(logits, params, 0.5)
    assert tokens == [-1, -1, -1, 0, -1, *on_host(logits[5:], [params], [0.5])]


def test_marked_row_counts_nothing_and_embeds_the_first_row() -> None:
    table = random_table(40, 32)
    device = step_device(40, table, rows=2, stop_ids=3)
    device.put(
        parameters=parameter_block([SamplingParams(min_tokens=4)] * 2),
        stop_ids=torch.tensor([3, 5, -1], dtype=torch.int32),
    )
    logits = np.full((2, 40), -np.inf)
    logits[0, 3] = logits[0, 5] = 1.0  # forbidden before the fourth token
    logits[1, 6] = 1.0
    before = device["counts"].clone()
    assert device.launch(logits, twice=True) == [-1, 6]
    before[1, 6] += GENERATED
    assert torch.equal(device["counts"], before)
    assert device["ring"][0, :2].tolist() == [-1, 6]
    assert device["positions"].tolist() == [6, 6]
    assert torch.equal(device["next_x"].double(), matrix_of(table)[[0, 6]])


def test_stop_ids_can_be_picked_from_min_tokens_on() -> None:
    device = step_device(12, None, rows=1, stop_ids=2)
    device.put(
        parameters=parameter_block([SamplingParams(temperature=0, min_tokens=3)]),
        stop_ids=torch.tensor([4, 9], dtype=torch.int32),
    )
    logits = np.zeros((1, 12))
    logits[0, [4, 9, 7]] = 3, 2, 1
    assert [device.launch(logits)[0] for _ in range(5)] == [7, 7, 7, 4, 4]


def test_presence_and_frequency_spare_tokens_of_the_prompt() -> None:
    device = step_device(4, None, rows=1)
    params = SamplingParams(temperature=0, presence_penalty=1, frequency_penalty=0.25)
    counts = [[IN_PROMPT, 0, GENERATED, IN_PROMPT + 3 * GENERATED]]
    device.put(parameters=parameter_block([params]), counts=torch.tensor(counts, dtype=torch.int32))
    # 2, 1.5, 3.2 - 1.25 and 3.6 - 1.75; then 2 - 1.25, then 3.2 - 1.5.
    logits = np.array([[2.0, 1.5, 3.2, 3.6]])
    assert [device.launch(logits)[0] for _ in range(3)] == [0, 2, 3]


def random_table(rows: int, columns: int, kind: Any = "float16", group: int = 0) -> PackedMatrix:
    numbers = np.random.default_rng(2).normal(size=(rows, columns))
    return pack_weights([numbers], WeightFormat(kind=kind, group=group))


def matrix_of(packed: PackedMatrix) -> Tensor:
    return torch.from_numpy(unpack_weights(packed)).double()


def step_device(vocab_size: int, table: PackedMatrix | None, rows: int, **options: Any) -> Device:
    """A device for sequences that begin, with a count table and uniform numbers."""
    if table is not None:
        options |= {"columns": table.columns, "embedding": table.format}
    choice = TokenChoice(
        vocab_size=vocab_size, history=True, batch=rows + 1, ring=3, uniforms=4, **options
    )
    device = Device(choice)
    device.start(rows)
    numbers = np.random.default_rng(4).random((4, rows + 1), np.float32)
    device.put(counts=torch.zeros(rows, vocab_size, dtype=torch.int32), uniforms=numbers)
    if table is not None:
        device.put(embedding=table.weights)
        if table.scales is not None:
            device.put(embedding_scales=table.scales)
    return device


@pytest.mark.parametrize(
    ("temperature", "kind", "group", "token"),
    [(0.8, "float16", 0, "int64"), (0.0, "int8", 0, "int32"), (0.0, "int4", 32, "int64")],
)
def test_steps_follow_each_other_without_the_host(
    temperature: float, kind: Any, group: int, token: Any
) -> None:
    vocab_size, rows, steps = 50, 3, 6
    rng = np.random.default_rng(6)
    table = random_table(vocab_size, 96, kind, group)
    device = step_device(vocab_size, table, rows, token=token, stop_ids=2, bias="rows")
    params = SamplingParams(
        temperature=temperature, top_k=20, repetition_penalty=1.4, presence_penalty=0.5,
        frequency_penalty=0.3, min_tokens=5,
    )  # fmt: skip
    prompts = rng.integers(0, vocab_size, (rows, 8))
    sampler = make_sampler(params, vocab_size)
    chooser = TokenChooser(
        sampler, prompts, np.array([8, 3, 6]), np.arange(rows), frozenset({2, 11})
    )
    history = sampler.start_history(prompts, np.array([8, 3, 6]))
    bias = rng.normal(size=(rows, vocab_size)).astype(np.float32)
    device.put(
        parameters=parameter_block([params] * rows),
        counts=count_table(history),
        bias=bias,
        stop_ids=torch.tensor([2, 11], dtype=torch.int32),
        positions=torch.tensor([3, 38, 40]),
    )
    ring = device["ring"].clone()
    for step in range(steps):
        if step % 4 == 0:
            for ahead in range(4):  # what the host refills
                device["uniforms"][ahead, :rows] = torch.from_numpy(chooser.uniform(step + ahead))
        logits = rng.normal(0, 1, (rows, vocab_size)).astype(np.float32)
        tokens = device.launch(logits, twice=step == 1)
        expected = chooser.choose(logits + bias, step, np.ones(rows, bool)).tolist()
        history.append(np.array(expected), np.ones(rows, bool))
        assert tokens == expected
        ring[step % 3, :rows] = torch.tensor(expected)
        assert torch.equal(device["ring"], ring)
        assert device["step"].item() == step + 1
        assert device["positions"].tolist() == [min(p + step + 1, 40) for p in (3, 38, 40)]
        table_of_host = count_table(history)
        assert ((device["counts"] > 0) == torch.from_numpy(table_of_host > 0)).all()
        assert (device["counts"] // GENERATED).tolist() == history.counts.tolist()
        assert torch.equal(device["next_x"].double(), matrix_of(table)[expected])


def test_last_program_of_all_ends_the_step() -> None:
    device = step_device(20, None, rows=3)
    device.put(parameters=parameter_block([SamplingParams()] * 3))
    device.put(logits=np.zeros((3, 20), np.float32))
    # As if one more program were to come, which never does.
    device.put(counters=torch.tensor([-1], dtype=torch.int32))
    device._launch(3)
    assert (device["counters"].item(), device["step"].item()) == (2, 0)


def test_masses_are_right_to_the_last_places_of_a_float32() -> None:
    rng = np.random.default_rng(8)
    logits = np.concatenate([[0.0], -np.exp2(rng.uniform(-20, 6.7, 2000))]).astype(np.float32)
    logits = (logits + np.float32(3.7)).astype(np.float32)[None]
    choice = TokenChoice(vocab_size=logits.shape[1])
    device = Device(choice)
    device.start(1)
    device.put(
        parameters=parameter_block([SamplingParams()]),
        uniforms=np.zeros((64, 1), np.float32),
        logits=logits,
    )
    workspace = torch.full((choice.workspace_bytes,), 0xFF, dtype=torch.uint8)
    launch = choice.launch(
        batch=1, last_slot=9, workspace=workspace.data_ptr(),
        **{name: array.address for name, array in device.arrays.items()},
    )  # fmt: skip
    InterpreterLauncher([choice.spec]).launch(launch)
    start = int(launch.arguments["masses"]) - workspace.data_ptr()
    masses = workspace[start : start + 4 * logits.size].view(torch.float32).double().numpy()
    expected = np.exp(logits[0].astype(np.float64) - float(logits.max()))
    assert masses[0] == 1.0
    counted = expected > np.exp(-79.9)
    assert np.abs(masses / expected - 1)[counted].max() < 2.5e-7
    nothing = expected < np.exp(-80.1)
    assert nothing.any()
    assert (masses[nothing] == 0).all()


def test_parameters_are_the_samplers() -> None:
    assert set(PARAMETERS) <= {field.name for field in fields(SamplingParams)}
    assert len(PARAMETERS) == 8


def test_choices_that_no_kernel_covers_are_refused() -> None:
    for options, message in (
        ({"vocab_size": 0}, "0 tokens, expected 1 to"),
        ({"vocab_size": (1 << 24) + 1}, "16777217 tokens, expected 1 to"),
        ({"activation": "int8"}, "unknown activation 'int8'"),
        ({"token": "int16"}, "unknown token 'int16'"),
        ({"bias": "some"}, "unknown bias 'some'"),
        ({"columns": 20, "embedding": WeightFormat(kind="float16")}, "20 columns cannot be stored"),
        ({"ring": 0}, "ring of 0 steps, expected at least 1"),
        ({"uniforms": 0}, "uniforms of 0 steps, expected at least 1"),
        ({"stop_ids": -1}, "-1 stop ids, expected 0 or more"),
        ({"batch": 9}, "a batch of 9, expected 1 to 8"),
    ):
        with pytest.raises(ValueError, match=message):
            TokenChoice(**{"vocab_size": 64, **options})


def test_launches_ask_for_what_they_read_and_write_and_no_more() -> None:
    names = ("logits", "parameters", "uniforms", "tokens", "positions", "ring", "step")
    names += ("workspace", "counters")
    addresses = {name: 64 * (place + 1) for place, name in enumerate(names)}
    choice = TokenChoice(vocab_size=64, batch=2)
    launch = choice.launch(batch=2, last_slot=3, **addresses)
    assert launch.arguments.keys() == choice.spec.arguments.keys()
    assert launch.arguments["masses"] == addresses["workspace"] + 4 * 2 * 64
    for name, address in addresses.items():
        if name not in ("workspace", "counters"):
            assert launch.arguments[name] == address
            with pytest.raises(ValueError, match=f"{name} missing"):
                choice.launch(batch=2, last_slot=3, **{**addresses, name: 0})
    more = dict.fromkeys(("bias", "counts", "stop_ids", "embedding", "next_x"), 1024)
    with pytest.raises(
        ValueError, match="bias unused, counts unused, stop_ids unused, embedding unused, next_x"
    ):
        choice.launch(batch=2, last_slot=3, **addresses, **more)
    whole = TokenChoice(
        vocab_size=64, columns=64, embedding=WeightFormat(kind="int8"), bias="shared",
        history=True, stop_ids=1,
    )  # fmt: skip
    with pytest.raises(ValueError, match="bias missing, counts missing, stop_ids missing"):
        whole.launch(batch=1, last_slot=3, **addresses)
    with pytest.raises(ValueError, match="a batch of 3, expected 1 to 2"):
        choice.launch(batch=3, last_slot=3, **addresses)


def test_name_is_shared_by_equal_variants_alone() -> None:
    base = TokenChoice(vocab_size=64)
    float16 = WeightFormat(kind="float16")
    variants = [
        base,
        *(
            replace(base, **change)
            for change in (
                {"vocab_size": 65}, {"token": "int32"}, {"bias": "shared"}, {"bias": "rows"},
                {"history": True}, {"stop_ids": 1}, {"stop_ids": 2}, {"ring": 65},
                {"uniforms": 65}, {"batch": 2}, {"columns": 64, "embedding": float16},
                {"columns": 72, "embedding": float16},
                {"columns": 64, "embedding": WeightFormat(kind="int4", group=64)},
                {"columns": 64, "embedding": float16, "activation": "float16"},
            )
        ),
    ]  # fmt: skip
    assert len({one.spec.name for one in variants}) == len(variants)
