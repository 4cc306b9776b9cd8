"""Decode speed at every point of a bench, as tables.

A speed is what compress.measure finds for one folder and engine; see eval.speed for its keys.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from compress.report.table import ABSENT, markdown, speedup
from eval.speed import Limits, pattern_of

HEADER = [
    "batch",
    "in/out",
    "",
    "engine",
    "tokens/s",
    "ratio",
    "TTFT ms",
    "ITL ms",
    "p99",
    "of roofline",
]
HEADER += ["peak MB", "kernel"]
Results = Mapping[str, Mapping[str, Mapping[str, Any]]]
Point = Mapping[str, Any]


def bench_report(results: Results, environment: Mapping[str, Any]) -> str:
    """Markdown: a row for every point and candidate, the candidates, where each stops to be faster than the
    first folder, and what the columns mean.

    results: folder -> engine -> speed, the original first
    """
    candidates = [(f, e, speed) for f, engines in results.items() for e, speed in engines.items()]
    _, _, first = candidates[0]
    together = first["load"]["together"]
    engines = {engine for _, engine, _ in candidates}
    rows = [HEADER]
    for index in _order(first["points"]):
        for folder, engine, speed in candidates:
            base = first["points"][index]
            rows.append([*_named(folder, engine, speed["points"][index], base, together)])
    if len(engines) == 1:
        rows = [row[:3] + row[4:] for row in rows]
    parts = [
        markdown(rows),
        _loads(candidates),
        _crossovers(results),
        _kept(candidates),
        _legend(results, environment),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _order(points: list[Point]) -> list[int]:
    """Points in the order of a reader: by pattern, then by batch."""
    patterns = list(dict.fromkeys(pattern_of(point) for point in points))
    return sorted(
        range(len(points)),
        key=lambda i: (patterns.index(pattern_of(points[i])), points[i]["batch"]),
    )


def _named(folder: str, engine: str, point: Point, base: Point, together: bool) -> list[str]:
    cells = [str(point["batch"]), pattern_of(point), folder, engine]
    if "refused" in point:
        return [*cells, "refused", *[ABSENT] * 7]
    ratio = ABSENT if "refused" in base else f"{speedup(point, base, together=together):.2f}x"
    share = point["share_of_roofline"]
    return [
        *cells,
        f"{point['tokens_per_s']:.1f} ±{point['tokens_per_s_iqr'] / 2:.1f}",
        ratio,
        f"{point['ttft_ms']:.0f}",
        f"{point['itl_ms_p50']:.2f}",
        f"{point['itl_ms_p99']:.2f}",
        ABSENT if share is None else f"{share:.0%}",
        f"{(point['peak_cuda'] or point['peak_rss']) / 1e6:.0f}",
        "+".join(point["kernels"]) or "unquantized",
    ]


def _loads(candidates: list[tuple[str, str, Mapping[str, Any]]]) -> str:
    rows = [
        [
            "",
            "engine",
            "MB on disk",
            "opened in s",
            "first request s",
            "MB loaded",
            "most meanwhile",
        ]
    ]
    for folder, engine, speed in candidates:
        name = f"{engine} {speed['version'] or ''}".strip()
        stored = speed["checkpoint_bytes"]
        cells = [folder, name, ABSENT if stored is None else f"{stored / 1e6:.1f}"]
        if "refused" in speed:
            rows.append([*cells, *[ABSENT] * 4])
            continue
        asked = speed.get("first_request_s")
        rows.append(
            [
                *cells,
                f"{speed['load_s']:.1f}",
                ABSENT if asked is None else f"{asked:.2f}",
                f"{(speed['loaded_cuda'] or speed['loaded_rss'] - speed['idle_rss']) / 1e6:.0f}",
                f"{(speed['load_peak_cuda'] or speed['load_peak_rss'] - speed['idle_rss']) / 1e6:.0f}",
            ]
        )
    return markdown(rows)


def _crossovers(results: Results) -> str:
    """A line for each folder but the first and each engine, against the first folder on that engine."""
    (original, bases), *others = results.items()
    lines = []
    for folder, engines in others:
        for engine, speed in engines.items():
            beside = f" ({engine})" if len(engines) > 1 else ""
            lines.append(f"{folder} against {original}{beside}: {crossover(speed, bases[engine])}")
    return "\n".join(f"- {line}" for line in lines)


def crossover(speed: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    """From which batch on a candidate is no longer faster than the original, or at which ones it is not, by
    pattern, and its largest loss."""
    together = base["load"]["together"]
    ratios: dict[str, dict[int, float]] = {}
    for ours, theirs in zip(speed["points"], base["points"], strict=True):
        if "refused" not in ours and "refused" not in theirs:
            found = ratios.setdefault(pattern_of(ours), {})
            found[ours["batch"]] = speedup(ours, theirs, together=together)
    told = []
    for pattern, by_batch in ratios.items():
        batches = sorted(by_batch)
        lost = [batch for batch in batches if by_batch[batch] <= 1]
        if not lost:
            told.append(f"{pattern} faster at every batch measured")
        elif lost == batches:
            told.append(f"{pattern} not faster at any batch measured")
        elif lost == batches[-len(lost) :]:
            first = lost[0]
            told.append(
                f"{pattern} no longer faster from batch {first} on ({by_batch[first]:.2f}x)"
            )
        else:
            slow = ", ".join(f"{batch} ({by_batch[batch]:.2f}x)" for batch in lost)
            told.append(f"{pattern} not faster at batch {slow}")
    if not told:
        return "no point that both answered"
    worst, pattern, batch = min(
        (ratio, pattern, batch)
        for pattern, by_batch in ratios.items()
        for batch, ratio in by_batch.items()
    )
    loss = f"largest loss {worst:.2f}x at batch {batch}, {pattern}" if worst < 1 else "no loss"
    return f"{'; '.join(told)}; {loss}"


def _kept(candidates: list[tuple[str, str, Mapping[str, Any]]]) -> str:
    """A line for each candidate: the largest batch of each pattern whose requests all kept the limits."""
    limits = Limits(**candidates[0][2]["load"].get("limits", {}))
    if not limits:
        return ""
    both = (("TTFT", limits.ttft_ms), ("mean ITL", limits.itl_ms))
    told = " and ".join(f"{name} within {ms:g} ms" for name, ms in both if ms is not None)
    engines = {engine for _, engine, _ in candidates}
    lines = []
    for folder, engine, speed in candidates:
        by_pattern: dict[str, list[str]] = {}
        for point in sorted(speed["points"], key=lambda point: point["batch"]):
            met = by_pattern.setdefault(pattern_of(point), [])
            if point.get("meets_limits") == 1:
                met.append(f"batch {point['batch']}, {point['goodput_rps']:.3g} requests/s")
        found = "; ".join(f"{p} {met[-1] if met else 'none'}" for p, met in by_pattern.items())
        name = folder if len(engines) == 1 else f"{folder} ({engine})"
        lines.append(f"- {name}: {found}")
    head = f"The largest batch measured of which every timed request had {told}:"
    return "\n".join([head, "", *lines])


def _legend(results: Results, environment: Mapping[str, Any]) -> str:
    speeds = [
        (folder, engine, s) for folder, engines in results.items() for engine, s in engines.items()
    ]
    folder, engine, first = speeds[0]
    load = first["load"]
    beside = f" on {engine}" if len({e for _, e, _ in speeds}) > 1 else ""
    how = (
        f"median of {load['repeats']} interleaved rounds",
        f"ratio to {folder}{beside} within the rounds",
    )
    if not load["together"]:
        how = (
            f"median of {load['repeats']} requests, one candidate AFTER the other (speed.together=false)",
            f"ratio to {folder}{beside} of the medians, not within rounds",
        )
    lines = [
        "Random tokens in, greedy tokens out; tokens/s of the whole batch after its first token; "
        f"{how[0]}, after {load['warmup']} of warm-up at each point, ± half the interquartile range; "
        f"{how[1]}.",
        "TTFT: request to first token. ITL: gap between tokens after the first, its median and 99th "
        "percentile. Peak MB: while decoding.",
        "MB loaded: what opening a candidate added, on the GPU where there is one, else to the process, some "
        "200 MB of it code; most meanwhile: while it was opened.",
    ]
    points = [(f, e, s, point) for f, e, s in speeds for point in s["points"]]
    if any("least_input" in point for *_, point in points):
        lines.append(
            "Of a mix, as 16-512/8-64: the tokens in of each request and out of the batch drawn every round, "
            "log-uniformly and the same for all; shorter prompts padded on the left, the batch ends together."
        )
    read = [point["read_gb_s"] for *_, point in points if point.get("read_gb_s")]
    if read:
        kernel = next(s["read_kernel"] for _, _, s in speeds if "read_kernel" in s)
        lines.append(
            "Of roofline: bytes of the weights and of the cache that a step must read, over the read "
            f"bandwidth measured between the rounds ({statistics.median(read):.4g} GB/s by {kernel}), "
            "over the ITL."
        )
    versions = environment["versions"]
    threads = load["threads"] or environment["threads"]
    lines.append(f"{environment['device']}, threads: {threads}, torch {versions['torch']}.")
    lines += [
        f"Refused: {f} ({e}), batch {point['batch']}, {pattern_of(point)}: {point['refused']}"
        for f, e, _, point in points
        if "refused" in point
    ]
    return "\n".join(f"- {line}" for line in lines)
