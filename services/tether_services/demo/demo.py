"""`tether demo`: the four services, one PPO run on them, and what came of it."""

from __future__ import annotations

import argparse
import asyncio
import json
import time
import tomllib
from pathlib import Path
from typing import Any, Final

import tomli_w
from rich.console import Console

from tether import OrchestratorClient, Run
from tether.errors import FailedPreconditionError
from tether_services.cli.client_commands import report_end
from tether_services.cli.local_commands import local_options, run_until_interrupted
from tether_services.cli.watching import follow_run
from tether_services.demo.summary import print_summary
from tether_services.local.deployment import LocalDeployment, LocalOptions
from tether_services.orchestrator.presets import lay_over, read_preset
from tether_services.orchestrator.prompt_sources import is_dataset
from tether_services.orchestrator.run_config import check_run_config, lay_over_defaults, parse_run_config
from tether_services.runtime.settings import merge_overrides

FOLDER: Final = Path(__file__).parent
CONFIG: Final = FOLDER / "demo.toml"
PROMPTS: Final = FOLDER / "prompts.txt"


def run_demo(known: argparse.Namespace) -> int:
    """Run the demonstration and return the exit status: 0 if the run succeeded.

    Args:
        known: The parsed command line, see `tether demo --help`.

    Raises:
        InvalidArgumentError: The configuration of the run is invalid; one violation per bad key.
        FailedPreconditionError: A service did not start or could not be kept running.
    """
    options = demo_options(known)
    document = tomli_w.dumps(demo_config(known, options))
    check_run_config(parse_run_config(document))  # as the orchestrator will, but before anything is started
    run_id = known.run_id or time.strftime("demo-%Y%m%d-%H%M%S")
    return run_until_interrupted(_demo(options, run_id, document, Console()))


def demo_options(known: argparse.Namespace) -> LocalOptions:
    """Return what to start: a run that a killed demonstration left behind does not go on, and so blocks no other."""
    return local_options(known, state_dir=known.output, settings={"orchestrator": {"auto_resume": "off"}})


def demo_config(known: argparse.Namespace, options: LocalOptions) -> dict[str, Any]:
    """Return the configuration of the run: demo.toml, a preset, then the command line.

    A preset takes the place of the demo's algorithm and trainer; the demo's amount of data stays.

    Raises:
        InvalidArgumentError: Names every unknown or invalid key with its path.
    """
    chosen: dict[str, Any] = {}
    merge_overrides(chosen, known.overrides)
    demo = demo_defaults(known, options)
    amounts = {key: value for key, value in demo.items() if not isinstance(value, dict)}
    preset = read_preset(chosen.get("preset"))
    return lay_over_defaults(chosen, lay_over(lay_over(demo, preset), amounts))


def demo_defaults(known: argparse.Namespace, options: LocalOptions) -> dict[str, Any]:
    """Return demo.toml, with what the options of the command fill in."""
    values = tomllib.loads(CONFIG.read_text(encoding="utf-8"))
    prompts = known.prompts or PROMPTS
    values |= {"model": options.model, "prompts": str(prompts)}
    if (Path(options.reward_model) / "adapter_model.safetensors").is_file():
        values["reward_model"] = options.reward_model  # the critic can start from a LoRA reward model only
    if known.prompts and not is_dataset(known.prompts):
        # At least 2, so that a file that is missing or too short is refused for that and not for this number.
        values["evaluation_count"] = max(2, min(values["evaluation_count"], count_prompts(known.prompts) // 2))
    if known.steps is not None:
        values["total_steps"] = known.steps
    values["trainer"]["threads"] = options.threads
    if known.seed is not None:
        values["seed"] = values["trainer"]["seed"] = known.seed
    return values


def count_prompts(path: str) -> int:
    """Return the number of lines that are not empty; 0 if the file cannot be read, which the orchestrator reports."""
    try:
        return sum(1 for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError):
        return 0


async def _demo(options: LocalOptions, run_id: str, document: str, console: Console) -> int:
    def report(text: str) -> None:
        console.print(f"{time.strftime('%H:%M:%S')} {text}", highlight=False, markup=False, soft_wrap=True)

    started = time.monotonic()
    async with LocalDeployment(options, report=report) as deployment:
        ended = await _train(deployment, run_id, document, console)
    if ended.state != "succeeded":
        return report_end(ended)
    folder = Path(ended.directory)
    print_summary(json.loads((folder / "report.json").read_text(encoding="utf-8")), console)
    for name in ("report.html", "report.json"):
        console.print(f"{folder / name}", highlight=False, soft_wrap=True)
    console.print(f"finished in {time.monotonic() - started:.0f} s, start and stop of the services included")
    return 0


async def _train(deployment: LocalDeployment, run_id: str, document: str, console: Console) -> Run:
    """Return the run once it has ended.

    Raises:
        FailedPreconditionError: A service could not be kept running.
    """
    async with OrchestratorClient(deployment.addresses.orchestrator, token="", tls=False) as client:
        await client.start_run(run_id, document)
        following = asyncio.create_task(follow_run(client, run_id, console=console))
        failing = asyncio.create_task(deployment.wait())
        try:
            await asyncio.wait({following, failing}, return_when=asyncio.FIRST_COMPLETED)
            if following.done():
                return await following
            await failing
            raise FailedPreconditionError("A service could not be kept running.")
        finally:
            for task in (following, failing):
                task.cancel()
            await asyncio.gather(following, failing, return_exceptions=True)
