"""One file per row of the reliability reference."""

from __future__ import annotations

from tests.reliability.scenario import Scenario

__all__ = ["all_scenarios"]


def all_scenarios() -> list[Scenario]:
    """Return every scenario in the order in which they run: cheap ones first."""
    from tests.reliability.scenarios import (
        adapter_flips,
        adapter_switches,
        bad_adapters,
        clock_jumps,
        damaged_checkpoints,
        dropped_answers,
        everything,
        full_disk,
        hostile_input,
        killed_generator,
        killed_services,
        killed_worker,
        liveness,
        overload,
        partition,
        replica_changes,
        rolled_back,
        rolling_restarts,
        rotated_certificates,
        soak,
        stopped_server,
        transfers,
        two_generators,
    )

    modules = (
        adapter_flips,
        adapter_switches,
        transfers,
        dropped_answers,
        damaged_checkpoints,
        bad_adapters,
        rolled_back,
        killed_worker,
        killed_generator,
        full_disk,
        two_generators,
        stopped_server,
        killed_services,
        rolling_restarts,
        replica_changes,
        rotated_certificates,
        overload,
        hostile_input,
        liveness,
        partition,
        clock_jumps,
        everything,
        soak,
    )
    return [scenario for module in modules for scenario in module.SCENARIOS]
