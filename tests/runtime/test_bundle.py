import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model.config import SEED_FIELDS, DogeConfig
from runtime.bundle import Bundle, config_from_dict, sha256_of
from tests.fake_bundle import CONFIG, FILES, LIMITS, fake_manifest, write_fake_bundle
from tests.tiny_doge import config_json

ENGINE = "engines/tensorrt_rtx-sm89-fp16.engine"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_fake_bundle(tmp_path / "bundle")


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = folder / "manifest.json"
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def test_an_opened_bundle_gives_back_what_it_was_written_with(folder):
    bundle = Bundle.open(folder, verify=True)
    assert bundle.path == folder
    assert bundle.config == CONFIG
    assert bundle.config.eos_token_id == (1, 2)
    assert bundle.generation.name == "g4"
    assert bundle.limits == LIMITS
    assert bundle.contract.as_dict() == fake_manifest().contract
    assert bundle.file("model.onnx") == folder / "model.onnx"
    assert bundle.file("checkpoint") == folder / "checkpoint"
    assert bundle.tokenizer_folder == folder / "tokenizer"


def test_a_bundle_copied_elsewhere_still_opens(folder, tmp_path):
    shutil.move(folder, tmp_path / "moved")
    Bundle.open(tmp_path / "moved", verify=True)


def test_a_bundle_of_a_mixture_of_experts_names_its_router_mode(tmp_path):
    config = dataclasses.replace(
        CONFIG, is_moe=True, num_experts=16, num_experts_per_tok=2, router_mode="per_token"
    )
    folder = write_fake_bundle(tmp_path / "moe", fake_manifest(config))
    assert Bundle.open(folder).manifest.router_mode == "per_token"
    change_manifest(folder, lambda data: data.update(router_mode="mixed"))
    with pytest.raises(ValueError, match="router_mode is 'mixed', its config says 'per_token'"):
        Bundle.open(folder)


def test_a_missing_folder_says_how_to_build_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"python export/build_engine.py --output DIR"):
        Bundle.open(tmp_path / "nowhere")


def test_a_folder_without_manifest_says_how_to_build_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no manifest.json; build one with: python"):
        Bundle.open(tmp_path)


def test_a_file_in_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "model.onnx").touch()
    with pytest.raises(FileNotFoundError, match=r"model.onnx is a file, expected a bundle"):
        Bundle.open(tmp_path / "model.onnx")


def test_a_bundle_that_an_interrupted_build_left_aside_is_pointed_out(folder):
    folder.rename(folder.with_name("bundle.old"))
    with pytest.raises(
        FileNotFoundError, match=r"bundle.old does, .*: start the build again, or rename"
    ):
        Bundle.open(folder)


def test_a_truncated_manifest_is_refused_with_the_bundles_name(folder):
    file = folder / "manifest.json"
    file.write_text(file.read_text()[:-20])
    with pytest.raises(ValueError, match=r"bundle .* is broken: not whole, valid JSON"):
        Bundle.open(folder)


def test_a_manifest_that_is_no_text_is_refused(folder):
    (folder / "manifest.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is broken"):
        Bundle.open(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(surprise=1), "surprise is an unknown key"),
        (lambda data: data.update(format_version=2), "format_version is 2"),
        (lambda data: data.update(generation="g9"), "unknown generation 'g9'"),
        (
            lambda data: data.update(router_mode="mixed"),
            "router_mode is 'mixed', its config says N",
        ),
        (lambda data: data["config"].pop("head_dim"), "config.head_dim is missing"),
        (lambda data: data["config"].update(width=3), "config.width is an unknown key"),
        (lambda data: data["config"].update(head_dim=7), "head_dim must be even"),
        (
            lambda data: data["config"].update(vocab_size="many"),
            "config.vocab_size is text, expected a whole number",
        ),
        (lambda data: data["config"].update(is_moe=0), "is_moe is a whole number, expected true"),
        (lambda data: data["config"].update(rope_theta=None), "rope_theta is null, expected a num"),
        (lambda data: data["config"].update(bos_token_id="1"), "bos_token_id is text, expected a"),
        (lambda data: data["config"].update(eos_token_id=[1, "2"]), "expected whole numbers"),
        (lambda data: data["config"].update(router_mode="both"), "must be one of mixed, per_token"),
        (
            lambda data: data["files"][4].update(path="tokenizer/" + "a" * 300),
            "cannot be found: .*too long",
        ),
        (lambda data: data["config"].update(vocab_size=33), "step contract differs"),
        (lambda data: data["contract"]["inputs"].pop(), "step contract differs"),
        (lambda data: data["limits"].update(max_seq_len=65), "step contract differs"),
        (lambda data: data["files"][0].update(path="/model.onnx"), "'/model.onnx' is absolute"),
        (lambda data: data["files"][0].update(path="../model.onnx"), r"contains `..`"),
        (lambda data: data["files"].append(data["files"][0]), "listed more than once"),
    ],
)
def test_a_tampered_manifest_is_refused(folder, change, message):
    change_manifest(folder, change)
    with pytest.raises(ValueError, match=message):
        Bundle.open(folder)


