"""The limits that the OpenAPI documents state are those that the services enforce, on both sides of each boundary.

Every limit of every field is broken by as little as possible, in a request that is right otherwise: the schema refuses
it, and the service answers INVALID_ARGUMENT naming that field. At the boundary itself neither complains of the field.
"""

from __future__ import annotations

import asyncio
import copy
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf import json_format, message_factory
from google.protobuf.descriptor import Descriptor, MethodDescriptor

from tests.rpc.generator_serving import serve_generator
from tests.rpc.serving import LOCAL, run, serving
from tests.unit.test_documents import METHODS, name_of, problems
from tether.errors import TetherError
from tether.status import from_code, from_rpc_error
from tether.v1 import reward_pb2
from tether_services.documents.examples import EXAMPLES
from tether_services.documents.limits import LIMITS
from tether_services.orchestrator.config import OrchestratorSettings
from tether_services.orchestrator.engines.process import ProcessEngine
from tether_services.orchestrator.service import OrchestratorService
from tether_services.reference.config import ReferenceSettings
from tether_services.reference.service import ReferenceService
from tether_services.reward.config import RewardSettings
from tether_services.reward.service import RewardService
from tether_services.runtime.fake_policy import FAKE_BASE_SHA256

Body = dict[str, Any]
Place = tuple[str | int, ...]
ID = str(uuid.UUID(int=7))
RUN: Body = {"run_id": "run-1", "request_id": ID}
MODEL: Body = {"name": "m", "version": "2"}
WRITER: Body = {**RUN, "epoch": 1}
BODIES: dict[str, list[Body]] = {
    **{name: list(examples.values()) for name, examples in EXAMPLES.items()},
    "GeneratorService.Generate": [
        *EXAMPLES["GeneratorService.Generate"].values(),
        {
            "prompt_token_ids": [1, 40],
            "n": 1,
            "policy_version": "0",
            "run_id": "",
            "sampling": {"max_tokens": 4, "temperature": 0, "top_p": 1, "top_k": 3, "seed": 1, "stop_token_ids": [2]},
        },
    ],
    "OrchestratorService.StartRun": [{"run_id": "run-1", "config_toml": "steps = 1"}],
    "OrchestratorService.ListRuns": [{"page_size": 10, "page_token": "0"}],
    "OrchestratorService.CancelRun": [RUN],
    "OrchestratorService.ResumeRun": [{**RUN, "from_step": 1}],
    "OrchestratorService.RollbackRun": [{**RUN, "to_step": 1}],
    "OrchestratorService.ListSteps": [{"run_id": "run-1", "first_step": 0, "page_size": 10}],
    "RewardService.ListRewardModels": [{"page_size": 10, "page_token": "0"}],
    "RewardModelService.LoadRewardModel": [{"request_id": ID, **MODEL, "expected_sha256": "0" * 64}],
    "RewardModelService.UnloadRewardModel": [{"request_id": ID, **MODEL}],
    "RewardModelService.SetDefaultRewardModel": [{"request_id": ID, **MODEL, "expected_current": "m@1"}],
    "RewardModelService.SetShadow": [{"request_id": ID, **MODEL, "base": "m@1", "fraction": 0.5}],
    "RewardModelService.ClearShadow": [{"request_id": ID}],
    "RewardModelService.ListLoadedRewardModels": [{"page_size": 10, "page_token": "0"}],
    "AdapterService.BeginPush": [
        {
            **WRITER,
            "policy_version": "1",
            "base_model_sha256": FAKE_BASE_SHA256,
            "rank": 2,
            "target_modules": ["q_proj"],
            "files": [
                {"name": "adapter_config.json", "size_bytes": "100", "sha256": "0" * 64},
                {"name": "adapter_model.safetensors", "size_bytes": "100", "sha256": "1" * 64},
            ],
            "probes": [{"token_ids": [1, 2], "logprobs": [-1.5], "base_logprobs": [-1.0]}],
        }
    ],
    "AdapterService.CommitPush": [{"request_id": ID, "upload_id": "none", "epoch": 1}],
    "AdapterService.ActivateAdapter": [
        {**WRITER, "policy_version": 1, "expected_run_id": "run-2", "expected_policy_version": "3"}
    ],
    "AdapterService.RollbackAdapter": [{**WRITER, "expected_policy_version": 2}],
    "AdapterService.ListAdapters": [{"page_size": 10, "page_token": "0"}],
    "AdapterService.DeleteAdapter": [{**WRITER, "policy_version": 1}],
}
"""Bodies that fit the schemas, with every field that has a limit."""
OF_A_RUN = ("from_step minimum", "to_step minimum")
"""Limits that a service looks at once it has found the run; its own tests have them, with runs."""


