"""A piece's numbers in Polygraphy's own form, where that package is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.comparison.repro.run_piece import limits

Array = npt.NDArray[Any]


def write_polygraphy_files(
    folder: Path, inputs: Mapping[str, Array], check: Mapping[str, Any], expected: Array
) -> str | None:
    """Write `inputs.json` and `expected.json`.

    Polygraphy compares number by number; a limit for each token it does not have. So its command
    gets the smallest limit of all tokens: it fails wherever run.py does.

    Args:
        folder: of the piece.
        inputs: of its model.
        check: the rule of run.py.
        expected: of its output.

    Returns:
        The command; None where Polygraphy is missing, or cannot judge this: a choice is no number.
    """
    if check["rule"] != "numeric" or not np.isfinite(expected).all():
        return None
    if importlib.util.find_spec("polygraphy") is None:
        return None
    from polygraphy.comparator import RunResults
    from polygraphy.json import save_json
    from polygraphy.logger import G_LOGGER

    results = RunResults()
    results.add([{check["output"]: expected}], runner_name="expected")
    with G_LOGGER.verbosity(G_LOGGER.ERROR):  # it would tell of files that are moved later
        save_json([dict(inputs)], str(folder / "inputs.json"))
        results.save(str(folder / "expected.json"))
    judged = expected
    if check["slots"] is not None:
        begin, end = check["slots"]
        judged = expected[:, :, begin:end]
    atol = float(limits(check, judged).min())
    return (
        "polygraphy run model.onnx --onnxrt --load-inputs inputs.json "
        f"--load-outputs expected.json --atol {atol:.6g} --rtol 0"
    )
