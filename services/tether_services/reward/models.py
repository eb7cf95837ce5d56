"""A named reward model: its components and how their values become one score."""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from tether.errors import InternalError, InvalidArgumentError, TetherError
from tether_services.reward.config import ComponentSettings, ModelSettings, RewardSettings
from tether_services.reward.engine import RewardEngine
from tether_services.reward.engines import build_engine
from tether_services.reward.items import ItemReader, PreparedItem
from tether_services.runtime.gathering import gather_in_order
from tether_services.runtime.model_folder import find_model_folder
from tether_services.runtime.text import HfCodec, TextCodec

SAMPLE_TEXT = "Once upon a time, 3 cats asked: why? \u00e9\u4e2d"
"""Two tokenizers that read this alike are taken to be the same."""


@dataclass(frozen=True, slots=True)
class ComponentValue:
    """One part of a score."""

    name: str
    """Of the component."""
    value: float
    """Normalised, before weighting."""
    weight: float
    """Factor in the sum."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """A score and how it came about."""

    score: float
    """sum of weight * value."""
    raw_score: float
    """sum of weight * raw value."""
    components: tuple[ComponentValue, ...]
    """The parts, in the order of the configuration."""
    token_count: int
    """Tokens that were read."""
    truncated: bool
    """Whether prompt tokens were cut."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why an item has no score. Not an exception itself, so that it can travel beside scores."""

    error: TetherError
    """Its field is relative to the item."""


@dataclass(frozen=True, slots=True)
class Component:
    """An engine and its place in the sum."""

    name: str
    """Reported in answers."""
    engine: RewardEngine
    """Computes the raw value."""
    weight: float
    """Factor in the sum."""
    gain: float
    """value = gain * (raw - bias)."""
    bias: float
    """See gain."""


def combine(
    components: Sequence[Component], raw_values: Sequence[float | TetherError], item: PreparedItem
) -> Judgement:
    """Return the weighted sum of the normalised values.

    Raises:
        TetherError: A component has no value for the item.
        InternalError: A value is not a finite number.
    """
    parts, score, raw_score = [], 0.0, 0.0
    for component, raw in zip(components, raw_values, strict=True):
        if isinstance(raw, TetherError):
            raise raw
        value = component.gain * (raw - component.bias)
        parts.append(ComponentValue(component.name, value, component.weight))
        score += component.weight * value
        raw_score += component.weight * raw
    if not (math.isfinite(score) and math.isfinite(raw_score)):
        bad = [part.name for part in parts if not math.isfinite(part.value)] or ["the sum"]
        raise InternalError(f"{', '.join(bad)} gave a value that is not a finite number.", reason="NON_FINITE_SCORE")
    return Judgement(score, raw_score, tuple(parts), item.task.num_tokens, item.truncated)


class RewardModel:
    """A weighted sum of components under one name."""

    def __init__(
        self, settings: ModelSettings, components: Sequence[Component], *, codec: TextCodec | None, max_text_chars: int
    ) -> None:
        """Put started components together.

        Args:
            settings: Name and version.
            components: At least one, started.
            codec: The configured tokenizer; None takes that of the first component that has one.
            max_text_chars: Longest text accepted.

        Raises:
            InvalidArgumentError: Two components read different token ids.
        """
        self.name = settings.name
        self.components = tuple(components)
        self.reader = build_reader(components, codec=codec, max_text_chars=max_text_chars, model=settings.name)
        self.sha256 = hash_components(components)
        self.version = settings.version or self.sha256[:12]

    @property
    def engine(self) -> str:
        """Return the engines in use, each once, joined by "+"."""
        return "+".join(dict.fromkeys(component.engine.description.engine for component in self.components))

    def scale(self) -> tuple[float, float]:
        """Return (gain, bias) with score = gain * (raw_score - bias); 1 and 0 where several parts have their own."""
        gains = {component.gain for component in self.components}
        if len(gains) > 1:
            return 1.0, 0.0
        return gains.pop(), sum(component.weight * component.bias for component in self.components)

    async def score(self, items: Sequence[PreparedItem]) -> list[Judgement | Refusal]:
        """Return the judgements in order."""
        tasks = [item.task for item in items]
        columns = await gather_in_order([component.engine.score(tasks) for component in self.components])
        outcomes: list[Judgement | Refusal] = []
        for item, *raw_values in zip(items, *columns, strict=True):
            try:
                outcomes.append(combine(self.components, raw_values, item))
            except TetherError as error:
                outcomes.append(Refusal(error))
        return outcomes

    async def check(self) -> None:
        """Have every engine answer a tiny request."""
        await asyncio.gather(*(component.engine.check() for component in self.components))

    async def close(self) -> None:
        """Stop the engines."""
        await asyncio.gather(*(component.engine.close() for component in self.components))


