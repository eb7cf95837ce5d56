"""Several generators: nobody gets a prompt before all are ready, and who is away costs time, never a wrong sample."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.rpc.fleet_serving import ATTEMPT, PROMPT, ask, fleet_world, wait_until
from tests.rpc.serving import run
from tether.errors import AbortedError, FailedPreconditionError, InvalidArgumentError, UnavailableError
from tether.generator import Generation, GeneratorClient, GeneratorState
from tether_services.generator.engine import Sampling, derive_seed
from tether_services.generator.engines.fake import fake_completion
from tether_services.orchestrator import member
from tether_services.orchestrator.fleet import Fleet
from tether_services.orchestrator.member import LOOK_SECONDS, SILENT_LOOKS, Pulse
from tether_services.orchestrator.remote import Remote

HUNG_SECONDS = 2 * (0.1 + 1.0)
"""After which a silent generator is given up here; by default it is five times as long."""


@pytest.fixture(autouse=True)
def look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    assert SILENT_LOOKS * (LOOK_SECONDS + 1.0) == 10.0
    monkeypatch.setattr(member, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(member, "SILENT_LOOKS", 2)


def check_answer(generation: Generation, version: int, *, seed: int = 7, max_tokens: int = 8) -> None:
    """The answer is the oracle's, whoever gave it."""
    sampling = Sampling(max_tokens=max_tokens, temperature=1.0, seed=seed)
    expected = fake_completion(PROMPT, sampling, version, stream=derive_seed(seed, 0))
    (completion,) = generation.completions
    assert list(completion.token_ids) == list(expected.token_ids)
    assert (generation.run_id, generation.policy_version) == ("demo", version)


async def rollout(fleet: Fleet, count: int, *, max_tokens: int = 8) -> list[Generation]:
    """Ask for so many prompts at once, each with a seed of its own, and check every answer."""
    version = fleet.policy_version
    asked = [ask(fleet, seed=seed, max_tokens=max_tokens) for seed in range(count)]
    answers = await asyncio.gather(*(fleet.generate(number, operation) for number, operation in enumerate(asked)))
    for seed, answer in enumerate(answers):
        check_answer(answer, version, seed=seed, max_tokens=max_tokens)
    return answers


