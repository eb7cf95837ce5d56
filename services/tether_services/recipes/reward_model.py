"""`tether train reward`: a reward model from labelled sentences, as an adapter and a head on a base."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tether.errors import InvalidArgumentError
from tether_services.recipes.config import RewardModelConfig
from tether_services.recipes.documents import read_documents
from tether_services.recipes.manifest import write_manifest
from tether_services.recipes.optimiser import apply_step, fine_tuning_optimisers, schedule_factor
from tether_services.recipes.pairwise import pair_accuracy, ranked_group_loss
from tether_services.recipes.progress import progress_line
from tether_services.recipes.scoring import build_reward_model, score_all, scores_by_length, write_reward_model
from tether_services.recipes.sentiment import LabelledText, join_sentences, read_labelled, remove_overlap, vary_case
from tether_services.recipes.tokenizer import encode_document, load_tokenizer
from tether_services.runtime.content_hash import hash_model_folder

log = logging.getLogger(__name__)

Encode = Callable[[str, bool], list[int]]
"""Turns a text into token ids, with the end token where the second argument is true."""
MAX_SENTENCES = 3
"""A training text joins 1 to 3 sentences of one label: single sentences are shorter than what is scored later."""


@dataclass(frozen=True, slots=True)
class Material:
    """Everything the stage reads."""

    train: tuple[LabelledText, ...]
    """Sentences to learn from."""
    validation: tuple[LabelledText, ...]
    """Sentences to measure on, none of them in `train`."""
    overlap_count: int
    """Training sentences taken out because they are in the validation files."""
    demonstrations: tuple[tuple[int, ...], ...]
    """Token ids of held-out openings, whose mean score becomes 0."""


@dataclass(frozen=True, slots=True)
class Group:
    """Texts to be ranked against each other."""

    token_ids: tuple[tuple[int, ...], ...]
    """K sequences."""
    levels: tuple[int, ...]
    """K preference levels, higher is better."""


def run_reward_model(config: RewardModelConfig) -> Path:
    """Train a reward adapter and head, normalise it, write it with a manifest, and return the output folder.

    Raises:
        InvalidArgumentError: A data file, the base or a setting does not fit.
    """
    started = time.monotonic()
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    tokenizer = load_tokenizer(config.base, field="base")
    material = read_material(config, tokenizer=tokenizer)
    model = build_reward_model(config, pad_token_id=tokenizer.pad_token_id)
    accuracies = _train(model, config, tokenizer=tokenizer, material=material)
    demonstrations = score_all(model, material.demonstrations, pad_token_id=tokenizer.pad_token_id)
    normalisation = write_reward_model(model, config, bias=float(demonstrations.mean()))
    metrics = measure(model, material, tokenizer=tokenizer) | {
        "pair_accuracy_by_epoch": [round(value, 4) for value in accuracies],
        "base_sha256": hash_model_folder(config.base),
        "demonstration_count": len(material.demonstrations),
        "demonstration_score_std": round(float(demonstrations.std()), 4),
        "bias": normalisation.bias,
        "trainable_parameter_count": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    inputs = (*config.train_files, *config.validation_files, *config.demonstration_files)
    write_manifest("reward", config, inputs=inputs, metrics=metrics, wall_seconds=time.monotonic() - started)
    return config.output


def read_material(config: RewardModelConfig, *, tokenizer: Any) -> Material:
    """Return the sentences and demonstrations, without overlap between training and validation.

    Raises:
        InvalidArgumentError: A file does not fit, or one of the labels is missing.
    """
    validation = read_labelled(config.validation_files, field="validation_files")
    train, overlap_count = remove_overlap(read_labelled(config.train_files, field="train_files"), reserved=validation)
    for items, field in ((train, "train_files"), (validation, "validation_files")):
        if {item.label for item in items} != {0, 1}:
            raise InvalidArgumentError("sentences of both labels are needed after overlap is removed", field=field)
    documents = read_documents(
        config.demonstration_files,
        separator=config.separator,
        held_out_fraction=config.held_out_fraction,
        field="demonstration_files",
    )
    openings = (encode_document(tokenizer, text)[: config.demonstration_tokens] for text in documents.held_out)
    return Material(tuple(train), tuple(validation), overlap_count, tuple(tuple(ids) for ids in openings))


def epoch_groups(
    items: Sequence[LabelledText], *, group_size: int, encode: Encode, rng: random.Random
) -> Iterator[Group]:
    """Yield ranked groups that use every sentence of the rarer label once; half of each group is positive.

    A text joins one to three sentences of its label, in one of three casings, and ends with the end token half of the
    time: the score has to hold at the end of a finished text and of one that was cut.
    """
    pools = {label: [item.text for item in items if item.label == label] for label in (1, 0)}
    for pool in pools.values():
        rng.shuffle(pool)
    counts = {1: group_size // 2, 0: group_size - group_size // 2}
    while True:
        chosen = []
        for label, count in counts.items():
            for _ in range(count):
                size = rng.randint(1, MAX_SENTENCES)
                if len(pools[label]) < size:
                    return
                sentences = [vary_case(pools[label].pop(), rng=rng) for _ in range(size)]
                chosen.append((tuple(encode(join_sentences(sentences), rng.random() < 0.5)), label))
        yield Group(tuple(ids for ids, _ in chosen), tuple(label for _, label in chosen))


def measure(model: Any, material: Material, *, tokenizer: Any) -> dict[str, Any]:
    """Return the figures of a trained model on the validation sentences.

    The threshold of the accuracy is the midpoint of the mean scores of both labels on training sentences: validation
    labels do not choose it.
    """
    train = _scores_by_label(model, material.train, tokenizer=tokenizer)
    validation = score_all(model, _encode_all(material.validation, tokenizer), pad_token_id=tokenizer.pad_token_id)
    labels = torch.tensor([item.label for item in material.validation])
    threshold = 0.5 * (train[0].mean() + train[1].mean())
    return {
        "train_sentence_count": len(material.train),
        "validation_sentence_count": len(material.validation),
        "overlap_removed_count": material.overlap_count,
        "train_pair_accuracy": round(pair_accuracy(torch.cat([train[0], train[1]]), _levels(train)), 4),
        "validation_pair_accuracy": round(pair_accuracy(validation, labels), 4),
        "validation_accuracy": round(float(((validation > threshold).long() == labels).double().mean()), 4),
        "validation_score_std": round(float(validation.std()), 4),
    }


def _scores_by_label(model: Any, items: Sequence[LabelledText], *, tokenizer: Any) -> dict[int, Tensor]:
    scores = score_all(model, _encode_all(items, tokenizer), pad_token_id=tokenizer.pad_token_id)
    labels = torch.tensor([item.label for item in items])
    return {label: scores[labels == label] for label in (0, 1)}


def _levels(scores: dict[int, Tensor]) -> Tensor:
    return torch.cat([torch.full((len(scores[label]),), label) for label in (0, 1)])


def _encode_all(items: Sequence[LabelledText], tokenizer: Any) -> list[list[int]]:
    return [encode_document(tokenizer, item.text, end=False) for item in items]


def _train(model: Any, config: RewardModelConfig, *, tokenizer: Any, material: Material) -> list[float]:
    """Train in place and return the validation pair accuracy after each epoch."""
    rng = random.Random(config.seed)

    def encode(text: str, end: bool) -> list[int]:
        return encode_document(tokenizer, text, end=end)[: config.max_length]

    epochs = [
        list(epoch_groups(material.train, group_size=config.group_size, encode=encode, rng=rng))
        for _ in range(config.num_epochs)
    ]
    num_steps = sum(len(groups) // config.groups_per_step for groups in epochs)
    if num_steps == 0:
        raise InvalidArgumentError("too few training sentences for one step; lower it", field="groups_per_step")
    optimisers = fine_tuning_optimisers(model, learning_rate=config.learning_rate, weight_decay=config.weight_decay)
    labels = torch.tensor([item.label for item in material.validation])
    accuracies: list[float] = []
    step = 0
    with progress_line("reward model", total=num_steps) as report:
        for groups in epochs:
            for start in range(0, len(groups) - config.groups_per_step + 1, config.groups_per_step):
                batch = groups[start : start + config.groups_per_step]
                loss = _step_loss(model, batch, pad_token_id=tokenizer.pad_token_id)
                torch.autograd.backward(loss)
                apply_step(optimisers, learning_rate=_learning_rate(config, step, num_steps=num_steps))
                step += 1
                report(step, f"loss {loss.item():.3f}  pairs {accuracies[-1] if accuracies else float('nan'):.3f}")
            rows = _encode_all(material.validation, tokenizer)
            accuracies.append(pair_accuracy(score_all(model, rows, pad_token_id=tokenizer.pad_token_id), labels))
            log.info("reward model step %d validation pair accuracy %.4f", step, accuracies[-1])
    return accuracies


def _step_loss(model: Any, groups: Sequence[Group], *, pad_token_id: int) -> Tensor:
    rows = [ids for group in groups for ids in group.token_ids]
    scores = scores_by_length(model, rows, pad_token_id=pad_token_id).view(len(groups), -1)
    loss, _ = ranked_group_loss(scores, torch.tensor([group.levels for group in groups]))
    return loss


def _learning_rate(config: RewardModelConfig, step: int, *, num_steps: int) -> float:
    warmup_steps = int(config.warmup_fraction * num_steps)
    return config.learning_rate * schedule_factor(step, num_steps=num_steps, warmup_steps=warmup_steps)
