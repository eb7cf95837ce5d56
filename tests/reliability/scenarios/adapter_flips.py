"""R7, single bits: an adapter with one bit inverted on its way or on the disk is never served as if it were whole."""

from __future__ import annotations

import struct
from collections import Counter
from pathlib import Path
from random import Random
from typing import Final

from tests.reliability.adapter_bench import RUN, Bench, intended, open_bench
from tests.reliability.proxy import Fault, Flip
from tests.reliability.scenario import Outcome, Scenario, Trial
from tests.reliability.world import WorldPlan
from tests.rpc.adapter_files import AdapterBytes, begin_request, fake_adapter, fake_probe, upload
from tether.adapter import AdapterClient, AdapterProbe, AdapterPush
from tether.errors import TetherError
from tether_services.generator.verification import CONFIG_NAME, WEIGHTS_NAME
from tether_services.runtime.fake_policy import FAKE_BASE_SHA256

FLIPS: Final = 100
REGIONS: Final = ("config", "length", "header", "data")
MARKER_BYTES: Final = 24
"""The first bytes of the payload, which occur nowhere else on the connection."""


def regions_of(adapter: AdapterBytes) -> dict[str, tuple[int, int]]:
    """Return the first byte and the end of each part of the payload: configuration, then the safetensors file."""
    start = len(adapter.config)
    header = struct.unpack("<Q", adapter.weights[:8])[0]
    return {
        "config": (0, start),
        "length": (start, start + 8),
        "header": (start + 8, start + 8 + header),
        "data": (start + 8 + header, len(adapter.data)),
    }


def choose_bit(random: Random, adapter: AdapterBytes, region: str) -> int:
    """Return a bit of the payload in a region, not in the marker."""
    low, high = regions_of(adapter)[region]
    return random.randrange(8 * max(low, MARKER_BYTES), 8 * high)


def flipped(data: bytes, bit: int) -> bytes:
    """Return the bytes with one bit inverted."""
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


async def flip_in_flight(bench: Bench, client: AdapterClient, adapter: AdapterBytes, version: int, bit: int) -> str:
    """Push through the proxy, which inverts a bit of the payload, and return how that ended."""
    proxy = bench.world.proxies["adapter"]
    before = proxy.count("flipped")
    proxy.set(up=Fault(flip=Flip(bit, marker=adapter.config[:MARKER_BYTES])))
    folder = bench.world.folder / "pushed"
    write_folder(folder, adapter)
    outcome = "accepted"
    try:
        await bench.world.recorder.call("push", 30.0, client.push(folder, describe(adapter, version), epoch=1))
        bench.record_proven(adapter, version)
        await bench.activate(version)
        if bench.stored_content(version) == intended(adapter):
            outcome = "sent again"
    except TetherError as error:
        outcome = error.reason
    assert proxy.count("flipped") == before + 1, "the bit was never flipped"
    return outcome


async def flip_on_the_wire(bench: Bench, adapter: AdapterBytes, version: int, bit: int) -> str:
    """Upload bytes that are damaged before they are cut into chunks, and return how that ended."""
    damaged = flipped(adapter.data, bit)
    return await bench.refused(bench.push_and_activate(adapter, version, data=damaged)) or "accepted"


async def flip_on_the_disk(bench: Bench, adapter: AdapterBytes, version: int, bit: int) -> str:
    """Invert a bit of the staged file between the last byte and the commit, and return how that ended."""
    upload_id = await upload(bench.straight, begin_request(adapter, RUN, version), adapter.data)
    in_weights = bit >= 8 * len(adapter.config)
    (path,) = bench.storage.glob(f"staging/*/{WEIGHTS_NAME if in_weights else CONFIG_NAME}")
    path.write_bytes(flipped(path.read_bytes(), bit - 8 * len(adapter.config) * in_weights))
    return await bench.refused(bench.commit_and_activate(adapter, version, upload_id)) or "accepted"


def write_folder(folder: Path, adapter: AdapterBytes) -> None:
    """Write an adapter as the client reads it."""
    folder.mkdir(exist_ok=True)
    (folder / CONFIG_NAME).write_bytes(adapter.config)
    (folder / WEIGHTS_NAME).write_bytes(adapter.weights)


def describe(adapter: AdapterBytes, version: int) -> AdapterPush:
    """Return what the client declares about an adapter of the fake base model."""
    probe = fake_probe(version)
    return AdapterPush(
        run_id=RUN,
        policy_version=version,
        base_model_sha256=FAKE_BASE_SHA256,
        rank=adapter.rank,
        target_modules=adapter.targets,
        probes=[AdapterProbe(list(probe.token_ids), list(probe.logprobs))],
        differs_from_base=True,
    )


async def run(trial: Trial) -> Outcome:
    """Flip bits in flight, on the wire and on the disk; the control knows no hash."""
    sabotage = {"generator": ["hash"]} if trial.control else {}
    plan = WorldPlan(services=("generator",), proxied=("adapter",), sabotage=sabotage)
    counted: dict[str, Counter[str]] = {"in flight": Counter(), "on the wire": Counter(), "on the disk": Counter()}
    count = 12 if trial.control else FLIPS
    async with open_bench(trial.folder, plan) as bench, bench.world.adapters(timeout_seconds=30.0) as client:
        for number in range(count):
            version, region = 2 + 3 * number, "data" if trial.control else REGIONS[number % len(REGIONS)]
            for way, outcomes in enumerate(counted.values()):
                adapter = fake_adapter(trial.random.randrange(2**31))
                bench.offer(adapter)
                bit = choose_bit(trial.random, adapter, region)
                if way == 0:
                    outcomes[await flip_in_flight(bench, client, adapter, version, bit)] += 1
                elif way == 1:
                    outcomes[await flip_on_the_wire(bench, adapter, version + 1, bit)] += 1
                else:
                    outcomes[await flip_on_the_disk(bench, adapter, version + 2, bit)] += 1
                await bench.observe_active()
        left = bench.left_in_staging()
    return judge(bench, counted, count, left)


def judge(bench: Bench, counted: dict[str, Counter[str]], count: int, left: list[str]) -> Outcome:
    """Return the verdict: whatever was flipped, nothing of it was accepted as it came."""
    figures = {
        f"rejected {way}": f"{count - outcomes['accepted']}/{count} {_shorten(outcomes)}"
        for way, outcomes in counted.items()
    }
    accepted = sum(outcomes["accepted"] for outcomes in counted.values())
    failures = [f"{accepted} of {3 * count} flipped adapters were accepted"] if accepted else []
    if left:
        failures.append(f"{len(left)} uploads are left in the staging folder")
    return Outcome(bench.world.recorder.judge(), figures, failures)


def _shorten(outcomes: Counter[str]) -> dict[str, int]:
    """Return the outcomes counted by what they say before any detail."""
    short: Counter[str] = Counter()
    for text, count in outcomes.items():
        short[text.partition(":")[0]] += count
    return dict(short)


SCENARIOS = [
    Scenario(
        name="R7 flips",
        title="one bit of an adapter inverted in flight, on the wire, on the disk",
        run=run,
        control="the comparison of hashes",
        caught_as=frozenset({"I5"}),
        seconds=120,
        usual_seconds=25,
    )
]
