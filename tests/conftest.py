"""Tiny seeded models in real folders: small enough for seconds, with several groups in every row."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

# No test may ask a hub for anything; a test that does fails instead of waiting.
os.environ["HF_HUB_OFFLINE"] = "1"
# Commands that tests start, in other folders, are those of this tree.
os.environ["PYTHONPATH"] = str(Path(__file__).parent.parent)

import pytest
import torch

# Triton kernels run on the interpreter where there is no GPU; they look when they are imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from transformers import AutoConfig, AutoModelForCausalLM

from compress.model.folder import ModelFolder
from eval.faults.tiny import byte_tokenizer

SHAPE = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": 256,
}


def write_model(
    path: Path, model_type: str = "llama", dtype: str = "bfloat16", **changes: object
) -> Path:
    """A random model whose activations differ in size from channel to channel, as real ones do."""
    config = AutoConfig.for_model(model_type, **{**SHAPE, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("norm.weight"):
            parameter.data = (1.5 * noise).exp().to(parameter.dtype)
        elif name.endswith("bias"):
            parameter.data = (0.1 * noise).to(parameter.dtype)
        else:
            parameter.data = (noise / parameter.shape[-1] ** 0.5).to(parameter.dtype)
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ModelFolder]:
    """make_model(model_type, **config changes) -> ModelFolder, built once for each set of changes."""
    built: dict[str, ModelFolder] = {}

    def make(model_type: str = "llama", **changes: object) -> ModelFolder:
        key = repr((model_type, sorted(changes.items())))
        if key not in built:
            path = write_model(tmp_path_factory.mktemp(model_type) / "model", model_type, **changes)
            built[key] = ModelFolder(path)
        return built[key]

    return make


@pytest.fixture(scope="session")
def tiny(make_model: Callable[..., ModelFolder]) -> ModelFolder:
    return make_model()


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    return torch.randint(256, (6, 32), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    words = [
        "the",
        "house",
        "of",
        "a",
        "small",
        "bird",
        "stood",
        "under",
        "many",
        "old",
        "trees",
        "near",
        "water",
    ]
    generator = torch.Generator().manual_seed(3)
    picks = torch.randint(len(words), (3000,), generator=generator).tolist()
    path.write_text(" ".join(words[i] for i in picks))
    return path


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", action="store_true", help="rewrite tests/golden from this run")
    parser.addoption("--fuzz-cases", type=int, help="damaged inputs in tests/fuzz, in all")
    parser.addoption("--fuzz-seed", type=int, default=0, help="which they are")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA device where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
