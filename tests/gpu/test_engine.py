"""The engine on a CUDA device: captured steps against the same weights dequantized."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from compress.kv_cache.scheme import CacheScheme, StateScheme
from compress.kv_cache.stage import quantize_cache
from compress.model.folder import ModelFolder
from compress.quantize.inputs import InputScheme
from compress.quantize.rounding import Nearest
from compress.quantize.scheme import Scheme, Schemes
from compress.quantize.stage import quantize
from compress.runtime.cached import Caches, Reader
from compress.runtime.decoder import Decoder, open_decoder
from compress.runtime.load import load_dense
from compress.runtime.sampling import Sampling
from tests.exported import exported

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
STEPS = 40
SCHEMES = {
    "bf16": None,
    "int4": Schemes(Scheme(4, 32)),
    "int4 and a head in int8": Schemes(Scheme(4, 64, True), head=Scheme(8, "channel", True)),
    "int3": Schemes(Scheme(3, 64)),
    "int2": Schemes(Scheme(2, 32)),
    "int8": Schemes(Scheme(8, "channel", True)),
    "w8a8": Schemes(Scheme(8, "channel", True, inputs=InputScheme())),
    "fp8": Schemes(Scheme(8, "channel", True, "float", inputs=InputScheme("float"))),
    "mixed": Schemes(Scheme(4, 32), {"model.layers.1.self_attn.v_proj": Scheme(8, 32)}),
}
INT8 = StateScheme(bits=8, symmetric=True)
CACHES = {
    "int8": CacheScheme(INT8, INT8),
    "int4": CacheScheme(
        StateScheme(bits=4, per="channel", group_size=16), StateScheme(bits=4, rotate=True), 2, 16
    ),
    "int2": CacheScheme(
        StateScheme(bits=2, per="channel", group_size=16), StateScheme(bits=2, group_size=32), 2, 16
    ),
    # As the recipe has it: what warms up must not leave the little room that 256 tokens give its store.
    "recipe": CacheScheme(
        StateScheme(bits=4, per="channel", group_size=64, rotate=True),
        StateScheme(bits=4, rotate=True),
        4,
        64,
    ),
}


def prompts(batch: int) -> list[list[int]]:
    """Of different lengths."""
    generator = torch.Generator().manual_seed(batch)
    return [torch.randint(256, (9 + i % 23,), generator=generator).tolist() for i in range(batch)]


@torch.inference_mode()
def logits_of(decoder: Decoder, tokens: Tensor, prompt: int) -> Tensor:
    """Behind the prompt and behind each token after it, which are forced, by replaying the graph."""
    decoder.start(tokens[:, :prompt], tokens.shape[1] - prompt + 1)
    found = [decoder.logits.clone()]
    request = decoder._request
    assert request is not None
    for place in range(prompt, tokens.shape[1]):
        request.token.copy_(tokens[:, place])
        decoder.step()
        found.append(decoder.logits.clone())
    return torch.stack(found, dim=1)


@pytest.mark.parametrize("name", SCHEMES)
def test_replayed_steps_compute_what_the_dequantized_weights_do(
    tiny: ModelFolder, tokens: Tensor, tmp_path: Path, name: str
) -> None:
    schemes = SCHEMES[name]
    folder = tiny if schemes is None else exported(tiny, schemes, tmp_path)
    tokens = tokens[:4, : 20 + STEPS].cuda()
    decoder = open_decoder(folder.path, "cuda")
    found = logits_of(decoder, tokens, 20).float()
    assert decoder._request is not None
    assert decoder._request.graph is not None
    assert "dense" not in decoder.kernels
    with torch.inference_mode():
        expected = load_dense(folder, CUDA, torch.float32)(tokens).logits[:, 19:]
        noise = load_dense(folder, CUDA, torch.bfloat16)(tokens).logits[:, 19:].float() - expected
    assert torch.isfinite(found).all()
    error = (found - expected).norm(dim=-1)
    assert error.median() < 1.3 * noise.norm(dim=-1).median()


@pytest.mark.parametrize("name", CACHES)
def test_packed_caches_in_graphs_read_what_token_by_token_reads(
    make_model: object, tokens: Tensor, tmp_path: Path, name: str
) -> None:
    source = make_model(head_dim=64)  # type: ignore[operator]
    quantize_cache(source, tmp_path / "kv", CACHES[name], tokens=None, device=CUDA)
    folder = ModelFolder(tmp_path / "kv")
    tokens = tokens[:2, : 20 + STEPS].cuda()
    decoder = open_decoder(folder.path, "cuda")
    found = logits_of(decoder, tokens, 20).float()
    assert decoder.kernels.get("static-attention") == 3
    expected = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = load_dense(folder, CUDA, dtype)
        with torch.inference_mode():
            reader = Reader(model, Caches(folder, model))
            reader(tokens[:, :20])
            read = [reader(tokens[:, i : i + 1]) for i in range(20, 20 + STEPS)]
        expected[dtype] = torch.cat(read, dim=1).float()
    error = (found[:, 1:] - expected[torch.float32]).norm(dim=-1)
    noise = (expected[torch.bfloat16] - expected[torch.float32]).norm(dim=-1)
    assert error.median() < 1.5 * noise.median()


@pytest.mark.parametrize("batch", [1, 2, 9, 33, 70, 130])
def test_every_batch_is_finite_and_repeats_itself(
    tiny: ModelFolder, tmp_path: Path, batch: int
) -> None:
    decoder = open_decoder(exported(tiny, Scheme(4, 32), tmp_path).path, "cuda")
    first = decoder.generate(prompts(batch), 12)
    assert torch.isfinite(decoder.logits).all()
    assert decoder.generate(prompts(batch), 12) == first


def test_sampling_inside_the_graph_is_seeded(tiny: ModelFolder) -> None:
    def written(seed: int) -> list[list[int]]:
        decoder = open_decoder(tiny.path, "cuda", Sampling(temperature=1.5, top_p=0.95, seed=seed))
        return decoder.generate(prompts(3), 20)

    assert written(1) == written(1)
    assert written(1) != written(2)
    assert len(set(written(1)[0])) > 3


def test_outliers_found_while_it_runs_are_not_captured(tiny: ModelFolder, tmp_path: Path) -> None:
    inputs = InputScheme(outliers="dynamic")
    schemes = Schemes(Scheme(8, "channel", True, inputs=inputs))
    from compress.export import bitsandbytes

    quantize(
        tiny,
        tmp_path / "record",
        tokens=torch.randint(256, (2, 32)),
        schemes=schemes,
        transforms=[],
        roundings=[Nearest()],
        device=torch.device("cpu"),
    )
    bitsandbytes.write(ModelFolder(tmp_path / "record"), tmp_path / "out")
    decoder = open_decoder(tmp_path / "out", "cuda")
    decoder.generate(prompts(2), 4)
    assert decoder._request is not None
    assert decoder._request.graph is None
    assert torch.isfinite(decoder.logits).all()


def test_tuning_is_looked_up_afterwards(
    make_model: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress.kernels import tuning

    folder = make_model(hidden_size=256, num_attention_heads=8)  # type: ignore[operator]
    table = tuning.Table()
    monkeypatch.setattr(tuning, "table", lambda: table)
    decoder = open_decoder(folder.path, "cuda")
    decoder.tune([1])
    assert table.found
    decoder.generate(prompts(1), 4)
    assert torch.isfinite(decoder.logits).all()
