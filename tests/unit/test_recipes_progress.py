"""Where long work stands, on a stream that is no terminal."""

from __future__ import annotations

import pytest

from tether_services.recipes.progress import MIN_TRACKED, PlainLines, progress_line, tracked


class Clock:
    """Shows the time that it is set to."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def printed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return the lines on stderr since the last look; stdout is for results."""
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()


def test_a_line_is_printed_every_thirty_seconds_with_figures_and_times(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    lines = PlainLines("sft", total=400, clock=clock)
    for step in range(1, 36):
        clock.seconds += 2.0
        lines.report(step, f"loss {step:.1f}")
    assert printed(capsys) == [
        "sft 15/400  loss 15.0  0:00:30 elapsed, 0:12:50 left",
        "sft 30/400  loss 30.0  0:01:00 elapsed, 0:12:20 left",
    ]
    lines.flush()
    assert printed(capsys) == ["sft 35/400  loss 35.0  0:01:10 elapsed, 0:12:10 left"]
    lines.flush()
    assert printed(capsys) == []


def test_the_time_left_of_a_resumed_run_counts_the_steps_it_took_itself(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    lines = PlainLines("dpo", total=400, clock=clock)
    clock.seconds += 40.0
    lines.report(301, "")
    clock.seconds += 30.0
    lines.report(304, "")
    assert printed(capsys) == [
        "dpo 301/400  0:00:40 elapsed, unknown time left",
        "dpo 304/400  0:01:10 elapsed, 0:16:00 left",
    ]


def test_the_last_line_is_printed_once_however_the_work_ends(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_line("reward", total=2) as report:
        report(2, "loss 1.0")
        report(2, "loss 1.0  validation 2.0")
    assert printed(capsys) == ["reward 2/2  loss 1.0  validation 2.0  0:00:00 elapsed, 0:00:00 left"]
    with pytest.raises(KeyboardInterrupt), progress_line("reward", total=20) as report:
        report(1, "")
        raise KeyboardInterrupt
    assert printed(capsys) == ["reward 1/20  0:00:00 elapsed, unknown time left"]
    with progress_line("reward", total=2):
        pass
    assert printed(capsys) == []


def test_few_items_have_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(list(tracked(range(MIN_TRACKED - 1), title="ids"))) == MIN_TRACKED - 1
    assert printed(capsys) == []
    assert len(list(tracked(range(MIN_TRACKED), title="ids"))) == MIN_TRACKED
    assert printed(capsys) == [f"ids {MIN_TRACKED}/{MIN_TRACKED}  0:00:00 elapsed, 0:00:00 left"]


def test_a_terminal_has_the_bar_and_no_plain_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTY_INTERACTIVE", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    with progress_line("sft", total=2) as report:
        report(2, "loss 1.0")
    shown = capsys.readouterr().err
    assert "2/2" in shown and "elapsed" not in shown


def test_a_total_that_is_not_known_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_line("score", total=None) as report:
        report(70, "1 errors")
    assert capsys.readouterr().err.startswith("score 70  1 errors  0:00:0")
