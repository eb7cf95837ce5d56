"""One file per row of the reliability reference."""

from __future__ import annotations

from tests.reliability.scenario import Scenario

__all__ = ["all_scenarios"]


def all_scenarios() -> list[Scenario]:
    """Return every scenario in the order in which they run: cheap ones first."""
    from tests.reliability.scenarios import adapter_flips, bad_adapters, dropped_answers, full_disk, killed_worker

    modules = (adapter_flips, dropped_answers, bad_adapters, killed_worker, full_disk)
    return [scenario for module in modules for scenario in module.SCENARIOS]
