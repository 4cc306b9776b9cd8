"""``compress bench FOLDER ...``: decode speed and memory of plain or exported folders, interleaved."""

from __future__ import annotations

import argparse
import json

from compress.compose import compose_settings, expand_shorthand
from compress.config import device_of
from compress.errors import UserError
from compress.measure import measure_decode
from compress.model.folder import ModelFolder
from compress.model.sources import resolve_model


def main(words: list[str]) -> int:
    """Prints JSON: speed and memory of each folder under the same load."""
    parser = argparse.ArgumentParser("compress bench", description=__doc__)
    parser.add_argument(
        "words", nargs="+", metavar="FOLDER|KEY=VALUE", help="folders; speed.*, device"
    )
    asked = parser.parse_args(words)
    overrides = [word for word in asked.words if "=" in word]
    names = [word for word in asked.words if "=" not in word]
    if not names:
        raise UserError("bench needs at least one FOLDER")
    settings = compose_settings(expand_shorthand(overrides))
    if settings.speed is None:
        raise UserError("speed=none leaves nothing to measure")
    folders = {name: ModelFolder(resolve_model(name, None)) for name in names}
    print(json.dumps(measure_decode(folders, settings.speed, device_of(settings)), indent=2))
    return 0
