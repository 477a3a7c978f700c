"""The file of packed weights holds the checkpoint's numbers, and nothing else is taken for it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from export.step_weights import packed_arrays, step_model_of, write_step_weights
from model.checkpoint import load_checkpoint
from plugins.projection.packing import PackedMatrix, unpack_weights
from runtime.kernel_step.formats import STEP_PRECISIONS, StepFormats
from runtime.kernel_step.packed_weights import (
    ALIGNMENT,
    PackedWeights,
    global_matrices,
    layer_matrices,
    read_bytes_per_token,
    stored_tensors,
)
from tests.tiny_doge import MOE, write_checkpoint

SLOTS = 40


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Networks by generation, with experts, and untrained seeds."""

    def make(name):
        folder = tmp_path_factory.mktemp(name)
        generation, _, kind = name.partition("-")
        more = {"moe": MOE, "untied": {"tie_word_embeddings": False}}.get(kind, {})
        write_checkpoint(folder, generation=generation, untrained=kind == "untrained", **more)
        return load_checkpoint(folder)

    names = ("g1", "g1-untrained", "g2", "g3-moe", "g4", "g4-moe", "g4-untied", "g4h")
    return {name: make(name) for name in names}


def unpacked(arrays, name, matrix):
    return unpack_weights(
        PackedMatrix(
            format=matrix.format,
            rows=matrix.rows,
            columns=matrix.columns,
            weights=arrays[f"{name}.weights"],
            scales=arrays.get(f"{name}.scales"),
        )
    )


@pytest.mark.parametrize("precision", STEP_PRECISIONS)
@pytest.mark.parametrize("name", ["g1", "g1-untrained", "g2", "g3-moe", "g4", "g4-moe", "g4h"])
def test_file_holds_what_a_step_reads(networks, tmp_path, name, precision):
    network = networks[name]
    model, formats = step_model_of(network, SLOTS), StepFormats.of(precision)
    path = tmp_path / "weights.safetensors"
    write_step_weights(path, network, model, formats)
    weights = PackedWeights(path, model, formats)
    seen = dict(weights.arrays())
    assert seen.keys() == stored_tensors(model, formats).keys() == load_file(path).keys()
    ends = [weights.offsets[n] + tensor.bytes for n, tensor in weights.tensors.items()]
    begins = [*list(weights.offsets.values())[1:], weights.size]
    assert all(end <= begin for end, begin in zip(ends, begins, strict=True))
    assert not any(offset % ALIGNMENT for offset in weights.offsets.values())


@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [("fp32", 0), ("fp16", 2**-11), ("bf16", 2**-8), ("int8", 2**-7), ("int4", 2**-3)],
)
def test_matrices_are_the_checkpoints_to_the_formats_rounding(networks, precision, tolerance):
    network = networks["g4-moe"]
    model, formats = step_model_of(network, SLOTS), StepFormats.of(precision)
    arrays = dict(packed_arrays(network, model, formats))
    layer = network.model.layers[1]
    attention, mlp = layer.self_attn, layer.mlp
    numbers = {
        name: tensor.detach().numpy().astype(np.float64)
        for name, tensor in {
            "q": attention.q_proj.weight, "k": attention.k_proj.weight,
            "v": attention.v_proj.weight, "dt": attention.dt_proj.weight,
            "gate": mlp.gate_proj.weight, "up": mlp.up_proj.weight,
        }.items()
    }  # fmt: skip
    matrices = layer_matrices(model, formats)
    qkv = unpacked(arrays, "layers.1.qkv", matrices["qkv"])
    expected = np.concatenate([numbers[name] for name in "qkv"])
    assert np.abs(qkv - expected).max() <= tolerance * np.abs(expected).max()
    gate_up = unpacked(arrays, "layers.1.gate_up", matrices["gate_up"])
    for part, name in ((gate_up[0::2], "gate"), (gate_up[1::2], "up")):
        assert np.abs(part - numbers[name]).max() <= tolerance * np.abs(numbers[name]).max()
    # Mask scores are computed from the values' own products, and stay wide.
    score = unpacked(arrays, "layers.1.score", matrices["score"])
    expected = numbers["dt"] @ numbers["v"]
    wide = 2**-8 if precision == "bf16" else 2**-11
    assert np.abs(score - expected).max() <= wide * np.abs(expected).max() + 1e-7
    table = unpacked(arrays, "embedding", global_matrices(model, formats)["embedding"])
    expected = network.model.embed_tokens.weight.detach().numpy()
    assert np.abs(table - expected).max() <= min(tolerance, 2**-7) * np.abs(expected).max()
    if precision == "int4":
        assert matrices["qkv"].format.group == 64
        assert matrices["down"].format.group == 32  # 96 columns


