from __future__ import annotations

import importlib
import pkgutil
import re
from pathlib import Path

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


def test_the_table_of_scopes_in_the_docs_is_the_one_of_the_code() -> None:
    text = (Path(__file__).parents[2] / "docs/security.md").read_text()
    documented: dict[str, str] = {}
    for scope, service, methods in re.findall(r"^\| `([a-z.]+)` \| `(\w+)`: ([\w, ]+) \|$", text, re.MULTILINE):
        documented |= {f"/tether.v1.{service}/{method}": scope for method in methods.split(", ")}
    assert documented == METHOD_SCOPES


def test_every_reason_of_a_refusal_is_in_the_docs() -> None:
    root = Path(__file__).parents[2]
    text = (root / "docs/security.md").read_text()
    runtime = root / "services/tether_services/runtime"
    code = "".join((runtime / f"{name}.py").read_text() for name in ("access", "bearer_tokens", "quotas"))
    reasons = set(re.findall(r'"((?:TOKEN|CERTIFICATE|SCOPE|QUOTA|TOO)_[A-Z_]+)"', code))
    assert len(reasons) == 10 and {reason for reason in reasons if f"`{reason}`" not in text} == set()
