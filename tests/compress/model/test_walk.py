"""Walking a model block by block gives what the whole model gives, holding one block at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from compress.errors import UserError
from compress.model.families import LLAMA
from compress.model.folder import ModelFolder
from compress.model.skeleton import assign, empty_model, settle_vector_math
from compress.model.walk import Walk


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_hidden_states_equal_the_whole_model(
    make_model: Callable[..., ModelFolder], tokens: torch.Tensor, model_type: str
) -> None:
    folder = make_model(model_type)
    # A batch of 4 sequences and one of 2.
    walk = Walk(folder, LLAMA, torch.device("cpu"), tokens_per_batch=4 * tokens.shape[1])
    walk.embed(tokens)
    for index in range(len(walk)):
        with walk.open(index) as module:
            activations = walk.enter(index)
            assert [len(rows) for rows in activations.batches(activations.inputs)] == [4, 2]
            assert activations.original is None
            assert activations.targets is None
            before = activations.inputs.clone()
            walk.leave(index, activations)
            assert torch.equal(activations.inputs, before), "what enters must stay as it was"
            assert not torch.equal(before, walk.hidden)
            assert not any(p.is_meta for p in module.parameters())
        assert all(p.is_meta for p in walk.model.parameters()), (
            "a block must be freed after its turn"
        )
    whole = AutoModelForCausalLM.from_pretrained(folder.path, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = [
            whole(rows, output_hidden_states=True).hidden_states for rows in tokens.split(4)
        ]
    assert walk.hidden is not None
    for hidden, states in zip(walk.hidden.split(4), expected, strict=True):
        # The last state of the list is after the final norm.
        assert torch.equal(whole.model.norm(hidden), states[-1])


def test_the_originals_states_do_not_see_what_was_changed(
    tiny: ModelFolder, tokens: torch.Tensor
) -> None:
    """Two walks at once: inputs through the changed blocks, targets through the original ones."""
    plain = Walk(tiny, LLAMA, torch.device("cpu"))
    plain.embed(tokens)
    states = []
    for index in range(len(plain)):
        with plain.open(index):
            activations = plain.enter(index)
            plain.leave(index, activations)
            states.append((activations.inputs, plain.hidden))
    walk = Walk(tiny, LLAMA, torch.device("cpu"))
    walk.embed(tokens, original=True)
    for index, (before, after) in enumerate(states):
        with walk.open(index) as module:
            activations = walk.enter(index)
            assert activations.original is not None
            assert activations.targets is not None
            assert torch.equal(activations.original, before)
            assert torch.equal(activations.targets, after)
            assert torch.equal(activations.inputs, before) == (index == 0)
            module.get_submodule("mlp.down_proj").weight.data *= 0.5
            walk.leave(index, activations)
            assert not torch.equal(walk.hidden, after)


def test_wrong_shapes_are_named(tiny: ModelFolder) -> None:
    model = empty_model(tiny, torch.bfloat16)
    with pytest.raises(UserError, match=r"model.norm.weight has shape \(3,\).*asks for \(128,\)"):
        assign(model, "model.norm.weight", torch.zeros(3), tiny)
    with pytest.raises(UserError, match=r"a tensor model.nothing, which its config.json"):
        assign(model, "model.nothing", torch.zeros(3), tiny)


def test_vector_functions_are_called_once_before_the_first_model(tiny: ModelFolder) -> None:
    """Their first call must not come from several threads: one element stays on this one."""

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if args and isinstance(args[0], torch.Tensor):
                seen.append((function.overloadpacket.__name__, args[0].dtype, args[0].numel()))
            return function(*args, **(kwargs or {}))

    seen: list[tuple[str, torch.dtype, int]] = []
    settle_vector_math.cache_clear()
    with Calls():
        empty_model(tiny, torch.float32)
    for name in ("cos", "sin", "exp", "log", "sqrt", "tanh", "erf"):
        for dtype in (torch.float32, torch.float64):
            sizes = [n for what, kind, n in seen if (what, kind) == (name, dtype)]
            assert sizes[:1] == [1], (name, dtype)
    seen.clear()
    with Calls():
        empty_model(tiny, torch.float32)
    assert not any(what == "erf" for what, _, _ in seen), "once in a process"
