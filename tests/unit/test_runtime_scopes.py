from __future__ import annotations

import importlib
import pkgutil

import tether.v1
from tether_services.runtime.callers import ANONYMOUS, current_caller
from tether_services.runtime.scopes import METHOD_SCOPES, SCOPES


def contract_methods() -> set[str]:
    """Return the full name of every method of every service of the contract."""
    found = set()
    for module in pkgutil.iter_modules(tether.v1.__path__):
        if module.name.endswith("_pb2"):
            file = importlib.import_module(f"tether.v1.{module.name}").DESCRIPTOR
            for service in file.services_by_name.values():
                found |= {f"/{service.full_name}/{method.name}" for method in service.methods}
    return found


def test_every_method_of_the_contract_has_a_scope_and_no_other_has() -> None:
    assert set(METHOD_SCOPES) == contract_methods()


def test_every_scope_is_needed_by_a_method_and_every_method_needs_a_known_one() -> None:
    assert set(METHOD_SCOPES.values()) == set(SCOPES)


def test_whoever_has_the_scope_of_scoring_can_change_nothing() -> None:
    allowed = {method for method, scope in METHOD_SCOPES.items() if scope == "score"}
    assert {method.rsplit("/", 1)[-1] for method in allowed} == {"Score", "Compare", "ListRewardModels"}


def test_outside_a_call_everybody_is_anonymous_and_may_do_everything() -> None:
    assert current_caller() is ANONYMOUS
    assert ANONYMOUS.scopes == set(SCOPES)
