"""What the reference says: kept for a resume, divided into calls, compared, and computed as a plain forward does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.unit.preference_inputs import dpo_config
from tests.unit.test_dpo import built, sequence_logprob
from tether.errors import FailedPreconditionError
from tether.reference import LogprobItem
from tether_services.recipes.pairs import completions_of
from tether_services.recipes.reference_logprobs import (
    CALL_TOKENS,
    check_agreement,
    completion_logprobs,
    divide_into_calls,
    kept,
)

ITEMS = [LogprobItem((1, 4), (5, 2)), LogprobItem((1,), (6, 7, 2))]


class Asked:
    """Answers and counts how often."""

    def __init__(self, *answers: float) -> None:
        self.answers, self.times = list(answers), 0

    def __call__(self) -> list[float]:
        self.times += 1
        return self.answers


def test_an_answer_is_asked_for_once_and_read_back_exactly(tmp_path: Path) -> None:
    path, ask = tmp_path / "reference.json", Asked(-1.0 / 3.0, -1e-17)
    assert kept(ITEMS, ask, path=path, base_sha256="a") == kept(ITEMS, ask, path=path, base_sha256="a") == ask.answers
    assert ask.times == 1


@pytest.mark.parametrize(("items", "base"), [(ITEMS[::-1], "a"), (ITEMS[:1], "a"), (ITEMS, "b")])
def test_other_answers_or_another_base_are_asked_about_anew(
    tmp_path: Path, items: list[LogprobItem], base: str
) -> None:
    path, ask = tmp_path / "reference.json", Asked(-1.0, -2.0)
    kept(ITEMS, ask, path=path, base_sha256="a")
    kept(items, ask, path=path, base_sha256=base)
    assert ask.times == 2


def test_the_border_of_prompt_and_response_tells_items_apart(tmp_path: Path) -> None:
    path, ask = tmp_path / "reference.json", Asked(-1.0)
    kept([LogprobItem((1, 2), (3,))], ask, path=path, base_sha256="a")
    kept([LogprobItem((1,), (2, 3))], ask, path=path, base_sha256="a")
    assert ask.times == 2


def test_an_answer_that_is_no_number_is_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "reference.json"
    with pytest.raises(ValueError, match="JSON"):
        kept(ITEMS, Asked(float("nan"), -1.0), path=path, base_sha256="a")
    assert list(tmp_path.iterdir()) == []


def test_a_call_has_at_most_so_many_items_and_tokens_and_the_order_stays() -> None:
    items = [LogprobItem((1,) * (CALL_TOKENS // 4 - 1), (n,)) for n in range(11)]
    assert [len(call) for call in divide_into_calls(items, max_items=64)] == [4, 4, 3]
    calls = divide_into_calls(items, max_items=3)
    assert [len(call) for call in calls] == [3, 3, 3, 2]
    assert [item for call in calls for item in call] == items


def test_an_item_longer_than_a_call_goes_alone() -> None:
    long, short = LogprobItem((1,) * (2 * CALL_TOKENS), (2,)), LogprobItem((1,), (2,))
    assert divide_into_calls([short, long, short], max_items=8) == [[short], [long], [short]]


@pytest.mark.parametrize(("distance", "is_float32"), [(0.009, True), (0.4, False)])
def test_rounding_is_accepted(distance: float, is_float32: bool) -> None:
    check_agreement([-5.0 + distance, -7.0], [-5.0, -7.0], num_tokens=10, is_float32=is_float32)


@pytest.mark.parametrize(("distance", "is_float32"), [(0.02, True), (-0.02, True), (0.6, False), (float("nan"), True)])
def test_another_arithmetic_is_refused(distance: float, is_float32: bool) -> None:
    with pytest.raises(FailedPreconditionError, match="dtype and quantization") as caught:
        check_agreement([-5.0 + distance, -7.0], [-5.0, -7.0], num_tokens=10, is_float32=is_float32)
    assert caught.value.reason == "REFERENCE_DIFFERS"
    assert [violation.field for violation in caught.value.violations] == ["reference"]


def test_sums_are_those_of_plain_forward_passes_in_the_order_of_the_items(tmp_path: Path) -> None:
    trainer, pairs, _ = built(tmp_path / "base", dpo_config(tmp_path), work=tmp_path / "work")
    items = completions_of(pairs.pairs)[::-1]
    found = completion_logprobs(trainer, items, title="test")
    trainer.model.eval()
    expected = [sequence_logprob(trainer.model, item, mean=False) for item in items]
    assert found == pytest.approx(expected, abs=1e-4)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    assert abs(found[0] - sequence_logprob(base, items[0], mean=False)) > 0.01, "the adapter is part of it"


def test_the_model_is_left_in_the_mode_it_was_in(tmp_path: Path) -> None:
    config = dpo_config(tmp_path, lora={"rank": 4, "dropout": 0.5})
    trainer, pairs, _ = built(tmp_path / "base", config, work=tmp_path / "work")
    items = completions_of(pairs.pairs)
    trainer.model.train()
    first = completion_logprobs(trainer, items, title="test")
    assert trainer.model.training
    assert completion_logprobs(trainer, items, title="test") == first, "no dropout"
    trainer.model.eval()
    completion_logprobs(trainer, items, title="test")
    assert not trainer.model.training
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_the_kept_file_is_json_that_names_what_it_is_about(tmp_path: Path) -> None:
    path = tmp_path / "reference.json"
    kept(ITEMS, Asked(-1.5, -2.5), path=path, base_sha256="a")
    content = json.loads(path.read_text())
    assert content["logprobs"] == [-1.5, -2.5] and len(content["items_sha256"]) == 64