@dataclass(frozen=True, slots=True)
class Case:
    """A request that differs from a right one in one field."""

    method: MethodDescriptor
    body: Body
    field: str
    """Path of the field as the service spells it."""
    limit: str
    """What is probed, for example `n minimum`."""


@dataclass(frozen=True, slots=True)
class Spot:
    """A message in a body."""

    message: Descriptor
    place: Place
    """Where it is in the body."""
    path: str
    """The same as a service spells it; empty for the whole."""


def spots(message: Descriptor, value: Body, place: Place = (), path: str = "") -> Iterator[Spot]:
    """Yield every message in a body."""
    yield Spot(message, place, path)
    for field in message.fields:
        if field.message_type is None or field.name not in value:
            continue
        inner = ".".join(part for part in (path, field.name) if part)
        held = value[field.name]
        if not isinstance(held, list):
            yield from spots(field.message_type, held, (*place, field.name), inner)
            continue
        for index, item in enumerate(held):
            yield from spots(field.message_type, item, (*place, field.name, index), f"{inner}[{index}]")


def bad_values(limit: Body, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield values that are just beyond a limit, with the keyword that they break."""
    for keyword, bound in limit.items():
        if keyword == "minimum":
            yield keyword, bound - (1 if isinstance(bound, int) else 0.005)
        elif keyword == "maximum" and bound < 2**63 - 1:
            yield keyword, bound + (1 if isinstance(bound, int) else 0.005)
        elif keyword == "exclusiveMinimum":
            yield keyword, bound
        elif keyword == "minItems":
            yield keyword, value[: bound - 1]
        elif keyword == "maxItems":
            yield keyword, [value[0]] * (bound + 1)
        elif keyword == "minLength":
            yield keyword, ""
        elif keyword == "maxLength":
            yield keyword, "#" * (bound + 1)  # in TOML too this is only long
        elif keyword in ("pattern", "format", "enum"):
            yield keyword, "../Other"
        elif keyword == "anyOf":
            yield from ((keyword, bad) for bad in (-0.1, 0.005, 2.5))
        elif keyword == "items":
            yield from ((f"items {inner}", [bad, *value[1:]]) for inner, bad in bad_values(bound, value[0]))


def good_values(limit: Body) -> Iterator[tuple[str, Any]]:
    """Yield values at the very limit."""
    for keyword in ("minimum", "maximum"):
        if keyword in limit and limit[keyword] < 2**63 - 1:
            yield keyword, limit[keyword]
    if "maxLength" in limit:
        yield "maxLength", "#" * limit["maxLength"]
    for option in limit.get("anyOf", ()):
        yield from (("anyOf", value) for value in option.values())


def replaced(body: Body, place: Place, value: Any) -> Body:
    """Return a body with another value at a place; None leaves the field out."""
    changed = copy.deepcopy(body)
    inner: Any = changed
    for step in place[:-1]:
        inner = inner[step]
    if value is None:
        inner.pop(place[-1])
    else:
        inner[place[-1]] = value
    return changed


def cases(*, good: bool) -> Iterator[Case]:
    """Yield one case for each limit of each field in each body."""
    for method in METHODS:
        for body in BODIES.get(name_of(method), []):
            for spot in spots(method.input_type, body):
                yield from _cases_of(method, body, spot, good=good)


def _cases_of(method: MethodDescriptor, body: Body, spot: Spot, *, good: bool) -> Iterator[Case]:
    for field in spot.message.fields:
        place = (*spot.place, field.name)
        limit = LIMITS.get(f"{spot.message.name}.{field.name}", {})
        present = _value_at(body, place)
        path = ".".join(part for part in (spot.path, field.name) if part)
        if present is None:
            continue
        for keyword, value in good_values(limit) if good else bad_values(limit, present):
            yield Case(method, replaced(body, place, value), path, f"{field.name} {keyword}")
        if not good and field.name in LIMITS.get(spot.message.name, {}).get("required", ()):
            yield Case(method, replaced(body, place, None), path, f"{field.name} required")


def _value_at(body: Body, place: Place) -> Any:
    inner: Any = body
    for step in place:
        if isinstance(step, str) and step not in inner:
            return None
        inner = inner[step]
    return inner


@asynccontextmanager
async def everything(folder: Path) -> AsyncIterator[dict[str, grpc.aio.Channel]]:
    """Serve all services with fake engines and yield a channel for each, by the name of the service."""
    reward = RewardSettings.model_validate({**LOCAL, "admin_address": "127.0.0.1:0", "engine": "fake"})
    reference = ReferenceSettings.model_validate({**LOCAL, "engine": "fake"})
    runs = OrchestratorSettings.model_validate({**LOCAL, "state_dir": str(folder / "runs")})
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        generator = await enter(serve_generator())
        rewards = await enter(serving(reward, lambda r: RewardService(reward, r)))
        targets = {
            "GeneratorService": generator.served.target,
            "AdapterService": generator.admin_target,
            "RewardService": rewards.target,
            "RewardModelService": f"127.0.0.1:{rewards.runner.bound_ports[1]}",
            "ReferenceService": (await enter(serving(reference, lambda r: ReferenceService(reference, r)))).target,
            "OrchestratorService": (
                await enter(serving(runs, lambda r: OrchestratorService(runs, r, engine=ProcessEngine(runs))))
            ).target,
        }
        yield {name: await enter(grpc.aio.insecure_channel(target)) for name, target in targets.items()}


async def verdict(channels: dict[str, grpc.aio.Channel], method: MethodDescriptor, body: Body) -> TetherError | None:
    """Return how a service refuses a body; None if it does not. An item of Score that is refused counts."""
    request_class, response_class = map(message_factory.GetMessageClass, (method.input_type, method.output_type))
    call = channels[method.containing_service.name].unary_unary(
        f"/{method.containing_service.full_name}/{method.name}",
        request_serializer=request_class.SerializeToString,
        response_deserializer=response_class.FromString,
    )
    try:
        response = await call(json_format.ParseDict(body, request_class()), timeout=30)
    except grpc.aio.AioRpcError as error:
        return from_rpc_error(error, target="", timeout_seconds=30)
    if isinstance(response, reward_pb2.ScoreResponse):
        for score in response.scores:
            if score.HasField("error"):
                failed = score.error
                return from_code(failed.code, failed.message, reason=failed.reason, field=failed.field)
    return None


async def verdicts(folder: Path, asked: list[Case]) -> list[TetherError | None]:
    async with everything(folder) as channels:
        return await asyncio.gather(*(verdict(channels, case.method, case.body) for case in asked))


def blames(error: TetherError | None, case: Case) -> bool:
    """Return whether an error is of the field of a case, of what it holds or of what holds it."""
    if error is None or error.code is not grpc.StatusCode.INVALID_ARGUMENT:
        return False
    fields = [violation.field for violation in error.violations]
    return any(field.startswith(case.field) or case.field.startswith((f"{field}.", f"{field}[")) for field in fields)


def is_refused_for(error: TetherError | None, case: Case) -> bool:
    """Return whether an error is what breaking this limit must give.

    What is left out may also be blamed on what is read in its place: without a response an item has no form.
    """
    if case.limit in OF_A_RUN:
        return error is not None and error.reason == "RUN_NOT_FOUND"
    if error is None or error.code is not grpc.StatusCode.INVALID_ARGUMENT:
        return False
    return blames(error, case) or case.limit.endswith(("required", "minItems"))


def complaints(case: Case) -> list[str]:
    return problems(case.method.containing_service.name, case.method.input_type.name, case.body)


def described(case: Case, error: TetherError | None) -> str:
    return f"{name_of(case.method)} {case.limit}: schema says {complaints(case)[:1]}, service says {error}"


def test_what_is_beyond_a_limit_is_refused_by_schema_and_service(tmp_path: Path) -> None:
    asked = list(cases(good=False))
    probed = {f"{case.method.input_type.name}.{case.limit.split()[0]}" for case in asked}
    assert len(asked) > 120 and {"ScoreRequest.items", "BeginPushRequest.rank", "ListStepsRequest.page_size"} <= probed
    answers = run(verdicts(tmp_path, asked))
    wrong = [
        described(case, error)
        for case, error in zip(asked, answers, strict=True)
        if not complaints(case) or not is_refused_for(error, case)
    ]
    assert not wrong, "\n".join(wrong)


def test_what_is_at_a_limit_is_accepted_by_schema_and_service(tmp_path: Path) -> None:
    asked = list(cases(good=True))
    assert len(asked) > 50
    answers = run(verdicts(tmp_path, asked))
    wrong = [
        described(case, error)
        for case, error in zip(asked, answers, strict=True)
        if complaints(case) or blames(error, case)
    ]
    assert not wrong, "\n".join(wrong)


def test_every_limit_is_probed() -> None:
    """A limit that no body reaches would be stated and never compared."""
    reached = {
        f"{spot.message.name}.{field.name}"
        for method in METHODS
        for body in BODIES.get(name_of(method), [])
        for spot in spots(method.input_type, body)
        for field in spot.message.fields
        if _value_at(body, (*spot.place, field.name)) is not None
    }
    assert sorted({key for key in LIMITS if "." in key} - reached) == []


SAID = [{"role": "assistant", "content": "Yes."}]
SAMPLING = {"n": 1, "sampling": {"max_tokens": 4}}
FORMS: list[tuple[str, Body]] = [
    ("GeneratorService.Generate", SAMPLING),
    ("GeneratorService.Generate", {**SAMPLING, "prompt": "p", "prompt_token_ids": [1]}),
    ("GeneratorService.Generate", {**SAMPLING, "prompt": "p", "messages": SAID}),
    ("GeneratorService.Generate", {**SAMPLING, "prompt": None}),
    ("GeneratorService.Generate", {**SAMPLING, "prompt": "", "messages": [], "prompt_token_ids": []}),
    ("RewardService.Score", {"items": [{"prompt": "p", "response": None}]}),
    ("RewardService.Score", {"items": [{"prompt": "p", "response": ""}]}),
    ("RewardService.Score", {"items": [{"response_token_ids": []}]}),
    ("RewardService.Score", {"items": [{"prompt": "p"}]}),
    ("RewardService.Score", {"items": [{"prompt_token_ids": [1]}]}),
    ("RewardService.Score", {"items": [{"response": "r", "messages": SAID}]}),
    ("RewardService.Score", {"items": [{"response": "r", "prompt_token_ids": [1]}]}),
    ("RewardService.Score", {"items": [{"prompt": "p", "messages": SAID}]}),
    ("RewardService.Score", {"items": [{"prompt": "p", "response_token_ids": [1]}]}),
    ("RewardService.Score", {"items": [{"prompt_token_ids": [1], "messages": SAID}]}),
]


def test_none_and_several_forms_are_refused_by_schema_and_service(tmp_path: Path) -> None:
    by_name = {name_of(method): method for method in METHODS}
    asked = [Case(by_name[name], body, "", "form") for name, body in FORMS]
    for case, error in zip(asked, run(verdicts(tmp_path, asked)), strict=True):
        assert complaints(case), case
        assert error is not None and error.code is grpc.StatusCode.INVALID_ARGUMENT, case


def test_a_field_that_is_null_or_empty_is_absent_for_schema_and_service(tmp_path: Path) -> None:
    by_name = {name_of(method): method for method in METHODS}
    bodies: list[tuple[str, Body]] = [
        ("GeneratorService.Generate", {**SAMPLING, "prompt": "p", "messages": None, "prompt_token_ids": None}),
        ("GeneratorService.Generate", {**SAMPLING, "prompt": "p", "messages": [], "prompt_token_ids": []}),
        ("RewardService.Score", {"items": [{"messages": SAID, "prompt": None, "response": ""}], "model": None}),
    ]
    asked = [Case(by_name[name], body, "", "null") for name, body in bodies]
    assert [complaints(case) for case in asked] == [[]] * len(bodies)
    assert run(verdicts(tmp_path, asked)) == [None] * len(bodies)


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_examples_are_answered(name: str, tmp_path: Path) -> None:
    (method,) = (method for method in METHODS if name_of(method) == name)

    async def scenario() -> None:
        async with everything(tmp_path) as channels:
            for body in EXAMPLES[name].values():
                error = await verdict(channels, method, body)
                missing = name == "OrchestratorService.GetRun"  # there is no run yet
                assert error is None or (missing and error.reason == "RUN_NOT_FOUND"), error

    run(scenario())
