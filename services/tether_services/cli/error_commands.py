"""`tether errors`: what a reason means and what to do about it."""

from __future__ import annotations

import argparse
from typing import TypeAlias

from tether.errors import InvalidArgumentError
from tether.reasons import GROUPS, find_reason

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_errors(commands: Commands) -> None:
    """Add `tether errors` to the command."""
    text = "say what the reason of an error means and what to do"
    parser = commands.add_parser("errors", help=text, description=f"{text.capitalize()}.")
    parser.add_argument(
        "reason", nargs="?", metavar="REASON", help="as in [REASON] of an error; all are listed otherwise"
    )
    parser.set_defaults(run=show_errors)


def show_errors(known: argparse.Namespace) -> int:
    """Print one entry of the catalogue, or one line for each."""
    if known.reason is None:
        for group in GROUPS:
            print(f"{group.title}:")
            for known_reason in group.reasons:
                print(f"  {known_reason.name:24} {known_reason.meaning}")
        return 0
    from tether_services.documents.error_page import describe_reason

    name = known.reason.strip("[]").upper()
    entry = find_reason(name)
    if entry is None:
        raise InvalidArgumentError(f"There is no reason {name[:63]!r}; tether errors lists them.", field="reason")
    print(describe_reason(entry))
    return 0
