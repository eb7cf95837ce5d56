"""`tether train dpo`: direct preference optimisation on pairs of a ranking, without a reward model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import TaskType
from torch import Tensor
from transformers import AutoModelForCausalLM
from trl import DPOConfig as TrlDpoConfig
from trl import DPOTrainer

from tether.errors import InvalidArgumentError
from tether_services.recipes.artifact import relative_base, write_adapter
from tether_services.recipes.base_model import base_folder, load_base, load_tokenizer, with_adapter
from tether_services.recipes.config import DpoConfig
from tether_services.recipes.data.reading import DataSet, read_rankings
from tether_services.recipes.data.records import Ranking
from tether_services.recipes.data.rendering import Renderer
from tether_services.recipes.estimate import estimate, show_estimate
from tether_services.recipes.pairs import Logprobs, Pairs, TokenPair, completions_of, encode_pairs, measure_pairs
from tether_services.recipes.plots import draw_rewards
from tether_services.recipes.progress import tracked
from tether_services.recipes.reference_logprobs import (
    ask_service,
    check_agreement,
    check_service,
    completion_logprobs,
    kept,
)
from tether_services.recipes.sft import write_model
from tether_services.recipes.stage import Mode, Stage, open_stage
from tether_services.recipes.weighted_loss import BatchFreeLoss
from tether_services.runtime.content_hash import hash_model_folder

__all__ = ["PairTrainer", "build_trainer", "run_dpo", "with_reference"]

REFERENCE_NAME = "reference.json"
COMPARED_ITEMS = 8
"""Answers on which a reference service must agree with the base as it is loaded here."""


class PairTrainer(BatchFreeLoss, DPOTrainer):  # type: ignore[misc]  # TRL is untyped here
    """TRL's trainer on rows that are token ids already and bring the reference's log-probabilities along.

    It makes neither token ids nor log-probabilities of its own, and no second adapter that stands for the reference.
    """

    def __init__(self, *, smoothing: float, **arguments: Any) -> None:
        """Build TRL's trainer.

        TRL's sigmoid loss knows no label smoothing. With A = -log sigmoid(beta x) and B = -log sigmoid(-beta x) its
        robust loss is ((1 - s) A - s B) / (1 - 2 s); at s = -e / (1 - 2 e) this is the (1 - e) A + e B of D36.

        Args:
            smoothing: e, 0 but for the robust loss.
            arguments: TRL's own.
        """
        super().__init__(**arguments)
        self.label_smoothing = -smoothing / (1.0 - 2.0 * smoothing)
        if "ref" in getattr(self.model, "peft_config", {}):
            self.model.delete_adapter("ref")

    def weight_of(self, inputs: dict[str, Tensor]) -> int:
        """Return the pairs of a batch; both answers of one are rows of it."""
        return len(inputs["input_ids"]) // 2

    def _prepare_dataset(self, dataset: Dataset, *arguments: object) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        return dataset


def run_dpo(config: DpoConfig, mode: Mode | None = None) -> Path:
    """Train on pairs of ranked answers and return the output folder: an adapter, or with rank 0 a whole model.

    Raises:
        InvalidArgumentError: A data file or a setting does not fit.
        FailedPreconditionError: The output folder belongs to other settings, the reference service holds another
            model, or the loss is no longer finite.
    """
    with open_stage("dpo", config, mode or Mode()) as stage:
        return config.output if stage.is_finished else _run(stage, config)


def _run(stage: Stage, config: DpoConfig) -> Path:
    folder = base_folder(config)
    base_sha256 = hash_model_folder(folder)
    if config.reference and not (stage.work / REFERENCE_NAME).is_file():
        check_service(config.reference, base_sha256, max_tokens=config.max_tokens)
    tokenizer = load_tokenizer(folder)
    data = read_rankings(config.data, field="data")
    train, validation = _encode(data, Renderer(tokenizer, template=config.template), config)
    model = with_adapter(load_base(AutoModelForCausalLM, config, folder), config, task=TaskType.CAUSAL_LM)
    trainer = build_trainer(stage, config, model=model, tokenizer=tokenizer, parts=(train, validation))
    reference = _reference(stage, config, trainer, train.pairs + validation.pairs, base_sha256=base_sha256)
    trainer.train_dataset = with_reference(trainer.train_dataset, train.pairs, reference)
    trainer.eval_dataset = with_reference(trainer.eval_dataset, validation.pairs, reference)
    if stage.mode.dry_run:
        show_estimate(estimate(trainer, config, num_tokens=train.num_tokens), title="dpo")
        return config.output
    metrics = stage.train(trainer)
    draw_rewards(trainer.state.log_history, title="dpo", path=config.output / "plots" / "rewards.svg")
    _write(trainer.model, tokenizer, config, end_ids={pair.chosen_ids[-1] for pair in train.pairs})
    figures = _measure(trainer, validation.pairs, reference, beta=config.beta)
    metrics = {"loss": metrics["loss"], **figures, **_counts(train, validation)}
    return stage.finish(metrics=metrics, data=data.report.as_dict())


def _encode(data: DataSet[Ranking], renderer: Renderer, config: DpoConfig) -> tuple[Pairs, Pairs]:
    """Return the pairs to train on and those to measure on."""
    train, validation = (
        encode_pairs(tracked(part, title="dpo: token ids"), renderer, config) for part in (data.train, data.validation)
    )
    if not train.pairs or not validation.pairs:
        message = f"{len(train.pairs)} pairs to train on and {len(validation.pairs)} to measure on are left"
        raise InvalidArgumentError(f"{message}; raise max_tokens or give more data", field="data.sources")
    return train, validation


def build_trainer(
    stage: Stage, config: DpoConfig, *, model: Any, tokenizer: Any, parts: tuple[Pairs, Pairs]
) -> PairTrainer:
    """Return TRL's trainer with the pairs to train on and to measure on, still without the reference's columns."""
    train, validation = (Dataset.from_list(_rows(part.pairs)) for part in parts)
    arguments = TrlDpoConfig(
        **stage.arguments(num_rows=len(train)),
        max_length=config.max_tokens,
        beta=config.beta,
        loss_type=["robust" if config.label_smoothing else config.kind],
        disable_dropout=not config.lora.dropout,
        precompute_ref_log_probs=True,
    )
    return PairTrainer(
        smoothing=config.label_smoothing,
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
    )


def _rows(pairs: Sequence[TokenPair]) -> list[dict[str, list[int]]]:
    return [
        {"prompt_ids": list(p.prompt_ids), "chosen_ids": list(p.chosen_ids), "rejected_ids": list(p.rejected_ids)}
        for p in pairs
    ]


def _reference(
    stage: Stage, config: DpoConfig, trainer: PairTrainer, pairs: Sequence[TokenPair], *, base_sha256: str
) -> Logprobs:
    """Return what the reference says about every answer: the service, or the model here before its first step."""
    items = completions_of(pairs)
    if stage.mode.dry_run:
        return dict.fromkeys(items, 0.0)  # a step takes the same whatever the reference says

    def ask() -> list[float]:
        if not config.reference:
            return completion_logprobs(trainer, items, title="reference")
        served, some = ask_service(config.reference, items), items[:COMPARED_ITEMS]
        check_agreement(
            served[: len(some)],
            completion_logprobs(trainer, some, title="comparison"),
            num_tokens=sum(len(item.response_token_ids) for item in some),
            is_float32=config.quantization == "none" and config.dtype == "float32",
        )
        return served

    logprobs = kept(items, ask, path=stage.work / REFERENCE_NAME, base_sha256=base_sha256)
    return dict(zip(items, logprobs, strict=True))


def with_reference(rows: Dataset, pairs: Sequence[TokenPair], reference: Logprobs) -> Dataset:
    """Return the rows with the two columns that TRL's trainer reads in place of asking a reference model."""
    chosen, rejected = [reference[pair.chosen] for pair in pairs], [reference[pair.rejected] for pair in pairs]
    return rows.add_column("ref_chosen_logps", chosen).add_column("ref_rejected_logps", rejected)


def _measure(trainer: PairTrainer, pairs: Sequence[TokenPair], reference: Logprobs, *, beta: float) -> dict[str, float]:
    """Return the figures of the trained policy on validation pairs; see `measure_pairs`."""
    items = completions_of(pairs)
    policy = dict(zip(items, completion_logprobs(trainer, items, title="evaluation"), strict=True))
    return measure_pairs(pairs, policy, reference, beta=beta)


def _counts(train: Pairs, validation: Pairs) -> dict[str, int]:
    return {
        "train_pairs": len(train.pairs),
        "validation_pairs": len(validation.pairs),
        "train_tokens": train.num_tokens,
        "overlong_records": train.num_overlong + validation.num_overlong,
        "alike_pairs": train.num_alike + validation.num_alike,
        "only_ties": train.num_only_ties + validation.num_only_ties,
    }


def _write(model: Any, tokenizer: Any, config: DpoConfig, *, end_ids: set[int]) -> None:
    """Write the adapter, which names its base by a relative path, or the whole model; the tokenizer beside it."""
    if not config.lora.rank:
        write_model(model, tokenizer, config, end_ids=end_ids)
        return
    write_adapter(model, config.output, base=relative_base(config.base, config.output))
    tokenizer.save_pretrained(config.output)
