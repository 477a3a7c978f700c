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

from model.training import Trainer, TrainingConfig, save_checkpoint


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command's flags; those of training take their defaults from `TrainingConfig`."""
    parser = argparse.ArgumentParser(
        prog="train_tiny",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text to train on")
    parser.add_argument("--output", type=Path, required=True, help="checkpoint folder to write")
    for field in dataclasses.fields(TrainingConfig):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=type(field.default),
            default=field.default,
            help=" ",
        )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Train and print the result as one JSON object; each new best checkpoint is saved at once."""
    args = parse_args(argv)
    names = [field.name for field in dataclasses.fields(TrainingConfig)]
    try:
        config = TrainingConfig(**{name: getattr(args, name) for name in names})
        args.output.mkdir(parents=True, exist_ok=True)
        trainer = Trainer(args.text.read_text(encoding="utf-8"), config)
    except (OSError, ValueError) as error:
        print(f"train_tiny: {error}", file=sys.stderr)
        return 1
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=config.steps)

        def on_step(step: int, loss: float, validation: float | None) -> None:
            progress.update(task, completed=step, description=f"step {step}, loss {loss:.3f}")
            if validation is not None:
                console.print(f"step {step}: train {loss:.3f}, validation {validation:.3f}")

        result = trainer.run(on_step, on_best=lambda: save_checkpoint(trainer, args.output))
    print(json.dumps(dataclasses.asdict(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
