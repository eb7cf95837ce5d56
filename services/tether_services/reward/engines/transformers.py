"""A reward model: sequence classification with one output, with or without an adapter."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification

from tether.errors import FieldViolation, InvalidArgumentError, TetherError
from tether_services.reward.config import RewardSettings
from tether_services.reward.engine import EngineDescription, ScoreTask
from tether_services.runtime.content_hash import hash_file, hash_model_folder
from tether_services.runtime.model_folder import Quantization, find_model_folder, pick_device
from tether_services.runtime.padding import PaddedBatch, padded_batches
from tether_services.runtime.passes import run_passes
from tether_services.runtime.pretrained import allow_adapters_of_embeddings, load_pretrained
from tether_services.runtime.settings import Settings, validate
from tether_services.runtime.text import HfCodec
from tether_services.runtime.work_thread import WorkThread

SCALE_FILE = "tether_reward.json"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
HEAD_WEIGHT = "score.weight"
"""The head of decoder models of sequence classification; an adapter folder brings its own."""
CAUSAL_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1, "int8": 0.1}
"""Largest difference, relative to the score or to 1, that padding on the right may make; in 8 bits a batch decides
together which columns are outliers."""


class RewardScale(Settings):
    """The content of tether_reward.json."""

    base: str = ""
    """Base model of an adapter: a path relative to the folder, or a hub name. Empty in the folder of a whole model."""
    gain: float = Field(default=1.0, gt=0)
    """score = gain * (raw - bias)."""
    bias: float = 0.0
    """See gain."""
    max_length: int | None = Field(default=None, ge=2)
    """Tokens per item at most; unset: what the model was made for."""
    ends_text: bool = False
    """Whether texts are scored with the end token behind them, as in the training; token ids are taken as they are."""


@dataclass(frozen=True, slots=True)
class RewardFolder:
    """A reward model on disk."""

    folder: Path
    """What the setting names."""
    base: Path
    """Where config, base weights and tokenizer are; the folder itself unless it holds an adapter."""
    scale: RewardScale
    """Normalisation and length limit."""
    sha256: str
    """Hash of everything that decides a score."""

    @property
    def has_adapter(self) -> bool:
        """Whether the folder holds an adapter."""
        return self.folder != self.base


class TransformersRewardEngine:
    """Reads the head at the last token of each item; the place comes from explicit lengths, padding is on the right."""

    def __init__(self, path: str, settings: RewardSettings, *, field: str) -> None:
        """Prepare; `start` does the work.

        Args:
            path: Folder or hub name.
            settings: For dtype, device and pass size.
            field: Name of the setting that holds the path, for errors.
        """
        self._path = path
        self._field = field
        self._settings = settings
        self._thread = WorkThread("reward-engine")
        self._body: Any = None
        self._head: Any = None
        self._device = "cpu"
        self._description: EngineDescription | None = None

    @property
    def description(self) -> EngineDescription:
        """Return what the engine computes with; only after `start`."""
        assert self._description is not None, "start the engine first"
        return self._description

    async def start(self) -> None:
        """Load the model in the engine's thread and check that padding does not reach its scores."""
        self._description = await self._thread.run(self._load)

    async def score(self, tasks: Sequence[ScoreTask]) -> list[float | TetherError]:
        """Return the raw scores; each forward pass is one job of the thread, so that `check` fits between."""
        rows = [(*task.prompt_token_ids, *task.response_token_ids) for task in tasks]
        limit = self._settings.forward_tokens
        return [*await run_passes(self._thread, self._forward, rows, max_tokens=limit, device=self._device)]

    async def check(self) -> None:
        """Score one token, or see the thread compute."""
        await self._thread.wait_for_life(self.score([ScoreTask(response_token_ids=(0,))]))

    async def close(self) -> None:
        """Let the pass in progress end and drop the model."""
        await self._thread.close()
        self._body = self._head = None

    def _load(self) -> EngineDescription:
        found = find_reward_folder(self._path, field=self._field)
        settings = self._settings
        self._device = pick_device(settings.device)
        classifier = load_classifier(
            found, dtype=settings.dtype, field=self._field, quantization=settings.quantization, device=self._device
        )
        if settings.quantization == "none":
            classifier.to(self._device)  # the adapter too
        self._body, self._head = getattr(classifier, classifier.base_model_prefix), classifier.score
        self._check_causal("int8" if settings.quantization == "int8" else settings.dtype)
        limits = classifier.config.get_text_config()
        longest = int(limits.max_position_embeddings)
        return EngineDescription(
            engine="transformers",
            sha256=found.sha256,
            gain=found.scale.gain,
            bias=found.scale.bias,
            max_model_len=min(found.scale.max_length or longest, longest),
            vocab_size=int(limits.vocab_size),
            codec=HfCodec(found.base, field=self._field),
            ends_text=found.scale.ends_text,
        )

    @torch.inference_mode()
    def _forward(self, batch: PaddedBatch) -> list[float]:
        # No attention mask: a causal model never looks to the right, where the padding is.
        hidden = self._body(
            input_ids=batch.token_ids, position_ids=batch.position_ids, use_cache=False
        ).last_hidden_state
        last = hidden[torch.arange(len(hidden), device=hidden.device), batch.lengths - 1]
        scores: Tensor = self._head(last)
        return [float(score) for score in scores.squeeze(-1).float().cpu()]

    def _check_causal(self, precision: str) -> None:
        """Refuse a model that looks to the right: padding and batch would change its scores."""
        alone = padded_batches([[5, 6]], max_tokens=64, device=self._device)[0]
        padded = padded_batches([[5, 6], [0, 1, 2, 3, 4]], max_tokens=64, device=self._device)[0]
        first, second = self._forward(alone)[0], self._forward(padded)[0]
        if not abs(first - second) <= CAUSAL_TOLERANCE[precision] * max(1.0, abs(first)):
            raise InvalidArgumentError(
                f"The score of a text changes with padding ({first:g}, {second:g}): the model is not causal, or it "
                "gives values that are not numbers.",
                field=self._field,
            )


