"""`tether data inspect` as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.data_inputs import pair, write_rows
from tether_services.cli.main import main
from tether_services.orchestrator.prompts import read_prompts
from tether_services.recipes.tokenizer import train_tokenizer


def test_json_goes_to_stdout_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [pair(n) for n in range(8)])
    assert main(["data", "inspect", source, "--json", "--set", "validation_fraction=0.5"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["report"]["shapes"] == {"rows.jsonl": "pairs"}, "reports travel: no folder of this machine"
    assert found["report"]["num_train"] + found["report"]["num_validation"] == 8
    assert found["length_preference"] == {"num_pairs": 8, "longer_wins": 1.0, "longest_is_best": 1.0}


def test_tables_show_the_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [*(pair(n) for n in range(8)), pair(0), "{"])
    dev = write_rows(tmp_path / "dev.jsonl", [pair(3)])
    train_tokenizer(["Question Yes No"], vocab_size=260, max_length=64).save_pretrained(tmp_path / "model")
    assert main(["data", "inspect", source, "--validation", dev, "--tokenizer", str(tmp_path / "model")]) == 0
    printed = " ".join(capsys.readouterr().out.replace("\u2502", " ").split())
    for expected in (
        "rows 11",
        "malformed bad_json 1 (9.09% of the rows)",
        "dropped duplicate 1, in_validation 1",
        "records 7 training, 1 validation",
        "longer answer wins 1.000 of 9 pairs",
        "prompt characters 9 11",
        "answer tokens 18",
    ):
        assert expected in printed


def test_the_prompts_of_preference_data_become_the_prompts_of_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = "\n\nHuman: Hi\n\nAssistant:"
    rows = [{"chosen": f"{talk} {a}", "rejected": f"{talk} No."} for a in ("Yes.", "Well.")]
    long = "\n\nHuman: " + "why " * 40 + "\n\nAssistant:"
    source = write_rows(tmp_path / "rows.jsonl", [*rows, {"chosen": f"{long} Yes.", "rejected": f"{long} No."}])
    tokenizer = train_tokenizer(["Question Yes No"], vocab_size=260, max_length=64)
    tokenizer.save_pretrained(tmp_path / "model")
    command = ["data", "prompts", source, "--tokenizer", str(tmp_path / "model"), "--max-tokens", "64", "--output"]
    assert main([*command, str(tmp_path / "prompts.jsonl")]) == 0
    assert "1 prompts, 1 longer ones left out" in capsys.readouterr().out
    assert read_prompts(tmp_path / "prompts.jsonl", field="prompts") == [talk], "as the run reads them"

    tokenizer.chat_template = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "chat")
    command[4] = str(tmp_path / "chat")
    assert main([*command, str(tmp_path / "again.jsonl")]) != 0
    assert "dialogue" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "again.jsonl"), "--template", "dialogue"]) == 0
    assert read_prompts(tmp_path / "again.jsonl", field="prompts") == [talk]


@pytest.fixture
def model(tmp_path: Path) -> str:
    train_tokenizer(["Question Yes No"], vocab_size=260, max_length=64).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_prompts_are_written_to_a_new_folder_and_everything_left_out_is_counted(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [pair(0), pair(1), pair(0), "{", {**pair(2), "rejected": "Yes 2"}])
    command = ["data", "prompts", source, "--tokenizer", model, "--output"]
    target = tmp_path / "new" / "folder" / "prompts.jsonl"
    assert main([*command, str(target)]) != 0
    assert "1 of 5 rows (20.0%) are malformed" in capsys.readouterr().err and not target.exists()
    assert main([*command, str(target), "--max-malformed-share", "0.2"]) == 0
    assert read_prompts(target, field="prompts") == ["Question 0?", "Question 1?"]
    printed = capsys.readouterr().out
    assert "2 prompts, 0 longer ones left out" in printed
    assert "5 rows; malformed: bad_json 1; dropped: " in printed
    assert "duplicate 1" in printed and "identical_answers 1" in printed


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--output", "rows.jsonl/prompts.jsonl"], "--output"),
        (["--output", "model"], "--output"),
        (["--output", "new.jsonl", "--max-tokens", "0"], "--max-tokens"),
        (["--output", "new.jsonl", "--max-tokens", "-3"], "--max-tokens"),
        (["--output", "new.jsonl", "--max-tokens", "1"], "no prompt is left"),
        (["--output", "new.jsonl", "--template", "chatml"], "chatml"),
        (["--output", "new.jsonl", "--max-malformed-share", "all"], "max_malformed_share"),
    ],
)
def test_prompts_that_cannot_be_written_are_refused_by_name(
    tmp_path: Path,
    model: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    named: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", [pair(1)])
    assert main(["data", "prompts", "rows.jsonl", "--tokenizer", model, *arguments]) != 0
    printed = capsys.readouterr()
    assert named in printed.err and "Traceback" not in printed.err and not printed.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "rows.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["absent.jsonl"], "absent.jsonl"),
        (["rows.jsonl", "--shape", "trees"], "shape"),
        (["rows.jsonl", "--set", "max_row_bytes=1"], "max_row_bytes"),
        (["rows.jsonl", "--set", "colour=1"], "colour"),
        (["rows.jsonl", "--tokenizer", "absent"], "--tokenizer"),
        (["rows.jsonl", "--template", "chatml"], "chatml"),
    ],
)
def test_what_is_wrong_is_named_on_stderr(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    named: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", [pair(1)])
    assert main(["data", "inspect", *arguments]) != 0
    printed = capsys.readouterr()
    assert named in printed.err and not printed.out


def test_the_help_shows_a_row_of_every_shape_and_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom tether_services.cli.main import main\n"
        "try:\n    main(['data', 'inspect', '--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted(m for m in ('torch', 'transformers', 'datasets', 'pydantic', 'rich') if m in sys.modules))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for shape in ("hh", "pairs", "ranked", "instruction", "messages", "text", "labelled", "oasst"):
        assert f"\n{shape}:\n    {{" in printed
    assert printed.endswith("[]\n")
