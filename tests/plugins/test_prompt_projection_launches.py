"""Names of variants, which one a launch takes, and what is refused."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import pytest

from plugins.kernel_spec import grid_of
from plugins.projection.packing import WeightFormat
from plugins.prompt_projection.launches import GatherRows, PromptProjection

FLOAT16 = WeightFormat(kind="float16")
INT4 = WeightFormat(kind="int4", group=64)


def test_name_is_shared_by_equal_variants_alone() -> None:
    base = PromptProjection(rows=512, columns=256, weights=FLOAT16, input="float32")
    changes = (
        {}, {"rows": 514}, {"columns": 512}, {"weights": INT4}, {"input": "float16"},
        {"output": "float16"}, {"norm": True}, {"epilogue": "silu"}, {"epilogue": "residual"},
        {"addend": True}, {"output_offset": 8}, {"output_stride": 513}, {"dot": "float32"},
        {"output_offset": 8, "output_stride": 520},
    )  # fmt: skip
    names = [spec.name for change in changes for spec in replace(base, **change).specs]
    assert len(set(names)) == 2 * len(changes)
    assert all(re.fullmatch(r"[a-z0-9_-]+", name) for name in names)
    assert replace(base, output_stride=512).specs == base.specs
    assert replace(base, dot="float16").specs == base.specs


def test_grid_covers_every_row_and_token() -> None:
    for rows, tokens in itertools.product((5, 768, 3072, 32768), (1, 16, 17, 64, 65, 500)):
        projection = PromptProjection(rows=rows, columns=256, weights=INT4, input="float32")
        launch = projection.launch(tokens=tokens, x=16, weights=32, output=48, scales=64)
        place = [spec.name for spec in projection.specs].index(launch.kernel)
        assert place == (tokens > 16)
        tile = projection.tiles[place]
        x, y, _ = grid_of(projection.specs[place].grid, launch.sizes)
        assert tokens <= x * tile.tokens < tokens + tile.tokens
        assert rows <= y * tile.rows < rows + tile.rows


def test_projections_that_no_kernel_covers_are_refused() -> None:
    sizes = {"rows": 7, "columns": 32, "weights": FLOAT16, "input": "float32"}
    for options, message in (
        ({"columns": 20}, "20 columns cannot be stored as float16"),
        ({"input": "int8"}, "unknown input 'int8'"),
        ({"output": None}, "unknown output None"),
        ({"dot": "tf32"}, "unknown dot 'tf32'"),
        ({"epilogue": "gelu"}, "unknown epilogue 'gelu'"),
        ({"epilogue": "silu_product"}, "7 rows are no pairs of gate and up"),
        ({"epilogue": "silu", "addend": True}, "nothing is added after silu"),
        ({"output_stride": 6}, "outputs of 7 numbers from 0 on, 6 apart"),
        ({"output_offset": -1}, "outputs of 7 numbers from -1 on, 0 apart"),
    ):
        with pytest.raises(ValueError, match=message):
            PromptProjection(**{**sizes, **options})


def test_launches_ask_for_what_they_read_and_write_and_no_more() -> None:
    projection = PromptProjection(
        rows=8, columns=64, weights=INT4, input="float32", norm=True, epilogue="scaled_residual",
        addend=True,
    )  # fmt: skip
    names = ("x", "weights", "output", "scales", "norm", "addend", "residual", "residual_weight")
    whole = {name: 16 * (place + 1) for place, name in enumerate(names)}
    launch = projection.launch(tokens=3, **whole)
    assert launch.arguments == {**whole, "tokens": 3, "eps": 1e-6}
    assert launch.arguments.keys() == projection.specs[0].arguments.keys()
    for name in names:
        with pytest.raises(ValueError, match=f"{name} missing"):
            projection.launch(tokens=3, **{**whole, name: 0})
    plain = PromptProjection(rows=8, columns=64, weights=FLOAT16, input="float32")
    with pytest.raises(ValueError, match="scales unused, norm unused, addend unused, residual"):
        plain.launch(tokens=3, **whole)
    with pytest.raises(ValueError, match="a projection of 0 tokens, expected at least 1"):
        plain.launch(tokens=0, x=16, weights=32, output=48)
    assert (plain.workspace_bytes, plain.counters) == (0, 0)


def test_gathers_that_no_kernel_covers_are_refused() -> None:
    with pytest.raises(ValueError, match="rows of 0 numbers; unknown type 'int8'; unknown index"):
        GatherRows(columns=0, type="int8", index_type="int8")  # type: ignore[arg-type]
    gather = GatherRows(columns=8)
    with pytest.raises(ValueError, match="0 rows to gather"):
        gather.launch(rows=0, x=16, index=32, output=48)
    with pytest.raises(ValueError, match="index missing"):
        gather.launch(rows=1, x=16, index=0, output=48)
