"""Logits of many kinds, and the host's answer to them: what tests of sampling tails share."""

from __future__ import annotations

import numpy as np

from runtime.philox import uniform_numbers
from runtime.sampling import SamplingParams, boundary_distance, eligible, make_sampler

LARGEST_UNIFORM = np.float32(1 - 2**-24)


def sample_on_host(logits, uniform, params):
    sampler = make_sampler(params, logits.shape[1])
    history = sampler.start_history(np.zeros((len(logits), 1), np.int64), np.ones(len(logits), int))
    return sampler(logits, history, np.asarray(uniform, np.float32))


def draw_uniform(rng, rows):
    drawn = uniform_numbers(int(rng.integers(2**63)), np.arange(rows), np.full(rows, 3))
    edge = rng.choice(np.array([0, LARGEST_UNIFORM], np.float32), rows)
    return np.where(rng.random(rows) < 0.02, edge, drawn)


def margin(logits, uniform, params):
    """How far the step is from a boundary: of a token's share, of top_p or of min_p."""
    found = boundary_distance(logits, float(uniform), params)
    without_min = SamplingParams(
        temperature=params.temperature, top_k=params.top_k, top_p=params.top_p
    )
    without_cut = SamplingParams(temperature=params.temperature, top_k=params.top_k)
    if params.top_p < 1:
        sums = np.cumsum(eligible(logits, without_cut)[1])
        found = min(found, np.abs(sums - params.top_p).min())
    if params.min_p > 0:
        shares = eligible(logits, without_min)[1]
        found = min(found, np.abs(shares - params.min_p * shares[0]).min())
    return found


def flat(rng, shape):
    return rng.normal(0, 0.1, shape)


def spread(rng, shape):
    return rng.normal(0, 3, shape)


def peaked(rng, shape):
    logits = rng.normal(0, 2, shape)
    np.put_along_axis(logits, rng.integers(0, shape[1], (shape[0], 12)), rng.uniform(12, 20), 1)
    return logits


def tied(rng, shape):
    return rng.integers(-4, 5, shape)


def equal(rng, shape):
    return np.full(shape, rng.normal())


def neighbours(rng, shape):
    # Next to each other in float32: different before the division by the temperature, equal after.
    return 1.9 + rng.integers(0, 40, shape) * 2.0**-23


def large(rng, shape):
    return rng.normal(0, 3, shape) * 10.0 ** rng.integers(1, 6) + 1e4


def forbidden(rng, shape):
    logits = rng.normal(0, 3, shape)
    logits[:, 1:][rng.random((shape[0], shape[1] - 1)) < 0.9] = -np.inf
    return logits


KINDS = (flat, spread, peaked, tied, equal, neighbours, large, forbidden)
