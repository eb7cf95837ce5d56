"""Runs scenarios and their controls, prints seed, counts and a table, and keeps the histories of failures."""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final, NoReturn

from tests.reliability.disk import IN_NAMESPACE, find_obstacle, namespace_command
from tests.reliability.jobs import TRIAL_FOLDER, Job, Result, run_jobs, write_result
from tests.reliability.scenario import Outcome, Scenario, Trial
from tests.reliability.scenarios import all_scenarios
from tether_services.runtime.child import die_with_parent

__all__ = ["limit_of", "main"]

ROOT: Final = Path(__file__).resolve().parents[2]
KEPT: Final = ROOT / "runs" / "reliability"
COMMAND: Final = (sys.executable, "-m", "tests.reliability")
MOST_PROBLEMS: Final = 10
CONTROL_SECONDS: Final = 120.0
SHORT_SECONDS: Final = 720.0
"""What the short form of the whole suite may take on two idle cores."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for and return 0 if nothing failed."""
    known = _parse(arguments)
    signal.signal(signal.SIGTERM, _leave)  # all that was begun is ended and removed, as after Ctrl-C
    scenarios = all_scenarios()
    if known.job:
        return _run_one(scenarios, known)
    chosen = _choose(scenarios, known.only)
    if known.list or not chosen:
        print(*(f"{scenario.name:18} {scenario.title}" for scenario in scenarios), sep="\n")
        return 0 if known.list else 1
    obstacle = find_obstacle() if any(scenario.needs_mounts for scenario in chosen) else ""
    if not obstacle and IN_NAMESPACE not in os.environ and any(scenario.needs_mounts for scenario in chosen):
        _restart_in_namespace(known.seed)
    print(f"seed {known.seed}, {'long' if known.long else 'short'} form", flush=True)
    started = time.monotonic()
    obstacles = {s.name: s.find_obstacle() or (obstacle if s.needs_mounts else "") for s in chosen}
    results = [_skip(scenario, obstacles[scenario.name]) for scenario in chosen if obstacles[scenario.name]]
    results += _run_all(_list_jobs([scenario for scenario in chosen if not obstacles[scenario.name]], known), known)
    return _report(results, known, time.monotonic() - started)


def _leave(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.reliability", description=__doc__)
    parser.add_argument("--only", action="append", metavar="NAME", help="scenarios whose names begin so; repeatable")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="of all chance")
    parser.add_argument("--long", action="store_true", help="the long forms, which take hours")
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="scenarios at a time, as processes, and a light one; default 1"
    )
    parser.add_argument("--no-controls", action="store_true", help="without the negative controls")
    parser.add_argument("--no-skips", action="store_true", help="exit with 1 if anything could not be run here")
    parser.add_argument("--list", action="store_true", help="print the scenarios and end")
    parser.add_argument("--job", nargs=2, metavar=("NAME", "RESULT"), help=argparse.SUPPRESS)
    parser.add_argument("--parent-pid", type=int, help=argparse.SUPPRESS)
    known = parser.parse_args(arguments)
    if known.jobs < 1:
        parser.error("--jobs: at least 1")
    return known


def _choose(scenarios: Sequence[Scenario], names: Sequence[str] | None) -> list[Scenario]:
    """Return the scenarios of some names: whole words, or else beginnings."""
    chosen: set[str] = set()
    for name in names or [""]:
        words = [s.name for s in scenarios if f"{s.name} ".startswith(f"{name} ")]
        chosen.update(words or [s.name for s in scenarios if s.name.startswith(name)])
    return [scenario for scenario in scenarios if scenario.name in chosen]


def _restart_in_namespace(seed: int) -> None:
    """Become the same command in a mount namespace of its own, with the seed that was drawn."""
    command = [*COMMAND, *sys.argv[1:], "--seed", str(seed)]
    os.environ[IN_NAMESPACE] = "1"
    sys.stdout.flush()
    os.execvp("unshare", namespace_command(command))


def _skip(scenario: Scenario, reason: str) -> Result:
    print(f"{scenario.name}: skipped: {reason}", flush=True)
    return Result(scenario.name, None, 0.0, reason)


def _list_jobs(chosen: Sequence[Scenario], known: argparse.Namespace) -> list[Job]:
    """Return the scenarios, each followed by its control."""
    jobs: list[Job] = []
    for scenario in chosen:
        jobs.append(Job(scenario))
        if scenario.control and not known.no_controls:
            jobs.append(Job(scenario, control=True))
    return jobs


