"""``compress families``: the architectures that are known, and what of this applies to each."""

from __future__ import annotations

import argparse

from compress.commands.words import plain
from compress.errors import UserError
from compress.model.added import added, families_dir, trying, write_family
from compress.model.check import check_model
from compress.model.families import FAMILIES, Family, family_of
from compress.model.folder import INDEX, SINGLE, ModelFolder
from compress.model.gguf_file import OF_BLOCK, SUFFIX
from compress.model.shapes import ShapeFolder
from compress.model.sources import config_elsewhere, resolve_model
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
        "--probe",
        metavar="FOLDER",
        help="a model that transformers runs: a folder, owner/name, or a URL",
    )
    parser.add_argument(
        "--add", action="store_true", help=f"file what was found in {families_dir()}"
    )
    asked = parser.parse_args(words)
    if asked.probe is None:
        if asked.add:
            raise UserError("--add files what --probe finds: give --probe FOLDER")
        more = added()
        print("\n".join([known([*FAMILIES, *more]), *unused(more)]))
        return 0
    # Here, not above: it loads transformers.
    from compress.quantize.probe import probe

    # Nothing is known of its weights, and none of them is fetched, where it is elsewhere.
    config = config_elsewhere(asked.probe, None)
    folder = ModelFolder(resolve_model(asked.probe, None) if config is None else config.parent)
    if asked.add:
        _check_new(folder)
    family = probe(folder)
    print(told(family))
    if asked.add:
        print(add(folder, family, weights=config is None and _has_weights(folder)))
    return 0


def _check_new(folder: ModelFolder) -> None:
    """Raises UserError for a model of a type that no file can say anything of."""
    model_type = folder.config.get("model_type")
    if any(model_type in family.model_types for family in FAMILIES):
        raise UserError(f"model type {model_type!r} is built in: --add is for types that are not")


def _has_weights(folder: ModelFolder) -> bool:
    return any(any(folder.path.glob(name)) for name in (INDEX, SINGLE, f"*{SUFFIX}"))


def add(folder: ModelFolder, family: Family, *, weights: bool) -> str:
    """File a family that was found for a model, and say so. Raises UserError, and files nothing, where a file
    says something else already or the model is not what the family says.

    weights: whether the model's tensors are there, whose names are checked then
    """
    file = families_dir() / f"{family.name}.json"
    others = [other for other in added() if family.name in other.model_types]
    if family in others:
        return f"filed already as {others[others.index(family)].file}"
    place = others[0].file if others else file
    if others or file.exists():
        raise UserError(f"{place} is there and says something else: delete or move it")
    with trying(family):
        # Opened anew: what a folder holds depends on its family.
        opened = ModelFolder(folder.path)
        if weights:
            _check_names(opened)
            check_model(opened, opened.names, plain=True)
            checked = "the names of its tensors are those of its files"
        else:
            checked = (
                "by config.json alone: without weights the names of its tensors were not checked"
            )
    write_family(file, family)
    return f"filed as {file}; {checked}"


def _check_names(folder: ModelFolder) -> None:
    """Raises UserError for a model whose checkpoints have other names than its modules."""
    expected = ShapeFolder(f"{folder.path}/config.json", folder.config)
    absent = [name for name in expected.names if name not in folder]
    # Some files of tied models hold the shared matrix twice.
    asked = {*expected.names, *(f"{name}.weight" for name in family_of(folder.config).head_names)}
    beyond = [name for name in folder.names if name not in asked]
    if absent and beyond:
        raise UserError(
            f"{folder.path}: transformers names these tensors otherwise in checkpoints ({beyond[0]} is "
            f"there, its modules have {absent[0]}): only a type whose checkpoint names are those of its "
            "modules can be added"
        )


def unused(families: list[Family]) -> list[str]:
    """A sentence for every file that says something of a type that is built in."""
    built_in = {name for family in FAMILIES for name in family.model_types}
    return [
        f"{family.file}: {name} is built in, what the file says of it is not used"
        for family in families
        for name in family.model_types
        if name in built_in
    ]


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
    return family.why_not(column)


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
