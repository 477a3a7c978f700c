"""What must hold whichever way a model is run, as checks that each give a finding.

docs/audit.md says what each check asks and what its results mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from runtime.backends.base import Ids, Logits
from runtime.findings import Difference, Finding, Result, largest_difference
from runtime.subject import (
    LEAST_LENGTH,
    STEPS,
    Prompt,
    Subject,
    base_prompts,
    feed,
    make_prompts,
    prefill_and_decode,
)

# The longest request; by how much a prompt exceeds the window, and the longest such prompt; tokens.
MOST_LENGTH = 2048
BEYOND_WINDOW, MOST_BEYOND_WINDOW = 16, 1024

ROUTER_QUIRK = (
    "the published router mixes tokens; docs/reference.md, Router: `mixed` and `per_token`"
)
TIES_QUIRK = (
    "the published code leaves the order of equal scores to the device; docs/reference.md, Order "
    "of equal scores"
)
ROUNDING_QUIRK = (
    "a repeated token's scores differ in the last bit between a prefill and a step, and so does "
    "which of them stay; docs/audit.md, Repeated tokens beyond the window"
)
LENGTH_QUIRK = (
    "the published code changes the base of scaled rotary embedding as it goes; "
    "docs/reference.md, Length"
)


# --- the checks ---


def future_leak(subject: Subject) -> Finding:
    """Whether a later token moves an earlier logit."""
    difference, reacts = _leak(subject, base_prompts(subject)[:2])
    if not reacts:
        meaning = "no token moves even its own logits, so no check of this subject says anything"
        return _finding(subject, "future_leak", "fail", difference, meaning)
    return _judge(
        subject,
        "future_leak",
        difference,
        "later tokens move no earlier logit",
        "a later token moves earlier logits: positions see what they are to predict",
        quirk=_router_quirk(subject),
    )


def cached_equals_uncached(subject: Subject) -> Finding:
    """Whether feeding token by token gives what one pass gives."""
    prompts = base_prompts(subject)[:2]
    return _pieces(
        subject,
        "cached_equals_uncached",
        prompts,
        lambda length: [1] * length,
        "token by token through the cache equals one pass",
        "token by token through the cache gives other logits than one pass",
    )


def prefill_then_decode(subject: Subject) -> Finding:
    """Whether a prefill and decode steps behind it give what one pass gives."""
    return _pieces(
        subject,
        "prefill_then_decode",
        base_prompts(subject)[:2],
        lambda length: [length // 2] + [1] * (length - length // 2),
        "a prefill and decode steps behind it equal one pass",
        "a prefill and decode steps behind it give other logits than one pass",
    )


def chunked_prefill(subject: Subject) -> Finding:
    """Whether a prompt fed in chunks of several sizes gives what one pass gives."""

    def chunks(length: int) -> list[int]:
        return [length // 3, 1, length // 4, length - length // 3 - 1 - length // 4]

    return _pieces(
        subject,
        "chunked_prefill",
        base_prompts(subject)[:2],
        chunks,
        "a prompt in chunks equals one pass",
        "a prompt in chunks gives other logits than one pass",
    )


def end_of_context(subject: Subject) -> Finding:
    """Whether decoding the last tokens of the context gives what one pass gives."""
    length = min(subject.context, MOST_LENGTH)
    if _window(subject) < length:
        # Beyond the window repeated tokens are a matter of their own (`selection`).
        length = max(LEAST_LENGTH, min(length, subject.vocab_size))
    prompts = make_prompts(subject.vocab_size, 1, length)
    ids = prompts[0].ids
    whole = subject.one_pass([ids], last_only=True)[0]
    return _judge(
        subject,
        "end_of_context",
        largest_difference([(whole, _last_of_decoding(subject, ids, length - STEPS))]),
        f"decoding up to {length} tokens equals one pass",
        f"decoding up to {length} tokens gives other logits than one pass",
        quirk=_router_quirk(subject) or _ties_quirk(subject, prompts),
    )


def batch_independence(subject: Subject) -> Finding:
    """Whether a row of a batch is the same alone and beside any neighbours."""
    first, second, third, fourth = (prompt.ids for prompt in base_prompts(subject))
    alone = prefill_and_decode(subject, [first])[0]
    batches = ([first, second], [third, first, fourth], [fourth, third, second, first])
    pairs = []
    for batch in batches:
        row = next(index for index, ids in enumerate(batch) if ids is first)
        pairs.append((alone, prefill_and_decode(subject, batch)[row]))
    return _judge(
        subject,
        "batch_independence",
        largest_difference(pairs),
        "a row is the same alone and in any batch",
        "a row's logits depend on its neighbours in the batch",
        quirk=_published_router_quirk(subject) or _ties_quirk(subject, base_prompts(subject)),
    )


def unequal_lengths(subject: Subject) -> Finding:
    """Whether rows of unequal length give what each gives alone, in prefill and decode."""
    whole = [prompt.ids for prompt in base_prompts(subject)[:3]]
    length = len(whole[0])
    ends = (length, 1 + STEPS, length // 2 + STEPS)
    rows = [ids[:end] for ids, end in zip(whole, ends, strict=True)]
    together = prefill_and_decode(subject, rows)
    alone = [prefill_and_decode(subject, [row])[0] for row in rows]
    return _judge(
        subject,
        "unequal_lengths",
        largest_difference(zip(alone, together, strict=True)),
        "rows of unequal length equal each row alone",
        "rows of unequal length give other logits than each row alone",
        quirk=_published_router_quirk(subject) or _ties_quirk(subject, base_prompts(subject)),
    )


def repeatability(subject: Subject) -> Finding:
    """Whether a prompt gives the same after other requests, also while they run."""
    prompt, other = (p.ids for p in base_prompts(subject)[:2])
    longest = make_prompts(subject.vocab_size, 1, min(subject.context, MOST_LENGTH))[0].ids
    half = len(prompt) // 2
    pieces = [half] + [1] * STEPS
    expected = subject.one_pass([prompt])[0]
    interrupted = subject.start(1, half + STEPS)
    found = [interrupted.append([prompt[:half]])[0]]
    # Each later request finds what all before it may have left behind.
    requests: tuple[Callable[[], object], ...] = (
        lambda: subject.one_pass([longest], last_only=True),
        lambda: subject.one_pass([other[:3]]),
        lambda: subject.one_pass([other, longest[: len(other)]]),
        lambda: feed(subject, [other], [half] + [1] * STEPS),
    )
    pairs = []
    for step, request in enumerate(requests):
        request()
        pairs.append((expected, subject.one_pass([prompt])[0]))
        found.append(interrupted.append([prompt[half + step : half + step + 1]])[0])
    uninterrupted = feed(subject, [prompt[: half + STEPS]], pieces)[0]
    pairs.append((uninterrupted, np.concatenate(found)))
    return _judge(
        subject,
        "repeatability",
        largest_difference(pairs),
        "a prompt gives the same before, between and after other requests",
        "a prompt gives other logits after other requests: something is kept between them",
        quirk=LENGTH_QUIRK if subject.longest > subject.context <= len(prompt) else None,
    )


def beyond_original_length(subject: Subject) -> Finding:
    """Scaled rotary embedding beyond its original length; for a subject that goes there."""
    check = "beyond_original_length"
    if subject.context > MOST_LENGTH:
        return _skipped(subject, check, f"would take more than {MOST_LENGTH} tokens")
    ids = make_prompts(subject.vocab_size, 1, subject.longest)[0].ids
    within = ids[: subject.context]
    before = subject.one_pass([within], last_only=True)[0]
    whole = subject.one_pass([ids], last_only=True)[0]
    after = subject.one_pass([within], last_only=True)[0]
    decoded = _last_of_decoding(subject, ids, subject.context - STEPS)
    return _judge(
        subject,
        check,
        largest_difference([(before, after), (whole, decoded)]),
        f"beyond {subject.context} tokens cache and repetition still agree",
        f"beyond {subject.context} tokens cached keys and new ones disagree, and a request changes "
        "the next",
        quirk=LENGTH_QUIRK,
    )


def selection(subject: Subject) -> list[Finding]:
    """Leak and cache where queries keep only some keys, without and with equal scores."""
    window = _window(subject)
    if window >= subject.context:
        reason = "every query keeps every key: the window is not smaller than the context"
        return [_skipped(subject, "selection", reason)]
    length = min(subject.context, int(window) + BEYOND_WINDOW)
    if length > MOST_BEYOND_WINDOW:
        reason = f"a window of {window} keys needs prompts of more than {MOST_BEYOND_WINDOW} tokens"
        return [_skipped(subject, "selection", reason)]
    findings = []
    [prompt] = make_prompts(subject.vocab_size, 1, length)
    if prompt.repeats:
        reason = f"{length} different tokens are needed and there are {subject.vocab_size}"
        findings.append(_skipped(subject, "selection_of_different_tokens", reason))
    else:
        findings.append(_selection(subject, "selection_of_different_tokens", prompt))
    few = max(2, min(int(window) // 2, 8))
    repeated = Prompt(prompt.ids[np.arange(length) % few], prompt.others)
    findings.append(_selection(subject, "selection_of_repeated_tokens", repeated))
    return findings


def ours_against_transformers(ours: Subject, theirs: Subject) -> Finding:
    """How far two subjects are apart in one pass and token by token, one sequence at a time.

    Args:
        ours: the mixture of experts, if it is one, in the router mode `mixed`.
        theirs: the published code; the finding is about it.
    """
    prompts = base_prompts(ours)[:2]
    passes = [(theirs.one_pass([p.ids])[0], ours.one_pass([p.ids])[0]) for p in prompts]
    single = [1] * len(prompts[0].ids)
    steps = [tuple(feed(s, [p.ids], single)[0] for s in (theirs, ours)) for p in prompts]
    in_one, in_steps = largest_difference(passes), largest_difference((a, b) for a, b in steps)
    worst = max(in_one, in_steps, key=lambda found: found.value / found.limit)
    return _judge(
        theirs,
        "ours_against_transformers",
        worst,
        f"ours equals it, in one pass (by {in_one.value:.1e}) and token by token (by "
        f"{in_steps.value:.1e})",
        f"ours departs from it, by {in_one.value:.2g} in one pass and by {in_steps.value:.2g} "
        "token by token",
        quirk=_ties_quirk(theirs, prompts),
    )


def router_modes(mixed: Subject, per_token: Subject) -> Finding:
    """How far the two ways of routing are apart in one pass."""
    prompts = base_prompts(mixed)[:2]
    pairs = [(mixed.one_pass([p.ids])[0], per_token.one_pass([p.ids])[0]) for p in prompts]
    return _judge(
        mixed,
        "router_modes",
        largest_difference(pairs),
        "`mixed` and `per_token` give the same",
        "`mixed` and `per_token` are two models; only the one it was trained as is right",
        quirk=ROUTER_QUIRK,
    )


def different_tokens(subject: Subject) -> Finding:
    """Whether the prompts of the other checks keep equal scores out of the selection."""
    repeats = sum(prompt.repeats for prompt in base_prompts(subject))
    if not repeats:
        meaning = "no prompt repeats a token, so equal scores decide nothing in the other checks"
        return Finding(
            subject="prompts",
            check="different_tokens",
            result="pass",
            value=0.0,
            limit=0.0,
            meaning=meaning,
        )
    return Finding(
        subject="prompts",
        check="different_tokens",
        result="expected",
        value=float(repeats),
        limit=0.0,
        meaning=f"a vocabulary of {subject.vocab_size} is too small for prompts without "
        "repetition, so equal scores may decide which keys stay; docs/reference.md, Order of equal "
        "scores",
    )


def audit_subject(subject: Subject) -> list[Finding]:
    """Every check that asks about one subject alone; the subject has run nothing long before."""
    findings = [
        check(subject)
        for check in (
            # First: once a long request has run, what it left behind is there before and after.
            repeatability,
            future_leak,
            cached_equals_uncached,
            prefill_then_decode,
            chunked_prefill,
            end_of_context,
            batch_independence,
            unequal_lengths,
        )
    ]
    findings += selection(subject)
    if subject.longest > subject.context:
        # Last: what it leaves behind would be found by the others.
        findings.append(beyond_original_length(subject))
    return findings


# --- what the checks share ---


def _leak(subject: Subject, prompts: Sequence[Prompt]) -> tuple[Difference, bool]:
    """What changed suffixes move before them, and whether they move anything at all."""
    pairs = []
    reacts = False
    for prompt in prompts:
        length = len(prompt.ids)
        before = subject.one_pass([prompt.ids])[0]
        for kept in sorted({length - 1, length - 4, length // 2}):
            changed = np.concatenate([prompt.ids[:kept], prompt.others[kept:]])
            after = subject.one_pass([changed])[0]
            pairs.append((before[:kept], after[:kept]))
            reacts |= bool((before[kept:] != after[kept:]).any())
    return largest_difference(pairs), reacts


def _selection(subject: Subject, check: str, prompt: Prompt) -> Finding:
    length = len(prompt.ids)
    decoded = min(length - 1, 2 * BEYOND_WINDOW)
    where = f"{length} tokens with a window of {subject.keep_window_size}"
    leak, _ = _leak(subject, [prompt])
    if not leak.within:
        bad = f"{where}: a later token moves earlier logits"
        return _judge(subject, check, leak, "", bad, quirk=_router_quirk(subject))
    whole = subject.one_pass([prompt.ids])[0]
    stepped = feed(subject, [prompt.ids], [length - decoded] + [1] * decoded)[0]
    return _judge(
        subject,
        check,
        largest_difference([(whole, stepped)]),
        f"{where}: no leak, and decoding equals one pass",
        f"{where}: decoding gives other logits than one pass",
        quirk=_router_quirk(subject) or _ties_quirk(subject, [prompt]),
    )


def _pieces(
    subject: Subject,
    check: str,
    prompts: Sequence[Prompt],
    pieces: Callable[[int], list[int]],
    good: str,
    bad: str,
) -> Finding:
    """Compare prompts fed in pieces with one pass."""
    quirk = _router_quirk(subject) or _ties_quirk(subject, prompts)
    pairs = []
    for prompt in prompts:
        whole = subject.one_pass([prompt.ids])[0]
        try:
            parts = feed(subject, [prompt.ids], pieces(len(prompt.ids)))[0]
        except ValueError as error:
            if subject.router != "mixed" or "per_token" not in str(error):
                raise
            meaning = f"refused, as a prompt is routed as a whole: {ROUTER_QUIRK}"
            return _finding(subject, check, "expected", None, meaning)
        pairs.append((whole, parts))
    return _judge(subject, check, largest_difference(pairs), good, bad, quirk=quirk)


def _last_of_decoding(subject: Subject, ids: Ids, prefilled: int) -> Logits:
    """Logits [1, V] of the last of `ids`, all behind the first `prefilled` of which are decoded."""
    conversation = subject.start(1, len(ids))
    conversation.append([ids[:prefilled]], last_only=True)
    steps = [conversation.append([ids[t : t + 1]])[0] for t in range(prefilled, len(ids))]
    return steps[-1]


def _window(subject: Subject) -> float:
    """Keys that a query keeps; infinite where it keeps all."""
    return np.inf if subject.keep_window_size is None else subject.keep_window_size


def _ties_quirk(subject: Subject, prompts: Sequence[Prompt]) -> str | None:
    """What equal scores excuse, where they may decide which keys stay."""
    if not any(len(p.ids) > _window(subject) and p.repeats for p in prompts):
        return None
    return ROUNDING_QUIRK if subject.ties_by_slot else TIES_QUIRK


def _router_quirk(subject: Subject) -> str | None:
    """What a router that reads other tokens of its sequence excuses."""
    return ROUTER_QUIRK if subject.router in {"mixed", "published"} else None


def _published_router_quirk(subject: Subject) -> str | None:
    """What a router that reads other rows of its batch excuses."""
    return ROUTER_QUIRK if subject.router == "published" else None


def _judge(
    subject: Subject, check: str, found: Difference, good: str, bad: str, *, quirk: str | None
) -> Finding:
    if found.within:
        return _finding(subject, check, "pass", found, good)
    if not np.isfinite(found.value):
        return _finding(subject, check, "fail", found, "logits that are not finite numbers")
    if quirk is not None:
        return _finding(subject, check, "expected", found, f"{bad}: {quirk}")
    return _finding(subject, check, "fail", found, bad)


def _finding(
    subject: Subject, check: str, result: Result, found: Difference | None, meaning: str
) -> Finding:
    value = None if found is None or not np.isfinite(found.value) else found.value
    return Finding(
        subject=subject.name,
        check=check,
        result=result,
        value=value,
        limit=None if found is None else found.limit,
        meaning=meaning,
    )


def _skipped(subject: Subject, check: str, reason: str) -> Finding:
    return _finding(subject, check, "skipped", None, reason)
