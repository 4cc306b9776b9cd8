"""What memory and arithmetic a device has: from recipes/hardware/NAME.yaml, or measured."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from compress.compose import compose_settings, options
from compress.environment import device_name, version_of
from compress.errors import UserError
from compress.user_cache import cache_dir
from eval.bandwidth import read_bandwidth

CPU = "cpu"
# Rows and columns of the products whose rate is measured, and how often: the best counts.
SIZE, PASSES = 2048, 3
# What a product runs in where its own type has no units.
FALLBACK = {"fp8": "bf16", "int8": "bf16", "float32": "bf16"}
KINDS = ("bf16", *FALLBACK)


@dataclass(frozen=True)
class Hardware:
    """One device. name: as in recipes/hardware; device: as CUDA calls it; teraflops: of dense products by
    type: bf16, fp8, int8, float32; capability: of CUDA, 0: none, None: not known"""

    name: str
    gigabytes: float
    gigabytes_per_second: float
    teraflops: Mapping[str, float]
    device: str | None = None
    capability: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.teraflops, Mapping):
            raise UserError(
                f"hardware.teraflops={self.teraflops} is not allowed: give a rate for each type, as in "
                "hardware.teraflops.bf16=989"
            )
        if unknown := [kind for kind in self.teraflops if kind not in KINDS]:
            raise UserError(
                f"hardware.teraflops.{unknown[0]} is not known: known are {', '.join(KINDS)}"
            )
        rates = {f"teraflops.{kind}": rate for kind, rate in self.teraflops.items()}
        numbers = {"gigabytes": self.gigabytes, "gigabytes_per_second": self.gigabytes_per_second}
        for key, value in (numbers | rates).items():
            if not (isinstance(value, int | float) and value > 0):
                raise UserError(f"hardware.{key}={value} is not allowed: choose a number above 0")
        if "bf16" not in self.teraflops:
            raise UserError(
                "hardware.teraflops has no bf16: give it, as in hardware.teraflops.bf16=989"
            )

    @property
    def bytes(self) -> float:
        return 1e9 * self.gigabytes

    @property
    def bandwidth(self) -> float:
        """Bytes a second."""
        return 1e9 * self.gigabytes_per_second

    def flops(self, kind: str) -> float:
        """Operations a second, a multiplication and an addition counted as two. A type without units of its
        own runs as bf16."""
        return 1e12 * self.teraflops.get(kind, self.teraflops[FALLBACK.get(kind, "bf16")])


def hardware_of(values: Mapping[str, Any], *, again: bool = False) -> Hardware:
    """The device that a recipe's ``hardware`` describes; what is null of the CPU is measured on this machine.

    again: also if it was measured before

    Raises UserError for a value that is no number above 0 or, of another device, missing, or a key that is
    not known.
    """
    optional = ("device", "capability")
    keys = ("name", *optional, "gigabytes", "gigabytes_per_second", "teraflops")
    for key in values:
        if key not in keys:
            raise UserError(f"hardware.{key} is not known: known are {', '.join(keys)}")
    given = {key: value for key, value in values.items() if value is not None}
    if missing := [key for key in keys if key not in given and key not in optional]:
        if given.get("name") != CPU:
            raise UserError(f"hardware.{missing[0]} is missing: only hardware=cpu is measured")
        given = measured_cpu(again=again) | given
    return Hardware(**given)


def hardware_named(name: str) -> Hardware:
    """That of recipes/hardware/NAME.yaml. Raises UserError, with the known names, for another one."""
    values = compose_settings([f"hardware={name}"]).hardware
    assert values is not None
    return hardware_of(values)


def hardware_here(device: torch.device) -> Hardware | None:
    """What this device is: the CPU by measurement, a GPU by its name; None if no file knows that."""
    if device.type == "cpu":
        return hardware_named(CPU)
    here = device_name(device)
    known = (hardware_named(name) for name in options("hardware") if name != CPU)
    return next((found for found in known if found.device == here), None)


def measured_cpu(*, again: bool = False) -> dict[str, Any]:
    """This machine's numbers, as in a YAML, measured in seconds and kept in the user cache.

    Whatever else runs only takes from them, so the best of all measurements is kept. again: measure once more
    """
    device = torch.device("cpu")
    facts = [device_name(device), torch.get_num_threads(), version_of("torch")]
    file = cache_dir() / "hardware.json"
    key = json.dumps(facts)
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if again or key not in known:
        now = {
            "gigabytes_per_second": read_bandwidth(device) / 1e9,
            "bf16": matmul_rate(torch.bfloat16) / 1e12,
            "float32": matmul_rate(torch.float32) / 1e12,
        }
        before = known.get(key, now)
        known[key] = {name: max(value, before[name]) for name, value in now.items()}
        partial = file.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(known, indent=2), encoding="utf-8")
        partial.replace(file)
    found = dict(known[key])
    return {
        "name": CPU,
        "gigabytes": psutil.virtual_memory().total / 1e9,
        "gigabytes_per_second": found.pop("gigabytes_per_second"),
        "teraflops": found,
    }


def matmul_rate(dtype: torch.dtype) -> float:
    """Operations a second of a large product on the CPU with torch's threads, the best of a few."""
    x = torch.ones(SIZE, SIZE, dtype=dtype)
    seconds = []
    for _ in range(PASSES):
        start = time.perf_counter()
        x @ x
        seconds.append(time.perf_counter() - start)
    return float(2 * SIZE**3 / min(seconds))
