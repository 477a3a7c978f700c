"""In place of the process that times decoding: what happens is what its seed says."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

# Milliseconds of a token of one sequence behind the shorter prompt.
STEP_MS = {
    "cuda:fp16": 0.25, "cuda:int8": 0.2, "cuda:fp16-persistent": 0.2,
    "torch:float16:growing": 3.0, "torch:float16:eager": 2.0, "torch:float16:compiled": 0.5,
    "torch:bfloat16:growing": 3.2, "torch:bfloat16:eager": 2.2, "torch:bfloat16:compiled": 0.6,
}  # fmt: skip


def value_of(flag: str) -> str:
    return sys.argv[sys.argv.index(flag) + 1]


def measured(system: str) -> list[dict[str, float]]:
    """Each prompt and each further row adds a tenth, and PyTorch five."""
    rows = int(value_of("--batch-size"))
    found = []
    for number, length in enumerate(value_of("--lengths").split(",")):
        share = 0.5 if system.startswith("torch") else 0.1
        ms = STEP_MS[system] * (1 + share * (number + rows - 1))
        found.append({"prompt_tokens": int(length), "step_ms": ms, "tokens_per_s": 1e3 * rows / ms})
    return found


if __name__ == "__main__":
    system, seed = sys.argv[2], int(value_of("--seed"))
    with Path(os.environ["TIMED_SYSTEMS"]).open("a", encoding="utf-8") as log:
        log.write(" ".join(sys.argv[2:-2]) + "\n")
    result = {"verdict": "pass", "measured": measured(system)}
    if system.endswith("compiled"):
        result["compiler"] = {"graphs": 1, "cuda_graph_skips": 0}
    if seed == 1 and system == "cuda:fp16":
        os.kill(os.getpid(), signal.SIGKILL)
    if seed == 2 and system.startswith("torch"):
        result = {"verdict": "skipped", "error": "Refusal: no CUDA", "measured": []}
    if seed == 3 and system == "torch:float16:compiled":
        result |= {"verdict": "fail", "error": "RuntimeError: out of memory"}
        result["measured"] = result["measured"][:1]
    if seed == 4:
        time.sleep(60)
    Path(value_of("--output")).write_text(json.dumps(result), encoding="utf-8")
