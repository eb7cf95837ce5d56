"""Publishing adapters to a real generator: what is pushed, proven, refused and put right."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.rpc.run_services import run_services, small_run_toml, write_tiny_policy, write_word_prompts
from tests.rpc.serving import run
from tether.adapter import Adapter, AdapterClient, AdapterProbe
from tether.errors import AbortedError, FailedPreconditionError
from tether_services.orchestrator.ledger import Ledger
from tether_services.orchestrator.loop import collect_step, to_batch
from tether_services.orchestrator.prompts import Prompt
from tether_services.orchestrator.publishing import LocalAdapter, PolicyPublisher, PushFigures
from tether_services.orchestrator.run_config import parse_run_config
from tether_services.orchestrator.session import Session, choose_probes, open_session


@dataclass(frozen=True, slots=True)
class World:
    """A session on a tiny policy, and a client of the generator's admin port."""

    session: Session
    adapters: AdapterClient

    @property
    def publisher(self) -> PolicyPublisher:
        """What brings adapters to the one generator."""
        (publisher,) = self.session.publisher.publishers
        return publisher

    async def next_adapter(self, version: int) -> LocalAdapter:
        """Learn once from fresh samples and return the policy as the given version."""
        rollout = await collect_step(self.session, version - 1)
        self.session.trainer.update(to_batch(rollout, max_response_tokens=8))
        return await self.session.export_adapter(version)

    async def active(self) -> tuple[str, int]:
        now = await self.adapters.get_active_adapter()
        return now.run_id, now.policy_version


@asynccontextmanager
async def world(folder: Path) -> AsyncIterator[World]:
    model, prompts = write_tiny_policy(folder / "policy"), write_word_prompts(folder / "prompts.txt")
    text = small_run_toml(model, prompts)
    ledger = Ledger(folder / "runs")
    attempt = ledger.create_run("demo", config_toml=text, total_steps=3)
    async with (
        run_services(model, folder / "runs") as services,
        AdapterClient(services.settings.adapter_address) as adapters,
        open_session(services.settings, parse_run_config(text), ledger, attempt) as session,
    ):
        yield World(session, adapters)


