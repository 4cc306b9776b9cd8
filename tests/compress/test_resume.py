"""Every stage that is killed goes on from the last block that it had done, to the same bytes and report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from calibration import generated
from calibration.generated import generated_tokens
from compress import rotate as rotation
from compress import saved
from compress.kv_cache.scheme import CacheScheme, StateScheme
from compress.kv_cache.stage import quantize_cache
from compress.model.folder import ModelFolder
from compress.prune import cut
from compress.prune.knobs import Prune
from compress.prune.stage import prune
from compress.quantize.inputs import InputScheme
from compress.quantize.repair import Kl
from compress.quantize.rounding import Gptaq, Gptq, Learned, Nearest
from compress.quantize.scheme import Scheme, Schemes
from compress.quantize.search import Search, choose
from compress.quantize.stage import quantize
from compress.quantize.transforms import AwqClip, AwqScale
from compress.rotate import rotate
from compress.runtime.load import load_dense
from compress.saved import NOWHERE, Saved
from eval.faults.tiny import byte_tokenizer

CPU = torch.device("cpu")
Work = Callable[[Path, Saved], Any]


class Killed(BaseException):
    pass


@pytest.fixture(autouse=True)
def _always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save whatever is offered: what is tiny would not be worth it."""
    monkeypatch.setattr(saved, "TIMES", 0)


def killed_at_every_save(work: Work, path: Path) -> tuple[Any, int]:
    """What the last of many processes returns, each of which saves once and is killed; and how many were."""
    save, kills = Saved.save, 0

    def deadly(self: Saved, *words: Any) -> None:
        save(self, *words)
        raise Killed

    while True:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Saved, "save", deadly)
            try:
                return work(path / "target", Saved(path / "a.state", {"a": 1})), kills
            except Killed:
                kills += 1
                assert not (path / "target").exists()


def timeless(value: Any) -> Any:
    """A report without what a clock says."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k != "seconds"}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def same_in_the_end(work: Work, path: Path, kills: int) -> None:
    """What was killed ``kills`` times ends as what nobody disturbs and nobody saves."""
    once = work(path / "once", NOWHERE)
    found, count = killed_at_every_save(work, path)
    assert count == kills
    assert timeless(json.loads(json.dumps(found))) == timeless(json.loads(json.dumps(once)))
    assert files_of(path / "target") == files_of(path / "once")


@pytest.fixture(scope="module")
def record(tiny: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    target = tmp_path_factory.mktemp("record") / "record"
    quantizing(tiny, None, Schemes(Scheme(3, 32)), [], [Nearest()])(target, NOWHERE)
    return ModelFolder(target)


def quantizing(
    source: ModelFolder,
    tokens: Tensor | None,
    schemes: Schemes,
    transforms: list[Any],
    roundings: list[Any],
    *,
    spill: bool = False,
) -> Work:
    def work(target: Path, saved: Saved) -> dict[str, Any]:
        return quantize(
            source,
            target,
            tokens=tokens,
            schemes=schemes,
            transforms=transforms,
            roundings=roundings,
            device=CPU,
            saved=saved,
            # Where nobody saves they stay in memory.
            spill=target.parent if spill and saved is not NOWHERE else None,
        )

    return work


INTS = Scheme(3, 32)
W8A8 = Scheme(8, "channel", True, inputs=InputScheme(outliers="dynamic"))


@pytest.mark.parametrize(
    ("schemes", "transforms", "roundings"),
    [
        (Schemes(INTS), [AwqScale(), AwqClip()], [Nearest()]),
        (Schemes(INTS, head=Scheme(8, 32)), [], [Gptq()]),
        # These carry the original's stream.
        (Schemes(INTS), [], [Gptaq()]),
        (Schemes(INTS), [], [Learned(iters=4, batch=4)]),
        (Schemes(W8A8), [], [Nearest()]),
    ],
    ids=["awq", "gptq", "gptaq", "learned", "outliers"],
)
def test_quantize(
    tiny: ModelFolder,
    tokens: Tensor,
    tmp_path: Path,
    schemes: Schemes,
    transforms: list[Any],
    roundings: list[Any],
) -> None:
    same_in_the_end(quantizing(tiny, tokens, schemes, transforms, roundings), tmp_path, 3)


def test_quantize_with_states_on_disk(tiny: ModelFolder, tokens: Tensor, tmp_path: Path) -> None:
    work = quantizing(tiny, tokens, Schemes(INTS), [AwqScale()], [Gptaq()], spill=True)
    same_in_the_end(work, tmp_path, 3)


def test_quantize_without_data(tiny: ModelFolder, tmp_path: Path) -> None:
    same_in_the_end(quantizing(tiny, None, Schemes(INTS), [], [Nearest()]), tmp_path, 3)


def test_quantize_killed_in_the_middle_of_a_block(
    tiny: ModelFolder, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it had begun to write is written again; the original stays unread where it is done."""
    from compress.quantize import stage

    work = quantizing(tiny, tokens, Schemes(INTS), [], [Gptq()])
    once = work(tmp_path / "once", NOWHERE)
    state, opened = tmp_path / "a.state", list[str]()
    open_block = stage.open_block

    def failing(module: Any, prefix: str, *words: Any) -> Any:
        opened.append(prefix)
        if prefix.endswith("2") and opened.count(prefix) == 1:
            (state / "files" / "block-00002.safetensors").write_bytes(b"half")
            raise Killed
        return open_block(module, prefix, *words)

    monkeypatch.setattr(stage, "open_block", failing)
    with pytest.raises(Killed):
        work(tmp_path / "target", Saved(state, {}))
    found = work(tmp_path / "target", Saved(state, {}))
    assert opened == [f"model.layers.{i}" for i in (0, 1, 2, 2)]
    assert timeless(found) == timeless(once)
    assert files_of(tmp_path / "target") == files_of(tmp_path / "once")


