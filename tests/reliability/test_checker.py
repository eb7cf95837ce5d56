from __future__ import annotations

import ast
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.reliability import call_rules, checker, rollback_rules, service_rules
from tests.reliability.checker import INVARIANTS, check, read_history

History = list[dict[str, Any]]
SAMPLES = 3


def good_history(steps: int = 3, *, kills: frozenset[int] = frozenset(), run: str = "r") -> History:
    """A run whose worker is killed after the update of some steps, each of which the next attempt computes again."""
    lines: History = [{"kind": "started", "generator": "g"}]
    epoch = 1
    lines.append({"kind": "attempt", "run": run, "epoch": epoch})
    for step in range(steps):
        if step in kills:
            lines += step_lines(run, epoch, step)[:-4]
            epoch += 1
            lines += [
                {"kind": "attempt", "run": run, "epoch": epoch},
                {"kind": "observed", "run": run, "committed": step},
            ]
        lines += step_lines(run, epoch, step)
    for number, line in enumerate(lines):
        line |= {"t": float(number), "pid": epoch}
    return lines + ledger_lines(lines, run, steps)


def step_lines(run: str, epoch: int, step: int) -> History:
    place = {"run": run, "epoch": epoch, "step": step}
    version, sha256 = step, f"sha{step}" if step else ""
    new = {"run": run, "policy_version": step + 1, "sha256": f"sha{step + 1}"}
    sampled: History = [
        {"kind": "generated", **place, "sample": n, "policy_version": version, "sha256": sha256} for n in range(SAMPLES)
    ]
    return [
        {"kind": "begun", **place, "policy_version": version},
        *sampled,
        {"kind": "dropped", **place, "sample": 0, "reason": "not_scored"},
        {"kind": "trained", **place, "samples": list(range(1, SAMPLES))},
        {"kind": "exported", **new},
        {"kind": "committed", **place, "generated": SAMPLES, "trained": SAMPLES - 1, "dropped": {"not_scored": 1}},
        {"kind": "proven", "generator": "g", **new},
        {"kind": "activated", "generator": "g", **new, "epoch": epoch},
        {"kind": "state", "like": "golden", "part": "adapter", **new},
    ]


def ledger_lines(lines: History, run: str, steps: int) -> History:
    committed = [line for line in lines if line["kind"] == "committed"]
    rows: History = [{"kind": "ledger_step", "run": run, "step": c["step"], "epoch": c["epoch"]} for c in committed]
    samples = [
        {"kind": "ledger_sample", "run": run, "step": c["step"], "sample": n, "state": "trained" if n else "dropped"}
        for c in committed
        for n in range(SAMPLES)
    ]
    end = {"kind": "ledger_run", "run": run, "state": "SUCCEEDED", "committed": len(committed), "total": steps}
    return [*rows, *samples, end]


def calls() -> History:
    return [
        {"kind": "sent", "t": 0.0, "call": 1, "method": "Score", "deadline_seconds": 5.0},
        {"kind": "sent", "t": 0.0, "call": 2, "method": "Score", "deadline_seconds": 5.0},
        {"kind": "ended", "t": 5.9, "call": 1, "code": "DEADLINE_EXCEEDED"},
        {"kind": "ended", "t": 0.1, "call": 2, "code": "OK"},
    ]


def effects() -> History:
    return [
        {"kind": kind, "t": float(n), "intent": "activate 4"} for n, kind in enumerate(("wanted", "applied", "acked"))
    ]


def line_of(history: History, kind: str, **fields: Any) -> dict[str, Any]:
    return next(line for line in history if line["kind"] == kind and line.items() >= fields.items())


def insert_after(history: History, line: dict[str, Any], **new: Any) -> None:
    history.insert(history.index(line) + 1, {**line, **new})


def test_a_good_history_passes_and_says_how_much_was_looked_at() -> None:
    verdict = check([*good_history(kills=frozenset({1})), *calls(), *effects()])
    assert verdict.violations == []
    assert verdict.counts["committed"] == 3
    assert verdict.counts["generated"] == 4 * SAMPLES
    assert verdict.counts["sent"] == 2


