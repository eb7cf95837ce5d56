"""The document of a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tether.errors import InvalidArgumentError
from tether_services.cli.main import main
from tether_services.cli.run_document import read_run_document


def test_a_document_without_overrides_is_the_file_itself(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("# a comment\ntotal_steps = 3\n")
    assert read_run_document(file, []) == "# a comment\ntotal_steps = 3\n"


def test_overrides_reach_into_tables_and_keep_their_types(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('model = "a"\n[ppo]\nlam = 0.9\nepochs = 2\n')
    document = read_run_document(
        file, ["ppo.lam=0.5", "model=my model", "trainer.learning_rate=1e-3", "evaluation=false"]
    )
    assert tomllib.loads(document) == {
        "model": "my model",
        "evaluation": False,
        "ppo": {"lam": 0.5, "epochs": 2},
        "trainer": {"learning_rate": 1e-3},
    }


@pytest.mark.parametrize(
    ("content", "overrides", "expected"),
    [
        (None, [], "Cannot read"),
        ("model = ", [], "not valid TOML"),
        ("a = 1", ["nonsense"], "key=value"),
        ("a = 1", ["a.b=2"], "not a table"),
    ],
)
def test_a_bad_file_or_override_says_what_is_wrong(
    tmp_path: Path, content: str | None, overrides: list[str], expected: str
) -> None:
    file = tmp_path / "run.toml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InvalidArgumentError, match=expected):
        read_run_document(file, overrides)


def test_a_dry_run_prints_every_setting_with_its_value_and_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.toml"
    file.write_text('preset = "grpo"\nmodel = "m"\nprompts = "p.txt"\n[trainer]\nlearning_rate = 1e-4\n')
    arguments = ["run", "start", "a", "--config", str(file), "--dry-run", "--address", "127.0.0.1:1"]
    assert main([*arguments, "--set", "ppo.epochs=2"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["preset"], shown["responses_per_prompt"], shown["total_steps"]) == ("grpo", 8, 20)
    assert (shown["ppo"]["kl_in"], shown["ppo"]["epochs"], shown["ppo"]["clip_range"]) == ("loss", 2, 0.2)
    assert main([*arguments, "--set", "ppo.lam=0.5", "--set", "preset=nope"]) == 42
    assert "preset: " in capsys.readouterr().err
    assert main([*arguments, "--set", "ppo.lam=0.5"]) == 42
    assert "ppo.lam: has no effect" in capsys.readouterr().err


def test_a_reader_that_has_enough_is_no_error(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('model = "a"\nprompts = "b.txt"\n[trainer]\nlearning_rate = 1e-3\n')
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "tether_services", "run", "start", "r", "--config", str(file), "--dry-run"]
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (1, "")
