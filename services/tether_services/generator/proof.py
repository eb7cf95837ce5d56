"""The proof of a loaded adapter: it computes what the trainer says, and differs from base and version before."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from tether_services.generator.adapters import AdapterVersion
from tether_services.generator.engine import Engine, EngineDescription, LoadedAdapter
from tether_services.generator.uploads import Declaration, Probe
from tether_services.generator.verification import refuse
from tether_services.runtime.fault_points import reach

log = logging.getLogger(__name__)

FLOAT32_TOLERANCE = 1e-3
"""Mean |delta logprob| in nats between two float32 implementations; measured 1e-6, so this is generous."""
REDUCED_TOLERANCE = 0.05
"""The same in bfloat16 or float16."""
CLEAR = 10.0
"""A difference of so many tolerances is no matter of arithmetic: the loaded adapter must show at least half of it."""
VISIBLE = 0.01
"""Below this share of a tolerance an effect can vanish in the rounding of the engine; then it may show none."""
STALE = 0.01
"""Two versions differ by more than this share of what they do where they were trained, or one stands for the other."""
FLOAT32_BASE_TOLERANCE = 1e-4
"""Mean |delta logprob| in nats of the base between two scorings of the same tokens; the reduced types have theirs."""
BASE_TOKENS = 32
"""Of the text by which the base is compared with itself."""


@dataclass(slots=True)
class Stopwatch:
    """Times the stages of one commit."""

    observe: Callable[[str, float], None]
    seconds: list[tuple[str, float]] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what happens in the block."""
        started = time.monotonic()
        yield
        self.seconds.append((name, time.monotonic() - started))
        self.observe(*self.seconds[-1])


@dataclass(frozen=True, slots=True)
class Candidate:
    """An adapter that is to be proven."""

    adapter: LoadedAdapter
    """As the engine will see it."""
    declaration: Declaration
    """As it was announced."""
    before: AdapterVersion | None
    """The newest loaded version of the run below it, which stays loaded meanwhile; None if there is none."""


class Prover:
    """Loads adapters into the engine and keeps those that compute what they should."""

    def __init__(self, engine: Engine, *, tolerance: float | None) -> None:
        """Take the engine; a tolerance of None is that of its type of weights."""
        self._engine = engine
        self._tolerance = tolerance
        self._base_token_ids: tuple[int, ...] = ()
        self._base_logprobs: Sequence[float] = ()

    async def start(self) -> None:
        """Score some tokens with the base, to compare with at every proof; the engine has started."""
        description = self._engine.description
        count = min(BASE_TOKENS, description.max_model_len - 1)  # engines may need room for one more token
        if count >= 2:
            self._base_token_ids = tuple(7 * index % description.vocab_size for index in range(1, count + 1))
            (self._base_logprobs,) = await self._engine.compute_logprobs([self._base_token_ids], None)

    @property
    def description(self) -> EngineDescription:
        """Return what the engine serves."""
        return self._engine.description

    async def load(self, candidate: Candidate, watch: Stopwatch, check: Callable[[], None]) -> float:
        """Return the mean |delta logprob| of the probes; an adapter that fails, also in `check`, is not loaded then.

        Raises:
            FailedPreconditionError: LOAD_FAILED, or what the proof found.
        """
        adapter = candidate.adapter
        try:
            with watch.stage("load"):
                await self._engine.load_adapter(adapter)
        except Exception as error:  # an engine may refuse for reasons of its own; the old version keeps serving
            log.error("engine refused an adapter", exc_info=error)
            raise refuse("the engine could not load it.", reason="LOAD_FAILED") from error
        try:
            reach("push.loaded")
            with watch.stage("prove"):
                mean = await self._prove(candidate)
            check()
            return mean
        except BaseException:  # an interruption too must leave nothing half-done
            await self._engine.unload_adapter(adapter)
            raise

    async def _prove(self, candidate: Candidate) -> float:
        """Return the mean |delta logprob| of the probes after every check of the adapter against them."""
        probes = candidate.declaration.probes
        served = await self._score(probes, candidate.adapter)
        base = await self._score(probes, None)
        await self._check_base()
        tolerance = self._tolerance or default_tolerance(self._engine.description.dtype)
        differs = candidate.declaration.differs_from_base
        check_effect(served, base, probes, differs=differs, tolerance=tolerance)
        mean = check_claim(served, [value for probe in probes for value in probe.logprobs], tolerance=tolerance)
        before = candidate.before
        if before is not None and before.declaration.weights_sha256 != candidate.declaration.weights_sha256:
            seen = trainer_change(probes, before.declaration.probes)
            if seen is not None and seen > VISIBLE * tolerance:
                check_change(served, await self._score(probes, before.adapter), seen=seen)
        return mean

    async def _score(self, probes: Sequence[Probe], adapter: LoadedAdapter | None) -> list[float]:
        """Return the log-probabilities of the probes' tokens, one probe after the other."""
        rows = await self._engine.compute_logprobs([probe.token_ids for probe in probes], adapter)
        return [value for row in rows for value in row]

    async def _check_base(self) -> None:
        """Refuse everything if the base is not what it was at the start."""
        if self._base_token_ids:
            (now,) = await self._engine.compute_logprobs([self._base_token_ids], None)
            check_base(now, self._base_logprobs, dtype=self._engine.description.dtype)


