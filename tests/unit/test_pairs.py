"""Rankings as pairs of token ids, and the figures of a policy on them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.rpc.run_services import write_tiny_policy
from tests.unit.preference_inputs import dpo_config
from tether.reference import LogprobItem
from tether_services.recipes.base_model import load_tokenizer
from tether_services.recipes.data.records import Place, Ranking
from tether_services.recipes.data.rendering import Renderer
from tether_services.recipes.pairs import TokenPair, completions_of, encode_pairs, measure_pairs, order_pairs

PLACE = Place("here", 1)


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    return Renderer(load_tokenizer(write_tiny_policy(tmp_path_factory.mktemp("base"))), template="plain")


def ranking(*answers: str, levels: tuple[float, ...], prompt: str = "w4 w5") -> Ranking:
    return Ranking(prompt, answers, levels, PLACE)


def test_all_pairs_put_the_better_answer_first_and_leave_ties_out() -> None:
    assert list(order_pairs((1.0, 3.0, 1.0, 2.0), pairs="all")) == [(1, 0), (3, 0), (1, 2), (1, 3), (3, 2)]


@pytest.mark.parametrize("k", [2, 3, 9])
def test_k_answers_without_ties_are_k_times_k_minus_1_over_2_pairs(k: int) -> None:
    assert len(list(order_pairs(tuple(map(float, range(k))), pairs="all"))) == math.comb(k, 2)


def test_best_and_worst_are_one_pair_and_the_first_of_several_counts() -> None:
    assert list(order_pairs((2.0, 0.0, 2.0, 0.0, 1.0), pairs="best_worst")) == [(0, 1)]


def test_a_pair_is_the_prompt_and_two_answers_that_end(renderer: Renderer, tmp_path: Path) -> None:
    config = dpo_config(tmp_path)
    found = encode_pairs([ranking(" w8", " w6 w7", levels=(0.0, 1.0))], renderer, config)
    assert found.pairs == [TokenPair((1, 4, 5), (6, 7, 2), (8, 2), 3)]
    assert (found.num_overlong, found.num_alike, found.num_tokens) == (0, 0, 11)


def test_more_pairs_come_from_all_than_from_best_and_worst(renderer: Renderer, tmp_path: Path) -> None:
    given = [ranking(" w6", " w7", " w8", " w9", levels=(3.0, 2.0, 2.0, 1.0))]
    counts = {
        kind: len(encode_pairs(given, renderer, dpo_config(tmp_path, pairs=kind)).pairs)
        for kind in ("all", "best_worst")
    }
    assert counts == {"all": 5, "best_worst": 1}


def test_a_long_answer_costs_only_the_pairs_it_is_in(renderer: Renderer, tmp_path: Path) -> None:
    config = dpo_config(tmp_path, max_tokens=8, overlong="drop")
    long = " w6" * 10
    found = encode_pairs([ranking(" w7", " w8", long, levels=(3.0, 2.0, 1.0))], renderer, config)
    assert [(pair.chosen_ids, pair.rejected_ids) for pair in found.pairs] == [((7, 2), (8, 2))]
    assert found.num_overlong == 2


def test_truncation_keeps_one_prompt_for_both_and_the_end_of_each(renderer: Renderer, tmp_path: Path) -> None:
    config = dpo_config(tmp_path, max_tokens=8, overlong="truncate")
    found = encode_pairs([ranking(" w6" * 10, " w7", levels=(2.0, 1.0), prompt="w4 " * 9)], renderer, config)
    (pair,) = found.pairs
    assert pair.prompt_ids[0] == 1
    assert len(pair.prompt_ids) + len(pair.chosen_ids) == 8
    assert pair.chosen_ids[-1] == pair.rejected_ids[-1] == 2
    assert found.num_overlong == 1


def test_answers_that_only_differ_behind_the_cut_are_counted_and_not_learned(
    renderer: Renderer, tmp_path: Path
) -> None:
    config = dpo_config(tmp_path, max_tokens=8, overlong="truncate")
    found = encode_pairs([ranking(" w6" * 20 + " w7", " w6" * 20 + " w8", levels=(2.0, 1.0))], renderer, config)
    assert found.pairs == [] and (found.num_overlong, found.num_alike) == (1, 1)


@pytest.mark.parametrize("kind", ["all", "best_worst"])
def test_a_ranking_with_only_ties_is_counted_and_gives_no_pair(kind: str, renderer: Renderer, tmp_path: Path) -> None:
    given = [ranking(" w6", " w7", levels=(1.0, 1.0)), ranking(" w6", " w7", levels=(1.0, 0.0))]
    found = encode_pairs(given, renderer, dpo_config(tmp_path, pairs=kind))
    assert (len(found.pairs), found.num_only_ties, found.num_alike) == (1, 1, 0)


def test_an_answer_in_many_pairs_is_one_completion(renderer: Renderer, tmp_path: Path) -> None:
    given = [ranking(" w6", " w7", " w8", " w9", levels=(4.0, 3.0, 2.0, 1.0))]
    found = encode_pairs(given, renderer, dpo_config(tmp_path))
    assert len(found.pairs) == 6
    assert set(completions_of(found.pairs)) == {LogprobItem((1, 4, 5), (word, 2)) for word in (6, 7, 8, 9)}
    assert len(completions_of(found.pairs)) == 4


def token_pair(number: int, *, extra: int) -> TokenPair:
    return TokenPair((1, number), (2 * number + 10, 2), (2 * number + 11, 2), extra)


def test_the_figures_are_those_of_a_loop_by_hand() -> None:
    pairs = [token_pair(n, extra=extra) for n, extra in enumerate((5, -3, 0, 2))]
    ratios = [(1.0, -1.0), (0.5, 2.0), (-0.25, -0.25), (4.0, 0.0)]
    reference = {item: -float(sum(item.response_token_ids)) for item in completions_of(pairs)}
    policy = {}
    for pair, (chosen, rejected) in zip(pairs, ratios, strict=True):
        policy[pair.chosen] = reference[pair.chosen] + chosen
        policy[pair.rejected] = reference[pair.rejected] + rejected
    figures = measure_pairs(pairs, policy, reference, beta=0.5)
    assert figures == pytest.approx(
        {
            "accuracy": (1 + 0 + 0.5 + 1) / 4,
            "reward_margin": 0.5 * (2.0 - 1.5 + 0.0 + 4.0) / 4,
            "chosen_logprob_change": 5.25 / 4,
            "rejected_logprob_change": 0.75 / 4,
            "longer_wins": (1 + 0 + 0.5 + 1) / 4,
            "length_baseline": 2.5 / 4,
        }
    )


def test_where_shorter_answers_win_the_length_baseline_chooses_them() -> None:
    pairs = [token_pair(n, extra=extra) for n, extra in enumerate((-1, -2, -3, 4))]
    zeros = dict.fromkeys(completions_of(pairs), 0.0)
    figures = measure_pairs(pairs, zeros, zeros, beta=0.1)
    assert (figures["longer_wins"], figures["length_baseline"]) == (0.25, 0.75)
    assert figures["accuracy"] == 0.5, "a policy that is the reference says nothing"
