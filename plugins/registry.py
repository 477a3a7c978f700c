"""All custom ops, by their ONNX name. Importing this module needs neither PyTorch nor ONNX."""

from __future__ import annotations

from plugins.custom_op import CustomOp, Tolerance

DYNAMIC_MASK_ATTENTION = CustomOp(
    name="DynamicMaskAttention",
    inputs=("query", "key", "value", "score", "write_index"),
    outputs=("attention_output",),
    attributes={"scale": "FLOAT", "keep_window_size": "INT"},
    integer_inputs=("write_index",),
    exact_inputs=("score",),
    output_shape=("query.0", "query.2", "query.1 * query.3"),
    definition="plugins.dynamic_mask_attention.op:dynamic_mask_attention_definition",
    torch_op="doge::dynamic_mask_attention",
    function="plugins.dynamic_mask_attention.function:make_function",
    kernels="plugins.dynamic_mask_attention.launches:make_kernels",
    # float32: sums over D and C in another order. float16: one rounding of q·k, of the bias and of
    # the result (2^-11 relative each), the bias reaching single digits in the tests.
    tolerances={
        "float32": Tolerance(atol=2e-5, rtol=2e-5),
        "float16": Tolerance(atol=1e-2, rtol=1e-2),
    },
)

EXPERT_GATHER = CustomOp(
    name="ExpertGather",
    inputs=("hidden", "scores_x", "scores_y", "down", "up"),
    outputs=("expert_output",),
    attributes={"top_k": "INT", "weight_inside": "INT", "normalize": "INT"},
    output_shape=("hidden.0", "hidden.1"),
    definition="plugins.expert_gather.op:expert_gather_definition",
    torch_op="doge::expert_gather",
    function="plugins.expert_gather.function:make_function",
    kernels="plugins.expert_gather.launches:make_kernels",
    tolerances={
        "float32": Tolerance(atol=2e-5, rtol=2e-5),
        "float16": Tolerance(atol=2e-2, rtol=2e-2),
    },
)

VALUE_GATHER = CustomOp(
    name="ValueGather",
    inputs=("scores", "table"),
    outputs=("inner_values",),
    attributes={"top_k": "INT", "subset_sums": "INT"},
    output_shape=("scores.0", "table.1"),
    definition="plugins.value_gather.op:value_gather_definition",
    torch_op="doge::value_gather",
    function="plugins.value_gather.function:make_function",
    kernels="plugins.value_gather.launches:make_kernels",
    # Sums of R·K rows in another order; float16 rounds each partial sum (2^-11 relative).
    tolerances={
        "float32": Tolerance(atol=1e-6, rtol=1e-6),
        "float16": Tolerance(atol=1e-2, rtol=1e-2),
    },
)

OPS: tuple[CustomOp, ...] = (DYNAMIC_MASK_ATTENTION, EXPERT_GATHER, VALUE_GATHER)