@given(st.integers(1, 6), st.frozensets(st.integers(0, 5)))
def test_every_pattern_of_kills_that_is_recovered_from_passes(steps: int, kills: frozenset[int]) -> None:
    assert check(good_history(steps, kills=kills)).violations == []


ACTIVE = {"generator": "g", "policy_version": 2, "sha256": "sha2"}
OLDER = {"policy_version": 1, "sha256": "sha1"}
LATE = {"kind": "activated", "epoch": 1}
NOTHING: dict[str, Any] = {"generated": 0, "trained": 0, "dropped": {}}
BAD = {"kind": "offered", "sha256": "sha3", "valid": False, "why": "one bit"}
SEEN = {"kind": "observed", "t": 99.0, "run": "r", "committed": 5}
SHARE = {"kind": "share", "who": "polite", "what": "the calls", "got": 0.14, "least": 0.15}
BOUND = {"kind": "bound", "who": "rejections", "what": "p99 s", "got": 0.06, "most": 0.05}
# Each edit breaks a good history of three steps (step 1 killed once) in one way.
Edit = Callable[[History], object]
BREAKS: list[tuple[str, str, Edit]] = [
    ("I1", "neither trained nor dropped", lambda h: line_of(h, "committed", step=2).update(trained=1)),
    ("I1", "in no account", lambda h: h.remove(line_of(h, "dropped", step=2))),
    ("I1", "never generated", lambda h: line_of(h, "trained", step=2)["samples"].append(77)),
    ("I1", "trained on and dropped", lambda h: line_of(h, "trained", step=2)["samples"].append(0)),
    ("I1", "the commit counts 4", lambda h: line_of(h, "committed", step=2).update(generated=4, trained=3)),
    ("I1", "never committed this one", lambda h: h.remove(line_of(h, "ledger_step", step=1))),
    ("I2", "steps [1] are missing", lambda h: h.remove(line_of(h, "ledger_step", step=1))),
    ("I2", "committed more than once", lambda h: h.append(line_of(h, "ledger_step", step=1))),
    ("I2", "go backwards", lambda h: line_of(h, "ledger_step", step=0).update(epoch=9)),
    ("I2", "the ledger holds 3", lambda h: line_of(h, "ledger_run").update(committed=4)),
    ("I2", "succeeded with 3 of 4", lambda h: line_of(h, "ledger_run").update(total=4)),
    ("I2", "later only 0", lambda h: line_of(h, "observed").update(committed=0)),
    ("I2", "the ledger ends with", lambda h: h.append(SEEN)),
    ("I2", "was committed 2 times", lambda h: insert_after(h, line_of(h, "committed", step=1))),
    ("I2", "two writers", lambda h: insert_after(h, line_of(h, "committed", step=1), **ACTIVE, **LATE)),
    ("I2", "two writers", lambda h: line_of(h, "committed", step=2).update(epoch=1)),
    ("I2", "two writers: 2 processes", lambda h: h.append({**line_of(h, "attempt"), "pid": 99})),
    ("I2", "computed 2 steps again", lambda h: insert_after(h, line_of(h, "begun", epoch=2), step=0)),
    ("I3", "was trained on 2 times", lambda h: insert_after(h, line_of(h, "trained", step=2))),
    ("I3", "was trained on 2 times", lambda h: line_of(h, "trained", step=2)["samples"].append(1)),
    ("I3", "was trained on 2 times", lambda h: h.append(line_of(h, "ledger_sample", state="trained"))),
    ("I4", "the window is 2 to 2", lambda h: line_of(h, "generated", step=2, sample=1).update(OLDER)),
    ("I4", "a mixed batch", lambda h: line_of(h, "generated", step=2, sample=1).update(OLDER)),
    ("I4", "came from adapter 'other'", lambda h: line_of(h, "generated", step=2, sample=1).update(sha256="other")),
    ("I4", "came from adapter 'sha9'", lambda h: line_of(h, "generated", step=0, sample=1).update(sha256="sha9")),
    ("I5", "never proven", lambda h: h.remove(line_of(h, "proven", policy_version=3))),
    ("I5", "never proven", lambda h: insert_after(h, line_of(h, "proven", policy_version=3), kind="started")),
    ("I5", "never proven", lambda h: line_of(h, "activated", policy_version=3).update(sha256="sha1")),
    ("I5", "although it is bad: one bit", lambda h: h.append(BAD)),
    ("I7", "adapter of version 2 differs", lambda h: h.extend(other_run(h, policy_version=2))),
    ("I7", "was not recorded for ['other']", lambda h: h.extend(other_run(h)[:-1])),
    ("I8", "polite got 0.14 of the calls, 0.15 is its due", lambda h: h.append(SHARE)),
    ("I8", "rejections: p99 s was 0.06, at most 0.05", lambda h: h.append(BOUND)),
    ("I9", "only 8 samples of bytes", lambda h: h.extend(resource(*range(8)))),
    ("I9", "bytes grew from 104 to 107, by more than 2", lambda h: h.extend(resource(*range(100, 109)))),
]  # fmt: skip


