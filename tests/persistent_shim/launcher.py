"""Puts the shim in the place of Triton's interpreter for the launches that it can run."""

from __future__ import annotations

from plugins.kernel_spec import Launch
from tests.interpreter import InterpreterLauncher
from tests.persistent_shim import Shim


class ShimInterpreter:
    """Runs launches of the persistent kernel by the shim, all others in the interpreter.

    Attributes:
        launched: every launch that was run, in order.
    """

    def __init__(self, interpreter: InterpreterLauncher, shim: Shim, blocks: int = 3) -> None:
        self._interpreter, self._shim, self._blocks = interpreter, shim, blocks
        self.launched = interpreter.launched

    def launch(self, launch: Launch, stream: int = 0) -> None:
        if launch.kernel.startswith("persistent_step"):
            self._shim.run(launch, self._blocks, seed=len(self.launched))
        elif launch.kernel.startswith("grid_barriers"):
            self._shim.run_barriers(launch, self._blocks)
        else:
            self._interpreter.launch(launch, stream)
            return
        self.launched.append(launch)
