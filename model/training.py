"""Train a small Doge with its own tokenizer on one text, on a CPU.

Serves the bundled tiny checkpoint. Windows are longer than the keep window, so the selection of
keys runs in training as it does in generation.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn

from model.config import DogeConfig
from model.doge import DogeForCausalLM
from model.generations.g4 import G4
from model.step_ops import Tap, no_tap
from model.weight_files import WEIGHTS_NAME

BOS, EOS, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"
# What goes into the residual stream, by the last part of its tap's name.
_DROPPED = ("embedding", "attention_output", "mlp_output")
CHECKPOINT_FILES = (
    "config.json",
    "generation_config.json",
    WEIGHTS_NAME,
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How to train. Each field has a command-line flag of the same name.

    Attributes:
        steps: optimizer steps.
        long_steps: how many of them, at the end, run on windows of the full context.
        window: tokens of a window before that.
        batch_tokens: tokens of a step.
        learning_rate: its peak, after the warm-up; it decays as a cosine to a tenth.
        weight_decay: on matrices only.
        dropout: share of the embedding and of each block's output that a step leaves out.
        eval_every: steps between two looks at the validation text.
        vocab_size: tokens of the byte-level BPE.
        seed: of weights, windows and dropout.
    """

    steps: int = 1200
    long_steps: int = 200
    window: int = 512
    batch_tokens: int = 4096
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    dropout: float = 0.1
    eval_every: int = 100
    vocab_size: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be at least {least}, got {getattr(self, name)}"
            for name, least in (
                ("steps", 1),
                ("long_steps", 0),
                ("window", 8),
                ("batch_tokens", 8),
                ("eval_every", 1),
                ("vocab_size", 300),
            )
            if getattr(self, name) < least
        ]
        if not 0 < self.learning_rate < 1:
            problems.append(f"learning_rate must be between 0 and 1, got {self.learning_rate}")
        problems += [
            f"{name} must be at least 0 and below 1, got {getattr(self, name)}"
            for name in ("weight_decay", "dropout")
            if not 0 <= getattr(self, name) < 1
        ]
        if self.batch_tokens < self.window:
            problems.append(
                f"batch_tokens ({self.batch_tokens}) must cover one window ({self.window})"
            )
        if problems:
            raise ValueError("invalid TrainingConfig: " + "; ".join(problems))


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a training gave; losses are nats per token.

    Attributes:
        steps: optimizer steps done.
        best_step: the step whose weights were kept.
        train_loss: on the text's first nine tenths, with the weights of `best_step`.
        validation_loss: on its last tenth, likewise.
        parameters: unique parameters.
        seconds: wall time.
    """

    steps: int
    best_step: int
    train_loss: float
    validation_loss: float
    parameters: int
    seconds: float


def tiny_config(vocab_size: int) -> DogeConfig:
    """The bundled checkpoint's architecture: dynamic mask and mixture of experts, 1.1 M numbers."""
    return DogeConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        keep_window_size=256,
        is_moe=True,
        num_experts=256,
        num_experts_per_tok=8,
        router_mode="per_token",
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )


def read_text(path: Path) -> str:
    """The text to train on.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not UTF-8.
    """
    if not path.is_file():
        kind = "is not a file" if path.exists() else "does not exist"
        raise FileNotFoundError(f"text {path} {kind}; give a UTF-8 text file with --text")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"text {path} is not UTF-8 (byte {error.start}: {error.reason}); convert it first"
        ) from error


