"""Gives the fake engine a trait of a real one that an experiment needs; no protection is taken out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from tests.reliability.fork_server import OUT_OF_REACH

__all__ = ["TRAITS", "WIDE_UNIT_BYTES", "wide_shapes"]

SLOW_SECONDS: Final = 0.005
"""Of a score of the slow fake reward engine."""
WIDE_UNIT: Final = 8192
WIDE_RANK: Final = 16
WIDE_UNIT_BYTES: Final = 4 * 2 * WIDE_UNIT * WIDE_RANK
"""Of the float32 adapter of one unit of width."""


def wide_shapes(units: int) -> dict[str, tuple[int, int]]:
    """Return the linear layer of a base whose adapter of rank WIDE_RANK has `units` times WIDE_UNIT_BYTES."""
    return {"model.layers.0.self_attn.q_proj": (units * WIDE_UNIT, units * WIDE_UNIT)}


def _have_wide_layers(units: int) -> None:
    """The base claims a layer so wide that an adapter of it is as large as a real one."""
    from tether_services.generator.engines.fake import FAKE_LINEAR_SHAPES

    FAKE_LINEAR_SHAPES.clear()
    FAKE_LINEAR_SHAPES.update(wide_shapes(units))


def _have_prefix_cache() -> None:
    """A prompt is continued from what was computed of it before under the same name of an adapter, as vLLM does."""
    from tether_services.generator.engine import EngineCompletion, GenerateCall
    from tether_services.generator.engines.fake import FakeEngine

    generate = FakeEngine.generate
    cached: dict[tuple[str, tuple[int, ...]], int] = {}

    async def generate_cached(self: FakeEngine, call: GenerateCall) -> list[EngineCompletion]:
        adapter = call.adapter
        if adapter is not None:
            version = cached.setdefault((adapter.name, call.prompt_token_ids), adapter.policy_version)
            call = replace(call, adapter=replace(adapter, policy_version=version))
        return await generate(self, call)

    FakeEngine.generate = generate_cached  # type: ignore[method-assign]


def _be_slow() -> None:
    """Scores of the fake reward engine take a while each, one after the other, as on a device that is busy."""
    from tether.errors import TetherError
    from tether_services.reward.engine import ScoreTask
    from tether_services.reward.engines.fake import FakeRewardEngine

    score = FakeRewardEngine.score

    async def score_slowly(self: FakeRewardEngine, tasks: Sequence[ScoreTask]) -> list[float | TetherError]:
        await asyncio.sleep(SLOW_SECONDS * len(tasks))
        return await score(self, tasks)

    FakeRewardEngine.score = score_slowly  # type: ignore[method-assign]


def _be_out_of_reach() -> None:
    """A worker that is replaced cannot be ended by the orchestrator, as if it ran on another machine."""
    from tether_services.orchestrator import supervisor

    assert hasattr(supervisor, "end_holder"), "the supervisor ends no worker any more"
    supervisor.end_holder = lambda lease: False


TRAITS: Final[dict[str, Callable[[], None]]] = {
    "wide": lambda: _have_wide_layers(8),
    "very wide": lambda: _have_wide_layers(300),
    "prefix cache": _have_prefix_cache,
    "slow": _be_slow,
    OUT_OF_REACH: _be_out_of_reach,
}
