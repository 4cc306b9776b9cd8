"""Other engines as decoders: the tokens are those that the engine gives by itself."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter

from compress.model.folder import ModelFolder
from eval.benchmarks.cpu_decode import STEPS, profiled, ratios, rows, told
from eval.engines.llama_cpp import LlamaCppDecoder
from eval.engines.transformers_decode import open_transformers
from eval.engines.vllm_decode import VllmDecoder, cache_bytes
from eval.speed import Point


def test_transformers_hands_over_what_generate_writes(
    tiny: ModelFolder, tokens: torch.Tensor
) -> None:
    decoder = open_transformers(tiny.path, "cpu")
    assert decoder.vocabulary == 320
    (name,) = decoder.kernels
    assert name.startswith("transformers ")
    assert decoder.kernels[name] == 3 * 7 + 1
    for prompt, count in ((tokens[:2], 8), (tokens[3:4, :5], 3)):
        ours = [decoder.start(prompt, count)] + [decoder.step() for _ in range(count - 1)]
        theirs = decoder.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            min_new_tokens=count,
            max_new_tokens=count,
        )
        assert torch.equal(torch.cat(ours, dim=1), theirs[:, prompt.shape[1] :])


def test_transformers_sees_prompts_of_different_lengths_as_each_by_itself(
    tiny: ModelFolder, tokens: torch.Tensor
) -> None:
    decoder = open_transformers(tiny.path, "cpu")
    decoder.model.float()
    prompt, padding = tokens[:2, :8].clone(), torch.tensor([0, 3])
    padded = [decoder.start(prompt, 4, padding), *(decoder.step() for _ in range(3))]
    alone = [decoder.start(prompt[1:, 3:], 4), *(decoder.step() for _ in range(3))]
    assert torch.equal(torch.cat(padded, 1)[1:], torch.cat(alone, 1))
    blind = [decoder.start(prompt[1:], 4), *(decoder.step() for _ in range(3))]
    assert not torch.equal(torch.cat(blind, 1), torch.cat(alone, 1)), "the padding would not show"


def test_an_error_in_generate_is_raised_where_the_token_is_awaited(
    tiny: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = open_transformers(tiny.path, "cpu")
    prompt = torch.zeros(1, 4, dtype=torch.int64)
    decoder.start(prompt, 2)
    decoder.step()
    with pytest.raises(IndexError):
        decoder.start(torch.full((1, 4), 10_000), 2)
    # And the next request is answered.
    assert decoder.start(prompt, 2).shape == (1, 1)


def test_bytes_of_a_step_of_transformers(tiny: ModelFolder) -> None:
    decoder = open_transformers(tiny.path, "cpu")
    weights = sum(tiny.nbytes(name) for name in tiny.names)
    # 3 layers, keys and values of 2 heads of 32, 2 bytes each; the tied head is read as a whole.
    assert decoder.bytes_per_step(4, 100) == weights + 4 * 100 * 3 * 2 * 2 * 32 * 2
    decoder.model.config.quantization_config = {"quant_method": "other"}
    assert decoder.bytes_per_step(4, 100) is None


class FakeEngine:
    """Hands over tokens as vLLM may: nothing at first, one request ahead of the other, several at once."""

    def __init__(self) -> None:
        self.requests: dict[str, Any] = {}
        self.aborted: list[str] = []
        self.script: list[dict[int, list[int]]] = []

    def add_request(self, name: str, prompt: dict[str, Any], sampling: Any) -> None:
        self.requests[name] = (prompt["prompt_token_ids"], sampling)

    def abort_request(self, names: list[str]) -> None:
        self.aborted += names

    def step(self) -> list[Any]:
        return [
            SimpleNamespace(
                request_id=list(self.requests)[index], outputs=[SimpleNamespace(token_ids=ids)]
            )
            for index, ids in self.script.pop(0).items()
        ]


def test_vllm_s_steps_become_tokens_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = SimpleNamespace(RequestOutputKind=SimpleNamespace(DELTA="delta"))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=dict))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", kinds)  # type: ignore[arg-type]
    engine = FakeEngine()
    engine.script = [{}, {0: [5]}, {1: [6], 0: [7]}, {1: [8]}, {2: [1], 3: [1]}]
    decoder = VllmDecoder(engine, "0.32", 100)
    assert decoder.start(torch.tensor([[1, 2], [3, 4]]), 2).tolist() == [[5], [6]]
    assert decoder.step().tolist() == [[7], [8]]
    assert [prompt for prompt, _ in engine.requests.values()] == [[1, 2], [3, 4]]
    decoder.start(torch.tensor([[1, 2, 3], [0, 0, 4]]), 2, torch.tensor([0, 2]))
    assert [prompt for prompt, _ in engine.requests.values()][2:] == [[1, 2, 3], [4]]
    (_, sampling), *_ = engine.requests.values()
    assert sampling["max_tokens"] == 2
    assert sampling["ignore_eos"]
    assert sampling["temperature"] == 0


def test_vllm_s_cache_has_room_for_what_is_asked() -> None:
    config = {"num_attention_heads": 4, "hidden_size": 256, "num_hidden_layers": 3}
    token = 3 * 2 * 4 * 64 * 2
    assert cache_bytes(config, 300, 5) >= 5 * 300 * token
    assert cache_bytes(config, 300, 5) <= (5 * 384 + 1024) * token
    grouped = {**config, "num_key_value_heads": 1, "head_dim": 64}
    assert 4 * cache_bytes(grouped, 300, 5) == cache_bytes(config, 300, 5)


# Counts up from the first token of the prompt; a prompt that starts with 99 ends it.
NODE = """#!{python}
import json, sys
print(json.dumps({{"release": "b1 " + " ".join(sys.argv[2:])}}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if asked["prompt"][0] == 99:
        sys.exit(3)
    for i in range(asked["tokens"]):
        print(asked["prompt"][0] + i, flush=True)
"""


@pytest.fixture
def llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LlamaCppDecoder:
    """Of a tiny GGUF file, with a node that only counts."""
    gguf = tmp_path / "model.F32.gguf"
    writer = GGUFWriter(gguf, "llama")
    writer.add_block_count(3)
    writer.add_embedding_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    for name, shape in (("token_embd", (10, 64)), ("output", (10, 64)), ("blk.0.attn_q", (64, 64))):
        writer.add_tensor(f"{name}.weight", np.zeros(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    node = tmp_path / "node"
    node.write_text(NODE.format(python=sys.executable))
    node.chmod(node.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return LlamaCppDecoder(Path("modules"), gguf, threads=2, context=256)


def test_llama_cpp_answers_line_by_line(llama: LlamaCppDecoder) -> None:
    assert llama.vocabulary == 10
    (name,) = llama.kernels
    assert name.startswith("llama.cpp b1 modules ")
    assert name.endswith("model.F32.gguf 2 256 F32")
    prompt = torch.tensor([[7, 1, 1]])
    assert [llama.start(prompt, 3).tolist(), llama.step().tolist()] == [[[7]], [[8]]]
    llama.step()
    assert llama.start(prompt - 4, 1).tolist() == [[3]]
    # Without the embedding, which is not the head; 3 layers of keys and values, 2 heads of 16, float16.
    assert llama.bytes_per_step(1, 100) == 4 * (640 + 4096) + 100 * 3 * 2 * 2 * 16 * 2
    with pytest.raises(ValueError, match="one sequence at a time, not 2"):
        llama.start(torch.zeros(2, 3), 1)
    llama.close()
    assert llama._process.returncode == 0


def test_a_node_that_ends_is_told(llama: LlamaCppDecoder) -> None:
    with pytest.raises(RuntimeError, match="node ended with exit code 3"):
        llama.start(torch.tensor([[99]]), 2)


def test_a_profile_tells_where_all_of_a_step_goes(tiny: ModelFolder) -> None:
    decoder = open_transformers(tiny.path, "cpu")
    # The profiler watches this thread: the model itself, not generate's thread.
    model, token = decoder.model, torch.zeros(1, 1, dtype=torch.int64)

    class Plain:
        vocabulary, kernels = 320, {}

        def start(self, prompt: torch.Tensor, tokens: int) -> torch.Tensor:
            assert tokens == 3 * STEPS + 1
            return token

        @torch.no_grad()
        def step(self) -> torch.Tensor:
            model(token, use_cache=False)
            return token

        def bytes_per_step(self, batch: int, context: int) -> None: ...

    found = profiled(Plain(), Point(1, 8, 4))
    inside = sum(entry["ms"] for entry in found["operations"].values())
    assert inside + found["outside_ms"] == pytest.approx(found["profiled_step_ms"])
    assert 0 < found["outside_ms"] < found["profiled_step_ms"]
    assert found["operations"]["aten::mm"]["calls"] == 3 * 7 + 1
    assert "| outside of operations" in told(found)


def test_ratios_are_of_rounds() -> None:
    ours, theirs = ({"rounds": {"tokens_per_s": r}} for r in ([2.0, 9.0, 8.0], [1.0, 3.0, 4.0]))
    assert ratios(ours, theirs) == [2.0, 2.0, 2.5]
    point = {"tokens_per_s": 8.0, "tokens_per_s_iqr": 1.0, "ttft_ms": 3.0, "peak_rss": 5e6}
    point |= {"share_of_roofline": None, "kernels": {"k": 1}} | ours
    refused = {"refused": "no"}
    found = {"compress int4": {"points": [point]}, "other": {"points": [refused]}}
    assert rows(2, found) == [
        ["2", "compress int4", "8.0 ±0.5", "1.00x (1.00 to 1.00)", "3", "-", "5", "k"],
        ["2", "other", "no", "-", "-", "-", "-", "-"],
    ]