def train_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    """A byte-level BPE with Doge's special tokens in front; it prepends begin-of-text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0)]
    )
    return tokenizer


def new_network(config: DogeConfig, seed: int) -> DogeForCausalLM:
    """A network ready for training.

    A starts at 1 instead of the published 0, at which every key scores the same and nothing can be
    learned from the mask; dt_proj starts wide enough that scores differ.
    """
    generator = torch.Generator().manual_seed(seed)
    network = DogeForCausalLM(config, G4)
    for name, parameter in network.named_parameters():
        if name.endswith("self_attn.A"):
            nn.init.ones_(parameter)
        elif name.endswith("dt_proj.weight"):
            nn.init.normal_(parameter, std=0.2, generator=generator)
        elif parameter.dim() > 1:
            std = 0.02
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= math.sqrt(2 * config.num_hidden_layers)
            nn.init.normal_(parameter, std=std, generator=generator)
    return network


class Trainer:
    """One training run over one text."""

    def __init__(self, text: str, config: TrainingConfig) -> None:
        """Train the tokenizer and split the text: the last tenth is for validation.

        Raises:
            ValueError: the text is too short for the context it is to be trained on.
        """
        if not text:
            raise ValueError("the text is empty; give a longer text")
        self.config = config
        cut = len(text) * 9 // 10
        self.tokenizer = train_tokenizer(text[:cut], config.vocab_size)
        self.doge = tiny_config(self.tokenizer.get_vocab_size())
        self._train = self._encode(text[:cut])
        self._validation = self._encode(text[cut:])
        context = self.doge.max_position_embeddings
        longest = context if config.long_steps else config.window
        shortest = min(len(self._train), len(self._validation))
        if shortest < longest:
            raise ValueError(
                f"the text is too short: its smaller part has {shortest} tokens and a window needs "
                f"{longest}; give a longer text"
            )
        self.network = new_network(self.doge, config.seed)
        self._generator = torch.Generator().manual_seed(config.seed)

    def run(
        self,
        on_step: Callable[[int, float, float | None], None],
        on_best: Callable[[], None],
    ) -> TrainingResult:
        """Train, and keep the weights of the best validation loss in `network`.

        Args:
            on_step: told each step's number, training loss, and validation loss where measured.
            on_best: called while `network` holds the best weights so far.
        """
        begin = time.perf_counter()
        optimizer = self._optimizer()
        best_loss, best_step = math.inf, 0
        best_weights: dict[str, Tensor] = {}
        for step in range(1, self.config.steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = self._learning_rate(step)
            loss = self._step(optimizer, step)
            validation = None
            if step % self.config.eval_every == 0 or step == self.config.steps:
                validation = self.evaluate()
                if validation < best_loss:
                    best_loss, best_step = validation, step
                    best_weights = {k: v.clone() for k, v in self.network.state_dict().items()}
                    on_best()
            on_step(step, loss, validation)
        if not best_weights:
            raise ValueError("the loss is not a number; lower --learning-rate")
        self.network.load_state_dict(best_weights)
        return TrainingResult(
            steps=self.config.steps,
            best_step=best_step,
            train_loss=self._mean_loss(self._train),
            validation_loss=best_loss,
            parameters=sum(p.numel() for p in self.network.parameters()),
            seconds=time.perf_counter() - begin,
        )

    def evaluate(self) -> float:
        """Loss per token of the validation text."""
        return self._mean_loss(self._validation)

    @torch.no_grad()
    def _mean_loss(self, tokens: Tensor) -> float:
        """Loss per token of a text, cut into windows of the longest that training uses."""
        window = self.doge.max_position_embeddings if self.config.long_steps else self.config.window
        rows = tokens[: len(tokens) // window * window].view(-1, window)
        batches = torch.split(rows, max(1, self.config.batch_tokens // window))
        return sum(self._loss(batch).item() * len(batch) for batch in batches) / len(rows)

    def _encode(self, text: str) -> Tensor:
        return torch.tensor(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def _optimizer(self) -> torch.optim.AdamW:
        matrices = [p for p in self.network.parameters() if p.dim() > 1]
        vectors = [p for p in self.network.parameters() if p.dim() <= 1]
        groups: list[dict[str, Any]] = [
            {"params": matrices, "weight_decay": self.config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.config.learning_rate, betas=(0.9, 0.95))

    def _learning_rate(self, step: int) -> float:
        warmup = max(1, min(100, self.config.steps // 10))
        if step <= warmup:
            return self.config.learning_rate * step / warmup
        part = (step - warmup) / max(1, self.config.steps - warmup)
        return self.config.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * part)))

    def _step(self, optimizer: torch.optim.AdamW, step: int) -> float:
        config = self.config
        long = step > config.steps - config.long_steps
        window = self.doge.max_position_embeddings if long else config.window
        targets = self._windows(window, max(1, config.batch_tokens // window))
        loss = self._loss(targets, self._drop)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    def _windows(self, window: int, count: int) -> Tensor:
        """[count, window] random windows of the training text."""
        last = len(self._train) - window
        starts = torch.randint(0, last + 1, (count,), generator=self._generator)
        return torch.stack([self._train[start : start + window] for start in starts])

    def _drop(self, value: Tensor, name: str) -> Tensor:
        """Dropout, as a tap: training is regularised, the network itself knows nothing of it."""
        rate = self.config.dropout
        if rate == 0 or name.rpartition(".")[-1] not in _DROPPED:
            return value
        kept = torch.rand(value.shape, generator=self._generator) >= rate
        return value * kept / (1 - rate)

    def _loss(self, targets: Tensor, tap: Tap = no_tap) -> Tensor:
        """Mean loss of predicting each token of [B, S] from begin-of-text and those before it."""
        B, S = targets.shape
        bos = torch.full((B, 1), self.doge.bos_token_id or 0)
        positions = torch.arange(S).expand(B, S)
        start = torch.zeros(B, dtype=torch.int64)
        inputs = torch.cat([bos, targets[:, :-1]], dim=1)
        logits, _ = self.network(inputs, positions, start, positions, None, tap)
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def check_output(folder: Path) -> None:
    """Check that `folder` is free to become a checkpoint: absent, empty, or an earlier one.

    Raises:
        ValueError: it is a file, or holds something that a checkpoint does not.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output {folder} is a file; give a folder")
    known = {*CHECKPOINT_FILES, "README.md"}
    foreign = sorted(p.name for p in folder.glob("*") if p.name not in known)
    if foreign:
        raise ValueError(
            f"output {folder} holds {', '.join(foreign[:5])}, which is no part of a checkpoint; "
            "give a new folder"
        )


