"""vLLM as a process of its own: the golden story, and that nothing outlives the service, however it ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from tests.rpc.generator_serving import PACKAGED_POLICY, STORIES, needs_stories
from tether.v1 import generator_pb2, generator_pb2_grpc

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.timeout(600),
]
START_SECONDS = 180.0


@contextmanager
def process(model: Path, log: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Run the generator on vLLM and yield the process and its data port once it serves."""
    free = ("address", "admin_address", "metrics_address")
    command = [sys.executable, "-m", "tether_services.generator", "--set", "engine=vllm", "--set", f"model={model}"]
    for name in free:
        command += ["--set", f"{name}=127.0.0.1:0"]
    with log.open("wb") as output:
        started = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        yield started, wait_until_serving(started, log)
    finally:
        if started.poll() is None:
            started.kill()
        started.wait()


def wait_until_serving(started: subprocess.Popen[bytes], log: Path) -> int:
    """Return the data port that the log names."""
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        events = read_events(log)
        if any(event["event"] == "serving" for event in events):
            return int(next(event["ports"][0] for event in events if event["event"] == "listening"))
        assert started.poll() is None, log.read_text()
        time.sleep(0.5)
    raise AssertionError(log.read_text())


def read_events(log: Path) -> list[dict[str, Any]]:
    """The service's own log lines; vLLM's processes also write text."""
    events = []
    for line in log.read_text(errors="replace").splitlines():
        if line.startswith("{") and line.endswith("}"):
            events.append(json.loads(line))
    return events


def wait_until_gone(processes: list[psutil.Process], *, seconds: float) -> list[psutil.Process]:
    """Return those that still run after a while."""
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return [one for one in alive if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


@needs_stories
def test_golden_story_is_reproduced_and_a_terminated_service_leaves_no_process(tmp_path: Path) -> None:
    golden = json.loads((STORIES / "golden.json").read_text())
    request = generator_pb2.GenerateRequest(
        prompt_token_ids=golden["prompt_token_ids"],
        n=1,
        sampling=generator_pb2.SamplingParams(max_tokens=golden["num_new_tokens"], temperature=0.0),
    )

    async def generate(port: int) -> tuple[generator_pb2.Completion, generator_pb2.Completion]:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = generator_pb2_grpc.GeneratorServiceStub(channel)
            first = await stub.Generate(request, timeout=60)
            request.sampling.max_tokens = 400
            whole = await stub.Generate(request, timeout=60)
            return first.completions[0], whole.completions[0]

    with process(STORIES, tmp_path / "log") as (started, port):
        completion, whole = asyncio.run(generate(port))
        assert list(completion.token_ids) == golden["greedy_token_ids"]
        assert completion.text == golden["greedy_text"]
        assert sum(completion.logprobs) == pytest.approx(-94.6836, abs=1e-3)
        assert (len(whole.token_ids), whole.token_ids[-1], whole.text) == (346, 1, golden["greedy_full_story"])
        children = psutil.Process(started.pid).children(recursive=True)
        assert len(children) >= 2
        started.send_signal(signal.SIGTERM)
        assert started.wait(timeout=60) == 0
        assert wait_until_gone(children, seconds=15) == []


def test_killed_service_leaves_no_process(tmp_path: Path) -> None:
    with process(PACKAGED_POLICY, tmp_path / "log") as (started, _):
        children = psutil.Process(started.pid).children(recursive=True)
        assert any("EngineCor" in child.name() for child in children)
        os.kill(started.pid, signal.SIGKILL)
        started.wait()
        assert wait_until_gone(children, seconds=15) == []
