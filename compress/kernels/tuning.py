"""How a packed linear runs on which device: what was measured there, or a guess from its shape.

Measuring is a function that somebody calls (``tune``); looking up (``Table.config``) never measures, so that
a step can be captured as a graph. What was measured is kept in a JSON file in the user's cache.
"""

from __future__ import annotations

import functools
import json
import logging
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from compress.environment import device_name
from compress.user_cache import cache_dir

log = logging.getLogger(__name__)

FILE = "kernel-configs.json"
# Of the file: another one is of another layout of weights or other kernels, whose times say nothing.
VERSION = 1
PATHS = ("thin", "wide", "dense")
TILE = 128
# Tokens of the last bucket that is looked up; beyond, everything is as in it.
MOST_ROWS = 512
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
    """device: its name; format, group: of the weight; N, K: outputs, inputs; tokens: end of the bucket"""

    device: str
    format: str
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
    tokens = 1 if key.tokens == 1 else max(8 if config.path == "thin" else 16, key.tokens)
    # Tokens are read once for each group of the tile.
    copies = TILE // key.group if 0 < key.group < TILE else 1
    return slices * TILE * (config.rows * bits_of(key.format) // 8 + 2 * tokens * copies)


def default(key: Key, processors: int) -> Config:
    """A guess: programs for every multiprocessor twice, tiles in flight as far as shared memory goes when all
    of them run at once."""
    if key.tokens > 64:
        return Config("dense")
    path, rows = ("wide", 64) if key.tokens > 32 else ("thin", 64 if key.tokens <= 8 else 32)
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
    config = Config(path, rows, slices, 2, split)
    beside = min(8, -(-key.N // rows * split // processors))
    room = min(SHARED, 2 * SHARED // max(1, beside))
    # A thin program takes its last tile out of the way before it fetches the next.
    stages = max(2, min(5, room // stage_bytes(key, config) + (path == "thin")))
    return Config(path, rows, slices, stages, split)


def candidates(key: Key) -> list[Config]:
    """What ``tune`` tries."""
    found = [Config("dense")] if key.tokens > 8 else []
    tiles = -(-key.K // TILE)
    if key.tokens <= 64:
        for rows in (16, 32, 64):
            for slices in (2, 4, 8):
                for split in (1, 2, 4):
                    if tiles // split >= slices:
                        found += [Config("thin", rows, slices, n, split) for n in (1, 2, 3, 4)]
    if 8 < key.tokens <= 128:
        for rows in (32, 64, 128):
            for split in (1, 2, 4, 8):
                if tiles // split >= 4:
                    found += [Config("wide", rows, 4, n, split) for n in (2, 3, 4)]
    limit = 2 * SHARED
    return [
        c
        for c in found
        if c.path == "dense" or stage_bytes(key, c) * max(1, c.stages) <= limit
        # Its sums stay in registers.
        if c.path != "thin" or c.rows * max(8, key.tokens) <= 2048
    ]


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
    key: Key,
    runs: Callable[[Config], Sequence[Callable[[], Any]]],
    into: Table,
    configs: Iterable[Config] | None = None,
) -> dict[Config, float]:
    """Time the candidates on the device and keep the fastest in ``into``, and in its file.

    runs: config -> the same product with copies of the weight that together exceed the cache several times;
    what a config cannot do on this device is left out. Returns microseconds a call. Raises RuntimeError if
    none runs.
    """
    times: dict[Config, float] = {}
    for config in candidates(key) if configs is None else configs:
        try:
            times[config] = _microseconds(runs(config))
        except Exception as error:
            # The compiler says in many ways that something does not fit; none of them may end the others.
            log.debug("%s does not run with %s: %s", key.text, config, error)
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