def save_checkpoint(trainer: Trainer, folder: Path) -> None:
    """Write network and tokenizer as a checkpoint folder.

    All files are written beside the folder before the first one moves in. A README.md that is
    there stays.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.contiguous() for k, v in trainer.network.state_dict().items()}
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as name:
        work = Path(name) / folder.name
        work.mkdir()
        save_file(tensors, work / WEIGHTS_NAME, metadata={"format": "pt"})
        trainer.tokenizer.save(str(work / "tokenizer.json"), pretty=False)
        for file_name, content in _json_files(trainer.doge):
            (work / file_name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        # safetensors writes a file that only its owner may read.
        (work / WEIGHTS_NAME).chmod((work / "config.json").stat().st_mode)
        if not folder.exists():
            work.rename(folder)
            return
        for file in work.iterdir():
            file.replace(folder / file.name)


def _json_files(doge: DogeConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    ids = {
        "bos_token_id": doge.bos_token_id,
        "eos_token_id": doge.eos_token_id,
        "pad_token_id": doge.pad_token_id,
    }
    config = doge.as_dict()
    config["doge_router_mode"] = config.pop("router_mode")
    rope = {"rope_theta": config.pop("rope_theta"), "rope_type": "default"}
    fixed = {"architectures": ["DogeForCausalLM"], "model_type": "doge", "hidden_act": "silu"}
    yield "config.json", {**fixed, **config, "rope_parameters": rope, "dtype": "float32"}
    yield "generation_config.json", ids
    tokens = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    yield "special_tokens_map.json", tokens
    yield (
        "tokenizer_config.json",
        {
            **tokens,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": doge.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
        },
    )
