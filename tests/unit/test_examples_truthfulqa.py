"""The converter of TruthfulQA judgements, run as its user runs it."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.unit.data_inputs import data_config, shared_file
from tether_services.recipes.data.inspection import inspect_data, length_preference
from tether_services.recipes.data.reading import read_rankings
from tether_services.recipes.data.records import Place, Ranking

SCRIPT = Path(__file__).parents[2] / "examples" / "truthfulqa" / "prepare.py"


def run(*paths: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, paths)], capture_output=True, text=True, check=False)


def judge(path: Path, judge: str, rows: list[tuple[str, str, str]]) -> Path:
    """Write judgements of (question, answer, label)."""
    lines = [json.dumps({"prompt": f"Q: {q}\nA: {a}\n{judge}:", "completion": f" {label}"}) for q, a, label in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def convert(folder: Path, true: list[tuple[str, str, str]], helpful: list[tuple[str, str, str]]) -> Any:
    truth, info = judge(folder / "truth.jsonl", "True", true), judge(folder / "info.jsonl", "Helpful", helpful)
    return run(truth, info, folder / "out.jsonl")


def test_answers_are_scored_by_both_judges_and_conflicts_and_empty_ones_dropped(tmp_path: Path) -> None:
    answers = ("both", "true only", "helpful only", "neither", "on\nQ: x\nA: y", "torn", "")
    true = [("Why?", a, "yes" if a in ("both", "true only") else "no") for a in answers]
    helpful = [("Why?", a, "yes" if a in ("both", "helpful only") else "no") for a in reversed(answers)]
    result = convert(tmp_path, [*true, ("Why?", "torn", "yes"), ("Why?", "both", "yes")], helpful)
    assert result.returncode == 0, result.stderr
    assert "1 questions, 5 answers; dropped 1 answers with labels that disagree and 1 empty ones" in result.stdout
    [row] = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert row["prompt"] == [{"role": "user", "content": "Why?"}]
    assert dict(zip(row["answers"], row["scores"], strict=True)) == {
        "both": 3,
        "true only": 2,
        "helpful only": 1,
        "neither": 0,
        "on\nQ: x\nA: y": 0,
    }


@pytest.mark.parametrize("line", ['{"prompt": "Why?", "completion": " yes"}', '{"completion": " yes"}', "{", "3"])
def test_a_broken_judgement_ends_it_with_file_and_line(tmp_path: Path, line: str) -> None:
    path = judge(tmp_path / "truth.jsonl", "True", [("Why?", "a", "yes")])
    path.write_text(path.read_text() + line + "\n", encoding="utf-8")
    result = run(path, path, tmp_path / "out.jsonl")
    assert result.returncode == 1 and f"{path}:2:" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_an_answer_that_one_judge_did_not_see_ends_it(tmp_path: Path) -> None:
    result = convert(tmp_path, [("Why?", "a", "yes")], [("Why?", "b", "yes")])
    assert result.returncode == 1 and "2 answers are in one of the two files only" in result.stderr


def test_the_shared_judgements_give_the_figures_of_their_readme(tmp_path: Path) -> None:
    paths = [Path(shared_file(f"ranking/truthfulqa-{name}.jsonl")) for name in ("truth", "info")]
    script = runpy.run_path(str(SCRIPT))
    scores, num_conflicts = script["join_scores"](*map(script["read_judgements"], paths))
    rankings = [
        Ranking(question, tuple(answers), tuple(map(float, answers.values())), Place("truthfulqa", 1), is_scored=True)
        for question, answers in scores.items()
    ]
    found = length_preference(rankings)
    assert (len(scores), num_conflicts) == (615, 53)
    assert found is not None and found.num_pairs == 89_832
    assert found.longer_wins == pytest.approx(0.494, abs=0.0005)
    assert run(*paths, tmp_path / "out.jsonl").returncode == 0
    written = inspect_data(data_config(str(tmp_path / "out.jsonl")))
    assert written.length_preference is not None
    assert written.length_preference.num_pairs == 89_289  # without the 33 empty answers
    assert written.report["malformed"] == written.report["dropped"] == {}


def test_the_written_rows_are_rankings_split_by_question(tmp_path: Path) -> None:
    rows = [(f"Why {n}?", answer, "yes" if answer == "a" else "no") for n in range(30) for answer in "ab"]
    assert convert(tmp_path, rows, rows).returncode == 0
    data = read_rankings(data_config(str(tmp_path / "out.jsonl")))
    assert len(data.train) + len(data.validation) == 30
    assert all(record.levels == (3.0, 0.0) and record.is_scored for record in data.train)
