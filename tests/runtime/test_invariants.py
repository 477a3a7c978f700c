"""The audit's checks: clean on what is right, and each defect planted in a real network is found.

A defect is planted where it would be made, in attention, rotary tables, router or indices of the
network that runs; no number of a check is faked.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from model.checkpoint import inspect_checkpoint
from model.doge import DogeAttention
from model.layers import rotary_tables
from model.transformers_reference import ATTENTIONS, TransformersReference
from runtime import invariants
from runtime.backends.torch_backend import TorchBackend
from runtime.findings import Finding
from runtime.invariants import audit_subject, ours_against_transformers, router_modes
from runtime.subject import BackendSubject, Subject
from tests.tiny_doge import write_checkpoint

ROOT = Path(__file__).resolve().parents[2]
Golden = Callable[[str], Path]
DENSE = ("g4", "g4_untied_mha", "g4_window", "g3", "g4h", "g4h_window", "g1")
EXPERTS = ("g4_moe", "g3_moe")
ROUTED = {"future_leak", "cached_equals_uncached", "prefill_then_decode", "chunked_prefill"}


def open_ours(folder: Path, router_mode: str | None = None) -> BackendSubject:
    config, generation, _ = inspect_checkpoint(folder)
    window = None if generation.score_heads is None else config.keep_window_size
    return BackendSubject(
        "ours", TorchBackend.from_checkpoint(folder, router_mode=router_mode), window
    )


def network_of(subject: BackendSubject) -> nn.Module:
    backend = subject.backend
    assert isinstance(backend, TorchBackend)
    return backend._open_network


def results(findings: Sequence[Finding]) -> dict[str, str]:
    return {finding.check: finding.result for finding in findings}


def named(findings: Sequence[Finding], result: str) -> set[str]:
    return {finding.check for finding in findings if finding.result == result}


# --- clean models ---


@pytest.mark.parametrize("case", [*DENSE, *EXPERTS])
def test_our_network_is_clean(golden: Golden, case: str) -> None:
    findings = audit_subject(open_ours(golden(case), "per_token"))
    # Of repeated tokens beyond the window rounding decides: docs/audit.md.
    assert named(findings, "expected") <= {"selection_of_repeated_tokens"}
    assert named(findings, "fail") == set()
    skipped = {"selection"} if "window" not in case else set()
    assert named(findings, "skipped") == skipped
    for finding in findings:
        if finding.result == "pass":
            assert finding.value is not None
            assert finding.limit is not None
            assert finding.value <= finding.limit < 0.01


@pytest.mark.parametrize("case", ["g3_moe"])
def test_mixed_routing_of_ours_is_expected_and_leaves_rows_alone(golden: Golden, case: str) -> None:
    findings = audit_subject(open_ours(golden(case), "mixed"))
    assert named(findings, "expected") == {*ROUTED, "end_of_context"}
    assert named(findings, "fail") == set()
    by_name = {finding.check: finding for finding in findings}
    for check in ROUTED:
        assert "docs/reference.md, Router: `mixed` and `per_token`" in by_name[check].meaning
    refused = by_name["chunked_prefill"]
    assert refused.value is None
    assert "refused" in refused.meaning


def test_repeated_tokens_beyond_the_window_are_expected_in_transformers(golden: Golden) -> None:
    theirs = TransformersReference.open(golden("g4_window"), "eager")
    *_, finding = invariants.selection(theirs)
    assert (finding.check, finding.result) == ("selection_of_repeated_tokens", "expected")
    assert "docs/reference.md, Order of equal scores" in finding.meaning


def test_repeated_tokens_part_by_rounding_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the last bits of the mask scores, decode and batches agree in our network."""
    folder = write_checkpoint(tmp_path, seed=7, vocab_size=20, keep_window_size=6)

    def found() -> set[str]:
        subject = open_ours(folder)
        checks = (invariants.prefill_then_decode(subject), invariants.batch_independence(subject))
        assert named(checks, "fail") == set()
        for finding in checks:
            if finding.result == "expected":
                assert "docs/audit.md, Repeated tokens beyond the window" in finding.meaning
        return named([*checks, *invariants.selection(subject)], "expected")

    found()
    right = DogeAttention.mask_scores
    monkeypatch.setattr(
        DogeAttention, "mask_scores", lambda *given: (right(*given) * 1024).round() / 1024
    )
    assert found() == set()


