"""The K-wise trainer: its loss and gradients, its forward passes, and the library's own numbers for pairs."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast
from transformers.trainer_utils import EvalPrediction
from trl import RewardConfig, RewardTrainer

from tests.unit.tiny_llama import VOCAB_SIZE
from tests.unit.tiny_reward import write_tokenizer
from tether.errors import InvalidArgumentError
from tether_services.recipes.ranking_trainer import RankingTrainer, collate_rankings, mean_figures
from tether_services.recipes.scoring import ROWS_PER_PASS, raw_scores

Row = dict[str, Any]


def new_model(*, pad_token_id: int = 0, seed: int = 0) -> LlamaForSequenceClassification:
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.3,
            num_labels=1,
            pad_token_id=pad_token_id,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def random_rows(sizes: list[int], *, seed: int = 0, levels: int = 100) -> list[Row]:
    """Return rankings of the given sizes with random token ids 3 and above, 1 to 12 of them."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, count: int = 1) -> list[int]:
        return torch.randint(low, high, (count,), generator=generator).tolist()

    return [
        {
            "answer_ids": [[1, *draw(3, VOCAB_SIZE, draw(0, 12)[0]), 2] for _ in range(size)],
            "levels": [float(level) for level in torch.randperm(levels, generator=generator)[:size]],
            "margin": None,
        }
        for size in sizes
    ]


def new_trainer(
    folder: Path, model: nn.Module, rows: list[Row], *, objective: Any = "ranking", **arguments: Any
) -> RankingTrainer:
    write_tokenizer(folder)
    return RankingTrainer(
        objective=objective,
        model=model,
        args=trl_arguments(folder, **arguments),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        processing_class=PreTrainedTokenizerFast.from_pretrained(folder),
    )


def trl_arguments(folder: Path, **changes: Any) -> RewardConfig:
    values: dict[str, Any] = {
        "output_dir": str(folder / "work"),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_length": None,
        "disable_dropout": False,
        "remove_unused_columns": False,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    return RewardConfig(**(values | changes))


def loss_and_gradients(trainer: RankingTrainer, rows: list[Row]) -> tuple[float, dict[str, Tensor]]:
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, collate_rankings(rows))
    torch.autograd.backward(loss)
    return loss.item(), {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def explicit_pair_loss(model: Any, rows: list[Row]) -> Tensor:
    """Return the definition: for each ranking two forward rows for every pair, the mean over pairs, then over rankings.

    A pair is scored alone, without padding.
    """
    losses = []
    for row in rows:
        margin = row["margin"] or 0.0
        pairs = [
            (better, worse)
            for (better, high), (worse, low) in itertools.permutations(
                zip(row["answer_ids"], row["levels"], strict=True), 2
            )
            if high > low
        ]
        scores = [[model(input_ids=torch.tensor([ids])).logits[0, 0] for ids in pair] for pair in pairs]
        losses.append(torch.stack([-nn.functional.logsigmoid(s - t - margin) for s, t in scores]).mean())
    return torch.stack(losses).mean()


def count_rows(model: nn.Module) -> list[int]:
    """Return a list that gets the rows of every forward pass of the model's body from now on."""
    seen: list[int] = []
    body: nn.Module = model.get_submodule("model")
    body.register_forward_pre_hook(lambda _, __, options: seen.append(len(options["input_ids"])), with_kwargs=True)
    return seen


@pytest.mark.parametrize("margin", [None, 0.7])
def test_d33_loss_and_gradients_are_those_of_the_mean_over_explicit_pairs(tmp_path: Path, margin: float | None) -> None:
    rows = [row | {"margin": margin} for row in random_rows([2, 3, 5, 9, 4])]
    rows[3]["levels"][:3] = [1.0, 1.0, 0.0]  # ties
    model = new_model().double()
    loss, gradients = loss_and_gradients(new_trainer(tmp_path, model, rows), rows)
    model.zero_grad()
    slow = explicit_pair_loss(model, rows)
    torch.autograd.backward(slow)
    assert loss == pytest.approx(slow.item(), abs=1e-6)
    assert set(gradients) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-6, rtol=0)


def test_d33_the_forward_passes_have_k_rows_and_not_two_for_every_pair(tmp_path: Path) -> None:
    sizes = [2, 3, 9, 5]
    rows = random_rows(sizes)
    model = new_model()
    trainer = new_trainer(tmp_path, model, rows)
    seen = count_rows(model)
    trainer.compute_loss(model, collate_rankings(rows))
    assert sum(seen) == sum(sizes)
    explicit = sum(size * (size - 1) for size in sizes)
    assert (sum(seen), explicit) == (19, 100)


