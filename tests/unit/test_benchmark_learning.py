"""The learning benchmark: its measures against brute force, its tables and configurations. No run is made here."""

from __future__ import annotations

import json
import math
import random
import statistics
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import learning
from benchmarks.learning_parts import frontier, methods, ptx
from benchmarks.learning_parts.evaluation import Evaluation, Response, held_out_prompts
from benchmarks.learning_parts.measures import (
    best_of_n_kl,
    best_of_n_mean,
    bigrams,
    crossing,
    distinct_2,
    equal_distinct_2,
    repetition_rate,
    standard_error,
)
from benchmarks.learning_parts.plots import draw_frontier, draw_methods
from benchmarks.learning_parts.runs import (
    Job,
    Options,
    RunResult,
    base_config,
    job_config,
    read_result,
    result_name,
    write_result,
)
from benchmarks.learning_parts.tables import Column, Study, markdown_table, write_study
from tether.errors import InvalidArgumentError
from tether_services.demo.demo import PROMPTS
from tether_services.orchestrator.run_config import check_run_config, parse_run_config

OPTIONS = Options(output=Path("unused"), seeds=(0, 1), steps=3, threads=1, parallel=2)


def make_evaluation(*score_groups: tuple[float, ...], kl: float = 2.0, length: int = 8) -> Evaluation:
    """Return an evaluation in which every response counts up from a number of its own."""
    rows = []
    for prompt, scores in enumerate(score_groups):
        starts = [1000 * prompt + 100 * i for i in range(len(scores))]
        rows.append(tuple(Response(tuple(range(a, a + length)), s, kl) for a, s in zip(starts, scores, strict=True)))
    return Evaluation(tuple(rows))


def make_result(**changes: Any) -> RunResult:
    fields: dict[str, Any] = {
        "label": "ppo",
        "seed": 0,
        "config": {"ppo": {"kl_coef": 0.4, "ptx_coef": 0.0}},
        "steps": [{"kl_per_sequence": float(k), "kl_coef": 0.5, "score_mean": 1.0} for k in range(8)],
        "evaluation": make_evaluation((1.0, 2.0), (3.0, 4.0)),
        "adapter": Path("adapters/000008"),
        "wall_seconds": 12.5,
    }
    return RunResult(**(fields | changes))


# Variety.


def test_bigrams_do_not_span_two_responses() -> None:
    assert bigrams([[1, 2, 3], [4], [], [5, 6]]) == [(1, 2), (2, 3), (5, 6)]


def test_distinct_2_is_one_for_a_text_without_repeats_and_one_over_the_pool_for_one_token() -> None:
    assert distinct_2([range(10)], num_bigrams=9) == 1.0
    assert distinct_2([[7] * 10], num_bigrams=9) == pytest.approx(1 / 9)


def test_distinct_2_counts_by_hand() -> None:
    assert distinct_2([[1, 2, 1, 2], [1, 2]], num_bigrams=4) == 2 / 4  # 12 21 12 | 12
    assert distinct_2([[1, 2, 1, 2], [1, 2]], num_bigrams=1) == 1.0


@pytest.mark.parametrize("size", [0, 5])
def test_distinct_2_refuses_a_pool_that_is_not_there(size: int) -> None:
    with pytest.raises(ValueError, match="4 pairs"):
        distinct_2([[1, 2, 1, 2], [1, 2]], num_bigrams=size)


def test_distinct_2_of_two_texts_is_compared_over_equally_many_pairs() -> None:
    rng = random.Random(0)
    long, short = [[rng.randrange(12) for _ in range(400)]], [[rng.randrange(12) for _ in range(60)]]
    a, b = equal_distinct_2(long, short)
    assert a == distinct_2(long, num_bigrams=59) and b == distinct_2(short, num_bigrams=59)
    assert a > 1.5 * distinct_2(long, num_bigrams=399), "the share of the whole long text would be far lower"
    assert equal_distinct_2(short, long) == (b, a)


