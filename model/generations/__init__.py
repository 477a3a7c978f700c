"""The published generations of Doge that a checkpoint can belong to; none needs PyTorch."""

from model.generations.g1 import G1
from model.generations.g2 import G2, G2_FIRST
from model.generations.g3 import G3
from model.generations.g4 import G4
from model.generations.g4h import G4H
from model.generations.generation import Generation, detect_generation, generation_named

GENERATIONS: tuple[Generation, ...] = (G1, G2_FIRST, G2, G3, G4H, G4)

__all__ = ["GENERATIONS", "Generation", "detect_generation", "generation_named"]