def default_tolerance(dtype: str) -> float:
    """Return the largest mean |delta logprob| in nats that two correct implementations show."""
    return FLOAT32_TOLERANCE if dtype == "float32" else REDUCED_TOLERANCE


def check_claim(served: Sequence[float], claimed: Sequence[float], *, tolerance: float) -> float:
    """Return the mean |served - claimed| in nats; refuse one above the tolerance."""
    mean = mean_difference(served, claimed)
    if not mean <= tolerance:  # also true for NaN
        raise refuse(
            f"its probes' log-probabilities are off by {mean:.3g} nats on average; {tolerance:g} is accepted.",
            reason="PROOF_FAILED",
            field="probes",
        )
    return mean


def check_effect(
    served: Sequence[float], base: Sequence[float], probes: Sequence[Probe], *, differs: bool, tolerance: float
) -> None:
    """Refuse an adapter that has less effect than the trainer saw, or has one although it should not.

    Args:
        served: Log-probabilities of the probes' tokens with the loaded adapter, one probe after the other.
        base: The same without it.
        probes: What the trainer says of both.
        differs: Declared to differ from the base.
        tolerance: Mean |delta logprob| in nats that two correct implementations show.
    """
    largest = max(abs(a - b) for a, b in zip(served, base, strict=True))
    if not differs and not largest <= tolerance:
        raise refuse(
            f"it was declared equal to the base model but differs by up to {largest:.3g} nats.",
            reason="DIFFERS_FROM_BASE",
            field="differs_from_base",
        )
    seen = trainer_difference(probes)
    if largest == 0 and (differs if seen is None else seen > VISIBLE * tolerance):
        raise refuse("loaded, it changes nothing.", reason="SAME_AS_BASE", field="differs_from_base")
    effect = mean_difference(served, base)
    if seen is not None and seen > CLEAR * tolerance and not effect >= seen / 2:
        raise refuse(
            f"loaded, it differs from the base by {effect:.3g} nats on average; where it was trained, by {seen:.3g}.",
            reason="EFFECT_TOO_SMALL",
            field="probes",
        )


def check_change(served: Sequence[float], before: Sequence[float], *, seen: float) -> None:
    """Refuse an adapter that computes what the version before it does, as one does that the engine took for that.

    Args:
        served: Log-probabilities of the probes' tokens with the loaded adapter.
        before: The same with the version before.
        seen: Mean |delta logprob| in nats between the two where they were trained; enough to be told.
    """
    change = mean_difference(served, before)
    if not change > STALE * seen:
        raise refuse(
            f"loaded, it differs from the version before by {change:.3g} nats on average; where it was trained, by"
            f" {seen:.3g}.",
            reason="SAME_AS_BEFORE",
            field="probes",
        )


def check_base(now: Sequence[float], before: Sequence[float], *, dtype: str) -> None:
    """Refuse any adapter where the base model itself has changed since the start."""
    tolerance = FLOAT32_BASE_TOLERANCE if dtype == "float32" else REDUCED_TOLERANCE
    mean = mean_difference(now, before)
    if not mean <= tolerance:
        raise refuse(
            f"the generator's base model has changed by {mean:.3g} nats on average since the start; restart it.",
            reason="BASE_CHANGED",
        )


def trainer_change(probes: Sequence[Probe], before: Sequence[Probe]) -> float | None:
    """Return the mean |delta logprob| in nats between two versions where they were trained.

    None if their probes are not of the same tokens.
    """
    if [probe.token_ids for probe in probes] != [probe.token_ids for probe in before]:
        return None
    return mean_difference(
        [value for probe in probes for value in probe.logprobs], [value for probe in before for value in probe.logprobs]
    )


def trainer_difference(probes: Sequence[Probe]) -> float | None:
    """Return the mean |delta logprob| in nats that the adapter makes where it was trained; None if not said."""
    if not all(probe.base_logprobs for probe in probes):
        return None
    return mean_difference(
        [value for probe in probes for value in probe.logprobs],
        [value for probe in probes for value in probe.base_logprobs],
    )


def mean_difference(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the mean |a - b|."""
    return math.fsum(abs(x - y) for x, y in zip(a, b, strict=True)) / len(a)
