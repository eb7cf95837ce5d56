from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import asyncio
from collections import Counter
from tether_services.reward.config import RewardSettings
from tether_services.reward.service import RewardService
from tests.rpc.serving import LOCAL, serving
from tether.reward import RewardClient, ScoreItem
import uvloop

async def main():
    settings = RewardSettings.model_validate({**LOCAL, "admin_address": "127.0.0.1:0", "engine": "fake"})
    codes, done = Counter(), asyncio.Event()
    async with serving(settings, lambda r: RewardService(settings, r)) as served, RewardClient(served.target) as client:
        async def traffic():
            while not done.is_set():
                await client.score([ScoreItem("a", "b")])
                await asyncio.sleep(0.02)
        calls = asyncio.create_task(traffic())
        for _ in range(1500):
            process = await asyncio.create_subprocess_exec("/bin/true")
            codes[await process.wait()] += 1
        done.set()
        await calls
    print(dict(codes))

uvloop.run(main())
"""


@pytest.mark.slow
def test_no_child_of_a_serving_process_dies_before_it_begins() -> None:
    """gRPC's fork handlers run in the child of uvloop's fork and end about one in 400 of them with signal 11."""
    pytest.importorskip("uvloop")
    known = {name: value for name, value in os.environ.items() if name != "GRPC_ENABLE_FORK_SUPPORT"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=known, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "{0: 1500}\n"
