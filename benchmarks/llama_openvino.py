"""A Llama with random weights in the shape of a dense Doge, as a model with state for OpenVINO."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
from llama_weights import llama_tensors
from peer_systems import import_peer

from model.config import DogeConfig

# Formats in which matrices are kept; norms are always F32. INT4 has a scale for 128 weights.
FORMATS = ("F32", "INT8", "INT4")
_INT4_GROUP = 128


def write_openvino_llama(path: Path, config: DogeConfig, weight_format: str) -> None:
    """Write the model: the same weights and shape as `write_llama`'s GGUF file.

    Its inputs are `input_ids` [B, S] and `position_ids` [S] (int64) and `beam_idx` [B] (int32), its
    output `logits` [B, 1, vocab] of the last position. Keys and values are state. The nodes stand
    in the form in which OpenVINO's CPU plugin fuses them: attention with its cache, rotary
    embedding, norms (openvino 2026.4; `get_runtime_model` shows it).

    Args:
        path: the file to write, ending in `.xml`; weights go beside it.
        config: the shape.
        weight_format: one of `FORMATS`; of all matrices, the table of tokens included.

    Raises:
        ValueError: a mixture of experts, or an unknown format.
        BackendUnavailableError: openvino or nncf is missing.
    """
    if weight_format not in FORMATS:
        raise ValueError(f"unknown format {weight_format!r}; there are {', '.join(FORMATS)}")
    tensors = llama_tensors(config)
    openvino = import_peer("openvino")
    model = _Writer(openvino, import_peer("openvino.opset13"), config, tensors).write()
    if weight_format != "F32":
        model = _compress(model, weight_format)
    openvino.save_model(model, path, compress_to_fp16=False)


def _compress(model: Any, weight_format: str) -> Any:
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
        nncf = import_peer("nncf")
        if weight_format == "INT8":
            return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
        return nncf.compress_weights(
            model,
            mode=nncf.CompressWeightsMode.INT4_SYM,
            group_size=_INT4_GROUP,
            all_layers=True,
        )


class _Writer:
    """Writes the network's nodes."""

    def __init__(
        self, openvino: Any, ops: Any, config: DogeConfig, tensors: dict[str, Any]
    ) -> None:
        self._ov = openvino
        self._ops = ops
        self._config = config
        self._tensors = tensors
        self._sinks: list[Any] = []

    def write(self) -> Any:
        """The whole model."""
        ops, config = self._ops, self._config
        ids = ops.parameter([-1, -1], np.int64, name="input_ids")
        positions = ops.parameter([-1], np.int64, name="position_ids")
        beam = ops.parameter([-1], np.int32, name="beam_idx")
        for node in (ids, positions, beam):
            node.output(0).set_names({node.friendly_name})
        x = ops.gather(self._constant("token_embd"), ids, 0)
        self._beam = beam
        self._cos, self._sin = self._angles(positions)
        self._mask = self._causal(positions)
        for index in range(config.num_hidden_layers):
            x = ops.add(x, self._attention(self._norm(x, f"blk.{index}.attn_norm"), index))
            x = ops.add(x, self._mlp(self._norm(x, f"blk.{index}.ffn_norm"), index))
        last = ops.gather(x, np.array([-1], np.int64), 1)
        head = "token_embd" if config.tie_word_embeddings else "output"
        logits = self._matmul(self._norm(last, "output_norm"), head)
        logits.output(0).set_names({"logits"})
        result = ops.result(logits)
        return self._ov.Model([result], self._sinks, [ids, positions, beam], "llama")

    def _attention(self, x: Any, index: int) -> Any:
        ops, config = self._ops, self._config
        heads, kv_heads, width = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        layer = f"blk.{index}"
        query = self._rotate(self._heads(self._rotated_matmul(x, f"{layer}.attn_q"), heads))
        key = self._rotate(self._heads(self._rotated_matmul(x, f"{layer}.attn_k"), kv_heads))
        value = self._heads(self._matmul(x, f"{layer}.attn_v"), kv_heads)
        key = self._repeat(self._append(key, f"key.{index}"), heads // kv_heads)
        value = self._repeat(self._append(value, f"value.{index}"), heads // kv_heads)
        out = ops.scaled_dot_product_attention(
            query, key, value, self._mask, np.float32(width**-0.5), causal=False
        )
        out = ops.reshape(
            ops.transpose(out, [0, 2, 1, 3]), np.array([0, 0, heads * width]), special_zero=True
        )
        return self._matmul(out, f"{layer}.attn_output")

    def _mlp(self, x: Any, index: int) -> Any:
        ops = self._ops
        gate = ops.swish(self._matmul(x, f"blk.{index}.ffn_gate"))
        up = self._matmul(x, f"blk.{index}.ffn_up")
        return self._matmul(ops.multiply(gate, up), f"blk.{index}.ffn_down")

    def _append(self, new: Any, name: str) -> Any:
        """Append keys or values [B, heads, S, width] to the state of that name."""
        ops, config = self._ops, self._config
        heads, width = config.num_key_value_heads, config.head_dim
        batch = ops.shape_of(self._beam)
        empty = ops.broadcast(
            np.float32(0), ops.concat([batch, np.array([heads, 0, width], np.int64)], 0)
        )
        shape = self._ov.PartialShape([-1, heads, -1, width])
        info = self._ov.op.util.VariableInfo()
        info.data_shape = shape
        info.data_type = self._ov.Type.f32
        info.variable_id = name
        variable = self._ov.op.util.Variable(info)
        past = ops.read_value(empty, variable)
        present = ops.concat([ops.gather(past, self._beam, 0), new], 2)
        self._sinks.append(ops.assign(present, variable))
        return present

    def _repeat(self, x: Any, times: int) -> Any:
        """[B, kv heads, T, width] to [B, heads, T, width]."""
        if times == 1:
            return x
        ops, config = self._ops, self._config
        kv_heads, width = config.num_key_value_heads, config.head_dim
        wide = ops.unsqueeze(x, 2)
        repeated = ops.broadcast(
            wide, np.array([1, 1, times, 1, 1]), broadcast_spec="BIDIRECTIONAL"
        )
        return ops.reshape(repeated, np.array([0, kv_heads * times, -1, width]), special_zero=True)

    def _heads(self, x: Any, heads: int) -> Any:
        """[B, S, heads * width] to [B, heads, S, width]."""
        split = self._ops.reshape(
            x, np.array([0, 0, heads, self._config.head_dim]), special_zero=True
        )
        return self._ops.transpose(split, [0, 2, 1, 3])

    def _rotate(self, x: Any) -> Any:
        ops, half = self._ops, self._config.head_dim // 2
        first, second = ops.variadic_split(x, 3, [half, half]).outputs()
        turned = ops.concat([ops.multiply(second, np.float32(-1)), first], -1)
        return ops.add(ops.multiply(x, self._cos), ops.multiply(turned, self._sin))

    def _angles(self, positions: Any) -> tuple[Any, Any]:
        """Cosine and sine, each [1, 1, S, width]."""
        ops, config = self._ops, self._config
        powers = np.arange(0, config.head_dim, 2, dtype=np.float32) / config.head_dim
        frequencies = (config.rope_theta**-powers).astype(np.float32)[None]
        at = ops.unsqueeze(ops.convert(positions, np.float32), 1)
        angles = ops.multiply(at, frequencies)
        both = ops.unsqueeze(ops.concat([angles, angles], 1), [0, 1])
        return ops.cos(both), ops.sin(both)

    def _causal(self, positions: Any) -> Any:
        """0 where a position sees a key and the lowest number elsewhere: [1, 1, S, T]."""
        ops = self._ops
        last = ops.gather(positions, np.array(-1, np.int64), 0)
        total = ops.add(last, np.array(1, np.int64))
        keys = ops.range(np.array(0, np.int64), total, np.array(1, np.int64), "i64")
        seen = ops.less_equal(ops.unsqueeze(keys, 0), ops.unsqueeze(positions, 1))
        mask = ops.select(seen, np.float32(0), np.finfo(np.float32).min)
        return ops.unsqueeze(mask, [0, 1])

    def _norm(self, x: Any, name: str) -> Any:
        ops = self._ops
        mean = ops.reduce_mean(ops.power(x, np.float32(2)), [-1], keep_dims=True)
        root = ops.sqrt(ops.add(mean, np.float32(self._config.rms_norm_eps)))
        return ops.multiply(ops.multiply(x, ops.divide(np.float32(1), root)), self._constant(name))

    def _matmul(self, x: Any, name: str) -> Any:
        return self._ops.matmul(x, self._constant(name), False, True)

    def _rotated_matmul(self, x: Any, name: str) -> Any:
        """llama.cpp turns neighbouring rows of a head, this model those half a head apart."""
        weight = self._tensors[f"{name}.weight"]
        pairs = weight.reshape(-1, self._config.head_dim // 2, 2, weight.shape[1])
        apart = pairs.swapaxes(1, 2).reshape(weight.shape)
        return self._ops.matmul(x, np.ascontiguousarray(apart), False, True)

    def _constant(self, name: str) -> Any:
        return self._ops.constant(self._tensors[f"{name}.weight"])
