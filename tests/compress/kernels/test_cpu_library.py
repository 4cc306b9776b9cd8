"""The C++ kernels are compiled once, and where they cannot be, that is said once and the rest goes on."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from compress.kernels import cpu_library
from compress.kernels.cpu_library import available, cpu_fits, library

needs_cpu = pytest.mark.skipif(
    not cpu_fits(), reason="needs a CPU with AVX-512 and its bf16 instructions"
)


@pytest.fixture
def _forgotten(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in a new process with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu_library, "available", cpu_library.available.__wrapped__)


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@needs_cpu
@pytest.mark.usefixtures("_forgotten")
@pytest.mark.parametrize("compiler", ["missing", "/bin/false", "broken"])
def test_without_a_compiler_that_works(
    compiler: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if compiler == "broken":
        told = '[ "$1" = --version ] && echo 1.0 && exit; echo no such option >&2; echo more >&2; exit 1'
        compiler = script(tmp_path / "broken", told)
    monkeypatch.setenv("CXX", compiler)
    with caplog.at_level(logging.WARNING):
        assert not cpu_library.available()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    if "broken" in compiler:
        assert record.message.endswith("no such option")
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.usefixtures("_forgotten")
def test_another_cpu_asks_for_no_compiler(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpu_library, "cpu_fits", lambda: False)
    monkeypatch.setenv("CXX", "missing")
    assert not cpu_library.available()
    assert not caplog.records


@pytest.mark.usefixtures("_forgotten")
def test_what_is_compiled_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a compiler that writes down its calls."""
    calls = tmp_path / "calls"
    note = f'echo "$@" >> {calls}; case "$*" in *--version) echo 1.0; exit;; esac'
    find = 'while [ "$1" != -o ]; do shift; done; echo library > "$2"'
    compiler = script(tmp_path / "compiler", f"{note}\n{find}")
    monkeypatch.setenv("CXX", compiler)

    def compiled() -> int:
        return sum("-o" in line.split() for line in calls.read_text().splitlines())

    first = library()
    assert first.read_text() == "library\n"
    assert first.is_relative_to(tmp_path / "compress")
    assert library() == first
    assert compiled() == 1
    assert [path.name for path in first.parent.iterdir()] == [first.name]
    # Another source is another library.
    changed = tmp_path / "cpu.cpp"
    changed.write_text(cpu_library.SOURCE.read_text() + "\n")
    monkeypatch.setattr(cpu_library, "SOURCE", changed)
    assert library() != first
    assert compiled() == 2
    # Another compiler too.
    monkeypatch.setenv("CXX", f"{compiler} -g")
    assert library() != first
    assert compiled() == 3


def test_the_answer_is_remembered() -> None:
    assert available() is available()
    assert available.cache_info().hits >= 1
