"""What tests share must be what each of them would have made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.checkpoint import load_checkpoint
from model.doge import DogeForCausalLM
from tests import shared_exports
from tests.shared_exports import RUN_FOLDER, export_once


def test_only_an_equal_network_is_not_exported_again(
    tiny_dense: Path, tiny_moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exports: list[str] = []

    def export(network: DogeForCausalLM, path: Path, *, max_seq_len: int) -> Path:
        exports.append(path.name)
        path.write_text(f"export {len(exports)}", encoding="utf-8")
        return path

    monkeypatch.setattr(shared_exports, "export_onnx", export)
    monkeypatch.setenv(RUN_FOLDER, str(tmp_path))

    def exported(network: DogeForCausalLM, name: str = "model.onnx", slots: int = 64) -> str:
        folder = tmp_path / "asked"
        folder.mkdir(exist_ok=True)
        path = export_once(network, folder / name, max_seq_len=slots)
        return path.read_text(encoding="utf-8")

    network = load_checkpoint(tiny_dense)
    assert exported(network) == exported(load_checkpoint(tiny_dense)) == "export 1"
    assert exported(network, name="other.onnx") == "export 2"
    assert exported(network, slots=32) == "export 3"
    assert exported(load_checkpoint(tiny_moe)) == "export 4"
    with torch.no_grad():
        network.model.layers[1].mlp.down_proj.weight[3, 2] += 1e-6
    assert exported(network) == "export 5"
    network.model.layers[1].mlp.changed = True
    assert exported(network) == "export 6"
    assert exported(load_checkpoint(tiny_dense)) == "export 1"


def test_an_export_that_failed_is_made_again(
    tiny_dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, path = load_checkpoint(tiny_dense), tmp_path / "model.onnx"
    monkeypatch.setenv(RUN_FOLDER, str(tmp_path))

    def fail(network: DogeForCausalLM, path: Path, *, max_seq_len: int) -> Path:
        path.write_text("half", encoding="utf-8")
        raise KeyboardInterrupt

    def export(network: DogeForCausalLM, path: Path, *, max_seq_len: int) -> Path:
        assert list(path.parent.iterdir()) == []
        path.write_text("whole", encoding="utf-8")
        return path

    monkeypatch.setattr(shared_exports, "export_onnx", fail)
    with pytest.raises(KeyboardInterrupt):
        export_once(network, path, max_seq_len=64)
    monkeypatch.setattr(shared_exports, "export_onnx", export)
    assert export_once(network, path, max_seq_len=64).read_text(encoding="utf-8") == "whole"
