"""I8 and I9, the rules for a service under load: everybody gets a share, and what serves does not grow.

As checker.py, of which this is a part: standard library only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any, Final

__all__ = ["find_growth", "find_lost_shares"]

Line = Mapping[str, Any]
Of = Callable[..., Sequence[Line]]
"""Returns the lines of some kinds in order."""

FEWEST_SAMPLES: Final = 9
"""Of a resource: three in each third of the time, or nothing can be said."""


def find_lost_shares(of: Of) -> Iterator[str]:
    """I8: whoever was promised a share, of the calls or of the engine, got it."""
    for line in of("share"):
        if line["got"] < line["least"]:
            yield f"{line['who']} got {line['got']:.3g} of {line['what']}, {line['least']:.3g} is its due"
    for line in of("bound"):
        if line["got"] > line["most"]:
            yield f"{line['who']}: {line['what']} was {line['got']:.4g}, at most {line['most']:.4g} is allowed"


def find_growth(of: Of) -> Iterator[str]:
    """I9: a resource of a process is no larger in the last third of its samples than in the second, within a bound."""
    series: dict[tuple[str, str], list[Line]] = defaultdict(list)
    for line in of("resource"):
        series[line["process"], line["name"]].append(line)
    for (process, name), lines in sorted(series.items()):
        third = len(lines) // 3
        if len(lines) < FEWEST_SAMPLES:
            yield f"{process}: only {len(lines)} samples of {name}"
            continue
        before = median(line["value"] for line in lines[third : 2 * third])
        after = median(line["value"] for line in lines[2 * third :])
        if after - before > lines[-1]["bound"]:
            yield f"{process}: {name} grew from {before:.6g} to {after:.6g}, by more than {lines[-1]['bound']:g}"
