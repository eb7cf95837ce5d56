"""The demonstration: its configuration and its summary."""

from __future__ import annotations

import io
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from rich.console import Console

from tether.errors import InvalidArgumentError
from tether_services.cli.local_commands import local_options
from tether_services.cli.main import build_parser
from tether_services.demo.demo import CONFIG, PROMPTS, count_prompts, demo_config, demo_options
from tether_services.demo.summary import NUM_STORIES, print_summary
from tether_services.local.deployment import DEMO_MODELS, SERVICES, Addresses, service_settings
from tether_services.orchestrator.config import OrchestratorSettings, RunConfig
from tether_services.orchestrator.presets import preset_names, read_preset
from tether_services.orchestrator.run_config import check_run_config, parse_run_config


def configure(*arguments: str) -> dict[str, Any]:
    known = build_parser().parse_args(["demo", *arguments])
    return demo_config(known, local_options(known, state_dir=known.output))


def test_the_packaged_configuration_is_valid_and_names_the_packaged_files() -> None:
    config = RunConfig.model_validate(configure("--threads", "3"))
    assert config.model == str(DEMO_MODELS / "policy")
    assert config.reward_model == str(DEMO_MODELS / "reward")
    assert config.prompts == str(PROMPTS)
    assert config.trainer.threads == 3
    assert config.evaluation and config.evaluation_count >= 64
    assert config.max_response_tokens == 64


def test_the_packaged_prompts_are_enough_and_all_different() -> None:
    lines = [line.strip() for line in PROMPTS.read_text(encoding="utf-8").splitlines() if line.strip()]
    config = RunConfig.model_validate(configure())
    assert len(set(lines)) == len(lines) == count_prompts(str(PROMPTS))
    assert len(lines) >= config.evaluation_count + config.prompts_per_step


