"""Health of the active adapter: NOT_SERVING while what was active before a restart is not loaded and proven again."""

from __future__ import annotations

from pathlib import Path

from grpc_health.v1 import health_pb2

from tests.rpc.adapter_files import activate, fake_adapter, push_fakes
from tests.rpc.generator_serving import Serving
from tests.rpc.serving import health, run
from tests.rpc.test_adapter_restart import serve_on, store_three, stored
from tether_services.generator.verification import WEIGHTS_NAME

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
OTHERS = ("", "tether.v1.GeneratorService", "tether.v1.AdapterService", "liveness")


async def adapter_health(serving: Serving, target: str = "") -> int:
    return await health(target or serving.served.target, "tether.v1.GeneratorService/adapter")


def test_an_active_version_that_did_not_come_back_is_not_serving_until_it_is_pushed_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        await store_three(tmp_path)
        (stored(tmp_path, 2) / WEIGHTS_NAME).unlink()
        async with serve_on(tmp_path) as serving:
            assert await adapter_health(serving) == NOT_SERVING
            for name in OTHERS:
                assert await health(serving.served.target, name) == SERVING, name
            await push_fakes(serving.adapters, "run-a", [2])
            assert (await serving.generate()).adapter_sha256 == fake_adapter(2).sha256
            assert await adapter_health(serving) == SERVING

    run(scenario())


def test_another_version_in_place_of_the_missing_one_makes_the_health_of_the_adapter_good_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        await store_three(tmp_path)
        (stored(tmp_path, 2) / WEIGHTS_NAME).unlink()
        async with serve_on(tmp_path) as serving:
            assert await adapter_health(serving) == NOT_SERVING
            assert await adapter_health(serving, serving.admin_target) == NOT_SERVING
            await push_fakes(serving.adapters, "run-a", [4])
            assert await adapter_health(serving) == NOT_SERVING
            await activate(serving.adapters, "run-a", 3)
            assert await adapter_health(serving) == SERVING

    run(scenario())


def test_without_a_version_to_miss_the_health_of_the_adapter_is_that_of_the_service(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serve_on(tmp_path) as serving:
            assert await adapter_health(serving) == SERVING
            await serving.served.runner.health.engine_failed()
            assert await adapter_health(serving) == NOT_SERVING
            await serving.served.runner.health.ready()
            assert await adapter_health(serving) == SERVING

    run(scenario())
