"""In place of the process that compares engines: what happens is what its seed says."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    seed = int(sys.argv[sys.argv.index("--seed") + 1])
    print("[TRT] [E] what a library prints,", os.getcwd(), flush=True)
    if seed == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if seed == 2:
        sys.exit(5)
    if seed == 3:
        time.sleep(60)
    output = Path(sys.argv[sys.argv.index("--output") + 1])
    output.write_text('{"verdict": "skipped", "opened": false, "error": "Refusal: not this GPU"}')
