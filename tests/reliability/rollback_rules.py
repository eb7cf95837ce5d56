"""The rules for rollbacks, of I4 and I5: what was taken back is used no more, and what is bad is taken back in time.

As checker.py, of which this is a part: standard library only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, Final

from tests.reliability.call_rules import Line, Of

__all__ = ["find_bad_policies", "find_reused_versions", "was_rolled_back"]

RECORDED_SECONDS: Final = 1.0
"""A rollback is recorded once it is made: a reader may see it so much earlier."""


def was_rolled_back(of: Of, seen: Line) -> bool:
    """Return whether a reader asked while a rollback was made, and saw the steps that stay."""
    asked, told = seen.get("asked", seen["t"]), seen["t"] + RECORDED_SECONDS
    backs = [line for line in of("rolled_back") if line["run"] == seen["run"] and asked <= line["t"] <= told]
    return any(line["to_step"] <= seen["committed"] for line in backs)


def find_reused_versions(of: Of) -> Iterator[str]:
    """I4: a version has one content for ever, and no step is sampled by one that was rolled back."""
    hashes: dict[tuple[Any, ...], str] = {}
    made: dict[str, dict[int, int]] = defaultdict(dict)
    rolled_back: dict[str, set[int]] = defaultdict(set)
    for line in of("exported", "rolled_back", "begun"):
        run = line["run"]
        if line["kind"] == "rolled_back":
            gone = {version for version, step in made[run].items() if step >= line["to_step"]}
            rolled_back[run] |= gone
        elif line["kind"] == "begun":
            if line["policy_version"] in rolled_back[run]:
                begun, version = line["step"], line["policy_version"]
                yield f"run {run}: step {begun} began with version {version}, which was rolled back"
        else:
            version = line["policy_version"]
            if hashes.setdefault((run, version), line["sha256"]) != line["sha256"]:
                yield f"run {run}: version {version} stands for {hashes[run, version]} and for {line['sha256']}"
            if "step" in line:
                made[run][version] = line["step"]


def find_bad_policies(of: Of) -> Iterator[str]:
    """I5: once an update has made a bad policy, no step is committed on top of it unless it was rolled back."""
    spoiled: dict[str, Line] = {}
    for line in of("spoiled", "rolled_back", "committed"):
        run = line["run"]
        bad = spoiled.get(run)
        if line["kind"] == "spoiled":
            spoiled.setdefault(run, line)
        elif bad is not None and line["kind"] == "rolled_back" and line["to_step"] <= bad["step"]:
            del spoiled[run]
        elif bad is not None and line["kind"] == "committed" and line["step"] > bad["step"]:
            step, why = bad["step"], bad["why"]
            yield f"run {run}: step {line['step']} was committed on top of step {step}, which is bad: {why}"
