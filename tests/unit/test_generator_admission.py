from __future__ import annotations

from contextlib import ExitStack
from contextvars import copy_context

import pytest
from prometheus_client import CollectorRegistry

from tether.errors import ResourceExhaustedError
from tether_services.generator.admission import Admission
from tether_services.generator.metrics import GeneratorMetrics
from tether_services.runtime.callers import Caller, CurrentCall, enter_call

FLOOD, POLITE = Caller("flood", frozenset()), Caller("polite", frozenset())
TRAINER = Caller("trainer", frozenset(), lane="training")


def admit(admission: Admission, stack: ExitStack, who: Caller, n: int) -> None:
    """Hold the places of a call until the stack ends."""

    def enter() -> None:
        enter_call(CurrentCall(who, lambda count: None))
        stack.enter_context(admission.admit(n))

    copy_context().run(enter)


def test_a_flood_of_completions_leaves_places_to_others_and_all_of_theirs_to_the_trainer() -> None:
    registry = CollectorRegistry()
    admission = Admission(GeneratorMetrics(registry, queue_limit=16), limit=16, caller_share=0.5)
    with ExitStack() as stack:
        admit(admission, stack, FLOOD, 4)
        admit(admission, stack, FLOOD, 4)
        with pytest.raises(ResourceExhaustedError, match="8 completions of this caller are in flight"):
            admit(admission, stack, FLOOD, 1)
        admit(admission, stack, POLITE, 8)
        with pytest.raises(ResourceExhaustedError, match="16 completions are in flight and 16 may be"):
            admit(admission, stack, Caller("third", frozenset()), 1)
        admit(admission, stack, TRAINER, 16)
        assert registry.get_sample_value("tether_generator_completions_in_flight") == 32
        for reason in ("caller_full", "queue_full"):
            assert registry.get_sample_value("tether_generator_rejected_total", {"reason": reason}) == 1
    assert registry.get_sample_value("tether_generator_completions_in_flight") == 0
    with ExitStack() as stack:
        admit(admission, stack, FLOOD, 16)
