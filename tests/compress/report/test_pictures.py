"""Pictures are written for what a run reports, with and without the parts that may be missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from compress.report.blocks import draw_blocks
from compress.report.distillation import draw_distillation

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


@pytest.mark.parametrize(("hidden", "kept"), [(0.0, None), (0.3, None), (0.0, 64)])
def test_a_distillation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hidden: float, kept: int | None
) -> None:
    """Errors of states are on an axis of their own: they are no nats. A bound is called one."""
    steps = (10, 20)
    points: list[dict[str, Any]] = [
        {"step": s, "tokens": 8 * s, "loss": 1 / s, "kl": 1 / s, "ce": 0.0, "hidden": hidden / s}
        for s in steps
    ]
    report = {
        "curve": [point | {"rate": 1e-4, "tokens_per_s": 100.0} for point in points],
        "held_out": [{"step": s, "kl": 2 / s, "nll": 3.0} for s in steps],
        "held_out_top_k": kept,
        "tokens": 160,
        "steps": 20,
        "original_nll": 2.9,
    }
    drawn: list[Figure] = []
    save = Figure.savefig

    def noting(figure: Figure, *args: Any, **kwargs: Any) -> None:
        drawn.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", noting)
    draw_distillation(report, tmp_path / "d.png")
    assert (tmp_path / "d.png").read_bytes().startswith(b"\x89PNG")
    axes = {axis.get_ylabel(): axis for axis in drawn[0].axes}
    nats = axes["divergence from the original, nats per token"]
    assert [len(line.get_xdata()) for line in nats.lines] == [2, 2]
    assert ("lower bound" in nats.lines[1].get_label()) == (kept is not None)
    states = axes.get("relative squared error of the states, training (orange)")
    assert (states is not None) == (hidden > 0)
