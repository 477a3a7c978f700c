"""The persistent kernel's very source on the CPU, a fiber for each thread, against torch.

What a compiler for GPUs makes of it, and a GPU's memory model, are not shown here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pytest

from runtime.kernel_step.decode_step import RING
from runtime.kernel_step.formats import StepPrecision
from runtime.kernel_step.persistent import TOKENS_PER_LAUNCH
from tests.persistent_shim import KERNEL_SOURCE, Shim, ShimError, compile_shim
from tests.persistent_shim.sequence import HostSequence
from tests.tiny_doge import write_checkpoint

SLOTS = 64
UNTIED = {"tie_word_embeddings": False}
# Heads of 24 numbers are no power of two, and four of them share a score.
AWKWARD = {
    "hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 1, "intermediate_size": 160,
    "num_hidden_layers": 1, "rms_norm_eps": 0.05,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    generation: str
    precision: StepPrecision
    overrides: dict
    unit: float  # what rounding the other way changes, relative to a cache tensor's largest
    prompt: int = 11
    varied: bool = True  # with one table for both ends, random weights repeat the last token


CASES = {
    "g4-fp32": Case("g4", "fp32", {}, 2e-6, varied=False),
    "g3-fp16": Case("g3", "fp16", UNTIED, 1e-3),
    "g4h-bf16": Case("g4h", "bf16", UNTIED, 8e-3),
    "g4-int8": Case("g4", "int8", {**UNTIED, **AWKWARD}, 1e-3, prompt=45),
    "g3-int4": Case("g3", "int4", UNTIED, 1e-3, prompt=1),
}
# Blocks of the grid, and a seed of the order in which threads run.
GRIDS = ((1, 1), (3, 6), (5, 4))


@dataclass
class Compiled:
    case: Case
    sequence: HostSequence
    shim: Shim

    @property
    def prompt(self) -> list[int]:
        return np.random.default_rng(3).integers(3, 97, self.case.prompt).tolist()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Gives a case's model, compiled once."""
    made: dict[str, Compiled] = {}

    def get(name):
        if name not in made:
            folder, case = tmp_path_factory.mktemp(name), CASES[name]
            layers = {"num_hidden_layers": 2, **case.overrides}
            checkpoint = write_checkpoint(folder / "c", generation=case.generation, **layers)
            sequence = HostSequence(checkpoint, case.precision, SLOTS)
            made[name] = Compiled(case, sequence, sequence.compile(folder))
        return made[name]

    return get


def largest_logit(sequence, blocks):
    """What the blocks left of the last step, without the token in the lower half."""
    keys = sequence.area("best_keys", np.int64)[:blocks]
    ordered = np.int32(keys.max() >> 32)
    bits = ordered if ordered >= 0 else ordered ^ np.int32(0x7FFFFFFF)
    return float(np.array(bits, np.int32).view(np.float32))


@pytest.mark.parametrize("name", CASES)
def test_tokens_and_cache_are_the_networks(compiled, name):
    made = compiled(name)
    sequence = made.sequence
    steps = TOKENS_PER_LAUNCH + 3
    tokens, cache, largest = sequence.expected(made.prompt, steps)
    assert len(set(tokens)) > 3 or not made.case.varied
    filled = made.case.prompt + steps - 1
    for blocks, seed in GRIDS:
        sequence.begin(made.prompt)
        assert sequence.run(made.shim, steps, blocks, seed) == tokens
        for tensor, found in sequence.cached(filled).items():
            expected = cache[tensor][:, :filled]
            difference, scale = (found - expected).abs(), expected.abs().max()
            assert difference.max() < made.case.unit * scale, tensor
            assert difference.mean() < 2e-6 * scale, tensor  # few numbers are rounded otherwise
        assert largest_logit(sequence, blocks) == pytest.approx(largest, rel=2e-5)