def resource(*values: int) -> History:
    """Samples of the memory of a process that may grow by two bytes."""
    line = {"kind": "resource", "process": "reward", "name": "bytes", "bound": 2}
    return [{**line, "t": float(number), "value": value} for number, value in enumerate(values)]


def other_run(history: History, *, policy_version: int = 0) -> History:
    """The states of another run, with other bits in one version."""
    states = [{**line, "run": "other"} for line in history if line["kind"] == "state"]
    for line in states:
        if line["policy_version"] == policy_version:
            line["sha256"] = "different"
    return states


@pytest.mark.parametrize(("name", "text", "edit"), BREAKS, ids=[f"{name} {text}" for name, text, _ in BREAKS])
def test_each_way_of_breaking_an_invariant_is_reported_under_its_name(name: str, text: str, edit: Edit) -> None:
    history = good_history(kills=frozenset({1}))
    assert check(history).violations == []
    edit(history)
    verdict = check(history)
    assert name in verdict.names, verdict.violations
    assert any(text in found for invariant, found in verdict.violations if invariant == name), verdict.violations


CALL_BREAKS: list[tuple[str, Edit]] = [
    ("never ended", lambda h: h.pop()),
    ("took 6.10 s, its deadline was 5 s", lambda h: h[2].update(t=6.1)),
    ("ended with INTERNAL", lambda h: h[3].update(code="INTERNAL")),
    ("ended with UNKNOWN", lambda h: h[3].update(code="UNKNOWN")),
]


@pytest.mark.parametrize(("text", "edit"), CALL_BREAKS, ids=[text for text, _ in CALL_BREAKS])
def test_a_call_that_hangs_or_ends_late_or_in_an_unknown_way_is_reported(text: str, edit: Edit) -> None:
    history = calls()
    edit(history)
    (violation,) = check(history).violations
    assert violation[0] == "I6" and text in violation[1]


def test_an_effect_that_happens_twice_or_never_or_whose_caller_hears_nothing_is_reported() -> None:
    wanted, applied, acked = effects()
    other = {"kind": "applied", "t": 9.0, "intent": "activate 5"}
    assert [text for _, text in check([wanted, applied, applied, acked]).violations] == [
        "activate 4 was applied 2 times"
    ]
    assert [text for _, text in check([wanted, other, acked]).violations] == [
        "activate 4 was confirmed and never applied"
    ]
    assert check([wanted, applied]).names == {"I2"}
    assert check([wanted, applied, acked, other]).violations == []


def test_an_answer_is_judged_by_the_oracle_of_its_version() -> None:
    answers: History = [
        {"kind": "served", "t": float(v), "policy_version": v, "key": f"v{v}", "logprob": -1.0 - v} for v in range(3)
    ]
    oracle = {f"v{v}": -1.0 - v for v in range(3)}
    assert check(answers, oracle=oracle).violations == []
    answers[1]["logprob"] = -1.0  # what version 0 would have said
    assert [name for name, _ in check(answers, oracle=oracle).violations] == ["I4"]
    answers[1]["logprob"] = float("nan")
    assert [name for name, _ in check(answers, oracle=oracle).violations] == ["I4"]
    del oracle["v1"]
    assert "knows no such answer" in check(answers, oracle=oracle).violations[0][1]
    assert check(answers).violations == []


