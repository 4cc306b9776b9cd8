"""What ``make audit`` makes of pip-audit's answer: of packages it could not look up it knows nothing, and by
itself it calls that no weakness. Exit code 0: none known; 1: some; 2: it was told of no package at all."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def told(found: dict[str, Any] | None) -> tuple[int, list[str]]:
    """Exit code and lines. found: pip-audit's JSON, None if it wrote none"""
    packages = [] if found is None else found["dependencies"]
    looked_up = [p for p in packages if "skip_reason" not in p]
    unknown = [p["name"] for p in packages if "skip_reason" in p]
    if not looked_up:
        return 2, ["the vulnerability service cannot be reached: nothing is known of any package"]
    weak = [
        f"{p['name']} {p['version']}: {v['id']}, mended in {', '.join(v['fix_versions']) or 'none'}"
        for p in looked_up
        for v in p["vulns"]
    ]
    lines = [*weak, f"{len(looked_up)} packages looked up, {len(weak)} known weaknesses"]
    if unknown:
        lines.append(f"not looked up, so nothing is known of: {', '.join(unknown)}")
    return int(bool(weak)), lines


if __name__ == "__main__":
    answer = Path(sys.argv[1])
    code, lines = told(json.loads(answer.read_text()) if answer.exists() else None)
    sys.stderr.write("".join(f"make audit: {line}\n" for line in lines))
    sys.exit(code)
