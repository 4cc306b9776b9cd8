"""The engines' rules, a row for each."""

from __future__ import annotations

import pytest

from compress.compose import compose_settings
from compress.config import parse
from compress.engines import ENGINES, SGLANG, TENSORRT, TRANSFORMERS, VLLM
from compress.model.shapes import ShapeFolder
from compress.plan.rows import engines_of


def asked(shape: str, *words: str, tp: int = 1, cuda: float | None = None) -> dict[str, dict]:
    run = parse(compose_settings([*words, f"serve.tp={tp}"]))
    (found,) = engines_of(run, ShapeFolder(shape), cuda).values()
    return found


# Recipe words, tp, and for each engine whether it loads the result of Llama-3.1-8B.
TABLE = [
    (["recipe=awq-int4"], 1, (True, True, False, True)),
    (["recipe=awq-int4"], 8, (True, True, False, True)),
    (["recipe=awq-int3"], 1, (True, False, False, True)),
    (["recipe=awq-int4", "scheme.group_size=256"], 1, (True, False, False, True)),
    (["recipe=w8a16-int8"], 1, (True, True, False, True)),
    (["recipe=w8a16-int8", "scheme.symmetric=false"], 1, (True, False, False, True)),
    (["recipe=w8a8-int8"], 1, (True, True, False, True)),
    (["recipe=fp8"], 1, (True, True, True, True)),
    (["recipe=fp8-static"], 1, (True, True, False, True)),
    (["recipe=fp8-block"], 8, (True, True, True, True)),
    # Eight heads of keys and values: each of 16 devices holds a whole one, 128 rows. 14336 / 32 = 448.
    (["recipe=fp8-block"], 16, (True, True, True, True)),
    (["recipe=fp8-block"], 32, (False, False, False, True)),
    (["recipe=fp8-static", "scheme.group_size=channel"], 1, (True, True, False, True)),
    # TensorRT-LLM takes it with rounded inputs alone, SGLang MXFP4 for experts alone.
    (["recipe=nvfp4"], 1, (True, True, False, True)),
    (["recipe=mxfp4"], 1, (True, False, False, True)),
    (["recipe=llm-int8"], 1, (False, True, False, True)),
    (["recipe=rtn-int4", "head=int8", "scheme.symmetric=true"], 1, (False, False, False, True)),
    (["recipe=rtn-int4", "head=int4"], 1, (False, False, False, True)),
    (["recipe=mixed-3.5"], 1, (True, False, False, False)),
    (["recipe=mixed-3.5", "scheme.symmetric=true"], 1, (True, False, False, True)),
    (["recipe=kv-fp8"], 1, (True, True, True, True)),
    (["recipe=kv-fp8", "kv_cache=fp8-head"], 1, (True, False, False, True)),
    (["recipe=kv-int8"], 1, (True, True, True, True)),
    # Of 32 query heads neither 3 nor 5 devices get whole shares.
    (["recipe=awq-int4"], 3, (False, False, False, True)),
    (["recipe=kv-int8"], 5, (False, False, False, True)),
]


@pytest.mark.parametrize(("words", "tp", "loads"), TABLE)
def test_who_loads_what(words: list[str], tp: int, loads: tuple[bool, ...]) -> None:
    found = asked("llama-3.1-8b", *words, tp=tp)
    assert list(found) == list(ENGINES)
    assert tuple(found[e]["loads"] for e in (VLLM, SGLANG, TENSORRT, TRANSFORMERS)) == loads
    for engine, entry in found.items():
        assert entry["version"] == ENGINES[engine].version
        assert bool(entry["reasons"]) == (not entry["loads"])
        assert all(reason["source"] and reason["text"] for reason in entry["reasons"])


def test_groups_must_be_whole_after_sharing() -> None:
    # 13824 / 8 = 1728 = 13.5 groups of 128 of down_proj's inputs.
    found = asked("llama-2-13b", "recipe=awq-int4", tp=8)
    (reason,) = found[VLLM]["reasons"]
    assert "groups of 128 do not divide the 1728 inputs of mlp.down_proj" in reason["text"]
    assert asked("llama-2-13b", "recipe=awq-int4", "scheme.group_size=64", tp=8)[VLLM]["loads"]


def test_what_is_filled_up_in_one_engine_fails_in_another() -> None:
    found = asked("smollm2-135m", "recipe=rtn-int4")
    assert found[VLLM]["loads"]
    assert "filled with zeros" in found[VLLM]["notes"][0]["text"]
    assert "960 x 576" in found[SGLANG]["reasons"][0]["text"]


def test_a_cache_of_integers_is_a_flag() -> None:
    found = asked("llama-3.1-8b", "recipe=kv-int8")
    assert "--kv-cache-dtype int8_per_token_head" in found[VLLM]["notes"][0]["text"]
    assert "stays in 16 bits" in found[SGLANG]["notes"][0]["text"]


def test_notes_on_kernels() -> None:
    assert "nvcc" in asked("llama-3.1-8b", "recipe=awq-int3")[VLLM]["notes"][0]["text"]
    old = asked("llama-3.1-8b", "recipe=fp8", cuda=8.0)
    assert "widened" in old[VLLM]["notes"][0]["text"]
    assert "vllm-bnb-plugin" in asked("llama-3.1-8b", "recipe=llm-int8")[VLLM]["reasons"][0]["text"]
