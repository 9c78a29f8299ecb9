"""docs/reliability.md names the test of each promise: they all exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
EXPECTED = [*range(1, 12), *range(14, 17), *range(19, 33), *range(35, 40)]


def test_every_promise_has_its_row():
    assert [int(n) for n in re.findall(r"^\| (\d+) \|", PAGE, re.M)] == EXPECTED


def test_every_test_exists():
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", PAGE)
    assert len(named) > 50
    for path, test in named:
        assert f"def {test}" in (ROOT / path).read_text(encoding="utf-8"), (path, test)
