"""A conversation through `generate --chat`: turns from stdin, a template from the checkpoint."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from pathlib import Path

import pytest

from export import build_engine
from export.sources import BUNDLED_CHECKPOINT
from runtime import generate
from runtime.command import FAILURE, SUCCESS

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
BEGIN_OF_TEXT = 0


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled checkpoint, given a chat template."""
    work = tmp_path_factory.mktemp("chat")
    checkpoint = work / "checkpoint"
    checkpoint.mkdir()
    for file in BUNDLED_CHECKPOINT.iterdir():
        (checkpoint / file.name).write_bytes(file.read_bytes())
    (checkpoint / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    arguments = ["--model", checkpoint, "--backend", "none", "--output", work / "bundle"]
    with contextlib.redirect_stdout(io.StringIO()):
        assert build_engine.main([*map(str, arguments), "--quiet"]) == SUCCESS
    return work / "bundle"


def converse(bundle, monkeypatch, capsys, text, *arguments):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    status = generate.main(
        [str(bundle), "--chat", "--backend", "onnxruntime", "--max-tokens", "6", *arguments]
    )
    return status, capsys.readouterr()


def test_each_turn_sees_those_before_it_with_one_begin_of_text(bundle, monkeypatch, capsys):
    status, printed = converse(
        bundle, monkeypatch, capsys, "Hello\n\nWho is there?\n", "--system", "Speak.", "--json"
    )
    assert status == SUCCESS
    first, second = (json.loads(line)["outputs"][0] for line in printed.out.splitlines())
    assert [first["prompt"], second["prompt"]] == ["Hello", "Who is there?"]
    for turn in (first, second):
        assert turn["prompt_ids"].count(BEGIN_OF_TEXT) == 1
    assert len(second["prompt_ids"]) > len(first["prompt_ids"]) + len(first["ids"])


def test_answers_are_streamed_as_plain_text(bundle, monkeypatch, capsys):
    status, printed = converse(bundle, monkeypatch, capsys, "Hello\n", "--seed", "1")
    assert status == SUCCESS
    assert printed.out.strip()


def test_template_that_fails_is_named_as_such(bundle, monkeypatch, capsys, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in bundle.rglob("*"):
        if file.is_file():
            target = broken / file.relative_to(bundle)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(file.read_bytes())
    template = broken / "tokenizer" / "chat_template.jinja"
    template.write_text("{{ raise_exception('roles must alternate') }}", encoding="utf-8")
    manifest = broken / "manifest.json"
    data = json.loads(manifest.read_text(encoding="utf-8"))
    for entry in data["files"]:
        if entry["path"] == "tokenizer/chat_template.jinja":
            entry["bytes"] = template.stat().st_size
            entry["sha256"] = hashlib.sha256(template.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(data), encoding="utf-8")
    status, printed = converse(broken, monkeypatch, capsys, "Hello\n")
    assert status == FAILURE
    assert "roles must alternate" in printed.err
