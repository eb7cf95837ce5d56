"""`python -m tests.mutation`: try the wrong edits and print what became of each."""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.mutation.campaign import BrokenTrial, try_all
from tests.mutation.report import PAGE, page
from tests.mutation.table import EDITS, Edit, load_edits, mutate, read_source
from tests.mutation.trial import Outcome, warm_up

CONTROL = Edit("control", "kl", "D10", "order", "nothing", "0.5 * difference**2", "difference**2 * 0.5")
"""Changes the source and no result: the tests must pass with it, else a failure says nothing."""
NOTHING_LEARNT = 101
"""Exit status where the tests fail without a wrong edit, or cannot be run."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Try the edits and return how many survived, at most 100: the exit status. 101: the tests say nothing."""
    options = _parser().parse_args(arguments)
    if options.write and (options.only or options.edits != EDITS):
        raise SystemExit("--write needs all edits of the project's own table")
    edits = _selected(load_edits(options.edits), options.only)
    for edit in edits:
        mutate(edit, read_source(edit.module))
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            outcomes = _measure(edits, Path(folder), options.jobs)
        except BrokenTrial as error:
            print(error, file=sys.stderr)
            return NOTHING_LEARNT
    if options.write:
        PAGE.write_text(page(edits, outcomes), encoding="utf-8")
    survivors = [edit for edit, outcome in zip(edits, outcomes, strict=True) if not outcome.caught_by]
    print(f"{len(edits)} edits, {len(survivors)} survived, {time.monotonic() - started:.0f} s")
    return min(len(survivors), 100)


def _measure(edits: Sequence[Edit], logs: Path, jobs: int) -> list[Outcome]:
    """Return the outcomes of the edits, after that of the control."""
    warm_up(logs / "warm_up.txt")
    try:
        (control,) = try_all([CONTROL], logs=logs, jobs=1, progress=_print)
        if control.caught_by:
            raise BrokenTrial(f"the tests fail without a wrong edit: {control.caught_by}")
        return try_all(edits, logs=logs, jobs=jobs, progress=_print)
    finally:
        gc.unfreeze()  # else a library complains at the end of what it could not free


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], metavar="ID", help="ids or modules; all where absent")
    parser.add_argument("--jobs", type=int, default=1, choices=range(1, 9), metavar="N", help="trials at a time (1)")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}; needs all edits")
    parser.add_argument("--edits", type=Path, default=EDITS, metavar="FOLDER", help="another table")
    return parser


def _selected(edits: Sequence[Edit], only: Sequence[str]) -> list[Edit]:
    selected = [edit for edit in edits if not only or edit.id in only or edit.module in only]
    if not selected:
        raise SystemExit(f"no edit has one of these ids or modules: {', '.join(only)}")
    return selected


def _print(edit: Edit, outcome: Outcome) -> None:
    passed = "passed, as it must" if edit is CONTROL else "SURVIVED"
    verdict = f"{outcome.caught_by} {outcome.error}" if outcome.caught_by else passed
    print(f"{edit.id:16} {edit.item:4} {edit.kind:15} {verdict}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
