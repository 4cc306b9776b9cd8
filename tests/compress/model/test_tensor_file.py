"""Files written tensor by tensor are those that safetensors writes at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.model import tensor_file
from compress.model.tensor_file import TYPES, TensorFile


def test_the_bytes_are_those_of_safetensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every type, no and several dimensions, no elements, not in one piece, and more than one part."""
    monkeypatch.setattr(tensor_file, "CHUNK", 64)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"t.{i}.ü": torch.randint(0, 100, (7, 5), generator=generator).to(dtype)
        for i, dtype in enumerate(TYPES)
    }
    tensors |= {
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
        "turned": torch.arange(400, dtype=torch.int32).view(20, 20).T,
        "deep": torch.randn(3, 4, 5, generator=generator).bfloat16(),
    }
    written = TensorFile(tmp_path / "ours.safetensors")
    for name, tensor in tensors.items():
        written.add(name, tensor)
    assert not list(tmp_path.iterdir()), "nothing has a name before the file is whole"
    written.close()
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    ours, theirs = (tmp_path / f"{who}.safetensors" for who in ("ours", "theirs"))
    assert ours.read_bytes() == theirs.read_bytes()
    assert ours.stat().st_mode & 0o777 == 0o644
    assert written.nbytes == sum(t.nbytes for t in tensors.values())


def test_rows_come_in_parts(tmp_path: Path) -> None:
    X = torch.arange(12.0).view(6, 2)
    written = TensorFile(tmp_path / "rows.safetensors")
    written.add_rows("X", (6, 2), torch.float32, (X[i : i + 4] for i in (0, 4)))
    with pytest.raises(AssertionError, match="short"):
        written.add_rows("short", (6, 2), torch.float32, [X[:4]])
    written.close()
    assert torch.equal(load_file(tmp_path / "rows.safetensors")["X"], X)