def test_repetition_rate_counts_by_hand() -> None:
    assert repetition_rate([[1, 2, 3, 4, 1, 2, 3, 4]]) == pytest.approx(1 / 5)  # 1234 2341 3412 4123 1234
    assert repetition_rate([[5] * 10]) == pytest.approx(6 / 7)
    assert repetition_rate([range(20)]) == 0.0


def test_repetition_rate_is_a_mean_over_responses_and_forgets_between_them() -> None:
    assert repetition_rate([[1, 2, 3, 4], [1, 2, 3, 4]]) == 0.0
    assert repetition_rate([[5] * 10, [1, 2, 3, 4]]) == pytest.approx(3 / 7)
    assert repetition_rate([[5] * 10, [1, 2]]) == pytest.approx(3 / 7), "too short to repeat anything"


def test_repetition_rate_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no responses"):
        repetition_rate([])


@given(st.lists(st.lists(st.integers(0, 3), max_size=30), min_size=1, max_size=5))
def test_repetition_rate_equals_a_slow_count(responses: list[list[int]]) -> None:
    def share(ids: list[int]) -> float:
        runs = [ids[i : i + 4] for i in range(len(ids) - 3)]
        return sum(run in runs[:i] for i, run in enumerate(runs)) / len(runs) if runs else 0.0

    assert repetition_rate(responses) == pytest.approx(statistics.fmean(share(ids) for ids in responses))


# Best of n.


@pytest.mark.parametrize("n", range(1, 8))
def test_best_of_n_equals_the_mean_over_all_subsets_ties_included(n: int) -> None:
    rng = random.Random(n)
    scores = [rng.gauss(0, 2) for _ in range(6)]
    scores.append(scores[0])
    brute_force = statistics.fmean(max(subset) for subset in combinations(scores, n))
    assert best_of_n_mean(scores, n) == pytest.approx(brute_force, rel=1e-12)


def test_best_of_one_is_the_mean_and_best_of_all_the_highest() -> None:
    assert best_of_n_mean([3.0, -1.0, 4.0], 1) == pytest.approx(2.0)
    assert best_of_n_mean([3.0, -1.0, 4.0], 3) == 4.0


@pytest.mark.parametrize("n", [0, 4])
def test_best_of_n_needs_at_least_n_scores(n: int) -> None:
    with pytest.raises(ValueError, match="3 scores"):
        best_of_n_mean([1.0, 2.0, 3.0], n)


def test_best_of_n_is_unbiased_for_uniform_scores() -> None:
    """The highest of n uniform numbers is n / (n + 1) on average."""
    rng = random.Random(5)
    estimates = [best_of_n_mean([rng.random() for _ in range(32)], 16) for _ in range(2000)]
    assert abs(statistics.fmean(estimates) - 16 / 17) < 4 * standard_error(estimates)


def test_the_kl_of_best_of_n_is_that_of_the_highest_of_n_uniform_ranks() -> None:
    """The rank u of the chosen response has density n u^(n - 1), that of a single one has 1."""
    for n in (1, 2, 4, 16):
        grid = [(i + 0.5) / 100_000 for i in range(100_000)]
        integral = statistics.fmean(n * u ** (n - 1) * math.log(n * u ** (n - 1)) for u in grid)
        assert best_of_n_kl(n) == pytest.approx(integral, abs=1e-4)


def test_the_kl_of_best_of_n_has_its_published_values() -> None:
    assert best_of_n_kl(1) == 0.0
    assert best_of_n_kl(16) == pytest.approx(1.8350887)
    with pytest.raises(ValueError, match="at least 1"):
        best_of_n_kl(0)


def test_the_standard_error_is_the_spread_over_the_root_of_the_count() -> None:
    assert standard_error([1.0, 3.0, 5.0, 7.0]) == pytest.approx(math.sqrt(20 / 3) / 2)


def test_a_crossing_is_found_between_two_points_in_any_order() -> None:
    assert crossing([(10.0, 4.0), (2.0, 0.0), (6.0, 2.0)], 3.0) == pytest.approx(8.0)
    assert crossing([(0.0, 0.0), (1.0, 2.0), (2.0, 0.0), (3.0, 2.0)], 1.0) == pytest.approx(0.5), "the first of two"


