"""Single bits of a checkpoint or an exported adapter inverted on the disk: no run goes on from them unnoticed."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any, Final

from tests.reliability.disk import flipped
from tests.reliability.processes import Process
from tests.reliability.scenario import Outcome, Scenario, Trial
from tests.reliability.scenarios.killed_worker import ATTEMPT_SECONDS, PARTS, judge, run_whole
from tests.reliability.world import SOCKET, World, WorldPlan, open_world, run_toml
from tether.orchestrator import OrchestratorClient
from tether_services.runtime.fault_points import PLAN_VARIABLE

STEPS: Final = 4
CHECKPOINT_FILES: Final = ("weights.safetensors", "optimiser.safetensors", "state.json")
ADAPTER_FILES: Final = ("adapter_model.safetensors", "adapter_config.json")
WAYS_OUT: Final = ("earlier", "copy")
"""One of these is in every refusal."""


async def run_flips(trial: Trial) -> Outcome:
    """Kill a run, flip bits of what it would go on from, and let it go on in earnest."""
    plan_file = trial.folder / "plan.json"
    plan_file.write_text(json.dumps({"worker": {"1": f"step.begun@{STEPS}=kill"}}))
    settings = {"orchestrator": {"auto_resume": "off"}}
    plan = WorldPlan(models="tiny", settings=settings, environment={PLAN_VARIABLE: str(plan_file)})
    async with open_world(trial.folder, plan) as world, world.orchestrator() as client:
        text = run_toml(world.folder, steps=STEPS)
        await client.start_run(PARTS, text)
        stopped = await world.wait_for_end(client, PARTS, seconds=ATTEMPT_SECONDS)
        assert stopped.state == "failed" and stopped.committed_step_count == STEPS - 1, stopped
        checkpoint, adapter_sha256 = read_last_commit(world)
        flips = draw_flips(world, trial.random, checkpoint["path"], 20 if trial.control else trial.count(100, 2000))
        order = {"config": text, "checkpoint": checkpoint, "adapter_sha256": adapter_sha256, "flips": flips}
        answers = await read_flips(world, order, sabotage=trial.control)
        if trial.control:
            return Outcome(world.recorder.judge())
        failures = find_failures(answers, flips)
        failures += await resume_damaged(world, client, flips)
        plan_file.write_text("{}")
        whole = await run_whole(world, client, STEPS)
        parts = await client.get_run(PARTS)
        words = Counter(answer.partition(":")[0] for answer in answers)
        return judge(world, (whole, parts), {"flips": len(flips), **words, "resumes": 2}, failures)


def read_last_commit(world: World) -> tuple[dict[str, Any], str]:
    """Return the newest checkpoint of the run and the hash of its adapter, as the ledger has them."""
    with closing(sqlite3.connect(f"file:{world.state_dir / 'ledger.sqlite'}?mode=ro", uri=True)) as connection:
        query = "SELECT version, path, sha256, size_bytes FROM checkpoints WHERE run_id = ? ORDER BY version DESC"
        row = connection.execute(query, (PARTS,)).fetchone()
        query = "SELECT adapter_sha256 FROM steps WHERE run_id = ? ORDER BY step DESC"
        (sha256,) = connection.execute(query, (PARTS,)).fetchone()
    return dict(zip(("version", "path", "sha256", "size_bytes"), row, strict=True)), sha256


def draw_flips(world: World, random: Random, checkpoint: str, count: int) -> list[tuple[str, int]]:
    """Return (file below the run's folder, bit), as many of each file."""
    folder = world.state_dir / PARTS
    adapter = f"adapters/{int(Path(checkpoint).name.partition('-')[0]):06d}"
    files = [f"{checkpoint}/{name}" for name in CHECKPOINT_FILES] + [f"{adapter}/{name}" for name in ADAPTER_FILES]
    chosen = [files[number % len(files)] for number in range(count)]
    return [(name, random.randrange(8 * (folder / name).stat().st_size)) for name in chosen]


async def read_flips(world: World, order: dict[str, Any], *, sabotage: bool) -> list[str]:
    """Return what a trainer makes of each flip, in a process that takes the run up as a worker would."""
    place, answers = world.folder / "order.json", world.folder / "answers.json"
    folders = {"folder": str(world.state_dir / PARTS), "history": str(world.recorder.path), "answers": str(answers)}
    place.write_text(json.dumps({**order, **folders}))
    reader = Process(
        name="reader",
        module="tests.reliability.checkpoint_flips",
        arguments=(str(place),),
        log_file=world.folder / "reader.log",
        address="",
        launch_options=("--sabotage", "checkpoint_hash") if sabotage else (),
        fork_socket=str(world.folder / SOCKET),
    )
    assert await reader.run(seconds=120) == 0, reader.log_tail()
    judged: list[str] = json.loads(answers.read_text(encoding="utf-8"))
    return judged


def find_failures(answers: list[str], flips: list[tuple[str, int]]) -> list[str]:
    """Return the flips of a checkpoint that were not refused with a way out, and of an adapter not made good."""
    failures = []
    for answer, (file, bit) in zip(answers, flips, strict=True):
        refused = answer.startswith("refused ") and any(way in answer for way in WAYS_OUT)
        if answer != "made anew" if file.startswith("adapters/") else not refused:
            failures.append(f"bit {bit} of {file}: {answer}")
    return failures


async def resume_damaged(world: World, client: OrchestratorClient, flips: list[tuple[str, int]]) -> list[str]:
    """Resume with a bit of the checkpoint inverted, which fails, and with one of the adapter's, which is made anew."""
    folder = world.state_dir / PARTS
    (checkpoint, bit), (adapter, other_bit) = flips[0], flips[len(CHECKPOINT_FILES) + 1]
    with flipped(folder / checkpoint, bit):
        await client.resume_run(PARTS)
        refused = await world.wait_for_end(client, PARTS, seconds=ATTEMPT_SECONDS)
    clear = "CHECKPOINT_DAMAGED" in refused.error and any(way in refused.error for way in WAYS_OUT)
    failures = [] if refused.state == "failed" and clear else [f"resumed from damage: {refused.state} {refused.error}"]
    with flipped(folder / adapter, other_bit):
        await client.resume_run(PARTS)
        await world.wait_for_end(client, PARTS, seconds=ATTEMPT_SECONDS)
    return failures


SCENARIOS = [
    Scenario(
        name="R7 checkpoints",
        title="single bits of a checkpoint and an exported adapter inverted on the disk",
        run=run_flips,
        control="the hashes of a checkpoint",
        caught_as=frozenset({"I7"}),
        seconds=180,
        usual_seconds=15,
    )
]
