"""What make audit says of an answer, and of none."""

from __future__ import annotations

from typing import Any

import pytest

from tests.audit import told

FINE: dict[str, Any] = {"name": "a", "version": "1", "vulns": []}
WEAK = FINE | {"vulns": [{"id": "CVE-1", "fix_versions": ["2"]}]}
SKIPPED = {"name": "b", "skip_reason": "not found"}


@pytest.mark.parametrize(
    ("packages", "code", "said"),
    [
        (None, 2, "cannot be reached"),
        ([], 2, "cannot be reached"),
        # As from a mirror without the service: pip-audit itself ends with 0.
        ([SKIPPED, SKIPPED], 2, "cannot be reached"),
        ([FINE], 0, "1 packages looked up, 0 known weaknesses"),
        ([FINE, SKIPPED], 0, "nothing is known of: b"),
        ([FINE, WEAK], 1, "a 1: CVE-1, mended in 2"),
    ],
)
def test_no_answer_is_not_a_good_one(packages: Any, code: int, said: str) -> None:
    found = None if packages is None else {"dependencies": packages}
    assert told(found)[0] == code
    assert said in "\n".join(told(found)[1])
