"""Memory that is asked for beforehand is what is then allocated."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from model.contract import TensorSpec
from runtime.backends.base import Limits
from runtime.engines.cache_memory import CacheMemory, cache_bytes, row_bytes
from runtime.engines.token_block import TokenBlock, token_block_bytes
from runtime.gpu.cuda_runtime import CudaRuntime
from tests.fake_tensorrt.cuda import FakeCuda

KEYS = TensorSpec(name="key", dtype="float16", shape=("B", 2, 64, 32))
SCORES = TensorSpec(name="score", dtype="float32", shape=("B", 2, 50, 1))
IDS = TensorSpec(name="input_ids", dtype="int64", shape=("B", "S"))
WANTED = TensorSpec(name="logits_index", dtype="int64", shape=("B", "M"))


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    fake = FakeCuda()
    yield fake
    assert fake.ledger.live == {}


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_cache_takes_what_was_said(cuda: FakeCuda, rows: int) -> None:
    memory = CacheMemory(CudaRuntime(cuda), [KEYS, SCORES], rows)
    assert cuda.used_bytes == cache_bytes([KEYS, SCORES], rows)
    one_row = 400 if rows > 1 else 0  # of scores, for rows that run alone
    assert cuda.used_bytes == rows * (2 * 64 * 32 * 2 + 400) + one_row
    memory.close()
    memory.close()
    assert cuda.used_bytes == 0


def test_only_tensors_whose_row_begins_at_no_multiple_of_256_are_copied(cuda: FakeCuda) -> None:
    memory = CacheMemory(CudaRuntime(cuda), [KEYS, SCORES], 3)
    whole, first, second = (memory.place(row) for row in (None, 0, 1))
    assert whole.copies == first.copies == ()
    assert first.addresses == whole.addresses
    assert second.addresses[0] == whole.addresses[0] + row_bytes(KEYS)
    assert second.copies == ((whole.addresses[1] + 400, second.addresses[1], 400),)
    memory.close()


def test_inputs_of_a_step_lie_side_by_side_and_aligned(cuda: FakeCuda) -> None:
    limits = Limits(max_batch_size=3, max_input_len=40, max_seq_len=64)
    block = TokenBlock(CudaRuntime(cuda), [IDS, WANTED], limits)
    assert cuda.used_bytes == token_block_bytes([IDS, WANTED], limits)
    placed = block.place(2, 40, 1)
    assert placed.shapes == ((2, 40), (2, 1))
    assert [array.shape for array in placed.arrays] == [(2, 40), (2, 1)]
    assert placed.addresses[1] - placed.addresses[0] == 768  # 640 bytes of ids
    assert placed.size == 768 + 256
    block.place(3, 40, 40)
    with pytest.raises(ValueError, match="the tokens of a step, on their way"):
        block.place(4, 40, 40)
    block.close()
