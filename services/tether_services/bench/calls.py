"""The calls of one caller on the wire. How a caller connects and identifies itself is decided here and nowhere else."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import TypeVar

import grpc
import grpc.aio

from tether.channel import channel_with
from tether.credentials import Credentials
from tether.errors import PermissionDeniedError, UnauthenticatedError
from tether.status import from_rpc_error
from tether.v1 import reward_pb2, reward_pb2_grpc
from tether_services.bench.plan import BenchItem, CallerPlan, LoadPlan

ResultT = TypeVar("ResultT")


class ScoreCalls:
    """One caller's connection to a reward service. Nothing is repeated: a call that fails has failed."""

    def __init__(self, target: str, *, credentials: Credentials) -> None:
        """Open the connection; it is shared with no other caller, as those of different programs are not."""
        self._target = target
        self._channel = channel_with(credentials, target, retries=False, own_connection=True)
        self._stub = reward_pb2_grpc.RewardServiceStub(self._channel)

    async def close(self) -> None:
        """Close the connection."""
        await self._channel.close()

    async def score(self, request: reward_pb2.ScoreRequest, *, timeout_seconds: float) -> reward_pb2.ScoreResponse:
        """Return the response.

        Raises:
            TetherError: The call failed; the narrowest class says why.
        """
        call = self._stub.Score(request, timeout=timeout_seconds)
        return await self._typed(call, timeout_seconds)

    async def list_models(self, *, timeout_seconds: float) -> list[reward_pb2.RewardModel]:
        """Return all models that the service lists, or none where it does not let this caller ask.

        Raises:
            TetherError: It cannot be reached.
        """
        found: list[reward_pb2.RewardModel] = []
        request = reward_pb2.ListRewardModelsRequest()
        while True:
            call = self._stub.ListRewardModels(request, timeout=timeout_seconds)
            try:
                page = await self._typed(call, timeout_seconds)
            except (UnauthenticatedError, PermissionDeniedError):  # its calls are refused as well, and counted
                return []
            found += page.models
            request = reward_pb2.ListRewardModelsRequest(page_token=page.next_page_token)
            if not page.next_page_token:
                return found

    async def _typed(self, call: Awaitable[ResultT], timeout_seconds: float) -> ResultT:
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, target=self._target, timeout_seconds=timeout_seconds) from None


def credentials_of(caller: CallerPlan, plan: LoadPlan) -> Credentials:
    """Return what a caller shows.

    Raises:
        InvalidArgumentError: A file is of no use, or PLAINTEXT_TOKEN.
    """
    return Credentials(plan.target, token=caller.token, tls=plan.tls, allow_plaintext_token=plan.allow_plaintext_token)


async def ask_for_models(calls: Sequence[ScoreCalls], *, timeout_seconds: float) -> list[reward_pb2.RewardModel]:
    """Return the models of the service, and have every caller connected.

    Raises:
        TetherError: No caller reaches it.
    """
    asked = [call.list_models(timeout_seconds=timeout_seconds) for call in calls]
    answers = await asyncio.gather(*asked, return_exceptions=True)
    listed = [answer for answer in answers if isinstance(answer, list)]
    if not listed:
        raise next(answer for answer in answers if isinstance(answer, BaseException))
    return max(listed, key=len)


def choose_model(models: Sequence[reward_pb2.RewardModel], plan: LoadPlan) -> reward_pb2.RewardModel | None:
    """Return the model that the plan asks for; None if it is not listed."""
    fitting = [m for m in models if (m.name == plan.model if plan.model else m.default_model)]
    return next((m for m in fitting if plan.version in ("", m.version)), None)


def write_request(items: Sequence[BenchItem], plan: LoadPlan) -> reward_pb2.ScoreRequest:
    """Return the request for items."""
    return reward_pb2.ScoreRequest(items=[_write_item(item) for item in items], model=plan.model, version=plan.version)


def _write_item(item: BenchItem) -> reward_pb2.ScoreItem:
    if item.response_token_ids:
        return reward_pb2.ScoreItem(prompt_token_ids=item.prompt_token_ids, response_token_ids=item.response_token_ids)
    return reward_pb2.ScoreItem(prompt=item.prompt, response=item.response)
