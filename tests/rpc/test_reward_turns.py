"""A full queue leaves the event loop its turns."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from tests.rpc.reward_model_serving import serve_rewards
from tests.rpc.serving import run
from tether_services.reward.items import ScoreInput
from tether_services.reward.scoring import prepare_one


def test_others_have_turns_between_the_batches_of_a_full_queue() -> None:
    async def scenario() -> None:
        async with serve_rewards(batch={"max_items": 1}) as rewards:
            scorer, [held] = rewards.service._scorer, rewards.service._pool.all()
            item = prepare_one(held.model.reader, ScoreInput(response_token_ids=(5,)), b"")
            turns, seen = 0, []
            execute = scorer.batcher._run

            async def note(batch: Sequence[Any]) -> Sequence[Any]:
                seen.append(turns)
                return await execute(batch)

            async def count() -> None:
                nonlocal turns
                while len(seen) < 20:
                    turns += 1
                    await asyncio.sleep(0)

            scorer.batcher._run = note
            counting = asyncio.create_task(count())
            await scorer._batch(held, [item] * 20, timeout_seconds=20)
            await counting
            assert len(set(seen)) == 20, seen

    run(scenario())
