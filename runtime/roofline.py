"""The floor of a decode step: the bytes that it must read, and how fast this CPU reads memory.

Counted once a step: every number of the weights that a token uses, in the width in which the
variant keeps them, and the cached keys, values and mask scores of the tokens so far. Of a table of
experts, and of an untied embedding, only the rows that are used count; a tied embedding is read as
the head. Not counted: activations, logits, and whatever an implementation reads twice.

A variant whose builder counted the stored tensors says so in its details (`read_bytes_per_token`,
weights of one token, scales of blocks included), and that number is taken; without it the scales
are not counted.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from statistics import median

import numpy as np

from model.config import DogeConfig
from model.generations.generation import Generation
from runtime.bundle import Bundle
from runtime.cpu_threads import usable_cpus
from runtime.manifest import Variant

# Bits of a weight, by the precision that a variant names.
WEIGHT_BITS = {"fp32": 32, "fp16": 16, "bf16": 16, "int8": 8, "fp8": 8, "int4": 4}
# What is read to measure bandwidth, where the size of the last cache is unknown or small.
_LEAST_BUFFER_BYTES = 256 << 20
_PASSES = 5


def weight_numbers_per_step(config: DogeConfig, generation: Generation, batch_size: int) -> int:
    """Numbers of the weights that one step of one token in each of B rows reads.

    Rows of a batch are taken to pick different experts, up to all there are.
    """
    embedding = generation.published_name("model.embed_tokens.weight")
    experts = config.num_cdmmoe_experts if config.is_seed else config.num_experts
    picked = config.num_experts_per_tok
    if config.is_seed:
        picked = config.num_cdmmoe_heads * config.num_cdmmoe_experts_per_head
    total = 0
    for name, shape in generation.tensor_shapes(config).items():
        size = prod(shape)
        if name.endswith((".down_embed.weight", ".up_embed.weight")):
            size = size // experts * min(experts, batch_size * picked)
        elif name == embedding and not config.tie_word_embeddings:
            size = size // config.vocab_size * min(config.vocab_size, batch_size)
        total += size
    return total


def step_bytes(bundle: Bundle, variant: Variant, batch_size: int, context: float) -> float | None:
    """Bytes that a decode step of `variant` must read.

    Args:
        bundle: of the variant.
        variant: its precision, what it caches and, in its details, `read_bytes_per_token` decide.
        batch_size: B.
        context: tokens in each row's cache, the new one included; a mean may be broken. Beyond a
            keep window only so many count.

    Returns:
        None where the width of the weights is unknown.

    Raises:
        ValueError: as `Bundle.contract_of`.
    """
    config = bundle.config
    weights = variant.details.get("read_bytes_per_token")
    if weights is None:
        bits = WEIGHT_BITS.get(variant.precision)
        if bits is None:
            return None
        weights = weight_numbers_per_step(config, bundle.generation, batch_size) * bits / 8
    kept = min(context, config.keep_window_size)
    return float(weights + batch_size * kept * bundle.contract_of(variant).bytes_per_token())


class BandwidthMeter:
    """Measures how fast this CPU's memory can be read, every time it is asked to.

    One measurement is the median of a few passes over a buffer of at least 256 MiB and four times
    the last-level cache, split among the threads; each takes the maximum of its part as int32,
    the simplest reduction that numpy runs at the speed of memory, without holding the interpreter's
    lock.
    """

    def __init__(self, threads: int | None) -> None:
        """Prepare the buffer.

        Args:
            threads: how many read at the same time; None takes one for each usable core.
        """
        self.threads = threads or usable_cpus()
        size = max(_LEAST_BUFFER_BYTES, 4 * (last_cache_bytes() or 0))
        # Written, so that every page is one of its own and not the kernel's page of zeros.
        self._parts = np.array_split(np.ones(size // 4, np.int32), self.threads)
        self._bytes = size
        self._measured: list[float] = []

    def measure(self) -> None:
        """Take one measurement."""
        with ThreadPoolExecutor(self.threads) as pool:
            seconds = []
            for _ in range(_PASSES):
                begin = time.perf_counter()
                list(pool.map(np.max, self._parts))
                seconds.append(time.perf_counter() - begin)
        self._measured.append(self._bytes / median(seconds))

    @property
    def bytes_per_s(self) -> float:
        """Median of the measurements so far, of which there is at least one."""
        return median(self._measured)


def last_cache_bytes() -> int | None:
    """Size of the last-level cache as Linux tells it, None where it does not."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text(encoding="ascii").strip()
        if text[:-1].isdigit() and text[-1] in units:
            sizes.append(int(text[:-1]) * units[text[-1]])
    return max(sizes, default=None)