@pytest.mark.parametrize("name", ["g3-fp16", "g4-int8"])
def test_the_next_step_is_prepared_as_by_the_head(compiled, name):
    made = compiled(name)
    sequence = made.sequence
    sequence.begin(made.prompt)
    first = int(sequence.area("positions", np.int64)[0])
    sequence.areas.bytes("step").view(np.int32)[0] = RING - 3
    chosen = sequence.run(made.shim, 5, blocks=2)
    assert sequence.area("tokens", np.int64)[0] == chosen[-1]
    assert sequence.area("positions", np.int64)[0] == first + 5
    assert sequence.area("step", np.int32)[0] == RING + 2
    ring = sequence.area("ring", np.int64)
    assert ring[[RING - 3, RING - 2, RING - 1, 0, 1]].tolist() == chosen
    assert (ring[2 : RING - 3] == -1).all(), "the rest is untouched"
    embedded = sequence.reference.model.embed_tokens.weight[chosen[-1]].detach().numpy()
    np.testing.assert_allclose(sequence.area("x", np.float32), embedded, rtol=1e-6)


def test_neither_the_order_of_threads_nor_the_cut_into_launches_changes_a_bit(compiled):
    made = compiled("g3-fp16")
    sequence, states = made.sequence, []
    for seed, cuts in ((5, (6,)), (6, (6,)), (7, (1, 2, 3)), (8, (4, 2))):
        sequence.begin(made.prompt)
        for number, steps in enumerate(cuts):
            sequence.run(made.shim, steps, blocks=3, seed=10 * seed + number)
        names = ("tokens", "positions", "step", "ring", "x")
        states.append(
            [sequence.cache.bytes(name).tobytes() for name in sequence.cache.sizes]
            + [sequence.areas.bytes(name).tobytes() for name in names]
        )
    assert all(state == states[0] for state in states)


def test_the_last_slot_is_used_and_none_behind_it(compiled):
    made = compiled("g3-fp16")
    sequence = made.sequence
    prompt = np.random.default_rng(5).integers(3, 97, SLOTS - 4).tolist()
    tokens, cache, _ = sequence.expected(prompt, 5)
    sequence.begin(prompt)
    assert sequence.run(made.shim, 5, blocks=3) == tokens
    found = sequence.cached(SLOTS)
    for tensor, expected in cache.items():
        assert (found[tensor] - expected).abs().max() < 1e-3 * expected.abs().max()
    # As the kernel `head` does: the position stays within the cache.
    assert sequence.area("positions", np.int64)[0] == SLOTS - 1


def test_lines_are_asked_for_ahead_within_the_weights(compiled):
    """Each is read by the stand-in, which faults outside of memory."""
    made = compiled("g3-fp16")
    made.sequence.begin(made.prompt)
    made.sequence.run(made.shim, 1, blocks=2)
    layer = 64 + 2 * 96 + 96  # o, gate and up, down: rows of 64 numbers, one line each
    qkv = (4 + 2 + 2) * 16  # of the second layer alone
    keys = 2 * 2 * 2 * 3  # layers, heads, keys and values, shares of four keys of 32 bytes
    assert made.shim.prefetched == 2 * layer + qkv + 97 + keys


def test_a_released_layer_with_the_constants_that_gpus_get(tmp_path):
    """One of doge-20m, with blocks of twelve warps and shares as large as on a GPU."""
    layer = {
        "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 2,
        "num_key_value_heads": 1, "num_hidden_layers": 1,
    }  # fmt: skip
    checkpoint = write_checkpoint(tmp_path / "c", **layer, **UNTIED)
    sequence = HostSequence(checkpoint, "fp16", 256)
    kernel = sequence.decode.kernel
    shim = compile_shim(tmp_path, kernel.constants, kernel.spec.arguments)
    prompt = np.random.default_rng(3).integers(3, 97, 130).tolist()
    tokens, _, largest = sequence.expected(prompt, 2)
    sequence.begin(prompt)
    assert sequence.run(shim, 2, blocks=4, seed=5) == tokens
    assert largest_logit(sequence, 4) == pytest.approx(largest, rel=2e-5)


