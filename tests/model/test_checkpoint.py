from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch_file

from model.checkpoint import inspect_checkpoint, load_checkpoint, read_header
from model.config import DogeConfig, UnsupportedModelError
from model.generations import GENERATIONS, Generation, generation_named
from tests.tiny_doge import MOE, Tensors, config_json, random_tensors, write_checkpoint

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def folder(tiny_dense: Path, tmp_path: Path) -> Path:
    """A good checkpoint to spoil."""
    return Path(shutil.copytree(tiny_dense, tmp_path / "checkpoint"))


def rewrite_tensors(folder: Path, changes: dict[str, Any]) -> None:
    """Replace, add, or (with None) remove tensors."""
    tensors: Tensors = {**load_file(folder / WEIGHTS), **changes}
    save_file({n: t for n, t in tensors.items() if t is not None}, folder / WEIGHTS)


def write_shards(folder: Path, count: int) -> list[str]:
    """Split the weights over `count` files with an index; gives the files' names."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    shards = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    weight_map = {name: shards[i % count] for i, name in enumerate(sorted(tensors))}
    for shard in shards:
        save_file({n: tensors[n] for n, s in weight_map.items() if s == shard}, folder / shard)
    write_index(folder, {"metadata": {}, "weight_map": weight_map})
    return shards


def write_index(folder: Path, content: object) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / INDEX).write_text(text, encoding="utf-8")


def refusal(folder: Path, error: type[Exception] = UnsupportedModelError) -> str:
    """What loading the folder says; both ways in refuse alike."""
    with pytest.raises(error) as inspected:
        inspect_checkpoint(folder)
    with pytest.raises(error) as loaded:
        load_checkpoint(folder)
    assert str(loaded.value) == str(inspected.value)
    return str(loaded.value)


# --- what loads ---


@pytest.mark.parametrize("overrides", [{}, {"tie_word_embeddings": False}, MOE], ids=str)
def test_every_tensor_arrives_under_its_name(tmp_path: Path, overrides: dict[str, Any]) -> None:
    network = load_checkpoint(write_checkpoint(tmp_path, seed=4, **overrides))
    expected = random_tensors(config_json(**overrides), seed=4)
    parameters = dict(network.named_parameters())
    assert set(parameters) == set(expected)
    for name, parameter in parameters.items():
        np.testing.assert_array_equal(parameter.numpy(), expected[name], err_msg=name)


def test_network_is_for_inference_and_on_no_meta_device(tiny_moe: Path) -> None:
    network = load_checkpoint(tiny_moe)
    assert not network.training
    for tensor in (*network.parameters(), *network.buffers()):
        assert not tensor.requires_grad
        assert tensor.device.type == "cpu"
        assert tensor.isfinite().all()


def test_rotary_tables_are_those_of_a_fresh_network(tiny_dense: Path) -> None:
    network = load_checkpoint(tiny_dense)
    assert network.cos.shape == network.sin.shape == (256, 8)
    angle = 100 * 10000.0 ** (-2 * 3 / 16)
    torch.testing.assert_close(network.cos[100, 3].item(), np.cos(angle), atol=1e-5, rtol=0)
    torch.testing.assert_close(network.sin[100, 3].item(), np.sin(angle), atol=1e-5, rtol=0)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_stored_floats_of_other_widths_become_the_dtype_asked_for(
    folder: Path, stored: torch.dtype
) -> None:
    tensors = {n: torch.from_numpy(t).to(stored) for n, t in load_file(folder / WEIGHTS).items()}
    save_torch_file(tensors, folder / WEIGHTS)
    for dtype in (torch.float32, torch.bfloat16):
        network = load_checkpoint(folder, dtype)
        for name, parameter in network.named_parameters():
            assert parameter.dtype == dtype
            assert torch.equal(parameter, tensors[name].to(dtype))
        assert network.cos.dtype == dtype


def test_router_mode_overrides_the_config(tiny_moe: Path) -> None:
    assert load_checkpoint(tiny_moe).config.router_mode == "mixed"
    assert load_checkpoint(tiny_moe, router_mode="per_token").config.router_mode == "per_token"


def test_inspection_tells_shapes_without_a_network(tiny_moe: Path) -> None:
    config, generation, header = inspect_checkpoint(tiny_moe, router_mode="per_token")
    assert (config.router_mode, generation.name) == ("per_token", "g4")
    assert header.files == (tiny_moe / WEIGHTS,)
    assert header.shapes[EMBEDDING] == (97, 64)
    assert set(header.dtypes.values()) == {"F32"}
    assert set(header.location) == set(header.shapes)


def test_shards_load_like_one_file(folder: Path, tiny_dense: Path) -> None:
    shards = write_shards(folder, 3)
    assert read_header(folder).files == tuple(folder / shard for shard in shards)
    expected = dict(load_checkpoint(tiny_dense).named_parameters())
    for name, parameter in load_checkpoint(folder).named_parameters():
        assert torch.equal(parameter, expected[name]), name


# --- a folder that is none ---


def test_path_that_does_not_exist_is_named(tmp_path: Path) -> None:
    message = refusal(tmp_path / "nowhere", FileNotFoundError)
    assert "nowhere does not exist; expected a folder with config.json" in message


def test_path_that_is_a_file_is_named(folder: Path) -> None:
    message = refusal(folder / WEIGHTS, FileNotFoundError)
    assert f"{WEIGHTS} is a file; expected a folder with config.json" in message


def test_folder_without_config_says_what_a_checkpoint_holds(folder: Path) -> None:
    (folder / "config.json").unlink()
    message = refusal(folder, FileNotFoundError)
    assert f"has no config.json; a checkpoint folder holds config.json and {WEIGHTS}" in message


def test_folder_without_weights_names_both_forms(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    message = refusal(folder, FileNotFoundError)
    assert f"has no {WEIGHTS} and no {INDEX}" in message
    assert "pickle" not in message


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.pt", "weights.pth"])
def test_pickled_weights_are_named_and_not_read(folder: Path, name: str) -> None:
    (folder / WEIGHTS).rename(folder / name)
    message = refusal(folder, FileNotFoundError)
    assert f"it has {name}: pickle, which can run code when it is read, and is not" in message
    assert "convert it to safetensors" in message


# --- a file that is spoilt ---


def test_truncated_file_is_named_with_its_size(folder: Path) -> None:
    weights = folder / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-100])
    message = refusal(folder)
    assert f"{WEIGHTS} is not a whole safetensors file ({weights.stat().st_size} bytes)" in message
    assert message.endswith("copy or download it again")


@pytest.mark.parametrize("size", [0, 3, 8, 20])
def test_file_that_ends_within_its_header_is_refused(folder: Path, size: int) -> None:
    weights = folder / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:size])
    assert f"is not a whole safetensors file ({size} bytes)" in refusal(folder)


@pytest.mark.parametrize("claimed", [2**63, 2**64 - 1, 2**40, 10**9])
def test_absurd_header_size_is_refused_before_anything_is_read(folder: Path, claimed: int) -> None:
    weights = folder / WEIGHTS
    weights.write_bytes(claimed.to_bytes(8, "little") + weights.read_bytes()[8:])
    assert "is not a whole safetensors file" in refusal(folder)


@pytest.mark.parametrize("header", [b"not json", b"[]", b"{", b'{"a": 1}', b"\xff\xfe"], ids=str)
def test_header_that_is_no_header_is_refused(folder: Path, header: bytes) -> None:
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header)
    assert "is not a whole safetensors file" in refusal(folder)


def test_page_of_a_failed_download_is_refused(folder: Path) -> None:
    (folder / WEIGHTS).write_text("<!DOCTYPE html><title>Entry not found</title>" * 5)
    assert "is not a whole safetensors file" in refusal(folder)


def test_git_lfs_pointer_is_refused(folder: Path) -> None:
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "is not a whole safetensors file" in refusal(folder)


# --- tensors that do not fit ---


def test_every_tensor_problem_is_listed_at_once(folder: Path) -> None:
    rewrite_tensors(
        folder,
        {
            "model.norm.weight": None,
            "model.layers.2.self_attn.A": None,
            "model.layers.1.mlp.bias": np.zeros(64, np.float32),
            "model.layers.0.self_attn.dt_proj.weight": np.zeros((4, 32), np.float32),
            "model.layers.1.input_residual": np.zeros(64, np.int64),
        },
    )
    message = refusal(folder)
    assert message.startswith("the tensors of generation g4 (transformers' doge: ")
    for problem in (
        "missing model.norm.weight [64]",
        "missing model.layers.2.self_attn.A [2]",
        "unexpected model.layers.1.mlp.bias [64]",
        "model.layers.0.self_attn.dt_proj.weight has shape [4, 32], expected [2, 32]",
        "model.layers.1.input_residual has dtype I64, expected one of F32, F16, BF16, F64",
    ):
        assert problem in message
    assert message.count("; ") == 4


def test_long_list_of_problems_ends_with_how_many_more(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(config_json(num_hidden_layers=5)))
    message = refusal(folder)
    assert message.count("missing model.layers.") == 12
    assert message.endswith("; and 18 more")


def test_layers_beyond_the_config_are_unexpected(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(config_json(num_hidden_layers=2)))
    assert "unexpected model.layers.2.input_layernorm.weight [64]" in refusal(folder)


def test_stored_head_of_a_tied_config_is_pointed_out(folder: Path) -> None:
    rewrite_tensors(folder, {"lm_head.weight": load_file(folder / WEIGHTS)[EMBEDDING]})
    message = refusal(folder)
    assert "unexpected lm_head.weight [97, 64]" in message
    assert "config.json has tie_word_embeddings true, yet the head is stored" in message


def test_missing_head_of_an_untied_config_is_missing(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(config_json(tie_word_embeddings=False)))
    assert "missing lm_head.weight [97, 64]" in refusal(folder)


def test_experts_without_a_moe_config_are_unexpected(tiny_moe: Path, folder: Path) -> None:
    shutil.copy(tiny_moe / WEIGHTS, folder / WEIGHTS)
    assert "unexpected model.layers.0.mlp.router_gate.weight [16, 64]" in refusal(folder)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.bool_, np.int64])
def test_weights_that_are_no_floats_are_refused(folder: Path, dtype: type[np.generic]) -> None:
    rewrite_tensors(folder, {EMBEDDING: np.zeros((97, 64), dtype)})
    assert f"{EMBEDDING} has dtype " in refusal(folder)


def test_eight_bit_floats_are_refused(folder: Path) -> None:
    tensors = {n: torch.from_numpy(t) for n, t in load_file(folder / WEIGHTS).items()}
    tensors[EMBEDDING] = tensors[EMBEDDING].to(torch.float8_e4m3fn)
    save_torch_file(tensors, folder / WEIGHTS)
    assert f"{EMBEDDING} has dtype F8_E4M3" in refusal(folder)


def test_tensors_of_no_doge_are_listed(folder: Path) -> None:
    save_file({"transformer.wte.weight": np.zeros((97, 64), np.float32)}, folder / WEIGHTS)
    message = refusal(folder)
    assert "the tensors match no known generation" in message
    assert "Seen: transformer.wte.weight" in message


def test_file_without_tensors_says_so(folder: Path) -> None:
    save_file({}, folder / WEIGHTS)
    assert "Seen: no tensors" in refusal(folder)


def test_unknown_router_mode_is_refused(tiny_moe: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="must be one of mixed, per_token, got 'x'"):
        load_checkpoint(tiny_moe, router_mode="x")


# --- shards ---


def test_missing_shard_is_named(folder: Path) -> None:
    shard = write_shards(folder, 3)[1]
    (folder / shard).unlink()
    assert f"lacks the shard {shard} that {INDEX} names" in refusal(folder, FileNotFoundError)


def test_spoilt_shard_is_named(folder: Path) -> None:
    shard = write_shards(folder, 2)[1]
    (folder / shard).write_bytes(b"")
    assert f"{shard} is not a whole safetensors file (0 bytes)" in refusal(folder)


def test_tensor_in_two_shards_is_refused(folder: Path) -> None:
    first, second = write_shards(folder, 2)
    tensors = load_file(folder / first)
    name = min(tensors)
    save_file({**load_file(folder / second), name: tensors[name]}, folder / second)
    assert f"tensor {name} stands in {first} and in {second}" in refusal(folder)


def test_tensor_that_a_shard_has_lost_is_named(folder: Path) -> None:
    write_shards(folder, 1)
    shard = next(folder.glob("model-*.safetensors"))
    tensors = load_file(shard)
    del tensors["model.norm.weight"]
    save_file(tensors, shard)
    assert f"looks for model.norm.weight in {shard.name}" in refusal(folder)


@pytest.mark.parametrize(
    "content",
    ["not json", "[]", "3", "{}", '{"weight_map": 3}', '{"weight_map": ["a"]}', "\x00"],
)
def test_index_that_is_none_is_refused(folder: Path, content: str) -> None:
    write_shards(folder, 2)
    write_index(folder, content)
    message = refusal(folder)
    assert f"{INDEX} is not an index of shards (an object with `weight_map`)" in message


@pytest.mark.parametrize(
    "outside", ["../model.safetensors", "sub/model.safetensors", "/etc/model.safetensors", ".."]
)
def test_index_that_points_out_of_its_folder_is_refused(folder: Path, outside: str) -> None:
    write_shards(folder, 2)
    write_index(folder, {"weight_map": {EMBEDDING: outside}})
    assert f"{INDEX} points out of its folder: {outside}" in refusal(folder)


def test_existing_file_outside_the_folder_is_not_read_either(folder: Path) -> None:
    write_shards(folder, 1)
    shard = next(folder.glob("model-*.safetensors"))
    shard.rename(folder.parent / "model.safetensors")
    write_index(folder, {"weight_map": {EMBEDDING: "../model.safetensors"}})
    assert "points out of its folder" in refusal(folder)


def test_empty_index_is_refused(folder: Path) -> None:
    write_shards(folder, 2)
    write_index(folder, {"weight_map": {}})
    assert f"{INDEX} names no tensor" in refusal(folder)


def test_index_of_pickle_shards_is_refused_with_the_reason(folder: Path) -> None:
    write_shards(folder, 1)
    write_index(folder, {"weight_map": {EMBEDDING: "pytorch_model-00001-of-00001.bin"}})
    message = refusal(folder)
    assert "pytorch_model-00001-of-00001.bin: pickle, which can run code" in message
    assert "convert it to safetensors" in message


def test_index_of_other_files_than_safetensors_is_refused(folder: Path) -> None:
    write_shards(folder, 1)
    write_index(folder, {"weight_map": {EMBEDDING: "model.onnx"}})
    assert "names model.onnx, expected safetensors files beside it" in refusal(folder)


def test_index_that_puts_a_tensor_into_another_shard_is_refused(folder: Path) -> None:
    first, second = write_shards(folder, 2)
    index = json.loads((folder / INDEX).read_text())
    wrong = second if index["weight_map"][EMBEDDING] == first else first
    right = index["weight_map"][EMBEDDING]
    index["weight_map"][EMBEDDING] = wrong
    write_index(folder, index)
    assert f"looks for {EMBEDDING} in {wrong} (it is in {right})" in refusal(folder)


def test_index_that_names_a_tensor_of_no_shard_is_refused(folder: Path) -> None:
    first, _ = write_shards(folder, 2)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.extra.weight"] = first
    write_index(folder, index)
    assert f"looks for model.extra.weight in {first}; index and shards" in refusal(folder)


def test_shard_that_the_index_leaves_out_is_mentioned(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = write_shards(folder, 2)
    index = json.loads((folder / INDEX).read_text())
    kept = {name: shard for name, shard in index["weight_map"].items() if shard == first}
    write_index(folder, {"weight_map": kept})
    refusal(folder)
    assert f"{INDEX} does not name {second}, which is left out" in caplog.text


def test_more_layers_than_tensors_are_refused_at_once(folder: Path) -> None:
    config = config_json(num_hidden_layers=10**9)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert "num_hidden_layers 1000000000, the checkpoint" in refusal(folder)


# --- other generations ---


@pytest.mark.parametrize(("ratio", "generation"), [(None, "g2"), (0.0, "g3")])
def test_config_that_alone_decides_between_g2_and_g3_is_mentioned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, ratio: float | None, generation: str
) -> None:
    write_checkpoint(tmp_path, generation="g3", num_key_value_heads=4, dynamic_mask_ratio=ratio)
    _, found, _ = inspect_checkpoint(tmp_path)
    assert found.name == generation
    assert f"the tensors fit g2 and g3; read as {generation} because" in caplog.text


def test_config_of_another_doge_beside_seed_tensors_is_explained(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, generation="g1")
    (tmp_path / "config.json").write_text(json.dumps(config_json()), encoding="utf-8")
    message = refusal(tmp_path)
    assert "num_inner_values is missing" in message
    assert "(the tensors are those of g1, the seed of late 2024" in message


@pytest.mark.parametrize("generation", ["g1", "g2_first", "g2", "g3", "g4h"])
def test_every_generation_loads_with_each_tensor_under_its_published_name(
    tmp_path: Path, generation: str
) -> None:
    folder = write_checkpoint(tmp_path, generation=generation)
    network = load_checkpoint(folder)
    parameters = network.published_parameters()
    stored = load_file(folder / "model.safetensors")
    left_out = set(stored) - set(parameters)
    assert network.generation.name == generation
    assert {name.rpartition("attn.")[2] for name in left_out} == (
        {"A", "dt_proj.weight"} if generation.startswith("g2") else set()
    )
    for name, parameter in parameters.items():
        np.testing.assert_array_equal(parameter.numpy(), stored[name])


def test_g3_checkpoint_dressed_up_as_g4_is_refused_by_its_scores(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, generation="g3")
    file = tmp_path / "model.safetensors"
    g3, g4 = generation_named("g3", GENERATIONS), generation_named("g4", GENERATIONS)
    config = g3.read_config(config_json("g3"))
    tensors = load_file(file)
    published = dict(zip(g3.tensor_shapes(config), tensors_in_g4_names(g3, config), strict=True))
    renamed = {published[name]: array for name, array in tensors.items()}
    for name, shape in g4.tensor_shapes(config).items():
        if name not in renamed:  # the norms of queries and keys, at their neutral value
            renamed[name] = np.ones(shape, np.float32)
    save_file(renamed, file)
    message = refusal(tmp_path)
    assert "self_attn.A has shape [4], expected [2]" in message
    assert "one score per query head belongs to g3 and g4h, norms of queries" in message


def tensors_in_g4_names(generation: Generation, config: DogeConfig) -> list[str]:
    """The network's names of a generation's tensors, in the order of `tensor_shapes`."""
    plain = dataclasses.replace(generation, parts={})
    return list(plain.tensor_shapes(config))


def test_context_of_g3_ends_at_its_window(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, generation="g3", keep_window_size=40)
    config, _, _ = inspect_checkpoint(tmp_path)
    assert config.max_position_embeddings == 40
    write_checkpoint(tmp_path, generation="g4h", keep_window_size=40)
    config, _, _ = inspect_checkpoint(tmp_path)
    assert config.max_position_embeddings == 256


@pytest.mark.parametrize("generation", ["g2_first", "g2"])
def test_mask_of_g2_that_would_hide_keys_is_refused(tmp_path: Path, generation: str) -> None:
    write_checkpoint(tmp_path, generation=generation)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("attn.A") and "layers.1." in name)
    for value in (-0.25, np.nan):
        tensors[name][2] = value
        save_file(tensors, file)
        inspect_checkpoint(tmp_path)  # the values are not looked at yet
        with pytest.raises(UnsupportedModelError, match=f"{name} goes down to {value}; generation"):
            load_checkpoint(tmp_path)


def test_experts_in_g2_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, generation="g2")
    config = tmp_path / "config.json"
    config.write_text(json.dumps(config_json("g2", **MOE)), encoding="utf-8")
    assert "is_moe is true in a checkpoint of generation g2" in refusal(tmp_path)


def test_two_generations_in_one_file_are_refused(tmp_path: Path) -> None:
    g3 = load_file(write_checkpoint(tmp_path / "g3", generation="g3") / "model.safetensors")
    folder = write_checkpoint(tmp_path / "g4")
    save_file({**g3, **load_file(folder / "model.safetensors")}, folder / "model.safetensors")
    assert "match g3 and g4 at once; a checkpoint has one form" in refusal(folder)
