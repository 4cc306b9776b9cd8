"""Runs made by hand for the tests of the report: metrics.json as a run writes it, in the newest form and in
that of before."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

TEXTS = ("sotu-since-2009", "boolq-passages")
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj")
BLOCKS = 6
SIZE = {
    "bytes": 269_060_552,
    "parameters": 134_515_008,
    "bits_linears": 16.0,
    "bits_file": 16.0,
    "kept": ["all weights"],
}


def _around(mean: float, half: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half}


def text_of(kl: float | None, *, old: bool = False) -> dict[str, Any]:
    """kl: of a candidate; None makes the original's"""
    found = {
        "perplexity": 20.4 * math.exp(0 if kl is None else 0.9 * kl),
        "perplexity_stderr": 0.78,
        "tokens": 6138,
        "windows": 6,
        "data_sha256": "ab" * 32,
        "window": 1024,
        "dtype": "float32",
    }
    if kl is None:
        noise = {
            "dtype": "bfloat16",
            "kl": 0.00012,
            "kl_p99": 0.001,
            "kl_p999": 0.004,
            "top1": 0.9921,
            "nll": _around(0.00003, 0.0001),
        }
        return found if old else found | {"noise": noise}
    found |= {"kl": kl, "kl_stderr": kl / 40, "kl_p99": 6 * kl, "top1": 1 - kl / 1.2}
    found |= {"top1_stderr": 0.006}
    if old:
        return found
    paired = {
        "level": 0.95,
        "block": 32,
        "blocks": 191,
        "nll": _around(0.9 * kl, kl / 20),
        "kl": _around(kl, kl / 20),
        "top1": _around(1 - kl / 1.2, 0.01),
    }
    return found | {"kl_p999": 12 * kl, "paired": paired}