def test_prompts_are_shared_out_and_the_answers_do_not_depend_on_by_whom(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with fleet_world(tmp_path) as w, w.fleet() as fleet:
            await fleet.take_over(None)
            await rollout(fleet, 6)
            assert [generator.count() for generator in w.generators] == [3, 3]
            figures = await fleet.publish(w.adapter(1))
            assert [await g.active() for g in w.generators] == [("demo", 1)] * 2
            assert figures.transfer_seconds is not None and figures.probe_mean_abs_dlogp is not None
            assert figures.activate_seconds > 0
            await rollout(fleet, 6)
            assert [generator.count() for generator in w.generators] == [6, 6]
            assert w.lagging == [[]], "nobody was ever away"

    run(scenario())


def test_nobody_switches_before_all_have_proven_the_new_version(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with fleet_world(tmp_path) as w, w.fleet() as fleet:
            first, second = w.generators
            await fleet.take_over(None)
            second.freeze()
            publishing = asyncio.create_task(fleet.publish(w.adapter(1)))
            await wait_until(lambda: first.stored() == [1])
            await asyncio.sleep(0.5)
            assert await first.active() == ("demo", 0) and not publishing.done()
            second.thaw()
            await asyncio.wait_for(publishing, 5)
            assert [await g.active() for g in w.generators] == [("demo", 1)] * 2
            await rollout(fleet, 4)

    run(scenario())


@pytest.mark.parametrize("seconds", [0.5, HUNG_SECONDS + 2.0])
def test_a_step_waits_for_a_generator_that_is_stopped_during_its_push(tmp_path: Path, seconds: float) -> None:
    async def scenario() -> None:
        async with fleet_world(tmp_path) as w, w.fleet() as fleet:
            await fleet.take_over(None)
            w.generators[1].freeze()
            publishing = asyncio.create_task(fleet.publish(w.adapter(1)))
            await asyncio.sleep(seconds)
            assert not publishing.done()
            assert fleet.lagging == ((w.generators[1].target,) if seconds > HUNG_SECONDS else ())
            w.generators[1].thaw()
            thawed = time.monotonic()
            await publishing
            assert time.monotonic() - thawed < 5
            assert fleet.lagging == () and [await g.active() for g in w.generators] == [("demo", 1)] * 2
            await rollout(fleet, 4)

    run(scenario())


def test_a_step_waits_for_a_generator_that_is_killed_and_pushes_it_what_it_has_lost(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with fleet_world(tmp_path) as w, w.fleet() as fleet:
            first, second = w.generators
            await fleet.take_over(None)
            await fleet.publish(w.adapter(1))
            await second.end()
            publishing = asyncio.create_task(fleet.publish(w.adapter(2)))
            await wait_until(lambda: fleet.lagging == (second.target,))
            await wait_until(lambda: first.stored() == [1, 2])
            assert await first.active() == ("demo", 1) and not publishing.done()
            await second.start()
            returned = time.monotonic()
            await publishing
            assert time.monotonic() - returned < 10
            assert [await g.active() for g in w.generators] == [("demo", 2)] * 2
            assert w.lagging == [[], [second.target], []]
            await rollout(fleet, 4)

    run(scenario())


def test_a_generator_that_stays_away_ends_the_attempt_by_name_and_nobody_has_switched(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with fleet_world(tmp_path) as w, w.fleet(laggard_seconds=1.0) as fleet:
            first, second = w.generators
            await fleet.take_over(None)
            await second.end()
            with pytest.raises(FailedPreconditionError, match=rf"{second.target}.*UNAVAILABLE") as caught:
                await fleet.publish(w.adapter(1))
            assert caught.value.reason == "GENERATORS_AWAY"
            assert first.target not in caught.value.message
            assert await first.active() == ("demo", 0)

    run(scenario())


def test_with_leave_out_a_step_is_made_without_who_is_away_and_with_it_once_it_is_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with fleet_world(tmp_path) as w, w.fleet(laggards="leave_out") as fleet:
            first, second = w.generators
            await fleet.take_over(None)
            await second.end()
            await asyncio.wait_for(fleet.publish(w.adapter(1)), 10)
            assert fleet.lagging == (second.target,)
            await rollout(fleet, 4)
            await fleet.publish(w.adapter(2))
            await rollout(fleet, 4)
            await second.start()
            await wait_until(lambda: not fleet.lagging)
            assert await second.active() == ("demo", 2), "the version of now, not the one that it had missed"
            await rollout(fleet, 4)
            assert (first.count(), second.count()) == (10, 2)

    run(scenario())


def test_with_leave_out_at_least_one_must_be_there(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with fleet_world(tmp_path) as w, w.fleet(laggards="leave_out", laggard_seconds=4.0) as fleet:
            await fleet.take_over(None)
            for generator in w.generators:
                await generator.end()
            publishing = asyncio.create_task(fleet.publish(w.adapter(1)))
            await wait_until(lambda: len(fleet.lagging) == 2)
            await w.generators[0].start()
            await publishing
            await rollout(fleet, 4)
            await w.generators[0].end()
            with pytest.raises(FailedPreconditionError) as caught:
                await rollout(fleet, 2)
            assert caught.value.reason == "GENERATORS_AWAY"
            assert all(generator.target in caught.value.message for generator in w.generators)

    run(scenario())


def test_a_generator_that_hangs_holds_no_prompt_that_another_one_can_answer(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with fleet_world(tmp_path, fake_token_seconds=0.05) as w, w.fleet() as fleet:
            _, second = w.generators
            await fleet.take_over(None)
            answers = asyncio.create_task(rollout(fleet, 6, max_tokens=20))
            await asyncio.sleep(0.2)
            second.freeze()
            started = time.monotonic()
            await answers
            assert time.monotonic() - started < HUNG_SECONDS + 4, "its deadline is 300 s"
            assert fleet.lagging == (second.target,)
            second.thaw()
            await wait_until(lambda: not fleet.lagging)
            before = second.count()
            await rollout(fleet, 4)
            assert second.count() == before + 2

    run(scenario())


def test_a_generator_that_works_for_long_is_not_taken_for_one_that_hangs(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with fleet_world(tmp_path, fake_token_seconds=(HUNG_SECONDS + 2) / 8) as w, w.fleet() as fleet:
            await fleet.take_over(None)
            answers = await asyncio.gather(*(fleet.generate(n, ask(fleet, seed=7)) for n in range(2)))
            assert len(answers) == 2 and w.lagging == [[]]
            assert [generator.count() for generator in w.generators] == [1, 1]

    run(scenario())


def test_a_generator_that_restarts_in_the_middle_of_a_rollout_is_brought_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with fleet_world(tmp_path, fake_token_seconds=0.02) as w, w.fleet() as fleet:
            _, second = w.generators
            await fleet.take_over(None)
            await fleet.publish(w.adapter(1))
            answers = asyncio.create_task(rollout(fleet, 8, max_tokens=20))
            await asyncio.sleep(0.1)
            await second.end()
            await second.start()
            await answers
            await wait_until(lambda: not fleet.lagging)
            assert await second.active() == ("demo", 1) and second.stored() == [1]
            before = second.count()
            await rollout(fleet, 4)
            assert second.count() == before + 2

    run(scenario())


def test_an_adapter_that_one_generator_refuses_is_activated_by_none(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with fleet_world(tmp_path) as w, w.fleet() as fleet:
            await fleet.take_over(None)
            with pytest.raises(FailedPreconditionError, match="adapter at 127") as caught:
                await fleet.publish(w.adapter(1, wrong_by=0.5))
            assert caught.value.reason == "PROOF_FAILED"
            assert [await g.active() for g in w.generators] == [("demo", 0)] * 2

    run(scenario())


def test_a_generator_that_another_run_took_meanwhile_ends_the_attempt(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with fleet_world(tmp_path) as w, w.fleet(laggards="leave_out") as fleet:
            await fleet.take_over(None)
            other = replace(ATTEMPT, run_id="other")
            async with w.fleet(other) as taking:
                await taking.take_over(None)
            with pytest.raises(FailedPreconditionError) as caught:
                await rollout(fleet, 4)
            assert caught.value.reason == "GENERATOR_TAKEN"

    run(scenario())


def test_an_attempt_that_was_replaced_is_told_so_by_any_generator(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with fleet_world(tmp_path) as w, w.fleet() as fleet, w.fleet(replace(ATTEMPT, epoch=2)) as successor:
            await fleet.take_over(None)
            await successor.take_over(None)
            with pytest.raises(AbortedError) as caught:
                await fleet.publish(w.adapter(1))
            assert caught.value.reason == "STALE_EPOCH"
            assert [await g.active() for g in w.generators] == [("demo", 0)] * 2

    run(scenario())


def test_the_next_attempt_locks_out_the_one_before_at_every_generator_also_at_one_that_was_away(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with fleet_world(tmp_path) as w:
            _, second = w.generators
            async with w.fleet() as fleet:
                await fleet.take_over(None)
                await fleet.publish(w.adapter(1))
            second.freeze()
            async with w.fleet(replace(ATTEMPT, epoch=2), laggards="leave_out") as successor:
                await successor.take_over(w.adapter(1))
                assert successor.lagging == (second.target,)
                second.thaw()
                await wait_until(lambda: not successor.lagging)
                await rollout(successor, 4)
            with pytest.raises(AbortedError):
                await fleet.publishers[1].publish(w.adapter(2))

    run(scenario())


def test_a_full_generator_is_asked_again_and_does_not_lag(tmp_path: Path) -> None:
    async def scenario() -> None:
        full: dict[str, object] = {"fake_token_seconds": 0.02, "max_n": 1, "batch": {"queue_limit": 1}}
        async with fleet_world(tmp_path, **full) as w, w.fleet() as fleet:
            await fleet.take_over(None)
            await rollout(fleet, 8)
            assert w.lagging == [[]]

    run(scenario())


def test_each_generator_is_checked_and_one_that_does_not_fit_ends_the_attempt(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with fleet_world(tmp_path) as w:
            targets = [generator.target for generator in w.generators]

            def refuse_second(remote: Remote[GeneratorClient], state: GeneratorState) -> None:
                if remote.client.target == targets[1]:
                    raise InvalidArgumentError(f"{remote.client.target} has a limit of {state.max_n}", field="n")

            async with w.fleet() as fleet:
                assert list(await fleet.describe()) == targets
            async with w.fleet(check=refuse_second) as fleet:
                with pytest.raises(InvalidArgumentError, match=targets[1]):
                    await fleet.describe()
                with pytest.raises(InvalidArgumentError, match=targets[1]):
                    await fleet.take_over(None)

    run(scenario())


@pytest.mark.parametrize("laggards", ["wait", "leave_out"])
def test_a_run_begins_without_a_generator_only_where_it_may_be_left_out(
    tmp_path: Path, laggards: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tether_services.orchestrator.fleet._GRACE_SECONDS", 0.5)

    async def scenario() -> None:
        async with fleet_world(tmp_path) as w, w.fleet(laggards=laggards, laggard_seconds=3) as fleet:
            first, second = w.generators
            await second.end()
            if laggards == "wait":
                with pytest.raises(FailedPreconditionError, match=second.target):
                    await fleet.describe()
                return
            assert list(await fleet.describe()) == [first.target]
            await fleet.take_over(None)
            await rollout(fleet, 4)
            await second.start()
            await wait_until(lambda: not fleet.lagging)
            assert await second.active() == ("demo", 0)

    run(scenario())


def test_one_generator_alone_is_waited_for_as_long_as_its_calls_may_take(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with fleet_world(tmp_path) as w:
            alone = w.generators[0]
            w.services = replace(w.services, generators=w.services.generators[:1])
            async with w.fleet() as fleet:
                for act in (fleet.describe, lambda: fleet.take_over(None), lambda: fleet.publish(w.adapter(1))):
                    alone.freeze()
                    acting = asyncio.ensure_future(act())
                    await asyncio.sleep(HUNG_SECONDS + 0.5)
                    assert not acting.done()
                    alone.thaw()
                    await asyncio.wait_for(acting, 5)
                await rollout(fleet, 2)
                assert alone.count() == 2 and w.lagging == [[]]

    run(scenario())


def test_a_call_that_its_caller_gives_up_is_cancelled_and_not_taken_for_a_silent_server() -> None:
    async def scenario() -> None:
        ended = asyncio.Event()

        async def never() -> None:
            try:
                await asyncio.sleep(60)
            finally:
                ended.set()

        async def silent() -> bool:
            return False

        pulse = Pulse(silent, "somewhere")
        calling = asyncio.create_task(pulse.guard(never()))
        await asyncio.sleep(0.1)
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
        assert ended.is_set()
        with pytest.raises(UnavailableError, match=r"somewhere.*health checks"):
            await asyncio.wait_for(pulse.guard(never()), 2)
        await pulse.close()

    run(scenario())
