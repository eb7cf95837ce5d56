"""What a reward service serves after a restart, over real loopback ports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.rpc.reward_model_serving import serve_rewards, store_model
from tests.rpc.serving import run
from tether.errors import InvalidArgumentError
from tether.reward import ScoreItem
from tether_services.reward.engines.fake import fake_text_score

ITEM = ScoreItem("Once", " upon")


def oracle(version: str) -> float:
    return fake_text_score("Once", " upon", salt=version)


def test_the_default_survives_a_restart(tmp_path: Path) -> None:
    store = tmp_path / "store"
    for version in ("2", "3"):
        store_model(store, "m", version)
    values: dict[str, Any] = {"model_store": str(store), "state_dir": str(tmp_path / "state")}

    async def switch() -> None:
        async with serve_rewards(**values) as rewards:
            for version, before in (("2", "m@1"), ("3", "m@2")):
                await rewards.models.load("m", version)
                await rewards.models.set_default("m", version, expected_current=before)

    async def look(expected: str, **changes: Any) -> None:
        async with serve_rewards(**(values | changes)) as rewards:
            result = await rewards.reward.score([ITEM])
            assert (result.version, result.scores[0].score) == (expected, oracle(expected))

    run(switch())
    run(look("3"))
    run(look("1", state_dir=""))  # the control: without the folder the configuration decides
    (store / "m" / "3" / "model.toml").write_text('components = [{name = "f", engine = "fake", salt = "4"}]')
    with pytest.raises(InvalidArgumentError, match="has the content hash") as caught:
        run(look("3"))
    assert caught.value.violations[0].field == "state_dir"
    (store / "m" / "3" / "model.toml").unlink()
    with pytest.raises(InvalidArgumentError, match="m@3 was made the default and cannot be served"):
        run(look("3"))
    (tmp_path / "state" / "default_models.json").write_text("{")
    with pytest.raises(InvalidArgumentError, match="Delete it"):
        run(look("3"))
    (tmp_path / "state" / "default_models.json").unlink()
    run(look("1"))


def test_a_name_that_was_unloaded_is_not_missed_after_a_restart(tmp_path: Path) -> None:
    store = tmp_path / "store"
    for version in ("1", "2"):
        store_model(store, "other", version)
    values: dict[str, Any] = {"model_store": str(store), "state_dir": str(tmp_path / "state")}

    async def scenario() -> None:
        async with serve_rewards(**values) as rewards:
            for version in ("1", "2"):
                await rewards.models.load("other", version)
            await rewards.models.set_default("other", "2", expected_current="other@1", name_only=True)
            await rewards.models.unload("other", "1")
        async with serve_rewards(**values) as rewards:
            assert (await rewards.reward.score([ITEM], model="other")).version == "2"
            await rewards.models.unload("other", "2")
        async with serve_rewards(**values) as rewards:
            assert await rewards.states() == {"m@1": "serving"}

    run(scenario())
