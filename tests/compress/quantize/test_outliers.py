"""The outlier report: counted by hand, and on a model whose outliers are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compress.model.folder import ModelFolder
from compress.quantize.inputs import InputScheme
from compress.quantize.outliers import features
from compress.quantize.rounding import Nearest
from compress.quantize.scheme import Scheme, Schemes
from compress.quantize.stage import quantize
from compress.quantize.transforms import Smooth
from compress.report.outliers import draw_outliers, outlier_table
from compress.runtime.load import load_dense
from eval.benchmarks.outlier_model import add_outliers

CPU = torch.device("cpu")


def test_the_papers_rule_by_hand() -> None:
    """8 layers: hit in 2 of them is a quarter; at 6 % of all positions is 48 % in one of eight."""
    shares = torch.zeros(8, 4)
    shares[:2, 0] = 0.25  # a quarter of the layers, 6.25 % of the positions
    shares[0, 1] = 0.9  # one layer only
    shares[:, 2] = 0.05  # all layers, too few positions
    shares[:2, 3] = 0.23  # 5.75 %
    assert features(shares) == [{"column": 0, "layers": 0.25, "positions": 0.0625}]


def run(
    source: ModelFolder, target: Path, tokens: torch.Tensor, inputs: InputScheme, *transforms: Any
) -> dict[str, Any]:
    return quantize(
        source,
        target,
        tokens=tokens,
        schemes=Schemes(Scheme(8, "channel", True, inputs=inputs)),
        transforms=transforms,
        roundings=[Nearest()],
        device=CPU,
    )


@pytest.fixture(scope="module")
def spiky(tiny: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """The tiny model with outliers in 3 channels of the norms and of the MLP."""
    target = tmp_path_factory.mktemp("spiky") / "model"
    add_outliers(tiny, target, channels=3, factor=1024)
    return ModelFolder(target)


@pytest.mark.parametrize("transforms", [(), (Smooth(),)], ids=["plain", "smooth"])
def test_the_report_is_of_the_original_inputs(
    spiky: ModelFolder, tokens: torch.Tensor, tmp_path: Path, transforms: tuple[Any, ...]
) -> None:
    """Whatever a transform makes of them afterwards. The numbers are counted once more from the model."""
    inputs = InputScheme(outliers="dynamic", threshold=50.0)
    report = run(spiky, tmp_path / "record", tokens, inputs, *transforms)["outliers"]
    assert report["threshold"] == 50.0
    assert report["linears"] == 21
    model = load_dense(spiky, CPU, torch.bfloat16)
    seen: dict[str, torch.Tensor] = {}
    for first in report["inputs"]:
        model.model.layers[0].get_submodule(first).register_forward_pre_hook(
            lambda _, args, first=first: seen.update({first: args[0].abs().flatten(0, -2)})
        )
    with torch.no_grad():
        model(tokens)
    for first, entry in report["inputs"].items():
        above, layer = seen[first] >= 50, entry["layers"][0]
        assert layer["columns"] == int(above.any(0).sum())
        assert layer["values"] == pytest.approx(float(above.float().mean()), rel=1e-4)
        assert layer["largest"] == float(seen[first].max())
    readers = sum(
        len(entry["readers"]) * sum(layer["columns"] > 0 for layer in entry["layers"])
        for entry in report["inputs"].values()
    )
    assert report["linears_above"] == readers > 0


def test_fixed_columns_are_those_that_stand_out(
    spiky: ModelFolder, tokens: torch.Tensor, tmp_path: Path
) -> None:
    """With a high ratio they are the columns that were made outliers, and only they."""
    inputs = InputScheme(outliers="static", ratio=100.0)
    report = run(spiky, tmp_path / "record", tokens, inputs)["outliers"]
    record = ModelFolder(tmp_path / "record")
    kept = {
        name: record.tensor(f"model.layers.0.{name}.columns").tolist()
        for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
    }
    assert len(kept["self_attn.q_proj"]) == 3
    assert kept["self_attn.q_proj"] == kept["self_attn.v_proj"] == kept["mlp.up_proj"]
    assert len(kept["mlp.down_proj"]) == 3
    for name, columns in kept.items():
        weight = spiky.tensor(f"model.layers.0.{name}.weight")
        assert torch.equal(record.tensor(f"model.layers.0.{name}.kept"), weight[:, columns])
    counts = {first: entry["layers"][0]["kept"] for first, entry in report["inputs"].items()}
    assert counts["self_attn.q_proj"] == counts["mlp.down_proj"] == 3


def test_the_rule_of_the_ratio() -> None:
    """Three times the median of the columns that are used; the dead ones do not count."""
    largest = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 2.0, 5.9, 6.0])
    scheme = InputScheme(outliers="static")
    assert scheme.outlier_columns(largest).tolist() == [8]
    assert InputScheme(outliers="static", ratio=2.5).outlier_columns(largest).tolist() == [7, 8]
    assert scheme.outlier_columns(torch.zeros(4)).tolist() == []


def test_table_and_picture(spiky: ModelFolder, tokens: torch.Tensor, tmp_path: Path) -> None:
    report = run(spiky, tmp_path / "record", tokens, InputScheme(outliers="static"))["outliers"]
    text = outlier_table(report)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 3
    first = next(iter(report["inputs"].values()))["layers"][2]
    cells = [cell.strip() for cell in rows[-1].split("|")]
    assert cells[1:6] == [
        "2",
        str(first["columns"]),
        f"{first['values']:.3%}",
        f"{first['largest']:.1f}",
        str(first["kept"]),
    ]
    assert f"{report['linears_above']} of 21 linears" in text
    draw_outliers(report, tmp_path / "outliers.png")
    assert (tmp_path / "outliers.png").read_bytes().startswith(b"\x89PNG")
