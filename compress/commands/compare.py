"""``compress compare DIR ...``: the table of all finished runs below the folders."""

from __future__ import annotations

import argparse
from pathlib import Path

from compress.report.table import find_runs, table


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser("compress compare", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="such as outputs/")
    asked = parser.parse_args(words)
    print(table(find_runs(asked.folders)))
    return 0
