"""A stand-in for a GPU, CUDA's runtime and TensorRT, over ONNX Runtime on the CPU; for tests alone.

It shows that the calls are those that the documentation asks for, and that their results are used
rightly. It shows nothing of what a GPU or the real library makes of them.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass

import pytest

from runtime.backends import tensorrt_backend
from runtime.gpu.cuda_runtime import require_gpu
from tests.fake_tensorrt.cuda import FakeCuda
from tests.fake_tensorrt.library import FakeTensorRt


@dataclass
class FakeGpu:
    """One fake machine: its CUDA runtime and both products.

    Attributes:
        cuda: `cuda.bindings.runtime`.
        products: the modules by name.
    """

    cuda: FakeCuda
    products: dict[str, FakeTensorRt]

    @property
    def trt(self) -> FakeTensorRt:
        """TensorRT-RTX."""
        return self.products["tensorrt_rtx"]

    @classmethod
    def install(cls, monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
        """Let the backend find this machine."""
        cuda = FakeCuda()
        names = ("tensorrt_rtx", "tensorrt")
        gpu = cls(cuda, {name: FakeTensorRt(cuda, name) for name in names})

        def load_cuda() -> FakeCuda:
            require_gpu(cuda)
            return cuda

        monkeypatch.setattr(tensorrt_backend, "load_cuda", load_cuda)
        monkeypatch.setattr(tensorrt_backend, "load_tensorrt", gpu.products.__getitem__)
        return gpu

    def check_clean(self) -> None:
        """Nothing lives any more, no memory is taken, and no rule was broken."""
        if self.cuda.ledger.live:
            gc.collect()
        assert self.cuda.ledger.violations == []
        assert self.cuda.ledger.live == {}
        assert self.cuda.used_bytes == 0
