"""Other engines as decoders: the tokens are those that the engine gives by itself."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compress.model.folder import ModelFolder
from eval.engines.transformers_decode import open_transformers
from eval.engines.vllm_decode import VllmDecoder, cache_bytes


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
    engine.script = [{}, {0: [5]}, {1: [6], 0: [7]}, {1: [8]}]
    decoder = VllmDecoder(engine, "0.32", 100)
    assert decoder.start(torch.tensor([[1, 2], [3, 4]]), 2).tolist() == [[5], [6]]
    assert decoder.step().tolist() == [[7], [8]]
    assert [prompt for prompt, _ in engine.requests.values()] == [[1, 2], [3, 4]]
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
