"""Each test acts in a child process: the points end the process that comes to them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.reliability.checker import read_history
from tether_services.runtime.fault_points import PLAN_VARIABLE, POINTS
from tether_services.runtime.history import HISTORY_VARIABLE

PROGRAM = """
import sys
from tether_services.runtime.fault_points import arm, reach
arm(sys.argv[1], int(sys.argv[2]))
for name in sys.argv[3:]:
    try:
        reach(name)
        print(name, flush=True)
    except OSError as error:
        print(f"{name} {error.errno} {error.filename}", flush=True)
"""


def child(program: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    known = {k: v for k, v in os.environ.items() if k not in (PLAN_VARIABLE, HISTORY_VARIABLE)}
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        env=known | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def walk(folder: Path, plan: object, role: str, index: int, *points: str) -> tuple[int, list[str], str]:
    """Return exit status, the points that were passed, and what was printed to stderr."""
    path = folder / "plan.json"
    path.write_text(plan if isinstance(plan, str) else json.dumps(plan))
    process = child(PROGRAM, role, str(index), *points, **{PLAN_VARIABLE: str(path)})
    output, errors = process.communicate(timeout=60)
    return process.returncode, output.split("\n")[:-1], errors


def test_a_process_is_killed_when_it_comes_to_its_point_for_the_planned_time(tmp_path: Path) -> None:
    plan = {"worker": {"2": "step.begun@2=kill"}}
    points = ("step.begun", "update.done", "step.begun", "update.done")
    assert walk(tmp_path, plan, "worker", 2, *points)[:2] == (-signal.SIGKILL, ["step.begun", "update.done"])


@pytest.mark.parametrize(("role", "index"), [("worker", 1), ("worker", 3), ("generator", 2)])
def test_the_plan_of_another_process_changes_nothing(tmp_path: Path, role: str, index: int) -> None:
    plan = {"worker": {"2": "push.proven@1=kill"}}
    assert walk(tmp_path, plan, role, index, "push.proven")[:2] == (0, ["push.proven"])


def test_a_full_disk_is_an_error_of_the_operating_system_and_happens_once(tmp_path: Path) -> None:
    plan = {"generator": {"1": "push.stored@1=enospc"}}
    code, passed, _ = walk(tmp_path, plan, "generator", 1, "push.stored", "push.stored")
    assert (code, passed) == (0, ["push.stored 28 push.stored", "push.stored"])


def test_a_further_generator_has_a_part_of_its_own_with_the_points_of_a_generator(tmp_path: Path) -> None:
    plan = {"generator": {"1": ""}, "generator2": {"1": "push.stored@1=kill"}}
    assert walk(tmp_path, plan, "generator", 1, "push.stored")[:2] == (0, ["push.stored"])
    assert walk(tmp_path, plan, "generator2", 1, "push.stored")[:2] == (-signal.SIGKILL, [])
    plan = {"generator2": {"1": "step.begun@1=kill"}}
    assert "the points of generator2 are upload.chunk" in walk(tmp_path, plan, "generator2", 1, "push.stored")[2]


def test_several_entries_of_one_process_all_happen(tmp_path: Path) -> None:
    plan = {"worker": {"1": "update.done@1=enospc update.done@3=kill"}}
    code, passed, _ = walk(tmp_path, plan, "worker", 1, *["update.done"] * 4)
    assert (code, passed) == (-signal.SIGKILL, ["update.done 28 update.done", "update.done"])


def test_a_stopped_process_stays_until_it_is_continued(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"worker": {"1": "push.half@1=stop"}}))
    process = child(PROGRAM, "worker", "1", "push.half", **{PLAN_VARIABLE: str(path)})
    try:
        stopped = Path(f"/proc/{process.pid}/stat")
        deadline = time.monotonic() + 30
        while stopped.read_text().rpartition(")")[2].split()[0] != "T":
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGCONT)
        assert process.communicate(timeout=30)[0] == "push.half\n"
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    "plan",
    [
        {"worker": {"1": "checkpoint.written@1=kill"}},
        {"worker": {"1": "step.begun@0=kill"}},
        {"worker": {"1": "step.begun@1=explode"}},
        {"worker": {"1": "upload.chunk@1=kill"}},
        {"worker": "step.begun@1=kill"},
        "not JSON",
    ],
)
def test_a_plan_that_could_never_do_anything_is_refused_at_the_start(tmp_path: Path, plan: object) -> None:
    code, passed, errors = walk(tmp_path, plan, "worker", 1, "step.begun")
    assert (code, passed) == (1, [])
    assert "InvalidArgumentError" in errors


def test_no_point_is_named_twice() -> None:
    for points in POINTS.values():
        assert len(set(points)) == len(points)


WITHOUT = """
import os, sys
from tether_services.runtime import fault_points, history
opened = []
sys.addaudithook(lambda event, args: opened.append(args[0]) if event == "open" else None)
fault_points.arm("worker", 1)
for points in fault_points.POINTS.values():
    for name in points:
        fault_points.reach(name)
fault_points.reach("no such point")
history.record("attempt", run="r", epoch=1)
print(opened)
"""


def test_without_the_variables_no_file_is_touched_and_nothing_happens() -> None:
    process = child(WITHOUT)
    assert process.communicate(timeout=60)[0] == "[]\n"
    assert process.returncode == 0


RECORDING = """
import sys, threading
from tether_services.runtime.history import record
def write(name):
    for number in range(200):
        record("attempt", run=name, epoch=number)
threads = [threading.Thread(target=write, args=(f"{sys.argv[1]}{n}",)) for n in range(3)]
[t.start() for t in threads]
[t.join() for t in threads]
"""


def test_lines_of_several_processes_and_threads_are_whole_and_in_order(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    processes = [child(RECORDING, name, **{HISTORY_VARIABLE: str(path)}) for name in "ab"]
    for process in processes:
        assert process.communicate(timeout=60)[1] == ""
    lines = list(read_history(path))
    assert len(lines) == 2 * 3 * 200
    assert {line["pid"] for line in lines} == {process.pid for process in processes}
    for run in {line["run"] for line in lines}:
        own = [line for line in lines if line["run"] == run]
        assert [line["epoch"] for line in own] == list(range(200))
        assert [line["t"] for line in own] == sorted(line["t"] for line in own)


HANGING = """
import sys, threading
from tether_services.runtime.fault_points import arm, reach
arm("worker", 1)
reach("update.done")
thread = threading.Thread(target=reach, args=("update.done",), daemon=True)
thread.start()
thread.join(0.3)
reach("update.done")
print(thread.is_alive())
"""


def test_a_thread_that_hangs_at_a_point_stays_there_and_the_others_go_on(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"worker": {"1": "update.done@2=hang"}}))
    output, errors = child(HANGING, **{PLAN_VARIABLE: str(path)}).communicate(timeout=60)
    assert output == "True\n", errors