def test_rows_of_like_length_share_a_pass(tmp_path: Path) -> None:
    model = new_model()
    widths: list[tuple[int, ...]] = []
    model.model.register_forward_pre_hook(
        lambda _, __, options: widths.append(tuple(options["input_ids"].shape)), with_kwargs=True
    )
    rows = random_rows([9] * 8)
    trainer = new_trainer(tmp_path, model, rows)
    trainer.compute_loss(model, collate_rankings(rows))
    lengths = sorted(len(ids) for row in rows for ids in row["answer_ids"])
    passes = [lengths[start : start + ROWS_PER_PASS] for start in range(0, len(lengths), ROWS_PER_PASS)]
    assert widths == [(len(part), max(part)) for part in passes]


def test_a_ranking_of_only_ties_has_a_loss_in_a_regression_and_no_part_in_the_accuracy(tmp_path: Path) -> None:
    rows = random_rows([3, 2, 4])
    rows[1]["levels"] = [5.0, 5.0]
    trainer = new_trainer(tmp_path, new_model(), rows, objective="regression")
    found = trainer.evaluate()
    expected = [loss_and_gradients(trainer, [row])[0] for row in rows]
    assert found["eval_loss"] == pytest.approx(sum(expected) / 3, rel=1e-5)
    without = [trainer.evaluate(Dataset.from_list([rows[place]]))["eval_accuracy"] for place in (0, 2)]
    assert found["eval_accuracy"] == pytest.approx(sum(without) / 2, abs=1e-6)


def test_the_flat_batch_keeps_rankings_apart() -> None:
    rows = [
        {"answer_ids": [[1, 5], [1]], "levels": [1.0, 0.0], "margin": None},
        {"answer_ids": [[1, 7, 8], [1, 9], [3]], "levels": [2.0, 0.0, 1.0], "margin": 0.5},
    ]
    batch = {name: tensor.tolist() for name, tensor in collate_rankings(rows).items()}
    assert batch == {
        "input_ids": [[1, 5, 0], [1, 0, 0], [1, 7, 8], [1, 9, 0], [3, 0, 0]],
        "lengths": [2, 1, 3, 2, 1],
        "levels": [1, 0, 2, 0, 1],
        "sizes": [2, 3],
        "margins": [0.0, 0.5],
    }


def test_d34_an_answer_without_a_token_is_an_error_not_a_number() -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        collate_rankings([{"answer_ids": [[1], []], "levels": [1.0, 0.0]}])
    assert caught.value.violations[0].field == "token_ids"


def scores_alone(model: Any, rows: list[list[int]]) -> Tensor:
    return torch.cat([raw_scores(model, torch.tensor([ids]), torch.tensor([len(ids)])) for ids in rows])


@torch.no_grad()
def test_d34_padding_and_order_do_not_reach_the_scores() -> None:
    model = new_model().eval()
    rows = [[1, *range(3, 3 + length)] for length in [5, 1, 9, 3, 30] * 5]
    lengths = torch.tensor([len(ids) for ids in rows])
    for fill in (0, 2, 44):
        padded = torch.full((len(rows), 40), fill)
        for place, ids in enumerate(rows):
            padded[place, : len(ids)] = torch.tensor(ids)
        torch.testing.assert_close(raw_scores(model, padded, lengths), scores_alone(model, rows), atol=1e-5, rtol=0)


@torch.no_grad()
def test_d34_the_score_is_that_of_the_end_token_even_where_it_is_the_padding_token() -> None:
    model = new_model(pad_token_id=2).eval()
    ids = [1, 7, 8, 2]
    hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
    ours = scores_alone(model, [ids])
    torch.testing.assert_close(ours, model.score(hidden), atol=1e-6, rtol=0)
    assert not torch.allclose(ours, model(input_ids=torch.tensor([ids])).logits[0], atol=1e-3), "the library's search"


@torch.no_grad()
def test_d32_the_head_computes_in_float32_over_a_bfloat16_body() -> None:
    model = new_model().eval()
    full = scores_alone(model, [[1, 7, 8, 2]])
    model.model.bfloat16()
    half = scores_alone(model, [[1, 7, 8, 2]])
    assert half.dtype == torch.float32
    assert float((half - full).abs()) < 0.1 * max(1.0, float(full.abs()))