# Which token it is.


def changed(tmp_path, change, precision="fp32"):
    checkpoint = write_checkpoint(tmp_path / "c", num_hidden_layers=1, **UNTIED)
    return HostSequence(checkpoint, precision, 16, change)


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory):
    """The kernel of a model of one layer in float32, whatever its weights."""
    folder = tmp_path_factory.mktemp("one_layer")
    return changed(folder, None).compile(folder)


def test_of_equal_logits_the_lowest_token_is_taken(tmp_path, one_layer):
    def tie(network):
        head = network.lm_head.weight
        best = int(HostSequence.forward(network, [5, 9, 7])[0].argmax())
        head[[best, 3, 96, 50]] = head[best].clone()

    sequence = changed(tmp_path, tie)
    for blocks in (1, 3):
        sequence.begin([5, 9, 7])
        assert sequence.run(one_layer, 1, blocks, seed=blocks) == [3]


def test_of_negative_logits_the_largest_is_taken(tmp_path, one_layer):
    def lower(network):
        aligned(network, slice(None), -1.0)
        network.lm_head.weight[[60, 13, 7]] *= 0.25
        network.lm_head.weight[13] *= 0.5

    sequence = changed(tmp_path, lower)
    sequence.begin([5, 9, 7])
    assert sequence.run(one_layer, 1, blocks=3) == [13]
    assert largest_logit(sequence, 3) < 0


def aligned(network, rows, size):
    """Make rows of the head point to, or away from, what stands behind these three tokens."""
    seen = {}

    def tap(value, name):
        seen[name] = value
        return value

    HostSequence.forward(network, [5, 9, 7], tap)
    network.lm_head.weight[rows] = size * seen["final_norm"][0, 0].sign()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda network: network.model.norm.weight.fill_(float("nan")), -1),
        (lambda network: aligned(network, [41], 1e38), -1),
        (lambda network: aligned(network, slice(None), -1e38), -1),
        (lambda network: aligned(network, slice(0, 96), -1e38), 96),
    ],
    ids=["nan", "infinite", "all minus infinite", "all but one minus infinite"],
)
def test_logits_without_a_largest_number_give_no_token(tmp_path, one_layer, change, expected):
    sequence = changed(tmp_path, change)
    sequence.begin([5, 9, 7])
    found = sequence.run(one_layer, 2, blocks=2)
    assert found[0] == expected
    assert sequence.area("tokens", np.int64)[0] == found[1]
    assert np.isfinite(sequence.area("x", np.float32)).all(), "a row of the table"


def test_logits_of_attention_may_be_far_from_zero(tmp_path, one_layer):
    def sharpen(network):
        attention = network.model.layers[0].self_attn
        attention.q_norm.weight *= 1000
        # Scores near zero: some query's only key points away from it.
        attention.A.fill_(-4)

    sequence = changed(tmp_path, sharpen)
    tokens, _, largest = sequence.expected([8], 4)
    sequence.begin([8])
    assert sequence.run(one_layer, 4, blocks=3) == tokens
    assert largest_logit(sequence, 3) == pytest.approx(largest, rel=1e-4)


# What the barriers do.


def test_barriers_are_used_again_by_grids_of_any_size(compiled):
    made = compiled("g3-fp16")
    sequence = made.sequence
    sequence.begin(made.prompt)
    word = sequence.area("barrier", np.uint32)
    launch = sequence.decode.kernel.barrier_launch(
        barrier=sequence.areas.address("barrier"), count=3
    )
    for blocks in (1, 4, 2, 7):
        made.shim.run_barriers(launch, blocks, seed=blocks)
        assert word[0] & 0x7FFFFFFF == 0
    assert word[0] == 0, "twelve barriers"
    word[0] = 0x80000000  # an odd number of them before
    tokens = sequence.expected(made.prompt, 3)[0]
    assert sequence.run(made.shim, 3, blocks=2) == tokens


