"""Runs of golden checkpoints in torch, with a fault planted in one layer of the second."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from model.checkpoint import load_checkpoint
from model.doge import DogeForCausalLM
from runtime.backends.base import Backend, Cache, Limits
from runtime.backends.torch_backend import TorchBackend
from runtime.comparison.record import Run, Subject, record_run
from runtime.comparison.run_report import RunReport, compare_runs
from runtime.comparison.taps import comparison_taps, sources_of

STEPS = 6
PROMPTS = [[int(i) for i in np.random.default_rng(seed).integers(0, 97, 12)] for seed in (3, 4)]
BeforeStep = Callable[[Backend, Cache, int], None]


def slots_of(network: DogeForCausalLM) -> int:
    """As many as golden cases are exported with; the seed's mask ends before."""
    return min(96, network.config.max_position_embeddings)


def subject_of(network: DogeForCausalLM, rung: str) -> Subject:
    slots = slots_of(network)
    return Subject(
        rung=rung,
        precision="fp32",
        weights_sha256="0" * 64,
        config=network.config.as_dict(),
        generation=network.generation.name,
        max_input_len=slots,
        max_seq_len=slots,
    )


def run_torch(
    network: DogeForCausalLM,
    rung: str = "torch:fp32",
    like: Run | None = None,
    before_step: BeforeStep | None = None,
    steps: int = STEPS,
) -> Run:
    config, generation, slots = network.config, network.generation, slots_of(network)
    taps = comparison_taps(config, generation, selects=config.keep_window_size < slots)
    limits = Limits(max_batch_size=1, max_input_len=slots, max_seq_len=slots)
    backend = TorchBackend(network, limits=limits, variant="fp32")
    backend.tap_values(sources_of(taps))
    fed = None if like is None else [prompt.tokens for prompt in like.prompts]
    return record_run(
        subject_of(network, rung),
        backend,
        backend,
        taps,
        PROMPTS,
        steps,
        tokens=fed,
        before_step=before_step,
    )


def compare_with_fault(
    folder: Path,
    plant: Callable[[DogeForCausalLM], None] = lambda network: None,
    before_step: BeforeStep | None = None,
) -> RunReport:
    """The published weights against the same network behind `plant`."""
    right, wrong = load_checkpoint(folder), load_checkpoint(folder)
    with torch.no_grad():
        plant(wrong)
    reference = run_torch(right)
    candidate = run_torch(wrong, "torch:faulty", reference, before_step)
    return compare_runs(reference, candidate, right.config, atol=1e-3, rtol=1e-4)


def with_precision(run: Run, precision: str) -> Run:
    return dataclasses.replace(run, subject=dataclasses.replace(run.subject, precision=precision))