def test_a_level_below_the_first_point_is_crossed_there_and_one_above_all_nowhere() -> None:
    assert crossing([(2.0, 1.0), (4.0, 3.0)], 0.5) == 2.0
    for points in ([(2.0, 1.0), (4.0, 3.0)], []):
        with pytest.raises(ValueError, match="no point reaches"):
            crossing(points, 3.5)


# Evaluations.


def test_an_evaluation_takes_one_response_of_each_prompt_in_turn() -> None:
    evaluation = make_evaluation((1.0, 2.0), (3.0, 4.0))
    assert [response.score for response in evaluation.responses] == [1.0, 3.0, 2.0, 4.0]
    assert [response.score for response in evaluation.first(1).responses] == [1.0, 3.0]


def test_the_figures_of_an_evaluation_by_hand() -> None:
    groups = (
        (Response((1, 2), 1.0, 3.0), Response((1,), 3.0, 0.0)),
        (Response((4, 5, 6, 7, 8), 5.0, 1.0),) * 2,
    )
    evaluation = Evaluation(groups)
    assert evaluation.score_mean == 3.5
    assert evaluation.score_std == pytest.approx(statistics.pstdev([1, 3, 5, 5]))
    assert evaluation.score_error == pytest.approx(1.5), "two prompts with the means 2 and 5"
    assert evaluation.kl_per_response == 1.25
    assert evaluation.kl_per_64_tokens == pytest.approx(64 * 5 / 13)
    assert evaluation.length_mean == 13 / 4
    assert evaluation.repetition == 0.0


def test_an_evaluation_survives_json() -> None:
    evaluation = make_evaluation((1.0, 2.0), (3.0, 4.0))
    assert Evaluation.from_json(json.loads(json.dumps(evaluation.to_json()))) == evaluation


def test_the_held_out_prompts_are_those_that_a_run_does_not_train_on() -> None:
    lines = [line for line in PROMPTS.read_text(encoding="utf-8").splitlines() if line.strip()]
    assert held_out_prompts(base_config(OPTIONS)) == lines[-64:]


# Configurations and results.


def test_the_configuration_of_a_job_is_the_demo_with_options_overrides_and_settings() -> None:
    options = Options(Path("unused"), (0,), 5, 1, 2, overrides=("ppo.kl_coef=0.7", "prompts_per_step=8"))
    config = job_config(Job("x", 3, ("ppo.kl_coef=0.9",)), options)
    assert (config["total_steps"], config["seed"], config["trainer"]["threads"]) == (5, 3, 1)
    assert config["ppo"]["kl_coef"] == 0.9, "a study's own settings are the strongest"
    assert config["prompts_per_step"] == 8
    assert config["ppo"]["temperature"] == 0.7 and config["evaluation_count"] == 64, "from demo.toml"
    check_run_config(parse_run_config(tomli_w.dumps(config)))


@pytest.mark.parametrize("label", list(methods.METHODS))
def test_every_method_is_a_valid_configuration(label: str) -> None:
    control = ("ppo.kl_target=6.0", "ppo.kl_horizon=640.0")
    config = job_config(Job(label, 0, (*methods.METHODS[label], *control)), OPTIONS)
    parsed = parse_run_config(tomli_w.dumps(config))
    check_run_config(parsed)
    assert parsed.ppo.advantage == {"ppo": "gae"}.get(label, label)
    assert parsed.ppo.kl_target == 6.0


def test_results_are_named_by_what_decides_the_numbers() -> None:
    config = job_config(Job("ppo", 0), OPTIONS)
    name = result_name("ppo", config)
    assert name.startswith("ppo-seed-0-")
    other_threads = config | {"trainer": config["trainer"] | {"threads": 2}}
    assert result_name("ppo", other_threads) == name
    assert result_name("ppo", config | {"model": "elsewhere/policy"}) == name
    assert result_name("ppo", config | {"total_steps": 4}) != name
    assert result_name("ppo", job_config(Job("ppo", 0, ("ppo.kl_coef=0.41",)), OPTIONS)) != name


