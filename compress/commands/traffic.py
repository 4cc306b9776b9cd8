"""``compress traffic LOG``: what a log of requests asks of a server; ``--sample FILE`` invents such a log.

A log is JSON lines or CSV with a request's tokens in and out, and its time if there is one; see eval.traffic.
``traffic=LOG`` and the same options say it to bench.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from compress.commands.words import plain
from compress.errors import UserError
from compress.model.folder import write_json
from compress.report.serving import traffic_figure, traffic_report
from eval.traffic import (
    CSV_ENDINGS,
    JSON_ENDINGS,
    KINDS,
    LONGEST,
    Traffic,
    describe,
    heat_map,
    patterns,
    read_traffic,
    sample,
    write_log,
)

SAMPLES = (*KINDS, "mixed")
ENDINGS = (*JSON_ENDINGS, *CSV_ENDINGS)


@dataclass(frozen=True)
class TrafficWords:
    """What ``traffic=LOG`` and ``traffic.KEY=VALUE`` say. input, output, time: names of columns; longest:
    tokens of the longest request that counts; patterns: how many sizes may stand for all at most."""

    log: Path
    input: str | None = None
    output: str | None = None
    time: str | None = None
    longest: int | None = None
    patterns: int = 4

    def open(self) -> Traffic:
        """Raises UserError for a log that cannot be read."""
        columns = {"input": self.input, "output": self.output, "time": self.time}
        return read_traffic(self.log, columns, self.longest)


def traffic_words(words: Sequence[str]) -> tuple[TrafficWords | None, list[str]]:
    """The traffic that the words name, if any, and the words about anything else.

    Raises UserError for a key or value that is not known.
    """
    pairs = {w.partition("=")[0]: w.partition("=")[2] for w in words if _of_traffic(w)}
    rest = [word for word in words if not _of_traffic(word)]
    if not pairs:
        return None, rest
    log = pairs.pop("traffic", "")
    if not log:
        raise UserError(f"{next(iter(pairs), 'traffic')} needs a log: add traffic=FILE")
    known = sorted(f.name for f in fields(TrafficWords) if f.name != "log")
    found: dict[str, str | int] = {}
    for key, value in pairs.items():
        name = key.partition(".")[2]
        if name not in known:
            raise UserError(f"{key} is not known: known are traffic.{', '.join(known)}")
        found[name] = _positive(key, value) if name in ("longest", "patterns") else value
    return TrafficWords(Path(log), **found), rest  # type: ignore[arg-type]


def _of_traffic(word: str) -> bool:
    key, equals, _ = word.partition("=")
    return bool(equals) and (key == "traffic" or key.startswith("traffic."))


def _positive(key: str, value: str) -> int:
    if not value.isascii() or not value.isdigit() or int(value) < 1:
        raise UserError(f"{key}={value} is not allowed: choose 1 or more")
    return int(value)


def main(words: list[str]) -> int:
    """Prints percentiles and a heat map, or with --json all there is."""
    parser = argparse.ArgumentParser("compress traffic", description=plain(__doc__))
    parser.add_argument(
        "words",
        nargs="*",
        metavar="LOG|traffic.KEY=VALUE",
        help="a log that ends in .jsonl or .csv; traffic.input, output, time (names of columns), longest "
        "(tokens), patterns (how many sizes stand for all)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of the tables")
    parser.add_argument(
        "--out", type=Path, help="FILE.json, or FILE.png for the heat map, to write"
    )
    parser.add_argument("--sample", type=Path, metavar="FILE", help="invent a log and write it")
    parser.add_argument("--requests", default="1000", help="how many, of a sample")
    parser.add_argument(
        "--mix",
        default="mixed",
        choices=SAMPLES,
        help="lengths of a sample: log-normal, by their medians and spreads in eval/traffic.py, cut at "
        f"{LONGEST} tokens",
    )
    parser.add_argument("--seed", type=int, default=0, help="of a sample")
    parser.add_argument(
        "--rate", type=float, default=1.0, help="requests/s of a sample, Poisson arrivals"
    )
    asked = parser.parse_intermixed_args(words)
    if asked.sample is not None:
        return _sample(asked)
    logs = [word for word in asked.words if "=" not in word]
    if len(logs) > 1:
        raise UserError(f"traffic reads one log, not {', '.join(logs)}")
    told, rest = traffic_words(
        [*(f"traffic={log}" for log in logs), *(w for w in asked.words if "=" in w)]
    )
    if told is None or rest:
        raise UserError(
            f"{rest[0]} is not known to traffic"
            if rest
            else "traffic needs a LOG, or --sample FILE"
        )
    if asked.out is not None:
        _check_out(asked.out, (".json", ".png"), "--out")
    return _tell(told, asked.out, as_json=asked.json)


def _tell(told: TrafficWords, out: Path | None, *, as_json: bool) -> int:
    traffic = told.open()
    found = {
        **describe(traffic),
        "heat_map": heat_map(traffic),
        "patterns": [vars(pattern) for pattern in patterns(traffic, told.patterns)],
    }
    if out is not None and out.suffix == ".png":
        # Here, not above: drawing takes a second to load.
        from compress.report.drawn import draw_figures

        draw_figures([traffic_figure(traffic)], out)
    elif out is not None:
        write_json(out, found)
    print(json.dumps(found, indent=2) if as_json else traffic_report(traffic), end="")
    if as_json:
        print()
    return 0


def _sample(asked: argparse.Namespace) -> int:
    if asked.words:
        raise UserError(f"--sample reads no log: leave {asked.words[0]} out")
    requests = _positive("--requests", asked.requests)
    if not 0 < asked.rate < float("inf"):
        raise UserError(f"--rate={asked.rate} is not allowed: choose a number above 0")
    _check_out(asked.sample, ENDINGS, "--sample")
    if asked.sample.exists():
        raise UserError(f"--sample {asked.sample} exists: choose another name")
    write_log(sample(asked.mix, requests, asked.seed, asked.rate), asked.sample)
    print(f"{requests} invented requests ({asked.mix}, seed {asked.seed}) in {asked.sample}")
    return 0


def _check_out(out: Path, endings: tuple[str, ...], option: str) -> None:
    if out.suffix not in endings:
        raise UserError(
            f"{option} {out} is not allowed: choose a name that ends in {', '.join(endings)}"
        )
    if not out.absolute().parent.is_dir():
        raise UserError(f"{option} {out} cannot be written: there is no folder {out.parent}")
