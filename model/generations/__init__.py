"""The published generations of Doge that a checkpoint can belong to; none needs PyTorch."""

from model.generations.g4 import G4
from model.generations.generation import Generation, detect_generation, generation_named

GENERATIONS: tuple[Generation, ...] = (G4,)

__all__ = ["GENERATIONS", "Generation", "detect_generation", "generation_named"]
