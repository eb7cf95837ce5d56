"""The wrong edits of the PPO mathematics are all caught, and the machine that says so can say otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.mutation.__main__ import NOTHING_LEARNT
from tests.mutation.report import PAGE, edit_cells, page
from tests.mutation.table import KINDS, ROOT, SOURCES, Edit, load_edits, mutate, read_source
from tests.mutation.trial import Outcome, pure_tests

EDITS = load_edits()
HARMLESS = """D10 order: nothing, the factors change places
- 0.5 * difference**2
+ difference**2 * 0.5
"""
FATAL = """D10 wrong_term: k2 without its half
- 0.5 * difference**2
+ difference**2
"""


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the check as a user does: in a process of its own, which may fork because no other thread lives in it."""
    command = [sys.executable, "-m", "tests.mutation", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def write_table(folder: Path, text: str, module: str = "kl") -> Path:
    (folder / f"{module}.txt").write_text(text, encoding="utf-8")
    return folder


def the_edit(folder: Path, text: str) -> Edit:
    (edit,) = load_edits(write_table(folder, text))
    return edit


def sources() -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in SOURCES.glob("*.py")}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_wrong_edit_is_caught() -> None:
    # About two minutes on one core.
    before = sources()
    ended = run()
    survivors = [line for line in ended.stdout.splitlines() if "SURVIVED" in line]
    assert not survivors
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    assert f"{len(EDITS)} edits, 0 survived" in ended.stdout
    assert sources() == before


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_edit_that_changes_no_result_survives_and_one_that_does_is_caught(tmp_path: Path) -> None:
    ended = run("--edits", write_table(tmp_path, f"{HARMLESS}\n{FATAL}"))
    verdicts = {line.split()[0]: line.split()[3] for line in ended.stdout.splitlines() if line.startswith("kl-")}
    assert verdicts["kl-01"] == "SURVIVED"
    assert verdicts["kl-02"].startswith("test_ppo_")
    assert ended.returncode == 1


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("replacement", "reason"),
    [("diference**2", "NameError"), ('__import__("os")._exit(0)', "the process of the trial died")],
)
def test_an_edit_that_breaks_the_module_is_an_error_and_not_a_catch(
    tmp_path: Path, replacement: str, reason: str
) -> None:
    ended = run("--edits", write_table(tmp_path, FATAL.replace("+ difference**2", f"+ {replacement}")))
    assert ended.returncode == NOTHING_LEARNT
    assert "kl-01" in ended.stderr
    assert reason in ended.stderr


def test_the_page_lists_exactly_the_edits_of_the_table() -> None:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    listed = [row for row in rows if row.split("|")[1].strip()[-2:].isdigit()]
    assert [row[: len(edit_cells(edit))] for row, edit in zip(listed, EDITS, strict=False)] == [
        edit_cells(edit) for edit in EDITS
    ]
    assert len(listed) == len(EDITS), "run: python -m tests.mutation --write"
    assert not any("survived" in row for row in listed)


def test_the_page_says_what_survived_and_escapes_the_bars_of_its_tables(tmp_path: Path) -> None:
    edit = the_edit(tmp_path, "D10 order: a bar\n- a | b\n+ b\n")
    assert "`a \\| b` becomes `b` | **survived** |" in page([edit], [Outcome("", "", "")])
    assert "| `test_x` `test_y` |" in page([edit], [Outcome("test_x.py::test_y", "AssertionError", "")])


def test_every_text_to_replace_occurs_exactly_once_and_every_edit_changes_the_program() -> None:
    for edit in EDITS:
        assert mutate(edit, read_source(edit.module)) != read_source(edit.module)


def test_every_kind_of_edit_and_every_module_occurs_and_no_edit_occurs_twice() -> None:
    assert set(Counter(edit.kind for edit in EDITS)) == set(KINDS)
    assert {edit.module for edit in EDITS} == {path.stem for path in SOURCES.glob("*.py")} - {"__init__"}
    assert len({(edit.module, edit.find, edit.replacement) for edit in EDITS}) == len(EDITS)
    assert len(EDITS) >= 80


@pytest.mark.parametrize("module", sorted({edit.module for edit in EDITS}))
def test_a_trial_begins_with_the_tests_of_its_module_and_leaves_none_out(module: str) -> None:
    named, *others = pure_tests(module)
    others_flat = [path for group in others for path in group]
    assert [Path(path).stem for path in named] == [f"test_ppo_{module}"]
    assert not set(named) & set(others_flat)
    assert len(named) + len(others_flat) >= 10


def test_a_text_that_is_gone_or_occurs_twice_is_refused(tmp_path: Path) -> None:
    edit = the_edit(tmp_path, FATAL)
    with pytest.raises(ValueError, match=r"kl-01: the text must occur exactly once in kl\.py, found 0"):
        mutate(edit, "x = 1\n")
    with pytest.raises(ValueError, match="found 2"):
        mutate(edit, "y = 0.5 * difference**2\nz = 0.5 * difference**2\n")


def test_an_edit_of_a_comment_is_refused(tmp_path: Path) -> None:
    edit = the_edit(tmp_path, FATAL)
    with pytest.raises(ValueError, match="the edit changes nothing"):
        mutate(edit, "x = 1  # 0.5 * difference**2\n")


@pytest.mark.parametrize(
    "text",
    [
        "D10 wrong_term k2 without its half\n- a\n+ b\n",
        "D10 typo: k2 without its half\n- a\n+ b\n",
        "E10 sign: k2 without its half\n- a\n+ b\n",
        "D10 sign: only one side\n- a\n",
        "D10 sign: only one side\n+ a\n",
        "D10 sign: a line of neither side\n- a\nb\n+ c\n",
    ],
)
def test_an_entry_of_another_form_is_refused_by_its_id(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match="kl-02"):
        load_edits(write_table(tmp_path, f"{FATAL}\n{text}"))


def test_an_entry_may_run_over_several_lines_and_comments_count_nowhere(tmp_path: Path) -> None:
    edit = the_edit(tmp_path, "# of one\n\nD1 sign: two lines\n- a\n-     b\n+ c\n+   d\n")
    assert (edit.id, edit.find, edit.replacement) == ("kl-01", "a\n    b", "c\n  d")
