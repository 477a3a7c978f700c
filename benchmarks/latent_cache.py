"""Attention of a seed decode step with one latent cache against keys and values by head.

The seed's keys are not rotated, and its values are its normed input times a constant, so one row of
all H·D channels could stand for both. Each head would then attend over all channels. This times
ONNX Runtime's Attention in both forms, interleaved, in float32 on one thread.

    python benchmarks/latent_cache.py
"""

from __future__ import annotations

import statistics
import time

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

HEAD_DIM = 128
SHAPES = {"doge-22m": 2, "doge-76m": 4, "doge-197m": 6}  # heads
CONTEXTS = (512, 2048, 4096)
ROUNDS = 40


def session(
    heads: int, head_dim: int, cached_heads: int, slots: int, *, latent: bool
) -> onnxruntime.InferenceSession:
    """One Attention node for a step of one token; a latent cache serves as keys and values."""
    shapes = {
        "query": [1, heads, 1, head_dim],
        "key": [1, cached_heads, slots, head_dim],
        "value": [1, cached_heads, slots, head_dim],
        "bias": [1, 1, 1, slots],
    }
    names = [name for name in shapes if not (latent and name == "value")]
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shapes[n]) for n in names]
    reads = ["query", "key", "key" if latent else "value", "bias"]
    node = helper.make_node("Attention", reads, ["attended"], scale=head_dim**-0.5)
    output = helper.make_tensor_value_info("attended", TensorProto.FLOAT, None)
    model = helper.make_model(
        helper.make_graph([node], "attention", inputs, [output]),
        opset_imports=[helper.make_opsetid("", 24)],
        ir_version=11,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def main() -> None:
    """Print the median time of both forms and their ratio."""
    generator = np.random.default_rng(0)
    print(f"onnx {onnx.__version__}, onnxruntime {onnxruntime.__version__}, one thread")
    for name, heads in SHAPES.items():
        for slots in CONTEXTS:
            forms = {
                "by head": session(heads, HEAD_DIM, heads, slots, latent=False),
                "latent": session(heads, HEAD_DIM * heads, 1, slots, latent=True),
            }
            feeds = {
                form: {
                    value.name: generator.standard_normal(value.shape).astype(np.float32)
                    for value in made.get_inputs()
                }
                for form, made in forms.items()
            }
            times: dict[str, list[float]] = {form: [] for form in forms}
            for _ in range(ROUNDS):
                for form, made in forms.items():
                    begin = time.perf_counter()
                    made.run(None, feeds[form])
                    times[form].append(time.perf_counter() - begin)
            by_head, latent = (statistics.median(times[form]) * 1e6 for form in forms)
            print(
                f"{name:10} {slots:5} keys: by head {by_head:7.0f} us, latent {latent:7.0f} us, "
                f"ratio {latent / by_head:.2f}"
            )


if __name__ == "__main__":
    main()
