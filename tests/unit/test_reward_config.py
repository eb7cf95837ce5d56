from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tether.errors import InvalidArgumentError
from tether_services.reference.config import ENV_PREFIX as REFERENCE_PREFIX
from tether_services.reference.config import ReferenceSettings
from tether_services.reward.config import ENV_PREFIX, ModelSettings, RewardSettings
from tether_services.runtime.settings import CONFIG_ERROR_EXIT_CODE, load_settings

FAKE = {"name": "a", "engine": "fake"}


def reward(overrides: Sequence[str] = (), **environ: str) -> RewardSettings:
    return load_settings(RewardSettings, env_prefix=ENV_PREFIX, overrides=overrides, environ=environ)


def test_one_model_is_described_by_engine_and_model() -> None:
    settings = reward(["model=some/folder"])
    (model,) = settings.reward_models()
    assert (model.name, model.components[0].engine, model.components[0].path) == (
        "default",
        "transformers",
        "some/folder",
    )
    (fake,) = reward(["engine=fake"]).reward_models()
    assert fake.components[0].engine == "fake"


def test_models_come_from_a_toml_file(tmp_path: Path) -> None:
    path = tmp_path / "reward.toml"
    path.write_text(
        """
        max_items = 8
        [[models]]
        name = "sentiment"
        version = "3"
          [[models.components]]
          name = "model"
          engine = "transformers"
          path = "models/reward"
          weight = 2
          [[models.components]]
          name = "length"
          engine = "rules"
          function = "tether_services.reward.rules:length_band"
          arguments = { low = 1, high = 9 }
          weight = -0.5
          gain = 4.0
        [[models]]
        name = "second"
        components = [{ name = "a", engine = "fake" }]
        """
    )
    settings = load_settings(RewardSettings, env_prefix="NONE__", config=path, environ={})
    first, second = settings.reward_models()
    assert [component.weight for component in first.components] == [2.0, -0.5]
    assert first.components[1].arguments == {"low": 1, "high": 9}
    assert (first.components[1].gain, first.components[1].bias) == (4.0, None)
    assert (second.name, second.version) == ("second", "")


def test_models_can_be_given_on_one_line() -> None:
    line = 'models=[{name="m", components=[{name="a", engine="fake", weight=2}]}]'
    assert reward([line]).reward_models() == (
        ModelSettings.model_validate({"name": "m", "components": [FAKE | {"weight": 2}]}),
    )


def test_the_environment_sets_nested_keys() -> None:
    settings = reward(TETHER_REWARD__ENGINE="fake", TETHER_REWARD__BATCH__MAX_DELAY_SECONDS="0.5")
    assert settings.batch.max_delay_seconds == 0.5


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (["engine=fake", "speed=9"], "speed"),
        (["engine=fast"], "engine"),
        (["engine=fake", "max_items=0"], "max_items"),
        (["engine=fake", "dtype=float8"], "dtype"),
        (["engine=fake", "device=tpu"], "device"),
        (["engine=fake", "batch.max_item=3"], "batch.max_item"),
        (["engine=fake", "batch.max_delay_seconds=nan"], "batch.max_delay_seconds"),
        (['models=[{name="UP", components=[{name="a", engine="fake"}]}]'], "models.0.name"),
        (['models=[{name="m", components=[]}]'], "models.0.components"),
        (['models=[{name="m"}]'], "models.0.components"),
        (['models=[{name="m", components=[{name="a", engine="magic"}]}]'], "models.0.components.0.engine"),
        (['models=[{name="m", components=[{name="../a", engine="fake"}]}]'], "models.0.components.0.name"),
        (['models=[{name="m", components=[{name="a", engine="fake", wieght=1}]}]'], "models.0.components.0.wieght"),
        (['models=[{name="m", components=[{name="a", engine="fake", weight=nan}]}]'], "models.0.components.0.weight"),
        (['models=[{name="m", components=[{name="a", engine="fake", gain=0}]}]'], "models.0.components.0.gain"),
        (['models=[{name="m", components=[{name="a", engine="fake", path="x"}]}]'], "models.0.components.0"),
        (['models=[{name="m", components=[{name="a", engine="rules"}]}]'], "models.0.components.0"),
        (['models=[{name="m", components=[{name="a", engine="transformers"}]}]'], "models.0.components.0"),
    ],
)
def test_a_bad_key_is_named_with_its_path(overrides: list[str], field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        reward(overrides)
    assert field in [violation.field for violation in caught.value.violations]


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        ([], "model is required"),
        (["engine=fake", "model=x"], "takes no model"),
        (["engine=fake", 'models=[{name="m", components=[{name="a", engine="fake"}]}]'], "ignored beside models"),
        (["model=x", 'models=[{name="m", components=[{name="a", engine="fake"}]}]'], "ignored beside models"),
        (["engine=fake", "max_items=65", "batch.queue_limit=64"], "max_items must not exceed"),
        (
            [
                'models=[{name="m", components=[{name="a", engine="fake"}]},'
                '{name="m", components=[{name="a", engine="fake"}]}]'
            ],
            r"models[1].name: 'm' is taken",
        ),
        (
            ['models=[{name="m", components=[{name="a", engine="fake"}, {name="a", engine="fake"}]}]'],
            r"components[1].name: 'a' is taken",
        ),
    ],
)
def test_contradictions_and_ignored_settings_say_what_to_do(overrides: list[str], word: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        reward(overrides)
    assert any(word in violation.description for violation in caught.value.violations)


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        ([], "model is required"),
        (["engine=fake", "model=x"], "would ignore model"),
        (["engine=fake", "dtype=bfloat16"], "would ignore dtype"),
        (["engine=fake", "max_items=65", "batch.queue_limit=64"], "max_items must not exceed"),
        (["model=x", "max_model_len=1"], "greater than or equal to 2"),
        (["model=x", "temperature=1"], "unknown key"),
    ],
)
def test_the_reference_refuses_contradictions_too(overrides: list[str], word: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        load_settings(ReferenceSettings, env_prefix=REFERENCE_PREFIX, overrides=overrides, environ={})
    assert any(word in violation.description for violation in caught.value.violations)


@pytest.mark.parametrize("service", ["reward", "reference"])
def test_help_is_quick_and_loads_no_tensor_library(service: str) -> None:
    code = (
        f"import sys, tether_services.{service}.__main__ as m\n"
        "try: m.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([n for n in ('torch', 'transformers', 'peft') if n in sys.modules])"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    seconds = time.monotonic() - started
    assert done.stdout.splitlines()[-1] == "[]"
    assert f"TETHER_{service.upper()}__KEY" in done.stdout
    assert "max_items" in done.stdout
    assert seconds < 10  # a second on an idle machine; the tests share theirs


@pytest.mark.parametrize("service", ["reward", "reference"])
def test_a_bad_setting_ends_the_process_with_the_status_for_it(service: str) -> None:
    command = [sys.executable, "-m", f"tether_services.{service}", "--set", "engine=fake", "--set", "sped=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == CONFIG_ERROR_EXIT_CODE
    assert "sped: unknown key" in done.stderr
