"""The state of unfinished work: whole or not there, of the same work or removed, and cheap."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from compress import saved
from compress.saved import NOWHERE, Saved, changes, cost_of, here

FINGERPRINT = {"scheme": {"bits": 4}, "data": "a" * 64}
MAPS = Path("/proc/self/maps")
TENSORS = {
    "hidden": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "one": torch.tensor(0.1, dtype=torch.float64),
    "none": torch.empty(0),
}


def test_a_position_comes_back_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "quantize.state" / "blocks"
    first = Saved(path, FINGERPRINT)
    assert first.load() is None
    first.save({"block": 1, "error": 0.1}, {"hidden": torch.zeros(1)})
    first.save({"block": 2, "error": 1e-17}, TENSORS)
    (path / "position-3.partial").mkdir()
    (path / "position-3.partial" / "tensors.safetensors").write_bytes(b"half")
    again = Saved(path, FINGERPRINT)
    found = again.load()
    assert found is not None
    assert found.facts == {"block": 2, "error": 1e-17}
    assert found.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor)
    assert [p.name for p in path.iterdir()] == ["position-2"]
    again.save({"block": 3}, {})
    assert {p.name for p in path.iterdir()} == {"position-3", "cost.json"}


@pytest.mark.skipif(not MAPS.exists(), reason="the system does not tell what is mapped")
def test_a_tensor_larger_than_memory_may_stay_in_its_file(tmp_path: Path) -> None:
    """Until it is gone, though the next position comes; what is asked for as a copy is none of the file."""
    state = Saved(tmp_path / "s", FINGERPRINT)
    state.save({}, TENSORS)
    found = Saved(tmp_path / "s", FINGERPRINT).load()
    assert found is not None
    mapped, copy = found.tensors.mapped("hidden"), found.tensors["hidden"]
    del found
    assert "position-1/tensors.safetensors" in MAPS.read_text()
    state.save({}, {})
    assert not (tmp_path / "s" / "position-1").exists()
    assert torch.equal(mapped, TENSORS["hidden"])
    del mapped
    assert "position-1/tensors.safetensors" not in MAPS.read_text()
    assert torch.equal(copy, TENSORS["hidden"])


@pytest.mark.parametrize("moment", ["TensorFile", "sync", "rename", "rmtree"])
def test_a_kill_while_saving_leaves_a_whole_position(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    first = Saved(tmp_path / "s", FINGERPRINT)
    first.save({"block": 1})

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if moment == "rename":
            patch.setattr(Path, "rename", killed)
        elif moment == "rmtree":
            patch.setattr(saved.shutil, "rmtree", killed)
        else:
            patch.setattr(saved, moment, killed)
        with pytest.raises(KeyboardInterrupt):
            first.save({"block": 2})
    found = Saved(tmp_path / "s", FINGERPRINT).load()
    assert found is not None
    assert found.facts == {"block": 2 if moment == "rmtree" else 1}
    assert len(list((tmp_path / "s").glob("position-*"))) == 1


def test_other_work_starts_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "quantize.state"
    first = Saved(path, FINGERPRINT)
    for part in ("search", "blocks"):
        first.part(part).save({"block": 1})
    other = Saved(path, {"scheme": {"bits": 3}, "data": "b" * 64})
    assert other.part("search").load() is None
    assert other.part("blocks").load() is None
    (line,) = caplog.messages
    assert line == "quantize starts anew: scheme.bits was 4, is 3, data is another"
    assert not path.exists()


@pytest.mark.parametrize(
    ("file", "harm"),
    [
        ("facts.json", lambda b: b[:-5]),
        ("facts.json", lambda b: b"{}"),
        ("facts.json", lambda b: b"[]"),
        ("tensors.safetensors", lambda b: b[:-1]),
        ("tensors.safetensors", lambda b: b[:-1] + bytes([b[-1] ^ 1])),
        ("tensors.safetensors", lambda b: b""),
    ],
)
def test_a_state_that_cannot_be_read_starts_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, harm: Any
) -> None:
    Saved(tmp_path / "a.state", FINGERPRINT).save({"block": 1}, TENSORS)
    harmed = tmp_path / "a.state" / "position-1" / file
    harmed.write_bytes(harm(harmed.read_bytes()))
    assert Saved(tmp_path / "a.state", FINGERPRINT).load() is None
    assert "a starts anew: its state cannot be read" in caplog.text
    assert not (tmp_path / "a.state").exists()


def test_a_file_that_is_missing_starts_anew(tmp_path: Path) -> None:
    Saved(tmp_path / "s", FINGERPRINT).save({}, TENSORS)
    (tmp_path / "s" / "position-1" / "tensors.safetensors").unlink()
    assert Saved(tmp_path / "s", FINGERPRINT).load() is None


def test_offers_are_taken_when_they_are_cheap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save that takes a second is made after 50 seconds of work, whatever the parts take."""
    clock = [0.0]
    monkeypatch.setattr(saved, "now", lambda: clock[0])

    def slow(_: Path) -> None:
        clock[0] += 1.0

    monkeypatch.setattr(saved, "sync", slow)
    state = Saved(tmp_path / "s", FINGERPRINT)
    assert state.load() is None
    taken = []
    for part in range(200):
        clock[0] += 4.0
        if state.offer({"part": part}, {"x": torch.zeros(1000)}):
            taken.append(part)
    # Before the first its cost is guessed: 0.05 s.
    assert taken == [0, *range(13, 200, 13)]
    cost = cost_of(tmp_path)
    assert cost is not None
    assert cost.saves == len(taken)
    assert cost.seconds == len(taken) <= clock[0] / saved.TIMES
    # While a position is written, the one before it is there.
    assert 8000 < cost.bytes < 12000
    # Four times as large takes four times as long.
    clock[0] += 180.0
    assert not state.offer({}, {"x": torch.zeros(4000)})
    clock[0] += 8.0
    assert state.offer({}, {"x": torch.zeros(4000)})