def test_a_result_survives_its_file(tmp_path: Path) -> None:
    result = make_result()
    write_result(tmp_path / "result.json", result)
    assert read_result(tmp_path / "result.json") == result


def test_a_curve_names_a_missing_metric() -> None:
    assert make_result().curve("kl_per_sequence") == [0, 1, 2, 3, 4, 5, 6, 7]
    with pytest.raises(KeyError, match="absent"):
        make_result().curve("absent")


# The studies.


def test_the_late_kl_is_the_mean_of_the_last_quarter() -> None:
    assert methods.late_kl([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 4.0, 6.0]) == 5.0
    assert methods.late_kl([0.0, 0.0, 0.0, 0.0, 5.0]) == 2.5, "a part of a step counts as a step"
    assert methods.late_kl([3.0]) == 3.0


@pytest.mark.parametrize(
    ("gain", "after", "expected"), [(1.0, 0.3, False), (0.99, 0.6, True), (3.0, 0.29, True), (1.0, 0.9, False)]
)
def test_a_run_has_collapsed_if_it_did_not_learn_or_lost_its_variety(gain: float, after: float, expected: bool) -> None:
    assert methods.is_collapsed(gain, 0.6, after) is expected


def test_the_row_of_a_method_by_hand() -> None:
    before = make_evaluation((0.0, 1.0), (0.0, 1.0))
    row = methods.method_row(make_result(), before, kl_target=5.0)
    assert row["gain_in_sd"] == pytest.approx((2.5 - 0.5) / 0.5)
    assert row["kl_late"] == 6.5 and row["kl_over_target"] == pytest.approx(1.3)
    assert row["distinct_before"] == row["distinct_after"] == 1.0
    assert row["collapsed"] is False
    assert "within 25% on 0 of 1 seeds; 0 of 1 collapsed" in methods.conclude("ppo", [row])


def test_best_of_n_rows_average_over_prompts() -> None:
    base = make_evaluation(tuple(float(i) for i in range(16)), tuple(float(i) for i in range(100, 116)), length=32)
    row = frontier.best_of_n_row(base, 16)
    assert row["score"] == (15 + 115) / 2
    assert row["kl_per_64_tokens"] == pytest.approx(2 * best_of_n_kl(16)), "responses of 32 tokens"
    assert row["score_error"] == pytest.approx(50.0)


def test_the_difference_to_best_of_n_is_paired_by_prompt() -> None:
    base = make_evaluation((0.0,) * 4, (1.0,) * 4)
    row = frontier.ppo_row(make_result(), base, best=[0.5, 2.5])
    assert row["over_best"] == pytest.approx(1.0)
    assert row["over_best_error"] == pytest.approx(0.0, abs=1e-12), "every prompt gained the same"
    assert row["policy"] == "PPO, kl_coef 0.4"


def frontier_rows(*points: tuple[float, float]) -> list[dict[str, Any]]:
    variety = dict.fromkeys(("distinct_before", "distinct_after", "repetition_before", "repetition_after"), 0.5)
    return [{"policy": f"at {kl}", "kl_per_64_tokens": kl, "score": score, **variety} for kl, score in points]


def test_the_frontier_says_where_best_of_16_is_reached() -> None:
    reached = frontier.conclude(frontier_rows((4.0, 1.0), (8.0, 3.0), (19.0, 5.0)), best_score=2.0)
    assert "reaches" in reached[0] and "at 8.0 has +3.00 at 8.00 nats" in reached[0]
    assert "from 6.0 nats on" in reached[1]


def test_the_frontier_says_when_best_of_16_is_not_reached_within_the_leash() -> None:
    (missed,) = frontier.conclude(frontier_rows((4.0, 1.0), (21.0, 5.0)), best_score=2.0)
    assert "NOT" in missed


