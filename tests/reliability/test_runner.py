from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.reliability import runner
from tests.reliability.checker import Verdict
from tests.reliability.disk import IN_NAMESPACE, find_obstacle, namespace_command
from tests.reliability.jobs import Job, order_jobs
from tests.reliability.scenario import Outcome, Scenario, Trial

DREW: list[tuple[bool, bool, float]] = []


async def pass_always(trial: Trial) -> Outcome:
    """Violates I2 without its protection and nothing else."""
    DREW.append((trial.control, trial.long, trial.random.random()))
    (trial.folder / "history.jsonl").write_text("{}\n")
    return Outcome(Verdict([("I2", "twice")] if trial.control else []), {"kills": trial.count(3, 30)})


async def fail_always(trial: Trial) -> Outcome:
    (trial.folder / "history.jsonl").write_text("{}\n")
    return Outcome(Verdict([("I7", "other bits")]), failures=["3 of 30 kills"])


async def pass_even_sabotaged(trial: Trial) -> Outcome:
    return Outcome(Verdict())


async def hang(trial: Trial) -> Outcome:
    await asyncio.sleep(60)
    raise AssertionError("not reached")


GOOD = Scenario("R1 good", "passes", pass_always, control="a lock", caught_as=frozenset({"I2"}))
BAD = Scenario("R2 bad", "fails", fail_always)
BLIND = Scenario("R3 blind", "proves nothing", pass_even_sabotaged, control="a lock", caught_as=frozenset({"I2"}))
SLOW = Scenario("R4 slow", "hangs", hang, seconds=0.2)


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(runner, "all_scenarios", lambda: [GOOD, BAD, BLIND, SLOW])
    monkeypatch.setattr(runner, "KEPT", tmp_path / "kept")
    return tmp_path / "kept"