def test_a_block_that_does_not_arrive_is_a_deadlock(compiled):
    made = compiled("g3-fp16")
    made.sequence.begin(made.prompt)
    made.sequence.areas.bytes("barrier").view(np.uint32)[0] = 1
    with pytest.raises(ShimError, match=r"deadlock: \d+ threads of 192 wait"):
        made.sequence.run(made.shim, 1, blocks=3)


WAIT = re.compile(r"(grid\.(?:arrive|wait)\(\);|__syncthreads\(\);)")


def planted(source):
    """The source with a number at each barrier; the one whose number is planted is left out.

    Arriving and waiting at a barrier of the grid have one number. Gives what each number is.
    """
    kinds: list[str] = []

    def mark(found):
        call = found[0]
        if call != "grid.wait();":
            line = source[: found.start()].count("\n") + 1
            kinds.append(f"{call} in line {line}")
        return f"if (planted != {len(kinds) - 1}) {call}"

    return WAIT.sub(mark, source), kinds


def test_every_barrier_is_missed_where_it_is_missing(tmp_path):
    """Left out, each changes the tokens or the cache under some order of the threads."""
    source, kinds = planted(KERNEL_SOURCE.read_text(encoding="utf-8"))
    assert sum(kind.startswith("grid") for kind in kinds) == 7, "six phases, and nothing but them"
    # Heads of 32 numbers: what two threads of a block share is not one warp's.
    checkpoint = write_checkpoint(
        tmp_path / "c", num_hidden_layers=2, hidden_size=128, intermediate_size=64, **UNTIED
    )
    sequence = HostSequence(checkpoint, "fp32", SLOTS)
    shim = sequence.compile(tmp_path, source)
    prompt = np.random.default_rng(3).integers(3, 97, 11).tolist()

    def state(change, seed, blocks=3):
        sequence.begin(prompt)
        shim.plant(change)
        try:
            tokens = sequence.run(shim, 2, blocks, seed)
        except ShimError as error:
            return str(error)
        return tokens, [sequence.cache.bytes(name).tobytes() for name in sequence.cache.sizes]

    right = state(-1, 0)
    assert state(-1, 7) == right
    unnoticed = [
        kind
        for change, kind in enumerate(kinds)
        if all(state(change, seed) == right for seed in range(16))
    ]
    assert unnoticed == kinds[-1:], "that of the kernel of nothing but barriers"


# What is launched.


def test_arguments_are_the_sources_parameters(compiled):
    spec = compiled("g3-fp16").sequence.decode.kernel.spec
    barriers = compiled("g3-fp16").sequence.decode.kernel.barrier_spec
    source = KERNEL_SOURCE.read_text(encoding="utf-8")
    for kernel in (spec, barriers):
        name = kernel.function.partition(":")[2]
        (text,) = re.findall(rf"{name}\(([^)]*)\)", source)
        parameters = [part.split() for part in text.replace("*", "* ").split(",")]
        assert [words[-1] for words in parameters[-2:]] == ["*", "*"], "a launcher's hidden two"
        assert [words[-1] for words in parameters[:-2]] == list(kernel.arguments)
        scalars = {"int": "i32", "long long": "i64", "float": "fp32"}
        for words, kind in zip(parameters, kernel.arguments.values(), strict=False):
            pointer = "*" in words
            assert pointer == kind.startswith("*")
            if not pointer:
                assert scalars[" ".join(words[:-1])] == kind


def test_layers_at_unequal_distances_are_refused(compiled):
    sequence = compiled("g3-fp16").sequence
    kernel = sequence.decode.kernel
    places = {
        "area": lambda name: 0x1000, "slots": 8, "last_slot": 7, "steps": 1, "eps": 1e-6,
        "tied": True,
    }  # fmt: skip

    def weight(name):
        return 0x10000 if name == "layers.1.A" else 0x1000

    with pytest.raises(ValueError, match="layers lie at distances of"):
        kernel.launch(weight=weight, cache=lambda layer, kind: 0x1000, **places)