def test_a_staleness_window_admits_older_versions_and_nothing_else() -> None:
    history = good_history()
    line_of(history, "begun", step=2)["max_staleness"] = 1
    line_of(history, "generated", step=2, sample=1).update(policy_version=1, sha256="sha1")
    assert check(history).violations == []
    line_of(history, "generated", step=2, sample=2).update(policy_version=0, sha256="")
    assert check(history).names == {"I4"}


def test_a_reader_that_asked_before_a_commit_may_still_not_see_it() -> None:
    commit = {"kind": "committed", "t": 2.0, "run": "r", "epoch": 1, "step": 0, **NOTHING}
    late = {"kind": "observed", "t": 3.0, "asked": 1.0, "run": "r", "committed": 0}
    assert check([commit, late]).violations == []
    assert check([commit, {**late, "asked": 2.5}]).names == {"I2"}
    assert check([{**late, "committed": 1}, {**late, "t": 3.5, "asked": 3.2}]).names == {"I2"}


def test_a_dropped_sample_of_another_version_is_no_violation() -> None:
    history = good_history()
    line_of(history, "generated", step=2, sample=0).update(policy_version=1, sha256="sha1")
    assert check(history).violations == []


def test_a_rolled_back_step_may_be_committed_again_on_another_branch() -> None:
    history = good_history(2)
    live = [line for line in history if line["kind"] == "ledger_step" and line["step"] == 1]
    live[0]["rolled_back"] = 1
    end = line_of(history, "ledger_run")
    again = [{**line, "t": 100.0 + n, "branch": 1} for n, line in enumerate(step_lines("r", 1, 1))]
    history += [{"kind": "rolled_back", "t": 99.0, "run": "r", "to_step": 1}, *again]
    history.append({**live[0], "rolled_back": 0, "branch": 1})
    assert check(history).names == {"I3"}, "the samples of a rolled back step are told apart by their epoch or branch"
    for line in again:
        line["epoch"] = 2
    history[-1]["epoch"] = 2
    assert check(history).violations == []
    end["committed"] = 1
    assert check(history).names == {"I2"}


@given(st.integers(2, 6), st.data())
def test_any_missing_step_before_the_last_is_found(steps: int, data: st.DataObject) -> None:
    history = good_history(steps)
    step = data.draw(st.integers(0, steps - 2))
    history.remove(line_of(history, "ledger_step", step=step))
    assert "I2" in check(history).names


@given(st.integers(1, 4), st.data())
def test_any_sample_that_vanishes_is_found(steps: int, data: st.DataObject) -> None:
    history = good_history(steps)
    lost = data.draw(st.sampled_from([line for line in history if line["kind"] in ("dropped", "generated")]))
    history.remove(lost)
    assert "I1" in check(history).names


def test_the_order_of_the_lines_does_not_matter_where_they_have_times() -> None:
    history = good_history(kills=frozenset({1}))
    assert check(list(reversed(history))).violations == []


def test_a_torn_last_line_is_left_out_and_a_damaged_one_elsewhere_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    assert list(read_history(path)) == []
    path.write_text(json.dumps({"kind": "attempt"}) + '\n{"kind": "beg')
    assert list(read_history(path)) == [{"kind": "attempt"}]
    path.write_text('{"kind": "beg\n' + json.dumps({"kind": "attempt"}) + "\n")
    with pytest.raises(ValueError, match="Unterminated"):
        list(read_history(path))


def health_lines(*healthy: float, heard: float | None = None) -> History:
    """A service that is mute from second 1 on, with the times at which it is said to be healthy."""
    lines: History = [{"kind": "mute", "t": 1.0, "service": "reward", "bound_seconds": 3.0}]
    lines += [{"kind": "liveness", "t": t, "service": "reward", "healthy": True} for t in healthy]
    lines += [{"kind": "liveness", "t": 9.0, "service": "reward", "healthy": False}]
    return lines + ([] if heard is None else [{"kind": "heard", "t": heard, "service": "reward"}])


