"""Presets: what they say, and how they lie under the settings of a run."""

from __future__ import annotations

import tomllib
import typing
from pathlib import Path
from typing import Any

import pytest

from tests.unit.run_inputs import fields_of, run_toml, write_prompts
from tether_services.demo.demo import CONFIG
from tether_services.orchestrator.config import RunConfig
from tether_services.orchestrator.presets import FOLDER, lay_over, preset_names, read_preset
from tether_services.orchestrator.run_config import check_run_config, lay_over_defaults, parse_run_config

LEARNING_RATE = "[trainer]\nlearning_rate = 1e-4\n"


def document(folder: Path, preset: str, extra: str = "", tables: str = LEARNING_RATE) -> str:
    """Return a run that names a preset and what no preset can know."""
    run_toml(folder)  # makes the files
    files = f'model = "{folder / "model"}"\nprompts = "{folder / "prompts.txt"}"\nevaluation_count = 2\n'
    return f'preset = "{preset}"\n{files}{extra}\n{tables}'


def settings_of(values: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of nested tables by their dotted paths."""
    flat = {key: value for key, value in values.items() if not isinstance(value, dict)}
    return flat | {f"{t}.{k}": v for t, table in values.items() if isinstance(table, dict) for k, v in table.items()}


def test_the_names_that_a_run_may_give_are_those_of_the_files() -> None:
    assert preset_names() == ["grpo", "instructgpt", "nplus", "rloo", "small"]
    assert set(typing.get_args(RunConfig.model_fields["preset"].annotation)) == {"", *preset_names()}


@pytest.mark.parametrize("name", preset_names())
def test_a_run_on_a_preset_is_valid_and_has_its_values(tmp_path: Path, name: str) -> None:
    pretraining = write_prompts(tmp_path / "stories.txt")
    ppo = f'[ppo]\nptx_text = "{pretraining}"\n' if name == "instructgpt" else ""
    config = parse_run_config(document(tmp_path, name, tables=ppo + LEARNING_RATE))
    check_run_config(config)
    resolved = settings_of(config.model_dump())
    expected = settings_of(read_preset(name)) | {"trainer.learning_rate": 1e-4, "preset": name}
    assert {key: resolved[key] for key in expected} == expected
    defaults = settings_of(parse_run_config(document(tmp_path, "")).model_dump())
    assert any(resolved[key] != defaults[key] for key in expected if key != "preset"), "the preset changes something"


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_cites_its_source_and_names_no_model_or_file(name: str) -> None:
    text = (FOLDER / f"{name}.toml").read_text(encoding="ascii")
    header = text[: text.index("\n\n")]
    assert all(line.startswith("#") for line in header.splitlines())
    assert "source" in header.lower()
    named = {"model", "reward_model", "score_model", "prompts", "evaluation_prompts", "ppo.ptx_text", "preset"}
    assert not named & settings_of(read_preset(name)).keys()


@pytest.mark.parametrize("name", preset_names())
def test_only_a_preset_whose_source_has_one_gives_a_learning_rate(tmp_path: Path, name: str) -> None:
    given = "learning_rate" in read_preset(name).get("trainer", {})
    assert given == (name in ("nplus", "small"))
    ppo = f'[ppo]\nptx_text = "{write_prompts(tmp_path / "stories.txt")}"\n'
    text = document(tmp_path, name, tables=ppo if name == "instructgpt" else "")
    if given:
        check_run_config(parse_run_config(text))
    else:
        assert "trainer.learning_rate" in fields_of(lambda: parse_run_config(f"{text}[trainer]\n"))


def test_nplus_has_the_constants_of_its_source() -> None:
    assert settings_of(read_preset("nplus")) == {
        "prompts_per_step": 512,
        "responses_per_prompt": 1,
        "max_response_tokens": 53,
        "ppo.advantage": "gae",
        "ppo.epochs": 4,
        "ppo.minibatches": 1,
        "ppo.clip_range": 0.2,
        "ppo.value_clip_range": 0.2,
        "ppo.aggregation": "sequence_mean",
        "ppo.kl_coef": 0.05,
        "ppo.kl_in": "reward",
        "ppo.score_placement": "n_plus",
        "ppo.missing_eos": "replace",
        "ppo.missing_eos_value": -1.0,
        "ppo.whiten_rewards": False,
        "ppo.whiten_advantages": True,
        "ppo.gamma": 1.0,
        "ppo.lam": 0.95,
        "ppo.temperature": 0.7,
        "ppo.sampler_correction": "none",
        "trainer.learning_rate": 3e-6,
        "trainer.schedule": "linear",
        "trainer.warmup_steps": 0,
        "trainer.optimizer": "adamw",
        "trainer.max_grad_norm": 1e9,
    }


def test_instructgpt_has_the_constants_that_are_quoted_of_it() -> None:
    assert settings_of(read_preset("instructgpt")) == {
        "ppo.kl_coef": 0.02,
        "ppo.gamma": 1.0,
        "ppo.ptx_coef": 27.8,
        "trainer.ema_decay": 0.992,
    }


def test_small_is_the_demo() -> None:
    demo = settings_of(tomllib.loads(CONFIG.read_text(encoding="utf-8")))
    small = settings_of(read_preset("small"))
    assert small.items() <= demo.items()
    data = {"total_steps", "max_prompt_tokens", "evaluation_count", "keep_checkpoints"}
    assert demo.keys() - small.keys() == data, "what is left belongs to the demo's data"


@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_the_presets_without_a_critic_take_one_step_of_groups(tmp_path: Path, name: str) -> None:
    config = parse_run_config(document(tmp_path, name))
    assert config.ppo.advantage == name and not config.ppo.has_critic
    assert (config.ppo.epochs, config.ppo.minibatches) == (1, 1)
    assert config.responses_per_prompt >= 2
    assert config.ppo.kl_in == ("loss" if name == "grpo" else "reward")


def test_a_run_wins_over_its_preset_key_by_key(tmp_path: Path) -> None:
    tables = "[ppo]\nlam = 0.5\n[trainer]\nlearning_rate = 2e-3\n"
    config = parse_run_config(document(tmp_path, "nplus", "prompts_per_step = 8", tables))
    assert (config.prompts_per_step, config.ppo.lam, config.trainer.learning_rate) == (8, 0.5, 2e-3)
    assert (config.max_response_tokens, config.ppo.temperature, config.trainer.max_grad_norm) == (53, 0.7, 1e9)
    assert config.preset == "nplus"


def test_an_unknown_preset_is_named_with_the_known_ones_beside_other_bad_keys(tmp_path: Path) -> None:
    found = fields_of(lambda: parse_run_config(document(tmp_path, "n+", "colour = 1")))
    assert set(found) == {"preset", "colour"}
    assert all(name in found["preset"] for name in preset_names())


@pytest.mark.parametrize("value", ["3", "true", "[]", '["grpo"]', "{}", '"../presets/grpo"', '"__init__"'])
def test_what_is_no_name_of_a_preset_is_refused(tmp_path: Path, value: str) -> None:
    text = document(tmp_path, "grpo").replace('"grpo"', value, 1)
    assert set(fields_of(lambda: parse_run_config(text))) == {"preset"}


@pytest.mark.parametrize(("text", "field"), [("ppo = 3\n", "ppo"), ("ppo.epochs = 'x'\n", "ppo.epochs")])
def test_a_bad_value_over_a_preset_is_named(tmp_path: Path, text: str, field: str) -> None:
    assert set(fields_of(lambda: parse_run_config(document(tmp_path, "grpo", text)))) == {field}


def test_a_key_of_thousands_of_parts_is_refused_by_name(tmp_path: Path) -> None:
    deep = ".".join(["a"] * 2000) + " = 1"
    assert set(fields_of(lambda: parse_run_config(document(tmp_path, "grpo", deep)))) == {"a"}


def test_settings_of_a_preset_give_way_to_a_choice_that_leaves_them_without_effect(tmp_path: Path) -> None:
    tables = f'[ppo]\nadvantage = "grpo"\n{LEARNING_RATE}'
    config = parse_run_config(document(tmp_path, "nplus", "responses_per_prompt = 4", tables))
    check_run_config(config)
    defaults = parse_run_config(document(tmp_path, "")).ppo
    for name in ("gamma", "lam", "value_clip_range", "score_placement"):
        assert name not in config.ppo.model_fields_set
        assert getattr(config.ppo, name) == getattr(defaults, name)
    assert config.ppo.missing_eos == "replace" and config.ppo.temperature == 0.7, "these have an effect still"


@pytest.mark.parametrize(
    ("preset", "choice", "left"),
    [
        ("grpo", "kl_coef = 0.0", "kl_in"),
        ("nplus", 'missing_eos = "none"', "missing_eos_value"),
        ("nplus", "epochs = 1", "clip_range"),
    ],
)
def test_a_part_of_a_preset_can_be_switched_off_with_one_key(
    tmp_path: Path, preset: str, choice: str, left: str
) -> None:
    config = parse_run_config(document(tmp_path, preset, tables=f"[ppo]\n{choice}\n{LEARNING_RATE}"))
    check_run_config(config)
    assert left not in config.ppo.model_fields_set


def test_what_a_run_sets_itself_is_refused_and_not_left_out(tmp_path: Path) -> None:
    text = document(tmp_path, "grpo", tables=f"[ppo]\nlam = 1.0\n{LEARNING_RATE}")
    config = parse_run_config(text)
    assert config.ppo.lam == 1.0
    assert set(fields_of(lambda: check_run_config(config))) == {"ppo.lam"}


def test_instructgpt_asks_for_its_pretraining_text_or_does_without(tmp_path: Path) -> None:
    config = parse_run_config(document(tmp_path, "instructgpt"))
    assert set(fields_of(lambda: check_run_config(config))) == {"ppo.ptx_text"}
    check_run_config(parse_run_config(document(tmp_path, "instructgpt", "ppo.ptx_coef = 0.0")))


def test_laying_one_over_the_other_changes_neither() -> None:
    weaker: dict[str, Any] = {"a": 1, "t": {"x": 1, "y": 2}, "only": {"z": 3}}
    stronger: dict[str, Any] = {"t": {"y": 5}, "new": {"w": 6}}
    merged = lay_over(weaker, stronger)
    assert merged == {"a": 1, "t": {"x": 1, "y": 5}, "only": {"z": 3}, "new": {"w": 6}}
    merged["only"]["z"] = merged["t"]["x"] = 0
    assert weaker == {"a": 1, "t": {"x": 1, "y": 2}, "only": {"z": 3}}
    assert stronger == {"t": {"y": 5}, "new": {"w": 6}}


def test_leaving_a_default_out_does_not_touch_the_defaults(tmp_path: Path) -> None:
    defaults = tomllib.loads(document(tmp_path, "", 'reward_model = "r"', f"[ppo]\nlam = 1.0\n{LEARNING_RATE}"))
    merged = lay_over_defaults({"ppo": {"advantage": "rloo"}}, defaults)
    assert "reward_model" not in merged and merged["ppo"] == {"advantage": "rloo"}
    assert defaults["reward_model"] == "r" and defaults["ppo"] == {"lam": 1.0}
