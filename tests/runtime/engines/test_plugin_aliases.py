"""Engines whose plugins write the cache in place, of which the library reports nothing."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from runtime.backends import open_backend
from runtime.bundle import Bundle
from runtime.sampling import SamplingParams
from tests.engine_runs import generate, prompts
from tests.fake_tensorrt import FakeGpu
from tests.fake_tensorrt.engine_file import add_fake_engine


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engines here have no plugins; only their manifest says so."""
    monkeypatch.setattr("runtime.backends.tensorrt_backend.prepare_plugins", lambda *_: None)


def test_cache_of_layer_plugins_keeps_one_address_though_nothing_is_reported(
    engine_source: Path, tmp_path: Path, gpu: FakeGpu
) -> None:
    details = {"plugin": "layer"}
    written = {present: past for past, present in Bundle.open(engine_source).contract.aliases}
    bundle = add_fake_engine(
        engine_source, tmp_path / "bundle", details=details, aliases={}, plugin_aliases=written
    )
    params = SamplingParams(max_tokens=5, temperature=0.0)
    with closing(open_backend("onnxruntime", bundle)) as reference:
        expected = generate(reference, prompts(9, 4), params)
    with closing(open_backend("tensorrt_rtx", bundle)) as opened:
        assert generate(opened, prompts(9, 4), params) == expected


@pytest.mark.parametrize(
    ("plugin", "aliases"),
    [("layer", {"present.0.key": "past_key_values.0.value"}), ("doge", {})],
)
def test_another_alias_or_other_plugins_without_one_are_refused(
    engine_source: Path, tmp_path: Path, gpu: FakeGpu, plugin: str, aliases: dict[str, Any]
) -> None:
    details = {"plugin": plugin}
    bundle = add_fake_engine(engine_source, tmp_path / "bundle", details=details, aliases=aliases)
    found = aliases.get("present.0.key")
    with pytest.raises(ValueError, match=f"present.0.key shares the memory of {found}, expected"):
        open_backend("tensorrt_rtx", bundle)
