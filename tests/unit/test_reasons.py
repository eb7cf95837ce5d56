"""The catalogue of reasons against the source: all that is given is in it, all that is in it is given, codes agree.

Where a test fails, its message is what to paste, and where.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

import grpc
import pytest

from tests.unit.reason_scan import ANY_CODE, PACKAGES, ROOT, Given, Scan, Scanner, parse, read_source, written_words
from tether.reasons import GROUPS, PLACES, REASONS, REPEATS, Reason, find_reason
from tether_services.documents.__main__ import services

UNCLEAR = {
    "tether_services.orchestrator.ledger_runs:pin": ("BASE_CHANGED", "REWARD_MODEL_CHANGED", "PROMPTS_CHANGED"),
    "tether_services.runtime.batching:_check_working": ("DRAINING", "ENGINE_FAILED"),
    "tether_services.runtime.limits:check": ("STARTING", "DRAINING", "ENGINE_FAILED"),
}
"""`module:function` of places that give a reason without spelling it out -> the reasons that they can give."""

CODE_NAMES = {code.name for code in grpc.StatusCode} - {"OK"}
"""Reasons of failures that do not come from a tether service."""

SERVICES = {service.name: {method.name for method in service.methods} for service in services()}
SERVING = ("generator", "reward", "reference", "orchestrator", "runtime")
COMMANDS = tuple(path.name for path in PACKAGES["tether_services"].iterdir() if path.name not in SERVING[:-1])
"""Everything else of the services: the commands and what they run."""
BACKING = {
    "GeneratorService": ("generator", "runtime"),
    "AdapterService": ("generator", "runtime"),
    "RewardService": ("reward", "runtime"),
    "RewardModelService": ("reward", "runtime"),
    "ReferenceService": ("reference", "runtime"),
    "OrchestratorService": ("orchestrator", "runtime"),
    "every service": SERVING,
    "http": ("runtime",),
    "start": SERVING,
    "run": (*SERVING, "tether"),
    "client": ("tether",),
    "command": (*COMMANDS, "tether"),
}
"""Place -> parts of the source whose reasons reach it; a service of the contract needs a line."""
EVERYWHERE = "tether.errors"
"""The module of the reasons that errors have by themselves: any part of the source gives these."""


@functools.cache
def scan() -> Scan:
    return Scanner(read_source()).scan()


@functools.cache
def given() -> tuple[Given, ...]:
    """Return what the source gives, what is listed as unclear included."""
    listed = [
        Given(reason, place.codes, place.place.partition(":")[0], place.line)
        for place in scan().unclear
        for reason in UNCLEAR.get(place.place, ())
    ]
    return (*scan().given, *listed)


def part_of(module: str) -> str:
    """Return the part of the source that a module belongs to, for example "reward"; "tether" for the client."""
    return module.split(".")[1] if module.startswith("tether_services.") else "tether"


def entry_to_paste(reason: str, found: list[Given]) -> str:
    """Return an entry that lacks only what a person must say."""
    codes = sorted(code for place in found for code in place.codes if code != ANY_CODE) or ["INTERNAL"]
    parts = {part_of(place.module) for place in found}
    places = [place for place, backing in BACKING.items() if place in SERVICES and backing[0] in parts]
    if "runtime" in parts:
        places = ["every service"]
    places += ["client"] * ("tether" in parts) + ["command"] * bool(parts & {*COMMANDS} - {"runtime"})
    listed = ", ".join(f'"{place}"' for place in places)
    return (
        f"        Reason(\n"
        f'            name="{reason}",\n'
        f"            code=StatusCode.{codes[0]},\n"
        f'            meaning="...",  # given at {", ".join(f"{place.module}:{place.line}" for place in found)}\n'
        f'            remedy="...",\n'
        f'            repeat="no",  # or: {", ".join(repeat for repeat in REPEATS if repeat != "no")}\n'
        f"            places=({listed},),\n"
        f"        ),\n"
    )


def test_every_reason_of_the_source_has_an_entry() -> None:
    missing: dict[str, list[Given]] = {}
    for place in given():
        if place.reason not in REASONS:
            missing.setdefault(place.reason, []).append(place)
    entries = "".join(entry_to_paste(reason, found) for reason, found in sorted(missing.items()))
    assert not missing, (
        f"{len(missing)} reasons have no entry. Paste these into the group that fits in clients/python/tether/reasons/"
        "{calls,adapters,runs,programs}.py, say what they mean, and run scripts/generate_documents.sh:\n" + entries
    )


def test_every_entry_is_given_by_the_source() -> None:
    idle = sorted(set(REASONS) - {place.reason for place in given()} - CODE_NAMES)
    assert not idle, f"nothing gives these any more; remove their entries in clients/python/tether/reasons/: {idle}"


def test_every_status_code_has_an_entry_of_its_name() -> None:
    assert set(REASONS) >= CODE_NAMES
    assert [name for name in CODE_NAMES if REASONS[name].code.name != name] == []


def test_the_codes_are_those_of_the_errors_that_are_raised() -> None:
    wrong = [
        f"{place}, but the entry says {REASONS[place.reason].code.name}"
        for place in given()
        if place.reason in REASONS and not place.codes <= {REASONS[place.reason].code.name, ANY_CODE}
    ]
    assert not wrong, "a reason has one code: raise another class, or correct the entry:\n" + "\n".join(wrong)


def test_every_place_that_does_not_spell_its_reason_out_is_listed() -> None:
    found = {place.place: place for place in scan().unclear}
    unlisted = [f'    "{key}": ("...",),  # {found[key].code}' for key in sorted(set(found) - set(UNCLEAR))]
    assert not unlisted, (
        "spell the reason out as a text or a constant in the call; where that is not possible, paste into UNCLEAR of"
        " tests/unit/test_reasons.py:\n" + "\n".join(unlisted)
    )
    idle = sorted(set(UNCLEAR) - set(found))
    assert not idle, f"these spell their reasons out or are gone; remove them from UNCLEAR: {idle}"


def test_the_list_of_unclear_places_knows_every_reason_that_is_written_near_them() -> None:
    source = read_source()
    for key, listed in UNCLEAR.items():
        module = source[key.partition(":")[0]]
        known = {*listed, *(place.reason for place in scan().given)}
        more = sorted(written_words(module) - known)
        assert not more, f"if {key} can give these, add them to UNCLEAR of tests/unit/test_reasons.py: {more}"


def test_an_entry_says_all_there_is_to_say() -> None:
    for entry in REASONS.values():
        assert re.fullmatch(r"[A-Z][A-Z0-9_]{0,62}", entry.name)
        assert entry.repeat in REPEATS
        for text in (entry.meaning, entry.remedy):
            assert len(text) > 10 and text[0] == text[0].upper() and text.endswith(".") and text.isascii(), entry.name
    assert sum(len(group.reasons) for group in GROUPS) == len(REASONS), "a reason has two entries"


def test_every_service_and_every_other_place_has_parts_of_the_source() -> None:
    assert set(BACKING) >= {*SERVICES, *(place for place in PLACES if "." not in place)}


def test_places_are_methods_of_the_contract_or_have_a_meaning() -> None:
    known = {*PLACES, *SERVICES, *(f"{name}.{method}" for name, methods in SERVICES.items() for method in methods)}
    wrong = {entry.name: set(entry.places) - known for entry in REASONS.values() if not set(entry.places) <= known}
    assert not wrong
    assert not [entry.name for entry in REASONS.values() if not entry.places]
    repeated = [entry.name for entry in REASONS.values() if len(set(entry.places)) != len(entry.places)]
    assert not repeated


def test_places_fit_the_parts_of_the_source_that_give_the_reason() -> None:
    wrong = []
    for entry in REASONS.values():
        found = [place for place in given() if place.reason == entry.name]
        parts = {part_of(place.module) for place in found if place.module != EVERYWHERE}
        backing = {place: BACKING[place.partition(".")[0]] for place in entry.places}
        by_itself = entry.name in CODE_NAMES or any(place.module == EVERYWHERE for place in found)
        unfounded = [place for place, names in backing.items() if not parts & set(names)]
        if unfounded and found and not by_itself:
            wrong.append(f"{entry.name}: given in {sorted(parts)}, which does not reach {unfounded}")
        untold = [part for part in sorted(parts) if not any(part in names for names in backing.values())]
        wrong += [f"{entry.name}: also given in {part}; no place says so" for part in untold]
    assert not wrong, "correct `places` of these entries:\n" + "\n".join(wrong)


def test_reasons_in_the_comments_of_the_contract_exist() -> None:
    comments = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "protos/tether/v1").glob("*.proto")))
    named = set(re.findall(r"\b[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+\b", " ".join(re.findall(r"//(.*)", comments))))
    assert {"VERSION_NOT_LOADED", "STALE_EPOCH"} <= named
    assert sorted(named - set(REASONS) - {"UPPER_SNAKE"}) == []


def test_a_reason_is_found_by_its_name() -> None:
    entry = find_reason("TOO_LONG")
    assert isinstance(entry, Reason)
    assert entry.code is grpc.StatusCode.INVALID_ARGUMENT
    assert find_reason("NO_SUCH_REASON") is None


ERRORS = (Path(__file__).resolve().parents[2] / "clients/python/tether/errors.py").read_text(encoding="utf-8")


def scan_of(**sources: str) -> Scan:
    """Return the scan of made-up modules beside the real errors."""
    header = "from tether.errors import AbortedError, NotFoundError\n"
    made_up = {name: parse(name, header + text) for name, text in sources.items()}
    return Scanner({"tether.errors": parse("tether.errors", ERRORS), **made_up}).scan()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("raise AbortedError('m', reason='A_B')", [("A_B", "ABORTED")]),
        ("X = 'A_B'\nraise NotFoundError('m', reason=X)", [("A_B", "NOT_FOUND")]),
        ("raise AbortedError('m', reason='A' if x else 'B')", [("A", "ABORTED"), ("B", "ABORTED")]),
        ("raise type(error)('m', reason='A_B')", [("A_B", ANY_CODE)]),
        (
            "def refuse(m, *, reason):\n    return AbortedError(m, reason=reason)\nraise refuse('m', reason='A_B')",
            [("A_B", "ABORTED")],
        ),
        (
            "class C:\n    def stop(self, m, reason):\n        self.e = NotFoundError(m, reason=reason)\n"
            "    def end(self):\n        self.stop('m', 'A_B')",
            [("A_B", "NOT_FOUND")],
        ),
        ("self.not_ready_reason: str | None = 'engine failed'", [("ENGINE_FAILED", "UNAVAILABLE")]),
        ("raise type(error)('m', reason=error.reason)", []),
        ("log_event(log, 'x', reason='A_B')", []),
    ],
)
def test_the_scan_finds_every_way_of_giving_a_reason(text: str, expected: list[tuple[str, str]]) -> None:
    found = scan_of(made_up=text)
    assert found.unclear == []
    mine = [(place.reason, *place.codes) for place in found.given if place.module == "made_up"]
    assert sorted(mine) == sorted(expected)


@pytest.mark.parametrize(
    "value", ["table[name]", "name.upper()", "f'{name}_FAILED'", "local"], ids=["lookup", "call", "format", "variable"]
)
def test_the_scan_names_what_is_not_spelled_out(value: str) -> None:
    found = scan_of(made_up=f"def fail(name):\n    local = name\n    raise AbortedError('m', reason={value})")
    assert [place.place for place in found.unclear] == ["made_up:fail"]


def test_the_scan_follows_constants_and_functions_of_other_modules() -> None:
    found = scan_of(
        one="X = 'A_B'\ndef refuse(m, *, reason):\n    return AbortedError(m, reason=reason)",
        two="from one import X, refuse\nraise refuse('m', reason=X)",
    )
    assert [(place.reason, place.module) for place in found.given if place.module == "two"] == [("A_B", "two")]
