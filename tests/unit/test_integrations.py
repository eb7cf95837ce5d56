"""What the adapters do without a service: texts taken apart, messages read, options checked, nothing heavy loaded."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tether import (
    InvalidArgumentError,
    ItemScore,
    Message,
    NotFoundError,
    ResourceExhaustedError,
    ScoreItem,
    TetherError,
)
from tether.integrations.openrlhf import QueryForm, split_queries
from tether.integrations.openrlhf.__main__ import CONFIG_ERROR_EXIT_CODE, main
from tether.integrations.scoring import CALL_CHARS, ScoringOptions, _parts, read_conversation, rewards_of

SECRET = "canary text"


def scored(value: float) -> ItemScore:
    return ItemScore(value, value, (), 1, False)


def failed(error: TetherError) -> ItemScore:
    return ItemScore(math.nan, math.nan, (), 0, False, error)


def test_importing_the_adapters_loads_nothing_heavy_and_none_of_the_libraries() -> None:
    code = (
        "import json, sys, tether.integrations.trl, tether.integrations.verl, tether.integrations.openrlhf.reward_file;"
        "print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    heavy = {"torch", "numpy", "pydantic", "trl", "openrlhf", "transformers", "uvicorn", "tether_services"}
    assert not heavy & set(json.loads(done.stdout))


@given(st.lists(st.tuples(st.text(), st.text())))
def test_queries_are_split_exactly_where_the_prompt_ends(pairs: list[tuple[str, str]]) -> None:
    items = split_queries([prompt + response for prompt, response in pairs], [prompt for prompt, _ in pairs])
    assert items == [ScoreItem(prompt=prompt, response=response) for prompt, response in pairs]


def test_the_end_text_is_removed_once_and_only_from_the_end() -> None:
    queries = ["a</s>b</s></s>", "ab"]
    items = split_queries(queries, ["a", "a"], form=QueryForm(end_text="</s>"))
    assert [item.response for item in items] == ["</s>b</s>", "b"]


TEMPLATE = "<user>{}<end><bot>"


@given(st.text(), st.text())
def test_a_prompt_made_with_a_template_becomes_a_conversation(message: str, response: str) -> None:
    prompt = TEMPLATE.format(message)
    (item,) = split_queries([prompt + response + "<end>"], [prompt], form=QueryForm(TEMPLATE, "<end>"))
    assert item == ScoreItem(messages=(Message("user", message), Message("assistant", response)))


@pytest.mark.parametrize("prompt", ["hello", "<user>hello", "hello<end><bot>", "<user><bot>", "<user><end><bot> "])
def test_a_prompt_made_without_the_template_is_named(prompt: str) -> None:
    with pytest.raises(InvalidArgumentError, match="PROMPT_MISMATCH") as caught:
        split_queries([prompt + "x"], [prompt], form=QueryForm(TEMPLATE))
    assert caught.value.violations[0].field == "prompts[0]"


@pytest.mark.parametrize("template", ["no place", "{} and {}"])
def test_a_template_has_one_place_for_the_message(template: str) -> None:
    with pytest.raises(InvalidArgumentError, match="prompt_template"):
        QueryForm(template)


def test_a_query_that_does_not_begin_with_its_prompt_says_where_they_part_and_not_what_they_say() -> None:
    with pytest.raises(InvalidArgumentError, match="part after 6") as caught:
        split_queries(["ok", f"{SECRET[:6]}? {SECRET}"], ["o", SECRET])
    assert (caught.value.reason, caught.value.violations[0].field) == ("PROMPT_MISMATCH", "query[1]")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("queries", "prompts", "field"),
    [(["a"], [], "prompts"), ([1], ["a"], "query[0]"), (["a", "b"], ["a", None], "prompts[1]")],
)
def test_lists_that_do_not_fit_are_named(queries: list[Any], prompts: list[Any], field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        split_queries(queries, prompts)
    assert caught.value.violations[0].field == field


def test_an_item_without_a_score_raises_its_own_error_with_the_name_of_the_item() -> None:
    errors = [failed(NotFoundError("Gone.", reason="NO_SUCH")), failed(InvalidArgumentError("Empty."))]
    with pytest.raises(NotFoundError, match="2 of 3 items have no score; the first says: Gone") as caught:
        rewards_of([scored(1.0), *errors], unscored="raise", fields=["c[0]", "c[4]", "c[9]"])
    assert (caught.value.reason, caught.value.violations[0].field) == ("NO_SUCH", "c[4]")


def test_the_delay_that_an_item_asks_for_is_kept() -> None:
    full = failed(ResourceExhaustedError("Full.", retry_after_seconds=2.5))
    with pytest.raises(ResourceExhaustedError) as caught:
        rewards_of([full], unscored="raise", fields=["c[0]"])
    assert caught.value.retry_after_seconds == 2.5


@pytest.mark.parametrize("unscored", [None, -1.5])
def test_a_chosen_reward_takes_the_place_of_a_missing_score_and_is_logged(
    unscored: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    scores = [scored(0.25), failed(InvalidArgumentError("Empty.", reason="EMPTY"))]
    assert rewards_of(scores, unscored=unscored, fields=["a", "b"]) == [0.25, unscored]
    assert "1 of 2 items have no score; the first: EMPTY" in caplog.text


@pytest.mark.parametrize("unscored", ["zero", math.nan, math.inf, True, [0.0]])
def test_an_unscored_that_is_no_reward_is_refused(unscored: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="unscored"):
        ScoringOptions("127.0.0.1:1", unscored=unscored)


def test_a_token_is_not_shown_with_the_options() -> None:
    options = ScoringOptions("127.0.0.1:1", client_options={"token": "tether_secret"})
    assert "secret" not in repr(options)


def test_a_trainer_that_knows_only_numbers_refuses_none() -> None:
    with pytest.raises(InvalidArgumentError, match="verl has no reward that means 'not scored'"):
        ScoringOptions("127.0.0.1:1", unscored=None).need_a_number("verl")


def test_calls_hold_no_more_items_and_characters_than_they_may_and_keep_the_order() -> None:
    short = [ScoreItem(response=str(place)) for place in range(7)]
    assert [len(part) for part in _parts(short, max_items=3)] == [3, 3, 1]
    assert [item for part in _parts(short, max_items=3) for item in part] == short
    half = ScoreItem(prompt="x" * (CALL_CHARS // 2))
    longest = ScoreItem(messages=read_conversation([{"role": "user", "content": "x" * 2 * CALL_CHARS}], field="m"))
    assert [len(part) for part in _parts([half, half, half, longest, half], max_items=9)] == [2, 1, 1, 1]
    assert list(_parts([], max_items=3)) == []


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ("text", "m[0]"),
        ({"role": "user"}, "m[0]"),
        ({"role": "user", "content": [{"type": "image"}]}, "m[0].content"),
        ({"role": "assistant", "content": None}, "m[0].content"),
        ({"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}, "m[0].tool_calls"),
    ],
)
def test_messages_that_reward_models_cannot_read_are_named(message: Any, field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        read_conversation([message], field="m")
    assert caught.value.violations[0].field == field


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--host", "0.0.0.0"], "--insecure"),
        (["--host", "::"], "--insecure"),
        (["--host", "example.org"], "--insecure"),
        (["--prompt-template", "no place"], "prompt_template"),
        (["--timeout", "-1"], "timeout_seconds"),
        (["--unscored", "zero"], "--unscored"),
        (["--unscored", "nan"], "unscored"),
    ],
)
def test_the_endpoint_refuses_a_bad_configuration(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--reward", "127.0.0.1:1", *arguments]) == CONFIG_ERROR_EXIT_CODE
    assert named in capsys.readouterr().err


def test_the_python_of_the_documentation_compiles_and_names_what_there_is() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "integrations.md").read_text(encoding="utf-8")
    blocks = [textwrap.dedent(block) for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)]
    assert len(blocks) == 3
    for block in blocks:
        compile(block, "docs/integrations.md", "exec")
        for line in block.splitlines():
            if line.startswith("from tether."):
                exec(line)
