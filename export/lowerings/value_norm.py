"""Lowering for TensorRT of the seed's constant value factor into a norm of its own.

TensorRT-RTX 1.7.1 cannot compile a cache write whose value is an elementwise function of a norm's
output that matrix products read too ("After KGEN: there are uses before defs"). The value of a
seed whose retrieval is a constant, norm(x) · factor, is one: it becomes a second norm of x with the
weight times the factor, which is the same up to a rounding. Drop this once the builder compiles it.
"""

from __future__ import annotations

import onnx_ir as ir

VALUE_SCALE = "value_scale"


def give_values_their_own_norm(model: ir.Model) -> int:
    """Rewrite the canonical model in place, before any other lowering.

    Returns:
        How many layers were rewritten, 0 for a model without constant value factors.

    Raises:
        ValueError: a factor that does not multiply the output of a norm.
    """
    graph = model.graph
    scales = [v for v in graph.initializers.values() if (v.name or "").endswith(f".{VALUE_SCALE}")]
    for scale in scales:
        (product,) = scale.consumers()
        (normed,) = (value for value in product.inputs if value is not scale)
        norm = None if normed is None else normed.producer()
        if product.op_type != "Mul" or norm is None or norm.op_type != "RMSNormalization":
            raise ValueError(f"{scale.name} should multiply a norm's output; {product} reads it")
        _replace(graph, product, norm, scale)
    return len(scales)


def _replace(graph: ir.Graph, product: ir.Node, norm: ir.Node, scale: ir.Value) -> None:
    stream, weight = norm.inputs[0], norm.inputs[1]
    if weight is None or weight.const_value is None or scale.const_value is None:
        raise ValueError(f"{norm.name}: the norm's weight and {scale.name} must be stored")
    name = f"{scale.name}_norm.weight"
    merged = weight.const_value.numpy() * scale.const_value.numpy()
    own = ir.Value(
        name=name,
        type=weight.type,
        shape=weight.shape,
        const_value=ir.tensor(merged, name=name),
    )
    graph.register_initializer(own)
    node = ir.node("RMSNormalization", [stream, own], attributes=dict(norm.attributes))
    result, old = node.outputs[0], product.outputs[0]
    result.name, result.shape, result.type = f"{old.name}.normed", old.shape, old.type
    graph.insert_before(product, node)
    old.replace_all_uses_with(result)
    graph.remove(product, safe=True)
    del graph.initializers[scale.name or ""]
