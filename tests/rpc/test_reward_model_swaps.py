"""Versions are switched and unloaded under traffic: no call fails, and each answer is of the version that it names."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from tests.rpc.reward_model_serving import ServedRewards, fake_model, serve_rewards, store_model
from tests.rpc.serving import run
from tests.unit.tiny_reward import VOCABULARY, write_classifier
from tether.errors import TetherError
from tether.reward import ScoreItem
from tether_services.reward.engines.fake import fake_text_score
from tether_services.reward.pool import HeldModel
from tether_services.runtime.batching import Batcher

WORKERS = 8
CALLS_BETWEEN = 12
"""Answers that arrive between two switches."""
Oracle = Callable[[str, ScoreItem], float]


@dataclass
class Traffic:
    """What callers saw."""

    oracle: Oracle
    tolerance: float = 0.0
    versions: Counter[str] = field(default_factory=Counter)
    """Answers by version."""
    wrong: list[str] = field(default_factory=list)
    """Answers that are not what the version they name would say."""
    errors: list[TetherError] = field(default_factory=list)
    stopped: bool = False

    async def call_on(self, rewards: ServedRewards, worker: int, pin: str) -> None:
        """Ask without a pause until told to stop."""
        number = 0
        while not self.stopped:
            number += 1
            items = [ScoreItem("the cat", f"is {'happy' if number % 2 else 'sad'} {worker}"), ScoreItem("a", "dog ran")]
            try:
                result = await rewards.reward.score(items, model=pin)
            except TetherError as error:
                self.errors.append(error)
                await asyncio.sleep(0)
                continue
            self.versions[result.version] += 1
            for item, score in zip(items, result.scores, strict=True):
                if not abs(score.score - self.oracle(result.version, item)) <= self.tolerance:
                    self.wrong.append(f"{result.version}: {score.score}")

    async def wait_for(self, count: int) -> None:
        """Return when that many more calls have ended."""
        goal = sum(self.versions.values()) + len(self.errors) + count
        while sum(self.versions.values()) + len(self.errors) < goal:
            await asyncio.sleep(0.002)


async def swap(rewards: ServedRewards, versions: Sequence[str], traffic: Traffic, *, keep: bool = False) -> None:
    """Load, switch to and unload one version after the other while callers ask for the default in two ways."""
    workers = [
        asyncio.create_task(traffic.call_on(rewards, worker, ("", "m")[worker % 2])) for worker in range(WORKERS)
    ]
    try:
        for before, version in pairwise(versions):
            await traffic.wait_for(CALLS_BETWEEN)
            await rewards.models.load("m", version)
            await rewards.models.set_default("m", version, expected_current=f"m@{before}")
            if not keep:
                await rewards.models.unload("m", before)
        await traffic.wait_for(CALLS_BETWEEN)
    finally:
        traffic.stopped = True
        await asyncio.gather(*workers)


def fake_oracle(version: str, item: ScoreItem) -> float:
    return fake_text_score(item.prompt, item.response, salt=version)


def swap_fakes(tmp_path: Path, *, keep: bool = False, **values: Any) -> Traffic:
    """Swap through twelve fake versions and return what callers saw."""
    versions = [str(number) for number in range(1, 13)]
    for version in versions[1:]:
        store_model(tmp_path, "m", version)
    traffic = Traffic(fake_oracle)

    async def scenario() -> None:
        models = [fake_model("m", "1")]
        async with serve_rewards(models=models, model_store=str(tmp_path), **values) as rewards:
            await swap(rewards, versions, traffic, keep=keep)
            assert keep or await rewards.states() == {"m@12": "serving"}

    run(scenario())
    return traffic


def test_swaps_under_traffic_fail_no_call_and_each_answer_is_of_the_version_it_names(tmp_path: Path) -> None:
    traffic = swap_fakes(tmp_path, batch={"max_delay_seconds": 0.01})
    assert traffic.errors == [] and traffic.wrong == []
    assert set(traffic.versions) == {str(number) for number in range(1, 13)}
    assert sum(traffic.versions.values()) >= 12 * CALLS_BETWEEN


def test_swaps_under_traffic_with_the_cache_fail_no_call_either(tmp_path: Path) -> None:
    traffic = swap_fakes(tmp_path, batch={"max_delay_seconds": 0.01}, cache={"max_items": 10})
    assert traffic.errors == [] and traffic.wrong == []
    assert len(traffic.versions) == 12


def test_an_engine_that_is_closed_under_its_calls_would_be_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A control of the first test."""

    async def at_once(held: HeldModel) -> None:
        return None

    monkeypatch.setattr(HeldModel, "wait_until_unused", at_once)
    traffic = swap_fakes(tmp_path, batch={"max_delay_seconds": 0.01})
    assert traffic.errors or len(traffic.versions) < 12


def test_a_batch_of_several_versions_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another control: without the version in the key, items are judged by whatever model the first one asked for."""
    real = Batcher.submit_all

    async def without_key(self: Any, items: Any, *, key: object = None, **options: Any) -> Any:
        return await real(self, items, key="m", **options)

    monkeypatch.setattr(Batcher, "submit_all", without_key)

    async def scenario(patience: float) -> int:
        models = [fake_model("m", "1"), fake_model("m", "2")]
        async with serve_rewards(models=models, batch={"max_delay_seconds": patience, "max_items": 2}) as rewards:
            item = ScoreItem("a", "b")
            both = [rewards.reward.score([item], model=f"m@{version}") for version in ("1", "2")]
            results = await asyncio.gather(*both)
            return sum(result.scores[0].score != fake_oracle(result.version, item) for result in results)

    assert run(scenario(10.0)) == 1  # the batch begins when both are there, however long the second one takes
    monkeypatch.undo()
    assert run(scenario(0.1)) == 0


def test_real_models_are_swapped_under_traffic(tmp_path: Path) -> None:
    versions = ["1", "2", "3"]
    folders = {version: write_classifier(tmp_path / "m" / version, seed=int(version)) for version in versions}
    classifiers = {v: AutoModelForSequenceClassification.from_pretrained(f).eval() for v, f in folders.items()}
    known: dict[tuple[str, str, str], float] = {}

    def oracle(version: str, item: ScoreItem) -> float:
        key = (version, item.prompt, item.response)
        if key not in known:
            words = f"{item.prompt} {item.response}".split()
            ids = [1, *(VOCABULARY.get(word, VOCABULARY["<unk>"]) for word in words)]
            with torch.no_grad():
                known[key] = float(classifiers[version](torch.tensor([ids])).logits[0, 0])
        return known[key]

    traffic = Traffic(oracle, tolerance=1e-5)

    async def scenario() -> None:
        part = {"name": "score", "engine": "transformers", "path": str(folders["1"])}
        models = [{"name": "m", "version": "1", "components": [part]}]
        async with serve_rewards(models=models, model_store=str(tmp_path)) as rewards:
            await swap(rewards, versions, traffic)

    run(scenario())
    assert traffic.errors == [] and traffic.wrong == []
    assert set(traffic.versions) == set(versions)
    assert len({round(oracle(version, ScoreItem("the cat", "is happy 0")), 6) for version in versions}) == 3
