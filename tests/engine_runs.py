"""What tests of engines do with a backend."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import numpy as np

from runtime.backends.base import Backend
from runtime.sampling import SamplingParams
from runtime.session import GenerationSession
from tests.fake_tensorrt import FakeGpu


def prompts(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [rng.integers(3, 2048, length).tolist() for length in lengths]


def generate(
    backend: Backend, ids: Sequence[Sequence[int]], params: SamplingParams
) -> list[list[int]]:
    tokens: list[list[int]] = [[] for _ in ids]
    for event in GenerationSession(backend).generate(ids, params):
        tokens[event.index].append(event.token_id)
    return tokens


def prefill(backend: Backend, cache: Any, *rows: Sequence[int]) -> np.ndarray:
    lengths = np.array([len(row) for row in rows])
    ids = np.zeros((len(rows), lengths.max()), np.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
    return backend.prefill(ids, lengths, cache)


def live(gpu: FakeGpu, kind: str) -> int:
    gc.collect()
    return gpu.cuda.ledger.live.get(kind, 0)
