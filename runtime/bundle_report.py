"""What a bundle holds, from its manifest alone; no model is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from math import prod
from typing import Any

from runtime.bundle import Bundle
from runtime.engines.decode_graph import DECODE_GRAPH, decode_graph_of
from runtime.kernel_step.variant import BACKEND as CUDA_BACKEND
from runtime.manifest import Variant

MIB = 1 << 20


def bundle_report(bundle: Bundle) -> dict[str, Any]:
    """Everything the command shows, JSON-ready.

    Raises:
        ValueError: a variant's details are not what a build writes.
    """
    manifest = bundle.manifest
    return {
        "bundle": str(bundle.path),
        "project_version": manifest.project_version,
        "source": asdict(manifest.source),
        "generation": {"name": bundle.generation.name, "title": bundle.generation.title},
        "layers": bundle.config.num_hidden_layers,
        "parameters": _parameters(bundle),
        "router_mode": manifest.router_mode,
        "limits": asdict(manifest.limits),
        "contract": bundle.contract.as_dict(),
        "files": [asdict(file) for file in manifest.files],
        "bytes": sum(file.bytes for file in manifest.files),
        "variants": [_variant(bundle, variant) for variant in manifest.variants],
        "checks": {name: dict(result) for name, result in manifest.checks.items()},
        "versions": dict(manifest.versions),
    }


def _parameters(bundle: Bundle) -> dict[str, int]:
    """Parameters of the checkpoint by model part; a tied table counts once, as embedding."""
    parts: Counter[str] = Counter()
    for name, shape in bundle.generation.tensor_shapes(bundle.config).items():
        parts[_part_of(name)] += prod(shape)
    return {**dict(sorted(parts.items())), "total": parts.total()}


def _part_of(tensor: str) -> str:
    if tensor.startswith("lm_head."):
        return "head"
    if ".layers." not in tensor:
        return "norms and residuals" if "norm" in tensor else "embedding"
    if ".down_embed." in tensor or ".up_embed." in tensor:
        return "experts"
    module = tensor.split(".layers.")[1].split(".")[1]
    if module in {"self_attn", "attn"}:
        return "attention"
    if module in {"mlp", "feed_forward"}:
        return "feed_forward"
    return "norms and residuals"


def _variant(bundle: Bundle, variant: Variant) -> dict[str, Any]:
    limits, contract = bundle.limits, bundle.contract_of(variant)
    per_token = contract.bytes_per_token()
    sizes = {file.path: file.bytes for file in bundle.manifest.files}
    files = [
        file
        for file in bundle.manifest.files
        if file.path in {variant.path, f"{variant.path}.data"}
        or file.path.startswith(f"{variant.path}/")
    ]
    graph = decode_graph_of(variant)
    return {
        "backend": variant.backend,
        "name": variant.name,
        "precision": variant.precision,
        "path": variant.path,
        "bytes": sum(file.bytes for file in files),
        "kv_bytes_per_token": per_token,
        "kv_bytes": per_token * limits.max_seq_len * limits.max_batch_size,
        "inputs": [spec.as_dict() for spec in contract.inputs],
        "outputs": [spec.as_dict() for spec in contract.outputs],
        "decode_graph": None
        if graph is None
        else {"path": graph.path, "bytes": sizes.get(graph.path, 0)},
        "details": dict(variant.details),
    }


def printed_report(report: Mapping[str, Any]) -> list[str]:
    """The report as lines of text."""
    source, limits, generation = report["source"], report["limits"], report["generation"]
    revision = f" at {source['revision']}" if source["revision"] else ""
    router = "" if report["router_mode"] is None else f", router {report['router_mode']}"
    lines = [
        f"bundle       {report['bundle']}, written by version {report['project_version']}",
        f"source       {source['kind']} {source['name']}{revision}",
        f"weights      sha256 {source['weights_sha256']}",
        f"generation   {generation['name']}: {generation['title']}",
        f"layers       {report['layers']}{router}",
        "parameters   "
        + ", ".join(f"{count:,} {part}" for part, count in report["parameters"].items()),
        (
            f"limits       batches of {limits['max_batch_size']}, prompts of "
            f"{limits['max_input_len']}, sequences of {limits['max_seq_len']} tokens"
        ),
        "inputs       " + _io(report["contract"]["inputs"]),
        "outputs      " + _io(report["contract"]["outputs"]),
        "",
        f"files        {report['bytes'] / MIB:,.1f} MiB",
        *(
            f"  {file['bytes']:>13,}  {file['role']:<10}  {file['path']}"
            for file in report["files"]
        ),
    ]
    for variant in report["variants"]:
        lines += ["", *_printed_variant(variant)]
    return lines


def _io(specs: list[Mapping[str, Any]]) -> str:
    """The first tensors of a list, and how many there are of the layers' caches."""
    cached = [spec for spec in specs if spec["name"].startswith(("past_key_values.", "present."))]
    shown = [spec for spec in specs if spec not in cached]
    kinds = {spec["name"].rpartition(".")[2]: spec for spec in reversed(cached)}
    texts = [f"{spec['name']} {_shape(spec)}" for spec in shown]
    texts += [
        f"{len(cached) // len(kinds)}x {kind} {_shape(kinds[kind])}" for kind in sorted(kinds)
    ]
    return ", ".join(texts)


