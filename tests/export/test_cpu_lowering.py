"""Models lowered for the CPU: every golden case against published numbers and the other models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from export.lowerings.cpu import CHUNK_LENGTH, CpuModel, lower_for_cpu
from plugins.custom_op import DOMAIN
from runtime.backends.onnxruntime_backend import OnnxRuntimeBackend
from runtime.sampling import SamplingParams
from runtime.session import GenerationSession
from tests.export.conftest import Exported
from tests.golden_cases import GOLDEN_CASES
from tests.tiny_doge import MOE, write_checkpoint

FAST_CASES = ("g1", "g3", "g4_moe", "g4_window")
CASES = [
    case if case in FAST_CASES else pytest.param(case, marks=pytest.mark.slow)
    for case in GOLDEN_CASES
]


class Lowered:
    """A golden case with its model for the CPU in float32."""

    def __init__(self, exported: Exported, folder: Path) -> None:
        self.exported = exported
        self.path = folder / "fp32.onnx"
        self.model: CpuModel = lower_for_cpu(
            exported.path, self.path, exported.network.config, slots=exported.slots
        )
        contract = exported.contract_with(score_heads=self.model.score_heads)
        self.backend: OnnxRuntimeBackend = exported.backend_on(
            self.path, contract, rows_alone=True, chunk_length=8
        )

    @property
    def graph(self) -> onnx.GraphProto:
        return onnx.load(str(self.path), load_external_data=False).graph


@pytest.fixture(params=CASES)
def lowered(
    request: pytest.FixtureRequest, exported_case: Callable[[str], Exported], tmp_path: Path
) -> Lowered:
    return Lowered(exported_case(request.param), tmp_path)


def assert_close(
    lowered: Lowered, actual: NDArray[np.float32], expected: NDArray[np.float32]
) -> None:
    np.testing.assert_allclose(actual, expected, atol=lowered.exported.atol, rtol=0)


def assert_agree(lowered: Lowered, actual: NDArray[np.float32], other: NDArray[np.float32]) -> None:
    """Both may be as far from the truth as the tolerance allows, to either side."""
    np.testing.assert_allclose(actual, other, atol=2 * lowered.exported.atol, rtol=0)


def test_prefill_equals_published_logits(lowered: Lowered) -> None:
    golden, backend = lowered.exported.golden, lowered.backend
    ids = golden["input_ids"]
    logits = backend.score(ids, np.full(len(ids), ids.shape[1]), backend.new_cache(len(ids)))
    assert_close(lowered, logits, golden["prefill_logits"])


def test_decoding_equals_published_logits(lowered: Lowered) -> None:
    golden, backend = lowered.exported.golden, lowered.backend
    ids = golden["input_ids"][:1]
    cache = backend.new_cache(1)
    logits = [backend.prefill(ids[:, :1], np.array([1]), cache)]
    logits += [backend.decode(ids[:, t], cache) for t in range(1, ids.shape[1])]
    assert_close(lowered, np.stack(logits, axis=1), golden["decode_logits"])


def test_rows_at_different_lengths_decode_together(lowered: Lowered) -> None:
    backend, exported = lowered.backend, lowered.exported
    # No token twice in a row: beyond a window equal scores are near ties.
    generator = np.random.default_rng(0)
    ids = np.stack([generator.permutation(97)[:21] for _ in range(3)])
    lengths = np.array([17, 3, 11])
    results = []
    for each in (backend, exported.torch):
        cache = each.new_cache(3)
        steps = [each.prefill(ids, lengths, cache)]
        steps += [each.decode(ids[np.arange(3), lengths + more], cache) for more in range(4)]
        results.append(np.stack(steps))
    assert_agree(lowered, *results)


def test_rewound_cache_goes_on_as_if_nothing_had_followed(lowered: Lowered) -> None:
    backend, golden = lowered.backend, lowered.exported.golden
    ids = golden["input_ids"][:1]
    cache = backend.new_cache(1)
    backend.prefill(ids[:, :9], np.array([9]), cache)
    expected = [backend.decode(ids[:, t], cache) for t in range(9, 14)]
    backend.rewind(cache, np.array([9]))
    actual = [backend.decode(ids[:, t], cache) for t in range(9, 14)]
    np.testing.assert_array_equal(np.stack(actual), np.stack(expected))


def assert_same_greedy_ids(lowered: Lowered, prompt: list[int], length: int) -> None:
    params = SamplingParams(max_tokens=length, temperature=0, ignore_eos=True)
    ids = [
        [event.token_id for event in GenerationSession(backend).generate([prompt], params)]
        for backend in (lowered.exported.onnxruntime, lowered.backend)
    ]
    assert len(ids[0]) == length
    assert ids[0] == ids[1]


def test_greedy_ids_are_those_of_the_canonical_model(lowered: Lowered) -> None:
    """Within the keep window: beyond it a near tie may keep another key (docs/reference.md)."""
    exported = lowered.exported
    prompt = [int(i) for i in exported.golden["input_ids"][0][:3]]
    window = exported.network.config.keep_window_size
    assert_same_greedy_ids(lowered, prompt, min(window, exported.slots) - len(prompt))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("generation", "overrides"),
    [
        ("g1", {"max_position_embeddings": 272}),
        ("g2_first", {}),
        ("g2", {}),
        ("g3", {}),
        ("g3", MOE),
        ("g4h", {}),
        ("g4h", MOE),
        ("g4", {}),
        ("g4", MOE),
    ],
)
def test_256_greedy_ids_are_those_of_the_canonical_model(
    generation: str, overrides: dict[str, object], tmp_path: Path
) -> None:
    settings = {"max_position_embeddings": 272, **overrides}
    folder = write_checkpoint(tmp_path / "checkpoint", generation=generation, **settings)
    lowered = Lowered(Exported(folder, tmp_path, slots=272), tmp_path)
    assert_same_greedy_ids(lowered, [5, 17, 60], 256)


def test_graph_holds_the_fused_operators_and_no_custom_one_that_has_a_lowering(
    lowered: Lowered,
) -> None:
    layers = lowered.exported.network.config.num_hidden_layers
    counts = Counter(node.op_type for node in lowered.graph.node)
    assert counts["GroupQueryAttention"] == layers
    assert counts["SkipSimplifiedLayerNormalization"] == 2 * layers - 1
    assert counts["TensorScatter"] == (layers if lowered.model.score_heads else 0)
    left = {node.op_type for node in lowered.graph.node if node.domain == DOMAIN}
    assert left == ({"ValueGather"} if lowered.exported.case == "g1" else set())


def test_scores_are_cached_per_query_head_unless_keys_are_selected(lowered: Lowered) -> None:
    config, generation = lowered.exported.network.config, lowered.exported.network.generation
    selects = config.keep_window_size < lowered.exported.slots
    per_head = generation.num_score_heads(config) if selects else config.num_attention_heads
    assert lowered.model.score_heads == (per_head if generation.score_heads else None)


def test_prompt_in_chunks_equals_one_pass(lowered: Lowered) -> None:
    """Where the router is `mixed` a prompt is one pass, whatever the chunk."""
    backend, exported = lowered.backend, lowered.exported
    ids = np.resize(exported.golden["input_ids"], (1, 21))
    whole = exported.onnxruntime.score(ids, np.array([21]), exported.onnxruntime.new_cache(1))
    assert backend.chunk_length == 8 < CHUNK_LENGTH
    assert_agree(lowered, backend.score(ids, np.array([21]), backend.new_cache(1)), whole)


def test_bytes_read_leave_out_rows_that_are_not_looked_up(
    exported_case: Callable[[str], Exported], tmp_path: Path
) -> None:
    lowered = Lowered(exported_case("g4_moe"), tmp_path)
    stored = sum(
        4 * int(np.prod(tensor.dims))
        for tensor in lowered.graph.initializer
        if tensor.data_type == 1
    )
    experts, layers = 2 * (64 - 5) * 64, 3
    tables = 2 * (256 - 1) * 8  # cosines and sines
    assert lowered.model.read_bytes_per_token == pytest.approx(
        stored - 4 * (layers * experts + tables), rel=0.01
    )
