"""``compress families``: the architectures that are known, and what of this applies to each."""

from __future__ import annotations

import argparse

from compress.commands.words import plain
from compress.errors import UserError
from compress.model.added import added, families_dir, write_family
from compress.model.check import check_model
from compress.model.families import FAMILIES, Family
from compress.model.folder import ModelFolder
from compress.model.gguf_file import OF_BLOCK
from compress.model.sources import resolve_model
from compress.report.table import markdown

# Stages, the search for bits, predicted speed, the decode engine, and formats.
COLUMNS = (
    "quantize", "gptaq", "search", "repair", "rotate", "prune", "distill", "kv_cache", "plan", "decoder",
    "compressed-tensors", "gptq", "awq", "bitsandbytes", "dense", "gguf",
)  # fmt: skip


def main(words: list[str]) -> int:
    """Prints the families; with --probe what a model of an unknown type is made of, found by running its
    blocks, and with --add files that, so that runs know the type from then on."""
    parser = argparse.ArgumentParser("compress families", description=plain(__doc__))
    parser.add_argument(
        "--probe", metavar="FOLDER", help="a model that transformers runs: a folder, or owner/name"
    )
    parser.add_argument(
        "--add", action="store_true", help=f"file what was found in {families_dir()}"
    )
    asked = parser.parse_args(words)
    if asked.probe is None:
        if asked.add:
            raise UserError("--add files what --probe finds: give --probe FOLDER")
        print(known([*FAMILIES, *added()]))
        return 0
    # Here, not above: it loads transformers.
    from compress.quantize.probe import probe

    folder = ModelFolder(resolve_model(asked.probe, None))
    family = probe(folder)
    print(told(family))
    if asked.add:
        file = families_dir() / f"{family.name}.json"
        write_family(file, family)
        try:
            check_model(folder, folder.names, plain=True)
        except UserError:
            file.unlink()
            raise
        print(f"filed as {file}")
    return 0


def known(families: list[Family]) -> str:
    """A table of what applies to which model types; below it why something does not, by number."""
    rows, reasons = [["model types", *COLUMNS]], list[str]()
    for family in families:
        cells = []
        for column in COLUMNS:
            why = _why_not(column, family)
            if why is not None and why not in reasons:
                reasons.append(why)
            cells.append("yes" if why is None else f"no ({reasons.index(why) + 1})")
        rows.append([_types(family), *cells])
    notes = [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    return "\n".join([markdown(rows), "", *notes])


def _why_not(column: str, family: Family) -> str | None:
    if column == "gguf" and family.name not in OF_BLOCK:
        return "the names of its tensors in llama.cpp are not known here"
    return family.refuses.get(column)


def _types(family: Family) -> str:
    types = ", ".join(family.model_types)
    when = [f"{key}={values[-1]}" for key, values in family.when if values != (None, True)]
    return f"{types} ({', '.join(when)})" if when else types


def told(family: Family) -> str:
    """What was found, a line an input."""
    lines = [
        f"{family.name}: blocks {family.blocks}, embedding {family.embedding}, final norm "
        f"{family.final_norm}, head {family.head}"
    ]
    for shared in family.inputs:
        source = "nothing takes a scale" if shared.source is None else f"made by {shared.source}"
        others = f", read too by {', '.join(shared.others)}" if shared.others else ""
        lines.append(f"  {', '.join(shared.linears)}: {source}{others}")
    return "\n".join(lines)
