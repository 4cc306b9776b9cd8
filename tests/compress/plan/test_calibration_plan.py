"""The memory of a compressing run, term by term."""

from __future__ import annotations

import pytest

from compress.compose import compose_settings
from compress.config import parse
from compress.model.families import family_of
from compress.model.shapes import ShapeFolder
from compress.plan.calibration import CODE, EMPTY_BLOCK, Stage, stages
from compress.plan.checkpoint import as_planned
from compress.plan.hardware import Hardware
from compress.quantize.stage import settle

HERE = Hardware("here", 20, 20, {"bf16": 0.2, "float32": 0.1})


def planned(shape: str, *words: str) -> list[Stage]:
    run, shapes = parse(compose_settings([*words])), ShapeFolder(shape)
    schemes = settle(shapes, family_of(shapes.config), run.schemes)
    return stages(run, shapes, as_planned(shapes, schemes), HERE)


def test_a_large_vocabulary_is_the_peak_of_a_small_model() -> None:
    quantize, export = planned("smollm2-135m", "recipe=rtn-int4")
    table = 49152 * 576 * 2
    code = CODE + 30 * EMPTY_BLOCK
    # Embedding, final norm, and what looks for NaN and Inf.
    assert quantize.bytes == code + table + 576 * 2 + 2.5 * table
    # The whole file, and a copy of its largest matrix.
    assert export.bytes == pytest.approx(code + 114_031_352 + table, rel=1e-4)


def test_a_large_export_goes_file_by_file() -> None:
    _, export = planned("llama-2-13b", "recipe=rtn-int4")
    assert export.bytes == CODE + 40 * EMPTY_BLOCK + 4 * 2**30 + 32000 * 5120 * 2


def test_factoring_in_float64_grows_with_the_widest_input() -> None:
    gptq, _ = planned("llama-2-13b", "recipe=gptq-int4")
    awq, _ = planned("llama-2-13b", "recipe=awq-int4")
    assert gptq.what == "factoring second moments"
    assert gptq.bytes > 6 * 8 * 13824**2
    assert awq.bytes < gptq.bytes
    # More text is more states between two blocks, and more work, but no more of anything else.
    more, _ = planned("llama-2-13b", "recipe=gptq-int4", "data.sequences=128")
    assert more.bytes - gptq.bytes == 64 * 512 * 2 * (5120 + 5120)
    assert more.seconds > gptq.seconds


def test_states_of_the_original_beside_them() -> None:
    once, _ = planned("llama-3.2-1b", "recipe=gptq-int4")
    twice, _ = planned("llama-3.2-1b", "recipe=gptaq-int4")
    # Its states, and cross moments beside the second ones, of 64 x 512 tokens.
    assert twice.bytes - once.bytes == 64 * 512 * 2 * 2048 + 4 * (3 * 2048**2 + 8192**2)
