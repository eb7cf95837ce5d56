"""Takes a protection out of a service before it starts: what a negative control runs against."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from tests.reliability.traits import TRAITS

__all__ = ["SPOILED_STEPS", "take_out"]

SPOILED_STEPS: Final = "TETHER_TEST_SPOILED_STEPS"
SPOILED_SIZE: Final = 2.0
"""Of the noise in the B matrices: the policy is far from the reference then."""


def take_out(name: str) -> None:
    """Take a protection, a key of SABOTAGES, out of this process and of those that it forks, or give it a trait."""
    (SABOTAGES | TRAITS)[name]()


def _replace(module: str, name: str, replacement: Callable[..., Any], *, loaded_by: str) -> None:
    """Put a function in the place of another one, wherever it has been imported.

    Args:
        module: Where the function is defined.
        name: The function.
        replacement: Takes its place.
        loaded_by: A module that imports everything which may use it.
    """
    original = getattr(importlib.import_module(module), name)
    importlib.import_module(loaded_by)
    for loaded in list(sys.modules.values()):
        if getattr(loaded, "__name__", "").startswith("tether_services") and getattr(loaded, name, None) is original:
            setattr(loaded, name, replacement)


def _set(owner: object, name: str, replacement: Callable[..., Any]) -> None:
    """Replace an attribute that exists."""
    assert hasattr(owner, name), f"{owner} has no {name} any more"
    setattr(owner, name, replacement)


def _replace_in_generator(module: str, name: str, replacement: Callable[..., Any]) -> None:
    service = "tether_services.generator.service"
    _replace(f"tether_services.generator.{module}", name, replacement, loaded_by=service)


def _take_out_hash() -> None:
    """Bytes are not compared with the hash that was declared for them."""
    _replace_in_generator("verification", "check_hash", lambda path, sha256: None)


def _take_out_checks() -> None:
    """The values of an adapter and its effect are not looked at."""
    _replace_in_generator("verification", "check_finite", lambda path, entries: None)
    _replace_in_generator("proof", "check_claim", lambda served, claimed, tolerance: 0.0)
    for name in ("check_effect", "check_change", "check_base"):
        _replace_in_generator("proof", name, lambda *served, **declared: None)


def _take_out_seeds() -> None:
    """Samples depend on the process that asks for them, not on step and prompt alone."""
    from tether_services.orchestrator.prompts import derive_seed

    _replace(
        "tether_services.orchestrator.prompts",
        "derive_seed",
        lambda *parts: derive_seed(*parts, os.getpid()),
        loaded_by="tether_services.orchestrator.loop",
    )


def _take_out_staging() -> None:
    """Bytes are written over the newest stored version in place of a folder of their own."""
    from tether_services.generator.storage import AdapterStorage

    beside = AdapterStorage.stage

    def stage(self: AdapterStorage, upload_id: str) -> Path:
        newest = max(self.folder.glob("versions/*/*"), key=lambda path: path.stat().st_mtime_ns, default=None)
        return beside(self, upload_id) if newest is None else newest

    _set(AdapterStorage, "stage", stage)


def _take_out_order() -> None:
    """A checkpoint reaches its place only after the step that needs it is committed."""
    from tether_services.orchestrator import loop
    from tether_services.orchestrator.records import CheckpointRow
    from tether_services.orchestrator.session import Session

    save, publish = Session.save_checkpoint, loop.publish
    late: list[tuple[Path, Path]] = []

    async def save_late(self: Session, policy_version: int) -> CheckpointRow:
        row = await save(self, policy_version)
        late.append((self.files.directory / "late", self.files.directory / row.path))
        late[-1][1].rename(late[-1][0])
        return row

    async def publish_after(*arguments: Any) -> None:
        while late:
            hidden, place = late.pop()
            hidden.rename(place)
        await publish(*arguments)

    _set(Session, "save_checkpoint", save_late)
    _set(loop, "publish", publish_after)


def _take_out_crc() -> None:
    """Chunks of an upload are not compared with the CRC-32 that was sent with them."""
    _replace_in_generator("uploads", "check_chunk", lambda chunk: None)


def _take_out_names() -> None:
    """All adapters of a run have one name in the engine, as if they were loaded in place of each other."""
    from tether_services.generator.pushes import AdapterPushes

    name = AdapterPushes._name
    _set(AdapterPushes, "_name", lambda *given: replace(name(*given), name=given[1].run_id))


def _take_out_versions() -> None:
    """Samples are asked for and taken from whatever version the generator serves."""
    from tether.generator import Generation, GeneratorClient

    pinned = GeneratorClient.generate

    async def generate(self: GeneratorClient, prompt: Any, **options: Any) -> Generation:
        return await pinned(self, prompt, **{**options, "policy_version": None, "run_id": ""})

    _set(GeneratorClient, "generate", generate)
    _replace(
        "tether_services.orchestrator.rollouts",
        "find_faults",
        lambda generation, asked: [""] * len(generation.completions),
        loaded_by="tether_services.orchestrator.loop",
    )


def _take_out_barrier() -> None:
    """A step goes on once the first generator has the new version; the others get it a step later."""
    from tether_services.orchestrator.fleet import Fleet
    from tether_services.orchestrator.publishing import LocalAdapter, PushFigures

    versions: list[LocalAdapter] = []

    async def publish(self: Fleet, adapter: LocalAdapter) -> PushFigures:
        first, *others = self.publishers
        self._current = adapter
        for publisher in others:
            await publisher.publish(versions[-1] if versions else None)
        versions.append(adapter)
        return await first.publish(adapter)

    _set(Fleet, "publish", publish)


def _take_out_account() -> None:
    """Each rollout loses a sample, and neither it nor the ledger counts what it is told."""
    from tether_services.orchestrator import ledger_steps
    from tether_services.orchestrator.rollouts import Rollout

    add = Rollout.add

    def lose_first(self: Rollout, *arguments: Any) -> None:
        add(self, *arguments)
        if len(self.rows) == 1:
            self.samples.clear()

    def train_samples(connection: Any, run: Any, step: int, counts: object) -> None:
        where = "run_id = ? AND step = ? AND epoch = ? AND state = 'generated'"
        connection.execute(f"UPDATE samples SET state = 'trained' WHERE {where}", (run.run_id, step, run.epoch))

    _set(Rollout, "add", lose_first)
    _set(Rollout, "check", lambda self, **limits: None)
    _set(ledger_steps, "_train_samples", train_samples)


def _take_out_clock() -> None:
    """Leases are timed by the time of day."""
    from tether_services.orchestrator import heartbeat
    from tether_services.orchestrator.ledger import Ledger

    defaults = Ledger.__init__.__kwdefaults__
    assert defaults and "clock_ns" in defaults, "the ledger has no default clock any more"
    defaults["clock_ns"] = time.time_ns
    _set(heartbeat, "boot_clock_ns", time.time_ns)


def _take_out_checkpoint_hash() -> None:
    """A checkpoint is loaded whatever its bytes are."""
    from safetensors.torch import load

    from tether_services.orchestrator.run_files import RunFiles
    from tether_services.orchestrator.trainer import checkpoint

    _set(RunFiles, "find_checkpoint", lambda self, row: self.directory / row.path)
    _set(checkpoint, "_read_tensors", lambda path, hashes: load(path.read_bytes()))


def _take_out_alarms() -> None:
    """No figure of a step raises an alarm."""
    _replace(
        "tether_services.orchestrator.alarms",
        "find_alarm",
        lambda *figures: None,
        loaded_by="tether_services.orchestrator.loop",
    )


def _spoil() -> None:
    """Let the update of one step of each of the first attempts make a bad policy: a fault, for lack of a better place.

    `SPOILED_STEPS` of the environment holds the steps, in the order of the attempts.
    """
    import torch

    from tether_services.orchestrator import loop
    from tether_services.orchestrator.session import Session
    from tether_services.runtime.history import record

    learn = loop.learn
    steps = json.loads(os.environ.get(SPOILED_STEPS, "[]"))

    def ruin(session: Session) -> None:
        with torch.no_grad():
            noise = torch.Generator().manual_seed(1)
            for name, parameter in session.trainer._model.adapter_parameters("policy").items():
                if "lora_B" in name:
                    parameter.copy_(SPOILED_SIZE * torch.randn(parameter.shape, generator=noise))

    async def learn_badly(session: Session, step: int, clock: Any) -> Any:
        learned = await learn(session, step, clock)
        if steps[session.attempt.epoch - 1 : session.attempt.epoch] == [step]:
            await session.thread.run(ruin, session)
            record("spoiled", run=session.attempt.run_id, step=step, why="its weights are noise")
        return learned

    _set(loop, "learn", learn_badly)


def _take_out_epoch() -> None:
    """The generator does not compare the epochs of the writers of a run."""
    from tether_services.generator.fence import Fence

    _set(Fence, "check", lambda self, run_id, epoch: None)


def _take_out_drain() -> None:
    """A service that is told to end does so at once, in the middle of a call."""
    from tether_services.runtime.server import ServiceRunner

    async def end(self: ServiceRunner) -> None:
        while not self._registry.get_sample_value("tether_reward_calls_in_flight"):
            await asyncio.sleep(0.001)
        os._exit(0)

    _set(ServiceRunner, "close", end)


def _leak() -> None:
    """Every call leaves 20 kB behind: not a protection, but what the watch on memory must notice."""
    from tether_services.runtime.pipeline import Pipeline

    answer, kept = Pipeline.answer, list[bytes]()

    async def answer_and_keep(self: Pipeline, *arguments: Any) -> Any:
        kept.append(os.urandom(20_000))
        return await answer(self, *arguments)

    _set(Pipeline, "answer", answer_and_keep)


def _take_out_sizes() -> None:
    """A port takes messages of any size."""
    from tether_services.runtime import server

    options = server.server_options
    unlimited = {"grpc.max_receive_message_length": -1}
    _set(server, "server_options", lambda *given: list((dict(options(*given)) | unlimited).items()))


def _take_out_reload() -> None:
    """Certificates and tokens are read once."""
    from tether_services.runtime.reloading import Reloaded

    _set(Reloaded, "refresh", lambda self: self.value)


def _take_out_fairness() -> None:
    """The queue does not know whose items wait in it."""
    from tether_services.runtime import batching
    from tether_services.runtime.callers import ANONYMOUS

    _set(batching, "current_caller", lambda: ANONYMOUS)


SABOTAGES: Final[dict[str, Callable[[], None]]] = {
    "hash": _take_out_hash,
    "checks": _take_out_checks,
    "seeds": _take_out_seeds,
    "staging": _take_out_staging,
    "order": _take_out_order,
    "crc": _take_out_crc,
    "names": _take_out_names,
    "versions": _take_out_versions,
    "barrier": _take_out_barrier,
    "account": _take_out_account,
    "clock": _take_out_clock,
    "checkpoint_hash": _take_out_checkpoint_hash,
    "alarms": _take_out_alarms,
    "spoil": _spoil,
    "epoch": _take_out_epoch,
    "drain": _take_out_drain,
    "leak": _leak,
    "sizes": _take_out_sizes,
    "reload": _take_out_reload,
    "fairness": _take_out_fairness,
}
