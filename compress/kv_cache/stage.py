"""The kv_cache stage: a model folder in, the same folder out with what its cache is kept in.

Weights stay as they are, quantized or not. Floats get their scales from calibration, a block in memory at a
time; integers find theirs while the model runs.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from compress.errors import UserError
from compress.export.formats import Weights
from compress.hadamard import core_order
from compress.kv_cache.folder import SCALES, description, scheme_of
from compress.kv_cache.scheme import CacheScheme, StateScheme
from compress.kv_cache.states import static_scale
from compress.model.families import check_applies, family_of, heads_of
from compress.model.folder import INDEX, KV_CACHE, ModelFolder, Shapes, save_tensors, write_json
from compress.model.skeleton import finite_rows
from compress.model.walk import Walk
from compress.processes import ALONE, Team
from compress.progress import track
from compress.quantize.qtensor import QTensor
from compress.quantize.record import KEY
from compress.saved import NOWHERE, Saved, link, named

log = logging.getLogger(__name__)

SCALE_FILE = "kv_cache.safetensors"


def quantize_cache(
    source: ModelFolder,
    target: Path,
    scheme: CacheScheme,
    *,
    tokens: Tensor | None,
    device: torch.device,
    saved: Saved = NOWHERE,
    spill: Path | None = None,
    team: Team = ALONE,
) -> dict[str, Any]:
    """Write ``source`` with its cache scheme to ``target``, the main process alone.

    tokens (sequences, length), if scales are fixed; saved: where a killed one left those that it had
    spill: a folder that hidden states are kept in, if not in memory
    team: the processes that share the sequences

    Returns what metrics.json keeps: the scheme, and the scales of every layer. Raises UserError for an
    unknown family, a head size that the scheme does not fit, a cache that is quantized already, weights that
    are not finite.
    """
    check(source, scheme)
    scales = None
    if scheme.static:
        assert tokens is not None, "scales need tokens"
        scales = calibrate(source, scheme, tokens, device, saved, spill, team)
    if not team.is_main:
        return {}
    if KEY not in source.config:
        # Nobody else looks at weights that pass as they are; those of a record were looked at.
        for name in source.names:
            for _ in finite_rows(source, name):
                pass
    target.mkdir(parents=True)
    source.copy_companions(target)
    weight_map = {name: file.name for name, file in source.stored.items()}
    for file in source.weight_files:
        link(file, target / file.name)
    if scales is not None:
        save_tensors(target / SCALE_FILE, scales)
        weight_map |= dict.fromkeys(scales, SCALE_FILE)
    write_json(target / INDEX, {"metadata": {}, "weight_map": weight_map})
    write_json(target / KV_CACHE, description(scheme))
    # The config comes last: before that the folder does not open.
    write_json(target / "config.json", source.stated)
    found = {} if scales is None else {name: t.flatten().tolist() for name, t in scales.items()}
    return {"kv_cache": {"name": scheme.name, "scheme": scheme.as_config(), "scales": found}}


def check(source: Shapes, scheme: CacheScheme) -> None:
    """Raises UserError if the scheme does not fit the model; reads no weights."""
    check_applies("kv_cache", source.config)
    if scheme_of(source) is not None:
        raise UserError(f"{source.path} has a quantized cache already: choose its original")
    if "quantization_config" in source.config:
        raise UserError(f"{source.path} is quantized already: choose its original, and both stages")
    _, _, head_dim = heads_of(source.config)
    if isinstance(source, ModelFolder) and source.path / SCALE_FILE in source.weight_files:
        raise UserError(f"{source.path / SCALE_FILE} holds weights: give that file another name")
    for key, state in (("keys", scheme.keys), ("values", scheme.values)):
        size = state.group_size if state.per == "token" else None
        if head_dim % (8 // state.bits) or (size is not None and head_dim % size):
            raise UserError(
                f"kv_cache.{key} with bits={state.bits} and group_size={size} does not divide the head size "
                f"{head_dim} of {source.path}: choose a group_size that does"
            )
        if state.rotate and core_order(head_dim) is None:
            raise UserError(
                f"kv_cache.{key}.rotate=true needs a Hadamard matrix of the head size {head_dim}, and "
                "none is known: choose false"
            )
    rope = source.config.get("rope_parameters") or source.config.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if scheme.pre_rope and kind in ("dynamic", "longrope"):
        raise UserError(
            f"kv_cache.pre_rope=true is not allowed with the rotary embedding {kind}, whose angles "
            "change with the length: choose false"
        )


def calibrate(
    source: ModelFolder,
    scheme: CacheScheme,
    tokens: Tensor,
    device: torch.device,
    saved: Saved = NOWHERE,
    spill: Path | None = None,
    team: Team = ALONE,
) -> dict[str, Tensor]:
    """Scales by the largest |key| and |value| that calibration sees, as compressed-tensors stores them:
    float32 (1,), or (heads, 1, 1) with a scale for every head."""
    family = family_of(source.config)
    walk = Walk(source, family, device, read=Unpacked(source), spill=spill, team=team)
    walk.embed(tokens)
    scales: dict[str, Tensor] = {}
    position = saved.load()
    if position is not None:
        walk.hidden = walk.states.keep(position.tensors.mapped("hidden"))
        scales = position.under("scales")
        log.info("kv_cache goes on after block %d of %d", position.facts["done"], len(walk))
    start = 0 if position is None else position.facts["done"]
    del position
    for index in track(range(start, len(walk)), "cache scales"):
        layer = _Largest()
        # A block asks for its own layer, by its number.
        cache = Cache(layers=[layer] * len(walk))
        with walk.open(index), torch.no_grad():
            activations = walk.enter(index)
            # By the name that blocks of the family have for it.
            key = "layer_past" if "layer_past" in activations.arguments else "past_key_values"
            activations.arguments = {**activations.arguments, key: cache}
            walk.leave(index, activations)
        prefix = f"{walk.prefix(index)}.{family.attention}"
        for name, largest in zip(SCALES, layer.largest, strict=True):
            if not torch.isfinite(largest).all():
                raise UserError(f"{prefix} of {source.path} gives keys or values of NaN or Inf")
            team.largest(largest)
            scales[f"{prefix}.{name}"] = _scale(largest, scheme.keys).cpu()
        keys, values = (float(largest.max()) for largest in layer.largest)
        log.info("%s: largest |key| %.2f, |value| %.2f", prefix, keys, values)
        assert walk.hidden is not None
        saved.offer({"done": index + 1}, {"hidden": walk.hidden, **named("scales", scales)})
    return scales


def _scale(largest: Tensor, state: StateScheme) -> Tensor:
    scale = static_scale(largest)
    return scale.view(-1, 1, 1) if state.per == "head" else scale.max().view(1)


class _Largest(DynamicLayer):
    """Notes the largest |key| and |value| of every head, and keeps nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: tuple[Tensor, ...] = ()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        seen = tuple(states.abs().amax((0, 2, 3)).float() for states in (key_states, value_states))
        pairs = zip(self.largest or seen, seen, strict=True)
        self.largest = tuple(torch.maximum(before, now) for before, now in pairs)
        return key_states, value_states


class Unpacked:
    """The weights of a folder under their original names, quantized ones as what they stand for."""

    def __init__(self, folder: ModelFolder):
        self._weights, self._dtype = Weights(folder), folder.dtype
        self.names = self._weights.names

    def tensor(self, name: str) -> Tensor:
        value = self._weights.get(name)
        return value.dequantize(self._dtype) if isinstance(value, QTensor) else value
