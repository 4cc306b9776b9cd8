"""Pruning on a CUDA device: as on the CPU, but for rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compress.model.folder import ModelFolder
from compress.prune.knobs import Prune
from compress.prune.stage import prune

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    "knobs",
    [
        {"mlp": 160, "heads": 2},
        {"layers": 2, "depth": "perplexity"},
        {"hidden": 96, "importance": "activation"},
        {"kv_heads": 1, "kv": "principal"},
        {"kv_heads": 1, "importance": "magnitude", "refit": "all"},
        {"share": 0.3, "axes": ["heads", "mlp"], "multiple": 8, "trial_sequences": 8},
    ],
)
def test_errors_agree_with_the_cpu(
    tiny: ModelFolder, tmp_path: Path, knobs: dict[str, Any]
) -> None:
    tokens = torch.randint(256, (24, 32), generator=torch.Generator().manual_seed(2))
    errors = {}
    for name in ("cpu", "cuda"):
        target, device = tmp_path / name, torch.device(name)
        report = prune(tiny, target, Prune(**knobs), tokens=tokens, device=device)["prune"]
        errors[name] = sum(e for block in report["blocks"] for e in block["errors"].values())
        small = ModelFolder(target)
        assert sum(small.tensor(n).numel() for n in small.names) == report["parameters"][1]
    assert errors["cuda"] == pytest.approx(errors["cpu"], rel=0.1)
