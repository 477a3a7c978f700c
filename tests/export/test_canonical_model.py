"""The exported model: its structure, and ONNX Runtime against published numbers and PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from export.checks import ExportCheckError, check_numbers, check_structure
from export.graph import export_onnx
from export.lowerings.half_precision import lower_to_half
from model.checkpoint import load_checkpoint
from model.contract import layer_taps, step_contract
from runtime.backends.base import Backend, Limits
from runtime.backends.onnxruntime_backend import OnnxRuntimeBackend, make_session
from runtime.backends.torch_backend import TorchBackend
from runtime.sampling import SamplingParams
from runtime.session import GenerationSession

CASES = ["g4", "g4_untied_mha", "g4_moe", "g4_window"]
LIMITS = Limits(max_batch_size=3, max_input_len=96, max_seq_len=96)


class Exported:
    """A golden case with its network, its exported model, and both backends on it."""

    def __init__(self, folder: Path, work: Path) -> None:
        self.golden = np.load(folder / "golden.npz")
        self.network = load_checkpoint(folder)
        config = self.network.config
        self.contract = step_contract(
            config, self.network.generation, max_seq_len=LIMITS.max_seq_len
        )
        self.path = export_onnx(self.network, work / "model.onnx", max_seq_len=LIMITS.max_seq_len)
        self.torch: Backend = TorchBackend(self.network, limits=LIMITS, variant="fp32")
        self.onnxruntime: Backend = OnnxRuntimeBackend(
            make_session(str(self.path), 1),
            self.contract,
            limits=LIMITS,
            variant="fp32",
            vocab_size=config.vocab_size,
            router_mode=config.router_mode if config.is_moe else None,
        )


@pytest.fixture(scope="module", params=CASES)
def exported(
    request: pytest.FixtureRequest,
    golden: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Exported:
    return Exported(golden(request.param), tmp_path_factory.mktemp(request.param))


def test_structure_keeps_the_contract(exported):
    result = check_structure(exported.path, exported.contract, exported.network)
    layers = exported.network.config.num_hidden_layers
    assert result["doge_nodes"]["DynamicMaskAttention"] == layers


def test_taps_are_values_of_the_main_graph_in_order(exported):
    model = onnx.load(str(exported.path), load_external_data=False)
    produced = [name for node in model.graph.node for name in node.output]
    taps = layer_taps(exported.network.config)
    assert set(taps) <= set(produced)


def test_file_says_nothing_of_the_exporting_machine(exported):
    content = exported.path.read_bytes()
    assert str(Path(__file__).parents[2]).encode() not in content
    assert b"site-packages" not in content
    assert b"stack_trace" not in content


@pytest.mark.parametrize("name", ["torch", "onnxruntime"])
def test_prefill_equals_published_logits(exported, name):
    backend = getattr(exported, name)
    ids = exported.golden["input_ids"]
    cache = backend.new_cache(len(ids))
    logits = backend.score(ids, np.full(len(ids), ids.shape[1]), cache)
    # The contract is 1e-3 at logits of size 30; measured 3e-5.
    np.testing.assert_allclose(logits, exported.golden["prefill_logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["torch", "onnxruntime"])
def test_decoding_equals_published_logits(exported, name):
    backend = getattr(exported, name)
    ids = exported.golden["input_ids"][:1]
    cache = backend.new_cache(1)
    logits = [backend.prefill(ids[:, :1], np.array([1]), cache)]
    logits += [backend.decode(ids[:, t], cache) for t in range(1, ids.shape[1])]
    actual = np.stack(logits, axis=1)
    np.testing.assert_allclose(actual, exported.golden["decode_logits"], atol=1e-4, rtol=0)


def test_greedy_ids_of_torch_and_onnxruntime_are_equal(exported):
    prompts = [[int(i) for i in row] for row in exported.golden["input_ids"]]
    params = SamplingParams(max_tokens=64, temperature=0)
    ids = [
        [(e.index, e.token_id) for e in GenerationSession(backend).generate(prompts, params)]
        for backend in (exported.torch, exported.onnxruntime)
    ]
    assert len(ids[0]) == 64 * len(prompts)
    assert ids[0] == ids[1]


@pytest.mark.parametrize("name", ["torch", "onnxruntime"])
def test_unequal_rows_of_a_batch_equal_the_rows_alone(exported, name):
    backend = getattr(exported, name)
    ids = np.resize(exported.golden["input_ids"], (3, 17))
    lengths = np.array([17, 3, 11])
    together = backend.prefill(ids, lengths, backend.new_cache(3))
    for row, length in enumerate(lengths):
        alone = backend.prefill(
            ids[row : row + 1, :length], np.array([length]), backend.new_cache(1)
        )
        np.testing.assert_allclose(together[row], alone[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["torch", "onnxruntime"])
def test_split_prefill_equals_one_pass(exported, name):
    backend = getattr(exported, name)
    ids = exported.golden["input_ids"][:1, :23]
    cache = backend.new_cache(1)
    if backend.router_mode == "mixed":
        backend.prefill(ids[:, :7], np.array([7]), cache)
        with pytest.raises(ValueError, match="per_token"):
            backend.prefill(ids[:, 7:8], np.array([1]), cache)
        return
    for begin, end in ((0, 7), (7, 8), (8, 23)):
        logits = backend.prefill(ids[:, begin:end], np.array([end - begin]), cache)
    whole = backend.prefill(ids, np.array([23]), backend.new_cache(1))
    np.testing.assert_allclose(logits, whole, atol=1e-4, rtol=0)


def test_numbers_agree_and_a_changed_weight_is_found(exported, tmp_path):
    arguments = (exported.contract, exported.network, LIMITS)
    assert check_numbers(exported.path, *arguments)["passed"]
    model = ir.load(exported.path)
    norm = model.graph.initializers["model.norm.weight"]
    changed = norm.const_value.numpy().copy()
    changed[3] *= 1.5
    norm.const_value = ir.tensor(changed, name=norm.name)
    broken = tmp_path / "broken.onnx"
    ir.save(model, broken, external_data="broken.onnx.data")
    with pytest.raises(ExportCheckError, match="disagree"):
        check_numbers(broken, *arguments)


def test_structure_check_finds_a_renamed_output(exported, tmp_path):
    model = ir.load(exported.path)
    model.graph.outputs[0].name = "scores"
    broken = tmp_path / "broken.onnx"
    ir.save(model, broken, external_data="broken.onnx.data")
    with pytest.raises(ExportCheckError, match="scores"):
        check_structure(broken, exported.contract, exported.network)


def test_float16_model_follows_the_float32_one(exported, tmp_path):
    model = ir.load(exported.path)
    lower_to_half(model, "float16")
    path = tmp_path / "half.onnx"
    ir.save(model, path, external_data="half.onnx.data")
    onnx.checker.check_model(str(path), full_check=True)
    config = exported.network.config
    half = OnnxRuntimeBackend(
        make_session(str(path), 1),
        step_contract(config, exported.network.generation, max_seq_len=96, cache_dtype="float16"),
        limits=LIMITS,
        variant="fp16",
        vocab_size=config.vocab_size,
        router_mode=config.router_mode if config.is_moe else None,
    )
    ids = exported.golden["input_ids"][:1]
    lengths = np.array([ids.shape[1]])
    expected = exported.golden["prefill_logits"][:1]
    actual = half.score(ids, lengths, half.new_cache(1))
    # A near tie in expert or key selection may fall the other way at one position, so the middle
    # of the differences is what half precision is judged by.
    assert np.median(np.abs(actual - expected)) < 0.05
    assert not np.array_equal(actual, expected)


def test_scores_stay_float32_in_half_precision(exported):
    model = ir.load(exported.path)
    lower_to_half(model, "bfloat16")
    types = {v.name: v.dtype for v in [*model.graph.inputs, *model.graph.outputs]}
    assert types["past_key_values.0.score"] == types["present.0.score"] == ir.DataType.FLOAT
    assert types["past_key_values.0.key"] == types["present.0.value"] == ir.DataType.BFLOAT16
    assert types["logits"] == ir.DataType.FLOAT
