"""How a packed linear runs on which device: what was measured there, or a guess from its shape.

Measuring is a function that somebody calls (``tune``); looking up (``Table.config``) never measures, so that
a step can be captured as a graph. What was measured is kept in a JSON file in the user's cache.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from compress.environment import device_name
from compress.user_cache import cache_dir

log = logging.getLogger(__name__)

FILE = "kernel-configs.json"
# Of the file: another one is of another layout of weights or other kernels, whose times say nothing.
VERSION = 2
PATHS = ("thin", "wide", "dense")
TILE = 128
# Tokens of the last bucket that is looked up; beyond, everything is as in it.
MOST_ROWS = 512
# Tokens of a program of the wide path, and up to how many it is the guess rather than a dequantized weight,
# which costs reading it, writing it in 16 bits and reading that.
MOST_TOKENS, WIDE_ROWS = 128, 256
# What ``tune`` tries, one after the other, each from the best so far.
AXES = {
    "thin": {"rows": (16, 32, 64), "slices": (2, 4, 8), "stages": (1, 2, 3, 4), "split": (1, 2, 4)},
    "wide": {"rows": (32, 64, 128), "stages": (2, 3, 4), "split": (1, 2, 4, 8)},
}
# Up to so many tokens every program computes the norm on its way, to save a launch.
NORM_ROWS = 2
# Shared memory of a program at most: two fit on a multiprocessor of a data-centre GPU, one on any other.
SHARED = 80 * 1024


@dataclass(frozen=True)
class Config:
    """path: ``thin``, each warp takes its own slice of the columns; ``wide``, all share a product of the
        large matrix unit; ``dense``, the weight is dequantized and torch multiplies
    rows: of the weight, a program takes
    slices: warps of a thin program
    stages: tiles in flight
    split: programs that share a row's columns
    """

    path: str = "thin"
    rows: int = 32
    slices: int = 4
    stages: int = 3
    split: int = 1

    def __post_init__(self) -> None:
        powers = (self.rows, self.slices, self.split)
        if self.path not in PATHS or any(n < 1 or n & (n - 1) for n in powers) or self.rows < 16:
            raise ValueError(f"{self} is no configuration")


@dataclass(frozen=True)
class Key:
    """device: its name; dtype: of x; format, group: of the weight; zeros: whether each group has a zero
    point; N, K: outputs, inputs; tokens: end of the bucket"""

    device: str
    dtype: str
    format: str
    zeros: bool
    group: int
    N: int
    K: int
    tokens: int

    @property
    def text(self) -> str:
        return "|".join(str(getattr(self, f.name)) for f in fields(self))


def bucket(tokens: int) -> int:
    """The tokens that share a configuration with these: 1, 8, 16, 32, ... 512, each an upper end."""
    if tokens == 1:
        return 1
    return min(MOST_ROWS, max(8, 1 << (tokens - 1).bit_length()))


def bits_of(name: str) -> int:
    """Bits of a weight in memory, from the name of its format."""
    return {"w2": 2, "w3": 3, "w4": 4, "w8": 8, "fp": 8}.get(name[:2], 16)


def stage_bytes(key: Key, config: Config) -> int:
    """Shared memory of one stage: weights and tokens of a tile for every slice."""
    slices = config.slices if config.path == "thin" else 1
    least = 8 if config.path == "thin" else 16
    tokens = 1 if key.tokens == 1 else max(least, min(MOST_TOKENS, key.tokens))
    # Tokens are read once for each group of the tile.
    copies = TILE // key.group if 0 < key.group < TILE else 1
    return slices * TILE * (config.rows * bits_of(key.format) // 8 + 2 * tokens * copies)


def default(key: Key, processors: int) -> Config:
    """A guess: programs for every multiprocessor twice, tiles in flight as far as shared memory goes when all
    of them run at once."""
    parts = 0 < key.group < TILE
    # Zero points of parts of a tile cost the wide path more registers than there are.
    plain = bits_of(key.format) == 16 or (parts and key.zeros)
    if key.tokens > (64 if plain else WIDE_ROWS):
        return Config("dense")
    return _fitted(key, "wide" if key.tokens > 32 else "thin", processors)


def _fitted(key: Key, path: str, processors: int) -> Config:
    rows = 64 if path == "wide" or key.tokens <= 8 else 32
    slices = 8 if key.tokens == 1 and key.K >= 8192 else 4
    while rows > 16 and path == "thin" and key.N // rows < 2 * processors:
        rows //= 2
    split, tiles = 1, -(-key.K // TILE)
    # Another kernel adds up the parts: worth it only where most of the device would idle.
    while key.N // rows * split < processors and tiles // (2 * split) >= 2 * slices:
        split *= 2
    while path == "thin" and 2 * stage_bytes(key, Config(path, rows, slices)) > SHARED:
        if rows > 16:
            rows //= 2
        elif slices > 1:
            slices //= 2
        else:
            break
    while path == "wide" and rows > 32 and 2 * stage_bytes(key, Config(path, rows)) > SHARED:
        rows //= 2
    config = Config(path, rows, slices, 2, split)
    beside = min(8, -(-key.N // rows * split // processors))
    room = min(SHARED, 2 * SHARED // max(1, beside))
    # A thin program takes its last tile out of the way before it fetches the next.
    stages = max(2, min(5, room // stage_bytes(key, config) + (path == "thin")))
    return Config(path, rows, slices, stages, split)


def starts(key: Key, processors: int) -> list[Config]:
    """Where ``tune`` begins: a guess for each path that may be the fastest."""
    found = []
    if key.tokens <= 64:
        found.append(_fitted(key, "thin", processors))
    if key.tokens > 8:
        found += [_fitted(key, "wide", processors), Config("dense")]
    return found


def fits(key: Key, config: Config) -> bool:
    """Whether a program has the shared memory and the registers for it, and each part of K some tiles."""
    if config.path == "dense":
        return True
    slices = config.slices if config.path == "thin" else 4
    sums = config.rows * min(MOST_TOKENS, max(8, key.tokens))
    return (
        stage_bytes(key, config) * config.stages <= 2 * SHARED
        and -(-key.K // TILE) // config.split >= slices
        and (config.path == "wide" or sums <= 2048)
    )


@dataclass
class Table:
    """What was measured, by the text of a key. path: where it is kept; None: nowhere"""

    path: Path | None = None
    found: dict[str, Config] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> Table:
        """The file's table; an empty one, with a warning, if it cannot be used."""
        table = cls(path)
        if not path.exists():
            return table
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["version"] != VERSION:
                raise ValueError(f"version {content['version']}, not {VERSION}")
            table.found = {key: Config(**value) for key, value in content["configs"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s is not used: %s; tune again to replace it", path, error)
            table.found = {}
        return table

    def save(self) -> None:
        """Write the file in one step."""
        assert self.path is not None
        configs = {key: asdict(config) for key, config in sorted(self.found.items())}
        partial = self.path.with_suffix(".partial")
        content = json.dumps({"version": VERSION, "configs": configs}, indent=1)
        partial.write_text(content + "\n", encoding="utf-8")
        partial.replace(self.path)

    def config(self, key: Key, processors: int) -> Config:
        return self.found.get(key.text) or default(key, processors)


@functools.cache
def table() -> Table:
    """That of this user, read when it is first wanted."""
    return Table.load(cache_dir() / FILE)


@functools.cache
def device_facts(device: torch.device) -> tuple[str, int]:
    """Name and multiprocessors."""
    if device.type != "cuda":
        return "cpu", 1
    return device_name(device), torch.cuda.get_device_properties(device).multi_processor_count


def tune(
    key: Key, runs: Callable[[Config], Sequence[Callable[[], Any]]], into: Table, processors: int
) -> dict[Config, float]:
    """Time configurations on the device and keep the fastest in ``into``, and in its file.

    Each path is searched from its guess along one axis after the other: a dozen kernels to compile instead of
    a hundred. runs: config -> the same product with copies of the weight that together exceed the cache
    several times; what a config cannot do on this device is left out. Returns microseconds a call. Raises
    RuntimeError if none runs.
    """
    times: dict[Config, float] = {}

    def timed(config: Config) -> float:
        if config not in times:
            try:
                times[config] = _microseconds(runs(config))
            except Exception as error:
                # The compiler says in many ways that something does not fit; none of them may end the others.
                log.debug("%s does not run with %s: %s", key.text, config, error)
                return math.inf
        return times[config]

    for start in starts(key, processors):
        best = start
        timed(best)
        for axis, values in AXES.get(start.path, {}).items():
            near = [replace(best, **{axis: value}) for value in values]  # type: ignore[arg-type]
            best = min([best, *(c for c in near if fits(key, c))], key=timed)
    if not times:
        raise RuntimeError(f"no configuration runs {key.text}")
    into.found[key.text] = min(times, key=lambda config: times[config])
    if into.path is not None:
        into.save()
    return times


def _microseconds(calls: Sequence[Callable[[], Any]]) -> float:
    """Of one call, the calls as one graph: the median of several series of replays."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    found = []
    for _ in range(7):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(5):
            graph.replay()
        torch.cuda.synchronize()
        found.append(1e6 * (time.perf_counter() - start) / (5 * len(calls)))
    return statistics.median(found[1:])