def test_quantize_goes_on_from_no_harmed_state(
    tiny: ModelFolder, tokens: Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    work = quantizing(tiny, tokens, Schemes(INTS), [], [Gptq()])
    once = work(tmp_path / "once", NOWHERE)
    work(tmp_path / "first", Saved(tmp_path / "a.state", {}))
    file = tmp_path / "a.state" / "position-3" / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    found = work(tmp_path / "target", Saved(tmp_path / "a.state", {}))
    assert "a starts anew: its state cannot be read" in caplog.text
    assert timeless(found) == timeless(once)
    assert files_of(tmp_path / "target") == files_of(tmp_path / "once")


def test_search(tiny: ModelFolder, tokens: Tensor, tmp_path: Path) -> None:
    search = Search(average_bits=3, choices=[2, 4], tokens=32)

    def work(target: Path, saved: Saved) -> list[Any]:
        schemes, report = choose(tiny, search, Schemes(Scheme(4, 32)), tokens, CPU, saved)
        target.mkdir()
        return [schemes.as_config(), report]

    same_in_the_end(work, tmp_path, 3)


def test_rotate(tiny: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With files that are full in the middle of a block, and one that is full at once."""
    for nbytes in (2**30, 150_000, 1):
        monkeypatch.setattr(rotation, "SHARD_BYTES", nbytes)

        def work(target: Path, saved: Saved) -> dict[str, Any]:
            return rotate(tiny, target, seed=1, saved=saved)

        (tmp_path / str(nbytes)).mkdir()
        same_in_the_end(work, tmp_path / str(nbytes), 3)


def test_kv_cache(tiny: ModelFolder, tokens: Tensor, tmp_path: Path) -> None:
    fp8 = StateScheme("float", 8, "head")

    def work(target: Path, saved: Saved) -> dict[str, Any]:
        scheme = CacheScheme(fp8, fp8)
        return quantize_cache(tiny, target, scheme, tokens=tokens, device=CPU, saved=saved)

    same_in_the_end(work, tmp_path, 3)


@pytest.mark.parametrize(
    ("knobs", "kills"),
    [
        # The survey, each sequence without each block, the cut.
        ({"layers": 2, "depth": "perplexity"}, 3 + 6 + 2),
        ({"hidden": 96, "mlp": 192}, 3 + 3),
        ({"kv_heads": 1, "seed": 3}, 3 + 3),
        # Two tries besides, which are not gone on with themselves.
        (
            {"share": 0.3, "axes": ["layers", "mlp"], "candidates": 2, "trial_sequences": 4},
            3 + 2 + 3,
        ),
    ],
    ids=["depth", "width", "kv", "tries"],
)
def test_prune(
    tiny: ModelFolder,
    tokens: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    knobs: dict[str, Any],
    kills: int,
) -> None:
    monkeypatch.setattr(cut, "SHARD_BYTES", 150_000)
    if "candidates" in knobs:
        tokens = tokens.repeat(2, 1)

    def work(target: Path, saved: Saved) -> dict[str, Any]:
        return prune(tiny, target, Prune(**knobs), tokens=tokens, device=CPU, saved=saved)

    same_in_the_end(work, tmp_path, kills)


def test_repair(tiny: ModelFolder, record: ModelFolder, tokens: Tensor, tmp_path: Path) -> None:
    """Five sequences in two steps a pass, the last one smaller; saved after each and after a pass."""
    repair = Kl(epochs=2, rate=5e-3, batch=3)

    def work(target: Path, saved: Saved) -> dict[str, Any]:
        return repair(record, tiny, target, tokens, CPU, saved)

    same_in_the_end(work, tmp_path, 2 * (2 + 1))


def test_generate(tiny: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generated, "BATCH", 2)
    model, tokenizer = load_dense(tiny, CPU, tiny.dtype), byte_tokenizer()

    def work(target: Path, saved: Saved) -> list[Any]:
        found = generated_tokens(
            model, sequences=5, length=8, tokenizer=tokenizer, seed=1, saved=saved
        )
        target.mkdir()
        return found.tolist()

    same_in_the_end(work, tmp_path, 3)