def find_reward_folder(path: str, *, field: str) -> RewardFolder:
    """Return the reward model of a folder or hub name; nothing is loaded.

    Raises:
        InvalidArgumentError: There is none, or a file in it is missing or malformed.
    """
    folder = find_model_folder(path, field=field)
    scale = read_scale(folder, field=field)
    if not (folder / ADAPTER_FILES[0]).is_file():
        parts = [hash_model_folder(folder), *_hash_files(folder, [SCALE_FILE])]
        return RewardFolder(folder, folder, scale, _join_hashes(parts))
    if not (folder / ADAPTER_FILES[1]).is_file():
        raise InvalidArgumentError(f"{folder} has no {ADAPTER_FILES[1]}.", field=field)
    if not scale.base:
        raise InvalidArgumentError(f"{folder} holds an adapter: its {SCALE_FILE} must name the base.", field=field)
    relative = folder / scale.base
    base = find_model_folder(str(relative) if relative.is_dir() else scale.base, field=field)
    parts = [hash_model_folder(base), *_hash_files(folder, [*ADAPTER_FILES, SCALE_FILE])]
    return RewardFolder(folder, base, scale, _join_hashes(parts))


def read_scale(folder: Path, *, field: str) -> RewardScale:
    """Return the scale of a reward model folder; without a file it is 1 and 0.

    Raises:
        InvalidArgumentError: The file is not JSON or has unknown or invalid keys, named with the file.
    """
    path = folder / SCALE_FILE
    if not path.is_file():
        return RewardScale()
    try:
        return validate(RewardScale, json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise InvalidArgumentError(f"{path} is not JSON: {error}", field=field) from error
    except InvalidArgumentError as error:
        violations = tuple(FieldViolation(field, f"{path}: {v.field}: {v.description}") for v in error.violations)
        raise InvalidArgumentError(f"{path} is not valid.", violations=violations) from error


def load_classifier(
    found: RewardFolder, *, dtype: str, field: str, quantization: Quantization = "none", device: str = "cpu"
) -> Any:
    """Return the frozen classifier on its device with its adapter attached, if it has one.

    Raises:
        InvalidArgumentError: It is not a decoder with a `score` head of one output.
    """
    may_lack = (HEAD_WEIGHT,) if found.has_adapter else ()
    if not found.has_adapter:
        _check_one_output(found.folder, field=field)
    classifier = load_pretrained(
        AutoModelForSequenceClassification,
        found.base,
        dtype=dtype,
        field=field,
        may_lack=may_lack,
        quantization=quantization,
        device=device,
        **({"num_labels": 1} if found.has_adapter else {}),
    )
    if not hasattr(classifier, "score"):
        raise InvalidArgumentError(
            f"{type(classifier).__name__} has no `score` head; only decoder models can be scored at the last token.",
            field=field,
        )
    if found.has_adapter:
        _attach(classifier, found.folder, field=field)
    return classifier


def _check_one_output(folder: Path, *, field: str) -> None:
    try:
        outputs = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).num_labels
    except (OSError, ValueError, KeyError) as error:
        raise InvalidArgumentError(f"{folder} cannot be loaded: {error}", field=field) from error
    if outputs != 1:
        raise InvalidArgumentError(
            f"{folder} is not a reward model: its config.json states {outputs} outputs (num_labels) instead of 1.",
            field=field,
        )


def _attach(classifier: Any, folder: Path, *, field: str) -> None:
    """Put adapter and head into the classifier, in place.

    Raises:
        InvalidArgumentError: The adapter does not fit, or file and model do not have the same tensors.
    """
    weights = folder / ADAPTER_FILES[1]
    try:
        with safe_open(weights, framework="pt") as file:
            stored = set(file.keys())
        if not any(name.endswith(HEAD_WEIGHT) for name in stored):
            raise InvalidArgumentError(f"{weights} has no score head ({HEAD_WEIGHT}).", field=field)
        allow_adapters_of_embeddings()
        model = PeftModel.from_pretrained(classifier, str(folder), torch_device="cpu").requires_grad_(False).eval()
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise InvalidArgumentError(f"{folder} does not fit its base: {error}", field=field) from error
    different = stored ^ set(get_peft_model_state_dict(model, save_embedding_layers=False))
    if different:  # the library only warns, and would go on with fresh weights
        raise InvalidArgumentError(f"{weights} and the model differ in {sorted(different)[:3]}.", field=field)


def _hash_files(folder: Path, names: Sequence[str]) -> list[str]:
    return [f"{name} {hash_file(folder / name)}" for name in names if (folder / name).is_file()]


def _join_hashes(parts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
