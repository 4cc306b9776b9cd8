"""llama.cpp's server from its wheel: what a wheel made by hand is told."""

from __future__ import annotations

import signal
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from compress.serve import xllamacpp_server


@pytest.mark.parametrize(("words", "parallel"), [([], -1), (["-np", "3"], 3)])
def test_the_server_is_told_what_llama_server_would_be(
    monkeypatch: pytest.MonkeyPatch, words: list[str], parallel: int
) -> None:
    started: list[Any] = []
    wheel: Any = ModuleType("xllamacpp")
    wheel.CommonParams = lambda: SimpleNamespace(model=SimpleNamespace())

    def server(settings: Any) -> Any:
        started.append(settings)
        return SimpleNamespace(listening_address="http://here")

    wheel.Server = server
    monkeypatch.setitem(sys.modules, "xllamacpp", wheel)
    monkeypatch.setattr(signal, "pthread_sigmask", lambda *_: None)
    monkeypatch.setattr(signal, "sigwait", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["server", "-m", "m.gguf", "-c", "64", "-a", "name", *words])
    xllamacpp_server.main()
    (settings,) = started
    # -1: as many at a time as llama-server takes by itself.
    assert settings.n_parallel == parallel
    assert (settings.model.path, settings.n_ctx, settings.model_alias) == ("m.gguf", 64, {"name"})
