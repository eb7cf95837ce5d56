from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.reliability.clocks import Clock, compile_shim, find_obstacle, read_ahead

pytestmark = pytest.mark.skipif(bool(find_obstacle()), reason=find_obstacle() or "the time of day can be moved")

PROGRAM = """
import os, sys, time
from datetime import datetime
from pathlib import Path
from tests.reliability.clocks import FILE_VARIABLE, Clock

day, steady, library, first, second = float(sys.argv[1]), float(sys.argv[2]), *map(Path, sys.argv[3:])
def ahead():
    return [round((clock - day) / 3600) for clock in (time.time(), time.time_ns() / 1e9, datetime.now().timestamp())]
assert ahead() == [1, 1, 1], ahead()
Clock(first, library).set(-3600)
assert ahead() == [-1, -1, -1], ahead()
os.environ[FILE_VARIABLE] = str(second)  # as in a process that was forked
assert ahead() == [24, 24, 24], ahead()
boot = time.clock_gettime(time.CLOCK_BOOTTIME)
assert abs(time.monotonic() - steady) < 30 and boot < time.monotonic() + 366 * 24 * 3600
started = time.monotonic()
time.sleep(0.1)
assert 0.1 <= time.monotonic() - started < 5
"""


def test_the_time_of_day_of_a_process_moves_when_told_and_its_other_clocks_do_not(tmp_path: Path) -> None:
    library = compile_shim(tmp_path)
    clock, other = Clock(tmp_path / "one.clock", library), Clock(tmp_path / "other.clock", library)
    clock.set(3600)
    other.set(24 * 3600)
    now = [str(time.time()), str(time.monotonic())]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *now, str(library), str(clock.path), str(other.path)],
        env={**os.environ, **clock.environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("hours", [0, 24, -1])
def test_a_log_tells_by_how_much_the_clock_of_its_writer_is_ahead(hours: int, tmp_path: Path) -> None:
    log = tmp_path / "service.log"
    assert read_ahead(log) is None
    log.write_text("no line of a service yet\n")
    assert read_ahead(log) is None
    old, new = (time.strftime("%Y-%m-%dT%H:%M:%S.123Z", time.gmtime(time.time() + s)) for s in (-5e5, hours * 3600))
    log.write_text(f'{{"time": "{old}"}}\n{{"time": "{new}"}}\nand a warning\n')
    assert read_ahead(log) == pytest.approx(hours * 3600, abs=30)
