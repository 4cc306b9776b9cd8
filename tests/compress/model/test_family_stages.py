"""Every stage on a model of every kind that it is for; the others are refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.distill.knobs import Distill
from compress.distill.stage import distill
from compress.errors import UserError
from compress.kv_cache.scheme import CacheScheme, StateScheme
from compress.kv_cache.stage import check as check_cache
from compress.kv_cache.stage import quantize_cache
from compress.model.families import family_of
from compress.model.folder import ModelFolder
from compress.prune.knobs import Prune
from compress.prune.stage import prune
from compress.quantize.repair import Kl
from compress.quantize.rounding import Nearest
from compress.quantize.scheme import Scheme, Schemes
from compress.quantize.search import Search, choose
from compress.quantize.stage import quantize
from compress.rotate import rotate
from compress.runtime.load import load_dense
from eval.engines.family_models import KINDS, written_model

CPU = torch.device("cpu")
FOUR = Schemes(Scheme(4, 32))
ONE_SCALE = StateScheme("float", 8, "tensor")


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp(request.param) / "model"
    return written_model(request.param, path)[1]


@torch.no_grad()
def divergence(folder: ModelFolder, original: ModelFolder, tokens: Tensor) -> float:
    ours, theirs = (
        load_dense(f, CPU, torch.float32)(tokens, use_cache=False).logits.log_softmax(-1)
        for f in (folder, original)
    )
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


def rounded(folder: ModelFolder, path: Path) -> ModelFolder:
    quantize(
        folder, path, tokens=None, schemes=FOUR, transforms=[], roundings=[Nearest()], device=CPU
    )
    return ModelFolder(path)


def rotated(folder: ModelFolder, path: Path, tokens: Tensor) -> None:
    rotate(folder, path / "out")
    assert divergence(ModelFolder(path / "out"), folder, tokens) < 1e-5


def pruned(folder: ModelFolder, path: Path, tokens: Tensor) -> None:
    prune(folder, path / "out", Prune(mlp=64), tokens=tokens, device=CPU)
    found = ModelFolder(path / "out")
    assert found.config["intermediate_size"] == 64
    assert divergence(found, folder, tokens) < 2


def searched(folder: ModelFolder, path: Path, tokens: Tensor) -> None:
    _, report = choose(folder, Search(average_bits=4.0), FOUR, tokens, CPU)
    assert report["average_bits"] <= 4.0
    bits = [group["bits"] for group in report["groups"].values()]
    assert len(bits) == len(report["groups"]) > 1
    assert all(min(group["kl"].values()) >= 0 for group in report["groups"].values())


def repaired(folder: ModelFolder, path: Path, tokens: Tensor) -> None:
    record = rounded(folder, path / "record")
    report = Kl(epochs=1, rate=1e-3, batch=2)(record, folder, path / "out", tokens, CPU)
    assert report
    # The best of its looks is kept, the start among them: they are at tokens that it does not train on.
    lost = divergence(ModelFolder(path / "out"), folder, tokens)
    assert lost < 1.05 * divergence(record, folder, tokens)


def cached(folder: ModelFolder, path: Path, tokens: Tensor) -> None:
    scheme = CacheScheme(ONE_SCALE, ONE_SCALE)
    quantize_cache(folder, path / "out", scheme, tokens=tokens, device=CPU)
    found = ModelFolder(path / "out")
    scales = [name for name in found.names if name.endswith("k_scale")]
    assert len(scales) == len(
        [n for n in found.names if n.endswith(f"{family_of(found.config).attention_output}.weight")]
    )
    assert all(found.tensor(name) > 0 for name in scales)


def distilled(folder: ModelFolder, path: Path, tokens: Tensor) -> None:
    record = rounded(folder, path / "record")
    knobs = Distill(steps=4, batch=2, micro_batch=2, rate=1e-3, log_every=2, save_every=4)
    report = distill(record, folder, path / "out", path / "state", tokens, knobs, CPU)
    assert report
    assert ModelFolder(path / "out").names == record.names


STAGES: dict[str, Callable[[ModelFolder, Path, Tensor], None]] = {
    "rotate": rotated,
    "prune": pruned,
    "search": searched,
    "repair": repaired,
    "kv_cache": cached,
    "distill": distilled,
}


@pytest.mark.parametrize("stage", STAGES)
def test_stages(made: ModelFolder, stage: str, tokens: Tensor, tmp_path: Path) -> None:
    if (reason := family_of(made.config).why_not(stage)) is None:
        STAGES[stage](made, tmp_path, tokens)
        return
    with pytest.raises(UserError, match=f"{stage} does not apply.*{reason[:20]}"):
        check_all(made, stage, tokens)


def check_all(folder: ModelFolder, stage: str, tokens: Tensor) -> None:
    """The check of the stage, by which a run is refused before it starts."""
    from compress.prune.shape import anatomy
    from compress.quantize.search import budget
    from compress.rotate import rotated_sizes

    family = family_of(folder.config)
    checks: dict[str, Callable[[], Any]] = {
        "rotate": lambda: rotated_sizes(folder, family),
        "prune": lambda: anatomy(folder, family),
        "search": lambda: budget(folder, Search(average_bits=4.0), FOUR),
        "repair": lambda: Kl().check(folder, 4),
        "kv_cache": lambda: check_cache(folder, CacheScheme(ONE_SCALE, ONE_SCALE)),
        "distill": lambda: Distill(steps=1).check(folder, CPU, tokens),
    }
    checks[stage]()