def _run_all(jobs: Sequence[Job], known: argparse.Namespace) -> list[Result]:
    """Run the jobs here one after the other, or as processes, so many at a time."""
    if known.jobs == 1:
        return [_run(job, known) for job in jobs]
    options = ["--seed", str(known.seed), "--jobs", str(known.jobs), *(["--long"] if known.long else [])]
    limit, keep = partial(limit_of, long=known.long, jobs=known.jobs), partial(_keep, seed=known.seed)
    results = []
    for alone, at_once in ((False, known.jobs), (True, 1)):
        chosen = [job for job in jobs if job.scenario.alone is alone]
        if chosen:
            work = run_jobs(chosen, at_once=at_once, command=[*COMMAND, *options], limit=limit, keep=keep)
            results += asyncio.run(work)
    return results


def _run_one(scenarios: Sequence[Scenario], known: argparse.Namespace) -> int:
    """Be the process of one job, and leave its result for the process that waits for it."""
    if known.parent_pid:
        die_with_parent(known.parent_pid)
    name, path = known.job
    [job] = [Job(s, control=c) for s in scenarios for c in (False, True) if Job(s, control=c).name == name]
    result = _run(job, known)
    write_result(result, Path(path))
    return 0 if result.passed else 1


def limit_of(job: Job, *, long: bool, jobs: int) -> float:
    """Return the seconds that a job may take: more where others run beside it."""
    scenario = job.scenario
    alone = CONTROL_SECONDS if job.control else scenario.long_seconds if long else scenario.seconds
    return alone * jobs


def _run(job: Job, known: argparse.Namespace) -> Result:
    """Run a job in a folder of its own, which is kept if it fails, within its time limit."""
    with _trial_folder(known) as folder:
        result = _run_in(folder, job, known)
        if not result.passed:
            _keep(folder, job.name, seed=known.seed)
        return result


@contextmanager
def _trial_folder(known: argparse.Namespace) -> Iterator[Path]:
    """Yield an empty folder; that of a job lies where its parent finds and removes it, whatever becomes of the job."""
    if known.job:
        folder = Path(known.job[1]).parent / TRIAL_FOLDER
        folder.mkdir()
        yield folder
    else:
        with tempfile.TemporaryDirectory(prefix="tether-reliability-", ignore_cleanup_errors=True) as name:
            yield Path(name)


def _run_in(folder: Path, job: Job, known: argparse.Namespace) -> Result:
    # Names, so that a scenario meets the same faults alone and among others.
    trial = Trial(folder, random.Random(f"{known.seed} {job.name}"), known.long and not job.control, job.control)
    limit = limit_of(job, long=known.long, jobs=known.jobs)
    started = time.monotonic()
    try:
        outcome = asyncio.run(_within(limit, job.scenario, trial))
        passed, text = _judge_control(job.scenario, outcome) if job.control else _judge(outcome)
    except Exception as error:  # whatever it is, the other scenarios run and the table tells
        passed, text = False, f"{type(error).__name__}: {str(error) or f'beyond {limit:g} s'}"
        traceback.print_exc()
    result = Result(job.name, passed, time.monotonic() - started, text)
    print(f"{result.word} {result.name} ({result.seconds:.0f} s) {text}", flush=True)
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


def _keep(folder: Path, name: str, *, seed: int) -> None:
    """Copy the histories and logs of a failure to where they stay."""
    target = KEPT / f"{name.replace(' ', '-')}-{seed}"
    shutil.rmtree(target, ignore_errors=True)
    KEPT.mkdir(parents=True, exist_ok=True)
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.socket", "disk", "policy"), dirs_exist_ok=True)
    print(f"    kept in {target}", flush=True)


def _report(results: Sequence[Result], known: argparse.Namespace, seconds: float) -> int:
    """Print the table and return the exit status."""
    print(f"\n{'scenario':24} {'result':6} {'seconds':>7}")
    for result in results:
        print(f"{result.name:24} {result.word:6} {result.seconds:7.1f}")
    failed = sum(result.passed is False for result in results)
    skipped = sum(result.passed is None for result in results)
    late = f" (the short form should take {SHORT_SECONDS:.0f} s)" if not known.long and seconds > SHORT_SECONDS else ""
    counts = f"{failed} failed, {skipped} skipped"
    print(f"{len(results)} runs in {seconds:.0f} s{late}, {counts}; seed {known.seed}", flush=True)
    return 1 if failed or (skipped and known.no_skips) else 0
