"""``compress verify FOLDER``: check an exported checkpoint against its manifest."""

from __future__ import annotations

import argparse
from pathlib import Path

from compress.commands.words import plain
from compress.errors import printable
from compress.export import audit


def main(words: list[str]) -> int:
    """Exit code 0 if every file is as it was written, 1 if not."""
    parser = argparse.ArgumentParser("compress verify", description=plain(__doc__))
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a run's checkpoint/")
    asked = parser.parse_args(words)
    problems = audit.verify(asked.folder)
    for problem in problems:
        print(printable(problem))
    print(f"{asked.folder}: {'broken' if problems else 'verified'}")
    return 1 if problems else 0
