"""One engine of a bundle as it is read, checked before the library sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from runtime.engines.fit import EngineFit
from runtime.engines.runtime_cache import CacheKey, RuntimeCacheFile
from runtime.gpu.cuda_runtime import GpuFacts
from runtime.tensorrt_module import Product

if TYPE_CHECKING:
    from runtime.bundle import Bundle
    from runtime.manifest import Variant


class EngineFile:
    """An engine's bytes and what belongs to them.

    Attributes:
        blob: the engine.
        fit: its checks.
        weight_bytes: device memory that its weights take.
        cache_file: where kernels of an earlier start may be.
    """

    def __init__(
        self,
        trt: Any,
        product: Product,
        gpu: GpuFacts,
        bundle: Bundle,
        variant: Variant,
        blob: bytes,
    ) -> None:
        """Check that it can run here, as far as its header tells.

        Args:
            trt: the TensorRT module.
            product: which it is.
            gpu: where it shall run.
            bundle: where it is from.
            variant: the engine; its path is the file's.
            blob: what the file holds.

        Raises:
            BackendUnavailableError: another version or another GPU.
            ValueError: it is not what the bundle says.
        """
        self.blob = blob
        self.fit = EngineFit(trt, product, bundle, variant)
        header = self.fit.check_blob(blob, gpu)
        self.weight_bytes = len(blob) if header is None else header.weight_bytes
        key = CacheKey(
            product=product,
            version=str(trt.__version__),
            gpu=gpu.file_word,
            target=gpu.target,
            driver="{}.{}".format(*gpu.driver),
            engine=next(f.sha256 for f in bundle.manifest.files if f.path == variant.path),
        )
        self.cache_file = RuntimeCacheFile(bundle.path, key)
