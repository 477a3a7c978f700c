"""Python's share of a generated token: the whole session, with the two graph runs left out.

A session generates from a bundle as usual, then again with the runs of the step and of the choice
replaced by nothing; what remains is bindings, bookkeeping and events. Greedy and sampled.

    python benchmarks/python_share.py BUNDLE
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from runtime.backends.onnxruntime_backend import OnnxRuntimeBackend
from runtime.bundle import Bundle
from runtime.cpu_threads import CpuThreads
from runtime.sampling import SamplingParams
from runtime.session import GenerationSession

ROUNDS = 9
PROMPT = [5, 6, 7]
PARAMS = {
    "greedy": SamplingParams(temperature=0, ignore_eos=True),
    "sampled": SamplingParams(temperature=0.8, top_k=50, ignore_eos=True),
}


class Switched:
    """An inference session that can be told to do nothing."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.idle = False

    def io_binding(self) -> Any:
        """The session's own."""
        return self._session.io_binding()

    def run_with_iobinding(self, binding: Any) -> None:
        """Run, unless idle."""
        if not self.idle:
            self._session.run_with_iobinding(binding)


def microseconds_per_token(
    backend: OnnxRuntimeBackend, params: SamplingParams, sessions: Sequence[Switched]
) -> float:
    """Median time of a token behind the first, with the graphs idle."""
    session = GenerationSession(backend)
    list(session.generate([PROMPT], params))
    times = []
    for _ in range(ROUNDS):
        events = session.generate([PROMPT], params)
        next(events)  # the prompt and its token
        next(events)  # bindings are made with the first step
        for switched in sessions:
            switched.idle = True
        begin = time.perf_counter()
        count = sum(1 for _ in events)
        times.append((time.perf_counter() - begin) / count * 1e6)
        for switched in sessions:
            switched.idle = False
    return median(times)


def main() -> None:
    """Print the share for both ways of choosing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="with a model for the CPU")
    bundle = Bundle.open(parser.parse_args().bundle)
    backend = OnnxRuntimeBackend.open(bundle, bundle.variant("onnxruntime"), threads=CpuThreads(1))
    choice = backend._choice
    if choice is None:
        parser.error("the bundle's first model for ONNX Runtime has no graph that chooses tokens")
    sessions = [Switched(backend._session), Switched(choice.session)]
    backend._session = sessions[0]
    backend._choice = dataclasses.replace(choice, session=sessions[1])
    room = bundle.limits.max_seq_len - len(PROMPT)
    for name, params in PARAMS.items():
        long = dataclasses.replace(params, max_tokens=min(240, room))
        share = microseconds_per_token(backend, long, sessions)
        print(f"{name:8} {share:6.1f} us a token")


if __name__ == "__main__":
    main()
