"""The table of wrong edits: one text file per module of `tether_services.ppo`, read and checked here.

An entry is a header and a small diff; entries are parted by blank lines, lines that begin with # are comments.

    D21 sign: the ratio is old over new
    - at_least_float32(logprobs) - old
    + old - at_least_float32(logprobs)

The text after `- ` occurs exactly once in the module, else the table is refused, so that it cannot fall behind the
source. Several `- ` lines stand for text that runs over several lines; the same holds for `+ `.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "services" / "tether_services" / "ppo"
EDITS = Path(__file__).resolve().parent / "edits"
KINDS = {
    "sign": "a sign or a direction is turned round",
    "off_by_one": "an index, a bound or a count is one off",
    "wrong_axis": "a sum, a mean or a maximum runs over the wrong axis or the wrong set",
    "bias": "a biased moment in the place of an unbiased one, or the reverse",
    "missing_mask": "what is outside the mask has an influence",
    "missing_detach": "a gradient flows where none should",
    "clip_bound": "a clip has another bound or none",
    "denominator": "a sum is divided by something else",
    "constant": "a constant or a default has another value",
    "order": "two operations, operands or branches change places",
    "wrong_term": "a term is left out or is another one",
    "precision": "half precision is not widened, or double precision is lost",
    "check": "a wrong call is accepted, or a right one refused",
}
_HEADER = re.compile(r"(?P<item>D[1-9][0-9]?|S[08]) (?P<kind>[a-z_]+): (?P<fault>.+)")


@dataclass(frozen=True, slots=True)
class Edit:
    """One wrong edit."""

    id: str
    """Module and place in its file: losses-03."""
    module: str
    """Name in `tether_services.ppo`."""
    item: str
    """What it offends: D1 to D38 of the PPO reference, or S0 (its conventions) or S8 (the generator's mismatch)."""
    kind: str
    """One of KINDS."""
    fault: str
    """What is wrong with it, in words."""
    find: str
    """Text that occurs exactly once in the module."""
    replacement: str
    """What stands there instead."""


def load_edits(folder: Path = EDITS) -> list[Edit]:
    """Return all edits of the table, by file name and place.

    Raises:
        ValueError: An entry does not have the form above.
    """
    return [edit for path in sorted(folder.glob("*.txt")) for edit in _parse(path)]


def mutate(edit: Edit, source: str) -> str:
    """Return the module's source with the edit in it.

    Raises:
        ValueError: The text to replace does not occur exactly once, or the edit changes nothing that Python sees.
    """
    count = source.count(edit.find)
    if count != 1:
        raise ValueError(f"{edit.id}: the text must occur exactly once in {edit.module}.py, found {count}: {edit.find}")
    mutated = source.replace(edit.find, edit.replacement)
    if ast.dump(ast.parse(mutated)) == ast.dump(ast.parse(source)):
        raise ValueError(f"{edit.id}: the edit changes nothing: {edit.replacement}")
    return mutated


def read_source(module: str) -> str:
    """Return the source of a module of `tether_services.ppo` as it lies in the working tree."""
    return (SOURCES / f"{module}.py").read_text(encoding="utf-8")


def _parse(path: Path) -> list[Edit]:
    text = "\n".join(line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#"))
    entries = [entry for entry in text.split("\n\n") if entry.strip()]
    return [_parse_entry(path.stem, number, entry.strip("\n")) for number, entry in enumerate(entries, start=1)]


def _parse_entry(module: str, number: int, entry: str) -> Edit:
    header, *lines = entry.split("\n")
    found = _HEADER.fullmatch(header)
    edit_id = f"{module}-{number:02d}"
    if not found or found["kind"] not in KINDS:
        raise ValueError(f"{edit_id}: the header must read `D21 kind: fault`, with a kind of KINDS, got {header!r}")
    find, replacement = (_side(lines, sign) for sign in "-+")
    if not find or not replacement or any(line[:2] not in ("- ", "+ ") for line in lines):
        raise ValueError(f"{edit_id}: after the header come lines that begin with `- ` and then `+ `")
    return Edit(edit_id, module, found["item"], found["kind"], found["fault"], find, replacement)


def _side(lines: list[str], sign: str) -> str:
    return "\n".join(line[2:] for line in lines if line.startswith(f"{sign} "))