def test_seed_without_a_choice_of_values_keeps_one_row_and_no_mask(networks):
    network = networks["g1-untrained"]
    model = step_model_of(network, SLOTS)
    assert model.inner_values is not None
    assert (model.inner_values.count, model.inner_values.mask_heads) == (1, 1)
    arrays = dict(packed_arrays(network, model, StepFormats.of("fp32")))
    embed = network.model.layers[0].self_attn.v_embed.weight.detach().numpy()
    np.testing.assert_allclose(arrays["layers.0.values"][0], 2 * embed[:2].sum(0), rtol=1e-6)
    assert not arrays["layers.0.mask_bias"].any()


def test_seed_with_a_choice_of_values_keeps_rows_and_mask(networks):
    network = networks["g1"]
    model = step_model_of(network, SLOTS)
    assert model.inner_values is not None
    assert (model.inner_values.count, model.inner_values.mask_heads) == (4, 4)
    arrays = dict(packed_arrays(network, model, StepFormats.of("fp32")))
    hidden = network.model.layers[0].self_attn.dynamic_mask.detach().numpy()[:, :SLOTS] == 0
    assert ((arrays["layers.0.mask_bias"][0, :, :SLOTS, 0] != 0) == hidden).all()


def test_untied_head_is_packed_and_only_a_row_of_its_embedding_is_read(networks):
    tied, untied = (step_model_of(networks[name], SLOTS) for name in ("g4", "g4-untied"))
    formats = StepFormats.of("fp16")
    assert "head.weights" in stored_tensors(untied, formats)
    assert "head.weights" not in stored_tensors(tied, formats)
    more = read_bytes_per_token(untied, formats) - read_bytes_per_token(tied, formats)
    assert more == 2 * untied.hidden


def test_experts_are_read_by_the_row(networks):
    dense, moe = (step_model_of(networks[name], SLOTS) for name in ("g4", "g4-moe"))
    formats = StepFormats.of("fp16")
    more = read_bytes_per_token(moe, formats) - read_bytes_per_token(dense, formats)
    router, picks = 2 * 8 * moe.hidden, 2 * 5 * moe.hidden
    assert more == 2 * moe.layers * (router + picks)


def test_foreign_file_is_refused(networks, tmp_path):
    network = networks["g4"]
    model, formats = step_model_of(network, SLOTS), StepFormats.of("fp16")
    path = tmp_path / "weights.safetensors"
    write_step_weights(path, network, model, formats)
    with pytest.raises(ValueError, match="does not hold what this version reads"):
        PackedWeights(path, model, StepFormats.of("bf16"))
    with pytest.raises(ValueError, match=r"the first is cos: found .*expected"):
        PackedWeights(path, dataclasses.replace(model, max_seq_len=64), formats)
    arrays = load_file(path)
    del arrays["layers.2.o.weights"]
    save_file(arrays, path)
    with pytest.raises(
        ValueError, match=r"1 tensors differ, the first is layers.2.o.weights: found none"
    ):
        PackedWeights(path, model, formats)
    path.write_bytes(b"no weights")
    with pytest.raises(ValueError, match="cannot be read as packed weights"):
        PackedWeights(path, model, formats)
    path.unlink()
    with pytest.raises(ValueError, match="cannot be read as packed weights"):
        PackedWeights(path, model, formats)


def test_columns_that_no_group_divides_name_another_precision(tmp_path):
    write_checkpoint(tmp_path, generation="g4", intermediate_size=104)
    network = load_checkpoint(tmp_path)
    model = step_model_of(network, SLOTS)
    with pytest.raises(ValueError, match=r"104 columns cannot be stored as int4.*use int8"):
        dict(packed_arrays(network, model, StepFormats.of("int4")))