def test_a_published_adapter_is_active_and_its_probes_agree(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            assert await w.active() == ("demo", 0)
            adapter = await w.next_adapter(1)
            pushed = await w.session.publisher.publish(adapter)
            assert await w.active() == ("demo", 1)
            assert (w.session.publisher.policy_version, w.session.publisher.adapter_sha256) == (1, adapter.sha256)
            assert pushed.probe_mean_abs_dlogp is not None and pushed.probe_mean_abs_dlogp < 1e-4
            assert all(value is not None and value > 0 for value in asdict(pushed).values())
            stored = await w.adapters.list_adapters()
            assert [(a.sha256, a.size_bytes) for a in stored] == [(adapter.sha256, adapter.size_bytes)]

    run(scenario(), timeout_seconds=120)


def test_publishing_the_same_adapter_again_changes_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            adapter = await w.next_adapter(1)
            await w.session.publisher.publish(adapter)
            again = await w.session.publisher.publish(adapter)
            assert again == PushFigures(again.activate_seconds), "nothing was pushed, so nothing was measured"
            assert await w.active() == ("demo", 1)

    run(scenario(), timeout_seconds=120)


def test_an_adapter_that_does_not_compute_what_the_trainer_does_is_refused_and_the_old_version_serves(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            adapter = await w.next_adapter(1)
            lies = [AdapterProbe(p.token_ids, [x - 0.5 for x in p.logprobs]) for p in adapter.push.probes]
            wrong = replace(adapter, push=replace(adapter.push, probes=lies))
            with pytest.raises(FailedPreconditionError, match="adapter at 127") as caught:
                await w.session.publisher.publish(wrong)
            assert caught.value.reason == "PROOF_FAILED"
            assert await w.active() == ("demo", 0)
            assert await w.adapters.list_adapters() == ()

    run(scenario(), timeout_seconds=120)


def test_an_adapter_for_another_base_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            adapter = await w.next_adapter(1)
            wrong = replace(adapter, push=replace(adapter.push, base_model_sha256="0" * 64))
            with pytest.raises(FailedPreconditionError) as caught:
                await w.session.publisher.publish(wrong)
            assert caught.value.reason == "WRONG_BASE_MODEL"

    run(scenario(), timeout_seconds=120)


def test_a_version_that_somebody_else_stored_under_the_same_number_is_not_trusted(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            adapter = await w.next_adapter(1)
            await w.session.publisher.publish(adapter)
            rollout = await collect_step(w.session, 1)
            w.session.trainer.update(to_batch(rollout, max_response_tokens=8))
            other = await w.session.export_adapter(1)
            assert other.sha256 != adapter.sha256
            await w.session.publisher.take_over(other)
            stored = await w.adapters.list_adapters()
            assert [a.sha256 for a in stored if a.state == "active"] == [other.sha256]

    run(scenario(), timeout_seconds=120)


def next_attempt(w: World) -> PolicyPublisher:
    """What the next attempt of the run publishes with."""
    attempt = replace(w.session.attempt, epoch=w.session.attempt.epoch + 1)
    return PolicyPublisher(w.publisher._remote, attempt)


def test_an_attempt_that_was_replaced_publishes_nothing_more(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            adapter = await w.next_adapter(1)
            successor = next_attempt(w)
            await successor.take_over(None)  # what it wants is active already: it is the first to say so all the same
            with pytest.raises(AbortedError) as caught:
                await w.session.publisher.publish(adapter)
            assert caught.value.reason == "STALE_EPOCH"
            assert await w.adapters.list_adapters() == ()
            await successor.publish(adapter)
            assert await w.active() == ("demo", 1)
            with pytest.raises(AbortedError):
                await w.session.publisher.take_over(None)
            assert await w.active() == ("demo", 1)

    run(scenario(), timeout_seconds=120)


class Late(PolicyPublisher):
    """Lets something happen each time that it has read what the generator holds."""

    async def _stored(self) -> list[Adapter]:
        stored = await super()._stored()
        await self.meanwhile()
        return stored

    async def meanwhile(self) -> None:
        """What happens."""


def test_earlier_attempts_are_locked_out_before_the_stored_versions_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            adapter, pushed = await w.next_adapter(1), []

            async def earlier_attempt_pushes(_: Late) -> None:
                with pytest.raises(AbortedError) as caught:
                    await w.adapters.push(adapter.directory, adapter.push, epoch=1)
                pushed.append(caught.value.reason)

            monkeypatch.setattr(Late, "meanwhile", earlier_attempt_pushes)
            await Late(w.publisher._remote, replace(w.session.attempt, epoch=2)).take_over(None)
            assert set(pushed) == {"STALE_EPOCH"}
            assert await w.adapters.list_adapters() == ()

    run(scenario(), timeout_seconds=120)


def test_an_uncommitted_version_serves_until_the_committed_one_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    switched: list[int] = []
    activate = AdapterClient.activate

    async def note(self: AdapterClient, run_id: str, version: int, **options: Any) -> int:
        switched.append(version)
        return await activate(self, run_id, version, **options)

    async def scenario() -> None:
        async with world(tmp_path) as w:
            committed = await w.next_adapter(1)
            await w.session.publisher.publish(committed)
            await w.session.publisher.publish(await w.next_adapter(2))
            monkeypatch.setattr(AdapterClient, "activate", note)
            await next_attempt(w).take_over(committed)
            assert await w.active() == ("demo", 1)
            assert 0 not in switched, "callers without a version never see the base"
            stored = await w.adapters.list_adapters()
            assert [(a.policy_version, a.state) for a in stored if a.state != "retiring"] == [(1, "active")]

    run(scenario(), timeout_seconds=120)


def test_the_generator_is_told_what_the_adapter_changes_in_the_trainer(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            adapter = await w.next_adapter(1)
            for probe in adapter.push.probes:
                assert len(probe.base_logprobs) == len(probe.logprobs) == len(probe.token_ids) - 1
                assert list(probe.base_logprobs) != list(probe.logprobs)
            away = [
                AdapterProbe(p.token_ids, p.logprobs, [x - 9.0 for x in p.base_logprobs]) for p in adapter.push.probes
            ]
            with pytest.raises(FailedPreconditionError) as caught:
                await w.session.publisher.publish(replace(adapter, push=replace(adapter.push, probes=away)))
            assert caught.value.reason == "EFFECT_TOO_SMALL"
            await w.session.publisher.publish(adapter)

    run(scenario(), timeout_seconds=120)


def test_a_version_that_was_rolled_back_is_restored(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            await w.session.publisher.publish(await w.next_adapter(1))
            await w.adapters.rollback("demo", expected_policy_version=1, epoch=1)
            assert await w.active() == ("demo", 0)
            await w.publisher.restore()
            assert await w.active() == ("demo", 1)

    run(scenario(), timeout_seconds=120)


def test_a_version_that_was_deleted_is_pushed_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            await w.session.publisher.publish(await w.next_adapter(1))
            await w.adapters.rollback("demo", expected_policy_version=1, epoch=1)
            await w.adapters.delete("demo", 1, epoch=1)
            await w.publisher.restore()
            assert await w.active() == ("demo", 1)

    run(scenario(), timeout_seconds=120)


def test_probes_are_short_distinct_sequences_of_the_first_prompts() -> None:
    prompts = [Prompt("", tuple(range(1, 2 + n))) for n in range(6)] + [Prompt("", tuple(range(200)))]
    probes = choose_probes(prompts)
    assert len(probes) == 4
    assert [len(p.prompt_token_ids) + len(p.response_token_ids) for p in probes] == [2, 4, 6, 8]
    (long,) = choose_probes(prompts[-1:])
    assert len(long.prompt_token_ids) + len(long.response_token_ids) == 64
