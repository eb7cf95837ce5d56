"""`tether demo` from start to finish, with real processes and the packaged models."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

SMALL = [
    *("--steps", "2", "--threads", "1", "--run-id", "small"),
    *("--set", "prompts_per_step=4", "--set", "responses_per_prompt=2", "--set", "max_response_tokens=24"),
    *("--set", "evaluation_count=8"),
]


def run_demo(folder: Path, *arguments: str, timeout: float = 280) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tether_services", "demo", "--output", str(folder), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("runs")
    return folder, run_demo(folder, *SMALL)


def read_report(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "small" / "report.json").read_text())
    return report


@pytest.mark.slow
def test_the_demo_succeeds_and_shows_its_progress_as_plain_lines(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    _folder, done = finished
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line.split("  ")[0] for line in lines if line.startswith("step ")] == ["step 0", "step 1"]
    assert "run small succeeded" in lines
    assert "8 held-out prompts" in done.stdout and "the first held-out stories" in done.stdout
    assert "\x1b" not in done.stdout


@pytest.mark.slow
def test_the_demo_leaves_a_report_where_it_says(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = finished
    for name in ("report.html", "report.json"):
        assert str(folder / "small" / name) in done.stdout
        assert (folder / "small" / name).stat().st_size > 1000
    report = read_report(folder)
    assert report["state"] == "SUCCEEDED"
    assert len(report["steps"]) == 2 and [step["policy_version"] for step in report["steps"]] == [0, 1]
    assert report["after"]["policy_version"] == 2
    assert len(report["before"]["samples"]) == 8


@pytest.mark.slow
def test_trainer_generator_and_reference_agree_on_the_packaged_models(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    report = read_report(finished[0])
    assert report["versions_as_expected"] is True
    assert report["samples"]["generated"] == report["samples"]["trained"] == 16
    assert report["mean_abs_dlogp_max"] < 1e-3
    first = report["steps"][0]["metrics"]
    assert abs(first["kl_per_sequence"]) < 1e-3  # policy and reference are the same before the first update
    assert first["first_ratio_deviation"] == 0


@pytest.mark.slow
def test_nothing_is_left_running(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder = str(finished[0])
    left = [
        process.pid for process in psutil.process_iter(["cmdline"]) if folder in " ".join(process.info["cmdline"] or [])
    ]
    assert left == []


@pytest.mark.slow
def test_the_same_name_again_with_another_configuration_is_refused(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    done = run_demo(finished[0], *SMALL, "--seed", "9")
    assert done.returncode == 1
    assert "run_id" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_bad_keys_end_with_status_42_and_a_line_each(tmp_path: Path) -> None:
    done = run_demo(tmp_path, *SMALL, "--set", "nonsense=1", "--set", "ppo.lam=2")
    assert done.returncode == 42
    assert [line.split(":")[0] for line in done.stderr.splitlines()[1:]] == ["  ppo.lam", "  nonsense"]


@pytest.mark.slow
def test_a_failing_run_ends_with_status_1_and_its_reason(tmp_path: Path) -> None:
    done = run_demo(tmp_path, *SMALL, "--set", "ppo.mismatch_limit=1e-12")
    assert done.returncode == 1
    assert done.stderr.startswith("run small failed: ")
    assert "Traceback" not in done.stderr and "Traceback" not in done.stdout
    report = read_report(tmp_path)
    assert report["state"] == "FAILED" and report["error"] in done.stderr


@pytest.mark.slow
def test_an_interrupt_stops_everything(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tether_services", "demo", "--output", str(tmp_path), *SMALL, "--steps", "500"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 0"):
            break
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) == 5  # four services and the worker of the run
    os.kill(process.pid, signal.SIGINT)
    output, _nothing = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    deadline = time.monotonic() + 10
    while any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children):
        assert time.monotonic() < deadline, children
        time.sleep(0.1)
