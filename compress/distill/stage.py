"""The distill stage: a pruned or quantized model is trained to say what its original says.

Forward KL on logits at temperature 1 (Minitron, arXiv 2407.14679 section 3, 2408.11796), on a CPU, a GPU,
or in several processes that ``accelerate launch`` started. A plain folder in, a plain folder out; of a
record the integers are picked anew on the grids it has (see ``latent``).
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calibration.tokens import held_out
from compress.distill import latent, training
from compress.distill.kept import kept_of
from compress.distill.knobs import Distill, check_schemes
from compress.distill.plan import SEQUENCES, seen, steps_of
from compress.distill.state import Progress, State, sha256
from compress.distill.student import Student, open_student
from compress.distill.teacher import CachedTeacher, Rows, Teacher, fill_cache, open_teacher
from compress.distill.training import Text, Training
from compress.errors import UserError
from compress.export.shards import ShardWriter
from compress.model.families import turned_over
from compress.model.folder import ModelFolder, write_json
from compress.quantize import record
from compress.saved import here

log = logging.getLogger(__name__)


def distill(
    source: ModelFolder,
    original: ModelFolder,
    target: Path,
    state: Path,
    blocks: Tensor,
    knobs: Distill,
    device: torch.device,
) -> dict[str, Any]:
    """Train ``source`` against ``original`` and write the result to ``target``.

    source: a plain folder, which is trained whole, or a record of integers in groups or rows
    original: a plain folder of any shape with the same vocabulary
    state: where the training is kept while it runs; a killed one goes on from there to the same weights, bit
        for bit on a CPU; a GPU's kernels sum in any order. Whoever calls removes it
    blocks: int64 (n, length), on the CPU
    device: ignored where several processes run, each of which has its own

    Returns the curve of the losses, as they are trained; divergence at temperature 1 and next-token loss of
    the held-out sequences at the start, in between and at the end, that loss for the original, and what it
    took; nats per token. Where only the original's ``held_out_top_k`` most likely tokens are kept, the
    divergence is that with all others as one, a lower bound. Every process returns the same. Raises
    UserError, before anything is written, for a source or a launch that cannot be trained so, and later for
    a loss that is not finite.
    """
    began = training.now()
    accelerator = open_accelerator(device)
    if accelerator.num_processes > 1:
        device = accelerator.device
    check_launch(accelerator, knobs)
    knobs.check(source, device, blocks, accelerator.num_processes)
    _check_folders(source, original, knobs)
    trained, held = held_out(len(blocks))
    text = Text(blocks, trained, held[:SEQUENCES])
    fingerprint = _fingerprint(source, original, blocks, knobs) | {
        "processes": accelerator.num_processes,
        **here(device),
    }

    steps = steps_of(knobs, blocks.shape[1])
    if knobs.teacher == "cached":
        assert steps is not None
        rows = Rows(seen(steps, knobs, trained), text.held)
        fill_cache(state / "teacher", original, blocks, rows, knobs, accelerator, device)
        teacher: Teacher = CachedTeacher(state / "teacher", rows, device)
    else:
        kept = kept_of(source, original, device) if knobs.hidden else None
        teacher = open_teacher(original, kept, knobs, device)
    # What is sharded goes to the devices shard by shard.
    student = open_student(source, knobs, torch.device("cpu") if accelerator.is_fsdp2 else device)
    trainable = sum(p.numel() for p in student.parameters() if p.requires_grad)
    run = Training(student, teacher, text, knobs, accelerator)
    progress = run.run(State(state, fingerprint, accelerator), began, steps)

    weights = accelerator.get_state_dict(run.model)
    if accelerator.is_main_process:
        _write(source, target, student, weights)
    accelerator.wait_for_everyone()
    return _report(progress, text, knobs) | {
        "seconds": run.elapsed(),
        "parameters": trainable,
        "processes": accelerator.num_processes,
    }


def open_accelerator(device: torch.device) -> Any:
    """What runs the processes that were launched, or the only one. device: of the only one"""
    # Here, not above: it takes seconds, and most runs do not train.
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedDataParallelKwargs

    # A line for every file of a state is too much, and a warning for every tied head, which loads as it
    # should.
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
    if not torch.distributed.is_initialized():
        # accelerate remembers the first device of a process, and the runs of a sweep may have several.
        AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(
        cpu=device.type == "cpu",
        # The student enters autocast itself.
        mixed_precision="no",
        device_placement=False,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )


def check_launch(accelerator: Any, knobs: Distill) -> None:
    """Raises UserError for processes that were launched to share the work in a way that this does not."""
    kind = accelerator.distributed_type.value
    if not (kind == "NO" or kind.startswith("MULTI_") or accelerator.is_fsdp2):
        raise UserError(
            f"distill was launched under {kind}: choose one process, several (--multi_gpu), or FSDP of "
            "version 2 (--use_fsdp --fsdp_version 2)"
        )
    if accelerator.is_fsdp2 and knobs.optimizer == "adamw8bit":
        raise UserError(
            "distill.optimizer=adamw8bit cannot be sharded by FSDP: choose adamw, or launch with --multi_gpu"
        )


def _check_folders(source: ModelFolder, original: ModelFolder, knobs: Distill) -> None:
    if record.KEY in source.config:
        check_schemes(record.schemes_of(source))
    for folder in (original, source):
        if "quantization_config" in folder.config:
            raise UserError(f"{folder.path} is an exported checkpoint: distill reads its record")
    sizes = [int(folder.config["vocab_size"]) for folder in (source, original)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"{source.path} has a vocabulary of {sizes[0]}, the original one of {sizes[1]}: distill compares "
            "distributions over the same tokens"
        )
    if knobs.hidden:
        kept_of(source, original, torch.device("cpu"))


def _fingerprint(
    source: ModelFolder, original: ModelFolder, blocks: Tensor, knobs: Distill
) -> dict[str, Any]:
    """What decides the weights a training ends with, as JSON."""
    return {
        "source": source.fingerprint,
        "original": original.fingerprint,
        "blocks": sha256(blocks),
        "knobs": knobs.decisive,
    }


def _write(source: ModelFolder, target: Path, student: Student, weights: dict[str, Tensor]) -> None:
    """weights: of the student, by full name in it"""
    prefix = "model."
    weights = {name.removeprefix(prefix): weight for name, weight in weights.items()}
    if record.KEY in source.config:
        trained = [n for n, p in student.model.named_parameters() if p.requires_grad]
        record.rewrite(source, target, latent.stored(source, {n: weights[n] for n in trained}))
    else:
        _write_plain(source, target, weights)


def _write_plain(source: ModelFolder, target: Path, weights: dict[str, Tensor]) -> None:
    target.mkdir(parents=True)
    source.copy_companions(target)
    shards = ShardWriter(target, turned=turned_over(source.config))
    for name in source.names:
        shards.add(name, weights[name].cpu().to(source.tensor(name).dtype))
    shards.close()
    # The config comes last: before that the folder does not open.
    write_json(target / "config.json", source.config)


def _report(progress: Progress, text: Text, knobs: Distill) -> dict[str, Any]:
    start, end = progress.held_out[0], progress.held_out[-1]
    for name in ("kl", "nll"):
        if end[name] > start[name]:
            log.warning(
                "distill made held-out text worse: %s %.4f, %.4f at the start",
                name,
                end[name],
                start[name],
            )
    tokens = progress.step * knobs.batch * text.blocks.shape[1]
    return {
        "steps": progress.step,
        "tokens": tokens,
        "epochs": progress.step * knobs.batch / len(text.trained),
        "tokens_per_s": tokens / (progress.seconds - progress.aside),
        "curve": progress.curve,
        "held_out": progress.held_out,
        "held_out_sequences": len(text.held),
        "held_out_top_k": knobs.top_k if knobs.teacher == "cached" else None,
        "original_nll": progress.original_nll,
    }
