"""`tether train sft`: supervised fine-tuning on demonstrations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel, TaskType
from transformers import AutoModelForCausalLM, GenerationConfig
from trl import SFTConfig as TrlSftConfig

from tether.errors import InvalidArgumentError
from tether_services.recipes.artifact import relative_base, write_adapter
from tether_services.recipes.base_model import base_folder, load_base, load_tokenizer, with_adapter
from tether_services.recipes.config import FineTuneConfig, SftConfig
from tether_services.recipes.data.reading import read_demonstrations
from tether_services.recipes.data.records import Demonstration
from tether_services.recipes.data.rendering import Renderer, fit
from tether_services.recipes.estimate import estimate, show_estimate
from tether_services.recipes.generation_defaults import write_generation_defaults
from tether_services.recipes.packing import (
    IGNORED,
    AnswerTrainer,
    PackedTrainer,
    check_packing,
    collate_packed,
    pack,
    unpacked,
)
from tether_services.recipes.progress import tracked
from tether_services.recipes.stage import Mode, Stage, open_stage

__all__ = ["Rows", "build_trainer", "encode_demonstrations", "run_sft", "write_model"]


@dataclass(frozen=True, slots=True)
class Rows:
    """Demonstrations as token ids."""

    rows: list[dict[str, list[int]]]
    """`input_ids` and `labels`: the ids of the answer and its end token, -100 on the prompt."""
    num_overlong: int
    """Demonstrations left out or cut because they were longer than `max_tokens`."""

    @property
    def num_tokens(self) -> int:
        """Return the tokens of all rows."""
        return sum(len(row["input_ids"]) for row in self.rows)

    @property
    def end_ids(self) -> set[int]:
        """Return the tokens that end the answers."""
        return {row["input_ids"][-1] for row in self.rows}


def run_sft(config: SftConfig, mode: Mode | None = None) -> Path:
    """Train on demonstrations and return the output folder: a whole model, with the adapter beside it in `adapter`.

    Raises:
        InvalidArgumentError: A data file or a setting does not fit.
        FailedPreconditionError: The output folder belongs to other settings, or the loss is no longer finite.
    """
    with open_stage("sft", config, mode or Mode()) as stage:
        return config.output if stage.is_finished else _run(stage, config)


def _run(stage: Stage, config: SftConfig) -> Path:
    folder = base_folder(config)
    tokenizer = load_tokenizer(folder)
    data = read_demonstrations(config.data, field="data")
    renderer = Renderer(tokenizer, template=config.template)
    train, validation = (encode_demonstrations(part, renderer, config) for part in (data.train, data.validation))
    if not train.rows or not validation.rows:
        message = f"{len(train.rows)} demonstrations to train on and {len(validation.rows)} to measure on are left"
        raise InvalidArgumentError(f"{message}; raise max_tokens or give more data", field="data.sources")
    model = with_adapter(load_base(AutoModelForCausalLM, config, folder), config, task=TaskType.CAUSAL_LM)
    trainer = build_trainer(stage, config, model=model, tokenizer=tokenizer, parts=(train, validation))
    if stage.mode.dry_run:
        show_estimate(estimate(trainer, config, num_tokens=train.num_tokens), title="sft")
        return config.output
    metrics = stage.train(trainer)
    write_model(trainer.model, tokenizer, config, end_ids=train.end_ids)
    counts = {
        "train_rows": len(train.rows),
        "train_sequences": len(trainer.train_dataset),
        "validation_rows": len(validation.rows),
        "train_tokens": train.num_tokens,
        "overlong_records": train.num_overlong + validation.num_overlong,
    }
    return stage.finish(metrics={**metrics, **counts}, data=data.report.as_dict())


def encode_demonstrations(items: Sequence[Demonstration], renderer: Renderer, config: SftConfig) -> Rows:
    """Return demonstrations as token ids of at most `max_tokens`; the loss is on the answers alone."""
    rows, num_overlong = [], 0
    for item in tracked(items, title="sft: token ids"):
        prompt, answer = renderer.prompt_ids(item.prompt), renderer.answer_ids(item.prompt, item.answer)
        num_overlong += len(prompt) + len(answer) > config.max_tokens
        fitted = fit(prompt, [answer], max_tokens=config.max_tokens, overlong=config.overlong)
        if fitted is not None:
            prompt, (answer,) = fitted
            rows.append({"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer})
    return Rows(rows, num_overlong)


def build_trainer(
    stage: Stage, config: SftConfig, *, model: Any, tokenizer: Any, parts: tuple[Rows, Rows]
) -> AnswerTrainer:
    """Return TRL's trainer over training and validation rows; with packing the steps are those of packed sequences."""
    train, validation = parts
    if config.packing:
        check_packing(model, train.rows, is_exact=config.quantization == "none" and config.dtype == "float32")
        train_set, validation_set = pack(train.rows, max_tokens=config.max_tokens), unpacked(validation.rows)
        collator = partial(collate_packed, pad_token_id=tokenizer.pad_token_id)
    else:
        train_set, validation_set = Dataset.from_list(train.rows), Dataset.from_list(validation.rows)
        collator = None  # TRL's own
    arguments = TrlSftConfig(
        **stage.arguments(num_rows=len(train_set)),
        max_length=config.max_tokens,
        dataset_kwargs={"skip_prepare_dataset": True},  # the rows have their labels and fit
    )
    return (PackedTrainer if config.packing else AnswerTrainer)(
        model=model,
        args=arguments,
        data_collator=collator,
        train_dataset=train_set,
        eval_dataset=validation_set,
        processing_class=tokenizer,
    )


def write_model(model: Any, tokenizer: Any, config: FineTuneConfig, *, end_ids: Iterable[int]) -> None:
    """Write the whole model with its tokenizer, and before merging the adapter on its own.

    An adapter is merged in the precision of the base: the next stage and the services load one folder. Onto a quantised
    base it was trained with the base's rounded weights, so it is merged into these, in `dtype`.

    Args:
        model: As it was trained.
        tokenizer: Of the model.
        config: The stage.
        end_ids: Tokens that end the answers of the data; generators stop at them.
    """
    if config.lora.rank:
        adapter = config.output / "adapter"
        write_adapter(model, adapter, base=relative_base(config.base, adapter))
        if config.quantization != "none":
            whole = load_base(AutoModelForCausalLM, config, base_folder(config)).dequantize()
            model = PeftModel.from_pretrained(whole, adapter)
        model = model.merge_and_unload()
    model.generation_config = GenerationConfig()  # that of the base may be one that the library refuses to write
    model.save_pretrained(config.output)
    write_generation_defaults(config.output, base=base_folder(config), tokenizer=tokenizer, end_ids=end_ids)
    tokenizer.save_pretrained(config.output)
