"""Names of variants, and what a projection or a launch is refused for."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

import pytest

from plugins.kernel_spec import KernelSpec, grid_of
from plugins.projection.launches import Embedding, Head, Projection
from plugins.projection.packing import WeightFormat

FLOAT16 = WeightFormat(kind="float16")
INT8 = WeightFormat(kind="int8")
INT4 = WeightFormat(kind="int4", group=64)
FORMATS = (
    *(WeightFormat(kind=kind) for kind in ("float32", "float16", "bfloat16", "int8")),
    *(WeightFormat(kind="int4", group=group) for group in (32, 64, 128)),
)


def every_spec() -> Iterator[KernelSpec]:
    batches = (1, 2, 3, 8)
    for fmt, activation, batch in itertools.product(FORMATS, ("float16", "bfloat16"), batches):
        for rows, columns in ((513, 256), (256, 512), (3072, 768), (1024, 2048)):
            for norm, epilogue in itertools.product(
                (False, True), ("plain", "silu", "silu_product", "residual", "scaled_residual")
            ):
                addends = (False,) if epilogue.startswith("silu") else (False, True)
                for addend in addends:
                    if rows % 2 and epilogue == "silu_product":
                        continue
                    yield Projection(
                        rows=rows, columns=columns, weights=fmt, activation=activation, norm=norm,
                        epilogue=epilogue, addend=addend, batch=batch,
                    ).spec  # fmt: skip
        for places in (
            {"output_stride": 515},
            {"output_stride": 516},
            {"extra_rows": 2},
            {"extra_rows": 3},
            {"extra_rows": 2, "extra_weights": FLOAT16},
            {"extra_rows": 2, "extra_offset": 513},
            {"extra_rows": 2, "extra_stride": 515},
            {"extra_rows": 2, "extra_offset": 513, "extra_stride": 515, "output_stride": 515},
            {"input": "float32"},
            {"input": "float32", "norm": True, "extra_rows": 2},
        ):
            yield Projection(
                rows=513, columns=256, weights=fmt, activation=activation, batch=batch, **places
            ).spec
        for vocab, token, logits in itertools.product((32768, 128256), ("int32", "int64"), (0, 1)):
            for embedding in (None, FLOAT16, INT4):
                yield Head(
                    vocab_size=vocab, columns=256, weights=fmt, activation=activation,
                    token=token, logits=bool(logits), embedding=embedding, batch=batch,
                ).spec  # fmt: skip
        for token, ring in itertools.product(("int32", "int64"), (16, 64)):
            yield Head(
                vocab_size=32768, columns=256, weights=fmt, activation=activation, token=token,
                embedding=FLOAT16, batch=batch, advance=True, ring=ring,
            ).spec  # fmt: skip
        for token in ("int32", "int64"):
            yield Embedding(columns=256, weights=fmt, activation=activation, token=token).spec


def test_name_is_shared_by_equal_variants_alone() -> None:
    by_name: dict[str, KernelSpec] = {}
    by_content: dict[str, str] = {}
    for spec in every_spec():
        assert by_name.setdefault(spec.name, spec) == spec
        content = f"{spec.function} {spec.arguments} {spec.constants} {spec.grid} {spec.num_warps}"
        assert by_content.setdefault(content, spec.name) == spec.name
    assert len(by_name) > 1000


def test_names_say_what_they_are() -> None:
    spec = Projection(
        rows=2052, columns=1024, weights=INT4, activation="float16", norm=True, batch=8
    ).spec
    assert spec.name == "project-fp16-int4g64-2052x1024-norm-plain-t2x8x1024"
    spec = Projection(
        rows=512, columns=256, weights=INT8, activation="float32", input="float16", norm=True,
        output_stride=514, extra_rows=2, extra_offset=512, extra_stride=514,
    ).spec  # fmt: skip
    assert spec.name == (
        "project-fp32-int8-512x256-x_fp16-norm-plain-stride514-extra_fp32_2at512stride514-t1x4x256"
    )
    head = Head(vocab_size=32768, columns=256, weights=INT8, activation="bfloat16", embedding=INT8)
    assert head.spec.name == "head-bf16-int8-32768x256-int64-embed_int8-b1-t1x32x256"
    assert all(re.fullmatch(r"[a-z0-9_-]+", spec.name) for spec in every_spec())


def test_grid_covers_every_row_and_sequence() -> None:
    for fmt, batch in itertools.product(FORMATS, range(1, 9)):
        projection = Projection(
            rows=513, columns=256, weights=fmt, activation="float16", batch=batch
        )
        spec, tile = projection.spec, projection.tile
        sequences, blocks, _ = grid_of(spec.grid, {"batch": batch})
        assert batch <= sequences * tile.batch < batch + tile.batch
        assert 513 <= blocks * tile.rows < 513 + tile.rows


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: f"{fmt.kind}{fmt.group or ''}")
def test_threads_load_16_bytes_of_weights_each(fmt: WeightFormat) -> None:
    for rows, columns in ((513, 256), (256, 256), (256, 512), (1539, 768), (1024, 2048)):
        tile = Projection(rows=rows, columns=columns, weights=fmt, activation="float16").tile
        assert tile.rows * tile.columns * fmt.bits >= 128 * 32 * tile.warps


def test_workspace_holds_a_key_for_each_block_and_sequence() -> None:
    head = Head(vocab_size=1001, columns=64, weights=FLOAT16, activation="float16", batch=3)
    blocks = grid_of(head.spec.grid, {"batch": 3})[1]
    assert head.workspace_bytes >= 8 * 3 * blocks
    assert head.workspace_bytes % 16 == 0
    assert head.counters == 1


def test_projections_that_no_kernel_covers_are_refused() -> None:
    with pytest.raises(ValueError, match="20 columns cannot be stored as float16"):
        Projection(rows=8, columns=20, weights=FLOAT16, activation="float16")
    with pytest.raises(ValueError, match="a batch of 9, expected 1 to 8"):
        Projection(rows=8, columns=16, weights=FLOAT16, activation="float16", batch=9)
    with pytest.raises(ValueError, match="7 rows are no pairs of gate and up"):
        Projection(
            rows=7, columns=16, weights=FLOAT16, activation="float16", epilogue="silu_product"
        )
    with pytest.raises(ValueError, match="nothing is added after silu"):
        Projection(
            rows=8, columns=16, weights=FLOAT16, activation="float16", epilogue="silu", addend=True
        )
    with pytest.raises(ValueError, match="unknown activation 'int8'"):
        Projection(rows=8, columns=16, weights=FLOAT16, activation="int8")
    with pytest.raises(ValueError, match="unknown epilogue 'gelu'"):
        Projection(rows=8, columns=16, weights=FLOAT16, activation="float16", epilogue="gelu")
    with pytest.raises(ValueError, match=re.escape("expected fewer than 2^31 weights")):
        Projection(rows=1 << 20, columns=1 << 11, weights=FLOAT16, activation="float16")


def test_extra_rows_and_places_that_no_kernel_covers_are_refused() -> None:
    def refused(message: str, **changes: object) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            Projection(
                rows=8, columns=56, weights=FLOAT16, activation="float32",
                **{"extra_rows": 2, **changes},
            )  # fmt: skip

    refused("unknown input 'int8'", input="int8")
    refused("output rows 7 apart, expected at least 8", output_stride=7)
    refused("extra rows are int8, expected floats", extra_weights=INT8)
    refused("extra rows are int4, expected floats", extra_weights=INT4)
    refused("-1 extra rows, expected 0 or more", extra_rows=-1)
    refused("extra products from -1 on, expected 0 or more", extra_offset=-1)
    refused("extra products 1 apart, expected at least 2", extra_stride=1)
    refused("a place for extra rows, of which there are none", extra_rows=0, extra_offset=4)
    refused("a place for extra rows, of which there are none", extra_rows=0, extra_stride=4)


def test_grid_covers_every_extra_row() -> None:
    for fmt, batch, rows in itertools.product(FORMATS, (1, 8), (1, 2, 7, 128, 330)):
        plain = Projection(rows=513, columns=256, weights=fmt, activation="float32", batch=batch)
        both = Projection(
            rows=513, columns=256, weights=fmt, activation="float32", batch=batch, extra_rows=rows
        )
        sizes = {"batch": batch}
        before, after = (grid_of(spec.grid, sizes)[1] for spec in (plain.spec, both.spec))
        assert rows <= (after - before) * both.extra_tile.rows < rows + both.extra_tile.rows
        assert (both.extra_tile.batch, both.extra_tile.warps) == (both.tile.batch, both.tile.warps)


def test_launch_asks_for_the_extra_matrix_where_it_has_rows() -> None:
    whole = {"batch": 1, "x": 16, "weights": 32, "output": 48}
    sized = {"rows": 8, "columns": 64, "weights": FLOAT16, "activation": "float32"}
    both = Projection(**sized, extra_rows=2)
    launch = both.launch(**whole, extra=64, extra_output=80)
    assert (launch.arguments["extra"], launch.arguments["extra_output"]) == (64, 80)
    with pytest.raises(ValueError, match="extra missing, extra_output missing"):
        both.launch(**whole)
    with pytest.raises(ValueError, match="extra unused, extra_output unused"):
        Projection(**sized).launch(**whole, extra=64, extra_output=80)


def test_heads_and_embeddings_that_no_kernel_covers_are_refused() -> None:
    with pytest.raises(ValueError, match="neither logits nor a token is written"):
        Head(vocab_size=8, columns=32, weights=FLOAT16, activation="float16", token=None)
    with pytest.raises(ValueError, match="an embedding row needs a token"):
        Head(
            vocab_size=8, columns=64, weights=FLOAT16, activation="float16", token=None,
            logits=True, embedding=INT4,
        )  # fmt: skip
    with pytest.raises(ValueError, match="no step is prepared without a token"):
        Head(
            vocab_size=8, columns=32, weights=FLOAT16, activation="float16", token=None,
            logits=True, advance=True,
        )  # fmt: skip
    with pytest.raises(ValueError, match="a ring of 0 steps, expected at least 1"):
        Head(vocab_size=8, columns=32, weights=FLOAT16, activation="float16", advance=True, ring=0)
    with pytest.raises(ValueError, match="32 columns cannot be stored as int4"):
        Head(vocab_size=8, columns=32, weights=FLOAT16, activation="float16", embedding=INT4)
    with pytest.raises(ValueError, match="32 columns cannot be stored as int4"):
        Embedding(columns=32, weights=INT4, activation="float16")


def test_launches_ask_for_what_they_read_and_write_and_no_more() -> None:
    projection = Projection(
        rows=8, columns=64, weights=INT4, activation="float16", norm=True, batch=2
    )
    whole = {"x": 16, "weights": 32, "scales": 48, "norm": 64, "output": 80}
    launch = projection.launch(batch=2, **whole)
    assert launch.kernel == projection.spec.name
    assert launch.arguments.keys() == projection.spec.arguments.keys()
    assert {name: launch.arguments[name] for name in whole} == whole
    assert (launch.arguments["residual"], launch.arguments["batch"]) == (0, 2)
    for name in whole:
        with pytest.raises(ValueError, match=f"{name} missing"):
            projection.launch(batch=2, **{**whole, name: 0})
    with pytest.raises(ValueError, match="residual unused, residual_weight unused"):
        projection.launch(batch=2, residual=96, residual_weight=112, **whole)
    for batch in (0, 3):
        with pytest.raises(ValueError, match=f"a batch of {batch}, expected 1 to 2"):
            projection.launch(batch=batch, **whole)


def test_head_asks_for_the_next_step_if_it_prepares_it() -> None:
    sizes = {"vocab_size": 8, "columns": 64, "weights": FLOAT16, "activation": "float16"}
    addresses = {"x": 16, "norm": 32, "weights": 48, "tokens": 64, "workspace": 80, "counters": 96}
    next_step = {"positions": 112, "ring": 128, "step": 144}
    head = Head(**sizes, advance=True)
    launch = head.launch(batch=1, last_slot=5, **addresses, **next_step)
    assert launch.arguments.keys() == head.spec.arguments.keys()
    assert {name: launch.arguments[name] for name in next_step} == next_step
    assert launch.arguments["last_slot"] == 5
    for name in next_step:
        with pytest.raises(ValueError, match=f"{name} missing"):
            head.launch(batch=1, **addresses, **{**next_step, name: 0})
    with pytest.raises(ValueError, match="positions unused, ring unused, step unused"):
        Head(**sizes).launch(batch=1, **addresses, **next_step)


def test_head_without_tokens_asks_for_no_scratch() -> None:
    head = Head(
        vocab_size=8, columns=64, weights=FLOAT16, activation="float16", token=None, logits=True
    )
    launch = head.launch(batch=1, x=16, norm=32, weights=48, logits=64)
    assert launch.arguments.keys() == head.spec.arguments.keys()
    with pytest.raises(ValueError, match="best_keys unused, arrivals unused"):
        head.launch(batch=1, x=16, norm=32, weights=48, logits=64, workspace=80, counters=96)
