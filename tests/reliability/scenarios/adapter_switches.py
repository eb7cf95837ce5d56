"""R11: the adapter is switched again and again under load: every answer is exactly what one version answers."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Final

from tests.reliability.adapter_bench import RUN, Bench, open_bench
from tests.reliability.checker import check, read_history
from tests.reliability.scenario import Outcome, Scenario, Trial
from tests.reliability.world import WorldPlan
from tests.rpc.adapter_files import activate, begin_request, fake_adapter, push
from tether.errors import FailedPreconditionError
from tether.generator import Generation, GeneratorClient, SamplingParams
from tether_services.generator.engine import Sampling, derive_seed
from tether_services.generator.engines.fake import fake_completion

PROMPTS: Final = tuple(tuple(range(40, 40 + length)) for length in (3, 5, 8, 13))
"""Few, so that each is asked for again under the next version: what is cached of it must not be used then."""
MAX_TOKENS: Final = 12
TOKEN_SECONDS: Final = 0.003
"""So that requests are under way while the version is switched."""
KEEP_VERSIONS: Final = 4
CALL_SECONDS: Final = 10.0


@dataclass(slots=True)
class Load:
    """Callers that go on until the end, and what they were answered."""

    bench: Bench
    random: Random
    active: int = 1
    """The version that was activated last."""
    over: bool = False
    oracle: dict[str, float] = field(default_factory=dict)
    """Sum of the log-probabilities of every answer that may be given."""
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    async def call_unpinned(self, client: GeneratorClient, name: str) -> None:
        """Ask for whatever is active; what answers must never be older than what answered before."""
        newest = 0
        while not self.over:
            answer = await self.ask(client, None)
            self.counts["unpinned"] += 1
            self.counts["switched meanwhile"] += answer.policy_version < self.active
            if answer.policy_version < newest:
                self.failures.append(f"{name} was answered by version {answer.policy_version} after {newest}")
            newest = max(newest, answer.policy_version)

    async def call_pinned(self, client: GeneratorClient, name: str) -> None:
        """Ask for a version: the one that is active, or the one before it."""
        while not self.over:
            wanted = max(1, self.active - self.random.randrange(2))
            try:
                answer = await self.ask(client, wanted)
            except FailedPreconditionError as error:
                assert error.reason == "VERSION_NOT_LOADED", error
                self.counts["pinned and gone"] += 1
                continue
            self.counts["pinned"] += 1
            if answer.policy_version != wanted:
                self.failures.append(f"{name} asked for version {wanted} and got {answer.policy_version}")

    async def ask(self, client: GeneratorClient, version: int | None) -> Generation:
        """Return an answer, recorded under the name that it has if it is the right one."""
        prompt, seed = self.random.choice(PROMPTS), self.random.randrange(2**31)
        sampling = SamplingParams(max_tokens=MAX_TOKENS, seed=seed)
        call = client.generate(prompt, n=2, sampling=sampling, policy_version=version, run_id=RUN)
        answer = await self.bench.world.recorder.call("Generate", CALL_SECONDS, call)
        for index, completion in enumerate(answer.completions):
            self.foretell(prompt, seed, index, answer.policy_version)
            self.bench.world.recorder.record(
                "served",
                policy_version=answer.policy_version,
                key=name_answer(answer.policy_version, (prompt, seed, index), completion.token_ids),
                logprob=sum(completion.logprobs),
            )
        return answer

    def foretell(self, prompt: Sequence[int], seed: int, index: int, version: int) -> None:
        """Put what a version answers into the oracle; no other version may answer the same."""
        sampling = Sampling(max_tokens=MAX_TOKENS, seed=seed)
        stream = derive_seed(seed, index)
        right = fake_completion(prompt, sampling, version, stream=stream)
        self.oracle[name_answer(version, (prompt, seed, index), right.token_ids)] = sum(right.logprobs)
        for other in (version - 1, version + 1):
            different = fake_completion(prompt, sampling, other, stream=stream)
            self.counts["ambiguous"] += different.logprobs == right.logprobs


def name_answer(version: int, question: tuple[Sequence[int], int, int], token_ids: Sequence[int]) -> str:
    """Return the key of an answer: for another version, prompt, seed or index, or with other tokens, it is another.

    Args:
        version: That is said to have answered.
        question: Prompt, seed and index of the completion.
        token_ids: The answer.
    """
    prompt, seed, index = question
    return f"version {version}, {len(prompt)} tokens, seed {seed}, completion {index}: {' '.join(map(str, token_ids))}"


async def run(trial: Trial) -> Outcome:
    """Switch under load; the control loads all versions of a run under one name, so that cached prompts are stale."""
    period, seconds = (2.0, 20 * 60.0) if trial.long else (0.05, 2.0 if trial.control else 8.0)
    sabotage = {"generator": ["prefix cache", *(["names"] if trial.control else [])]}
    settings = {"adapters": {"folder": str(trial.folder / "adapters"), "keep_versions": KEEP_VERSIONS}}
    settings["fake_token_seconds"] = TOKEN_SECONDS  # type: ignore[assignment]
    plan = WorldPlan(services=("generator",), sabotage=sabotage, settings={"generator": settings})
    async with open_bench(trial.folder, plan, first=False) as bench:
        load = Load(bench, trial.random)
        await switch(load, 1)
        target = bench.world.addresses["generator"]
        async with GeneratorClient(target, timeout_seconds=CALL_SECONDS) as client, asyncio.TaskGroup() as callers:
            for number in range(4):
                callers.create_task(load.call_unpinned(client, f"caller {number}"))
            for number in range(3):
                callers.create_task(load.call_pinned(client, f"pinning caller {number}"))
            longest = await switch_until_end(load, period=period, seconds=seconds)
    return judge(load, {"longest switch ms": round(1000 * longest)})


async def switch_until_end(load: Load, *, period: float, seconds: float) -> float:
    """Push and activate the next version every `period`, and return the seconds that the slowest one took."""
    end, longest = time.monotonic() + seconds, 0.0
    try:
        while (started := time.monotonic()) < end:
            await switch(load, load.active + 1)
            took = time.monotonic() - started
            longest = max(longest, took)
            await asyncio.sleep(max(0.0, period - took))
    finally:
        load.over = True
    return longest


async def switch(load: Load, version: int) -> None:
    """Push a version and activate it."""
    adapter, stub = fake_adapter(version), load.bench.straight
    await push(stub, begin_request(adapter, RUN, version), adapter)
    await load.bench.world.recorder.call("ActivateAdapter", CALL_SECONDS, activate(stub, RUN, version))
    load.active = version


def judge(load: Load, figures: dict[str, object]) -> Outcome:
    """Return the verdict on all answers."""
    verdict = check(read_history(load.bench.world.recorder.path), oracle=load.oracle)
    counts, failures = load.counts, load.failures
    if load.active < 20 or counts["switched meanwhile"] < 20 or not counts["pinned"]:
        failures.append(f"too little was met: {load.active} switches, {dict(counts)}")
    if counts["ambiguous"]:
        failures.append(f"{counts['ambiguous']} answers are those of two versions")
    answers = {name: counts[name] for name in ("unpinned", "pinned", "switched meanwhile", "pinned and gone")}
    counted = {"switches": load.active, **answers, "answers judged": verdict.counts["served"]}
    mismatches = sum(name == "I4" for name, _ in verdict.violations)
    return Outcome(verdict, {**counted, "mismatches": mismatches, **figures}, failures)


SCENARIOS = [
    Scenario(
        name="R11 switches",
        title="the adapter switched under pinned and unpinned calls, each answer compared with the oracle",
        run=run,
        control="names of adapters that are never used again",
        caught_as=frozenset({"I4"}),
        seconds=60,
        usual_seconds=12,
    )
]
