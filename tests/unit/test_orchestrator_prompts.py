"""Prompts: read, set apart, shuffled and seeded the same way every time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.unit.run_inputs import run_config, write_prompts
from tether.errors import InvalidArgumentError
from tether_services.orchestrator.prompt_sources import load_prompt_lists
from tether_services.orchestrator.prompts import (
    Prompt,
    PromptSet,
    derive_seed,
    encode_prompts,
    hash_prompts,
    read_prompts,
    split_prompts,
    step_prompts,
)

PROMPTS = tuple(Prompt(str(i), (i,)) for i in range(10))


def test_a_text_file_has_one_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes(b"one\r\n\n two \nthree")
    assert read_prompts(path, field="prompts") == ["one", " two ", "three"]


def test_a_jsonl_file_has_one_object_a_line(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a\\nb", "id": 1}\n\n{"prompt": "c"}\n')
    assert read_prompts(path, field="prompts") == ["a\nb", "c"]


@pytest.mark.parametrize(
    "line", ["not json", "[1]", "{}", '{"prompt": 3}', '{"prompt": ""}', "null", '{"prompt": "\\ud800"}', "[" * 9999]
)
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(InvalidArgumentError, match="line 2") as caught:
        read_prompts(path, field="prompts")
    assert caught.value.violations[0].field == "prompts"


def test_files_that_cannot_be_prompts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "p.csv").write_text("a\n")
    os.mkfifo(tmp_path / "pipe.txt")  # opening it would wait for a writer for ever
    (tmp_path / "folder.txt").mkdir()
    for name, why in {
        "empty.txt": "no prompt",
        "latin.txt": "UTF-8",
        "p.csv": ".jsonl",
        "absent.txt": "No such file",
        "a\0b.txt": "null",
        "a" * 5000 + ".txt": "too long",
        "pipe.txt": "no regular file",
        "folder.txt": "no regular file",
        ".": ".jsonl",
    }.items():
        with pytest.raises(InvalidArgumentError, match=why):
            read_prompts(tmp_path / name, field="evaluation_prompts")


def test_a_line_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"fine\n\ncaf\xe9\n")
    with pytest.raises(InvalidArgumentError, match="line 3 is not UTF-8"):
        read_prompts(tmp_path / "p.txt", field="prompts")


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbfonce\nupon\n")
    assert read_prompts(tmp_path / "p.txt", field="prompts") == ["once", "upon"]


def test_the_tail_is_held_out(tmp_path: Path) -> None:
    training, held_out = split_prompts(run_config(tmp_path), ["a", "b", "c", "d"], None)
    assert (training, held_out) == (["a", "b"], ["c", "d"])


def test_held_out_prompts_of_their_own_leave_the_others_whole(tmp_path: Path) -> None:
    training, held_out = split_prompts(run_config(tmp_path), ["a", "b"], ["x", "y", "z"])
    assert (training, held_out) == (["a", "b"], ["x", "y"])
    with pytest.raises(InvalidArgumentError, match="at least 2"):
        split_prompts(run_config(tmp_path), ["a", "b"], ["x"])


def test_without_evaluation_all_prompts_are_trained_on(tmp_path: Path) -> None:
    assert split_prompts(run_config(tmp_path, "evaluation = false"), ["a"], None) == (["a"], [])


def test_prompts_that_are_too_long_are_left_out_and_counted(tmp_path: Path) -> None:
    config = run_config(tmp_path, "max_prompt_tokens = 3")
    (tmp_path / "prompts.txt").write_text("aaaa\nbb\ncc\ndddd\nee\nff\n")
    prompts = encode_prompts(config, *load_prompt_lists(config), lambda text: [ord(c) for c in text])
    assert [p.text for p in prompts.training] == ["bb", "cc"]
    assert [p.text for p in prompts.held_out] == ["ee", "ff"]
    assert prompts.training[0].token_ids == (98, 98)
    assert prompts.num_too_long == 2


def test_too_few_short_prompts_name_the_limit(tmp_path: Path) -> None:
    write_prompts(tmp_path / "prompts.txt")
    config = run_config(tmp_path, "max_prompt_tokens = 3")
    with pytest.raises(InvalidArgumentError) as caught:
        encode_prompts(config, *load_prompt_lists(config), lambda text: [1] * len(text))
    assert caught.value.violations[0].field == "max_prompt_tokens"


def test_d7_all_seeds_differ_between_runs_steps_and_prompts() -> None:
    seeds = {derive_seed(seed, step, index) for seed in range(5) for step in range(50) for index in range(64)}
    assert len(seeds) == 5 * 50 * 64
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_d7_a_seed_depends_on_nothing_but_its_parts() -> None:
    assert derive_seed(1, 2, 3) == derive_seed(1, 2, 3)
    assert derive_seed(1, 23) != derive_seed(12, 3)
    assert derive_seed(1, "evaluation", 0) != derive_seed(1, 0, 0)


def test_a_pass_uses_every_prompt_once() -> None:
    chosen = [p for step in range(5) for p in step_prompts(PROMPTS, step=step, count=2, seed=3)]
    assert sorted(p.text for p in chosen) == sorted(p.text for p in PROMPTS)
    assert chosen != list(PROMPTS)


def test_the_next_pass_has_another_order() -> None:
    first = step_prompts(PROMPTS, step=0, count=10, seed=3)
    second = step_prompts(PROMPTS, step=1, count=10, seed=3)
    assert first != second
    assert set(first) == set(second)


def test_a_step_across_the_end_of_a_pass_goes_on_with_the_next() -> None:
    whole = [p for step in range(2) for p in step_prompts(PROMPTS, step=step, count=10, seed=3)]
    parts = [p for step in range(5) for p in step_prompts(PROMPTS, step=step, count=4, seed=3)]
    assert parts == whole


def test_a_step_larger_than_the_file_repeats_prompts() -> None:
    chosen = step_prompts(PROMPTS[:3], step=0, count=7, seed=0)
    assert len(chosen) == 7
    assert set(chosen) == set(PROMPTS[:3])


def test_the_order_depends_on_the_seed_and_not_on_earlier_steps() -> None:
    alone = step_prompts(PROMPTS, step=4, count=3, seed=1)
    assert alone == step_prompts(PROMPTS, step=4, count=3, seed=1)
    assert any(step_prompts(PROMPTS, step=4, count=3, seed=seed) != alone for seed in range(2, 6))


def test_the_hash_of_the_prompts_changes_with_every_part_of_them() -> None:
    first, second = Prompt("a", (1, 2)), Prompt("b", (12,))
    sets = [
        PromptSet((first, second), (), 0),
        PromptSet((second, first), (), 0),
        PromptSet((first,), (second,), 0),
        PromptSet((first, Prompt("b", (1, 2))), (), 0),
    ]
    hashes = [hash_prompts(prompts) for prompts in sets]
    assert len({*hashes, hash_prompts(sets[0], ["text"]), hash_prompts(sets[0], ["te", "xt"])}) == 6
    assert hashes[0] == hash_prompts(PromptSet((Prompt("other text", (1, 2)), second), (), 5)), "the token ids count"
    assert first.sha256 != Prompt("a", (12,)).sha256
