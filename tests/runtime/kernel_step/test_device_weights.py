"""The copy of the packed weights on the device."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from export.step_weights import step_model_of, write_step_weights
from model.checkpoint import load_checkpoint
from runtime.gpu.cuda_runtime import CudaRuntime
from runtime.kernel_step import device_weights
from runtime.kernel_step.device_weights import DeviceWeights
from runtime.kernel_step.formats import StepFormats
from runtime.kernel_step.packed_weights import PackedWeights
from tests.fake_tensorrt.cuda import FakeCuda, Status
from tests.tiny_doge import write_checkpoint


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    network = load_checkpoint(write_checkpoint(folder, num_hidden_layers=1))
    model, formats = step_model_of(network, 16), StepFormats.of("int4")
    write_step_weights(folder / "packed.safetensors", network, model, formats)
    return PackedWeights(folder / "packed.safetensors", model, formats)


@pytest.mark.parametrize("piece", [100, 1 << 20])
def test_every_tensor_lies_on_the_device_byte_for_byte(packed, monkeypatch, piece):
    """In pieces of a tensor, and whole."""
    monkeypatch.setattr(device_weights, "_PIECE", piece)
    cuda = FakeCuda()
    weights = DeviceWeights(CudaRuntime(cuda), packed)
    for name, array in packed.arrays():
        found = (ctypes.c_uint8 * array.nbytes).from_address(weights.address(name))
        assert bytes(found) == np.ascontiguousarray(array).tobytes(), name
    assert weights.address("layers.0.no_such_tensor") == 0
    assert cuda.ledger.live == {"device memory": 1}
    weights.close()
    weights.close()
    assert (cuda.ledger.violations, cuda.ledger.live, cuda.used_bytes) == ([], {}, 0)


@pytest.mark.parametrize("call", ["cudaMemcpyAsync", "cudaStreamSynchronize"])
def test_copy_that_fails_leaves_nothing_behind(packed, call):
    cuda = FakeCuda()
    cuda.failures[call] = Status.cudaErrorIllegalAddress
    with pytest.raises(RuntimeError, match=f"{call} failed: cudaErrorIllegalAddress"):
        DeviceWeights(CudaRuntime(cuda), packed)
    assert (cuda.ledger.violations, cuda.ledger.live, cuda.used_bytes) == ([], {}, 0)
