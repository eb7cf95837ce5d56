"""What a run checks about its services before it loads a model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.unit.run_inputs import run_config
from tether.errors import FailedPreconditionError, InvalidArgumentError
from tether.generator import GeneratorState
from tether.reference import ReferenceState
from tether_services.orchestrator.config import OrchestratorSettings, RunConfig
from tether_services.orchestrator.remote import open_services
from tether_services.orchestrator.service_checks import check_generator, check_reference

GENERATOR = GeneratorState(
    engine="transformers",
    base_model="policy",
    base_model_sha256="aa",
    vocab_size=48,
    max_model_len=512,
    max_n=8,
    max_lora_rank=16,
    stop_token_ids=(2,),
    active_policy_version=0,
    active_run_id="",
    active_adapter_sha256="",
    loaded_policy_versions=(0,),
)
REFERENCE = ReferenceState("transformers", "policy", "aa", 48, 512, 8)


def check(config: RunConfig, generator: GeneratorState = GENERATOR, reference: ReferenceState = REFERENCE) -> None:
    async def main() -> None:
        async with open_services(OrchestratorSettings()) as services:
            check_generator(config, "aa", services.generators[0].generator, generator)
            check_reference(config, "aa", services.reference, reference)

    asyncio.run(main())


def test_services_that_serve_the_trained_base_within_their_limits_are_accepted(tmp_path: Path) -> None:
    check(run_config(tmp_path, "responses_per_prompt = 8\nmax_prompt_tokens = 448", trainer="lora_rank = 16"))


@pytest.mark.parametrize("name", ["generator", "reference"])
def test_another_base_is_refused_with_service_address_and_both_hashes(tmp_path: Path, name: str) -> None:
    states: dict[str, Any] = {"generator": GENERATOR, "reference": REFERENCE}
    states[name] = replace(states[name], base_model_sha256="bb")
    with pytest.raises(FailedPreconditionError, match=f"{name} at 127") as caught:
        check(run_config(tmp_path), **states)
    assert caught.value.reason == "BASE_MISMATCH"
    assert "bb" in caught.value.message and "aa" in caught.value.message


@pytest.mark.parametrize(
    ("extra", "trainer", "change", "field"),
    [
        ("responses_per_prompt = 8", "", lambda g, r: (replace(g, max_n=7), r), "responses_per_prompt"),
        ("responses_per_prompt = 8", "", lambda g, r: (g, replace(r, max_items=7)), "responses_per_prompt"),
        ("", "lora_rank = 16", lambda g, r: (replace(g, max_lora_rank=8), r), "trainer.lora_rank"),
        ("", "", lambda g, r: (replace(g, max_model_len=319), r), "max_prompt_tokens + max_response_tokens"),
        ("", "", lambda g, r: (g, replace(r, max_model_len=319)), "max_prompt_tokens + max_response_tokens"),
    ],
)
def test_a_setting_beyond_a_limit_is_named_with_the_service(
    tmp_path: Path,
    extra: str,
    trainer: str,
    change: Callable[[GeneratorState, ReferenceState], tuple[GeneratorState, ReferenceState]],
    field: str,
) -> None:
    config = run_config(tmp_path, extra, trainer=trainer)
    check(config)
    with pytest.raises(InvalidArgumentError) as caught:
        check(config, *change(GENERATOR, REFERENCE))
    assert caught.value.violations[0].field == field
