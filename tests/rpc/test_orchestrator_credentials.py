"""The orchestrator, the DPO stage and the commands show their credentials to services that demand them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.rpc.certificates import Authority, client_files
from tests.rpc.scripted_reward import ITEM, ScriptedReward, answer
from tests.rpc.scripted_server import in_thread
from tests.rpc.serving import LOCAL
from tests.rpc.tls_serving import Identity, Visitors, serving_tls
from tether import InvalidArgumentError, LogprobItem
from tether.v1 import (
    adapter_pb2,
    adapter_pb2_grpc,
    generator_pb2,
    generator_pb2_grpc,
    orchestrator_pb2,
    orchestrator_pb2_grpc,
    reference_pb2,
    reference_pb2_grpc,
)
from tether_services.cli.main import main
from tether_services.orchestrator.config import ENV_PREFIX, OrchestratorSettings
from tether_services.orchestrator.remote import open_services
from tether_services.orchestrator.service import OrchestratorService
from tether_services.recipes.reference_logprobs import ask_service
from tether_services.runtime.metrics import new_registry
from tether_services.runtime.settings import load_settings

SECRET = "tth_canary.0123456789"


class Everything(
    generator_pb2_grpc.GeneratorServiceServicer,
    adapter_pb2_grpc.AdapterServiceServicer,
    reference_pb2_grpc.ReferenceServiceServicer,
    orchestrator_pb2_grpc.OrchestratorServiceServicer,
):
    """One answer of each service but the reward service."""

    def add(self, server: grpc.aio.Server) -> None:
        generator_pb2_grpc.add_GeneratorServiceServicer_to_server(self, server)
        adapter_pb2_grpc.add_AdapterServiceServicer_to_server(self, server)
        reference_pb2_grpc.add_ReferenceServiceServicer_to_server(self, server)
        orchestrator_pb2_grpc.add_OrchestratorServiceServicer_to_server(self, server)

    async def GetGenerator(self, request: Any, context: Any) -> Any:
        return generator_pb2.GetGeneratorResponse(engine="fake")

    async def Generate(self, request: Any, context: Any) -> Any:
        completion = generator_pb2.Completion(text=" upon", finish_reason=generator_pb2.FINISH_REASON_STOP)
        return generator_pb2.GenerateResponse(completions=[completion])

    async def GetActiveAdapter(self, request: Any, context: Any) -> Any:
        return adapter_pb2.GetActiveAdapterResponse(run_id="a", policy_version=1)

    async def ListAdapters(self, request: Any, context: Any) -> Any:
        return adapter_pb2.ListAdaptersResponse()

    async def ActivateAdapter(self, request: Any, context: Any) -> Any:
        return adapter_pb2.ActivateAdapterResponse(previous_policy_version=1)

    async def GetReference(self, request: Any, context: Any) -> Any:
        return reference_pb2.GetReferenceResponse(max_items=8, max_model_len=64)

    async def ComputeLogprobs(self, request: Any, context: Any) -> Any:
        items = [reference_pb2.ItemLogprobs(ref_logprobs=[-1.0, -2.0]) for _ in request.items]
        return reference_pb2.ComputeLogprobsResponse(items=items)

    async def GetRun(self, request: Any, context: Any) -> Any:
        state = orchestrator_pb2.RUN_STATE_SUCCEEDED
        return orchestrator_pb2.GetRunResponse(run=orchestrator_pb2.Run(run_id=request.run_id, state=state))

    async def ListRuns(self, request: Any, context: Any) -> Any:
        return orchestrator_pb2.ListRunsResponse()


class World:
    """A server with mutual TLS and a token, and the files to get in."""

    def __init__(self, folder: Path) -> None:
        authority = Authority()
        self.files = client_files(folder, authority, authority.sign("client"))
        self.token = folder / "token"
        self.token.write_text(SECRET)
        self.visitors = Visitors(SECRET)
        self._identity = Identity(authority, authority.sign("service"), mutual=True)

    def serve(self) -> AbstractAsyncContextManager[str]:
        everything = Everything()  # type: ignore[abstract]
        return serving_tls(self._identity, everything.add, ScriptedReward(answer).add, visitors=self.visitors)

    def table(self) -> dict[str, str]:
        names = ("ca_file", "certificate_file", "key_file")
        return {"token_file": str(self.token)} | {name: str(getattr(self.files, name)) for name in names}

    def options(self) -> list[str]:
        files = {"--ca-file": self.files.ca_file, "--certificate-file": self.files.certificate_file}
        files |= {"--key-file": self.files.key_file, "--token-file": self.token}
        return [str(word) for pair in files.items() for word in pair]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def target(world: World) -> Iterator[str]:
    with in_thread(world.serve) as address:
        yield address


def settings_for(target: str, **values: object) -> OrchestratorSettings:
    names = ("generator_address", "adapter_address", "reward_address", "reference_address")
    return OrchestratorSettings.model_validate(LOCAL | dict.fromkeys(names, target) | values)


@pytest.mark.parametrize("given", [True, False])
def test_every_client_of_a_run_has_the_credentials_of_the_settings(world: World, given: bool) -> None:
    """The control has none, and no call succeeds."""

    async def scenario() -> None:
        async with world.serve() as target:
            settings = settings_for(target, max_retries=0, **({"credentials": world.table()} if given else {}))
            async with open_services(settings) as services:
                calls = (
                    services.generators[0].generator.call(lambda client: client.get_generator()),
                    services.generators[0].adapter.call(lambda client: client.get_active_adapter()),
                    services.reward.call(lambda client: client.score([ITEM])),
                    services.reference.call(lambda client: client.get_reference()),
                )
                answers = await asyncio.gather(*calls, return_exceptions=True)
                assert [isinstance(one, BaseException) for one in answers] == [not given] * 4
                assert await services.reward.client.answers() is True  # refused is an answer too

    asyncio.run(scenario())


def test_settings_come_from_a_table_or_the_environment(world: World, tmp_path: Path) -> None:
    lines = [f"{name} = {json.dumps(value)}" for name, value in world.table().items()]
    (tmp_path / "orchestrator.toml").write_text("\n".join(["[credentials]", *lines]))
    environ = {f"{ENV_PREFIX}CREDENTIALS__{name.upper()}": value for name, value in world.table().items()}
    for settings in (
        load_settings(OrchestratorSettings, env_prefix=ENV_PREFIX, config=tmp_path / "orchestrator.toml", environ={}),
        load_settings(OrchestratorSettings, env_prefix=ENV_PREFIX, environ=environ),
    ):
        assert settings.credentials.options() == {
            "token": world.token,
            "tls": world.files,
            "allow_plaintext_token": False,
        }
        again = OrchestratorSettings.model_validate_json(settings.model_dump_json())
        assert again.credentials == settings.credentials, "as a worker gets them"
    assert OrchestratorSettings().credentials.options()["tls"] is None
    with pytest.raises(InvalidArgumentError, match="invalid key") as caught:
        load_settings(OrchestratorSettings, env_prefix=ENV_PREFIX, overrides=["credentials.key_file=a"], environ={})
    assert "certificate_file is missing" in caught.value.violations[0].description


def test_an_orchestrator_with_useless_credentials_does_not_start(world: World, tmp_path: Path) -> None:
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("reward:50052", {"token_file": str(world.token)}, "PLAINTEXT_TOKEN"),
        ("127.0.0.1:1", {"token_file": str(tmp_path / "nothing")}, "CREDENTIALS_UNREADABLE"),
        ("127.0.0.1:1", {"ca_file": str(world.token)}, "BAD_TLS_FILES"),
    ]

    async def start(settings: OrchestratorSettings) -> None:
        service = OrchestratorService(settings, new_registry())
        try:
            await service.start()
        finally:
            await service.close()

    for number, (address, table, reason) in enumerate(cases):
        settings = settings_for(address, credentials=table, state_dir=str(tmp_path / str(number)))
        with pytest.raises(InvalidArgumentError, match=reason):
            asyncio.run(start(settings))
    allowed = {"token_file": str(world.token), "allow_plaintext_token": True}
    asyncio.run(start(settings_for("reward:50052", credentials=allowed, state_dir=str(tmp_path / "allowed"))))


def test_a_stage_asks_a_reference_service_with_the_credentials_of_the_environment(
    world: World, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = world.table()
    for name in ("token_file", "ca_file", "certificate_file", "key_file"):
        monkeypatch.setenv(f"TETHER_{name.upper()}", table[name])
    assert ask_service(target, [LogprobItem([1], [2, 3])] * 3) == [-3.0] * 3


@pytest.mark.parametrize(
    "arguments",
    [
        ["score", "Once", " upon", "--address"],
        ["generate", "Once", "--address"],
        ["run", "list", "--address"],
        ["run", "get", "a", "--address"],
        ["run", "show", "a", "--address"],
        ["adapter", "list", "--address"],
        ["adapter", "activate", "b", "2", "--orchestrator", "{target}", "--address"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_commands_show_what_their_options_name(
    world: World, target: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The control, without the token, is refused."""
    words = [word.format(target=target) for word in arguments] + [target, "--timeout", "10"]
    assert main([*words, *world.options()]) == 0
    assert world.visitors.seen and {shown for _, shown in world.visitors.seen} == {f"Bearer {SECRET}"}
    world.token.write_text("wrong")
    assert main([*words, *world.options()]) == 1
    shown = capsys.readouterr()
    assert SECRET not in shown.out + shown.err


def test_a_token_is_no_argument_of_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["score", "a", "b", "--token", SECRET])
    shown = capsys.readouterr()
    assert "use --token-file or TETHER_TOKEN" in shown.err and SECRET not in shown.out + shown.err