def test_a_ranking_of_two_trains_as_the_librarys_own_trainer_does(tmp_path: Path) -> None:
    """The text goes through the library's tokenising there and through ours here; the losses are the library's."""
    rows = random_rows([2] * 24, seed=3)
    chosen = [row["answer_ids"][0 if row["levels"][0] > row["levels"][1] else 1] for row in rows]
    rejected = [row["answer_ids"][0 if row["levels"][0] < row["levels"][1] else 1] for row in rows]
    pairs = [{"chosen_ids": c, "rejected_ids": r} for c, r in zip(chosen, rejected, strict=True)]
    model = new_model()
    write_tokenizer(tmp_path)
    plain = RewardTrainer(
        model=copy.deepcopy(model),
        args=trl_arguments(tmp_path, max_steps=9),
        train_dataset=Dataset.from_list(pairs),
        processing_class=PreTrainedTokenizerFast.from_pretrained(tmp_path),
    )
    ours = new_trainer(tmp_path, model, rows, max_steps=9)
    losses = []
    for trainer in (plain, ours):
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 9
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert abs(losses[0][0] - losses[0][-1]) > 0.05, "nothing was learned, so nothing was compared"
    for mine, theirs in zip(ours.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)


def test_margins_of_pairs_are_the_librarys(tmp_path: Path) -> None:
    rows = [row | {"margin": 0.3 * place} for place, row in enumerate(random_rows([2] * 4))]
    for row in rows:
        row["levels"] = [1.0, 0.0]
    model = new_model()
    write_tokenizer(tmp_path)
    plain = RewardTrainer(
        model=copy.deepcopy(model),
        args=trl_arguments(tmp_path),
        train_dataset=Dataset.from_list(
            [
                {"chosen_ids": row["answer_ids"][0], "rejected_ids": row["answer_ids"][1], "margin": row["margin"]}
                for row in rows
            ]
        ),
        processing_class=PreTrainedTokenizerFast.from_pretrained(tmp_path),
    )
    theirs = plain.compute_loss(plain.model, plain.data_collator(list(plain.train_dataset)))
    ours = new_trainer(tmp_path, model, rows).compute_loss(model, collate_rankings(rows))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_accumulated_micro_batches_give_the_step_of_one_batch(tmp_path: Path) -> None:
    rows = random_rows([2, 5, 3, 4] * 4)
    after = []
    for micro, accumulated in ((8, 1), (2, 4)):
        trainer = new_trainer(
            tmp_path,
            new_model(),
            rows,
            max_steps=3,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=accumulated,
        )
        trainer.train()
        after.append(torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()]))
    torch.testing.assert_close(after[0], after[1], atol=1e-4, rtol=0)


def test_regression_is_the_squared_error_against_the_levels(tmp_path: Path) -> None:
    rows = random_rows([2, 5], levels=6)
    model = new_model()
    trainer = new_trainer(tmp_path, model, rows, objective="regression")
    loss = trainer.compute_loss(model, collate_rankings(rows))
    slow = []
    for row in rows:
        scores = scores_alone(model, row["answer_ids"]).tolist()
        slow.append(sum((s - t) ** 2 for s, t in zip(scores, row["levels"], strict=True)) / len(scores))
    assert loss.item() == pytest.approx(sum(slow) / 2, rel=1e-5)


def test_every_ranking_counts_once_in_the_evaluation_even_in_a_small_last_batch(tmp_path: Path) -> None:
    rows = random_rows([2, 5, 3, 4, 2])  # batches of 4 and 1
    model = new_model()
    trainer = new_trainer(tmp_path, model, rows)
    found = trainer.evaluate()
    with torch.no_grad():
        losses = [trainer.compute_loss(model.eval(), collate_rankings([row])).item() for row in rows]
    assert found["eval_loss"] == pytest.approx(sum(losses) / 5, abs=1e-6)
    assert 0.0 <= found["eval_accuracy"] <= 1.0


def test_figures_are_means_over_rankings() -> None:
    predictions = torch.tensor([[0.5, 1.0], [1.5, 0.0], [1.0, 0.5]]).numpy()
    assert mean_figures(EvalPrediction(predictions, predictions[:, 0])) == {"loss": 1.0, "accuracy": 0.5}


def test_training_logs_the_accuracy_of_its_own_batches(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path, new_model(), random_rows([3] * 8), max_steps=2)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(0.0 <= entry["accuracy"] <= 1.0 for entry in logged)
    assert not {"num_tokens", "min_reward"} & set(logged[0])