def test_a_scenario_that_passes_and_whose_control_is_caught_is_a_success(
    kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runner.main(["--only", "R1", "--seed", "5"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("seed 5, short form")
    assert "PASS R1 good (0 s) kills: 3" in printed
    assert "PASS R1 good control (0 s) without a lock: I2 reported" in printed
    assert "2 runs in 0 s, 0 failed, 0 skipped; seed 5" in printed
    assert not kept.exists()


def test_a_violation_fails_is_named_and_its_history_is_kept(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.main(["--only", "R2", "--seed", "5"]) == 1
    printed = capsys.readouterr().out
    assert "I7: other bits" in printed and "3 of 30 kills" in printed
    assert (kept / "R2-bad-5" / "history.jsonl").read_text() == "{}\n"


def test_a_control_that_nothing_catches_fails(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.main(["--only", "R3"]) == 1
    assert "FAIL R3 blind control (0 s) without a lock: nothing reported, I2 expected" in capsys.readouterr().out


def test_a_scenario_beyond_its_time_fails_and_the_others_still_run(
    kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runner.main(["--only", "R4", "--only", "R1"]) == 1
    printed = capsys.readouterr().out
    assert "FAIL R4 slow (0 s) TimeoutError: beyond 0.2 s" in printed
    assert "PASS R1 good (0 s)" in printed


def test_one_seed_gives_a_scenario_the_same_chance_alone_and_among_others(kept: Path) -> None:
    DREW.clear()
    runner.main(["--only", "R1", "--seed", "5"])
    runner.main(["--seed", "5"])
    runner.main(["--only", "R1", "--seed", "6", "--no-controls"])
    runner.main(["--only", "R1", "--seed", "5", "--long", "--no-controls"])
    same, control, again, control_again, other, long = DREW
    assert (same, control) == (again, control_again)
    assert other[2] != same[2] != control[2]
    assert long == (False, True, same[2])


def test_a_scenario_that_cannot_be_run_here_is_skipped_with_the_reason(
    kept: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad_here = replace(BAD, find_obstacle=lambda: "there is no clock")
    monkeypatch.setattr(runner, "all_scenarios", lambda: [GOOD, bad_here])
    assert runner.main(["--seed", "5"]) == 0
    printed = capsys.readouterr().out
    assert "R2 bad: skipped: there is no clock" in printed
    assert "3 runs in 0 s, 0 failed, 1 skipped; seed 5" in printed


def test_a_skipped_scenario_is_a_failure_where_none_may_be_skipped(
    kept: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        runner, "all_scenarios", lambda: [GOOD, replace(BAD, find_obstacle=lambda: "there is no clock")]
    )
    assert runner.main(["--seed", "5", "--no-skips"]) == 1
    assert "0 failed, 1 skipped; seed 5" in capsys.readouterr().out
    assert runner.main(["--seed", "5", "--no-skips", "--only", "R1"]) == 0


def test_a_time_limit_is_longer_where_several_run_at_the_same_time(kept: Path) -> None:
    limits = [
        runner.limit_of(Job(SLOW, control=control), long=long, jobs=jobs)
        for control, long, jobs in ((False, False, 1), (False, False, 2), (False, True, 1), (True, True, 2))
    ]
    assert limits == [0.2, 0.4, SLOW.long_seconds, 2 * runner.CONTROL_SECONDS]


@pytest.mark.parametrize(
    ("only", "names"),
    [
        (["R1"], ["R1", "R1 good"]),
        (["R1 g"], ["R1 good"]),
        (["R12", "R1 good"], ["R1 good", "R12"]),
        (["R"], ["R1", "R1 good", "R12"]),
    ],
)
def test_scenarios_are_chosen_by_whole_words_or_else_by_beginnings(
    only: list[str], names: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner, "all_scenarios", lambda: [replace(GOOD, name=n) for n in ("R1", "R1 good", "R12")])
    arguments = [word for name in only for word in ("--only", name)]
    assert runner.main([*arguments, "--no-controls"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(" (")[0].removeprefix("PASS ") for line in printed if line.startswith("PASS")] == names


def test_an_unknown_name_is_refused_with_the_names_there_are(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.main(["--only", "R99"]) == 1
    assert "R2 bad" in capsys.readouterr().out


PROGRAM = """
import asyncio, os, sys, time
from pathlib import Path
from tests.reliability import runner
from tests.reliability.checker import Verdict
from tests.reliability.jobs import Job, order_jobs
from tests.reliability.scenario import Outcome, Scenario

async def meet(trial):
    # Passes only if the others are under way at the same time.
    (Path(FOLDER) / f"came-{os.getpid()}").touch()
    print("one line", flush=True)
    while len(list(Path(FOLDER).glob("came-*"))) < MEETING:
        await asyncio.sleep(0.01)
    print("and its other", flush=True)
    return Outcome(Verdict(), {"drew": trial.random.random()})

async def be_alone(trial):
    # Passes only if both others have been there before; it would be started first for the time that it usually takes.
    assert len(list(Path(FOLDER).glob("came-*"))) == 2
    return Outcome(Verdict())

async def die(trial):
    (trial.folder / "history.jsonl").write_text("{}")
    os.kill(os.getpid(), 9)

FOLDER = sys.argv.pop(1)
MEETING = 3 if (Path(FOLDER) / "with-light").exists() else 2
runner.KEPT = Path(FOLDER) / "kept"
runner.COMMAND = (sys.executable, "-c", Path(FOLDER, "program").read_text(), FOLDER)
runner.all_scenarios = lambda: [Scenario("A", "", meet), Scenario("B", "", meet), Scenario("C", "", die)]
if (Path(FOLDER) / "with-d").exists():
    runner.all_scenarios = lambda: [
        Scenario("D", "", be_alone, usual_seconds=99.0, alone=True), Scenario("A", "", meet), Scenario("B", "", meet)
    ]
if MEETING == 3:
    runner.all_scenarios = lambda: [
        Scenario("A", "", meet), Scenario("B", "", meet), Scenario("L", "", meet, light=True, usual_seconds=99.0)
    ]
raise SystemExit(runner.main())
"""


def run_program(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "program").write_text(PROGRAM)
    command = [sys.executable, "-c", PROGRAM, str(folder), "--seed", "5", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_several_scenarios_run_at_the_same_time_with_their_own_chance_and_whole_outputs(tmp_path: Path) -> None:
    done = run_program(tmp_path, "--jobs", "2", "--only", "A", "--only", "B")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "seed 5, short form"
    assert [lines[1:3], lines[4:6]] == [["one line", "and its other"]] * 2
    table = done.stdout[done.stdout.index("scenario  ") :]
    assert [line.split()[:2] for line in table.splitlines()[1:3]] == [["A", "PASS"], ["B", "PASS"]]
    alone = run_program(tmp_path, "--only", "B")  # the meeting is over: it passes alone
    assert alone.returncode == 0, alone.stdout + alone.stderr
    [drew] = [line.partition("drew")[2] for line in alone.stdout.splitlines() if line.startswith("PASS B")]
    assert f"drew{drew}" in done.stdout


def test_a_light_scenario_takes_no_place_of_the_others(tmp_path: Path) -> None:
    (tmp_path / "with-light").touch()
    done = run_program(tmp_path, "--jobs", "2")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_scenario_that_judges_latencies_has_the_machine_for_itself(tmp_path: Path) -> None:
    (tmp_path / "with-d").touch()
    done = run_program(tmp_path, "--jobs", "3", "--only", "D", "--only", "A", "--only", "B")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_scenario_whose_process_dies_fails_and_the_others_still_count(tmp_path: Path) -> None:
    began = time.monotonic()
    done = run_program(tmp_path, "--jobs", "2")
    took = time.monotonic() - began
    assert done.returncode == 1
    found = re.search(r"^FAIL C \(([0-9]+) s\) its process ended with status -9$", done.stdout, re.MULTILINE)
    assert found is not None and int(found[1]) <= round(took)
    assert "3 runs in" in done.stdout and "1 failed, 0 skipped; seed 5" in done.stdout
    assert (tmp_path / "kept" / "C-5" / "history.jsonl").read_text() == "{}"


def _take_interrupts() -> None:
    """Undo what the tests themselves may have inherited: a job in the background ignores Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("options", [[], ["--jobs", "2"]])
def test_a_suite_that_is_interrupted_leaves_no_folder(number: int, options: list[str], tmp_path: Path) -> None:
    (tmp_path / "program").write_text(PROGRAM)
    (tmp_path / "temporary").mkdir()
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), "--only", "A", *options]
    environment = {**os.environ, "TMPDIR": str(tmp_path / "temporary")}
    nothing = subprocess.DEVNULL
    suite = subprocess.Popen(command, env=environment, stdout=nothing, stderr=nothing, preexec_fn=_take_interrupts)
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("came-*")):  # A waits for B, which never comes
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert list((tmp_path / "temporary").iterdir())
        suite.send_signal(number)
        assert suite.wait(timeout=30) != 0
    finally:
        suite.kill()
    assert list((tmp_path / "temporary").iterdir()) == []


def test_long_scenarios_are_started_first_and_controls_last() -> None:
    brief, slow = replace(GOOD, name="R1 brief"), replace(GOOD, name="R2 slow", usual_seconds=40.0)
    jobs = [Job(brief), Job(brief, control=True), Job(slow), Job(slow, control=True)]
    assert [job.name for job in order_jobs(jobs)] == ["R2 slow", "R1 brief", "R2 slow control", "R1 brief control"]


DISK = """
import errno, os
from pathlib import Path
from tests.reliability.disk import small_disk
def fails(number, act):
    try:
        act()
    except OSError as error:
        assert error.errno == number, error
    else:
        raise AssertionError("it did not fail")
folder = Path(os.sys.argv[1])
with small_disk(folder, size_bytes=1 << 20, inodes=50) as disk:
    file = folder / "file"
    file.write_bytes(bytes(1000))
    disk.fill()
    fails(errno.ENOSPC, lambda: (folder / "other").write_bytes(bytes(10000)))
    disk.free()
    disk.fill(leave_bytes=100_000)
    (folder / "other").write_bytes(bytes(50_000))
    fails(errno.ENOSPC, lambda: (folder / "other").write_bytes(bytes(200_000)))
    disk.free()
    assert disk.take_inodes() < 50
    fails(errno.ENOSPC, lambda: (folder / "third").touch())
    disk.free()
    disk.set_read_only(True)
    fails(errno.EROFS, lambda: (folder / "third").touch())
    disk.set_read_only(False)
    (folder / "third").touch()
    assert file.read_bytes() == bytes(1000)
assert list(folder.iterdir()) == []
"""


@pytest.mark.skipif(bool(find_obstacle()), reason=find_obstacle() or "small file systems can be mounted")
def test_a_small_disk_fills_loses_its_inodes_and_becomes_read_only_out_of_sight_of_others(tmp_path: Path) -> None:
    command = namespace_command([sys.executable, "-c", DISK, str(tmp_path)])
    done = subprocess.run(
        command, env={**os.environ, IN_NAMESPACE: "1"}, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()
