"""The header of engines that TensorRT-RTX builds here, for one target and for several."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from runtime.backends.base import BackendUnavailableError
from runtime.bundle import Bundle
from runtime.engines.fit import EngineFit
from runtime.engines.header import (
    HEADER_BYTES,
    TARGET_BITS,
    EngineHeader,
    EngineHeaderError,
    pack_engine_header,
    read_engine_header,
)
from runtime.gpu.cuda_runtime import GpuFacts
from runtime.tensorrt_module import load_tensorrt
from tests.command_calls import build_bundle

pytest.importorskip("tensorrt_rtx")
trt = load_tensorrt("tensorrt_rtx")


def build(targets: tuple[str, ...], size: int = 64) -> bytes:
    """An engine of one product by `size` times `size` float16 weights."""
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network()
    given = network.add_input("x", trt.float16, (1, size))
    weights = np.ones((size, size), np.float16)
    constant = network.add_constant((size, size), trt.Weights(weights))
    none = trt.MatrixOperation.NONE
    product = network.add_matrix_multiply(given, none, constant.get_output(0), none)
    network.mark_output(product.get_output(0))
    config = builder.create_builder_config()
    config.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), index)
    return bytes(builder.build_serialized_network(network, config))


@pytest.mark.parametrize(
    "targets",
    [("sm89",), ("sm86", "sm89"), ("sm80", "sm86", "sm89", "sm120", "sm121"), ("sm75", "sm89")],
    ids="-".join,
)
def test_header_of_an_engine_built_here_has_its_size_version_and_targets(
    targets: tuple[str, ...],
) -> None:
    blob = build(targets)
    header = read_engine_header(blob)
    assert header == read_engine_header(blob[:HEADER_BYTES])
    assert header.file_bytes == len(blob)
    assert header.version == trt.__version__
    assert header.targets == targets
    assert header.unknown_targets == 0


def test_every_architecture_of_the_library_has_its_bit() -> None:
    known = {name.lower() for name in dir(trt.ComputeCapability) if name.startswith("SM")}
    assert known == TARGET_BITS.keys()
    for target, bit in TARGET_BITS.items():
        assert read_engine_header(build((target,))).targets == (target,), bit


def test_weight_bytes_grow_with_the_weights() -> None:
    small, large = (read_engine_header(build(("sm89",), n)).weight_bytes for n in (256, 512))
    assert small >= 2 * 256**2
    assert large - small == pytest.approx(2 * (512**2 - 256**2), rel=0.05)


def test_header_size_is_the_librarys() -> None:
    assert trt.Runtime(trt.Logger(trt.Logger.ERROR)).engine_header_size == HEADER_BYTES


@pytest.mark.slow
def test_engine_of_a_bundle_fits_its_manifest_on_each_of_its_targets_and_on_no_other(
    tiny_dense: Path, tmp_path: Path
) -> None:
    arguments = ("--model", tiny_dense, "--output", tmp_path / "bundle", "--cpu", "none")
    arguments = (*arguments, "--max-seq-len", 64, "--no-sampling-tail")
    build_bundle(*arguments, "--target", "sm86,sm89")
    bundle = Bundle.open(tmp_path / "bundle")
    variant = bundle.variant("tensorrt_rtx")
    fit = EngineFit(trt, "tensorrt_rtx", bundle, variant)
    blob = bundle.executable_file(variant).read_bytes()
    for capability in ((8, 6), (8, 9)):
        gpu = GpuFacts(name="one", compute_capability=capability, driver=(13, 0))
        header = fit.check_blob(blob, gpu)
        assert header is not None
        assert header.targets == ("sm86", "sm89")
    other = GpuFacts(name="other", compute_capability=(12, 0), driver=(13, 0))
    with pytest.raises(BackendUnavailableError, match="was built for sm86, sm89, here is other"):
        fit.check_blob(blob, other)


@pytest.mark.parametrize(
    ("blob", "text"),
    [
        (b"", "it has 0 bytes"),
        (b"vtrt", "it has 4 bytes, an engine of TensorRT-RTX begins with 64"),
        (b"ftrt" + bytes(60), "it begins with b'ftrt'"),
        (b"vtrt" + bytes(60), "it begins with b'vtrt'"),
    ],
)
def test_what_is_no_header_is_refused(blob: bytes, text: str) -> None:
    with pytest.raises(EngineHeaderError, match=text):
        read_engine_header(blob)


def test_a_packed_header_is_read_as_it_was() -> None:
    header = EngineHeader(
        file_bytes=2**40 + 3,
        version="1.7.1.116",
        targets=("sm75", "sm121"),
        unknown_targets=0,
        weight_bytes=2**33,
    )
    assert read_engine_header(pack_engine_header(header)) == header
    more = dataclasses.replace(header, unknown_targets=64)
    assert read_engine_header(pack_engine_header(more)) == more
