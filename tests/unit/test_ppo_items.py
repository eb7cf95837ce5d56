"""Every item of the PPO reference, D1 to D38, has a test that carries its id."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ITEMS = set(range(1, 39))
_TEST_OF_ITEM = re.compile(r"^(?:async )?def test_d(\d+)_", re.MULTILINE)


def items_in(text: str) -> set[int]:
    """Return the numbers of the items that the test functions of a file name."""
    return {int(number) for number in _TEST_OF_ITEM.findall(text)}


def items_in_files() -> set[int]:
    return set().union(*(items_in(path.read_text(encoding="utf-8")) for path in TESTS.rglob("test_*.py")))


def test_every_item_has_a_test_that_carries_its_id() -> None:
    missing = [f"D{number}" for number in sorted(ITEMS - items_in_files())]
    assert not missing, f"no test function is named after {', '.join(missing)}"


def test_no_test_carries_the_id_of_an_item_that_does_not_exist() -> None:
    assert items_in_files() <= ITEMS


def test_an_id_is_read_whole_and_from_test_functions_only() -> None:
    text = (
        "def test_d21_clip() -> None: ...\ndef test_dual() -> None: ...\ndef slow_d3_loop() -> None: ...\n# test_d4_\n"
    )
    assert items_in(text) == {21}
