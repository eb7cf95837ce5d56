"""Run configurations: every unknown, invalid or missing thing is named before a model is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from tests.unit.run_inputs import fields_of, run_config, run_toml, write_model_folder, write_prompts
from tether_services.orchestrator import run_config as run_config_module
from tether_services.orchestrator.config import ALL_LINEAR_LAYERS, OrchestratorSettings, RunConfig
from tether_services.orchestrator.run_config import MAX_CONFIG_BYTES, check_run_config, parse_run_config
from tether_services.orchestrator.session import trainer_config
from tether_services.runtime.model_folder import is_hub_name
from tether_services.runtime.settings import describe_settings

README = Path(run_config_module.__file__).parent / "README.md"


def test_a_minimal_configuration_has_the_defaults_of_the_ppo_reference(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    assert (config.ppo.temperature, config.ppo.first_kl_coef, config.ppo.gamma, config.ppo.lam) == (
        1.0,
        0.05,
        1.0,
        0.95,
    )
    assert (config.ppo.clip_range, config.ppo.value_clip_range, config.ppo.sampler_range) == (0.2, 0.2, (0.0, 2.0))
    check_run_config(config)


UNREADABLE_TOML = ["model = ", "= 3", "a = 1\na = 2", f"a = {'9' * 5000}", f"a = {'[' * 5000}{']' * 5000}"]


@pytest.mark.parametrize("text", ["", "  \n", "x" * (MAX_CONFIG_BYTES + 1), *UNREADABLE_TOML])
def test_text_that_is_no_document_is_refused(text: str) -> None:
    assert set(fields_of(lambda: parse_run_config(text))) == {"config_toml"}


def test_every_bad_key_is_named_with_its_path(tmp_path: Path) -> None:
    text = run_toml(
        tmp_path,
        "colour = 1\nprompts_per_step = 0\nseed = -1\nevaluation = 7",
        ppo="clip_range = 2\nbeta = 1\nlam = nan",
        trainer='lora_rank = "big"\noptimizer = "sgd"',
    )
    assert set(fields_of(lambda: parse_run_config(text))) == {
        "colour",
        "prompts_per_step",
        "seed",
        "evaluation",
        "ppo.clip_range",
        "ppo.beta",
        "ppo.lam",
        "trainer.lora_rank",
        "trainer.optimizer",
    }


def test_missing_keys_are_named() -> None:
    assert set(fields_of(lambda: parse_run_config("seed = 1"))) == {"model", "prompts", "trainer"}
    assert "trainer.learning_rate" in fields_of(lambda: parse_run_config("model='m'\nprompts='p.txt'\n[trainer]\n"))


def test_a_temperature_that_the_sampler_would_change_is_refused(tmp_path: Path) -> None:
    for value in ("0", "0.005", "2.1", "inf", "-1"):
        text = run_toml(tmp_path, ppo=f"temperature = {value}")
        assert "ppo.temperature" in fields_of(partial(parse_run_config, text))


def test_all_missing_files_are_named_at_once(tmp_path: Path) -> None:
    config = run_config(tmp_path, 'reward_model = "/no/reward"\nevaluation_prompts = "/no/held_out.txt"')
    (tmp_path / "model" / "config.json").unlink()
    (tmp_path / "prompts.txt").unlink()
    assert set(fields_of(lambda: check_run_config(config))) == {"model", "reward_model", "prompts"}
    write_prompts(tmp_path / "prompts.txt")
    assert set(fields_of(lambda: check_run_config(config))) == {"model", "reward_model", "evaluation_prompts"}


def test_a_model_folder_needs_weights_and_a_readable_config(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    (tmp_path / "model" / "config.json").write_text("{")
    assert "not JSON" in fields_of(lambda: check_run_config(config))["model"]
    (tmp_path / "model" / "config.json").write_text("{}")
    assert "model_type" in fields_of(lambda: check_run_config(config))["model"]
    (tmp_path / "model" / "model.safetensors").unlink()
    assert "safetensors" in fields_of(lambda: check_run_config(config))["model"]
    assert "no folder" in fields_of(lambda: check_run_config(config.model_copy(update={"model": "/nowhere"})))["model"]


def test_a_reward_model_is_a_lora_adapter(tmp_path: Path) -> None:
    write_model_folder(tmp_path / "full")
    config = run_config(tmp_path, f'reward_model = "{tmp_path / "full"}"')
    assert "adapter_model.safetensors" in fields_of(lambda: check_run_config(config))["reward_model"]
    (tmp_path / "full" / "adapter_model.safetensors").write_bytes(b"1")
    (tmp_path / "full" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    check_run_config(config)


@pytest.mark.parametrize("name", ["a" * 5000, "a/" + "b" * 5000, "a\0b", "~nobody/x"])
def test_a_name_that_no_file_can_have_is_named(tmp_path: Path, name: str) -> None:
    config = run_config(tmp_path).model_copy(
        update={"model": name, "reward_model": name, "prompts": f"{name}.txt", "evaluation_prompts": f"{name}.txt"}
    )
    assert {"model", "reward_model", "prompts"} <= set(fields_of(lambda: check_run_config(config)))


def test_a_hub_name_is_no_missing_folder(tmp_path: Path) -> None:
    assert is_hub_name("owner/name-1.5")
    for name in ("/owner/name", "./name", "../x", "name", "a/b/c", str(tmp_path)):
        assert not is_hub_name(name)
    check_run_config(run_config(tmp_path).model_copy(update={"model": "owner/name"}))


def test_too_few_prompts_for_a_held_out_tail_are_refused(tmp_path: Path) -> None:
    write_prompts(tmp_path / "prompts.txt", count=2)
    config = run_config(tmp_path)
    assert "evaluation_count" in fields_of(lambda: check_run_config(config))
    check_run_config(config.model_copy(update={"evaluation": False}))


def test_more_minibatches_than_samples_are_refused(tmp_path: Path) -> None:
    config = run_config(tmp_path, "prompts_per_step = 2\nresponses_per_prompt = 2", ppo="minibatches = 5")
    assert "4 samples" in fields_of(lambda: check_run_config(config))["ppo.minibatches"]
    check_run_config(run_config(tmp_path, "prompts_per_step = 2\nresponses_per_prompt = 2", ppo="minibatches = 4"))


def test_the_trainer_takes_the_seed_of_the_run_unless_it_has_its_own(tmp_path: Path) -> None:
    shared = trainer_config(run_config(tmp_path, "seed = 7"), threads=3)
    assert (shared.seed, shared.threads) == (7, 3)
    own = trainer_config(run_config(tmp_path, "seed = 7", trainer="seed = 5\nthreads = 1"), threads=3)
    assert (own.seed, own.threads) == (5, 1)


def test_every_setting_has_a_sentence() -> None:
    for model in (RunConfig, OrchestratorSettings):
        described = describe_settings(model, env_prefix="X__").splitlines()
        for key, sentence in zip(described[1::2], described[2::2], strict=True):
            assert " = " in key
            assert sentence.strip().endswith("."), key


def test_a_run_has_74_settings_and_one_more_needs_a_decision() -> None:
    """The design aims at 30 to 40; docs/decisions/0004 says why there are more, and what was left out."""
    assert 30 <= len(run_settings()) <= 74


def test_the_readme_lists_every_setting_with_its_default() -> None:
    section = README.read_text(encoding="utf-8").split("## Settings of a run\n")[1].split("\n## ")[0]
    rows = [line.split("|") for line in section.splitlines() if line.startswith("| `")]
    spelled = {"null": "unset", json.dumps(ALL_LINEAR_LAYERS): "all linear layers"}
    expected = {key: spelled.get(default, default) for key, default in run_settings().items()}
    assert {row[1].strip(" `"): row[2].strip(" `") for row in rows} == expected


def run_settings() -> dict[str, str]:
    """Return the default of every setting of a run, as --help spells it."""
    lines = describe_settings(RunConfig, env_prefix="").splitlines()[1::2]
    return {key.strip(): default for key, _, default in (line.partition(" = ") for line in lines)}


def test_the_service_process_loads_no_tensor_library() -> None:
    code = (
        "import sys; import tether_services.orchestrator.service;"
        "print(sorted({'torch', 'transformers', 'peft', 'numpy', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
