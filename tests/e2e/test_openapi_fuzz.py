"""Schemathesis against the OpenAPI document that each service serves: what it says is what the service does.

The deadline is left out: with a millisecond of it any call may be answered with 504. The tests of calls have it.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
from prometheus_client import CollectorRegistry

from tests.rpc.http_calls import LOCAL_HTTP, get
from tests.rpc.serving import run, serving
from tether.v1 import reward_pb2
from tether_services.generator.config import GeneratorSettings
from tether_services.generator.service import GeneratorService
from tether_services.orchestrator.config import OrchestratorSettings
from tether_services.orchestrator.service import OrchestratorService
from tether_services.reference.config import ReferenceSettings
from tether_services.reference.service import ReferenceService
from tether_services.reward.config import RewardSettings
from tether_services.reward.service import RewardService
from tether_services.runtime.server import Service
from tether_services.runtime.settings import ServerSettings

PROGRAM: Final = shutil.which("schemathesis", path=str(Path(sys.executable).parent))
OPTIONS: Final = (
    *("--checks", "all", "--phases", "examples,coverage,fuzzing", "--max-examples", "10", "--seed", "7"),
    *("--no-color", "--no-shrink", "--generation-database", "none"),
)
UNSAID: Final = "positive_data_acceptance"
"""No document can say which text is a run configuration, which run is there, or how many token ids a model has."""
ITEMS: Final = "negative_data_rejection"
"""An item of Score that is bad has an error of its own in an answer that is good."""


class ForgetfulService(RewardService):
    """Has no good answer to one method."""

    async def ListRewardModels(self, request: Any, context: Any) -> reward_pb2.ListRewardModelsResponse:
        raise ZeroDivisionError


@dataclass(frozen=True, slots=True)
class Verdict:
    """What schemathesis found of a service, and what the service counted."""

    status: int
    output: str
    num_defects: float


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Verdict]:
    if PROGRAM is None:
        pytest.skip("schemathesis is not installed")
    return run(judge_all(tmp_path_factory.mktemp("documents")), timeout_seconds=280)


async def judge_all(folder: Path) -> dict[str, Verdict]:
    fake = {**LOCAL_HTTP, "engine": "fake"}
    reward = RewardSettings.model_validate(fake)
    reference = ReferenceSettings.model_validate(fake)
    generator = GeneratorSettings.model_validate({**fake, "admin_address": "127.0.0.1:0"})
    orchestrator = OrchestratorSettings.model_validate({**LOCAL_HTTP, "state_dir": str(folder / "runs")})
    work = {
        "reward": judge(reward, lambda r: RewardService(reward, r), folder / "reward.json", ITEMS, UNSAID),
        "forgetful": judge(reward, lambda r: ForgetfulService(reward, r), folder / "forgetful.json"),
        "reference": judge(reference, lambda r: ReferenceService(reference, r), folder / "reference.json", UNSAID),
        "generator": judge(generator, lambda r: GeneratorService(generator, r), folder / "generator.json", UNSAID),
        "orchestrator": judge(orchestrator, lambda r: OrchestratorService(orchestrator, r), folder / "o.json", UNSAID),
    }
    return dict(zip(work, await asyncio.gather(*work.values()), strict=True))


async def judge(
    settings: ServerSettings,
    build: Callable[[CollectorRegistry], Service],
    file: Path,
    *excluded: str,
) -> Verdict:
    """Serve, and run schemathesis with all checks but the excluded ones on the document that is served."""
    assert PROGRAM is not None
    async with serving(settings, build) as served:
        port = served.runner.http_port
        document = (await get(port, "/openapi.json")).body
        for path in document["paths"].values():
            path["post"].pop("parameters")
        file.write_text(json.dumps(document))
        command = [PROGRAM, "run", str(file), "--url", f"http://127.0.0.1:{port}", *OPTIONS]
        if excluded:
            command += ["--exclude-checks", ",".join(excluded)]
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *command, stdout=pipe, stderr=asyncio.subprocess.STDOUT, cwd=file.parent
        )
        output, _ = await process.communicate()
        name = f"tether_{served.service.name}_requests_total"
        labels = [{"method": method, "code": code} for method in served.service.methods() for code in ("INTERNAL",)]
        defects = sum(served.registry.get_sample_value(name, label) or 0 for label in labels)
    assert process.returncode is not None
    return Verdict(process.returncode, output.decode(), defects)


@pytest.mark.slow
@pytest.mark.parametrize("service", ["reward", "reference", "generator", "orchestrator"])
def test_a_service_is_as_its_document_says(verdicts: dict[str, Verdict], service: str) -> None:
    verdict = verdicts[service]
    assert verdict.status == 0, verdict.output
    assert verdict.num_defects == 0


@pytest.mark.slow
def test_a_service_that_is_not_is_noticed(verdicts: dict[str, Verdict]) -> None:
    assert verdicts["forgetful"].status == 1 and "Server error" in verdicts["forgetful"].output
    assert verdicts["forgetful"].num_defects > 0
