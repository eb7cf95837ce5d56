from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from tether.errors import InternalError, InvalidArgumentError, TetherError
from tether_services.reward.engine import ScoreTask
from tether_services.reward.engines.rules import RulesEngine, hash_rule
from tether_services.reward.rules import exact_answer, length_band, valid_json

HERE = __name__
FIELD = "models[0].components[2]"
RELEASE = threading.Event()


def count_characters(prompt: str, response: str, *, factor: float = 1.0) -> float:
    return factor * len(response)


def fails_on_bad(prompt: str, response: str) -> float:
    if response == "bad":
        raise ValueError(f"secret {prompt}")
    return 1.0


def gives_text(prompt: str, response: str) -> str:
    return "1.0"


def gives_nothing(prompt: str, response: str) -> None:
    return None


def is_true(prompt: str, response: str) -> bool:
    return True


def waits(prompt: str, response: str) -> float:
    RELEASE.wait(20)
    return 0.0


async def is_async(prompt: str, response: str) -> float:
    return 1.0


def takes_one(prompt: str) -> float:
    return 1.0


def score(function: str, *responses: str, **arguments: object) -> list[float | TetherError]:
    async def main() -> list[float | TetherError]:
        engine = RulesEngine(function, arguments, rule_seconds=60, field=FIELD)
        await engine.start()
        await engine.check()
        try:
            return await engine.score([ScoreTask("a prompt", response) for response in responses])
        finally:
            await engine.close()

    return asyncio.run(main())


def test_the_function_gets_prompt_response_and_arguments() -> None:
    assert score(f"{HERE}:count_characters", "abc", "", factor=0.5) == [1.5, 0.0]
    assert score(f"{HERE}:is_true", "abc") == [1.0]


def test_a_raising_rule_is_an_error_of_that_item_alone_and_names_no_prompt() -> None:
    first, second, third = score(f"{HERE}:fails_on_bad", "good", "bad", "good")
    assert (first, third) == (1.0, 1.0)
    assert isinstance(second, InternalError)
    assert second.reason == "RULE_FAILED"
    assert "raised ValueError" in second.message
    assert "secret" not in second.message and "a prompt" not in second.message


@pytest.mark.parametrize(("function", "kind"), [("gives_text", "str"), ("gives_nothing", "NoneType")])
def test_what_is_not_a_number_is_an_error_and_never_0(function: str, kind: str) -> None:
    (outcome,) = score(f"{HERE}:{function}", "x")
    assert isinstance(outcome, InternalError)
    assert f"returned {kind} instead of a number" in outcome.message


@pytest.mark.parametrize(
    ("function", "arguments", "field", "word"),
    [
        ("no-colon", {}, "function", "not module:function"),
        (":f", {}, "function", "not module:function"),
        ("no_such_module_here:f", {}, "function", "cannot be imported"),
        (f"{HERE}:no_such_function", {}, "function", "no plain function"),
        (f"{HERE}:HERE", {}, "function", "no plain function"),
        (f"{HERE}:is_async", {}, "function", "no plain function"),
        (f"{HERE}:takes_one", {}, "arguments", "cannot be called"),
        (f"{HERE}:count_characters", {"fcator": 2}, "arguments", "fcator"),
        ("tether_services.reward.rules:length_band", {"low": 1}, "arguments", "high"),
    ],
)
def test_a_rule_that_cannot_be_called_is_refused_at_start(
    function: str, arguments: Mapping[str, Any], field: str, word: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=word) as caught:
        RulesEngine(function, arguments, rule_seconds=60, field=FIELD)
    assert caught.value.violations[0].field == f"{FIELD}.{field}"


def test_a_rule_without_source_cannot_be_versioned() -> None:
    with pytest.raises(InvalidArgumentError, match="cannot be hashed"):
        RulesEngine("operator:eq", {}, rule_seconds=60, field=FIELD)


def test_the_hash_follows_source_and_arguments() -> None:
    def digest(rule: Callable[..., object], **arguments: object) -> str:
        return hash_rule(rule, arguments, field=FIELD)  # type: ignore[arg-type]

    assert digest(length_band, low=1, high=2) == digest(length_band, high=2, low=1)
    hashes = [digest(length_band, low=1, high=2), digest(length_band, low=1, high=3), digest(valid_json)]
    assert len(set(hashes)) == 3


@pytest.mark.parametrize(("rule_seconds", "hangs"), [(0.04, True), (60, False)])
def test_a_rule_fails_the_check_once_it_takes_longer_than_it_may(rule_seconds: float, hangs: bool) -> None:
    async def main() -> bool:
        RELEASE.clear()
        engine = RulesEngine(f"{HERE}:waits", {}, rule_seconds=rule_seconds, field=FIELD)
        scoring = asyncio.create_task(engine.score([ScoreTask("p", "r")]))
        await asyncio.sleep(0.05)
        try:
            await asyncio.wait_for(engine.check(), timeout=0.1)
        except TimeoutError:
            stuck = True
        else:
            stuck = False
        RELEASE.set()
        await scoring
        await engine.close()
        return stuck

    assert asyncio.run(main()) is hangs


def test_a_check_fits_between_the_items_of_a_batch() -> None:
    async def main() -> bool:
        engine = RulesEngine(f"{HERE}:count_characters", {}, rule_seconds=60, field=FIELD)
        scoring = asyncio.create_task(engine.score([ScoreTask("p", "r")] * 5000))
        await asyncio.sleep(0)
        await engine.check()
        in_between = not scoring.done()
        await scoring
        await engine.close()
        return in_between

    assert asyncio.run(main())


@pytest.mark.parametrize(
    ("words", "expected"), [(0, 0.0), (1, 0.25), (3, 0.75), (4, 1.0), (8, 1.0), (10, 0.75), (16, 0.0), (40, 0.0)]
)
def test_length_band_is_1_inside_and_falls_outside(words: int, expected: float) -> None:
    assert length_band("", "word " * words, low=4, high=8) == pytest.approx(expected)


@pytest.mark.parametrize(("low", "high"), [(0, 3), (5, 4), (-1, 2)])
def test_length_band_refuses_an_empty_band(low: int, high: int) -> None:
    with pytest.raises(ValueError, match="low and high"):
        length_band("", "x", low=low, high=high)


@pytest.mark.parametrize(
    ("response", "expected"),
    [('{"a": [1, 2.5, null]}', 1.0), ("3", 1.0), ("", 0.0), ("{'a': 1}", 0.0), ('{"a": 1} x', 0.0), ("[" * 10**5, 0.0)],
)
def test_valid_json_judges_whole_documents(response: str, expected: float) -> None:
    assert valid_json("", response) == expected


@pytest.mark.parametrize(
    ("response", "marker", "expected"),
    [
        ("7", "", 1.0),
        (" 7\n", "", 1.0),
        ("70", "", 0.0),
        ("3 and 4 make #### 7", "####", 1.0),
        ("#### 6, no: #### 7", "####", 1.0),
        ("7", "####", 0.0),
        ("", "", 0.0),
    ],
)
def test_exact_answer_compares_with_the_known_one(response: str, marker: str, expected: float) -> None:
    assert exact_answer(" 3 + 4 = ", response, answers={"3 + 4 =": "7"}, marker=marker) == expected


def test_a_prompt_without_a_known_answer_is_an_error_of_the_item() -> None:
    (outcome,) = score("tether_services.reward.rules:exact_answer", "7", answers={"another": "1"})
    assert isinstance(outcome, InternalError)
    assert "KeyError" in outcome.message