def test_a_service_that_is_said_to_be_healthy_while_it_answers_nothing_is_reported() -> None:
    assert not check(health_lines(0.0, 1.5, 3.9)).violations
    assert not check(health_lines(2.0, 8.0, heard=3.0)).violations
    other = {"kind": "liveness", "t": 8.0, "service": "reference", "healthy": True}
    assert not check([*health_lines(), other]).violations
    [(name, text)] = check(health_lines(2.0, 4.1, 8.0)).violations
    assert name == "I6" and "reward was said to be healthy for 3.1 s while it answered no call" in text


def rolled_back_history(*, reused: bool = False, sampled_by: int = 1) -> History:
    """Step 1 is rolled back and made again, as version 3."""
    history = [line for line in good_history(2) if not line["kind"].startswith("ledger")]
    for line in history:
        if line["kind"] == "exported":
            line["step"] = line["policy_version"] - 1
    again = step_lines("r", 2, 1)
    for number, line in enumerate(again):
        line |= {"t": 100.0 + number, "branch": 1}
        if line["kind"] in ("exported", "proven", "activated", "state"):
            line |= {"policy_version": 2 if reused else 3, "sha256": "sha3"}
        if line["kind"] in ("begun", "generated"):
            line |= {"policy_version": sampled_by, "sha256": f"sha{sampled_by}"}
    return [*history, {"kind": "rolled_back", "t": 99.0, "run": "r", "to_step": 1}, *again]


def test_a_reader_may_see_a_rollback_while_it_is_made_and_not_before() -> None:
    history = [*rolled_back_history(), {"kind": "observed", "t": 50.0, "run": "r", "committed": 2}]
    early = {"kind": "observed", "run": "r", "committed": 1, "asked": 98.5, "t": 98.7}
    assert check([*history, early]).violations == []
    assert check([*history, early | {"t": 97.9, "asked": 97.5}]).names == {"I2"}
    assert check([*history, early | {"committed": 0}]).names == {"I2"}, "one step stays"
    late = [early | {"committed": 2, "t": 99.5}, early | {"asked": 99.6, "t": 99.7}]
    assert check([*history, *late]).violations == [], "the first answer was on its way when it was made"


def test_a_version_that_is_used_again_after_a_rollback_is_reported() -> None:
    assert check(rolled_back_history()).violations == []
    [violation, *_] = check(rolled_back_history(reused=True)).violations
    assert violation == ("I4", "run r: version 2 stands for sha2 and for sha3")


def test_a_step_that_is_sampled_by_a_version_that_was_rolled_back_is_reported() -> None:
    assert check(rolled_back_history(sampled_by=2)).violations == [
        ("I4", "run r: step 1 began with version 2, which was rolled back")
    ]


def test_a_step_on_top_of_a_bad_policy_is_reported_unless_that_was_rolled_back() -> None:
    spoiled = {"kind": "spoiled", "t": 0.5, "run": "r", "step": 0, "why": "noise"}
    found = check([*good_history(), spoiled]).violations
    assert [name for name, _ in found] == ["I5", "I5"]
    assert "step 1 was committed on top of step 0, which is bad: noise" in found[0][1]
    assert check([*good_history(), spoiled | {"step": 2}]).violations == [], "nothing came of it"
    history = rolled_back_history()
    assert check([*history, spoiled | {"step": 1}]).violations == []
    assert check([*history, spoiled | {"step": 0}]).names == {"I5"}, "that one was not rolled back"


def test_shares_bounds_and_memory_that_keep_their_promise_pass() -> None:
    kept = [{**SHARE, "got": 0.15}, {**BOUND, "got": 0.05}]
    warm_up = resource(100, 150, 190, *(200,) * 3, 201, 202, 202)
    assert check([*good_history(), *kept, *warm_up]).violations == [], "what is grown in the first third is warm-up"


def test_the_checker_imports_the_standard_library_and_its_own_rules_only() -> None:
    parts = (call_rules, rollback_rules, service_rules)
    rules = {part.__name__ for part in parts}
    for module, own in ((checker, rules), (call_rules, set()), (rollback_rules, rules), (service_rules, set())):
        tree = ast.parse(Path(str(module.__file__)).read_text())
        imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
        imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert {name.split(".")[0] for name in imported - own} <= sys.stdlib_module_names
    assert set(INVARIANTS) == {f"I{n}" for n in range(1, 10)}
