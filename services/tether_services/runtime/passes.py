"""Forward passes of a service over ragged rows, in the thread of its engine. Needs torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from tether_services.runtime.padding import PaddedBatch, padded_batches, serving_padding
from tether_services.runtime.work_thread import WorkThread

__all__ = ["run_passes"]

ResultT = TypeVar("ResultT")


async def run_passes(
    thread: WorkThread,
    forward: Callable[[PaddedBatch], Sequence[ResultT]],
    rows: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    device: str,
) -> list[ResultT]:
    """Return one result per row, in order; each pass is one job of the thread, so that others fit between.

    Args:
        thread: Where the passes run.
        forward: Gives one result for each row of a batch.
        rows: Token ids, none empty.
        max_tokens: Of a pass at most, with padding.
        device: Where the tensors go.

    Raises:
        ValueError: A row is empty.
    """
    results: dict[int, ResultT] = {}
    padding = serving_padding(device)
    for batch in padded_batches(rows, max_tokens=max_tokens, max_padding=padding, device=device):
        results.update(zip(batch.indices, await thread.run(forward, batch), strict=True))
    return [results[index] for index in range(len(rows))]
