"""Evaluation figures, report.json and report.html."""

from __future__ import annotations

import json
import math
import xml.dom.minidom
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from types import MappingProxyType

import pytest

from tests.unit.run_inputs import run_toml, scored_sample, step_record
from tether.errors import FailedPreconditionError
from tether_services.orchestrator.evaluation import Evaluation, summarise_evaluation
from tether_services.orchestrator.ledger import Ledger
from tether_services.orchestrator.records import Attempt, RunState
from tether_services.orchestrator.report import build_report, gain_in_sd, write_report
from tether_services.orchestrator.report_charts import draw_charts
from tether_services.orchestrator.rollouts import Rollout
from tether_services.orchestrator.run_files import RunFiles

HOSTILE = '<script>alert("x")</script> & <img src=x onerror=1>'


def evaluation(*, version: int = 0, shift: float = 0.0, prompt: str = "once") -> Evaluation:
    samples = [
        scored_sample(prompt=f"{prompt} {i}", score=i + shift, logprobs=(-1.0, -2.0), ref_logprobs=(-1.5, -2.5))
        for i in range(4)
    ]
    return summarise_evaluation(Rollout(samples, num_generated=4), policy_version=version)


def finished_run(
    folder: Path,
    *,
    steps: int = 3,
    after: bool = True,
    prompt: str = "once",
    metrics: Mapping[str, float] = MappingProxyType({}),
) -> tuple[Ledger, str]:
    """Return a ledger with a run that has committed steps and has evaluated."""
    ledger = Ledger(folder / "runs")
    attempt = ledger.create_run("demo", config_toml=run_toml(folder), total_steps=3)
    for step in range(steps):
        ledger.commit_step(attempt, step_record(step, **metrics))
    files = RunFiles(attempt.directory)
    files.write_json("evaluation_before.json", asdict(evaluation(prompt=prompt)))
    if after:
        files.write_json("evaluation_after.json", asdict(evaluation(version=3, shift=2.0, prompt=prompt)))
    return ledger, "demo"


def test_the_kl_of_a_response_is_the_sum_over_its_tokens() -> None:
    samples = [
        scored_sample(token_ids=(5, 6), logprobs=(-1.0, -2.0), ref_logprobs=(-1.5, -2.25)),
        scored_sample(token_ids=(7,), logprobs=(-0.5,), ref_logprobs=(-0.25,), stopped=True),
    ]
    result = summarise_evaluation(Rollout(samples, Counter(not_scored=1), num_generated=3), policy_version=4)
    assert [sample.kl for sample in result.samples] == [0.75, -0.25]
    assert result.kl_per_response == 0.25
    assert result.kl_per_64_tokens == pytest.approx(64 * 0.5 / 3)
    assert (result.response_length_mean, result.truncated_ratio) == (1.5, 0.5)
    assert (result.policy_version, result.samples_generated, result.samples_dropped) == (4, 3, 1)


def test_scores_are_summarised_by_mean_and_population_spread() -> None:
    result = evaluation()
    assert result.score_mean == 1.5
    assert result.score_std == pytest.approx(math.sqrt(1.25))


def test_an_evaluation_of_one_sample_is_refused() -> None:
    with pytest.raises(FailedPreconditionError, match="at least 2"):
        summarise_evaluation(Rollout([scored_sample()], num_generated=1), policy_version=0)


def test_the_gain_is_in_standard_deviations_before() -> None:
    before, after = {"score_mean": 1.0, "score_std": 2.0}, {"score_mean": 4.0, "score_std": 9.0}
    assert gain_in_sd(before, after) == 1.5
    assert gain_in_sd(before, None) is None
    assert gain_in_sd(None, after) is None
    assert gain_in_sd({"score_mean": 1.0, "score_std": 0.0}, after) is None


def test_a_report_holds_what_is_promised(tmp_path: Path) -> None:
    ledger, run_id = finished_run(tmp_path, metrics={"mean_abs_dlogp": 2e-6})
    report = build_report(ledger, run_id, state=RunState.SUCCEEDED, error="")
    assert report["gain_in_sd"] == pytest.approx(2.0 / math.sqrt(1.25))
    assert report["kl_per_response"] == 1.0
    assert report["kl_per_64_tokens"] == 32.0
    assert report["mean_abs_dlogp_max"] == 2e-6
    assert report["versions_as_expected"] is True
    assert report["wall_seconds"] > 0
    assert report["samples"]["generated"] == report["samples"]["trained"] == 12
    assert [step["step"] for step in report["steps"]] == [0, 1, 2]
    assert report["config"]["trainer"]["learning_rate"] == 1e-3
    assert report["config"]["ppo"]["gamma"] == 1.0
    assert "torch" in report["versions"]


