"""The seed's constant value factor as a norm of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from export.lowerings.value_norm import give_values_their_own_norm
from model.checkpoint import load_checkpoint
from model.contract import step_contract
from model.seed_rewrites import rewrite_for_export
from runtime.backends.base import Limits
from runtime.backends.onnxruntime_backend import OnnxRuntimeBackend, make_session
from runtime.cpu_threads import CpuThreads
from tests.shared_exports import export_once
from tests.tiny_doge import write_checkpoint

LIMITS = Limits(max_batch_size=2, max_input_len=64, max_seq_len=64)


@pytest.fixture(scope="module")
def canonical(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("seed"), generation="g1", untrained=True)
    rewritten, _ = rewrite_for_export(load_checkpoint(folder), 64)
    return export_once(rewritten, folder / "model.onnx", max_seq_len=64)


def logits(path: Path) -> np.ndarray:
    network = load_checkpoint(path.parent)
    backend = OnnxRuntimeBackend(
        make_session(str(path), CpuThreads(1)),
        step_contract(network.config, network.generation, max_seq_len=64),
        limits=LIMITS,
        variant="fp32",
        vocab_size=97,
        router_mode=None,
    )
    ids = np.arange(20)[None]
    return backend.score(ids, np.array([20]), backend.new_cache(1))


def test_every_layer_is_rewritten_and_the_logits_stay(canonical: Path) -> None:
    model = ir.load(canonical)
    products = sum(node.op_type == "Mul" for node in model.graph)
    assert give_values_their_own_norm(model) == 3
    assert sum(node.op_type == "Mul" for node in model.graph) == products - 3
    assert sum(node.op_type == "RMSNormalization" for node in model.graph) == 3 * 3 + 1
    lowered = canonical.with_name("lowered.onnx")
    ir.save(model, lowered, external_data="lowered.onnx.data")
    onnx.checker.check_model(str(lowered), full_check=True)
    np.testing.assert_allclose(logits(lowered), logits(canonical), atol=1e-4, rtol=0)


def test_other_models_are_left_as_they_are(tiny_dense: Path, tmp_path: Path) -> None:
    path = export_once(load_checkpoint(tiny_dense), tmp_path / "model.onnx", max_seq_len=64)
    model = ir.load(path)
    before = [node.op_type for node in model.graph]
    assert give_values_their_own_norm(model) == 0
    assert [node.op_type for node in model.graph] == before


def test_factor_behind_something_else_than_a_norm_is_an_error(canonical: Path) -> None:
    model = ir.load(canonical)
    for node in model.graph:
        if node.op_type == "RMSNormalization":
            node.op_type = "LpNormalization"
    with pytest.raises(ValueError, match=r"value_scale should multiply a norm's output"):
        give_values_their_own_norm(model)
