"""Optimization profiles of an engine, from the step contract and the bundle's limits."""

from __future__ import annotations

from dataclasses import dataclass

from model.contract import TensorSpec
from runtime.backends.base import Limits
from runtime.engines.decode_graph import EngineInterface

# What a profile is tuned for where its range is wide: one sequence, a short prompt.
TYPICAL_INPUT_LEN = 128


@dataclass(frozen=True, kw_only=True)
class Range:
    """Smallest, typical and largest value of one dynamic size."""

    min: int
    opt: int
    max: int


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One optimization profile: its name and the range of every dynamic size by its letter."""

    name: str
    sizes: dict[str, Range]

    def shapes(self, spec: TensorSpec) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Smallest, typical and largest shape of an input."""
        ranges = [
            self.sizes[size] if isinstance(size, str) else Range(min=size, opt=size, max=size)
            for size in spec.shape
        ]
        return (
            tuple(r.min for r in ranges),
            tuple(r.opt for r in ranges),
            tuple(r.max for r in ranges),
        )

    def as_dict(self, contract: EngineInterface) -> dict[str, object]:
        """JSON-ready form with the shapes of all inputs, as the manifest stores it."""
        return {
            "name": self.name,
            "inputs": {
                spec.name: [list(shape) for shape in self.shapes(spec)] for spec in contract.inputs
            },
        }


def step_profiles(limits: Limits) -> tuple[Profile, ...]:
    """The decode profile (one token) and the prefill profile (1 to `max_input_len` tokens).

    Two profiles, because kernels chosen for a wide range of lengths are slow at one token. M, the
    number of logits, is 1 in decoding and generation's prefill; scoring asks for up to S.
    """
    batch = Range(min=1, opt=1, max=limits.max_batch_size)
    one = Range(min=1, opt=1, max=1)
    longest = limits.max_input_len
    length = Range(min=1, opt=min(TYPICAL_INPUT_LEN, longest), max=longest)
    wanted = Range(min=1, opt=1, max=longest)
    return (
        Profile(name="decode", sizes={"B": batch, "S": one, "M": one}),
        Profile(name="prefill", sizes={"B": batch, "S": length, "M": wanted}),
    )
