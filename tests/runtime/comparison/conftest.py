"""Golden checkpoints as ONNX models in several forms, and what the network gives for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.comparison.record import Run
from tests.export.conftest import Exported
from tests.runtime.comparison.planted_faults import (
    run_torch,
)
from tests.runtime.comparison.repro_models import Model


@pytest.fixture(scope="session")
def model_of(
    golden: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Model]:
    cases: dict[str, Exported] = {}
    models: dict[tuple[str, str], Model] = {}

    def get(case: str, form: str) -> Model:
        if case not in cases:
            cases[case] = Exported(golden(case), tmp_path_factory.mktemp(case))
            # The backend is opened once; what is replayed may close it.
            cases[case].torch.close = lambda: None  # type: ignore[method-assign]
        if (case, form) not in models:
            models[case, form] = Model(cases[case], form)
        return models[case, form]

    return get


@pytest.fixture(scope="session")
def reference_of(model_of: Callable[[str, str], Model]) -> Callable[[str], Run]:
    runs: dict[str, Run] = {}

    def get(case: str) -> Run:
        if case not in runs:
            runs[case] = run_torch(model_of(case, "canonical").case.network)
        return runs[case]

    return get
