"""The packed cache in a model: token by token, in batches, with padding, beams and windows; its memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache

from compress.kv_cache.cache import PackedCache, PackedLayer, Scales
from compress.kv_cache.scheme import CacheScheme, StateScheme
from compress.model.folder import ModelFolder
from compress.runtime.cached import Caches, Reader
from compress.runtime.load import load_dense

FP8 = StateScheme("float", 8, "tensor")
CHANNEL4 = StateScheme(bits=4, per="channel", group_size=8)
SCHEMES = {
    "fp8": CacheScheme(FP8, FP8),
    "fp8-window": CacheScheme(FP8, FP8, 2, 5),
    "int8": CacheScheme(StateScheme(bits=8, symmetric=True), StateScheme(bits=8, symmetric=True)),
    "int4": CacheScheme(replace(CHANNEL4, rotate=True), StateScheme(bits=4, rotate=True), 4, 16),
    "int4-no-window": CacheScheme(CHANNEL4, StateScheme(bits=4), 1, 0),
    "int2-pre-rope": CacheScheme(
        StateScheme(bits=2, per="channel", group_size=8), StateScheme(bits=2), 3, 12, True
    ),
}
# So precise that a model decodes as with 16 bits.
FINE = CacheScheme(
    StateScheme(bits=8, per="channel", group_size=4), StateScheme(bits=8, group_size=8), 4, 8
)


def scales_for(scheme: CacheScheme) -> Scales | None:
    return Scales(torch.tensor([0.02]), torch.tensor([0.03])) if scheme.static else None


def rotary(positions: Tensor) -> tuple[Tensor, Tensor]:
    """Angles of heads of 32, as Llama has them."""
    frequencies = 1 / 100 ** (torch.arange(16) / 16)
    angles = positions[..., None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def new_layer(scheme: CacheScheme, **arguments: Any) -> PackedLayer:
    return PackedLayer(
        scheme, scales=scales_for(scheme), rotary=rotary, dtype=torch.float32, **arguments
    )


def random_states(tokens: int, batch: int = 2, head_dim: int = 32) -> tuple[Tensor, Tensor]:
    shape = (batch, 3, tokens, head_dim)
    return torch.randn(shape) * 2 + torch.randn(3, 1, head_dim), torch.randn(shape)


def appended(layer: PackedLayer, states: tuple[Tensor, Tensor], pieces: list[int]) -> list[Any]:
    parts = zip(*(s.split(pieces, dim=2) for s in states), strict=True)
    return [layer.update(keys, values) for keys, values in parts]


@pytest.mark.parametrize("name", SCHEMES)
def test_pieces_see_what_token_by_token_sees(name: str) -> None:
    """A reader's pieces end where tokens leave the window: the last token of each reads the same."""
    torch.manual_seed(0)
    scheme = SCHEMES[name]
    states = random_states(70)
    first = (scheme.sinks + scheme.window) % scheme.step or scheme.step
    pieces = [first] + [scheme.step] * ((70 - first) // scheme.step)
    pieces += [70 - sum(pieces)] if sum(pieces) < 70 else []
    one_by_one = appended(new_layer(scheme), states, [1] * 70)
    in_pieces = appended(new_layer(scheme), states, pieces)
    end = 0
    for piece, (keys, values) in zip(pieces, in_pieces, strict=True):
        for token in range(end, end + piece):
            alone = one_by_one[token]
            assert torch.equal(alone[0], keys[:, :, : token + 1])
            assert torch.equal(alone[1], values[:, :, : token + 1])
        end += piece


@pytest.mark.parametrize("name", SCHEMES)
def test_what_is_kept_and_what_is_packed(name: str) -> None:
    torch.manual_seed(0)
    scheme = SCHEMES[name]
    states = random_states(75)
    layer = new_layer(scheme)
    appended(layer, states, [40, 1, 34])
    keys, values = layer.update(*(s[:, :, :0] for s in states))
    kept = scheme.kept(75)
    exact = (keys == states[0]).flatten(-1).all(-1)[0, 0]
    # What is close to itself after 2 bits may be equal by chance, nothing that was kept may differ.
    recent = 75 - (kept - scheme.sinks)
    assert exact[: scheme.sinks].all()
    assert exact[recent:].all()
    assert not exact[scheme.sinks : recent].any()
    bits = min(scheme.keys.bits, scheme.values.bits)
    for found, expected in ((keys, states[0]), (values, states[1])):
        assert (found - expected).norm() / expected.norm() < {8: 0.03, 4: 0.1, 2: 0.4}[bits]


@pytest.mark.parametrize("name", [*SCHEMES, "demo-int4", "demo-int2"])
@pytest.mark.parametrize("tokens", [33, 200, 1024])
def test_measured_memory_is_the_scheme_s(name: str, tokens: int) -> None:
    demo = {
        "demo-int4": CacheScheme(
            StateScheme(bits=4, per="channel", group_size=64), StateScheme(), 4, 128
        ),
        "demo-int2": CacheScheme(
            StateScheme(bits=2, per="channel", group_size=32), StateScheme(bits=2), 4, 64
        ),
    }
    scheme = (SCHEMES | demo)[name]
    states = random_states(tokens)
    layer = PackedLayer(scheme, scales=scales_for(scheme), rotary=rotary)
    assert layer.nbytes == 0
    appended(layer, states, [20, *[1] * 13, *([tokens - 33] if tokens > 33 else [])])
    assert layer.get_seq_length() == tokens
    sixteen = 2 * 2 * states[0].numel()
    assert layer.nbytes == pytest.approx(scheme.share(tokens, 32) * sixteen, rel=1e-6)


@pytest.mark.parametrize("name", SCHEMES)
def test_padding_changes_nothing_of_a_row(name: str) -> None:
    """A padded row keeps its own first tokens and groups that no padding widens."""
    torch.manual_seed(0)
    scheme, pad = SCHEMES[name], 16
    states = random_states(60)
    padded = tuple(s.clone() for s in states)
    for s in padded:
        s[1] = torch.cat([torch.full((3, pad, 32), 1e3), s[1][:, : 60 - pad]], dim=1)
    layer = new_layer(scheme, padding=torch.tensor([0, pad]))
    found = appended(layer, (padded[0], padded[1]), [50, *[1] * 10])[-1]
    alone = new_layer(scheme)
    row = tuple(s[1:2, :, : 60 - pad] for s in states)
    # Groups of the padded row begin elsewhere, so only what is quantized by token is the same.
    expected = appended(alone, (row[0], row[1]), [50 - pad, *[1] * 10])[-1]
    whole = appended(new_layer(scheme), (states[0][:1], states[1][:1]), [50, *[1] * 10])[-1]
    for i in (0, 1):
        assert torch.equal(found[i][:1], whole[i])
        ours = found[i][1:, :, pad:]
        assert torch.equal(ours[:, :, : scheme.sinks], expected[i][:, :, : scheme.sinks])
        if scheme.keys.per != "channel" and scheme.window == 0:
            assert torch.equal(ours, expected[i])
        exact = row[i]
        error, usual = ((x - exact).norm() / exact.norm() for x in (ours, expected[i]))
        assert error < 1.5 * usual + 1e-3


def test_a_first_piece_of_padding_alone_is_refused() -> None:
    layer = new_layer(FINE, padding=torch.tensor([0, 9]))
    with pytest.raises(ValueError, match="first piece has 9 tokens, 9 of a row are padding"):
        layer.update(*random_states(9))


@pytest.mark.parametrize("name", SCHEMES)
def test_rows_change_places(name: str) -> None:
    torch.manual_seed(0)
    states, order = random_states(61), torch.tensor([1, 1, 0])
    for change in ("reorder_cache", "batch_select_indices"):
        layer = new_layer(SCHEMES[name], padding=torch.tensor([0, 3]))
        before = appended(layer, states, [60, 1])[-1]
        getattr(layer, change)(order)
        more = tuple(s[order][:, :, :1] for s in states)
        after = layer.update(*more)
        for i in (0, 1):
            old = after[i][:, :, :60]
            reference = before[i][order][:, :, :60]
            # The row with padding may hold anything there.
            assert torch.equal(old[2], reference[2])
            assert torch.equal(old[:2, :, 3:40], reference[:2, :, 3:40])
    layer = new_layer(SCHEMES[name])
    appended(layer, states, [60, 1])
    layer.batch_repeat_interleave(2)
    keys, _ = layer.update(*(s[:, :, :0].repeat_interleave(2, 0) for s in states))
    assert torch.equal(keys[0], keys[1])
    assert keys.shape[0] == 4


def test_keys_before_the_rotary_embedding() -> None:
    """A key that is constant but for its position is exact in 2 bits when it is stored unturned."""
    key = torch.randn(32)
    cos, sin = rotary(torch.arange(100).unsqueeze(0))
    halves = torch.cat([-key[16:], key[:16]])
    turned = (key * cos + halves * sin).unsqueeze(1).expand(2, 3, -1, -1)
    values = torch.randn(2, 3, 100, 32)
    errors = []
    for pre_rope in (True, False):
        scheme = replace(SCHEMES["int2-pre-rope"], pre_rope=pre_rope)
        layer = new_layer(scheme, padding=torch.tensor([0, 7]))
        # The second row begins 7 tokens later: its positions count from there.
        late = torch.cat([turned[1:, :, :7], turned[1:, :, :93]], dim=2)
        states = torch.cat([turned[:1], late])
        keys, _ = appended(layer, (states, values), [90, *[1] * 10])[-1]
        errors.append(
            max(
                (keys[0] - states[0]).norm().item(),
                (keys[1, :, 7:] - states[1, :, 7:]).norm().item(),
            )
        )
    assert errors[0] < 0.05 * errors[1]


def test_the_last_tokens_can_be_taken_back() -> None:
    states = random_states(60)
    layer = new_layer(SCHEMES["int4"])
    layer.update(*(s[:, :, :45] for s in states))
    before = layer.nbytes
    layer.update(*(s[:, :, 45:48] for s in states))
    layer.crop(-3)
    assert layer.get_seq_length() == 45
    assert layer.nbytes == before
    keys, _ = layer.update(*(s[:, :, 45:46] for s in states))
    assert torch.equal(keys[:, :, -1], states[0][:, :, 45])
    with pytest.raises(ValueError, match="cannot be taken back"):
        layer.crop(-40)
    layer.reset()
    assert layer.nbytes == layer.get_seq_length() == 0


def test_a_mask_with_padding_on_the_right_is_refused(opened: Any) -> None:
    _, caches = opened(FINE)
    for mask in ([[1, 1, 1], [1, 1, 0]], [[1, 0, 1], [0, 1, 1]]):
        with pytest.raises(ValueError, match="padding on the right: pad on the left"):
            caches.new(torch.tensor(mask))


def test_scales_and_schemes_must_fit() -> None:
    with pytest.raises(ValueError, match="needs its scales"):
        PackedLayer(SCHEMES["fp8"])
    with pytest.raises(ValueError, match="needs no scales"):
        PackedLayer(FINE, scales=scales_for(SCHEMES["fp8"]))
    with pytest.raises(ValueError, match="needs the rotary embedding"):
        PackedLayer(replace(FINE, pre_rope=True))


@pytest.fixture
def opened(make_model: Callable[..., ModelFolder]) -> Callable[..., tuple[Any, Caches]]:
    """A model in float32, what it keeps unpacked too, and its caches of a scheme."""

    def open_(scheme: CacheScheme, model_type: str = "llama", **changes: object) -> Any:
        folder = make_model(model_type, dtype="float32", **changes)
        model = load_dense(folder, torch.device("cpu"), torch.float32)
        return model, Caches(folder, model, scheme)

    return open_


PROMPT = torch.arange(40).view(1, -1) * 7 % 251
# Nothing is packed before 200 tokens, so that all is as with transformers' own cache, to the last token.
WIDE = replace(FINE, window=200)


def written(model: Any, cache: Cache, prompt: Tensor = PROMPT, **more: Any) -> list[list[int]]:
    out = model.generate(
        prompt,
        attention_mask=more.pop("attention_mask", torch.ones_like(prompt)),
        past_key_values=cache,
        max_new_tokens=40,
        do_sample=False,
        eos_token_id=None,
        **more,
    )
    return out[:, prompt.shape[1] :].tolist()


@torch.no_grad()
def by_hand(model: Any, cache: Cache) -> list[list[int]]:
    """Greedy decoding without ``generate``."""
    row, token = [], PROMPT
    for _ in range(40):
        token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        row.append(int(token))
    return [row]


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "mistral"])
def test_generate(opened: Any, model_type: str) -> None:
    model, caches = opened(WIDE, model_type)
    assert written(model, caches.new()) == written(model, DynamicCache())
    model, caches = opened(SCHEMES["int4"], model_type)
    cache = caches.new()
    assert written(model, cache) == by_hand(model, caches.new())
    assert cache.get_seq_length() == 79


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
@pytest.mark.parametrize("pre_rope", [False, True])
def test_eight_fine_bits_are_almost_exact(opened: Any, model_type: str, pre_rope: bool) -> None:
    torch.manual_seed(0)
    tokens = torch.randint(256, (2, 90))
    mask = torch.ones_like(tokens)
    mask[1, :13] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    model, caches = opened(replace(FINE, pre_rope=pre_rope), model_type)
    found = []
    for cache in (DynamicCache(), caches.new(mask[:, :60])):
        with torch.no_grad():
            parts = [
                model(
                    tokens[:, part],
                    attention_mask=mask[:, : part.stop],
                    position_ids=places[:, part],
                    past_key_values=cache,
                ).logits
                for part in (slice(0, 60), slice(60, 90))
            ]
        found.append(parts[1].log_softmax(-1))
    exact, packed = found
    assert (exact.exp() * (exact - packed)).sum(-1).median() < 1e-3
    assert (exact.argmax(-1) == packed.argmax(-1)).float().mean() > 0.9


