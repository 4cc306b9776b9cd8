"""Pictures are written for what a run reports, with and without the parts that may be missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress.report.blocks import draw_blocks

NAMES = ("self_attn.q_proj", "mlp.down_proj")


@pytest.mark.parametrize("divergence", [None, [0.1, 0.2, 0.0]])
@pytest.mark.parametrize("error", [0.01, 0.0])
def test_blocks(tmp_path: Path, divergence: list[float] | None, error: float) -> None:
    blocks = [
        {"linears": {name: {"relative_error": i * error} for name in NAMES}} for i in range(3)
    ]
    draw_blocks(blocks, divergence, tmp_path / "blocks.png")
    picture = (tmp_path / "blocks.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 5_000
