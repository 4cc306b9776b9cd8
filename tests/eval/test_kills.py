"""Runs that are killed at random moments end in the bytes of one that nobody killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from compress.run_folder import RUN
from eval.faults.kills import differences, phase, untimed

ROOT = Path(__file__).parents[2]


def test_a_few_kills(tmp_path: Path) -> None:
    words = ["--kills", "3", "--cases", "gptq-int4 with search", "--tasks", "none"]
    done = subprocess.run(
        [sys.executable, "-m", "eval.faults.kills", *words, "--out", str(tmp_path / "kills")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "kills.json").read_text())
    (recipe,) = found["recipes"].values()
    assert sum(kill["count"] for kill in recipe["kills"]) == 3
    assert recipe["different"] == []
    assert recipe["files_compared"] > 20
    assert (tmp_path / "kills.md").read_text() in done.stdout + "\n"


def test_phases(tmp_path: Path) -> None:
    assert phase(tmp_path) == "reading"
    (tmp_path / RUN).touch()
    assert phase(tmp_path) == "reading"
    (tmp_path / "prune").mkdir()
    (tmp_path / "distill.state").mkdir()
    assert phase(tmp_path) == "distill"
    (tmp_path / "distill").mkdir()
    (tmp_path / "checkpoint.12.partial").mkdir()
    assert phase(tmp_path) == "writing the checkpoint"
    (tmp_path / "checkpoint").mkdir()
    log = tmp_path / "compress.log"
    # Of the start before this one.
    log.write_text("measuring decode speed\ncompressed and audited in 1 s\n")
    assert phase(tmp_path) == "measuring texts"
    with log.open("a") as file:
        file.write("scoring packaged_piqa\n")
    assert phase(tmp_path) == "measuring tasks"
    (tmp_path / "metrics.json").touch()
    assert phase(tmp_path) == "done"


def test_a_difference_is_seen(tmp_path: Path) -> None:
    for name, kl in (("a", 1.0), ("b", 1.0), ("c", 1.5)):
        (tmp_path / name / "checkpoint").mkdir(parents=True)
        (tmp_path / name / "checkpoint" / "model.safetensors").write_bytes(b"weights")
        found = {"kl": kl, "seconds": name, "inner": [{"peak_rss": name, "kl": kl}]}
        (tmp_path / name / "metrics.json").write_text(json.dumps(found))
    assert differences(tmp_path / "a", tmp_path / "b") == []
    assert differences(tmp_path / "a", tmp_path / "c") == ["metrics.json"]
    (tmp_path / "b" / "checkpoint" / "model.safetensors").write_bytes(b"weighty")
    (tmp_path / "b" / "more").touch()
    assert differences(tmp_path / "a", tmp_path / "b") == [
        "more is in one alone",
        "checkpoint/model.safetensors",
    ]
    assert untimed([{"seconds": 1, "kl": 2}]) == [{"kl": 2}]
