"""Does an engine compute what was exported? Its log-probabilities of a prompt's tokens, beside our reader's.

Where inputs stay in 16 bits, an engine agrees if its mean log-probability is within TOLERANCE of ours and
much nearer to ours than to the original's (so an engine that dropped the quantization would fail). Where
inputs are rounded, that cannot be asked: the last bit of a bf16 input decides which of two 8-bit values
it takes, a whole step, so that two engines that round at other places differ as much as either does from
the original. There an engine agrees if it is about as far from the original as we are, and not as near as
we would be with the inputs left alone, where that makes a clear difference: with 8-bit floats, whose
weights cost most of it, it does not, and agreeing says no more than that the weights are read right. That
linears compute the same number by number is a test (tests/compress/export/test_eight_bits.py).

llama.cpp rounds the inputs of quantized linears to 8 bits whatever the file says. Where the weights cost no
more than that, its answer is as near to the original's as to ours: there it has to be within TOLERANCE of
ours and as far from the original as we are.

A cache in 8-bit floats is rounded in the same sense, and engines convert to E4M3 in different ways. There the
same checkpoint read with a 16-bit cache is what counts: an engine agrees if it strays from that between half
and twice as far as we do, is much nearer to it than to the original where weights are quantized too, and
moves much further once the stored scales are divided by CLIP (so one that computes scales of its own, or
keeps the cache in 16 bits, fails).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.export.formats import Weights
from compress.kv_cache.folder import SCALES, scheme_of
from compress.model.folder import ModelFolder
from compress.quantize.qtensor import QTensor
from compress.runtime.cached import load_served
from compress.runtime.load import load_dense

# Nats per token, mean of |difference|: engines round in bf16 at other places than we do.
TOLERANCE = 0.1
# The distance to our own log-probabilities must be below this share of the distance to the original's.
NEARER = 0.5
# With rounded inputs: how far the distances of ours and theirs to the original may be apart.
ALIKE = 0.25
# With a cache in 8-bit floats: how far our and their distances to the 16-bit cache may be apart, what the
# stored scales are divided by (most keys and values are clipped then), and how many times their distance to
# the 16-bit cache an answer must move then.
CACHE_ALIKE = 2.0
CLIP = 16.0
CLIPPED = 2.0
BF16, CPU = torch.bfloat16, torch.device("cpu")
# Log-probabilities of the same prompt tokens, (prompts, length - 1), from a changed copy of the checkpoint.
Clipped = Callable[[], Tensor]


@torch.inference_mode()
def log_probs(model: Any, tokens: Tensor) -> Tensor:
    """Log-probability of every token but the first, (prompts, length - 1)."""
    found = model(tokens).logits[:, :-1].float().log_softmax(-1)
    return found.gather(-1, tokens[:, 1:].unsqueeze(-1)).squeeze(-1)


@dataclass(frozen=True)
class Ours:
    """Our reader's log-probabilities of a checkpoint, and of the original; all (prompts, length - 1).

    alone: with inputs left alone; wide: with the cache in 16 bits
    quantized: whether linears are; rounded: whether their inputs are; cached: whether the cache is
    """

    log_probs: Tensor
    original: Tensor
    alone: Tensor
    wide: Tensor
    quantized: bool
    rounded: bool
    cached: bool

    @property
    def loss(self) -> float:
        """How far the checkpoint is from the original by our own reader."""
        return apart(self.log_probs, self.original)


def read_ours(folder: Path, tokens: Tensor, original: Tensor) -> Ours:
    exported = ModelFolder(folder)
    weights = Weights(exported)
    rounded = False
    if weights.linears:
        q = weights.get(f"{next(iter(weights.linears))}.weight")
        rounded = isinstance(q, QTensor) and q.inputs is not None
    cached = scheme_of(exported) is not None
    model = load_served(exported, CPU, BF16)
    found = log_probs(model, tokens)
    for linear in model.modules():
        linear._forward_pre_hooks.clear()
    alone = log_probs(model, tokens) if rounded else found
    del model
    wide = log_probs(load_dense(exported, CPU, BF16), tokens) if cached else found
    return Ours(found, original, alone, wide, bool(weights.linears), rounded, cached)


def compare(
    ours: Ours, theirs: Tensor, clipped: Clipped | None = None, *, rounds: bool = False
) -> dict[str, Any]:
    """Whether an engine agrees with our reader, and the figures that say so, in nats per token.

    clipped: asks the engine for the checkpoint of ``clip``; None: it keeps its cache in 16 bits, whatever
        the checkpoint says, and is compared with our reader doing so
    rounds: the engine rounds the inputs of quantized linears by itself
    """
    keeps = ours.cached and clipped is not None
    reference = ours.log_probs if keeps or not ours.cached else ours.wide
    distance, to_original = apart(theirs, reference), apart(theirs, ours.original)
    found = {"distance": distance, "to_original": to_original, "ours_to_original": ours.loss}
    if keeps:
        assert clipped is not None
        loss, their_loss = apart(ours.log_probs, ours.wide), apart(theirs, ours.wide)
        moved = apart(clipped(), theirs)
        good = 1 / CACHE_ALIKE < their_loss / loss < CACHE_ALIKE and moved > CLIPPED * their_loss
        good &= not ours.quantized or their_loss < NEARER * to_original
        rule = (
            f"strays from a 16-bit cache {1 / CACHE_ALIKE:g} to {CACHE_ALIKE:g} times as far as ours, and is "
            f"moved {CLIPPED:g} times as far by clipped scales"
        )
        found |= {"to_wide": their_loss, "ours_to_wide": loss, "moved_by_clipping": moved}
    elif ours.rounded:
        alone = apart(ours.alone, ours.original)
        nearer = abs(to_original - ours.loss) < abs(to_original - alone)
        telling = abs(alone / ours.loss - 1) > ALIKE
        good = abs(to_original / ours.loss - 1) < ALIKE and (nearer or not telling)
        rule = f"as far from the original as ours within {ALIKE:.0%}"
        found |= {"ours_with_inputs_alone": alone}
    elif rounds and ours.quantized:
        good = distance < TOLERANCE and abs(to_original / ours.loss - 1) < ALIKE
        rule = (
            f"within {TOLERANCE:g} of ours, and as far from the original as ours within {ALIKE:.0%}"
        )
    else:
        # The original itself has nothing to be nearer to.
        good = distance < TOLERANCE and (ours.loss == 0 or distance < NEARER * to_original)
        rule = f"within {TOLERANCE:g} of ours" + (
            "" if ours.loss == 0 else f", and {1 / NEARER:g} times nearer than to the original"
        )
    return {"agrees": bool(good), "rule": rule, **found}


def clip(folder: Path, copy: Path) -> Path:
    """A copy of a checkpoint whose cache scales are a CLIP-th."""
    shutil.copytree(folder, copy)
    for file in copy.glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors:
            if name.endswith(SCALES):
                tensors[name] = tensors[name] / CLIP
        save_file(tensors, file, metadata={"format": "pt"})
    return copy


def apart(some: Tensor, other: Tensor) -> float:
    """Mean |difference|."""
    return float((some - other).abs().mean())
