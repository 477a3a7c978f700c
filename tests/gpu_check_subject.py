"""Subjects of a GPU check that are small enough for the interpreter."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from plugins.registry import OPS
from runtime.backends.base import Limits
from runtime.bundle import Bundle
from runtime.gpu_checks.section import CheckedBundle, Deadline, Rhythm, Subject
from runtime.kernel_library import KernelLibrary, OpUse
from tests.fake_bundle import CONFIG, fake_manifest, write_fake_bundle
from tests.host_device import HostDevice

SLOTS = 24
LIMITS = Limits(max_batch_size=2, max_input_len=12, max_seq_len=SLOTS)
# As often as is needed to see that all of it works.
ONCE = Rhythm(target_ms=0, least=1, most=1, sets=3, warmup=0, replays=2)


def attention_use(dtype: str = "float16", *, window: int = 8, shared: bool = False) -> OpUse:
    Nq, Nkv, N, D = 4, 2, 2, 16
    return _use(
        "DynamicMaskAttention",
        {"scale": 0.25, "keep_window_size": window},
        {
            "query": (-1, Nq, -1, D),
            "key": (-1, Nkv, SLOTS, D),
            "value": (-1, Nkv, SLOTS, D),
            "score": (1 if shared else -1, N, SLOTS, 1),
            "write_index": (-1,),
            "attention_output": (-1, -1, Nq * D),
        },
        dtype,
    )


def expert_use(dtype: str = "float16", *, n: int = 4, top_k: int = 4, hidden: int = 16) -> OpUse:
    return _use(
        "ExpertGather",
        {"top_k": top_k, "weight_inside": 0, "normalize": 0},
        {
            "hidden": (-1, hidden),
            "scores_x": (-1, 1, n),
            "scores_y": (-1, 1, n),
            "down": (n**2, hidden),
            "up": (n**2, hidden),
            "expert_output": (-1, hidden),
        },
        dtype,
    )


def value_use(dtype: str = "float16") -> OpUse:
    return _use(
        "ValueGather",
        {"top_k": 2, "subset_sums": 0},
        {"scores": (-1, 2, 5), "table": (5, 16), "inner_values": (-1, 16)},
        dtype,
    )


def _use(
    op: str, attributes: dict[str, int | float], shapes: dict[str, tuple[int, ...]], dtype: str
) -> OpUse:
    (custom,) = (custom for custom in OPS if custom.name == op)
    special = dict.fromkeys(custom.integer_inputs, "int64")
    special |= dict.fromkeys(custom.exact_inputs, "float32")
    dtypes = {name: special.get(name, dtype) for name in shapes}
    return OpUse(op=op, attributes=attributes, shapes=shapes, dtypes=dtypes, nodes=3)


def checked_bundle(
    folder: Path, uses: Sequence[OpUse], limits: Limits = LIMITS, name: str = "tiny"
) -> CheckedBundle:
    """A bundle of a few bytes whose library has these uses and no cubins."""
    config = dataclasses.replace(CONFIG, max_position_embeddings=limits.max_seq_len)
    bundle = Bundle.open(write_fake_bundle(folder, fake_manifest(config, limits)))
    library = KernelLibrary(
        folder=folder / "kernels", triton_version="3.9.0", uses=tuple(uses), entries=()
    )
    return CheckedBundle(name=name, bundle=bundle, library=library)


def subject_of(
    device: HostDevice, *bundles: CheckedBundle, seconds: float = 600.0, seed: int = 7
) -> Subject:
    return Subject(
        device=device,
        bundles=bundles,
        launchers={bundle.name: device.open_launcher(bundle.library) for bundle in bundles},
        seed=seed,
        deadline=Deadline(seconds),
        rhythm=ONCE,
    )