def test_the_command_line_is_stronger_than_the_file(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("One\n\nTwo\nThree\nFour\n")
    values = configure("--steps", "2", "--seed", "5", "--prompts", str(prompts), "--set", "ppo.kl_coef=0.3")
    config = RunConfig.model_validate(values)
    assert (config.total_steps, config.seed, config.trainer.seed) == (2, 5, 5)
    assert (config.prompts, config.evaluation_count) == (str(prompts), 2)
    assert config.ppo.kl_coef == 0.3


def test_a_reward_model_without_adapter_is_scored_with_but_no_start_for_the_critic(tmp_path: Path) -> None:
    config = RunConfig.model_validate(configure("--reward-model", str(tmp_path)))
    assert config.reward_model == ""


def test_a_demo_leaves_the_run_of_one_that_was_killed_alone() -> None:
    addresses = Addresses("a:1", "b:1", "c:1", "g:1", "d:1", "e:1", *[dict.fromkeys(SERVICES, "f:1")] * 2)
    settings = service_settings(demo_options(build_parser().parse_args(["demo"])), addresses)
    assert OrchestratorSettings.model_validate(settings["orchestrator"]).auto_resume == "off"
    known = build_parser().parse_args(["up"])
    settings = service_settings(local_options(known, state_dir=known.state_dir), addresses)
    assert OrchestratorSettings.model_validate(settings["orchestrator"]).auto_resume == "after_crash"


def test_everything_the_command_writes_survives_as_toml() -> None:
    values = configure("--seed", "1")
    assert tomllib.loads(tomli_w.dumps(values)) == values


DEMO = tomllib.loads(CONFIG.read_text(encoding="utf-8"))
AMOUNTS = {key: value for key, value in DEMO.items() if not isinstance(value, dict)}


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_is_the_algorithm_and_the_demo_the_data(tmp_path: Path, name: str) -> None:
    stories = tmp_path / "stories.txt"
    stories.write_text("Once there was a cat.\n")
    extra = ["--set", f"ppo.ptx_text={stories}"] if name == "instructgpt" else []
    values, preset = configure("--set", f"preset={name}", *extra), read_preset(name)
    assert values.items() >= AMOUNTS.items()
    config = parse_run_config(tomli_w.dumps(values))
    check_run_config(config)
    assert config.preset == name
    for table in ("ppo", "trainer"):
        resolved = getattr(config, table).model_dump()
        assert resolved.items() >= preset.get(table, {}).items()
    own = {key: value for key, value in DEMO["ppo"].items() if key not in preset["ppo"]}
    left_out = {"lam"} if name in ("grpo", "rloo") else set()
    assert {key: values["ppo"].get(key) for key in own.keys() - left_out} == {k: own[k] for k in own.keys() - left_out}
    assert not left_out & values["ppo"].keys()
    assert bool(config.reward_model) == config.ppo.has_critic


def test_the_command_line_is_stronger_than_a_preset() -> None:
    values = configure("--set", "preset=nplus", "--set", "ppo.lam=0.5", "--set", "prompts_per_step=4", "--seed", "3")
    config = parse_run_config(tomli_w.dumps(values))
    assert (config.ppo.lam, config.prompts_per_step, config.ppo.score_placement) == (0.5, 4, "n_plus")
    assert (config.trainer.learning_rate, config.trainer.seed) == (3e-6, 3)


@pytest.mark.parametrize("advantage", ["grpo", "dr_grpo", "rloo", "reinforce_baseline"])
def test_the_demo_runs_without_a_critic_when_asked_to(advantage: str) -> None:
    values = configure("--set", f"ppo.advantage={advantage}")
    check_run_config(parse_run_config(tomli_w.dumps(values)))
    assert "reward_model" not in values and "lam" not in values["ppo"], "only a critic reads them"
    assert values["ppo"]["kl_coef"] == DEMO["ppo"]["kl_coef"]


def test_the_demo_refuses_what_the_command_line_sets_in_vain() -> None:
    values = configure("--set", "ppo.advantage=rloo", "--set", "ppo.lam=0.9")
    with pytest.raises(InvalidArgumentError) as caught:
        check_run_config(parse_run_config(tomli_w.dumps(values)))
    assert [violation.field for violation in caught.value.violations] == ["ppo.lam"]


def test_the_demo_names_the_presets_that_there_are() -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        configure("--set", "preset=best")
    (violation,) = caught.value.violations
    assert violation.field == "preset"
    assert all(name in violation.description for name in preset_names())


@pytest.mark.parametrize(("content", "field"), [(None, "prompts"), ("One\nTwo\n", "evaluation_count")])
def test_prompts_that_do_not_suffice_are_refused_for_what_they_lack(
    tmp_path: Path, content: str | None, field: str
) -> None:
    prompts = tmp_path / "prompts.txt"
    if content is not None:
        prompts.write_text(content)
    with pytest.raises(InvalidArgumentError) as caught:
        check_run_config(parse_run_config(tomli_w.dumps(configure("--prompts", str(prompts)))))
    assert [violation.field for violation in caught.value.violations] == [field]
    assert "greater than" not in caught.value.violations[0].description


def test_missing_prompts_count_as_none(tmp_path: Path) -> None:
    assert count_prompts(str(tmp_path / "nowhere.txt")) == 0


def evaluation(version: int, shift: float) -> dict[str, Any]:
    samples = [
        {"prompt": f"Prompt {n} [bold]", "response": f" ends {version} [/bold]", "score": n + shift} for n in range(6)
    ]
    return {
        "policy_version": version,
        "score_mean": 2.5 + shift,
        "score_std": 1.708,
        "kl_per_response": 3.25 * version,
        "kl_per_64_tokens": 3.5 * version,
        "response_length_mean": 60.5,
        "truncated_ratio": 0.875,
        "samples": samples,
    }


def report(**changes: Any) -> dict[str, Any]:
    return {
        "before": evaluation(0, 0.0),
        "after": evaluation(20, 2.0),
        "gain_in_sd": 1.171,
        "samples": {"generated": 100, "trained": 98, "dropped": 2},
        "versions_as_expected": True,
        "mean_abs_dlogp_max": 5.2e-7,
    } | changes


def printed(values: dict[str, Any]) -> str:
    output = io.StringIO()
    print_summary(values, Console(file=output, width=140))
    return output.getvalue()


def test_the_summary_shows_before_and_after_side_by_side() -> None:
    text = printed(report())
    assert "+2.500" in text and "+4.500" in text and "65.00" in text and "88%" in text
    assert "after (policy version 20)" in text and "6 held-out prompts" in text
    assert "gain: +1.17 standard deviations" in text
    assert "100 generated, 98 trained on, 2 dropped" in text
    assert "every sample from the expected version: yes" in text
    assert "5.2e-07 nats" in text


def test_the_summary_shows_the_first_pairs_with_their_text_unchanged() -> None:
    text = printed(report())
    for number in range(NUM_STORIES):
        assert text.count(f"Prompt {number} [bold]") == 2
    assert f"Prompt {NUM_STORIES}" not in text
    assert " ends 0 [/bold]" in text and " ends 20 [/bold]" in text


def test_the_summary_does_not_hide_what_went_wrong() -> None:
    assert "every sample from the expected version: NO" in printed(report(versions_as_expected=False))
    assert "undefined" in printed(report(gain_in_sd=None))


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_run_without_evaluation_says_so(moment: str) -> None:
    assert printed(report(**{moment: None})) == "The run had no evaluation.\n"
