"""What a model folder's own card says of its licence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

CARD = "README.md"
# Characters of a card, or a licence, that are read: what is looked for is at the top.
MOST = 1_000_000
LICENCE_KEYS = ("license", "license_name", "license_link")
# How the texts of licences begin that the hub has a name for.
KNOWN = {"Apache License": "apache-2.0", "MIT License": "mit", "The MIT License": "mit"}


def front_matter(folder: Path) -> dict[str, Any]:
    """The YAML between the --- lines at the top of README.md; empty if there is none, or it is no YAML."""
    file = folder / CARD
    if not file.is_file():
        return {}
    with file.open(encoding="utf-8", errors="replace") as opened:
        text = opened.read(MOST)
    if not text.startswith("---\n"):
        return {}
    try:
        found = yaml.safe_load(text.removeprefix("---\n").partition("\n---")[0])
    except (yaml.YAMLError, ValueError, AttributeError, RecursionError):
        # The second and third of values that are no date or number, as 2024-02-30.
        return {}
    return found if isinstance(found, dict) else {}


def licence_of(folder: Path) -> dict[str, str]:
    """``license`` and what belongs to it, as a card states them: of the card, else of a LICENSE file.
    Empty if neither tells."""
    stated = front_matter(folder)
    found = {key: stated[key] for key in LICENCE_KEYS if isinstance(stated.get(key), str)}
    if "license" in found:
        return found
    for file in sorted(filter(Path.is_file, folder.glob("LICENSE*"))):
        with file.open(encoding="utf-8", errors="replace") as opened:
            first = next(filter(None, map(str.strip, opened.read(MOST).splitlines())), "")
        if first in KNOWN:
            return {"license": KNOWN[first]}
        return {"license": "other", "license_name": file.stem.lower(), "license_link": file.name}
    return {}
