"""Every format writes as it reads: a tensor in memory at a time, in as many files as it takes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.export import shards
from compress.export.audit import audit
from compress.export.formats import FORMATS
from compress.model.folder import ModelFolder
from compress.quantize import record
from compress.quantize.inputs import InputScheme
from compress.quantize.rounding import Nearest
from compress.quantize.scheme import Scheme, Schemes
from compress.quantize.stage import quantize

INT4 = Scheme(4, 32, True)
LLM_INT8 = Scheme(8, "channel", True, inputs=InputScheme(outliers="dynamic"))


@pytest.mark.parametrize("name", FORMATS)
def test_one_tensor_at_a_time(
    name: str,
    make_model: Callable[..., ModelFolder],
    tokens: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quantize(
        make_model(),
        tmp_path / "record",
        tokens=tokens if name == "bitsandbytes" else None,
        schemes=Schemes(LLM_INT8 if name == "bitsandbytes" else INT4),
        transforms=[],
        roundings=[Nearest()],
        device=torch.device("cpu"),
    )
    source, contents = ModelFolder(tmp_path / "record"), record.contents
    alive: list[weakref.ref[Any]] = []
    most = 0

    def watched(folder: ModelFolder, *names: Any) -> Iterator[tuple[str, Any]]:
        nonlocal most
        for key, value in contents(folder, *names):
            alive.append(weakref.ref(value))
            yield key, value
            del value
            most = max(most, sum(found() is not None for found in alive))

    monkeypatch.setattr(record, "contents", watched)
    monkeypatch.setattr(shards.ShardWriter.__init__, "__defaults__", (50_000, ()))
    FORMATS[name].write(source, tmp_path / "out")
    assert len(alive) == 29
    # The one that a writer still names while the next is read.
    assert most <= 1, most
    exported = ModelFolder(tmp_path / "out")
    assert len(exported.weight_files) == 1 if name == "gguf" else len(exported.weight_files) > 3
    assert not list((tmp_path / "out").glob("part-*"))
    assert audit(source, exported, FORMATS[name].quantized)["linears"] == 21
