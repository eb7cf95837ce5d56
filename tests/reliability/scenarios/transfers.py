"""R7, transfer: a large adapter through a slow connection that breaks and damages bytes arrives whole and only once."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from random import Random
from typing import Any, Final

import numpy as np
from safetensors.numpy import save

from tests.reliability.adapter_bench import Bench, intended, open_bench
from tests.reliability.proxy import Fault, Flip, Proxy
from tests.reliability.scenario import Outcome, Scenario, Trial
from tests.reliability.scenarios.adapter_flips import describe, write_folder
from tests.reliability.traits import WIDE_RANK, wide_shapes
from tests.reliability.world import WorldPlan
from tests.rpc.adapter_files import AdapterBytes, peft_config

MEGABYTE: Final = 1024 * 1024
PIECE_BYTES: Final = 8 * MEGABYTE
"""What the client sends in one call."""
LOST_BYTES: Final = 3 * MEGABYTE
"""What a fault may cost: the chunk of 1 MiB that is under way, and what is in the buffers behind it."""
POLL_SECONDS: Final = 0.005


def wide_adapter(units: int, random: Random) -> AdapterBytes:
    """Return an adapter of `units` x WIDE_UNIT_BYTES.

    Its values are in [0.25, 0.5): no single flipped bit makes an infinity of one, so that only a hash can tell.
    """
    generator, tensors = np.random.default_rng(random.randrange(2**31)), {}
    for path, (inputs, outputs) in wide_shapes(units).items():
        for name, shape in (("lora_A", (WIDE_RANK, inputs)), ("lora_B", (outputs, WIDE_RANK))):
            values = generator.random(shape, dtype=np.float32) / 4 + np.float32(0.25)
            tensors[f"base_model.model.{path}.{name}.weight"] = values
    return AdapterBytes(peft_config(WIDE_RANK, ["q_proj"]), save(tensors), WIDE_RANK, ("q_proj",))


@dataclass(slots=True)
class Weather:
    """Breaks the connection again and again, or inverts a bit, at random offsets of what is sent."""

    proxy: Proxy
    random: Random
    base: Fault
    """What the lane is like all the time."""
    spacing_bytes: tuple[int, int]
    """Between one fault and the next at least and at most."""
    flips_only: bool = False
    met: Counter[str] = field(default_factory=Counter)
    """Faults that have happened, by kind."""
    sent_bytes: int = 0
    """Bytes that have passed before the fault that is set now."""

    async def blow(self) -> None:
        """Set one fault after the other, each once the one before has happened; until cancelled."""
        kinds: list[str] = []
        while True:
            if not kinds:  # each comes within three faults
                kinds = ["flipped"] if self.flips_only else self.random.sample(["cut", "cut", "flipped"], 3)
            kind = kinds.pop()
            before, at = self.proxy.count(kind), self.random.randrange(*self.spacing_bytes)
            self.set(flip=Flip(8 * at + self.random.randrange(8))) if kind == "flipped" else self.set(reset_at=at)
            while self.proxy.count(kind) == before:
                await asyncio.sleep(POLL_SECONDS)
            self.met[kind] += 1

    def set(self, **fault: Any) -> None:
        """Set a fault in place of the one that is there."""
        self.sent_bytes += self.proxy.passed("up")
        self.proxy.set(up=replace(self.base, **fault))


async def run(trial: Trial) -> Outcome:
    """Push through the proxy, activate, and compare what is stored; the control compares neither CRC nor hash."""
    units = trial.count(8, 300)
    sabotage = ["very wide" if trial.long else "wide", *(["hash", "crc"] if trial.control else [])]
    plan = WorldPlan(services=("generator",), proxied=("adapter",), sabotage={"generator": sabotage})
    adapter = wide_adapter(units, trial.random)
    rate = trial.count(4, 1) * 1e6
    async with open_bench(trial.folder, plan, first=False) as bench:
        bench.offer(adapter)
        weather = Weather(
            bench.world.proxies["adapter"],
            trial.random,
            Fault(slice_bytes=trial.random.randrange(2000, 9000), bytes_per_second=rate),
            (MEGABYTE, trial.count(5 * MEGABYTE // 2, 30 * MEGABYTE)),
            flips_only=trial.control,
        )
        offsets: list[int] = []
        seconds = await push(bench, adapter, weather, offsets, limit=4 * len(adapter.data) / rate + 40)
        stored = bench.stored_content(1)
    return judge(
        bench, adapter, weather, offsets, {"seconds": round(seconds, 1), "stored whole": stored == intended(adapter)}
    )


async def push(bench: Bench, adapter: AdapterBytes, weather: Weather, offsets: list[int], *, limit: float) -> float:
    """Push and activate under the weather, noting the offsets that the generator confirms; return the seconds."""
    folder = bench.world.folder / "pushed"
    write_folder(folder, adapter)
    started, blowing = time.monotonic(), asyncio.create_task(weather.blow())
    try:
        async with bench.world.adapters(timeout_seconds=30.0) as client:
            pushing = client.push(
                folder, describe(adapter, 1), epoch=1, on_progress=lambda sent, total: offsets.append(sent)
            )
            await bench.world.recorder.call("push", limit, pushing)
    finally:
        blowing.cancel()
        with suppress(asyncio.CancelledError):
            await blowing
        weather.set()
    bench.record_proven(adapter, 1)
    await bench.activate(1)
    return time.monotonic() - started


def judge(
    bench: Bench, adapter: AdapterBytes, weather: Weather, offsets: list[int], seen: dict[str, object]
) -> Outcome:
    """Return the verdict: whole, resumed from where it was, and hardly more sent than there is."""
    size, faults = len(adapter.data), weather.met["cut"] + weather.met["flipped"]
    beyond = weather.sent_bytes - size
    figures = {
        "MB": round(size / 1e6, 1),
        "resets": weather.met["cut"],
        "flips": weather.met["flipped"],
        "resumed at MB": [round(offset / 1e6, 1) for offset in _resumed(offsets, size)],
        "MB beyond the size": round(beyond / 1e6, 2),
        **seen,
    }
    failures = []
    if faults < 3 or not weather.met["flipped"]:
        failures.append(f"too little was met: {dict(weather.met)}")
    if offsets != sorted(offsets):
        failures.append(f"the upload began again: {offsets}")
    if beyond > LOST_BYTES * faults + size // 50:
        failures.append(f"{beyond} bytes were sent beyond the size of {size}, with {faults} faults")
    if not seen["stored whole"]:
        failures.append("what is stored is not what was sent")
    return Outcome(bench.world.recorder.judge(), figures, failures)


def _resumed(offsets: list[int], size: int) -> list[int]:
    """Return the offsets at which sending began again: all but those after a whole piece."""
    return [after for before, after in pairwise(offsets) if after != min(before + PIECE_BYTES, size)]


SCENARIOS = [
    Scenario(
        name="R7 transfer",
        title="a large adapter through a slow connection that is reset and inverts bits",
        run=run,
        control="the comparison of CRC-32 and SHA-256",
        caught_as=frozenset({"I5"}),
        seconds=90,
        usual_seconds=12,
    )
]
