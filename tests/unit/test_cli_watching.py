"""The live view of a run."""

from __future__ import annotations

import io
from datetime import UTC, datetime

import pytest
from rich.console import Console

from tether import Run, StepEvent
from tether_services.cli.client_commands import report_end, run_table, runs_table
from tether_services.cli.watching import COLUMNS, RunView

NOW = datetime(2024, 5, 1, 12, 30, tzinfo=UTC)
METRICS = {
    "score_mean": 0.25,
    "reward_per_sequence": -0.5,
    "kl_per_sequence": 3.125,
    "entropy": 2.5,
    "tokens_per_second": 12345.6,
    "step_seconds": 7.25,
}


def new_run(state: str = "running", error: str = "", *, run_id: str = "demo-1") -> Run:
    return Run(run_id, state, 1, 20, 1, error, NOW, None, f"/runs/{run_id}")  # type: ignore[arg-type]


def shown(events: list[StepEvent | Run], *, terminal: bool) -> str:
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=120, color_system=None)
    with RunView(console, new_run("pending")) as view:
        for event in events:
            view.show(event)
    return output.getvalue()


def test_outside_a_terminal_every_event_is_one_plain_line() -> None:
    lines = shown([new_run(), StepEvent(0, 0, METRICS, NOW, 9), new_run("succeeded")], terminal=False).splitlines()
    assert lines == [
        "run demo-1 running",
        "step 0  score +0.250  reward -0.500  KL 3.12  entropy 2.500  tokens/s 12,346  seconds 7.2  policy version 0",
        "run demo-1 succeeded",
    ]


def test_outside_a_terminal_nothing_moves_the_cursor() -> None:
    assert "\x1b" not in shown([StepEvent(0, 0, METRICS, NOW, 9)], terminal=False)


def test_a_terminal_shows_a_table_with_every_column() -> None:
    text = shown([new_run(), StepEvent(0, 0, METRICS, NOW, 9), StepEvent(1, 1, METRICS, NOW, 9)], terminal=True)
    for heading in ("step", *COLUMNS, "policy version"):
        assert heading in text
    assert "12,346" in text and "2/20" in text and "demo-1 running" in text


def test_a_figure_that_a_step_lacks_is_a_dash() -> None:
    (line,) = shown([StepEvent(3, 2, {"score_mean": 1.0}, NOW, 9)], terminal=False).splitlines()
    assert line.startswith("step 3  score +1.000  reward -  KL -")


@pytest.mark.parametrize("terminal", [True, False])
def test_square_brackets_in_an_error_are_shown_as_they_are(terminal: bool) -> None:
    text = shown([new_run("failed", "[bold] items[0] [/bold]")], terminal=terminal)
    assert "[bold] items[0] [/bold]" in text


def test_the_columns_name_metrics_of_the_orchestrator() -> None:
    from tether_services.orchestrator.step_metrics import STEP_METRICS

    assert {name for name, _form in COLUMNS.values()} <= set(STEP_METRICS)


def test_a_failed_run_ends_with_its_reason_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert report_end(new_run("failed", "reward at 127.0.0.1:1: UNAVAILABLE")) == 1
    assert capsys.readouterr().err == "run demo-1 failed: reward at 127.0.0.1:1: UNAVAILABLE\n"
    assert report_end(new_run("cancelled")) == 1
    assert report_end(new_run("succeeded")) == 0


def test_tables_of_runs_show_what_was_committed() -> None:
    output = io.StringIO()
    console = Console(file=output, width=160)
    console.print(runs_table((new_run(),)))
    console.print(run_table(new_run()))
    assert "1/20" in output.getvalue() and "2024-05-01 12:30:00" in output.getvalue()
    assert "/runs/demo-1" in output.getvalue()
    assert "end_time" not in output.getvalue()


def test_a_narrow_table_of_runs_still_shows_whole_ids() -> None:
    output = io.StringIO()
    Console(file=output, width=80).print(runs_table((new_run(run_id="demo-20240501-123000-with-a-longer-name"),)))
    assert "demo-20240501-123000-with-a-longer-name " in output.getvalue()


def test_square_brackets_in_a_table_are_shown_as_they_are() -> None:
    output = io.StringIO()
    Console(file=output, width=160).print(run_table(new_run("failed", "no layer [bold]x[/nothing]")))
    assert "no layer [bold]x[/nothing]" in output.getvalue()