def build_reader(
    components: Sequence[Component], *, codec: TextCodec | None, max_text_chars: int, model: str
) -> ItemReader:
    """Return the reader for items of these components.

    Raises:
        InvalidArgumentError: Two components read different token ids, or only one of them the end token.
    """
    readers = [c.engine.description for c in components if c.engine.description.reads_tokens]
    used = codec or (readers[0].codec if readers else None)
    for reader in readers:
        check_same_tokenizer(used, reader.codec, model=model)
    if len({reader.ends_text for reader in readers}) > 1:
        raise InvalidArgumentError(
            f"Some components of model {model} score texts with the end token, others without; make them models of"
            " their own.",
            field="models",
        )
    return ItemReader(
        codec=used,
        reads_text=len(readers) < len(components),
        reads_tokens=bool(readers),
        vocab_size=min((reader.vocab_size for reader in readers), default=0),
        max_model_len=min((reader.max_model_len for reader in readers), default=0),
        max_text_chars=max_text_chars,
        ends_text=any(reader.ends_text for reader in readers),
    )


def check_same_tokenizer(first: TextCodec | None, second: TextCodec | None, *, model: str) -> None:
    """Refuse components whose token ids mean different things.

    Raises:
        InvalidArgumentError: The two read the same text differently.
    """
    assert first is not None and second is not None, "components that read tokens have a tokenizer"
    if first is second:
        return
    ids = [codec.encode(SAMPLE_TEXT, add_special_tokens=True) for codec in (first, second)]
    if ids[0] != ids[1]:
        raise InvalidArgumentError(
            f"The components of model {model} have different tokenizers; make them models of their own.",
            field="models",
        )


def hash_components(components: Sequence[Component]) -> str:
    """Return the SHA-256 of everything that decides a score: content, weight and scale of each component."""
    lines = [f"{c.name} {c.weight!r} {c.gain!r} {c.bias!r} {c.engine.description.sha256}\n" for c in components]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


async def load_model(settings: RewardSettings, model: ModelSettings, *, field: str) -> RewardModel:
    """Return a model with its engines started.

    Raises:
        InvalidArgumentError: Names the setting that does not fit.
    """
    codec = None
    if model.tokenizer:
        codec = await asyncio.to_thread(_read_codec, model.tokenizer, field=f"{field}.tokenizer")
    engines = [
        await asyncio.to_thread(build_engine, component, settings, codec, field=f"{field}.components[{index}]")
        for index, component in enumerate(model.components)
    ]
    try:
        for engine in engines:
            await engine.start()
        components = [_component(c, e) for c, e in zip(model.components, engines, strict=True)]
        return RewardModel(model, components, codec=codec, max_text_chars=settings.max_text_chars)
    except BaseException:  # also on cancellation: threads and models must not outlive a failed start
        await asyncio.gather(*(engine.close() for engine in engines))
        raise


def _read_codec(tokenizer: str, *, field: str) -> TextCodec:
    return HfCodec(find_model_folder(tokenizer, field=field), field=field)


def _component(settings: ComponentSettings, engine: RewardEngine) -> Component:
    own = engine.description
    return Component(
        name=settings.name,
        engine=engine,
        weight=settings.weight,
        gain=own.gain if settings.gain is None else settings.gain,
        bias=own.bias if settings.bias is None else settings.bias,
    )
