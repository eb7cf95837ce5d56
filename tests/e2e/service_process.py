"""One real service as a process of its own."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from grpc import RpcError, StatusCode, insecure_channel
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tether_services.local.ports import free_ports

START_SECONDS = 120.0


@contextmanager
def service_process(name: str, model: Path, *settings: str) -> Iterator[dict[str, str]]:
    """Serve a model until the block ends; yields the addresses by the names of their settings.

    Args:
        name: "generator", "reward" or "reference".
        model: Folder of the model.
        settings: More settings, KEY=VALUE.
    """
    keys = ("address", "metrics_address", *(("admin_address",) if name in ("generator", "reward") else ()))
    addresses = {key: f"127.0.0.1:{port}" for key, port in zip(keys, free_ports(len(keys)), strict=True)}
    given = [f"model={model}", "device=cpu", "dtype=float32", *(f"{k}={v}" for k, v in addresses.items()), *settings]
    command = [sys.executable, "-m", "tether_services", "serve", name]
    for setting in given:
        command += ["--set", setting]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            _wait_until_serving(process, addresses["address"])
            yield addresses
        finally:
            process.kill()


def _wait_until_serving(process: subprocess.Popen[str], address: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    with insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        while time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()[0]
            try:
                answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=2)  # type: ignore[attr-defined]
            except RpcError as error:
                assert error.code() in (StatusCode.UNAVAILABLE, StatusCode.DEADLINE_EXCEEDED), error
                time.sleep(0.2)
                continue
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                return
            time.sleep(0.2)
    raise AssertionError(f"the service at {address} did not begin to serve")
