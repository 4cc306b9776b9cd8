"""Which pictures a run gets, from what it measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compress.run_folder import whole


def draw(compression: dict[str, Any], rows: dict[str, dict[str, Any]], out: Path) -> None:
    """The pictures of a run: what was pruned and why, losses of a distillation, bits that were searched,
    where the loss comes from, outliers of the inputs, errors of the cache."""
    # Here, not above: the drawing library would be in memory while compressing.
    from compress.report import bits, blocks, context, distillation, outliers, pruning

    if "prune" in compression:
        found = compression["prune"]
        with whole(out / pruning.PICTURE) as partial:
            pruning.draw_pruning(found, partial)
        with whole(out / pruning.TABLE) as partial:
            partial.write_text(pruning.pruning_table(found), encoding="utf-8")
    if "distill" in compression:
        with whole(out / distillation.PICTURE) as partial:
            distillation.draw_distillation(compression["distill"], partial)
    if "search" in compression:
        with whole(out / bits.PICTURE) as partial:
            bits.draw_bits(compression["search"], partial)
    if compression["calibration_tokens"] is not None and "blocks" in compression:
        by_text = compression.get("block_kl")
        mean = (
            None if not by_text else [sum(v) / len(v) for v in zip(*by_text.values(), strict=True)]
        )
        with whole(out / blocks.PICTURE) as partial:
            blocks.draw_blocks(compression["blocks"], mean, partial)
    if "outliers" in compression:
        found = compression["outliers"]
        with whole(out / outliers.PICTURE) as partial:
            outliers.draw_outliers(found, partial)
        with whole(out / outliers.TABLE) as partial:
            partial.write_text(outliers.outlier_table(found), encoding="utf-8")
    if "context" in rows["candidate"]:
        measured = {row: rows[row]["context"] for row in rows}
        with whole(out / context.TABLE) as partial:
            partial.write_text(context.context_table(measured), encoding="utf-8")
        if "heads" in measured["candidate"]:
            with whole(out / context.PICTURE) as partial:
                context.draw_heads(measured["candidate"]["heads"], partial)
