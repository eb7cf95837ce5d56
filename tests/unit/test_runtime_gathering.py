"""Waiting for several results."""

from __future__ import annotations

import asyncio

import pytest

from tether_services.runtime.gathering import gather_in_order


async def later(value: int, *, turns: int) -> int:
    for _ in range(turns):
        await asyncio.sleep(0)
    return value


async def fail(reason: str) -> int:
    await asyncio.sleep(0)
    raise ValueError(reason)


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_results_come_in_the_order_of_the_work_whichever_ends_first(count: int) -> None:
    async def main() -> list[int]:
        return await gather_in_order([later(number, turns=count - number) for number in range(count)])

    assert asyncio.run(main()) == list(range(count))


@pytest.mark.parametrize("others", [0, 1])
def test_the_first_error_is_raised(others: int) -> None:
    async def main() -> None:
        await gather_in_order([fail("broken"), *(later(number, turns=5) for number in range(others))])

    with pytest.raises(ValueError, match="broken"):
        asyncio.run(main())
