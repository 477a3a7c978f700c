import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.manifest import FORMAT_VERSION, BundleFile, Manifest, path_fault
from tests.fake_bundle import FILES, fake_manifest


def complete_manifest() -> Manifest:
    files = tuple(
        BundleFile(path=path, bytes=len(content), sha256="a" * 64, role=role)
        for path, (role, content) in FILES.items()
    )
    return dataclasses.replace(fake_manifest(), files=files)


def as_read(manifest: Manifest) -> dict[str, Any]:
    """The dictionary that a reader of the file gets."""
    data: dict[str, Any] = json.loads(manifest.to_json())
    return data


def test_a_manifest_read_back_equals_the_one_written():
    manifest = complete_manifest()
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert Manifest.from_dict(manifest.as_dict()) == manifest


def test_equal_manifests_give_equal_text_whatever_the_order_of_their_keys():
    manifest = complete_manifest()
    reordered = dataclasses.replace(manifest, config=dict(reversed(manifest.config.items())))
    assert reordered.to_json() == manifest.to_json()
    assert manifest.to_json().endswith("}\n")


def test_a_name_that_is_no_valid_utf8_survives():
    manifest = complete_manifest()
    odd = dataclasses.replace(manifest.source, name="d\udcf6ge-日本")
    manifest = dataclasses.replace(manifest, source=odd)
    assert Manifest.from_json(manifest.to_json().encode("utf-8").decode()) == manifest


def test_a_number_that_json_does_not_know_is_refused_when_written():
    broken = dataclasses.replace(complete_manifest(), checks={"quality": {"perplexity": math.nan}})
    with pytest.raises(ValueError, match="not JSON compliant"):
        broken.to_json()


@pytest.mark.parametrize("version", [0, FORMAT_VERSION + 1, "1", None, True])
def test_another_format_version_is_the_only_thing_reported(version):
    data = as_read(complete_manifest()) | {"format_version": version, "surprise": 1}
    with pytest.raises(
        ValueError, match=r"format_version is .*reads 1; build the bundle again"
    ) as e:
        Manifest.from_dict(data)
    assert "surprise" not in str(e.value)


def test_a_manifest_without_format_version_is_refused():
    data = as_read(complete_manifest())
    del data["format_version"]
    with pytest.raises(ValueError, match="format_version is None"):
        Manifest.from_dict(data)


def test_all_problems_are_listed_at_once():
    data = as_read(complete_manifest())
    del data["versions"]
    data["surprise"] = 1
    data["generation"] = 4
    data["limits"]["max_seq_len"] = True
    data["source"]["url"] = "x"
    data["variants"][0] = "model.onnx"
    del data["files"][1]["role"]
    data["checks"]["onnx"] = None
    with pytest.raises(ValueError, match="missing") as error:
        Manifest.from_dict(data)
    assert set(str(error.value).split("; ")) == {
        "versions is missing",
        "surprise is an unknown key",
        "generation is a whole number, expected text",
        "limits.max_seq_len is true or false, expected a whole number",
        "source.url is an unknown key",
        "variants[0] is text, expected an object",
        "files[1].role is missing",
        "checks.onnx is null, expected an object",
    }


def test_every_single_key_is_needed_and_no_other_is_taken():
    good = as_read(complete_manifest())
    places = [[], ["source"], ["limits"], ["variants", 0], ["files", 0]]
    for place in places:
        target = good
        for step in place:
            target = target[step]
        for key in [*target]:
            data = json.loads(json.dumps(good))
            inner = data
            for step in place:
                inner = inner[step]
            inner[f"{key}_"] = inner.pop(key)
            with pytest.raises(ValueError, match=key):
                Manifest.from_dict(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"router_mode": "both"}, "router_mode is 'both', expected one of 'mixed', 'per_token'"),
        ({"limits": {"max_batch_size": 0, "max_input_len": 8, "max_seq_len": 4}}, "at least 1"),
        ({"limits": {"max_batch_size": 1, "max_input_len": 8, "max_seq_len": 4}}, "is below"),
        ({"versions": {"numpy": 2}}, "versions.numpy is a whole number, expected text"),
    ],
)
def test_a_value_out_of_its_range_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        Manifest.from_dict(as_read(complete_manifest()) | change)


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (1, {"path": "model.onnx"}, "model.onnx is listed more than once"),
        (1, {"path": "/etc/passwd"}, "'/etc/passwd' is absolute"),
        (1, {"path": "C:/weights"}, "is absolute"),
        (1, {"path": "../weights"}, r"'../weights' contains `..`"),
        (1, {"path": "cpu/../../weights"}, r"contains `..`"),
        (1, {"path": "cpu//weights"}, "not in its plain form"),
        (1, {"path": "cpu\\weights"}, "not in its plain form"),
        (1, {"path": ""}, "not in its plain form"),
        (1, {"path": "manifest.json"}, "the manifest itself"),
        (1, {"bytes": -1}, "has -1 bytes"),
        (1, {"sha256": "A" * 64}, "64 lower-case"),
        (1, {"role": "virus"}, "role of model.onnx.data is 'virus', expected one of 'onnx'"),
        (0, {"path": "graph.onnx"}, "variant onnxruntime:fp32: no listed file is model.onnx"),
    ],
)
def test_a_file_that_cannot_be_in_a_bundle_is_named(index, change, message):
    data = as_read(complete_manifest())
    data["files"][index] |= change
    with pytest.raises(ValueError, match=message):
        Manifest.from_dict(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "torch"}, "variant torch:fp32 is listed more than once"),
        ({"path": "../other/model.onnx"}, r"variant onnxruntime:fp32: path .* contains `..`"),
        ({"path": "check"}, "no listed file is check or lies in it"),
    ],
)
def test_a_variant_that_cannot_be_run_is_named(change, message):
    data = as_read(complete_manifest())
    data["variants"][0] |= change
    with pytest.raises(ValueError, match=message):
        Manifest.from_dict(data)


@pytest.mark.parametrize("text", ["", "{", "[1, 2", '{"a": 1, "a": 2}', "[" * 100_000, "\0"])
def test_text_that_is_not_one_whole_json_value_is_refused(text):
    with pytest.raises(ValueError, match="not whole, valid JSON"):
        Manifest.from_json(text)


@pytest.mark.parametrize("text", ["[]", "null", "1", '"x"'])
def test_json_other_than_an_object_is_refused(text):
    with pytest.raises(ValueError, match="expected an object, found"):
        Manifest.from_json(text)


def test_a_manifest_cut_anywhere_is_refused():
    text = complete_manifest().to_json().rstrip()
    for length in range(0, len(text), 97):
        with pytest.raises(ValueError, match="JSON"):
            Manifest.from_json(text[:length])


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@given(key=st.sampled_from(sorted(as_read(complete_manifest()))), value=JSON_VALUES)
def test_any_value_in_place_of_another_is_read_or_refused_as_a_value_error(key, value):
    data = as_read(complete_manifest()) | {key: value}
    try:
        manifest = Manifest.from_dict(data)
    except ValueError as error:
        assert str(error)
    else:
        assert as_read(manifest) == data


@given(path=st.text(alphabet="a./\\:\0C", max_size=8))
def test_a_path_without_fault_stays_in_its_folder_and_has_one_spelling(path):
    if path_fault(path) is None:
        parts = path.split("/")
        assert not set(parts) & {"", ".", ".."}
        assert "\\" not in path
        assert "\0" not in path
