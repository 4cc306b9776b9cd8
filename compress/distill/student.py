"""The model that is trained, its losses included, as one module."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from compress.distill.knobs import Distill
from compress.distill.latent import attach_latents
from compress.distill.losses import Goal, Weights, losses, next_tokens, relative_error
from compress.model.families import Family, family_of
from compress.model.folder import ModelFolder
from compress.quantize.record import KEY
from compress.runtime.load import load_dense


@dataclass(frozen=True)
class Wanted:
    """What the original makes of some tokens: its distributions, and its states where they are compared,
    one after each block of the student; empty: they are not."""

    goal: Goal
    states: list[Tensor]


class Losses(NamedTuple):
    """Means over tokens, (): the weighted sum, which alone has gradients, and its parts."""

    loss: Tensor
    kl: Tensor
    ce: Tensor
    hidden: Tensor


class Student(nn.Module):
    """A model with its losses: forward(tokens, wanted) -> Losses.

    One module, so that whoever wraps it (DDP, FSDP2) sees every use of every parameter, that of the head in
    the loss too. Autocast is entered here and not left to the wrapper: the same numbers in one process and
    in many.
    """

    def __init__(self, model: Any, family: Family, knobs: Distill, dtype: torch.dtype):
        super().__init__()
        self.model = model
        self.weights = Weights(knobs.kl, knobs.ce, knobs.temperature, knobs.compile)
        self.hidden, self.dtype = knobs.hidden, dtype
        # What a wrapper asks a transformers model for, and which buffers it need not keep the same.
        self._no_split_modules = model._no_split_modules
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in self.named_buffers()]
        blocks = list(model.get_submodule(family.blocks))
        self.outputs = BlockOutputs(blocks) if knobs.hidden else None
        for block in blocks:
            # Inside the hooks of a wrapper, which must not run again with the block.
            if knobs.compile:
                block.forward = torch.compile(block.forward, dynamic=False)
            if knobs.checkpointing:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)

    def forward(self, tokens: Tensor, wanted: Wanted, look: bool = False) -> Losses:
        """tokens: int64 (sequences, length); wanted: of the same tokens; look: what is told of held-out text:
        whatever is trained, KL at temperature 1, from logits in float32"""
        device, low = tokens.device.type, self.dtype != torch.float32
        with torch.autocast(device, torch.bfloat16, enabled=low):
            H = self.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        weights = Weights() if look else self.weights
        with torch.autocast(device, torch.bfloat16, enabled=low and not look):
            E = self.model.get_output_embeddings().weight
            loss, kl, ce = losses(H.flatten(0, 1), E, next_tokens(tokens), wanted.goal, weights)
        hidden = torch.zeros_like(kl)
        if self.outputs is not None:
            states = self.outputs.take()
            if wanted.states:
                pairs = zip(states, wanted.states, strict=True)
                hidden = torch.stack([relative_error(S, T) for S, T in pairs]).mean()
                loss = loss + self.hidden * hidden
        return Losses(loss, kl, ce, hidden.detach())

    def tie_weights(self) -> None:
        """Make head and embedding one again, for a wrapper that moved them."""
        self.model.tie_weights()


def open_student(source: ModelFolder, knobs: Distill, device: torch.device) -> Student:
    """The student in float32, on the device; what may not change is frozen.

    A plain folder is trained whole. Of a record the latent weights of the quantized linears, norms and
    biases.
    """
    family = family_of(source.config)
    model = load_dense(source, device, torch.float32)
    if KEY in source.config:
        attach_latents(model, source)
    else:
        model.requires_grad_(True)
    return Student(model, family, knobs, source.dtype)


class BlockOutputs:
    """Takes down the states that blocks put out, in their order, until they are taken."""

    def __init__(self, blocks: list[Any]):
        self.count = len(blocks)
        self.found: dict[int, Tensor] = {}
        for index, block in enumerate(blocks):
            block.register_forward_hook(partial(self._note, index))

    def _note(self, index: int, block: nn.Module, args: Any, output: Any) -> None:
        self.found[index] = output[0] if isinstance(output, tuple) else output

    def take(self) -> list[Tensor]:
        found, self.found = self.found, {}
        return [found[index] for index in range(self.count)]
