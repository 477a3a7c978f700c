"""Attention of a seed decode step with one latent cache against keys and values by head.

The seed's keys are not rotated, and its values are its normed input times a constant, so one row of
all H·D channels could stand for both. Each head would then attend over all channels. This times
ONNX Runtime's Attention in both forms, interleaved, in float32 on one thread, and says whether
TensorRT-RTX has a fused kernel for each.

    python benchmarks/latent_cache.py
"""

from __future__ import annotations

import statistics
import time

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from export.builder_callbacks import BuildLog, make_logger
from export.plan.entries import read_plan
from runtime.tensorrt_module import load_tensorrt

HEAD_DIM = 128
SHAPES = {"doge-22m": 2, "doge-76m": 4, "doge-197m": 6}  # heads
CONTEXTS = (512, 2048, 4096)
ROUNDS = 40


def one_node_model(
    heads: int, head_dim: int, cached_heads: int, slots: int, *, latent: bool, dtype: int
) -> bytes:
    """Attention of a step of one token; a latent cache serves as keys and values."""
    shapes = {
        "query": [1, heads, 1, head_dim],
        "key": [1, cached_heads, slots, head_dim],
        "value": [1, cached_heads, slots, head_dim],
        "bias": [1, heads, 1, slots],
    }
    names = [name for name in shapes if not (latent and name == "value")]
    inputs = [helper.make_tensor_value_info(n, dtype, shapes[n]) for n in names]
    reads = ["query", "key", "key" if latent else "value", "bias"]
    node = helper.make_node("Attention", reads, ["attended"], scale=head_dim**-0.5)
    output = helper.make_tensor_value_info("attended", dtype, shapes["query"])
    model = helper.make_model(
        helper.make_graph([node], "attention", inputs, [output]),
        opset_imports=[helper.make_opsetid("", 24)],
        ir_version=11,
    )
    serialized: bytes = model.SerializeToString()
    return serialized


def session(
    heads: int, head_dim: int, cached_heads: int, slots: int, *, latent: bool
) -> onnxruntime.InferenceSession:
    """The node in ONNX Runtime, float32 on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    model = one_node_model(
        heads, head_dim, cached_heads, slots, latent=latent, dtype=TensorProto.FLOAT
    )
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def fused_kernels(heads: int, head_dim: int, cached_heads: int, *, latent: bool) -> int:
    """Fused attention kernels in TensorRT-RTX's plan of the node, float16 for sm_89."""
    trt = load_tensorrt("tensorrt_rtx")
    log = BuildLog()
    logger = make_logger(trt, log)
    builder = trt.Builder(logger)
    network = builder.create_network()
    parser = trt.OnnxParser(network, logger)
    model = one_node_model(
        heads, head_dim, cached_heads, 2048, latent=latent, dtype=TensorProto.FLOAT16
    )
    if not parser.parse(model):
        raise RuntimeError(f"TensorRT-RTX does not parse the model: {'; '.join(log.errors)}")
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_OUTPUT:
            layer.__class__ = trt.IAttentionOutputLayer
            layer.attention.decomposable = True
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    if builder.build_serialized_network(network, config) is None:
        raise RuntimeError(f"TensorRT-RTX builds no engine: {'; '.join(log.errors)}")
    return sum(entry.is_fused_attention for entry in read_plan(log.messages, 1).entries)


def main() -> None:
    """Print the median time of both forms and their ratio."""
    generator = np.random.default_rng(0)
    print(f"onnx {onnx.__version__}, onnxruntime {onnxruntime.__version__}, one thread")
    for name, heads in SHAPES.items():
        fused = [
            fused_kernels(heads, HEAD_DIM, heads, latent=False),
            fused_kernels(heads, HEAD_DIM * heads, 1, latent=True),
        ]
        print(f"{name:10} fused kernels for sm_89: by head {fused[0]}, latent {fused[1]}")
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
