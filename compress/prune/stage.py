"""The prune stage: a model folder in, a smaller plain folder out, one decoder block in memory at a time.

Shapes are uniform over the blocks, so that plain transformers and engines load the folder as a dense model.
What is left is refitted to the original's own stream by least squares, block by block: each half of a block
makes up for what it lost and for what the blocks before it did (as OSSCAR, arXiv 2403.12983, does for a
layer's own output), a block before dropped ones for those too.
"""

from __future__ import annotations

import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.errors import UserError
from compress.model.families import family_of
from compress.model.folder import ModelFolder, Shapes
from compress.processes import ALONE, Team
from compress.progress import track
from compress.prune.budget import wanted
from compress.prune.cut import Plan, cut
from compress.prune.knobs import Prune
from compress.prune.shape import Anatomy, Shape, anatomy, check_windows
from compress.prune.survey import Survey, survey
from compress.quantize.record import KEY
from compress.runtime.load import load_dense
from compress.saved import NOWHERE, Saved
from eval.text import evaluate_text

log = logging.getLogger(__name__)

# Sequences on which candidates are told apart: the last ones, which their trial cut does not see.
JUDGED = 8


def check(source: Shapes, knobs: Prune, sequences: int) -> None:
    """Raises UserError if the recipe does not fit the model; reads no weights."""
    if "quantization_config" in source.config or KEY in source.config:
        raise UserError(f"{source.path} is quantized already: prune its 16-bit original")
    found = anatomy(source, family_of(source.config))
    shape = wanted(found, knobs)
    for candidate in shape:
        check_windows(source.config, found, candidate)
    if len(shape) > 1 and sequences < knobs.trial_sequences + JUDGED:
        raise UserError(
            f"prune.candidates={knobs.candidates} needs {knobs.trial_sequences + JUDGED} sequences to tell "
            f"them apart: raise data.sequences from {sequences}, or set prune.candidates=1"
        )


def prune(
    source: ModelFolder,
    target: Path,
    knobs: Prune,
    *,
    tokens: Tensor,
    device: torch.device,
    saved: Saved = NOWHERE,
    spill: Path | None = None,
    team: Team = ALONE,
) -> dict[str, Any]:
    """Write the pruned model to ``target``. tokens: calibration tokens (sequences, length); saved: where a
    killed one left what it had done; spill: a folder that hidden states are kept in, if not in memory;
    team: the processes that share the sequences, of which the main one writes.

    Returns what metrics.json keeps: the shape before and after, candidates with their divergence, the
    survey, and per block the relative errors of attention and MLP and how far its stream is from the
    original's.

    Raises UserError as ``check`` does, and for activations that are not finite.
    """
    check(source, knobs, len(tokens))
    found = anatomy(source, family_of(source.config))
    candidates = wanted(found, knobs)
    start = time.perf_counter()
    surveyed = survey(
        source,
        found,
        tokens,
        device,
        drop_one=knobs.depth == "perplexity",
        saved=saved,
        spill=spill,
        team=team,
    )
    log.info("surveyed %d blocks in %.1f s", found.shape.layers, time.perf_counter() - start)
    plans = [_plan(found, shape, surveyed, knobs) for shape in candidates]
    # Shapes are tried on few sequences, with whole models in memory: that is not shared.
    own = saved.alone().part("trials")
    plan, trials = team.from_main(
        lambda: _judged(source, plans, tokens, device, target.parent, own)
    )
    blocks = cut(source, target, plan, tokens, device, saved.part("cut"), spill, team)
    shape = plan.shape
    old = found.shape
    return {
        "prune": {
            "shape": {"before": vars(old), "after": vars(shape)},
            "parameters": [found.parameters(s) for s in (old, shape)],
            "block_parameters": [found.block_parameters(s) for s in (old, shape)],
            "refit": knobs.refit,
            "predicted_speedup": found.step_bytes(old) / found.step_bytes(shape),
            "candidates": trials,
            "survey": surveyed.report(),
            "blocks": blocks,
        }
    }


def _plan(found: Anatomy, shape: Shape, surveyed: Survey, knobs: Prune) -> Plan:
    layers = surveyed.layers(shape.layers, knobs.depth)
    return Plan(found, shape, layers, surveyed.kept_channels(shape.hidden), knobs)


def _judged(
    source: ModelFolder,
    plans: list[Plan],
    tokens: Tensor,
    device: torch.device,
    beside: Path,
    saved: Saved,
) -> tuple[Plan, list[dict[str, Any]]]:
    """The best plan: each is tried on few sequences, in a folder of ``beside``, and compared with the
    original on others. A try is short: one that was killed is made again."""
    if len(plans) == 1:
        return plans[0], []
    judged, seen = tokens[-JUDGED:].to(device), tokens[: plans[0].knobs.trial_sequences]
    position = saved.load()
    trials: list[dict[str, Any]] = [] if position is None else position.facts["trials"]
    if len(trials) < len(plans):
        original = load_dense(source, device, source.dtype)
    for plan in track(plans[len(trials) :], "try shapes"):
        # Where the result goes, not in a /tmp that may be memory; a killed run's is cleared by its name.
        with tempfile.TemporaryDirectory(dir=beside, suffix=".partial") as scratch:
            trial = Path(scratch) / "trial"
            cut(source, trial, plan, seen, device)
            model = load_dense(ModelFolder(trial), device, source.dtype)
        kl = _divergence(model, original, judged)
        del model
        parameters = plan.found.block_parameters(plan.shape)
        trials.append({**vars(plan.shape), "block_parameters": parameters, "kl": kl})
        log.info("%s: KL %.4f on %d sequences", plan.shape, kl, len(judged))
        saved.offer({"trials": trials})
    return plans[min(range(len(trials)), key=lambda i: trials[i]["kl"])], trials


def _divergence(model: Any, original: Any, tokens: Tensor) -> float:
    found = evaluate_text(lambda t: model(t).logits, tokens, lambda t: original(t).logits)
    return float(found["candidate"]["kl"])