def test_scaled_rope_of_transformers_is_expected_beyond_its_original_length(tmp_path: Path) -> None:
    rope = {
        "rope_type": "dynamic",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    write_checkpoint(tmp_path, max_position_embeddings=64, rope_parameters=rope)
    theirs = TransformersReference.open(tmp_path, "eager")
    findings = audit_subject(theirs)
    assert named(findings, "expected") == {"beyond_original_length"}
    assert "docs/reference.md, Length" in findings[-1].meaning
    assert named(findings, "fail") == set()
    ours = open_ours(tmp_path)
    assert ours.longest == ours.context == 64


def test_router_modes_of_experts_differ(golden: Golden) -> None:
    mixed, per_token = (open_ours(golden("g4_moe"), mode) for mode in ("mixed", "per_token"))
    finding = router_modes(mixed, per_token)
    assert finding.result == "expected"
    assert finding.value is not None
    assert finding.value > 0.1
    assert router_modes(mixed, mixed).result == "pass"


# --- planted defects ---


def plant_attention(
    monkeypatch: pytest.MonkeyPatch, planted: Callable[..., Callable[..., Tensor]]
) -> None:
    """Every attention of ours is what `planted` makes of the right one."""
    modules = [m for name, m in sys.modules.items() if name.startswith("model.")]
    having = [module for module in modules if hasattr(module, "dynamic_mask_attention")]
    assert having
    for module in having:
        right = module.dynamic_mask_attention
        monkeypatch.setattr(module, "dynamic_mask_attention", planted(right))


def plant_indices(network: nn.Module, change: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """The network runs with the positions and write indices that `change` makes of its own."""

    def before(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        ids, positions, write_index, *rest = arguments
        return (ids, *change(positions, write_index), *rest)

    network.register_forward_pre_hook(before)


def plant_output(network: nn.Module, part: str, change: Callable[[Tensor], Tensor]) -> None:
    """What every module of the name `part` gives becomes what `change` makes of it."""
    parts = [module for name, module in network.named_modules() if name.endswith(part)]
    assert parts
    for module in parts:
        module.register_forward_hook(lambda module, arguments, output: change(output))


def seeing_the_future(right: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Every query sees all tokens of its pass, as transformers before 5.18 under sdpa.

    Queries are handed over one by one, each as if it stood in the last slot.
    """

    def attention(query: Tensor, *rest: Tensor, **keywords: Any) -> Tensor:
        *cached, write_index = rest
        last = write_index + query.shape[2] - 1
        return torch.cat([right(q, *cached, last, **keywords) for q in query.split(1, 2)], dim=1)

    return attention


def looking_ahead(right: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Keys compete with later ones, so a later token decides which earlier ones are seen."""

    def attention(
        query: Tensor, key: Tensor, value: Tensor, *rest: Tensor, **keywords: Any
    ) -> Tensor:
        score, write_index = rest
        window = keywords["keep_window_size"]
        if window and score.shape[2] > window:
            least = score.topk(window, dim=2).values[:, :, -1:]
            score = torch.where(score < least, -1e4, score)
        return right(query, key, value, score, write_index, **keywords)

    return attention


def seeing_surplus(right: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Every row sees as far as the longest."""

    def attention(*tensors: Tensor, **keywords: Any) -> Tensor:
        *others, write_index = tensors
        return right(*others, write_index.max().expand_as(write_index), **keywords)

    return attention


@pytest.mark.parametrize("case", DENSE)
def test_attention_to_the_future_is_found(
    golden: Golden, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    plant_attention(monkeypatch, seeing_the_future)
    subject = open_ours(golden(case))
    assert invariants.future_leak(subject).result == "fail"
    assert invariants.cached_equals_uncached(subject).result == "fail"


def test_selection_that_looks_ahead_is_found_beyond_a_window_longer_than_the_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = open_ours(write_checkpoint(tmp_path, keep_window_size=40))
    plant_attention(monkeypatch, looking_ahead)
    assert [finding.result for finding in invariants.selection(subject)] == ["fail", "fail"]
    assert invariants.future_leak(subject).result == "pass"


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_transformers_that_skips_its_causal_mask_is_found(golden: Golden, attention: Any) -> None:
    """What releases before 5.18 did under sdpa without padding."""
    theirs = TransformersReference.open(golden("g4"), attention)
    for layer in theirs.network.model.layers:
        module = layer.self_attn
        right = module.prepare_dynamic_mask

        def skipped(*arguments: Any, right: Any = right, **keywords: Any) -> Any:
            keywords["attention_mask"] = None
            return right(*arguments, **keywords)

        module.prepare_dynamic_mask = skipped
    assert invariants.future_leak(theirs).result == "fail"
    assert invariants.cached_equals_uncached(theirs).result == "fail"
    assert ours_against_transformers(open_ours(golden("g4")), theirs).result == "fail"


class DynamicRope:
    """The base of rotary embedding grows with the length, as dynamic scaling does.

    Keys that are cached keep the rotation that they were given.
    """

    def __init__(self, network: Any, original: int, *, remembers: bool) -> None:
        self.network = network
        self.original = original
        self.remembers = remembers
        self.longest = 0
        network.register_forward_pre_hook(self.before)

    def before(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        length = int(arguments[1].max()) + 1
        self.longest = max(self.longest, length) if self.remembers else length
        growth = max(1.0, 4 * self.longest / self.original - 3)
        config = dataclasses.replace(self.network.config, rope_theta=10000.0 * growth)
        for table, new in zip(
            (self.network.cos, self.network.sin),
            rotary_tables(config, config.max_position_embeddings),
            strict=True,
        ):
            table.copy_(new)


def test_rope_that_remembers_a_longer_request_is_found(golden: Golden) -> None:
    subject = open_ours(golden("g4"))
    DynamicRope(network_of(subject), 100, remembers=True)
    # Once grown it stays, so nothing else can tell.
    assert named(audit_subject(subject), "fail") == {"repeatability"}


def test_rope_that_leaves_cached_keys_in_their_old_rotation_is_found(golden: Golden) -> None:
    subject = open_ours(golden("g4"))
    DynamicRope(network_of(subject), 100, remembers=False)
    assert "end_of_context" in named(audit_subject(subject), "fail")


def test_rope_that_grows_within_a_prompt_is_found(golden: Golden) -> None:
    subject = open_ours(golden("g4"))
    DynamicRope(network_of(subject), 20, remembers=False)
    failed = named(audit_subject(subject), "fail")
    assert {"cached_equals_uncached", "prefill_then_decode", "chunked_prefill"} <= failed


def mix_router_rows(router: Tensor) -> Tensor:
    """The published reinterpretation over a whole batch; of one token it changes nothing."""
    B, S, width = router.shape
    return router.reshape(2, B * S, width // 2).transpose(0, 1).reshape(B, S, width)


def mix_rows(output: Tensor) -> Tensor:
    return 0.9 * output + 0.1 * output.mean(0, keepdim=True)


def test_router_that_reads_other_rows_is_found(golden: Golden) -> None:
    subject = open_ours(golden("g4_moe"), "per_token")
    plant_output(network_of(subject), "mlp.router_gate", mix_router_rows)
    assert {"batch_independence", "unequal_lengths", "future_leak"} <= named(
        audit_subject(subject), "fail"
    )


@pytest.mark.parametrize("case", DENSE)
def test_attention_averaged_over_rows_is_found(golden: Golden, case: str) -> None:
    subject = open_ours(golden(case))
    plant_output(network_of(subject), ".o_proj", mix_rows)
    assert invariants.batch_independence(subject).result == "fail"
    assert invariants.unequal_lengths(subject).result == "fail"
    assert invariants.future_leak(subject).result == "pass"


def test_surplus_tokens_that_are_seen_are_found(
    golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_attention(monkeypatch, seeing_surplus)
    assert named(audit_subject(open_ours(golden("g4"))), "fail") == {"unequal_lengths"}


INDEX_DEFECTS: dict[str, tuple[Callable[..., tuple[Tensor, Tensor]], set[str]]] = {
    "rows are written where the longest ends": (
        lambda positions, start: (positions, start.max().expand_as(start)),
        {"unequal_lengths"},
    ),
    "rows are rotated as the longest": (
        lambda positions, start: (positions.amax(0, keepdim=True).expand_as(positions), start),
        {"unequal_lengths"},
    ),
    "a step overwrites the token before it": (
        lambda positions, start: (positions, (start - 1).clamp(min=0)),
        {"cached_equals_uncached", "prefill_then_decode", "chunked_prefill", "end_of_context"},
    ),
    "positions of a step are one too small": (
        lambda positions, start: ((positions - (start > 0).long()[:, None]), start),
        {"cached_equals_uncached", "prefill_then_decode", "chunked_prefill", "end_of_context"},
    ),
}


@pytest.mark.parametrize("defect", INDEX_DEFECTS)
def test_wrong_index_is_found(golden: Golden, defect: str) -> None:
    change, checks = INDEX_DEFECTS[defect]
    subject = open_ours(golden("g4"))
    plant_indices(network_of(subject), change)
    assert checks <= named(audit_subject(subject), "fail")


class IgnoresPadding(TransformersReference):
    """Padding counts as tokens."""

    def _run(self, ids: Any, mask: Any, **keywords: Any) -> Any:
        return super()._run(ids, np.ones_like(mask), **keywords)


def test_padding_that_counts_as_tokens_is_found(golden: Golden) -> None:
    theirs = IgnoresPadding.open(golden("g4"), "sdpa")
    assert named(audit_subject(theirs), "fail") == {"unequal_lengths"}


def test_other_weights_than_the_published_ones_are_found(golden: Golden, tmp_path: Path) -> None:
    ours = open_ours(golden("g4"))
    with torch.no_grad():
        network_of(ours).get_submodule("model.layers.1.self_attn.q_norm").weight.mul_(1.05)
    theirs = TransformersReference.open(golden("g4"), "eager")
    assert ours_against_transformers(ours, theirs).result == "fail"


def test_leak_is_not_excused_by_the_router(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same network without the router's mixing shows it."""
    plant_attention(monkeypatch, seeing_the_future)
    modes = {"mixed": "expected", "per_token": "fail"}
    for mode, result in modes.items():
        subject = open_ours(golden("g4_moe"), mode)
        assert invariants.future_leak(subject).result == result


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_logits_that_are_no_numbers_fail_and_have_no_value(golden: Golden, number: float) -> None:
    subject = open_ours(golden("g4_moe"), "mixed")
    plant_output(network_of(subject), "model.norm", lambda output: output * number)
    findings = [f for f in audit_subject(subject) if f.result not in {"skipped", "expected"}]
    assert {finding.result for finding in findings} == {"fail"}
    assert {finding.value for finding in findings} == {None}
    assert "not finite" in findings[-1].meaning


def test_network_that_ignores_its_input_does_not_pass(golden: Golden) -> None:
    subject = open_ours(golden("g4"))
    plant_output(network_of(subject), "model.norm", torch.zeros_like)
    finding = invariants.future_leak(subject)
    assert finding.result == "fail"
    assert "says anything" in finding.meaning


@pytest.mark.parametrize("quirk", ["ROUTER", "TIES", "ROUNDING", "LENGTH"])
def test_quirk_names_a_section_that_exists(quirk: str) -> None:
    _, _, place = getattr(invariants, f"{quirk}_QUIRK").rpartition("; ")
    document, _, heading = place.partition(", ")
    lines = (ROOT / document).read_text(encoding="utf-8").splitlines()
    assert f"## {heading}" in lines


# --- sizes ---


def test_small_vocabulary_is_told_beyond_the_window(tmp_path: Path) -> None:
    subject = open_ours(write_checkpoint(tmp_path, vocab_size=20, keep_window_size=6))
    finding = invariants.different_tokens(subject)
    assert (finding.subject, finding.result, finding.value) == ("prompts", "expected", 48.0)
    assert "docs/reference.md, Order of equal scores" in finding.meaning
    findings = audit_subject(subject)
    assert results(findings)["selection_of_different_tokens"] == "skipped"
    assert named(findings, "fail") == set()


def test_context_shorter_than_the_usual_prompt_is_audited(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, max_position_embeddings=8, keep_window_size=6)
    assert named(audit_subject(open_ours(tmp_path)), "fail") == set()


def test_large_window_is_not_tried() -> None:
    subject: Subject = SimpleNamespace(  # type: ignore[assignment]
        name="ours", context=4096, keep_window_size=2048, vocab_size=32768
    )
    [finding] = invariants.selection(subject)
    assert finding.result == "skipped"
    assert "2048" in finding.meaning
