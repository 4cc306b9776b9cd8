"""Which run to take, in words: the smallest and the fastest that pass, and those that another one beats."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from compress.model.folder import open_tensors, reading
from compress.report.gate import described, failures
from compress.report.measures import Value, common_points, speed_ratio
from compress.report.table import TOKENS, Row
from eval.paired import difference

# What passes if nobody says otherwise.
DEFAULT = {"kl": 0.05}
# How much larger a KL may be that is looked at token by token.
NEAR = 1.25
# Sizes that differ by less than this share are the same: a header is longer by a name.
SAME_SIZE = 1e-3


def answers(rows: list[Row], limits: Mapping[str, float] | None) -> dict[str, list[str]]:
    """Sentences for each model, by the name of its original. rows: as ``rows_of`` gives them"""
    found = {}
    for original in (row for row in rows if row.base is None):
        candidates = [row for row in rows if row.model == original.model and row.base is not None]
        name, other = original.run["model"]["name"], 2
        while name in found:
            name, other = f"{original.run['model']['name']} ({other})", other + 1
        found[name] = _of_model(candidates, limits)
    return found


def _of_model(rows: list[Row], limits: Mapping[str, float] | None) -> list[str]:
    asked = DEFAULT if limits is None else limits
    gate = described(asked) + ("" if limits is not None else "; no gate was given")
    passing = [row for row in rows if not failures(row.values, row.base or {}, asked)]
    sentences = []
    if limits is None and not any(
        row.values.get("texts") or row.values.get("tasks") for row in rows
    ):
        sentences.append("No accuracy was measured.")
    elif not passing:
        sentences.append(f"None of {len(rows)} passes the gate ({gate}).")
    else:
        verb = "passes" if len(passing) == 1 else "pass"
        sentences.append(f"{len(passing)} of {len(rows)} {verb} the gate ({gate}).")
        sentences += [smallest(passing), fastest(passing)]
    free = [row for row in rows if (row.values.get("verdict") or {}).get("measurable") is False]
    if free:
        sentences.append(
            f"No measurable loss: {', '.join(row.label for row in sorted(free, key=_bytes))}."
        )
    sentences += alike(rows)
    return [sentence for sentence in sentences if sentence] + _not_worth(rows)


def _not_worth(rows: list[Row]) -> list[str]:
    """A sentence for each candidate that beats others: of several that beat the same one, the one that beats
    most."""
    found = dominated(rows)
    counts = Counter(id(winner) for _, better in found for winner in better)
    by_winner: dict[int, tuple[Row, list[Row]]] = {}
    for row, better in found:
        winner = max(better, key=lambda other: counts[id(other)])
        by_winner.setdefault(id(winner), (winner, []))[1].append(row)
    return [
        f"Not worth taking: {', '.join(row.label for row in beaten)}, for {winner.label} is at least as "
        f"good in {_compared(winner, rows)} within the noise, and better in one."
        for winner, beaten in by_winner.values()
    ]


def alike(rows: list[Row]) -> list[str]:
    """A sentence for candidates, next to each other by KL, each of which no text tells apart from the next.

    By what each made of every token, where their runs kept that.
    """
    ranked = sorted((row for row in rows if _losses(row)), key=_loss)
    chains: list[list[Row]] = []
    for row in ranked:
        last = chains[-1][-1] if chains else None
        if last is not None and _loss(row) <= NEAR * _loss(last) and _equal(last, row):
            chains[-1].append(row)
        else:
            chains.append([row])
    return [
        f"Not told apart by any text, each from the next: {', '.join(row.label for row in chain)}."
        for chain in chains
        if len(chain) > 1
    ]


def _loss(row: Row) -> float:
    return sum(_losses(row).values())


def _equal(first: Row, second: Row) -> bool:
    """Whether both were read on the same tokens and differ measurably on no text."""
    # A run that was just made is not yet known by its folder.
    if not all("folder" in row.run for row in (first, second)):
        return False
    files = [Path(row.run["folder"]) / TOKENS for row in (first, second)]
    if _losses(first).keys() != _losses(second).keys() or not all(f.is_file() for f in files):
        return False
    texts = [text for text, *_ in _losses(first)]
    pairs = [[_figures(file, text) for file in files] for text in texts]
    with reading(files[1]):
        return all(difference(*pair).equal for pair in pairs)


# The second of a pair is the first of the next.
@functools.lru_cache(maxsize=2)
def _kept(file: Path) -> dict[str, Tensor]:
    """Raises UserError for a file that others damaged."""
    with open_tensors(file) as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # no dict


def _figures(file: Path, text: str) -> dict[str, Sequence[Tensor]]:
    kept = _kept(file)
    with reading(file):
        return {key: list(kept[f"{text}.{key}"]) for key in ("nll", "kl")}


def _bytes(row: Row) -> int:
    return int(row.values["size"]["bytes"])


def smallest(rows: list[Row]) -> str:
    """The sentence about the smallest of the candidates; of several of the same size the one with the least
    KL."""
    least = min(rows, key=_bytes)
    as_small = [row for row in rows if _as_small(row, least)]
    best, *others = sorted(as_small, key=_loss)
    size = best.values["size"]
    share = size["bytes"] / (best.base or {})["size"]["bytes"]
    text = (
        f"Smallest within it: {best.label}, {size['bytes'] / 1e6:.1f} MB "
        f"({share:.0%} of the original, {size['bits_file']:.2f} bits per weight)"
    )
    same = ", ".join(row.label for row in others)
    return f"{text}; of the same size: {same}." if same else f"{text}."


def fastest(rows: list[Row]) -> str:
    """The sentence about the fastest at the point that most were measured at; "" if none was measured."""
    for key in common_points(rows):
        ratios = [(row, speed_ratio(row, key)) for row in rows]
        measured = [(row, ratio) for row, ratio in ratios if ratio is not None]
        if not measured:
            continue
        best, top = max(measured, key=lambda pair: pair[1].value)
        text = f"Fastest within it: {best.label}, {top.value:.2f} times the original ({key})"
        ties = [
            f"{row.label} ({ratio.value:.2f})"
            for row, ratio in measured
            if row is not best and _as_fast(ratio, top)
        ]
        missing = len(rows) - len(measured)
        text += f"; as fast within the noise: {', '.join(ties)}" if ties else ""
        return text + (f"; {missing} not measured there." if missing else ".")
    return ""


def dominated(rows: list[Row]) -> list[tuple[Row, list[Row]]]:
    """Candidates of one model that others beat, with those: at least as small, as exact on every text and as
    fast, and better in one of these. Speeds whose quartiles overlap are the same. Only what was measured
    alike is compared."""
    keys = common_points(rows)
    key = keys[0] if keys else ""
    speeds = [speed_ratio(row, key) for row in rows]
    losses = [_losses(row) for row in rows]
    found = []
    for i, row in enumerate(rows):
        better = [
            other
            for j, other in enumerate(rows)
            if i != j and _beats((other, losses[j], speeds[j]), (row, losses[i], speeds[i]))
        ]
        if better:
            found.append((row, better))
    return found


Judged = tuple[Row, Mapping[tuple[str, ...], float], Value | None]


def _beats(ours: Judged, theirs: Judged) -> bool:
    (a, loss_a, speed_a), (b, loss_b, speed_b) = ours, theirs
    if not loss_a or loss_a.keys() != loss_b.keys() or (speed_a is None) != (speed_b is None):
        return False
    pairs = [(_as_small(a, b), _as_small(b, a))]
    pairs += [(loss_a[k] <= loss_b[k], loss_b[k] <= loss_a[k]) for k in loss_a]
    if speed_a is not None and speed_b is not None:
        pairs.append((_as_fast(speed_a, speed_b), _as_fast(speed_b, speed_a)))
    return all(ours for ours, _ in pairs) and not all(theirs for _, theirs in pairs)


def _as_small(row: Row, other: Row) -> bool:
    return _bytes(row) <= _bytes(other) * (1 + SAME_SIZE)


def _as_fast(ratio: Value, other: Value) -> bool:
    high = ratio.value if ratio.high is None else ratio.high
    return high >= (other.value if other.low is None else other.low)


def _losses(row: Row) -> dict[tuple[str, ...], float]:
    """KL of each text, by all that makes it comparable."""
    return {
        (text, *(str(found.get(k)) for k in ("data_sha256", "window", "tokens", "dtype"))): found[
            "kl"
        ]
        for text, found in (row.values.get("texts") or {}).items()
        if "kl" in found
    }


def _compared(row: Row, rows: list[Row]) -> str:
    """What ``dominated`` compared it by."""
    measured = any(speed_ratio(row, key) for key in common_points(rows)[:1])
    return "size, KL and speed" if measured else "size and KL"
