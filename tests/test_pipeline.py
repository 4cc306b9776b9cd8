"""What a run leaves behind when it does not end well, and the numbers of one seeded run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from calibration.tokens import calibration_blocks
from compress import pipeline
from compress.compose import compose_settings
from compress.config import parse
from compress.errors import UserError
from compress.model.folder import ModelFolder
from compress.quantize.rounding import Nearest
from compress.quantize.scheme import Scheme
from compress.quantize.stage import quantize
from compress.quantize.transforms import AwqClip, AwqScale
from tests.conftest import byte_tokenizer

GOLDEN = Path(__file__).parent / "golden" / "tiny_awq_int3.json"


def run_of(tiny: ModelFolder, text_file: Path) -> pipeline.Run:
    return parse(
        compose_settings(
            [
                "recipe=awq-int4",
                f"model.source={tiny.path}",
                "data=text",
                f"data.source={text_file}",
                "data.sequences=4",
                "data.length=64",
                "scheme.group_size=32",
                "eval=none",
                "speed=none",
            ]
        )
    )


@pytest.mark.parametrize(
    "broken", ["compress.pipeline.audit", "compress.quantize.stage._copy_rest"]
)
def test_a_failed_run_leaves_nothing_that_looks_finished(
    tiny: ModelFolder,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    broken: str,
) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(broken, fail)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run_recipe(run_of(tiny, text_file), "awq", tmp_path)
    left = {f.name for f in tmp_path.iterdir()}
    assert "checkpoint" not in left
    assert "metrics.json" not in left
    assert not any(name.endswith(".partial") for name in left)


def test_a_finished_run_is_not_overwritten(
    tiny: ModelFolder, text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(UserError, match="exists already"):
        pipeline.run_recipe(run_of(tiny, text_file), "awq", tmp_path)


def test_nan_weights_are_refused_by_name(tiny: ModelFolder, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(tiny.path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((tiny.path / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"model.layers.1.mlp.up_proj.weight holds NaN or Inf"):
        quantize(
            ModelFolder(tmp_path),
            tmp_path / "record",
            tokens=None,
            scheme=Scheme(4, 32),
            transforms=[],
            rounding=Nearest(),
            device=torch.device("cpu"),
        )


def test_golden_errors_of_a_seeded_run(
    tiny: ModelFolder, text_file: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Relative output errors of every linear, to 2 % (matmul kernels differ between machines)."""
    blocks = calibration_blocks(
        [text_file.read_text()], byte_tokenizer(), sequences=8, length=64, seed=0
    )
    found = {}
    for name, transforms in (("rtn", []), ("awq", [AwqScale(), AwqClip()])):
        report = quantize(
            tiny,
            tmp_path / name,
            tokens=blocks.tokens,
            scheme=Scheme(3, 32),
            transforms=transforms or [AwqScale(grid=1)],
            rounding=Nearest(),
            device=torch.device("cpu"),
        )
        found[name] = [
            {linear: entry["relative_error"] for linear, entry in block["linears"].items()}
            for block in report["blocks"]
        ]
    if request.config.getoption("--golden"):
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    for name, blocks_found in found.items():
        for got, expected in zip(blocks_found, golden[name], strict=True):
            assert got == pytest.approx(expected, rel=0.02)
    # In the first block both see the same inputs: AWQ lowers the error of every linear it may
    # change.
    better = [found["awq"][0][k] < found["rtn"][0][k] for k in ("mlp.gate_proj", "mlp.down_proj")]
    assert all(better)