def test_every_file_that_is_missing_or_of_another_size_is_named_at_once(folder):
    (folder / "model.onnx").unlink()
    (folder / "model.onnx.data").write_bytes(b"weights and more")
    with pytest.raises(ValueError, match="is broken") as error:
        Bundle.open(folder)
    assert "model.onnx is missing, expected a file of 5 bytes" in str(error.value)
    assert "model.onnx.data has 16 bytes, expected 7" in str(error.value)


def test_a_folder_in_place_of_a_file_is_refused(folder):
    (folder / "model.onnx").unlink()
    (folder / "model.onnx").mkdir()
    with pytest.raises(ValueError, match=r"model.onnx is missing"):
        Bundle.open(folder)


def test_a_link_out_of_the_bundle_is_refused(folder, tmp_path):
    (tmp_path / "graph").write_bytes(FILES["model.onnx"][1])
    (folder / "model.onnx").unlink()
    (folder / "model.onnx").symlink_to(tmp_path / "graph")
    with pytest.raises(ValueError, match=r"model.onnx is a link that leads out of the bundle"):
        Bundle.open(folder)


def test_a_folder_linked_out_of_the_bundle_is_refused(folder, tmp_path):
    (folder / "engines").rename(tmp_path / "engines")
    (folder / "engines").symlink_to(tmp_path / "engines")
    with pytest.raises(ValueError, match=r"engine is a link that leads out of the bundle"):
        Bundle.open(folder)


def test_a_link_to_itself_is_refused(folder):
    (folder / "model.onnx").unlink()
    (folder / "model.onnx").symlink_to("model.onnx")
    with pytest.raises(ValueError, match=r"model.onnx (cannot be found|is missing)"):
        Bundle.open(folder)


def test_a_bundle_reached_through_a_link_opens(folder, tmp_path):
    (tmp_path / "latest").symlink_to(folder)
    Bundle.open(tmp_path / "latest", verify=True)


def test_altered_bytes_are_found_by_verify_alone(folder):
    (folder / "model.onnx.data").write_bytes(b"WEIGHTS")
    bundle = Bundle.open(folder)
    assert len(bundle.altered_files()) == 1
    with pytest.raises(ValueError, match=r"is damaged: model.onnx.data has sha256 \w+, expected"):
        Bundle.open(folder, verify=True)


def test_an_engine_is_hashed_before_it_is_handed_out(folder):
    bundle = Bundle.open(folder)
    variant = bundle.variant("tensorrt_rtx")
    assert bundle.executable_file(variant) == folder / ENGINE
    (folder / ENGINE).write_bytes(b"MACHINE CODE")
    with pytest.raises(ValueError, match="refusing to load tensorrt_rtx:fp16"):
        bundle.executable_file(variant)


def test_an_engine_removed_after_opening_is_refused(folder):
    bundle = Bundle.open(folder)
    (folder / ENGINE).unlink()
    with pytest.raises(ValueError, match=r"refusing to load .* is missing"):
        bundle.executable_file(bundle.variant("tensorrt_rtx"))


def test_every_file_of_an_executable_folder_is_hashed(folder):
    bundle = Bundle.open(folder)
    variant = bundle.variant("torch")
    assert bundle.executable_file(variant) == folder / "checkpoint"
    (folder / "checkpoint/model.safetensors").write_bytes(b"TENSORS")
    with pytest.raises(ValueError, match=r"checkpoint/model.safetensors has sha256"):
        bundle.executable_file(variant)


def test_the_first_variant_of_a_backend_is_its_default(folder):
    change_manifest(
        folder,
        lambda data: data["variants"].append(data["variants"][0] | {"name": "int8"}),
    )
    bundle = Bundle.open(folder)
    assert [variant.name for variant in bundle.variants("onnxruntime")] == ["fp32", "int8"]
    assert bundle.variant("onnxruntime").name == "fp32"
    assert bundle.variant("onnxruntime", "int8").name == "int8"
    assert bundle.variants("tensorrt") == ()


def test_a_precision_chooses_the_first_variant_that_has_it_after_one_of_that_name(folder):
    def rename(data):
        first = data["variants"][1]
        first["name"] = "fp16-sm89"
        data["variants"] += [first | {"name": "fp16-sm120"}, first | {"name": "fast"}]

    change_manifest(folder, rename)
    bundle = Bundle.open(folder)
    assert bundle.variant("tensorrt_rtx", "fp16").name == "fp16-sm89"
    assert bundle.variant("tensorrt_rtx", "fp16-sm120").name == "fp16-sm120"
    change_manifest(folder, lambda data: data["variants"][4].update(name="fp16"))
    assert Bundle.open(folder).variant("tensorrt_rtx", "fp16").name == "fp16"


