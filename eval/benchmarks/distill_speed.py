"""How fast the training step of distillation is, part by part, and how much of the device it uses.

    python -m eval.benchmarks.distill_speed [--shape llama-3.2-1b] [--device cuda] [--length 1024] [--batch 8]
        [--micro-batch 8] [--steps 20] [--compile] [--checkpointing] [--optimizer adamw] [--output FILE.json]

A teacher of the shape in bf16 and a student with three quarters of its MLP neurons in float32 (20 % fewer
parameters in the blocks of Llama-3.2-1B), random weights and tokens, the very step of compress/distill. Times
are CUDA events that nothing waits for until the end; what counts is the median over the steps after a warm-
up, quartiles beside it.

Model FLOPs a token, N the weights of the blocks' linears, A = layers x length x heads x head size (causal
attention looks at half the length on average, in two matmuls), V x d the head:

    teacher  2 N + 2 A + 2 V d        student  6 N + 6 A + 6 V d

Recomputed activations and what is no matmul do not count. The share of the device is against a bf16 matmul of
8192^3 in the same run and against the data sheet's dense figure.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from calibration.tokens import held_out
from compress.distill import student as student_module
from compress.distill.knobs import Distill
from compress.distill.plan import batch_rows
from compress.distill.stage import open_accelerator
from compress.distill.student import Student
from compress.distill.teacher import LiveTeacher
from compress.distill.training import Text, Training
from compress.environment import environment
from compress.model.families import family_of
from compress.model.folder import write_json
from eval.benchmarks.timing import seconds

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 8192,
        "vocab_size": 128256,
    },
    "smollm2-135m": {
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "intermediate_size": 1536,
        "vocab_size": 49152,
    },
    "tiny": {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 256,
        "vocab_size": 2048,
    },
}
# Dense bf16 of the data sheets in TFLOP/s, by a part of the device's name; the first that fits.
SPECIFIED = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "A100": 312}
WARM_UP = 5
PARTS = ("teacher", "student forward", "loss and head", "backward", "optimizer")


class Spans:
    """When parts of a step began and ended, by the device's own clock."""

    def __init__(self, device: torch.device):
        self.device = device
        self.found: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    def mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def around(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self.mark()
            result = call(*args, **kwargs)
            self.found[part].append((start, self.mark()))
            return result

        return timed

    def take(self) -> dict[str, float]:
        """Milliseconds of every part since the last time."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        found, self.found = self.found, defaultdict(list)
        return {part: sum(self.between(*span) for span in spans) for part, spans in found.items()}

    def between(self, start: Any, end: Any) -> float:
        if self.device.type == "cuda":
            return float(start.elapsed_time(end))
        return 1000 * float(end - start)


def model_of(shape: dict[str, Any], neurons: int, dtype: torch.dtype, device: torch.device) -> Any:
    """A Llama of this shape with random weights."""
    settings = {**shape, "intermediate_size": neurons, "tie_word_embeddings": True}
    config = AutoConfig.for_model("llama", **settings, max_position_embeddings=131072)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def training_of(asked: argparse.Namespace, device: torch.device) -> Training:
    """The training whose steps are timed."""
    shape, family = SHAPES[asked.shape], family_of({"model_type": "llama"})
    knobs = Distill(
        steps=WARM_UP + asked.steps,
        batch=asked.batch,
        micro_batch=asked.micro_batch,
        compile=asked.compile,
        checkpointing=asked.checkpointing,
        optimizer=asked.optimizer,
    )
    torch.manual_seed(0)
    full = shape["intermediate_size"]
    original = model_of(shape, full, torch.bfloat16, device).requires_grad_(False)
    pruned = model_of(shape, 3 * full // 4, torch.float32, device)
    student = Student(pruned, family, knobs, torch.bfloat16)
    teacher = LiveTeacher(original, family, None, knobs)
    blocks = torch.randint(shape["vocab_size"], (4 * asked.batch, asked.length))
    return Training(
        student, teacher, Text(blocks, *held_out(len(blocks))), knobs, open_accelerator(device)
    )


def watched(run: Training, spans: Spans) -> None:
    """Note the parts of every step from now on."""
    # The loss is a part of the student, so that its time is taken out of the student's afterwards.
    losses = spans.around("loss and head", student_module.losses)  # type: ignore[attr-defined]
    student_module.losses = losses  # type: ignore[attr-defined]
    run.model.forward = spans.around("student forward", run.model.forward)
    run.teacher = spans.around("teacher", run.teacher)
    run.accelerator.backward = spans.around("backward", run.accelerator.backward)
    run.update = spans.around("optimizer", run.update)  # type: ignore[method-assign]


def timed_steps(run: Training, spans: Spans, count: int) -> list[dict[str, float]]:
    """Milliseconds of each step and of its parts."""

    def step(index: int) -> None:
        run.gradients(batch_rows(index, run.knobs, run.text.trained))
        run.update(run.knobs.rate)

    whole, found = spans.around("step", step), []
    for index in range(WARM_UP + count):
        whole(index)
        if index < WARM_UP:
            spans.take()
            if run.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(run.device)
            continue
        found.append(spans.found)
        spans.found = defaultdict(list)
    rows = []
    for one in found:
        spans.found = one
        row = spans.take()
        row["student forward"] -= row["loss and head"]
        rows.append(row)
    return rows


def flops(shape: dict[str, Any], neurons: int, length: int) -> tuple[int, int]:
    """Of a forward pass, a token: blocks with attention, and head."""
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"] * shape["head_dim"]
    keys = shape["num_key_value_heads"] * shape["head_dim"]
    layer = 2 * hidden * heads + 2 * hidden * keys + 3 * hidden * neurons
    attention = length * heads
    return 2 * shape["num_hidden_layers"] * (layer + attention), 2 * shape["vocab_size"] * hidden


def model_flops(shape: dict[str, Any], length: int) -> dict[str, int]:
    """A token of training: the backward pass is twice the forward one."""
    full = shape["intermediate_size"]
    blocks, head = flops(shape, full, length)
    own_blocks, own_head = flops(shape, 3 * full // 4, length)
    return {"teacher": blocks + head, "student": 3 * (own_blocks + own_head)}


def matmul_peak(device: torch.device) -> float:
    """FLOP/s of a large bf16 matmul, the best of several rounds."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    run: Callable[[], Tensor] = lambda: torch.mm(a, b, out=out)  # noqa: E731
    seconds(run, 3, device)
    return 2 * size**3 / min(seconds(run, 10, device) / 10 for _ in range(5))


def specified(device: torch.device) -> float | None:
    """FLOP/s of the data sheet; None if the device is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    known = [
        teraflops for part, teraflops in SPECIFIED.items() if all(p in name for p in part.split())
    ]
    return 1e12 * known[0] if known else None


def report(
    asked: argparse.Namespace, rows: list[dict[str, float]], device: torch.device
) -> dict[str, Any]:
    shape = SHAPES[asked.shape]
    steps = [row["step"] for row in rows]
    tokens_per_s = 1000 * asked.batch * asked.length / statistics.median(steps)
    by_token = model_flops(shape, asked.length)
    reached = tokens_per_s * sum(by_token.values())
    peak, sheet = matmul_peak(device), specified(device)
    return {
        "environment": environment(device),
        "settings": vars(asked) | {"output": None},
        "tokens_per_s": tokens_per_s,
        "step_ms": {
            "median": statistics.median(steps),
            "quartiles": statistics.quantiles(steps, n=4)[::2],
        },
        "parts_ms": {part: statistics.median(row[part] for row in rows) for part in PARTS},
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "flops_per_token": by_token,
        "teraflops": reached / 1e12,
        "matmul_teraflops": peak / 1e12,
        "share_of_matmul": reached / peak,
        "share_of_data_sheet": None if sheet is None else reached / sheet,
        "steps_ms": steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-1b")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name, default in (("length", 1024), ("batch", 8), ("micro-batch", 8), ("steps", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    device = torch.device(asked.device)
    run, spans = training_of(asked, device), Spans(device)
    watched(run, spans)
    found = report(asked, timed_steps(run, spans, asked.steps), device)
    print(f"{found['tokens_per_s']:.0f} tokens/s, {found['step_ms']['median']:.1f} ms a step")
    for part, milliseconds in found["parts_ms"].items():
        print(f"  {part:16} {milliseconds:9.2f} ms")
    print(f"{found['teraflops']:.2f} TFLOP/s, {found['share_of_matmul']:.1%} of a bf16 matmul here")
    if asked.output:
        write_json(asked.output, found)


if __name__ == "__main__":
    main()
