"""What a build will give, from a config alone: sizes, cache, and the bandwidth floor."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from export.engine_config import DTYPES, EngineConfig
from export.lowerings.engine_weights import format_in_engine, narrow_bytes, weight_format
from model.config import DogeConfig
from model.contract import DTYPE_BYTES, step_contract
from model.generations import Generation
from runtime.roofline import weight_numbers_per_step

# Memory bandwidth of an RTX 4090 by NVIDIA's data sheet: 384 bits at 21 Gbit/s.
RTX_4090_BYTES_PER_SECOND = 1008e9


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Sizes in bytes, times in microseconds.

    Attributes:
        parameters: unique parameters.
        onnx_bytes: weights of the canonical model.
        engine_bytes: weights of the engine; its kernels come on top.
        kv_bytes_per_token: cache of one token of one sequence, in the engine.
        kv_bytes: cache of `max_batch_size` full sequences, in the engine.
        read_bytes_per_token: weights that one decode step reads; of experts and of an untied
            embedding only the rows that it uses.
        floor_us: time to read them and a full sequence's cache once on an RTX 4090; no
            implementation that keeps them in its memory can decode a token faster.
    """

    parameters: int
    onnx_bytes: int
    engine_bytes: int
    kv_bytes_per_token: int
    kv_bytes: int
    read_bytes_per_token: int
    floor_us: float

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)


def estimate(config: DogeConfig, generation: Generation, engine: EngineConfig) -> Estimate:
    """Estimate a build from the shapes of its tensors, all of them counted.

    Rotary tables come on top; what an export leaves out of a seed (its stored mask, for one) is
    known only from the weights.
    """
    shapes = generation.tensor_shapes(config)
    parameters = sum(prod(shape) for shape in shapes.values())
    item = DTYPE_BYTES[DTYPES[engine.precision]]
    contract = step_contract(
        config,
        generation,
        max_seq_len=engine.max_seq_len,
        cache_dtype=DTYPES[engine.precision],
    )
    per_token = contract.bytes_per_token()
    saved = 0
    if (weights := weight_format(engine.precision)) is not None:
        tied = config.tie_word_embeddings
        saved = sum(
            prod(shape) * item - narrow_bytes(shape, narrow)
            for name, shape in shapes.items()
            if (narrow := format_in_engine(name, shape, weights, tied=tied)) is not None
        )
    read = weight_numbers_per_step(config, generation, 1) * item - saved
    return Estimate(
        parameters=parameters,
        onnx_bytes=parameters * DTYPE_BYTES["float32"],
        engine_bytes=parameters * item - saved,
        kv_bytes_per_token=per_token,
        kv_bytes=per_token * engine.max_seq_len * engine.max_batch_size,
        read_bytes_per_token=read,
        floor_us=(read + per_token * engine.max_seq_len) / RTX_4090_BYTES_PER_SECOND * 1e6,
    )
