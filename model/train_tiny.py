"""Train the bundled tiny checkpoint: python model/train_tiny.py --text FILE --output DIR."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from model.training import (
    Trainer,
    TrainingConfig,
    TrainingResult,
    check_output,
    read_text,
    save_checkpoint,
)

HELP = {
    "steps": "optimizer steps",
    "long_steps": "how many of them, at the end, use windows of the whole context",
    "window": "tokens of a window before that",
    "batch_tokens": "tokens of a step",
    "learning_rate": "peak learning rate",
    "weight_decay": "weight decay of matrices",
    "dropout": "dropout of the embedding and of each block's output",
    "eval_every": "steps between two looks at the validation text",
    "vocab_size": "tokens of the byte-level BPE",
    "seed": "of weights, windows and dropout",
}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command's flags; those of training take their defaults from `TrainingConfig`."""
    parser = argparse.ArgumentParser(
        prog="train_tiny",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text to train on")
    parser.add_argument("--output", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    for field in dataclasses.fields(TrainingConfig):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=type(field.default),
            default=field.default,
            help=HELP[field.name],
        )
    return parser.parse_args(argv)


def train(trainer: Trainer, output: Path, *, quiet: bool) -> TrainingResult:
    """Train with a progress bar on stderr; each new best checkpoint is saved at once."""
    console = Console(stderr=True, quiet=quiet)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=trainer.config.steps)

        def on_step(step: int, loss: float, validation: float | None) -> None:
            progress.update(task, completed=step, description=f"step {step}, loss {loss:.3f}")
            if validation is not None:
                console.print(f"step {step}: train {loss:.3f}, validation {validation:.3f}")

        return trainer.run(on_step, on_best=lambda: save_checkpoint(trainer, output))


def main(argv: Sequence[str] | None = None) -> int:
    """Train and print the result as one line of JSON."""
    args = parse_args(argv)
    names = [field.name for field in dataclasses.fields(TrainingConfig)]
    try:
        config = TrainingConfig(**{name: getattr(args, name) for name in names})
        check_output(args.output)
        result = train(Trainer(read_text(args.text), config), args.output, quiet=args.quiet)
    except (OSError, ValueError) as error:
        print(f"train_tiny: {error}", file=sys.stderr)
        return 1
    print(json.dumps(dataclasses.asdict(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
