"""R12: adapters that are broken or belong elsewhere are never served; what was served before goes on being served."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any, Final

import numpy as np
from safetensors.numpy import load, save

from tests.reliability.adapter_bench import RUN, Bench, open_bench
from tests.reliability.scenario import Outcome, Scenario, Trial
from tests.reliability.world import WorldPlan
from tests.rpc.adapter_files import AdapterBytes, read_adapter, write_peft_adapter
from tether.errors import TetherError
from tether.generator import GeneratorClient, SamplingParams

Tensors = dict[str, "np.ndarray[Any, Any]"]
Edit = Callable[[Tensors, Random], object]
PROBES: Final = ((1, 5, 6, 7, 8), (1, 20, 30, 40))
OTHER_BASE: Final = "0" * 64


def put(value: float) -> Edit:
    """Return an edit that puts a value into one random element."""

    def edit(tensors: Tensors, random: Random) -> None:
        tensor = tensors[random.choice(sorted(tensors))]
        tensor.reshape(-1)[random.randrange(tensor.size)] = value

    return edit


def cut_rank(tensors: Tensors, random: Random) -> None:
    """Give the matrices one rank less than is declared."""
    for name, tensor in tensors.items():
        tensors[name] = np.ascontiguousarray(tensor[:-1] if "lora_A" in name else tensor[:, :-1])


def vanish(tensors: Tensors, random: Random) -> None:
    """Make every B zero: the adapter changes nothing although it is declared to."""
    for name in tensors:
        if "lora_B" in name:
            tensors[name] = np.zeros_like(tensors[name])


def rename(tensors: Tensors, random: Random) -> None:
    """Let one tensor belong to a layer that the base does not have."""
    name = random.choice(sorted(tensors))
    tensors[name.replace("layers.", "layers.9")] = tensors.pop(name)


BROKEN: Final[Mapping[str, Edit]] = {
    "NaN": put(float("nan")),
    "infinity": put(float("inf")),
    "another rank": cut_rank,
    "identical to the base": vanish,
    "another layer": rename,
}
DECLARED: Final[Mapping[str, Mapping[str, Any]]] = {
    "another base": {"base_model_sha256": OTHER_BASE},
    "too large a rank": {"rank": 512},
    "unknown target": {"target_modules": ["w_proj"]},
}


def edited(adapter: AdapterBytes, edit: Edit, random: Random) -> AdapterBytes:
    """Return the adapter with its tensors edited; hashes are made of the result, so that no hash can tell."""
    tensors: Tensors = {name: tensor.copy() for name, tensor in load(adapter.weights).items()}
    edit(tensors, random)
    return AdapterBytes(adapter.config, save(tensors), adapter.rank, adapter.targets)


class Trainer:
    """Makes adapters of the tiny policy, and the proofs that a trainer would give with them."""

    def __init__(self, folder: Path, seed: int) -> None:
        from tests.rpc.generation_checks import Oracle

        names = {f"a{number}": seed + number for number in range(2)}
        model = folder / "policy"
        self.folders = {
            name: write_peft_adapter(model, folder / "made" / name, seed=own) for name, own in names.items()
        }
        self._oracle = Oracle(model, self.folders)

    def adapter(self, name: str) -> AdapterBytes:
        """Return the files of an adapter."""
        return read_adapter(self.folders[name])

    def announcement(self, name: str) -> dict[str, Any]:
        """Return the fields of BeginPush that depend on the base and the adapter."""
        from tether.v1 import adapter_pb2

        probes = [
            adapter_pb2.AdapterProbe(
                token_ids=ids,
                logprobs=self._oracle.logprobs(ids[:1], ids[1:], adapter=name),
                base_logprobs=self._oracle.logprobs(ids[:1], ids[1:]),
            )
            for ids in PROBES
        ]
        return {"base_model_sha256": self._oracle.sha256, "probes": probes}

    def base_logprobs(self, ids: tuple[int, ...]) -> list[float]:
        """Return what the base model says of a sequence."""
        return self._oracle.logprobs(ids[:1], ids[1:])


async def run(trial: Trial) -> Outcome:
    """Offer bad adapters one after the other while version 1 serves; the control checks neither values nor effect."""
    sabotage = {"generator": ["checks"]} if trial.control else {}
    plan = WorldPlan(models="tiny", services=("generator",), sabotage=sabotage)
    refusals: dict[str, str] = {}
    async with open_bench(trial.folder, plan, first=False) as bench:
        trainer = Trainer(trial.folder, trial.random.randrange(2**16))
        good = trainer.adapter("a0")
        bench.offer(good)
        await bench.push_and_activate(good, 1, **trainer.announcement("a0"))
        before = await sample(bench)
        refusals |= await offer_broken(bench, trainer, trial.random)
        refusals |= await offer_misdeclared(bench, trainer)
        active, after = await bench.observe_active(), await sample(bench)
        second = trainer.adapter("a1")
        bench.offer(second)
        await bench.push_and_activate(second, 100, **trainer.announcement("a1"))
        left = bench.left_in_staging()
    failures = [f"an adapter with {name} was accepted" for name, refusal in refusals.items() if not refusal]
    if (active, after) != ((RUN, 1), before):
        failures.append(f"version 1 does not serve as before: {active}")
    if left:
        failures.append(f"{len(left)} uploads are left in the staging folder")
    figures = {"refused": f"{sum(map(bool, refusals.values()))}/{len(refusals)}", **refusals}
    return Outcome(bench.world.recorder.judge(), figures, failures)


async def offer_broken(bench: Bench, trainer: Trainer, random: Random) -> dict[str, str]:
    """Offer adapters with bad tensors and return why each was refused."""
    refusals = {}
    for number, (name, edit) in enumerate(BROKEN.items()):
        adapter = edited(trainer.adapter("a1"), edit, random)
        bench.offer(adapter, bad_because=name)
        push = bench.push_and_activate(adapter, 10 + number, **trainer.announcement("a1"))
        refusals[name] = (await bench.refused(push))[:60]
        await bench.observe_active()
    return refusals


async def offer_misdeclared(bench: Bench, trainer: Trainer) -> dict[str, str]:
    """Offer sound adapters as something that they are not and return why each was refused."""
    refusals = {}
    for number, (name, fields) in enumerate(DECLARED.items()):
        announced = {**trainer.announcement("a1"), **fields}
        push = bench.push_and_activate(trainer.adapter("a1"), 50 + number, **announced)
        refusals[name] = (await bench.refused(push))[:60]
        await bench.observe_active()
    return refusals


async def sample(bench: Bench) -> tuple[int, ...] | str:
    """Return a seeded completion of the active version."""
    async with GeneratorClient(bench.world.addresses["generator"]) as client:
        try:
            answer = await client.generate(PROBES[0], sampling=SamplingParams(max_tokens=8, seed=3))
        except TetherError as error:
            return error.reason
    return tuple(answer.completions[0].token_ids)


SCENARIOS = [
    Scenario(
        name="R12",
        title="adapters with NaN, infinity, another rank, base, layer or target, or without any effect",
        run=run,
        control="the checks of values and of the effect",
        caught_as=frozenset({"I5"}),
        seconds=120,
    )
]
