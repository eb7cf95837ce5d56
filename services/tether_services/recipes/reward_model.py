"""`tether train reward`: a reward model from rankings of K answers, pairs, or labelled sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from trl import RewardConfig

from tether.errors import InvalidArgumentError
from tether_services.recipes.base_model import base_folder, load_tokenizer
from tether_services.recipes.config import DataConfig, RewardModelConfig
from tether_services.recipes.data.inspection import length_preference
from tether_services.recipes.data.reading import (
    DataReport,
    read_all_demonstrations,
    read_all_documents,
    read_labelled,
    read_parts,
    read_rankings,
)
from tether_services.recipes.data.records import Document, LabelledText
from tether_services.recipes.data.rendering import Renderer, fit
from tether_services.recipes.data.shapes import SHAPES, Record
from tether_services.recipes.dropout import residual_dropout
from tether_services.recipes.estimate import estimate, show_estimate
from tether_services.recipes.ranking_metrics import Evaluation, Judged, evaluate_rankings
from tether_services.recipes.ranking_trainer import RankingTrainer
from tether_services.recipes.rankings import RankingRows, encode_rankings, labelled_pools, labelled_rankings
from tether_services.recipes.reward_report import draw_calibration, evaluation_page
from tether_services.recipes.scoring import build_reward_model, normalise, score_all, write_reward_model
from tether_services.recipes.stage import Mode, Stage, open_stage
from tether_services.runtime.durable import write_text

__all__ = ["Material", "evaluate", "read_material", "run_reward_model"]

MAX_BEST_ANSWERS = 2000
"""Best answers that the scale is computed from where no demonstrations are named: an evenly spaced part of them."""
PROBED_ROWS = 100
"""Rows of a source that are read to tell what it holds."""


@dataclass(frozen=True, slots=True)
class FittedTexts:
    """Texts that fix the scale."""

    token_ids: list[list[int]]
    """Of each text."""
    num_overlong: int = 0
    """Texts left out or cut because they were longer than `max_tokens`."""


@dataclass(frozen=True, slots=True)
class Material:
    """Everything the stage reads, as token ids."""

    train: RankingRows
    validation: RankingRows
    demonstrations: FittedTexts
    """Texts whose scores get mean 0 and standard deviation 1."""
    is_ordered: bool
    """Whether `train` holds all passes in the order to train on, and not one pass to be shuffled."""
    longer_wins: float | None
    """Share of all pairs read, training included, whose better answer is the longer one; None for labelled texts."""
    report: DataReport


def run_reward_model(config: RewardModelConfig, mode: Mode | None = None) -> Path:
    """Train a reward model, fix its scale, measure it, and return the output folder: an adapter or a whole model.

    Raises:
        InvalidArgumentError: A data file, the base or a setting does not fit.
        FailedPreconditionError: The output folder belongs to other settings, or the loss is no longer finite.
    """
    with open_stage("reward", config, mode or Mode()) as stage:
        return config.output if stage.is_finished else _run(stage, config)


def _run(stage: Stage, config: RewardModelConfig) -> Path:
    folder = base_folder(config)
    tokenizer = load_tokenizer(folder)
    material = read_material(config, Renderer(tokenizer, template=config.template))
    model = build_reward_model(config, folder, pad_token_id=tokenizer.pad_token_id)
    running = replace(stage, config=_one_pass(config)) if material.is_ordered else stage
    trainer = _trainer(running, config, model, material, tokenizer=tokenizer)
    with residual_dropout(model, share=config.dropout):
        if stage.mode.dry_run:
            show_estimate(estimate(trainer, running.config, num_tokens=material.train.num_tokens), title="reward")
            return config.output
        metrics = running.train(trainer)
    normalisation = normalise(trainer.model, material.demonstrations.token_ids)
    ends_text = _ends_text(material, tokenizer.eos_token_id)
    write_reward_model(trainer.model, tokenizer, config, normalisation, ends_text=ends_text)
    evaluation = evaluate(trainer.model, material.validation)
    write_text(config.output / "evaluation.md", evaluation_page(evaluation, longer_wins=material.longer_wins))
    draw_calibration(evaluation.bins, title="calibration", path=config.output / "plots" / "calibration.svg")
    figures = {"normalisation": asdict(normalisation), "evaluation": evaluation.as_dict()}
    return stage.finish(metrics={**metrics, **figures, **_counts(material)}, data=material.report.as_dict())


def _one_pass(config: RewardModelConfig) -> RewardModelConfig:
    """Return the settings for rows that hold all passes already."""
    return config.model_copy(update={"training": config.training.model_copy(update={"num_epochs": 1.0})})


def _ends_text(material: Material, end_id: int) -> bool:
    """Return whether every text of the training ended with the token that the service would put behind a text."""
    return all(ids[-1] == end_id for row in material.train.rows for ids in row["answer_ids"])


def _trainer(
    stage: Stage, config: RewardModelConfig, model: Any, material: Material, *, tokenizer: Any
) -> RankingTrainer:
    arguments = RewardConfig(
        **stage.arguments(num_rows=len(material.train.rows)),
        max_length=None,
        disable_dropout=False,
        remove_unused_columns=False,
        train_sampling_strategy="sequential" if material.is_ordered else "random",
    )
    return RankingTrainer(
        objective=config.objective,
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(material.train.rows),
        eval_dataset=Dataset.from_list(material.validation.rows),
        processing_class=tokenizer,
    )


def read_material(config: RewardModelConfig, renderer: Renderer) -> Material:
    """Return the data as token ids: rankings, pairs, or labelled texts made into rankings.

    Raises:
        InvalidArgumentError: A source does not fit, nothing is left of it, or the objective has no scores.
    """
    if _kind_of(config.data) is LabelledText:
        return _labelled_material(config, renderer)
    return _ranking_material(config, renderer)


def _ranking_material(config: RewardModelConfig, renderer: Renderer) -> Material:
    data = read_rankings(config.data, field="data")
    if config.objective == "regression" and not all(item.is_scored for item in (*data.train, *data.validation)):
        message = "regression needs answers with scores; there are ranks only: set objective to ranking"
        raise InvalidArgumentError(message, field="objective")
    train, validation = (encode_rankings(part, renderer, config) for part in (data.train, data.validation))
    _check_left(train, validation)
    best = FittedTexts([row["answer_ids"][int(np.argmax(row["levels"]))] for row in train.rows])
    length = length_preference((*data.train, *data.validation))
    longer_wins = length.longer_wins if length else None
    return Material(train, validation, _demonstrations(config, renderer, best), False, longer_wins, data.report)


def _check_left(train: RankingRows, validation: RankingRows) -> None:
    """Refuse to go on without a ranking to train on and one to measure on, which only ties are none of."""
    num_telling = sum(len(set(row["levels"])) > 1 for row in validation.rows)
    if not train.rows or not num_telling:
        message = f"{len(train.rows)} rankings to train on and {num_telling} to measure on are left"
        raise InvalidArgumentError(f"{message}; raise max_tokens or give more data", field="data.sources")


def _labelled_material(config: RewardModelConfig, renderer: Renderer) -> Material:
    if config.objective == "regression":
        message = "regression needs answers with scores; labels are none: set objective to ranking"
        raise InvalidArgumentError(message, field="objective")
    data = read_labelled(config.data, field="data")
    train = labelled_rankings(data.train, renderer, config)
    best = _fitted([([], renderer.document_ids(item.text)) for item in data.train if item.label == 1], config)
    validation = labelled_pools(data.validation, renderer, config)
    _check_left(train, validation)
    return Material(train, validation, _demonstrations(config, renderer, best), True, None, data.report)


def _demonstrations(config: RewardModelConfig, renderer: Renderer, best: FittedTexts) -> FittedTexts:
    """Return the texts that fix the scale: the configured ones, all of them, or a part of the best answers.

    `demonstration_tokens` takes the first tokens of prompt and answer together, without an end token.
    """
    if config.demonstrations is None:
        part = best.token_ids[:: -(-len(best.token_ids) // MAX_BEST_ANSWERS) or 1]
        return FittedTexts(part, best.num_overlong)
    pieces: list[tuple[list[int], list[int]]]
    if _kind_of(config.demonstrations) is Document:
        texts = read_all_documents(config.demonstrations, field="demonstrations")
        pieces = [([], renderer.document_ids(item.text)) for item in texts]
    else:
        shown = read_all_demonstrations(config.demonstrations, field="demonstrations")
        pieces = [(renderer.prompt_ids(i.prompt), renderer.answer_ids(i.prompt, i.answer)) for i in shown]
    if config.demonstration_tokens:
        most = min(config.demonstration_tokens, config.max_tokens)
        return FittedTexts([(prompt + answer)[:most] for prompt, answer in pieces])
    fitted = _fitted(pieces, config)
    if not fitted.token_ids:
        message = f"all {len(pieces)} demonstrations are longer than max_tokens = {config.max_tokens}"
        raise InvalidArgumentError(f"{message}; raise it or set overlong to truncate", field="demonstrations")
    return fitted


def _fitted(pieces: Sequence[tuple[list[int], list[int]]], config: RewardModelConfig) -> FittedTexts:
    """Return texts of a prompt, which may be empty, and an answer, each of at most `max_tokens`."""
    num_overlong = sum(len(prompt) + len(answer) > config.max_tokens for prompt, answer in pieces)
    found = (fit(p, [answer], max_tokens=config.max_tokens, overlong=config.overlong) for p, answer in pieces)
    return FittedTexts([prompt + answers[0] for prompt, answers in filter(None, found)], num_overlong)


def _kind_of(data: DataConfig) -> type[Record]:
    """Return what the first source holds."""
    if data.shape != "auto":
        return SHAPES[data.shape].record
    first = {"sources": data.sources[:1], "validation_sources": (), "max_rows": PROBED_ROWS}
    (probed,) = read_parts(data.model_copy(update=first), kind=None)
    return SHAPES[probed.shapes[data.sources[0]]].record


def evaluate(model: Any, rankings: RankingRows) -> Evaluation:
    """Return the figures of a model on encoded rankings, those with only ties left out."""
    scores = score_all(model, [ids for row in rankings.rows for ids in row["answer_ids"]]).double()
    groups = torch.split(scores, [len(row["levels"]) for row in rankings.rows])
    judged = [
        Judged(group.numpy(), np.array(row["levels"], dtype=float), np.array(lengths, dtype=float))
        for group, row, lengths in zip(groups, rankings.rows, rankings.lengths, strict=True)
        if len(set(row["levels"])) > 1
    ]
    return evaluate_rankings(judged)


def _counts(material: Material) -> dict[str, Any]:
    return {
        "longer_wins_in_all_data": material.longer_wins,
        "train_rankings": len(material.train.rows),
        "train_answers": material.train.num_answers,
        "train_tokens": material.train.num_tokens,
        "validation_rankings": len(material.validation.rows),
        "overlong_records": material.train.num_overlong + material.validation.num_overlong,
        "overlong_demonstrations": material.demonstrations.num_overlong,
        "alike_answers": material.train.num_alike + material.validation.num_alike,
        "only_ties": material.train.num_only_ties + material.validation.num_only_ties,
    }