@pytest.mark.parametrize(("steps", "version"), [(2, 2), (3, 2)])
def test_an_evaluation_of_another_policy_than_the_last_is_left_out(tmp_path: Path, steps: int, version: int) -> None:
    ledger, run_id = finished_run(tmp_path, steps=steps)
    files = RunFiles(ledger.directory(run_id))
    files.write_json("evaluation_after.json", asdict(evaluation(version=version, shift=2.0)))
    report = build_report(ledger, run_id, state=RunState.FAILED, error="")
    assert [report[name] for name in ("after", "gain_in_sd", "kl_per_response", "kl_per_64_tokens")] == [None] * 4


def test_the_wall_time_of_an_ended_run_ends_with_it(tmp_path: Path) -> None:
    ledger, run_id = finished_run(tmp_path)
    ledger.finish(Attempt(run_id, 1, ledger.directory(run_id)), RunState.SUCCEEDED)
    run = ledger.get_run(run_id)
    assert run.end_time is not None
    report = build_report(ledger, run_id, state=RunState.SUCCEEDED, error="")
    assert report["wall_seconds"] == run.end_time - run.create_time


@pytest.mark.parametrize("reason", ["wrong_run", "wrong_version", "wrong_adapter"])
def test_a_sample_of_another_policy_shows_in_the_report(tmp_path: Path, reason: str) -> None:
    ledger, run_id = finished_run(tmp_path, metrics={f"dropped_{reason}": 1.0, "samples_dropped": 1.0})
    report = build_report(ledger, run_id, state=RunState.SUCCEEDED, error="")
    assert report["versions_as_expected"] is False
    assert report["samples"][f"dropped_{reason}"] == 3


def test_a_run_that_failed_early_has_a_report_too(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "runs")
    attempt = ledger.create_run("demo", config_toml=run_toml(tmp_path), total_steps=3)
    attempt.directory.mkdir()
    write_report(ledger, "demo", state=RunState.FAILED, error="reward at x: <UNAVAILABLE>")
    report = json.loads((attempt.directory / "report.json").read_text())
    assert (report["gain_in_sd"], report["kl_per_response"], report["mean_abs_dlogp_max"]) == (None, None, None)
    assert report["error"] == "reward at x: <UNAVAILABLE>"
    assert "reward at x: &lt;UNAVAILABLE&gt;" in (attempt.directory / "report.html").read_text()


class Page(HTMLParser):
    """Collects tags, attributes that load something, and text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.loads: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.loads += [
            v or "" for k, v in attrs if k in ("src", "href", "xlink:href") and not (v or "").startswith("#")
        ]

    def handle_data(self, data: str) -> None:
        self.text += data


def read_page(folder: Path, *, prompt: str = "once") -> Page:
    ledger, run_id = finished_run(folder, prompt=prompt)
    write_report(ledger, run_id, state=RunState.SUCCEEDED, error="")
    page = Page()
    page.feed((ledger.directory(run_id) / "report.html").read_text())
    return page


def test_the_page_is_one_file_that_loads_nothing(tmp_path: Path) -> None:
    page = read_page(tmp_path)
    assert page.loads == []
    assert page.tags["svg"] == 1
    assert page.tags["script"] == 0


def test_the_page_shows_before_and_after_side_by_side(tmp_path: Path) -> None:
    page = read_page(tmp_path)
    for text in ("before", "after", "version 0", "version 3", "Mean score", "1.500", "3.500", "once 0", "once 3"):
        assert text in page.text, text
    assert page.text.count("upon a time") == 8


def test_text_of_models_and_users_cannot_become_markup(tmp_path: Path) -> None:
    page = read_page(tmp_path, prompt=HOSTILE)
    assert (page.tags["script"], page.tags["img"]) == (0, 0)
    assert HOSTILE in page.text


@pytest.mark.parametrize("count", [1, 2, 60])
def test_the_charts_are_well_formed_for_any_number_of_steps(count: int) -> None:
    steps = [{"step": i, "metrics": dict(step_record(i).metrics)} for i in range(count)]
    svg = draw_charts(steps)
    parsed = xml.dom.minidom.parseString(svg)
    assert parsed.documentElement is not None and parsed.documentElement.tagName == "svg"
    axes = [g for g in parsed.getElementsByTagName("g") if g.getAttribute("id").startswith("axes_")]
    assert len(axes) == 6


def test_the_charts_of_the_same_run_are_the_same() -> None:
    steps = [{"step": i, "metrics": dict(step_record(i).metrics)} for i in range(3)]
    assert draw_charts(steps) == draw_charts(steps)