def point(
    batch: int,
    rounds: list[float],
    *,
    length: int = 128,
    out: int = 32,
    old: bool = False,
) -> dict[str, Any]:
    """rounds: tokens/s of each"""
    median = sorted(rounds)[len(rounds) // 2]
    itl = 1000 * batch / median
    ttft = 0.9 * length + 0.1 * itl
    found = {
        "batch": batch,
        "input_length": length,
        "output_length": out,
        "ttft_ms": ttft,
        "ttft_ms_iqr": ttft / 20,
        "itl_ms_mean": itl,
        "itl_ms_p50": itl,
        "itl_ms_p90": 1.1 * itl,
        "itl_ms_p99": 1.4 * itl,
        "tokens_per_s": median,
        "tokens_per_s_iqr": median / 30,
        "peak_rss": 700e6,
        "peak_cuda": None,
        "kernels": {"int4-avx512": 211, "attention-avx512": 30},
        "read_gb_s": 22.5,
        "share_of_roofline": 0.72,
        "rounds": {"ttft_ms": [ttft * r / median for r in rounds], "tokens_per_s": rounds},
    }
    if old:
        return found
    totals = [ttft + (out - 1) * 1000 * batch / r for r in rounds]
    found["rounds"]["e2e_ms"] = totals
    positions = list(range(1, out))
    return found | {
        "e2e_ms": sorted(totals)[len(totals) // 2],
        "e2e_ms_iqr": 5.0,
        "itl_by_position": {
            "positions": positions,
            "p50_ms": [itl * (1 + p / 400) for p in positions],
            "p90_ms": [1.1 * itl * (1 + p / 400) for p in positions],
        },
        "meets_limits": 1.0,
        "goodput_rps": 1000 / totals[0],
    }


def speed_of(factor: float, *, seed: int = 0, old: bool = False) -> dict[str, Any]:
    """factor: how many times the original's"""
    chance = random.Random(seed)
    points = [
        point(
            batch,
            [factor * batch**0.8 * 96 * chance.uniform(0.98, 1.02) for _ in range(5)],
            length=length,
            old=old,
        )
        for length in (128, 512)
        for batch in (1, 8)
    ]
    return {
        "load": {"repeats": 5, "warmup": 1, "threads": None, "together": True},
        "engine": "compress",
        "version": "0.1.0",
        "checkpoint_bytes": 1e8,
        "load_s": 1.25,
        "memory_since_load": True,
        "points": points,
        "other_engines": [],
    }


def task_of(lost: float | None, *, old: bool = False) -> dict[str, Any]:
    """lost: share of questions; None makes the original's"""
    found = {
        "questions": 200,
        "of": 1838,
        "limit": 200,
        "acc": 0.675 - (lost or 0),
        "acc_stderr": 0.033,
    }
    if lost is None or old:
        return found
    paired = {
        "metric": "acc",
        "difference": -lost,
        "low": -lost - 0.02,
        "high": -lost + 0.02,
        "gained": 4,
        "lost": 9,
        "changed": 0.11,
        "p": 0.27,
    }
    return found | {"paired": paired}


def compression_of(kl: float, seed: int) -> dict[str, Any]:
    """What stages report, with everything that there are pictures of."""
    chance = random.Random(seed)
    errors = [
        {
            "linears": {
                name: {"bits_per_weight": 4.25, "relative_error": kl * chance.uniform(0.01, 0.1)}
                for name in LINEARS
            },
            "notes": {},
            "seconds": 1.0,
        }
        for _ in range(BLOCKS)
    ]
    groups = {
        f"model.layers.{block}.{linears[0]}": {
            "block": block,
            "linears": list(linears),
            "bits": chance.choice([2, 3, 4, 6]),
            "kl": {"2": 0.4, "3": 0.1, "4": 0.03, "6": 0.001},
        }
        for block in range(BLOCKS)
        for linears in (LINEARS[:2], LINEARS[2:3], LINEARS[3:])
    }
    layers = [
        {"columns": block, "values": 0.001 * block, "largest": 4.0 + block, "kept": block}
        for block in range(BLOCKS)
    ]
    return {
        "seconds": 20.0,
        "calibration_tokens": [64, 512],
        "blocks": errors,
        "block_kl": {text: [kl * chance.uniform(0.02, 0.3) for _ in errors] for text in TEXTS},
        "search": {"groups": groups, "average_bits": 3.5, "megabytes": 60.0, "predicted_kl": 0.1},
        "outliers": {
            "threshold": 6.0,
            "rule": {"layers": 0.25, "positions": 0.06},
            "linears": 12,
            "linears_above": 10,
            "inputs": {
                LINEARS[0]: {
                    "readers": list(LINEARS[:2]),
                    "width": 576,
                    "layers": layers,
                    "features": [],
                },
            },
        },
        "prune": {
            "shape": {
                "before": {"layers": 6, "heads": 3, "kv_heads": 3, "mlp": 64, "hidden": 32},
                "after": {"layers": 5, "heads": 2, "kv_heads": 2, "mlp": 48, "hidden": 24},
            },
            "parameters": [134_515_008, 112_000_000],
            "block_parameters": [106_202_880, 84_000_000],
            "refit": "outputs",
            "predicted_speedup": 1.2,
            "candidates": [
                {
                    "layers": 5,
                    "heads": 2,
                    "kv_heads": 2,
                    "mlp": 48,
                    "hidden": 24,
                    "block_parameters": 84_000_000,
                    "kl": 0.31,
                }
            ],
            "survey": {
                "influence": [0.9, 0.1, 0.05, 0.04, 0.2, 0.5],
                "heads": [[0.1, 0.2, 0.3] for _ in range(BLOCKS)],
                "neurons": [sorted(chance.random() for _ in range(16)) for _ in range(BLOCKS)],
                "channels": [chance.uniform(0.5, 6) for _ in range(32)],
            },
            "blocks": [
                {
                    "block": block,
                    "heads": [0, 1],
                    "kv_heads": [0, 1],
                    "errors": {"attention": 1e-3, "mlp": 2e-3},
                    "drift": 1e-2,
                }
                for block in (0, 1, 2, 4, 5)
            ],
        },
    }


def predicted_of(itl: float) -> dict[str, Any]:
    return {
        "hardware": "this machine",
        "bytes": 1.14e8,
        "memory_bytes": 6.5e8,
        "itl_ms": itl,
        "ttft_ms": 100.0,
        "tokens_per_s": 1000 / itl,
        "limit": "memory",
    }


def run_of(
    name: str,
    *,
    bits: float = 4.25,
    kl: float = 0.1,
    factor: float = 2.0,
    lost: float = 0.01,
    model: str = "smollm2",
    seed: int = 0,
    old: bool = False,
) -> dict[str, Any]:
    """A run with all there is; old: without the keys that runs of before do not have."""
    size = SIZE | {
        "bytes": int(SIZE["bytes"] * (bits + 2.5) / 18.5),
        "bits_linears": bits,
        "bits_file": bits + 2.5,
        "kept": ["model.embed_tokens (also the lm_head)"],
    }
    base: dict[str, Any] = {
        "size": SIZE,
        "texts": {text: text_of(None, old=old) for text in TEXTS},
        "tasks": {"packaged_piqa": task_of(None, old=old)},
        "speed": speed_of(1.0, seed=seed + 1, old=old),
    }
    candidate: dict[str, Any] = {
        "size": size,
        "texts": {text: text_of(kl * (1 + 0.2 * i), old=old) for i, text in enumerate(TEXTS)},
        "tasks": {"packaged_piqa": task_of(lost, old=old)},
        "speed": speed_of(factor, seed=seed + 2, old=old),
    }
    if not old:
        measurable = kl > 0.001
        text = f"loss of {kl:.3f} nats per token on {TEXTS[1]}"
        candidate["verdict"] = {
            "text": text if measurable else "no measurable loss",
            "measurable": measurable,
            "gate": None,
        }
        lengths = [64, 12, 40]
        candidate["agreement"] = {
            "prompts": 3,
            "prompt_tokens": 32,
            "generated": 64,
            "lengths": lengths,
            "median": 40,
            "mean": 38.7,
            "whole": 1 / 3,
        }
        base["predicted"], candidate["predicted"] = predicted_of(10.1), predicted_of(10.1 / factor)
    return {
        "name": name,
        "model": {"name": model, "fingerprint": f"fingerprint of {model}"},
        "recipe": {
            "stages": ["quantize"],
            "model": {"name": model, "source": model},
            "data": {"source": "sotu-1960-2004", "sequences": 64},
            "scheme": {"bits": round(bits), "group_size": 64},
            "transforms": {"awq_scale": {"grid": 20}},
            "rounding": {"nearest": {}},
            "eval": {"texts": list(TEXTS)},
            "speed": {"batches": [1, 8]},
        },
        "compression": {"seconds": 1.0, "calibration_tokens": None}
        if old
        else compression_of(kl, seed),
        "base": base,
        "candidate": candidate,
        "environment": {
            "date": f"2026-11-26T21:{seed // 60 % 60:02d}:{seed % 60:02d}+00:00",
            "commit": "ea13998",
            "python": "3.11.7",
            "versions": {"compress": "0.1.0", "torch": "2.13", "lm-eval": "0.4.13"},
            "device": "2 x AMD EPYC",
            "threads": 2,
        },
    }


def odd_runs() -> list[dict[str, Any]]:
    """Runs of one model that are as runs may be, but not as ``run_of`` makes them: by two engines, of which
    one refuses a batch, with a mix that ends at another pattern's lengths; without speed; without accuracy;
    with too little text for intervals, no noise, a group of tasks; a NaN; other engines that did not open.
    """
    engines, quiet, fast, short, broken, closed = (
        run_of(name, kl=0.01 * (i + 1), seed=i)
        for i, name in enumerate(("engines", "quiet", "fast", "short", "broken", "closed"))
    )
    for row, factor in (("base", 1.0), ("candidate", 2.0)):
        speed = engines[row]["speed"]
        mix = point(1, [90.0 * factor] * 5, length=512) | {"least_input": 16, "least_output": 2}
        speed["points"] += [mix, point(1, [80.0 * factor] * 5, length=128, out=64)]
        refused = {"batch": 8, "input_length": 128, "output_length": 32, "refused": "no room"}
        other = speed_of(10 * factor, seed=9) | {"engine": "vllm", "other_engines": None}
        other["points"][1] = refused
        speed["other_engines"] = [other]
        quiet[row] |= {"speed": None, "predicted": None}
        fast[row] |= {"texts": {}, "tasks": {}, "verdict": None, "agreement": None}
        for text in short[row]["texts"].values():
            if row == "base":
                text["noise"] = None
            else:
                for key in ("nll", "kl", "top1"):
                    text["paired"][key] |= {"low": None, "high": None, "p": None}
        inner = short[row]["tasks"].pop("packaged_piqa")
        short[row]["tasks"]["group"] = {"questions": 200, "of": 200, "tasks": {"inner": inner}}
        shut = {
            "load": speed["load"],
            "engine": "transformers",
            "version": "5",
            "checkpoint_bytes": 9,
        }
        shut |= {"refused": "no", "points": [refused | {"batch": batch} for batch in (1, 8)]}
        closed[row]["speed"] = shut | {"other_engines": []}
    for text in broken["candidate"]["texts"].values():
        text |= dict.fromkeys(("perplexity", "perplexity_stderr", "kl", "kl_stderr"), math.nan)
        for key in ("nll", "kl"):
            text["paired"][key] = dict.fromkeys(("mean", "low", "high"), math.nan)
    return [engines, quiet, fast, short, broken, closed]


def write_runs(folder: Path, runs: list[dict[str, Any]]) -> Path:
    """One folder a run, as ``compress`` leaves it."""
    for index, run in enumerate(runs):
        out = folder / f"run {index}"
        out.mkdir(parents=True)
        (out / "metrics.json").write_text(json.dumps(run), encoding="utf-8")
    return folder


def sweep(count: int) -> list[dict[str, Any]]:
    """Runs that differ in everything that is compared."""
    chance = random.Random(count)
    return [
        run_of(
            f"recipe-{index} scheme.bits={2 + index % 7} data.sequences={index}",
            bits=2 + index % 7 + 0.25,
            kl=0.8 * math.exp(-(index % 7)) * chance.uniform(0.7, 1.4),
            factor=chance.uniform(1.2, 3),
            seed=index,
        )
        for index in range(count)
    ]
