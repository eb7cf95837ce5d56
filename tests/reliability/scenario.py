"""What a scenario is: a load, faults drawn from one seed, the checker's verdict, and a control that must be caught."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from tests.reliability.checker import Verdict

__all__ = ["Outcome", "Scenario", "Trial"]


@dataclass(frozen=True, slots=True)
class Trial:
    """One run of a scenario or of its control."""

    folder: Path
    """Empty; histories and logs go there."""
    random: Random
    """The only source of chance."""
    long: bool
    """The long form, with the figures of the reliability reference."""
    control: bool = False
    """One protection is taken out, or a set where one covers for another."""

    def count(self, short: int, long: int) -> int:
        """Return a number for this form."""
        return long if self.long else short


@dataclass(slots=True)
class Outcome:
    """What came of it."""

    verdict: Verdict
    figures: Mapping[str, object] = field(default_factory=dict)
    """To be printed."""
    failures: list[str] = field(default_factory=list)
    """What else was expected and is not so."""

    @property
    def problems(self) -> list[str]:
        """Return violations and failures in words."""
        return [f"{name}: {text}" for name, text in self.verdict.violations] + self.failures


@dataclass(frozen=True, slots=True)
class Scenario:
    """One row of the reliability reference, or a part of it."""

    name: str
    """Row and part, for example "R7 flips"."""
    title: str
    """What is done to what, in a few words."""
    run: Callable[[Trial], Awaitable[Outcome]]
    """The experiment; also the control, where `Trial.control` is set."""
    control: str = ""
    """What the control takes out; empty: it has none."""
    caught_as: frozenset[str] = frozenset()
    """Invariants that the checker must report in the control."""
    seconds: float = 120.0
    """Time limit of the short form where it runs alone: several times what it takes."""
    usual_seconds: float = 10.0
    """What the short form takes; longer ones are started first."""
    long_seconds: float = 1800.0
    """Time limit of the long form."""
    light: bool = False
    """Waits much and computes little: runs beside as many others as run at a time."""
    alone: bool = False
    """Judges latencies: nothing else is run beside it."""
    needs_mounts: bool = False
    """Mounts small file systems: root and a mount namespace of its own."""
    find_obstacle: Callable[[], str] = str
    """Returns why it cannot be run here; empty if it can."""
