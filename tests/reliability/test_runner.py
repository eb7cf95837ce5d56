from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reliability import runner
from tests.reliability.checker import Verdict
from tests.reliability.disk import IN_NAMESPACE, find_obstacle, namespace_command
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
    assert "2 runs in 0 s, 0 failed; seed 5" in printed
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


def test_an_unknown_name_is_refused_with_the_names_there_are(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.main(["--only", "R99"]) == 1
    assert "R2 bad" in capsys.readouterr().out


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
