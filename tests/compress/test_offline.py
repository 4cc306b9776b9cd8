"""A model and texts on this machine: nothing that a person does with them asks anybody for anything.

Nothing here is told that there is no network: each process is watched for connections instead, and for names
of hosts that it looks up.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import write_model

ROOT = Path(__file__).parent.parent.parent
# Taken by every Python that a command starts, before anything else runs in it.
WATCH = """
import os, sys

def watch(event, given):
    if event in ("socket.connect", "socket.sendto") and isinstance(given[1], tuple):
        noted = f"{event} {given[1]}"
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        noted = f"{event} {given}"
    else:
        return
    with open(os.environ["WATCHED"], "a") as file:
        file.write(noted + "\\n")
    raise OSError("no network")

sys.addaudithook(watch)
with open(os.environ["WATCHED"] + ".processes", "a") as file:
    file.write(f"{os.getpid()}\\n")
"""
COMMANDS = """
import sys
from compress.__main__ import _code

def do(*words):
    print(words[0], _code(list(words)), flush=True)

if __name__ == "__main__":
    do("recipe=awq-int4", "scheme.group_size=32", *sys.argv[1:])
    do("export", "run", "export=[gptq]")
    do("compare", "run", "--out", "report")
    do("serve", "run", "engine=vllm")
    do("verify", "run/checkpoint")
"""


def test_what_is_here_is_read_without_a_network(tmp_path: Path, text_file: Path) -> None:
    model = write_model(tmp_path / "model", num_hidden_layers=1)
    for name, content in (("sitecustomize.py", WATCH), ("commands.py", COMMANDS)):
        (tmp_path / name).write_text(content)
    words = [
        f"model={model}",
        f"data={text_file}",
        "data.sequences=2",
        "data.length=32",
        f"eval.texts=[{text_file}]",
        "eval.tokens=64",
        "eval.window=32",
        "eval.block_tokens=32",
        "eval.prompts=1",
        "eval.prompt_tokens=8",
        "eval.generated=4",
        "eval.tasks=[packaged_piqa]",
        "eval.limit=1",
        "speed.patterns=[[4,2]]",
        "speed.warmup=0",
        "speed.repeats=1",
        "hydra.run.dir=run",
    ]
    watched = tmp_path / "watched"
    loud = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "DO_NOT_TRACK")
    settings = {name: value for name, value in os.environ.items() if name not in loud}
    settings |= {
        "PYTHONPATH": f"{tmp_path}:{ROOT}",
        "WATCHED": str(watched),
        # So that nothing comes from what an earlier run left.
        "HF_HOME": str(tmp_path / "hub"),
    }
    done = subprocess.run(
        [sys.executable, str(tmp_path / "commands.py"), *words],
        cwd=tmp_path,
        env=settings,
        capture_output=True,
        text=True,
        check=False,
    )
    told = [line.split() for line in done.stdout.splitlines()]
    for verb in ("recipe=awq-int4", "export", "compare", "serve", "verify"):
        assert [verb, "0"] in told, done.stdout + done.stderr
    asked = watched.read_text().splitlines() if watched.exists() else []
    assert asked == []
    # The processes that measure speed were watched too.
    assert len(Path(f"{watched}.processes").read_text().splitlines()) > 2


def test_the_watch_sees_what_asks(tmp_path: Path) -> None:
    """The same watch, over a look at a host: the test above can fail."""
    (tmp_path / "sitecustomize.py").write_text(WATCH)
    ask = "import socket; socket.create_connection(('127.0.0.1', 9))"
    settings = {"PYTHONPATH": str(tmp_path), "WATCHED": str(tmp_path / "watched")}
    done = subprocess.run(
        [sys.executable, "-c", ask], env=os.environ | settings, capture_output=True, check=False
    )
    assert done.returncode == 1
    assert "127.0.0.1" in (tmp_path / "watched").read_text()
