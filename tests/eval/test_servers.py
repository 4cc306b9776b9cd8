"""Server processes: started, waited for, asked, ended with all that they started."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from eval.engines.servers import Server, free_port, running

# Says of token t behind a prompt of n tokens that its log-probability is -(t + n / 100).
PROGRAM = """
import json, os, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

port, log = int(sys.argv[1]), sys.argv[2]
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(log, "w").write(f"{os.getpid()} {child.pid} {os.environ['SERVED_BY']}")
began = time.time()

class Handler(BaseHTTPRequestHandler):
    def log_message(self, *words): pass
    def answer(self, code, value):
        body = json.dumps(value).encode()
        self.send_response(code)
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        self.answer(200 if time.time() - began > 1 else 503, {})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = asked["prompt"]
        assert asked["model"] == "m"
        if prompt == [9]:
            return self.answer(400, {"error": "nine is refused"})
        if self.path == "/completion":
            told = [{"id": t, "logprob": -(t + len(prompt) / 100)} for t in range(asked["n_probs"])]
            return self.answer(200, {"completion_probabilities": [{"top_logprobs": told[::-1]}]})
        found = [None] + [-(t + n / 100) for n, t in enumerate(prompt[1:], 1)] + [-7.5]
        text = "echo" if asked.get("echo") else f"{asked['max_tokens']} greedy"
        self.answer(200, {"choices": [{"text": text, "logprobs": {"token_logprobs": found}}]})

ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
TOKENS = torch.tensor([[3, 1, 4, 1], [5, 2, 6, 0]])
EXPECTED = torch.tensor([[-1.01, -4.02, -1.03], [-2.01, -6.02, -0.03]])


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    # A zombie waits for whoever reaps it.
    return state != "Z"


def gone(pids: list[str]) -> bool:
    """Whether they have ended, a moment after they were killed at the latest."""
    until = time.monotonic() + 5
    while any(alive(int(pid)) for pid in pids):
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize("engine", ["vllm-cpu", "llama.cpp"])
def test_a_server_answers_and_leaves_nothing_behind(engine: str, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    port, told = free_port(), tmp_path / "pids"
    words = [sys.executable, str(tmp_path / "program.py"), str(port), str(told)]
    began = time.monotonic()
    with running(
        engine,
        words,
        {"SERVED_BY": "test"},
        port=port,
        log=tmp_path / "log",
        vocabulary=8,
    ) as server:
        # 503 is not healthy yet.
        assert time.monotonic() - began > 1
        *pids, environment = told.read_text().split()
        assert environment == "test"
        assert torch.allclose(server.log_probs(TOKENS), EXPECTED)
        assert server.greedy([1, 2], 16) == "16 greedy"
        with pytest.raises(RuntimeError, match=r"/v1/completions with 400: .*nine is refused"):
            server.greedy([9], 1)
        assert all(alive(int(pid)) for pid in pids)
    assert gone(pids)


def test_a_server_that_ends_says_why(tmp_path: Path) -> None:
    words = [sys.executable, "-c", "print('no kernel for it'); raise SystemExit(3)"]
    with (
        pytest.raises(RuntimeError, match=r"llama\.cpp ended with 3:\nno kernel for it"),
        running("llama.cpp", words, {}, port=free_port(), log=tmp_path / "log", vocabulary=1),
    ):
        pytest.fail("it never was healthy")


def test_one_that_does_not_listen_to_the_first_signal_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eval.engines.servers.STOP", 0.5)
    (tmp_path / "program.py").write_text(
        f"import signal; signal.signal(signal.{signal.SIGTERM.name}, signal.SIG_IGN)\n" + PROGRAM
    )
    port, told = free_port(), tmp_path / "pids"
    words = [sys.executable, str(tmp_path / "program.py"), str(port), str(told)]
    with running(
        "vllm",
        words,
        {"SERVED_BY": "test"},
        port=port,
        log=tmp_path / "log",
        vocabulary=1,
    ) as server:
        assert isinstance(server, Server)
    pids = told.read_text().split()[:2]
    assert gone(pids)
