"""What a local deployment tells each service, and how commands end when they are interrupted."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from tether.errors import InvalidArgumentError
from tether_services.cli.local_commands import describe_addresses, local_options, run_until_interrupted
from tether_services.cli.main import build_parser
from tether_services.generator.config import GeneratorSettings
from tether_services.local.deployment import DEMO_MODELS, Addresses, Engine, LocalOptions, service_settings
from tether_services.orchestrator.config import OrchestratorSettings
from tether_services.reference.config import ReferenceSettings
from tether_services.reward.config import RewardSettings
from tether_services.runtime.settings import ServerSettings

CLASSES: dict[str, type[ServerSettings]] = {
    "generator": GeneratorSettings,
    "reward": RewardSettings,
    "reference": ReferenceSettings,
    "orchestrator": OrchestratorSettings,
}
ADDRESSES = Addresses(
    generator="127.0.0.1:1",
    adapter="127.0.0.1:2",
    reward="127.0.0.1:3",
    reward_models="127.0.0.1:14",
    reference="127.0.0.1:4",
    orchestrator="127.0.0.1:5",
    metrics={
        "generator": "127.0.0.1:6",
        "reward": "127.0.0.1:7",
        "reference": "127.0.0.1:8",
        "orchestrator": "127.0.0.1:9",
    },
    http={
        "generator": "127.0.0.1:10",
        "reward": "127.0.0.1:11",
        "reference": "127.0.0.1:12",
        "orchestrator": "127.0.0.1:13",
    },
)


def resolve(options: LocalOptions) -> dict[str, Any]:
    """The settings as each service reads them from its file."""
    return {
        name: CLASSES[name].model_validate(tomllib.loads(tomli_w.dumps(settings)))
        for name, settings in service_settings(options, ADDRESSES).items()
    }


@pytest.mark.parametrize("engine", ["transformers", "vllm", "fake"])
def test_every_service_accepts_its_settings(engine: Engine) -> None:
    settings = resolve(LocalOptions(engine=engine, threads=2))
    assert settings["generator"].engine == engine
    assert settings["reward"].engine == settings["reference"].engine == ("fake" if engine == "fake" else "transformers")


def test_the_packaged_models_are_the_default_and_exist() -> None:
    settings = resolve(LocalOptions())
    assert settings["generator"].model == settings["reference"].model == str(DEMO_MODELS / "policy")
    assert settings["reward"].model == str(DEMO_MODELS / "reward")
    for model in (settings["generator"].model, settings["reward"].model):
        assert list(Path(model).glob("*.safetensors")), model


def test_the_orchestrator_knows_where_the_others_are() -> None:
    orchestrator = resolve(LocalOptions(state_dir=Path("somewhere")))["orchestrator"]
    assert orchestrator.generator_address == "127.0.0.1:1"
    assert orchestrator.adapter_address == "127.0.0.1:2"
    assert orchestrator.reward_address == "127.0.0.1:3"
    assert orchestrator.reference_address == "127.0.0.1:4"
    assert orchestrator.state_dir == "somewhere"


def test_all_services_listen_on_their_own_addresses() -> None:
    settings = resolve(LocalOptions())
    listening = [settings[name].admin_address for name in ("generator", "reward")]
    for part in settings.values():
        listening += [part.address, part.metrics_address, part.http_address]
    assert len(set(listening)) == len(listening) == 14


def test_settings_of_one_service_are_stronger_than_the_options() -> None:
    extra: dict[str, dict[str, Any]] = {
        "generator": {"dtype": "bfloat16", "batch": {"max_items": 8}},
        "reward": {"threads": 7},
    }
    settings = resolve(LocalOptions(settings=extra, threads=2))
    assert settings["generator"].dtype == "bfloat16" and settings["generator"].batch.max_items == 8
    assert settings["reward"].threads == 7 and settings["reference"].threads == 1


def test_pushed_adapters_are_kept_below_the_state_folder_unless_told_otherwise() -> None:
    def adapters(**given: Any) -> Any:
        extra = {"generator": {"adapters": given}} if given else {}
        return resolve(LocalOptions(state_dir=Path("somewhere"), settings=extra))["generator"].adapters

    assert adapters().folder == Path("somewhere/_services/adapters")
    assert adapters(max_rank=8).folder == Path("somewhere/_services/adapters")
    assert adapters(folder="elsewhere").folder == Path("elsewhere")


def test_the_default_reward_model_is_kept_below_the_state_folder() -> None:
    assert resolve(LocalOptions(state_dir=Path("somewhere")))["reward"].state_dir == "somewhere/_services/reward"


def test_the_command_line_becomes_options_and_leaves_the_rest_to_its_default() -> None:
    known = build_parser().parse_args(["up", "--engine", "vllm", "--model", "m", "--threads", "3"])
    options = local_options(known, state_dir=known.state_dir)
    assert (options.engine, options.model, options.threads) == ("vllm", "m", 3)
    assert options.reward_model == LocalOptions().reward_model
    assert options.state_dir == Path("runs")


def test_every_address_is_printed_once() -> None:
    lines = describe_addresses(ADDRESSES)
    for number in range(1, 14):
        assert sum(f"127.0.0.1:{number}" in line.replace("/metrics", "").split("//")[-1].split() for line in lines) == 1


def test_work_that_ends_returns_its_result() -> None:
    async def work() -> int:
        return 7

    assert run_until_interrupted(work()) == 7


def test_an_exception_of_the_work_is_raised() -> None:
    async def work() -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_until_interrupted(work())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_lets_the_work_clean_up_and_is_the_status(number: signal.Signals) -> None:
    cleaned: list[str] = []

    async def work() -> int:
        os.kill(os.getpid(), number)
        try:
            await asyncio.sleep(30)
        finally:
            await asyncio.sleep(0.05)  # cleaning up takes a while and is not cut short
            cleaned.append("done")
        return 0

    assert run_until_interrupted(work()) == 128 + number
    assert cleaned == ["done"]


def test_a_child_whose_parent_is_another_process_ends_at_once() -> None:
    if sys.platform != "linux":
        pytest.skip("only Linux tells a process that its parent died")
    command = [sys.executable, "-m", "tether_services.runtime.child", str(os.getpid() + 1), "this"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1 and "parent process is gone" in done.stderr


@pytest.mark.parametrize("engine", ["transformers", "fake"])
def test_deterministic_services_make_a_batch_of_one_call_alone(engine: Engine) -> None:
    settings = resolve(LocalOptions(engine=engine, deterministic=True))
    separate = [settings[name].batch.mix_calls is False for name in ("generator", "reward", "reference")]
    assert separate == [engine == "transformers"] * 3
    assert all(resolve(LocalOptions(engine=engine))[name].batch.mix_calls for name in ("generator", "reward"))
    extra = {"reward": {"batch": {"max_items": 7}}}
    batch = resolve(LocalOptions(engine="transformers", deterministic=True, settings=extra))["reward"].batch
    assert (batch.max_items, batch.mix_calls) == (7, False)


@pytest.mark.parametrize("part", [{"engine": "transformers", "path": "/x"}, {"engine": "rules", "function": "a:b"}])
def test_reward_models_of_several_parts_are_deterministic_beside_fake_services_too(part: dict[str, str]) -> None:
    parts = [{"name": "first", "engine": "fake"}, {"name": "second", **part}]
    extra = {"reward": {"models": [{"name": "a", "components": parts}]}}
    settings = resolve(LocalOptions(engine="fake", deterministic=True, settings=extra))
    assert not settings["reward"].batch.mix_calls
    assert settings["reference"].batch.mix_calls


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "vllm"}, "vLLM computes whatever is in flight together"),
        ({"settings": {"generator": {"engine": "vllm"}}}, "vLLM computes whatever is in flight together"),
        ({"settings": {"reward": {"batch": {"mix_calls": True}}}}, "reward: batch.mix_calls = true contradicts it"),
    ],
)
def test_what_cannot_be_deterministic_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        resolve(LocalOptions(**changes, deterministic=True))
    assert [violation.field for violation in caught.value.violations] == ["deterministic"]


def test_a_child_becomes_its_module_with_its_arguments(tmp_path: Path) -> None:
    (tmp_path / "shown.py").write_text("import sys\nif __name__ == '__main__':\n    print(sys.argv[1:])\n")
    command = [sys.executable, "-m", "tether_services.runtime.child", str(os.getpid()), "shown", "--config", "a b"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, env=environment, check=True)
    assert done.stdout == "['--config', 'a b']\n"
