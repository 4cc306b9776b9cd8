"""How a model folder says what its cache is kept in: kv_cache.json beside the weights, and for fixed scales
the tensors ``BLOCK.self_attn.k_scale`` and ``v_scale`` among them, where compressed-tensors has them.

kv_cache.json holds the scheme, and for every engine the arguments that serve it.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch

from compress.errors import UserError
from compress.kv_cache.cache import Scales
from compress.kv_cache.scheme import CacheScheme, StateScheme
from compress.model.families import family_of, size_of
from compress.model.folder import KV_CACHE, ModelFolder, Shapes, read_json, reading

VERSION = 1
SCALES = ("k_scale", "v_scale")
_SCALE = re.compile(r"\.([kv])_scale$")
FLOATS = {"tensor": "tensor", "attn_head": "head"}


def scheme_of(folder: Shapes) -> CacheScheme | None:
    """The scheme of a folder's cache, None if it stays in 16 bits.

    Read from kv_cache.json, or from the ``kv_cache_scheme`` of a checkpoint that another tool wrote. Raises
    UserError if that is not understood here.
    """
    file = folder.path / KV_CACHE
    if file.exists():
        found = read_json(file)
        if found.get("version") != VERSION:
            raise UserError(
                f"{file} is of version {found.get('version')}, this one reads {VERSION}: compress again"
            )
        with reading(file):
            return CacheScheme.from_config(found["scheme"])
    stated = (folder.config.get("quantization_config") or {}).get("kv_cache_scheme")
    if stated is None:
        return None
    if not isinstance(stated, dict):
        raise UserError(f"{folder.path}/config.json: kv_cache_scheme is no object")
    per = FLOATS.get(str(stated.get("strategy")))
    if (stated.get("type"), stated.get("num_bits")) != ("float", 8) or per is None:
        raise UserError(
            f"{folder.path}: kv_cache_scheme of {stated.get('type')}, {stated.get('num_bits')} bits, per "
            f"{stated.get('strategy')} is not read here, only float, 8 bits, per {' or '.join(FLOATS)}"
        )
    state = StateScheme("float", 8, per)
    return CacheScheme(state, state)


def stated_scheme(scheme: CacheScheme | None) -> dict[str, Any] | None:
    """``kv_cache_scheme`` as compressed-tensors states it: floats with fixed scales; of integers, which
    engines compute by themselves, nothing."""
    if scheme is None or not scheme.static:
        return None
    strategy = {per: strategy for strategy, per in FLOATS.items()}[scheme.keys.per]
    return {
        "num_bits": scheme.keys.bits,
        "type": scheme.keys.type,
        "strategy": strategy,
        "dynamic": False,
        "symmetric": True,
    }


def is_scale(name: str) -> bool:
    """Whether a tensor name is that of a cache scale."""
    return _SCALE.search(name) is not None


def scales_of(
    folder: ModelFolder, scheme: CacheScheme, device: torch.device
) -> list[Scales] | None:
    """The fixed scales of every layer; None if the scheme has none. Raises UserError if one is missing."""
    if not scheme.static:
        return None
    with reading(folder.path):
        family, layers = (
            family_of(folder.config),
            range(size_of("num_hidden_layers", folder.config)),
        )
    found = []
    for index in layers:
        pair = [
            folder.tensor(f"{family.blocks}.{index}.{family.attention}.{name}").float().to(device)
            for name in SCALES
        ]
        shape = (-1, 1, 1) if scheme.keys.per == "head" else (1,)
        with reading(f"{folder.path}: scales of the cache of block {index}"):
            found.append(Scales(*(scale.reshape(shape) for scale in pair)))
    return found


def description(scheme: CacheScheme) -> dict[str, Any]:
    """What kv_cache.json holds."""
    return {
        "version": VERSION,
        "name": scheme.name,
        "scheme": scheme.as_config(),
        "engines": engines(scheme),
    }


def engines(scheme: CacheScheme) -> dict[str, Any]:
    """For each engine the arguments under which it keeps its cache alike, whether that is this
    very scheme, and what differs. Read from vLLM 0.32's and SGLang 0.5's sources; None: nothing alike."""
    keys, values = scheme.keys, scheme.values
    plain = replace(scheme, sinks=0, window=0) == scheme
    kept = "" if plain else "; sinks and window are quantized too"
    vllm: dict[str, Any] | None = None
    sglang: dict[str, Any] | None = None
    if scheme.static:
        same = {"same_scheme": plain, "note": f"scales come from the checkpoint{kept}"}
        vllm = {"arguments": ["--kv-cache-dtype", "fp8"], **same}
        sglang = {"arguments": ["--kv-cache-dtype", "fp8_e4m3"], **same}
        if keys.per == "head":
            sglang |= {"same_scheme": False, "note": "scales by head are ignored: all are 1"}
    elif keys.bits == values.bits == 8:
        by_token = StateScheme(bits=8, symmetric=True)
        same_scheme = scheme == CacheScheme(by_token, by_token)
        vllm = {
            "arguments": ["--kv-cache-dtype", "int8_per_token_head"],
            "same_scheme": same_scheme,
            "note": f"one scale a token and head, found while it runs, in 32 bits instead of 16{kept}",
        }
    elif keys.bits == values.bits == 4:
        vllm = {
            "arguments": ["--kv-cache-dtype", "int4_per_token_head"],
            "same_scheme": False,
            "note": f"one scale and zero point a token and head after a Hadamard rotation{kept}: nearest to "
            "kv_cache=int4-token, whose accuracy is the one to expect",
        }
    return {"vllm": vllm, "sglang": sglang}
