"""The next block is read while one runs: the same tensors, one block ahead and no more, and errors arrive."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from compress.errors import UserError
from compress.model.families import LLAMA
from compress.model.folder import ModelFolder
from compress.model.walk import Walk

CPU = torch.device("cpu")


class Watched:
    """A folder that notes which blocks are read, and fails at one tensor if it is told so."""

    def __init__(self, folder: ModelFolder, broken: str = ""):
        self.folder, self.names, self.broken = folder, folder.names, broken
        self.blocks: list[int] = []
        self.threads: set[str] = set()

    def tensor(self, name: str) -> torch.Tensor:
        if name == self.broken:
            raise UserError(f"cannot give {name}")
        if name.startswith("model.layers."):
            self.blocks.append(int(name.split(".")[2]))
            self.threads.add(threading.current_thread().name)
        return self.folder.tensor(name)


def walked(walk: Walk, tokens: torch.Tensor) -> torch.Tensor:
    walk.embed(tokens)
    for index in range(len(walk)):
        with walk.open(index):
            walk.leave(index, walk.enter(index))
    assert walk.hidden is not None
    return walk.hidden


@pytest.mark.parametrize("spill", [False, True])
def test_the_states_are_the_same(
    make_model: Callable[..., ModelFolder], tokens: torch.Tensor, tmp_path: Path, spill: bool
) -> None:
    folder = make_model("llama")
    length = tokens.shape[1]
    plain = walked(Walk(folder, LLAMA, CPU, 4 * length), tokens)
    source = Watched(folder)
    walk = Walk(
        folder, LLAMA, CPU, 4 * length, source, spill=tmp_path if spill else None, ahead=True
    )
    assert torch.equal(walked(walk, tokens), plain)
    assert sorted(source.blocks) == source.blocks, "in order"
    assert set(source.blocks) == {0, 1, 2}
    assert any(name.startswith("next-block") for name in source.threads)
    assert not list(tmp_path.iterdir())


def test_no_more_than_one_block_ahead(tiny: ModelFolder) -> None:
    source = Watched(tiny)
    walk = Walk(tiny, LLAMA, CPU, read=source, ahead=True)
    with walk.open(0):
        assert walk._ahead is not None
        assert walk._ahead._next is not None
        walk._ahead._next[1].result()
        assert set(source.blocks) == {0, 1}
    # Another block than the one that was read.
    with walk.open(2) as module:
        held = module.get_submodule("mlp.down_proj").weight
        assert torch.equal(held, tiny.tensor("model.layers.2.mlp.down_proj.weight"))
    assert walk._ahead._next is None, "the last block has none after it"


def test_without_it_nothing_is_read_before_its_turn(tiny: ModelFolder) -> None:
    source = Watched(tiny)
    walk = Walk(tiny, LLAMA, CPU, read=source)
    with walk.open(0):
        assert set(source.blocks) == {0}
    assert source.threads == {threading.current_thread().name}


def test_an_error_of_the_thread_is_raised_where_the_block_is_opened(tiny: ModelFolder) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    walk = Walk(tiny, LLAMA, CPU, read=Watched(tiny, broken=name), ahead=True)
    with walk.open(0):
        pass
    with pytest.raises(UserError, match=f"cannot give {name}"), walk.open(1):
        pass
    # A block that nobody asks for may be broken.
    with walk.open(0):
        pass
    with walk.open(2) as module:
        assert not any(p.is_meta for p in module.parameters())
