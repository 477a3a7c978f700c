import dataclasses
import json
import random
import stat
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer

import model
from model.checkpoint import load_checkpoint
from model.config import DogeConfig
from model.generations.g4 import G4
from model.step_ops import no_tap
from model.train_tiny import HELP, main
from model.training import (
    CHECKPOINT_FILES,
    Trainer,
    TrainingConfig,
    new_network,
    save_checkpoint,
    tiny_config,
)

BUNDLED = Path(model.__file__).parent / "checkpoints" / "doge-tiny"
SHORT = {"steps": 12, "long_steps": 0, "window": 32, "batch_tokens": 256, "eval_every": 4}
SHORT_FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in SHORT.items()]


def play(lines: int) -> str:
    """A text with speakers and line breaks, the same on every call."""
    draw = random.Random(7)
    words = ["the", "moon", "and", "a", "river", "sing", "of", "cold", "bright", "stars", "hills"]
    return "\n\n".join(
        f"{draw.choice(['ANNA', 'BORIS'])}:\n{' '.join(draw.choices(words, k=6))}."
        for _ in range(lines)
    )


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "play.txt"
    path.write_text(play(600), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(text_file: Path) -> tuple[Trainer, list[float], list[float]]:
    """A short run: the trainer, the loss of every step, the validation losses."""
    trainer = Trainer(text_file.read_text(encoding="utf-8"), TrainingConfig(**SHORT))
    losses, validations = [], []

    def on_step(step: int, loss: float, validation: float | None) -> None:
        losses.append(loss)
        validations.extend([] if validation is None else [validation])

    trainer.run(on_step, on_best=lambda: None)
    return trainer, losses, validations


def test_a_few_steps_lower_the_loss(trained):
    _, losses, validations = trained
    assert len(losses) == SHORT["steps"]
    assert losses[-1] < losses[0] - 0.5
    assert len(validations) == SHORT["steps"] // SHORT["eval_every"]
    assert validations[-1] < validations[0]


def test_the_network_ends_with_the_weights_of_the_best_validation_loss(trained):
    trainer, _, validations = trained
    assert trainer.evaluate() == pytest.approx(min(validations), abs=1e-5)


def test_windows_begin_with_begin_of_text_and_targets_follow_one_token_later(trained):
    trainer, _, _ = trained
    seen = {}

    def watch(module, arguments):
        seen["input_ids"], seen["position_ids"] = arguments[:2]

    targets = torch.arange(3, 43).view(2, 20)
    hook = trainer.network.register_forward_pre_hook(watch)
    trainer._loss(targets)
    hook.remove()
    assert seen["input_ids"][:, 0].tolist() == [0, 0]
    assert torch.equal(seen["input_ids"][:, 1:], targets[:, :-1])
    assert seen["position_ids"].tolist() == [list(range(20))] * 2


def test_the_last_steps_train_every_position_of_the_context():
    config = TrainingConfig(**{**SHORT, "steps": 2, "long_steps": 1})
    trainer = Trainer(play(1500), config)
    lengths = []
    hook = trainer.network.register_forward_pre_hook(
        lambda module, arguments: lengths.append(arguments[0].shape)
    )
    trainer._step(trainer._optimizer(), 1)
    trainer._step(trainer._optimizer(), 2)
    hook.remove()
    assert lengths == [(8, 32), (1, 1024)]
    assert trainer.doge.max_position_embeddings == 1024


def test_one_seed_gives_one_network_and_another_seed_another():
    def embedding(seed: int) -> torch.Tensor:
        return new_network(tiny_config(300), seed).model.embed_tokens.weight

    assert torch.equal(embedding(3), embedding(3))
    assert not torch.equal(embedding(3), embedding(4))


def test_mask_scores_differ_between_keys_before_any_training():
    attention = new_network(tiny_config(300), seed=0).model.layers[0].self_attn
    assert torch.equal(attention.A, torch.ones(2))
    scores = attention.mask_scores(torch.randn(1, 50, 64, generator=torch.Generator()))
    assert (scores.std(dim=2) > 0.05).all()


def test_the_learning_rate_rises_to_its_peak_and_falls_to_a_tenth(trained):
    trainer, _, _ = trained
    rates = [trainer._learning_rate(step) for step in range(1, SHORT["steps"] + 1)]
    assert max(rates) == trainer.config.learning_rate
    assert rates[-1] == pytest.approx(0.1 * trainer.config.learning_rate)
    assert rates[1:] == sorted(rates[1:], reverse=True)


def test_weight_decay_leaves_norms_scales_and_a_alone(trained):
    trainer, _, _ = trained
    decayed, spared = trainer._optimizer().param_groups
    assert decayed["weight_decay"] == trainer.config.weight_decay
    assert all(parameter.dim() == 2 for parameter in decayed["params"])
    assert spared["weight_decay"] == 0
    assert all(parameter.dim() == 1 for parameter in spared["params"])


def test_the_written_folder_is_a_whole_checkpoint(trained, tmp_path):
    trainer, _, _ = trained
    save_checkpoint(trainer, tmp_path / "tiny")
    assert {file.name for file in (tmp_path / "tiny").iterdir()} == set(CHECKPOINT_FILES)
    assert DogeConfig.from_pretrained(tmp_path / "tiny") == trainer.doge
    weights = load_file(tmp_path / "tiny" / "model.safetensors")
    assert {k: tuple(v.shape) for k, v in weights.items()} == G4.tensor_shapes(trainer.doge)
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    for name, parameter in load_checkpoint(tmp_path / "tiny").named_parameters():
        assert torch.equal(parameter, trainer.network.get_parameter(name)), name


def test_everyone_who_may_read_the_config_may_read_the_weights(trained, tmp_path):
    save_checkpoint(trained[0], tmp_path)
    modes = {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    assert len(modes) == 1


def test_saving_again_replaces_the_weights_and_keeps_a_readme(trained, tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "README.md").write_text("how it was made")
    (folder / "model.safetensors").write_text("old")
    save_checkpoint(trained[0], folder)
    assert (folder / "README.md").read_text() == "how it was made"
    assert load_checkpoint(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_the_command_writes_a_checkpoint_and_prints_one_json_object(text_file, tmp_path, capsys):
    flags = [*SHORT_FLAGS, "--steps=2"]
    assert main(["--text", str(text_file), "--output", str(tmp_path / "tiny"), *flags]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert result["steps"] == result["best_step"] == 2
    assert result["parameters"] == sum(
        parameter.numel() for parameter in load_checkpoint(tmp_path / "tiny").parameters()
    )
    assert 0 < result["validation_loss"] < 10
    assert "step 2: train" in printed.err


def test_quiet_leaves_stderr_empty(text_file, tmp_path, capsys):
    flags = [*SHORT_FLAGS, "--steps=1", "--quiet"]
    assert main(["--text", str(text_file), "--output", str(tmp_path / "tiny"), *flags]) == 0
    assert capsys.readouterr().err == ""


def test_every_field_of_the_training_has_a_flag():
    assert set(HELP) == {field.name for field in dataclasses.fields(TrainingConfig)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist; "),
        (b"", "the text is empty; give a longer text"),
        (b"To be, or not to be.", "tokens and a window needs 1024; give a longer text"),
        (b"To be \xff", "is not UTF-8 ("),
    ],
    ids=["missing", "empty", "short", "latin-1"],
)
def test_an_unusable_text_is_one_line_and_status_1(content, message, tmp_path, capsys):
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    assert main(["--text", str(text), "--output", str(tmp_path / "tiny")]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("train_tiny: ")
    assert printed.err.count("\n") == 1
    assert message in printed.err
    assert not (tmp_path / "tiny").exists()


def test_a_folder_as_text_is_an_error_too(tmp_path, capsys):
    assert main(["--text", str(tmp_path), "--output", str(tmp_path / "tiny")]) == 1
    assert "is not a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [("notes.txt", "holds notes.txt, which is no part of a checkpoint"), (None, "is a file")],
    ids=["foreign-file", "file"],
)
def test_nothing_but_a_checkpoint_is_ever_written_over(name, message, text_file, tmp_path, capsys):
    output = tmp_path / "out"
    if name is None:
        output.write_text("mine")
    else:
        output.mkdir()
        (output / name).write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    assert main(["--text", str(text_file), "--output", str(output), *SHORT_FLAGS]) == 1
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_dropout_touches_what_enters_the_residual_stream_and_keeps_its_mean(trained):
    trainer, _, _ = trained
    ones = torch.ones(64, 64, 16)
    for name in ("embedding", "layers.0.attention_output", "layers.3.mlp_output"):
        dropped = trainer._drop(ones, name)
        share = (dropped == 0).float().mean().item()
        assert share == pytest.approx(trainer.config.dropout, abs=0.01)
        assert dropped.mean().item() == pytest.approx(1, abs=0.01)
    for name in ("layers.0.score", "layers.0.router_scores", "final_norm"):
        assert trainer._drop(ones, name) is ones


@torch.no_grad()
def test_only_training_drops(trained):
    trainer, _, _ = trained
    targets = trainer._validation[:64].view(2, 32)
    assert trainer._loss(targets) == trainer._loss(targets, no_tap)
    assert trainer._loss(targets, trainer._drop) != trainer._loss(targets)


def test_all_bad_settings_are_told_at_once():
    with pytest.raises(ValueError, match=r"steps must be at least 1.*learning_rate must be"):
        TrainingConfig(steps=0, learning_rate=2.0)
    with pytest.raises(ValueError, match=r"batch_tokens \(64\) must cover one window \(512\)"):
        TrainingConfig(batch_tokens=64)


@pytest.fixture(scope="module")
def bundled_tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))


def test_the_bundled_checkpoint_is_small_and_whole():
    assert {file.name for file in BUNDLED.iterdir()} == {*CHECKPOINT_FILES, "README.md"}
    assert sum(file.stat().st_size for file in BUNDLED.iterdir()) <= 6_000_000
    config = DogeConfig.from_pretrained(BUNDLED)
    assert config == tiny_config(2048)
    with safe_open(BUNDLED / "model.safetensors", framework="pt") as tensors:
        shapes = {
            name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.offset_keys()
        }
    assert shapes == G4.tensor_shapes(config)


def test_the_bundled_config_says_window_routing_and_ids():
    config = DogeConfig.from_pretrained(BUNDLED)
    assert config.keep_window_size == 256 < config.max_position_embeddings == 1024
    assert config.router_mode == "per_token"
    assert (config.num_experts, config.num_experts_per_tok) == (256, 8)
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    assert json.loads((BUNDLED / "generation_config.json").read_text()) == ids


def test_transformers_reads_the_bundled_config_the_same():
    published = transformers.DogeConfig.from_pretrained(BUNDLED)
    ours = DogeConfig.from_pretrained(BUNDLED)
    for field in set(ours.as_dict()) - {"router_mode", "rope_theta"}:
        assert getattr(published, field) == getattr(ours, field), field
    assert published.rope_parameters["rope_theta"] == ours.rope_theta


def test_the_bundled_mask_is_far_from_the_neutral_one():
    weights = load_file(BUNDLED / "model.safetensors")
    for index in range(4):
        assert (weights[f"model.layers.{index}.self_attn.A"].abs() > 0.1).all()
        assert weights[f"model.layers.{index}.self_attn.dt_proj.weight"].std() > 0.02


@pytest.mark.parametrize(
    "text",
    [
        "ROMEO:\nO, she doth teach the torches to burn bright!\n",
        "two\n\nlines\r\n\tand  spaces ",
        "naïve 漢字 😀👩‍🚀",
        "",
    ],
    ids=["verse", "whitespace", "emoji", "empty"],
)
def test_the_bundled_tokenizer_gives_back_any_text(text, bundled_tokenizer):
    ids = bundled_tokenizer.encode(text).ids
    assert ids[0] == 0
    assert bundled_tokenizer.decode(ids) == text


def test_the_bundled_special_tokens_come_first_and_are_never_split(bundled_tokenizer):
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"]
    assert [bundled_tokenizer.token_to_id(name) for name in names] == [0, 1, 2]
    assert bundled_tokenizer.encode("".join(names), add_special_tokens=False).ids == [0, 1, 2]
    assert bundled_tokenizer.get_vocab_size() == 2048
    declared = json.loads((BUNDLED / "special_tokens_map.json").read_text())
    assert list(declared.values()) == names


def test_the_bundled_model_knows_verse_from_noise(bundled_tokenizer):
    verse = bundled_tokenizer.encode("KING:\nMy lord, I will not go to the house of death.\n").ids
    shuffles = [[0, *random.Random(seed).sample(verse[1:], len(verse) - 1)] for seed in range(5)]

    @torch.no_grad()
    def loss(ids: list[int]) -> float:
        row = torch.tensor([ids])
        positions = torch.arange(len(ids))[None]
        logits, _ = network(row, positions, torch.zeros(1, dtype=torch.int64), positions, None)
        return torch.nn.functional.cross_entropy(logits[0, :-1], row[0, 1:]).item()

    network = load_checkpoint(BUNDLED)
    # The same words in another order are as frequent as before: only their order is worse.
    assert loss(verse) < 5
    assert all(loss(verse) + 1.5 < loss(shuffled) for shuffled in shuffles)