def test_ptx_is_compared_with_ppo_of_the_same_seed() -> None:
    rows = [
        {"policy": ptx.policy_name(0.0), "seed": 0, "loss": 2.60, "score": 5.0},
        {"policy": ptx.policy_name(0.0), "seed": 1, "loss": 2.70, "score": 6.0},
        {"policy": ptx.policy_name(0.3), "seed": 1, "loss": 2.65, "score": 5.5},
        {"policy": ptx.policy_name(0.3), "seed": 0, "loss": 2.57, "score": 5.1},
    ]
    said = ptx.conclude(rows, 0.3)
    assert "loss -0.0400" in said and "lower on 2 of 2 seeds" in said and "score -0.20 on average" in said


def test_stories_are_split_as_for_the_pretraining(tmp_path: Path) -> None:
    file = tmp_path / "stories.txt"
    file.write_text("".join(f"Story {i}.\n<|endoftext|>\n" for i in range(400)), encoding="utf-8")
    split = ptx.read_stories(file)
    assert len(split.train) + len(split.validation) == 400 and 5 <= len(split.validation) <= 40
    stories = [story.text for story in split.train]
    written = ptx.write_stories(tmp_path / "new" / "stories.jsonl", stories)
    lines = [json.loads(line) for line in written.read_text(encoding="utf-8").splitlines()]
    assert [line["prompt"] for line in lines] == stories


def test_a_missing_story_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="absent"):
        ptx.read_stories(tmp_path / "absent.txt")


# Tables and the command.


def test_a_markdown_table_by_hand() -> None:
    columns = (Column("name", "a"), Column("figure", "b", "{:+.2f}"))
    rows: list[dict[str, Any]] = [{"a": "x", "b": 1.234}, {"a": "y", "b": None}]
    assert markdown_table(columns, rows) == "| name | figure |\n| --- | --- |\n| x | +1.23 |\n| y | - |"


def test_a_study_is_written_as_markdown_json_and_plot(tmp_path: Path) -> None:
    figure = draw_frontier([(4.0, 2.0, 0.1, "a")], [(0.0, 0.0, 0.1, "b"), (1.8, 1.0, 0.1, "c")])
    study = Study("frontier", "A title", (Column("name", "a"),), [{"a": "x"}], ["It holds."], figure=figure)
    text = write_study(study, tmp_path, command="python the-command", figures=tmp_path / "figures")
    assert (tmp_path / "frontier.md").read_text(encoding="utf-8") == text
    assert "### A title" in text and "`python the-command`" in text and "- It holds." in text
    kept = json.loads((tmp_path / "frontier.json").read_text(encoding="utf-8"))
    assert kept == {"command": "python the-command", "rows": [{"a": "x"}], "conclusions": ["It holds."]}
    assert "<svg" in (tmp_path / "figures" / "learning-frontier.svg").read_text(encoding="utf-8")


def test_the_plot_of_the_methods_shows_every_seed_and_their_mean() -> None:
    results = {"ppo": [make_result(), make_result(seed=1)], "rloo": [make_result(label="rloo")]}
    scores, kls = draw_methods(results, kl_target=6.0, tolerance=0.25).axes
    assert len(scores.lines) == 3 + 2, "a line for each of three runs and each of two means"
    assert len(kls.lines) == 3 + 2 + 1, "and the target"


def test_ptx_without_the_story_file_says_so_and_stops(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert learning.main(["ptx", "--text", str(tmp_path / "absent.txt"), "--output", str(tmp_path / "out")]) == 2
    assert "--text FILE" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_line_offers_the_three_studies() -> None:
    parser = learning.build_parser()
    known = parser.parse_args(["methods", "--seeds", "7", "--steps", "2", "--set", "ppo.epochs=1"])
    assert (known.study, known.seeds, known.steps, known.set) == ("methods", [7], 2, ["ppo.epochs=1"])
    assert parser.parse_args(["methods"]).seeds == [0, 1, 2, 3, 4]
    assert parser.parse_args(["frontier"]).kl_coefs == sorted(parser.parse_args(["frontier"]).kl_coefs)
    assert parser.parse_args(["ptx"]).ptx_coefs
