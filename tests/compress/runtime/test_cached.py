"""Models that run through the cache of their folder."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest
import torch

from compress.kernels.decode_attention import NAME
from compress.kv_cache.cache import PackedCache
from compress.kv_cache.scheme import CacheScheme, StateScheme
from compress.kv_cache.stage import quantize_cache
from compress.model.folder import ModelFolder
from compress.runtime.cached import UNPACKED, Caches, Reader, attend_packed, load_served
from compress.runtime.decoder import open_decoder
from compress.runtime.load import load_dense
from compress.runtime.probe import head_errors

CPU = torch.device("cpu")
INT8 = StateScheme(bits=8, symmetric=True)
PLAIN = CacheScheme(INT8, INT8)
COARSE = CacheScheme(
    StateScheme(bits=4, per="channel", group_size=16), StateScheme(bits=4, rotate=True), 2, 16
)


# A scheme -> a plain folder, and the same with that cache.
Stage = Callable[[CacheScheme], tuple[ModelFolder, ModelFolder]]


@pytest.fixture
def staged(make_model: Callable[..., ModelFolder], tmp_path: Path) -> Stage:
    def stage(scheme: CacheScheme) -> tuple[ModelFolder, ModelFolder]:
        source = make_model(dtype="float32", head_dim=64)
        target = tmp_path / scheme.name
        quantize_cache(source, target, scheme, tokens=None, device=CPU)
        return source, ModelFolder(target)

    return stage


@pytest.mark.parametrize("scheme", [PLAIN, COARSE], ids=["int8", "int4"])
def test_texts_are_read_through_the_cache(staged: Stage, scheme: CacheScheme) -> None:
    """Judged by a plain call, as texts and tasks are: what a reader reads, not what weights alone give."""
    torch.manual_seed(0)
    source, folder = staged(scheme)
    tokens = torch.randint(256, (2, 80))
    plain, served = load_dense(source, CPU, torch.float32), load_served(folder, CPU, torch.float32)
    with torch.no_grad():
        exact, found = plain(tokens).logits, served(tokens).logits
        read = Reader(plain, Caches(folder, plain))(tokens)
        assert torch.allclose(found, read, atol=1e-5)
        assert not torch.allclose(found, exact, atol=1e-3)
        # The first tokens of a window are still as they were, and so is a second call.
        start = scheme.sinks + scheme.window
        assert torch.allclose(found[:, :start], exact[:, :start], atol=1e-4)
        assert torch.equal(served(tokens).logits, found)


def test_generation_runs_through_the_cache(staged: Stage) -> None:
    """As generating tasks do: without a word of a cache."""
    _, folder = staged(COARSE)
    model = load_served(folder, CPU, torch.float32)
    prompt = torch.randint(256, (1, 60), generator=torch.Generator().manual_seed(0))
    more = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), **more)
    assert isinstance(out.past_key_values, PackedCache)
    assert out.past_key_values.get_seq_length() == 67


def test_a_folder_without_a_scheme_is_read_plainly(tiny: ModelFolder) -> None:
    tokens = torch.randint(256, (1, 20))
    with torch.no_grad():
        served = load_served(tiny, CPU, torch.float32)(tokens).logits
        assert torch.equal(served, load_dense(tiny, CPU, torch.float32)(tokens).logits)


def test_the_decoder_uses_the_folder_s_cache(
    staged: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    source, folder = staged(COARSE)
    prompt = torch.randint(256, (2, 50), generator=torch.Generator().manual_seed(0))
    decoder = open_decoder(folder.path, "cpu")
    written = [decoder.start(prompt, 21), *(decoder.step() for _ in range(20))]
    assert decoder.kernels == {UNPACKED: 3}
    assert isinstance(decoder._cache, PackedCache)
    assert decoder._cache.nbytes < 2 * 2 * 70 * 2 * 3 * 64 * 4
    model = load_dense(folder, CPU, torch.float32)
    cache = Caches(folder, model).new()
    token, expected = prompt, []
    with torch.no_grad():
        for _ in range(21):
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            expected.append(token)
    assert torch.equal(torch.cat(written, 1), torch.cat(expected, 1))
    assert open_decoder(source.path, "cpu").kernels == {}


def test_a_model_decodes_with_the_kernel(staged: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole model with the kernel in its attention, on the interpreter, beside unpacked states."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    _, folder = staged(COARSE)
    model = load_dense(folder, CPU, torch.float32)
    tokens = torch.randint(256, (2, 60), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[1, :9] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)

    def run(cache: PackedCache) -> torch.Tensor:
        found = []
        for start, end in [(0, 57), (57, 58), (58, 59), (59, 60)]:
            logits = model(
                tokens[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=places[:, start:end],
                past_key_values=cache,
            ).logits
            found.append(logits[:, -1])
        return torch.stack(found)

    caches = Caches(folder, model)
    with torch.no_grad():
        unpacked = run(caches.new(mask[:, :57]))
        cache = caches.new(mask[:, :57])
        assert attend_packed(model, cache) == NAME
        packed = run(cache)
    assert torch.allclose(packed, unpacked, atol=1e-3)
    assert not torch.equal(packed, unpacked)


def test_errors_of_heads(staged: Stage) -> None:
    """A row a layer, a column a head; fewer bits, more error; a layer's own error alone."""
    source, folder = staged(COARSE)
    model = load_dense(folder, CPU, torch.float32)
    tokens = torch.randint(256, (100,), generator=torch.Generator().manual_seed(0))
    found = head_errors(model, Caches(folder, model), tokens)
    assert [len(found[key]) for key in ("keys", "values", "output")] == [3, 3, 3]
    assert [len(found[key][0]) for key in ("keys", "values", "output")] == [2, 2, 4]
    fine = head_errors(model, Caches(folder, model, PLAIN), tokens)
    for key in found:
        pairs = zip(chain(*found[key]), chain(*fine[key]), strict=True)
        assert all(0 < less < more < 1 for more, less in pairs), key
    # The probe is gone: the model is what it was.
    with torch.no_grad():
        plain = load_dense(source, CPU, torch.float32)(tokens[None]).logits
        assert torch.equal(model(tokens[None]).logits, plain)