def test_padding_and_beams(opened: Any) -> None:
    model, caches = opened(WIDE)
    prompt = PROMPT.repeat(2, 1)
    mask = torch.ones_like(prompt)
    mask[1, :11] = 0
    padded = written(model, caches.new(mask), prompt, attention_mask=mask)
    assert padded == written(model, DynamicCache(), prompt, attention_mask=mask)
    assert padded[0] != padded[1]
    for beam_mask in (torch.ones_like(mask), mask):
        beams = {"num_beams": 3, "attention_mask": beam_mask}
        ours = written(model, caches.new(beam_mask.repeat_interleave(3, 0)), prompt, **beams)
        assert ours == written(model, DynamicCache(), prompt, **beams)


def test_sliding_window(opened: Any) -> None:
    """Packed tokens out of sight are dropped, and what is in sight is read right."""
    torch.manual_seed(0)
    tokens = torch.randint(256, (1, 100))
    model, caches = opened(FINE, "mistral", sliding_window=24)
    cache = caches.new()
    assert isinstance(cache, PackedCache)
    with torch.no_grad():
        exact = model(tokens).logits.log_softmax(-1)
        found = torch.cat(
            [model(piece, past_key_values=cache).logits for piece in tokens.split(4, dim=1)], dim=1
        ).log_softmax(-1)
    assert (exact.exp() * (exact - found)).sum(-1).mean() < 2e-3
    # The window, a group that is not yet out of it, and one that is not yet full.
    assert cache.layers[0].get_mask_sizes(1)[0] <= 24 + 2 * FINE.step
    assert cache.layers[0].get_seq_length() == 100


@pytest.mark.parametrize("name", ["int4", "int2-pre-rope", "int8", "int4-no-window"])
def test_a_reader_reads_what_decoding_reads(opened: Any, name: str) -> None:
    """Logits of a text in pieces equal those of feeding its tokens one by one."""
    torch.manual_seed(0)
    tokens = torch.randint(256, (1, 90))
    model, caches = opened(SCHEMES[name])
    with torch.no_grad():
        reader = Reader(model, caches)
        whole = torch.cat([reader(tokens[:, :50]), reader(tokens[:, 50:])], dim=1)
        cache = caches.new()
        single = [model(token, past_key_values=cache).logits for token in tokens.split(1, dim=1)]
        # The last bit of a product may differ, and with it now and then a code.
        error = (whole - torch.cat(single, dim=1)).abs().amax(-1)
        exact = model(tokens).logits
    lost = (whole - exact).abs().amax(-1)
    assert error.median() < 1e-4
    assert error.mean() < 0.05 * lost.mean()
    assert reader.nbytes == cache.nbytes
    fork = reader.fork()
    fork(tokens[:, :20])
    assert reader.cache.get_seq_length() == 90
    assert fork.cache.get_seq_length() == 110