@pytest.mark.parametrize(
    ("backend", "name", "hint"),
    [
        ("onnxruntime", "int4", "--backend none --cpu int4 --output"),
        ("tensorrt", None, "--backend tensorrt --output"),
        ("tensorrt_rtx", "bf16", "--backend tensorrt_rtx --precision bf16 --output"),
        ("tensorrt_rtx", "bf16-sm86-sm89", "--precision bf16 --target sm86,sm89 --output"),
        ("tensorrt_rtx", "bf16-sm89-doge", "--target sm89 --plugin doge --output"),
        ("tensorrt", "fp16-sm90-doge-aot", "--target sm90 --plugin doge-aot --output"),
        ("torch", "bf16", "without --no-checkpoint"),
    ],
)
def test_a_model_the_bundle_lacks_is_answered_with_those_it_has_and_how_to_add(
    folder, backend, name, hint
):
    with pytest.raises(ValueError, match="has no model") as error:
        Bundle.open(folder).variant(backend, name)
    assert "it has onnxruntime:fp32, tensorrt_rtx:fp16, torch:fp32" in str(error.value)
    assert hint in str(error.value)


def test_the_command_that_adds_a_model_names_the_source_and_limits_that_keep_the_others(tmp_path):
    config = dataclasses.replace(
        CONFIG, is_moe=True, num_experts=16, num_experts_per_tok=2, router_mode="per_token"
    )
    manifest = fake_manifest(config)
    folder = write_fake_bundle(tmp_path / "my bundle", manifest)
    with pytest.raises(ValueError, match="has no model") as error:
        Bundle.open(folder).variant("tensorrt")
    assert str(error.value).endswith(
        "Add it with: python export/build_engine.py --model DIR --router per_token "
        "--max-batch-size 2 --max-input-len 32 --max-seq-len 64 --backend tensorrt "
        f"--output '{folder}' (DIR: the folder of the checkpoint tiny)"
    )
    source = dataclasses.replace(manifest.source, kind="random", name="doge-20m")
    write_fake_bundle(folder, dataclasses.replace(manifest, source=source))
    with pytest.raises(ValueError, match=r"build_engine.py --random-weights doge-20m --router"):
        Bundle.open(folder).variant("tensorrt")


def test_a_file_the_manifest_does_not_list_is_ignored_and_never_handed_out(folder):
    (folder / "notes.txt").write_text("mine")
    bundle = Bundle.open(folder, verify=True)
    with pytest.raises(ValueError, match=r"lists no notes.txt"):
        bundle.file("notes.txt")


def test_a_tokenizer_folder_that_is_not_listed_is_not_used(folder):
    def drop(data):
        data["files"] = [file for file in data["files"] if file["role"] != "tokenizer"]

    change_manifest(folder, drop)
    assert Bundle.open(folder).tokenizer_folder is None


@pytest.mark.parametrize("eos", [None, 3, (3, 4), ()])
def test_a_config_survives_the_manifest(eos):
    config = dataclasses.replace(CONFIG, eos_token_id=eos)
    assert config_from_dict(json.loads(json.dumps(config.as_dict()))) == config


def test_every_field_of_the_config_is_needed():
    for field in dataclasses.fields(DogeConfig):
        if field.name in SEED_FIELDS:
            continue
        values = CONFIG.as_dict()
        del values[field.name]
        with pytest.raises(ValueError, match=f"config.{field.name} is missing"):
            config_from_dict(values)


def test_fields_of_the_seed_generation_are_there_for_it_alone():
    assert not set(SEED_FIELDS) & set(CONFIG.as_dict())
    seed = DogeConfig.from_dict(config_json("g1"), seed=True)
    assert config_from_dict(json.loads(json.dumps(seed.as_dict()))) == seed


@pytest.mark.parametrize(
    "details",
    [{"cache_dtype": "int3"}, {"score_dtype": 4}, {"score_heads": "2"}],
    ids=str,
)
def test_a_variant_that_caches_what_no_build_writes_is_an_error(folder, details):
    bundle = Bundle.open(folder)
    changed = dataclasses.replace(bundle.variant("onnxruntime"), details=details)
    with pytest.raises(ValueError, match="no build writes that"):
        bundle.contract_of(changed)


def test_a_variants_contract_has_its_cache_types_and_scores(folder):
    bundle = Bundle.open(folder)
    details = {"cache_dtype": "int8", "score_heads": 2}
    changed = dataclasses.replace(bundle.variant("onnxruntime"), details=details)
    specs = {spec.name: spec for spec in bundle.contract_of(changed).past}
    assert specs["past_key_values.0.key"].dtype == "int8"
    assert specs["past_key_values.0.score"].shape[1] == 2
    assert bundle.contract_of(bundle.variant("onnxruntime")) == bundle.contract


def test_the_hash_of_a_file_longer_than_one_read_is_that_of_its_bytes(tmp_path):
    content = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(content)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_a_bundle_opens_where_torch_cannot_be_imported(folder):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from pathlib import Path; from runtime.bundle import Bundle\n"
        "print(Bundle.open(Path(sys.argv[1]), verify=True).config.vocab_size)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert (result.returncode, result.stdout) == (0, "32\n"), result.stderr
