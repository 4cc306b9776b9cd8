"""What a cache scheme allows, and the bytes it stands for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from compress.compose import compose_settings, options
from compress.config import parse
from compress.errors import UserError
from compress.kv_cache.folder import description
from compress.kv_cache.scheme import CacheScheme, StateScheme


def scheme_of(name: str) -> CacheScheme:
    run = parse(compose_settings(["recipe=kv-fp8", f"kv_cache={name}"]))
    assert run.cache is not None
    return run.cache


@pytest.mark.parametrize("name", options("kv_cache"))
def test_the_named_schemes(name: str) -> None:
    scheme = scheme_of(name)
    assert scheme.keys.bits == int(name.removeprefix("fp").removeprefix("int")[0])
    assert CacheScheme.from_config(scheme.as_config()) == scheme
    assert scheme.static == name.startswith("fp8")


@pytest.mark.parametrize(("name", "bits"), [("fp8", 8.0), ("int8", 8.25), ("int4-token", 4.5)])
def test_bits_of_what_has_no_window(name: str, bits: float) -> None:
    assert scheme_of(name).share(4096, 64) == bits / 16


def test_bytes_by_hand() -> None:
    """4,096 tokens, heads of 64: 4 sinks, 128 to 191 recent, groups of 64 with 32 bits each."""
    int4 = scheme_of("int4")
    assert int4.kept(4096) == 4 + 128 + (4096 - 132) % 64 == 192
    assert int4.share(4096, 64) == (3904 * 4.5 + 192 * 16) / (4096 * 16)
    assert int4.share(4096, 64) <= 0.32
    int2 = scheme_of("int2")
    assert int2.kept(4096) == 4 + 64 + (4096 - 68) % 32
    assert int2.share(4096, 64) <= 0.20
    assert int4.share(100, 64) == 1
    # Tokens that are quantized one by one leave a window a window at a time.
    fp8 = replace(scheme_of("fp8"), sinks=4, window=16)
    assert [fp8.kept(n) for n in (20, 35, 36, 51, 52)] == [20, 35, 20, 35, 20]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["kv_cache.keys.bits=3"], r"kv_cache.keys.bits=3 is not allowed: choose 2, 4, 8"),
        (["kv_cache.keys.per=row"], r"kv_cache.keys.per=row is not allowed: choose channel, token"),
        (["kv_cache.values.per=channel", "kv_cache.values.group_size=64"], "no outlier channels"),
        (["kv_cache.keys.group_size=null"], r"kv_cache.keys.group_size=null is not allowed"),
        (["kv_cache.keys.type=float"], r"keys.per=channel is not allowed with kv_cache.keys.type"),
        (["kv_cache.window=-1"], r"kv_cache.window=-1 is not allowed: choose 0 or more"),
        (["+kv_cache.keys.bitz=4"], r"kv_cache.keys.bitz is not known: known are type, bits"),
        (["kv_cache.sinks=few"], r"kv_cache.sinks"),
        (["stages=[quantize]"], r"kv_cache is set.* add stages=\[quantize,kv_cache\]"),
        (["stages=[kv_cache,quantize]"], "in this order"),
        (["head=int8"], "head needs quantize among the stages"),
        (["transforms=awq_scale"], "transforms needs quantize among the stages"),
        (["export=bitsandbytes"], "export=bitsandbytes holds quantized weights"),
        (["context.generated=0"], r"context.generated=0 is not allowed"),
    ],
)
def test_what_is_refused(words: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        parse(compose_settings(["recipe=kv-int4", *words]))


def test_more_that_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"stage kv_cache needs a scheme: add one, as in kv_cache=int4"
    ):
        parse(compose_settings(["recipe=rtn-int4", "stages=[quantize,kv_cache]"]))
    with pytest.raises(UserError, match="must be the same floats, or both integers"):
        CacheScheme(StateScheme("float", 8, "tensor"), StateScheme())
    both = ["recipe=llm-int8", "stages=[quantize,kv_cache]"]
    with pytest.raises(UserError, match="export=bitsandbytes has no place for the scales"):
        parse(compose_settings([*both, "kv_cache=fp8"]))
    assert parse(compose_settings([*both, "kv_cache=int4"])).cache is not None
    with pytest.raises(UserError, match=r"kv_cache.keys.rotate=true is for integers"):
        parse(compose_settings(["recipe=kv-fp8", "kv_cache.keys.rotate=true"]))
    with pytest.raises(UserError, match=r"kv_cache.pre_rope=true is for integers"):
        parse(compose_settings(["recipe=kv-fp8", "kv_cache.pre_rope=true"]))
    with pytest.raises(UserError, match=r"group_size=4 is not used with kv_cache.keys.per=head"):
        CacheScheme(StateScheme("float", 8, "head", 4), StateScheme("float", 8, "head", 4))


def engines(name: str, **changes: Any) -> dict[str, Any]:
    found = description(replace(scheme_of(name), **changes))["engines"]
    assert isinstance(found, dict)
    return found


def test_what_engines_are_told() -> None:
    fp8 = engines("fp8")
    assert fp8["vllm"]["arguments"] == ["--kv-cache-dtype", "fp8"]
    assert fp8["vllm"]["same_scheme"]
    assert fp8["sglang"]["arguments"] == ["--kv-cache-dtype", "fp8_e4m3"]
    assert not engines("fp8", window=16)["vllm"]["same_scheme"]
    assert not engines("fp8-head")["sglang"]["same_scheme"]
    assert engines("int8")["vllm"]["same_scheme"]
    assert engines("int8")["vllm"]["arguments"][1] == "int8_per_token_head"
    assert engines("int4")["vllm"]["arguments"][1] == "int4_per_token_head"
    assert not engines("int4")["vllm"]["same_scheme"]
    assert engines("int2") == {"vllm": None, "sglang": None}
