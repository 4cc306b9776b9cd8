"""What engines read of which family: the matrix and its proofs say what was found, and nothing else."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.engines import PLAIN, PROOFS, TRANSFORMERS, VLLM_CPU
from compress.model.folder import SINGLE, read_json
from compress.model.shapes import ShapeFolder
from compress.plan.loadable import loadable
from compress.plan.rows import served
from compress.quantize.scheme import Schemes
from eval.engines.family_check import CASES, asked, check, reads, said, table
from eval.engines.family_models import KINDS, written_model

RESULTS = Path(__file__).parents[2] / "eval" / "results"
LOADS: dict[str, Any] = read_json(RESULTS / "families.json")["loads"]
# What is said of a case: the engines whose rows are about it.
SAID = (TRANSFORMERS, VLLM_CPU)


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_kind_was_tried(kind: str) -> None:
    assert set(LOADS[kind]) >= {case.name for case in CASES if not case.experts}


def test_the_matrix_says_what_was_found(kind: str, tmp_path: Path) -> None:
    _, folder = written_model(kind, tmp_path / "model", torch.bfloat16)
    shapes = ShapeFolder("tried", folder.config)
    for case in CASES:
        for engine, answer in LOADS[kind].get(case.name, {}).items():
            if engine not in SAID or "refused" in answer:
                continue
            schemes = None if case.export == "dense" else Schemes(case.scheme)
            found = loadable(served(shapes, schemes, None, export=case.export))[engine]
            assert found["loads"] == reads(answer), (case.name, engine, found["reasons"], answer)


def test_proofs_are_of_what_was_read() -> None:
    types: dict[tuple[str, str, str], set[str]] = {}
    failed: dict[tuple[str, str, str], set[str]] = {}
    for kind, formats in LOADS.items():
        for case in CASES:
            for engine, answer in formats.get(case.name, {}).items():
                if kind in KINDS:
                    name = PLAIN if case.export == "dense" else case.scheme.name
                    found = types if reads(answer) else failed
                    found.setdefault((engine, case.export, name), set()).add(KINDS[kind][0])
    proofs = [proof for proof in PROOFS if proof.model_types != ("llama",)]
    told: dict[tuple[str, str, str], set[str]] = {}
    for proof in proofs:
        for scheme in proof.kinds:
            key = (proof.engine, proof.format, scheme)
            told.setdefault(key, set()).update(proof.model_types)
    assert told
    assert told == {key: types[key] - failed.get(key, set()) for key in told}


def test_the_table_is_that_of_the_results() -> None:
    assert (RESULTS / "families.md").read_text(encoding="utf-8") == table(LOADS)


def test_what_an_engine_says_last_is_told_without_paths() -> None:
    log = "(Worker) x\nRuntimeError: Engine core initialization failed\nValueError: no /tmp/a/b.st here"
    assert said(log) == "ValueError: no b.st here"
    assert said("") == "it said nothing"


def test_an_engine_that_makes_weights_up_is_no_reader(tmp_path: Path) -> None:
    """By the program itself: transformers reads this one, but not the same without a weight."""
    case = next(case for case in CASES if case.export == "dense")
    pythons = {TRANSFORMERS: Path(sys.executable)}
    ((engine, answer),) = check("llama", case, tmp_path, pythons)
    assert engine == TRANSFORMERS
    assert reads(answer), answer
    tensors = load_file(tmp_path / "out" / SINGLE)
    tensors.pop("model.layers.1.mlp.down_proj.weight")
    save_file(tensors, tmp_path / "out" / SINGLE, {"format": "pt"})
    expected = torch.zeros(2, 23)
    answer = asked(TRANSFORMERS, pythons[TRANSFORMERS], tmp_path / "out", expected, tmp_path)
    assert answer == {"error": "ValueError: does not find 1 of its weights"}