def _shape(spec: Mapping[str, Any]) -> str:
    return f"{spec['dtype']}[{','.join(map(str, spec['shape']))}]"


def _printed_variant(variant: Mapping[str, Any]) -> list[str]:
    lines = [
        (
            f"variant      {variant['backend']}:{variant['name']} ({variant['precision']}), "
            f"{variant['bytes'] / MIB:,.1f} MiB in {variant['path']}"
        ),
        (
            f"  KV cache   {variant['kv_bytes_per_token']:,} bytes per token and sequence, "
            f"{variant['kv_bytes'] / MIB:,.1f} MiB in full"
        ),
    ]
    details = variant["details"]
    if variant["backend"] == CUDA_BACKEND:
        lines.append(
            f"  kernels    {len(details['kernels'])} of ours for {', '.join(details['targets'])}"
        )
    elif "targets" in details:
        lines.append(
            f"  engine     for {', '.join(details['targets'])}, built by version "
            f"{details.get('builder_version')}, plugins {details.get('plugin')}"
        )
    if "layer_launches" in details:
        lines.append(
            f"  layers     each a plugin of our kernels, {details['layer_launches']} launches of "
            "them in a decode step"
        )
    plan = details.get("plan")
    if isinstance(plan, dict):
        lines += _printed_plan(plan)
    graph = variant["decode_graph"]
    if graph is not None:
        own = details[DECODE_GRAPH]
        lines.append(
            f"  decode     chooses tokens among {own['width']} candidates, without logits: "
            f"{graph['bytes'] / MIB:,.1f} MiB in {graph['path']}"
        )
        if isinstance(own.get("plan"), dict):
            lines += _printed_plan(own["plan"])
    return lines


def _printed_plan(plan: Mapping[str, Any]) -> list[str]:
    lines = []
    for profile in plan["profiles"]:
        kinds = ", ".join(f"{count} {kind}" for kind, count in profile["by_kind"].items())
        parts = ", ".join(f"{count} {part}" for part, count in profile["by_part"].items())
        lines.append(
            f"  plan       {profile['name']}: {profile['entries']} kernels, "
            f"{profile['entries_per_layer']} a layer ({kinds}; {parts}; "
            f"{profile['fused_attention']} fused attention), "
            f"{profile['activation_bytes'] / MIB:,.1f} MiB of activations"
        )
    estimate = plan["decode_estimate"]
    lines.append(
        f"  estimate   {estimate['total_us']:.0f} us a token on an RTX 4090, not measured: "
        f"{estimate['launches_us']:.0f} us of launches at {estimate['launch_us']} us each and "
        f"{estimate['reading_us']:.0f} us of reading at "
        f"{estimate['bytes_per_second'] / 1e9:.0f} GB/s"
    )
    return lines