def test_files_grow_beside_the_positions(tmp_path: Path) -> None:
    path, target = tmp_path / "s", tmp_path / "t"
    first = Saved(path, FINGERPRINT)
    assert first.load() is None

    def killed() -> None:
        with first.files(target) as folder:
            (folder / "a").write_text("1")
            first.save({"done": ["a"]})
            (folder / "b").write_text("ha")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed()
    assert not target.exists()
    again = Saved(path, FINGERPRINT)
    assert again.load() is not None
    with again.files(target) as folder:
        (folder / "b").write_text("half no more")
    assert {f.name: f.read_text() for f in target.iterdir()} == {"a": "1", "b": "half no more"}
    # Until the work is whole under its name, the state is.
    assert Saved(path, FINGERPRINT).load() is not None
    # Without a position nothing of them counts.
    assert Saved(path, {"other": 1}).load() is None
    assert not path.exists()


def test_nothing_is_kept_nowhere(tmp_path: Path) -> None:
    assert not NOWHERE.part("a").offer({}, {})
    NOWHERE.save({})
    assert NOWHERE.load() is None
    with NOWHERE.files(tmp_path / "t") as folder:
        assert folder == tmp_path / "t"
    assert cost_of(tmp_path) is None


def test_changes_in_words() -> None:
    assert changes(FINGERPRINT, json.loads(json.dumps(FINGERPRINT))) == ""
    assert changes({"a": {"b": 1, "c": None}}, {"a": {"b": 1, "c": "x"}}) == "a.c was null, is x"
    # Methods run in the order in which they are named.
    assert changes({"t": {"a": 1, "b": 2}}, {"t": {"b": 2, "a": 1}}) == "t was a, b, is b, a"
    assert changes({"t": {}}, {"t": {"a": {}}}) == "t.a was null, is {}"


def test_here_is_the_same_twice() -> None:
    facts = here(torch.device("cpu"))
    assert facts == here(torch.device("cpu"))
    assert facts["threads"] == torch.get_num_threads()
    assert len(facts["code"]) == 64


def test_a_file_of_finished_work_that_was_damaged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = Saved(tmp_path / "quantize.state" / "blocks")
    assert saved.load() is None
    with saved.files(tmp_path / "quantize") as folder:
        for index in range(2):
            (folder / f"block-{index}.safetensors").write_bytes(bytes([index]) * 100)
            saved.save({"done": index + 1})
        again = Saved(tmp_path / "quantize.state" / "blocks")
        position = again.load()
        assert position is not None
        assert position.facts == {"done": 2}
        (folder / "block-0.safetensors").write_bytes(b"\1" * 100)
    assert Saved(tmp_path / "quantize.state" / "blocks").load() is None
    assert "block-0.safetensors does not hold the bytes that were written" in caplog.text
