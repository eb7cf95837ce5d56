"""Runs scenarios and their controls, prints seed, counts and a table, and keeps the histories of failures."""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.reliability.disk import IN_NAMESPACE, find_obstacle, namespace_command
from tests.reliability.scenario import Outcome, Scenario, Trial
from tests.reliability.scenarios import all_scenarios

__all__ = ["main"]

ROOT: Final = Path(__file__).resolve().parents[2]
KEPT: Final = ROOT / "runs" / "reliability"
MOST_PROBLEMS: Final = 10
CONTROL_SECONDS: Final = 120.0


@dataclass(frozen=True, slots=True)
class Result:
    """What is printed of one run of a scenario or of its control."""

    name: str
    passed: bool | None
    """None: skipped."""
    seconds: float
    text: str
    """Figures, or what went wrong."""

    @property
    def word(self) -> str:
        """Return the result in a word."""
        return "SKIP" if self.passed is None else "PASS" if self.passed else "FAIL"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for and return 0 if everything passed."""
    known = _parse(arguments)
    chosen = [s for s in all_scenarios() if not known.only or any(s.name.startswith(name) for name in known.only)]
    if known.list or not chosen:
        print(*(f"{scenario.name:14} {scenario.title}" for scenario in all_scenarios()), sep="\n")
        return 0 if known.list else 1
    obstacle = find_obstacle() if any(scenario.needs_mounts for scenario in chosen) else ""
    if not obstacle and IN_NAMESPACE not in os.environ and any(scenario.needs_mounts for scenario in chosen):
        _restart_in_namespace(known.seed)
    print(f"seed {known.seed}, {'long' if known.long else 'short'} form", flush=True)
    results = []
    for scenario in chosen:
        results += _skip(scenario, obstacle) if scenario.needs_mounts and obstacle else _run_both(scenario, known)
    return _report(results, known.seed)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.reliability", description=__doc__)
    parser.add_argument("--only", action="append", metavar="NAME", help="scenarios whose names begin so; repeatable")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="of all chance")
    parser.add_argument("--long", action="store_true", help="the long forms")
    parser.add_argument("--no-controls", action="store_true", help="without the negative controls")
    parser.add_argument("--list", action="store_true", help="print the scenarios and end")
    return parser.parse_args(arguments)


def _restart_in_namespace(seed: int) -> None:
    """Become the same command in a mount namespace of its own, with the seed that was drawn."""
    command = [sys.executable, "-m", "tests.reliability", *sys.argv[1:], "--seed", str(seed)]
    os.environ[IN_NAMESPACE] = "1"
    sys.stdout.flush()
    os.execvp("unshare", namespace_command(command))


def _skip(scenario: Scenario, reason: str) -> list[Result]:
    print(f"{scenario.name}: skipped: {reason}", flush=True)
    return [Result(scenario.name, None, 0.0, reason)]


def _run_both(scenario: Scenario, known: argparse.Namespace) -> list[Result]:
    """Run a scenario and its control."""
    results = [_run(scenario, known)]
    if scenario.control and not known.no_controls:
        results.append(_run(scenario, known, control=True))
    return results


def _run(scenario: Scenario, known: argparse.Namespace, *, control: bool = False) -> Result:
    """Run a scenario in a folder of its own, which is kept if it fails, within its time limit."""
    name = f"{scenario.name} control" if control else scenario.name
    folder = Path(tempfile.mkdtemp(prefix="tether-reliability-"))
    # Names, so that a scenario meets the same faults alone and among others.
    trial = Trial(folder, random.Random(f"{known.seed} {name}"), known.long and not control, control)
    limit = CONTROL_SECONDS if control else scenario.long_seconds if known.long else scenario.seconds
    started = time.monotonic()
    try:
        outcome = asyncio.run(_within(limit, scenario, trial))
        passed, text = _judge_control(scenario, outcome) if control else _judge(outcome)
    except Exception as error:  # whatever it is, the other scenarios run and the table tells
        passed, text = False, f"{type(error).__name__}: {str(error) or f'beyond {limit:g} s'}"
        traceback.print_exc()
    result = Result(name, passed, time.monotonic() - started, text)
    print(f"{result.word} {name} ({result.seconds:.0f} s) {text}", flush=True)
    _keep(folder, name, known.seed) if not passed else shutil.rmtree(folder, ignore_errors=True)
    return result


async def _within(seconds: float, scenario: Scenario, trial: Trial) -> Outcome:
    return await asyncio.wait_for(scenario.run(trial), seconds)


def _judge(outcome: Outcome) -> tuple[bool, str]:
    """Return whether nothing was violated, and the figures or the problems."""
    problems = outcome.problems
    figures = ", ".join(f"{name}: {value}" for name, value in outcome.figures.items())
    if not problems:
        return True, figures
    more = [f"and {len(problems) - MOST_PROBLEMS} more"] if len(problems) > MOST_PROBLEMS else []
    return False, "\n    ".join([figures, *problems[:MOST_PROBLEMS], *more])


def _judge_control(scenario: Scenario, outcome: Outcome) -> tuple[bool, str]:
    """Return whether the checker reported what it must without the protection."""
    caught = outcome.verdict.names
    text = f"without {scenario.control}: {', '.join(sorted(caught)) or 'nothing'} reported"
    missing = scenario.caught_as - caught
    return not missing, text if not missing else f"{text}, {', '.join(sorted(missing))} expected"


def _keep(folder: Path, name: str, seed: int) -> None:
    """Move the histories and logs of a failure to where they stay."""
    target = KEPT / f"{name.replace(' ', '-')}-{seed}"
    shutil.rmtree(target, ignore_errors=True)
    KEPT.mkdir(parents=True, exist_ok=True)
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.socket", "disk", "policy"), dirs_exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    print(f"    kept in {target}", flush=True)


def _report(results: Sequence[Result], seed: int) -> int:
    """Print the table and return the exit status."""
    print(f"\n{'scenario':24} {'result':6} {'seconds':>7}")
    for result in results:
        print(f"{result.name:24} {result.word:6} {result.seconds:7.1f}")
    failed = sum(result.passed is False for result in results)
    seconds = sum(result.seconds for result in results)
    print(f"{len(results)} runs in {seconds:.0f} s, {failed} failed; seed {seed}")
    return 1 if failed else 0
