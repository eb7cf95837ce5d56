"""The synchronous client: the async clients, driven by one event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import threading
from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from tether.channel import DEFAULT_TIMEOUT_SECONDS, ServiceClient
from tether.credentials import CredentialOptions, Tls, Token
from tether.errors import FailedPreconditionError, InvalidArgumentError, TetherError
from tether.generator import GeneratorClient
from tether.orchestrator import OrchestratorClient, Run, StepEvent
from tether.reference import ReferenceClient
from tether.reward import ItemScore, RewardClient, ScoredItem, ScoreItem
from tether.score_stream import CONCURRENCY, OnScored, ScoreStream, StreamOptions

__all__ = ["Client"]

Parameters = ParamSpec("Parameters")
ResultT = TypeVar("ResultT")
ServiceT = TypeVar("ServiceT", bound=ServiceClient)


def _synchronous(
    kind: type[ServiceT], method: Callable[Concatenate[ServiceT, Parameters], Coroutine[Any, Any, ResultT]]
) -> Callable[Concatenate[Client, Parameters], ResultT]:
    """Return the method of an async client as a method of Client, with the same parameters and documentation."""

    @functools.wraps(method)
    def call(self: Client, /, *args: Parameters.args, **kwargs: Parameters.kwargs) -> ResultT:
        return self._run(method(self._service(kind), *args, **kwargs))

    return call


class Client:
    """All services behind ordinary function calls, for programs without an event loop.

    A context manager, usable from any thread. Give the address of each service that you use:

        with Client(reward="127.0.0.1:50052") as client:
            print(client.score("Once upon a time", "they lived happily.").score)
    """

    def __init__(
        self,
        *,
        generator: str = "",
        reward: str = "",
        reference: str = "",
        orchestrator: str = "",
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
        token: Token = None,
        tls: Tls = None,
        allow_plaintext_token: bool = False,
    ) -> None:
        """Remember where the services are; nothing is opened before the first call.

        Args:
            generator: Target of the generator, for example `127.0.0.1:50051`; empty if it is not used.
            reward: Target of the reward scorer.
            reference: Target of the reference server.
            orchestrator: Target of the orchestrator.
            timeout_seconds: Deadline of each call that does not set its own.
            token: Shown to all of them; as in the async clients, as all that follows.
            tls: Files of TLS.
            allow_plaintext_token: Send the token to another machine although there is no TLS.
        """
        options: CredentialOptions = {"token": token, "tls": tls, "allow_plaintext_token": allow_plaintext_token}
        targets: dict[type[ServiceClient], str] = {
            GeneratorClient: generator,
            RewardClient: reward,
            ReferenceClient: reference,
            OrchestratorClient: orchestrator,
        }
        self._services = {
            kind: kind(target, timeout_seconds=timeout_seconds, **options) for kind, target in targets.items() if target
        }
        self._is_closed = False
        self._closing = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(_ignore_shared_poller_noise)
        self._thread = threading.Thread(target=self._loop.run_forever, name="tether-client", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the channels and end the thread; calls of other threads fail with CLIENT_CLOSED. Twice is once."""
        with self._closing:
            if self._is_closed:
                return
            self._is_closed = True
            ending = asyncio.run_coroutine_threadsafe(self._end_calls(), self._loop)
        ending.result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end_calls(self) -> None:
        """Close the services and end what still runs on the loop, so that nobody waits for it."""
        for service in self._services.values():
            await service.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def score(
        self, prompt: str, response: str, *, model: str = "", version: str = "", timeout_seconds: float | None = None
    ) -> ItemScore:
        """Return the score of one response to a prompt.

        Raises:
            TetherError: The response could not be scored; the narrowest class says why.
        """
        result = self.score_items(
            [ScoreItem(prompt, response)], model=model, version=version, timeout_seconds=timeout_seconds
        )
        score = result.scores[0]
        if score.error is not None:
            raise score.error
        return score

    def score_many(
        self,
        items: Iterable[ScoreItem],
        *,
        model: str = "",
        version: str = "",
        one_version: bool = True,
        concurrency: int = CONCURRENCY,
        on_progress: OnScored | None = None,
        timeout_seconds: float | None = None,
    ) -> Generator[ScoredItem, None, None]:
        """Yield the scores of any number of items, in their order; arguments and errors as `RewardClient.score_many`.

        The items are read, and `on_progress` is called, in the thread that takes the results.
        """
        options = StreamOptions(model, version, one_version, concurrency, timeout_seconds)
        stream = ScoreStream(self._service(RewardClient), options)
        try:
            self._run(stream.open())
            for item in items:
                stream.add(item)
                while stream.is_due:
                    yield from self._advance(stream, on_progress)
            stream.end()
            while stream.is_due:
                yield from self._advance(stream, on_progress)
        finally:
            with contextlib.suppress(TetherError):  # of a client that is closed, whose calls have ended
                self._run(stream.close())

    def _advance(self, stream: ScoreStream, on_progress: OnScored | None) -> list[ScoredItem]:
        scored = self._run(stream.advance())
        if scored and on_progress is not None:
            on_progress(scored[-1].index + 1)
        return scored

    score_items = _synchronous(RewardClient, RewardClient.score)
    compare = _synchronous(RewardClient, RewardClient.compare)
    list_reward_models = _synchronous(RewardClient, RewardClient.list_reward_models)
    generate = _synchronous(GeneratorClient, GeneratorClient.generate)
    get_generator = _synchronous(GeneratorClient, GeneratorClient.get_generator)
    compute_logprobs = _synchronous(ReferenceClient, ReferenceClient.compute_logprobs)
    get_reference = _synchronous(ReferenceClient, ReferenceClient.get_reference)
    start_run = _synchronous(OrchestratorClient, OrchestratorClient.start_run)
    get_run = _synchronous(OrchestratorClient, OrchestratorClient.get_run)
    list_runs = _synchronous(OrchestratorClient, OrchestratorClient.list_runs)
    cancel_run = _synchronous(OrchestratorClient, OrchestratorClient.cancel_run)
    resume_run = _synchronous(OrchestratorClient, OrchestratorClient.resume_run)
    roll_back_run = _synchronous(OrchestratorClient, OrchestratorClient.roll_back_run)

    def watch_run(self, run_id: str, *, first_step: int = 0) -> Iterator[StepEvent | Run]:
        """Yield every committed step once and in order, and every change of the run's state, until it has ended."""
        events = self._service(OrchestratorClient).watch_run(run_id, first_step=first_step)
        end = object()

        async def advance() -> StepEvent | Run | object:
            return await anext(events, end)

        try:
            while (event := self._run(advance())) is not end:
                yield event  # type: ignore[misc]
        finally:
            self._run(events.aclose())

    def _service(self, kind: type[ServiceT]) -> ServiceT:
        service = self._services.get(kind)
        if not isinstance(service, kind):
            name = kind.__name__.removesuffix("Client").lower()
            raise InvalidArgumentError(f"This call needs Client({name}='host:port').", field=name)
        return service

    def _run(self, work: Coroutine[Any, Any, ResultT]) -> ResultT:
        """Return the result of a coroutine run on the client's loop; an interrupt cancels it."""
        with self._closing:
            if self._is_closed:
                work.close()
                raise FailedPreconditionError("This client is closed.", reason="CLIENT_CLOSED")
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:  # only a close cancels what this thread has not interrupted
            raise FailedPreconditionError("The client was closed during this call.", reason="CLIENT_CLOSED") from None
        except BaseException:  # an interruption too must leave nothing half-done
            future.cancel()
            raise


def _ignore_shared_poller_noise(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Drop what gRPC's poller reports when another event loop took its wake-up first (grpc 25364); pass on the rest."""
    if not isinstance(context.get("exception"), BlockingIOError):
        loop.default_exception_handler(context)
