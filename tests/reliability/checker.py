"""Says whether a recorded history keeps the nine invariants. Knows nothing of tether: standard library only.

A history is a sequence of JSON objects, each with `kind` and, where it was recorded live, `t` (monotonic seconds) and
`pid`. What is read, by kind (fields in brackets may be absent):

    attempt      run epoch                                     an attempt of a run begins
    fault        role index point action                       a process has come to a point of its fault plan
    pushing      run policy_version                            a generator was begun to be sent a version
    begun        run epoch step policy_version [max_staleness] a step begins; the version that must sample it
    generated    run epoch step sample policy_version sha256 [key logprob]
    dropped      run epoch step sample reason
    trained      run epoch step samples                        these took part in the update
    committed    run epoch step [branch] generated trained dropped={reason: count}
    rolled_back  run to_step                                   the live steps from to_step on do not count any more
    observed     run committed [asked]                         what a reader saw, and when it had asked
    ledger_run   run state committed total                     the ledger at the end, and its rows:
    ledger_step  run step epoch [branch rolled_back]
    ledger_sample run step sample state [branch]
    wanted, applied, acked  intent                             an effect: asked for, happened, confirmed to the caller
    exported     run policy_version sha256 [step]              the hash that belongs to a version, and who made it
    spoiled      run step why                                  this update made a bad policy, and nobody was told
    served       policy_version key logprob                    an answer that the oracle can judge
    offered      sha256 valid why                              an adapter that a generator was offered
    proven       generator run policy_version sha256           it passed every check of that generator
    started      generator                                     a generator process begins with nothing proven
    activated    generator run policy_version sha256 [epoch]   it serves this from now on, or was seen to
    sent         call method deadline_seconds / ended call code
    mute, heard  service [bound_seconds]                       from now on it answers no call; it has answered one again
    liveness     service healthy                               what a liveness check says
    repeat       service code                                  a call of a run is made again
    share        who what got least                            what somebody got of something, and was promised
    bound        who what got most                             a figure, and how large it may be
    resource     process name value bound                      memory, descriptors: how far it may grow after warm-up
    state        like run policy_version part sha256           bytes that every run of the same `like` must share
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Final

from tests.reliability.call_rules import Line, find_bad_calls
from tests.reliability.rollback_rules import find_bad_policies, find_reused_versions, was_rolled_back
from tests.reliability.service_rules import find_growth, find_lost_shares

__all__ = ["INVARIANTS", "Line", "Verdict", "check", "read_history"]

Key = tuple[Any, ...]

LOGPROB_TOLERANCE: Final = 1e-5
"""Nats; single precision on the wire."""


@dataclass(slots=True)
class Verdict:
    """What was violated, and how much was looked at: no violation in an empty history says nothing."""

    violations: list[tuple[str, str]] = field(default_factory=list)
    """(invariant, what happened)."""
    counts: Counter[str] = field(default_factory=Counter)
    """Lines by kind, and what was compared."""

    @property
    def names(self) -> set[str]:
        """Return the violated invariants."""
        return {name for name, _ in self.violations}


class History:
    """The lines by kind, in the order in which things happened."""

    def __init__(self, lines: Iterable[Line]) -> None:
        self._by_kind: dict[str, list[tuple[int, Line]]] = defaultdict(list)
        ordered = sorted(lines, key=lambda line: line.get("t", math.inf))  # stable: of one time stays as recorded
        for number, line in enumerate(ordered):
            self._by_kind[line["kind"]].append((number, line))

    def of(self, *kinds: str) -> list[Line]:
        """Return the lines of some kinds in order."""
        found = [pair for kind in kinds for pair in self._by_kind.get(kind, [])]
        return [line for _, line in sorted(found, key=lambda pair: pair[0])]

    def counts(self) -> Counter[str]:
        """Return the number of lines by kind."""
        return Counter({kind: len(lines) for kind, lines in self._by_kind.items()})

    def committed_epochs(self) -> dict[Key, int]:
        """Return the epoch that committed each live (run, step), from the ledger where it was dumped."""
        rows = [line for line in self.of("ledger_step") if not line.get("rolled_back")] or self.of("committed")
        return {(line["run"], line["step"]): line["epoch"] for line in rows}


def check(lines: Iterable[Line], *, oracle: Mapping[str, float] | None = None) -> Verdict:
    """Return the verdict on a history.

    Args:
        lines: The recorded lines, of any number of processes, and the ledger's rows.
        oracle: The log-probability that belongs to each key; None: keys are not judged.
    """
    history = History(lines)
    verdict = Verdict(counts=history.counts())
    for name, find in INVARIANTS.items():
        verdict.violations += [(name, text) for text in find(history)]
    if oracle is not None:
        verdict.violations += [("I4", text) for text in find_oracle_mismatches(history, oracle)]
    return verdict


def read_history(path: Path) -> Iterator[Line]:
    """Yield the lines of a file; the last one may be torn if its writer was killed."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    rows = text.splitlines()
    for number, row in enumerate(rows):
        try:
            yield json.loads(row)
        except ValueError:
            if number != len(rows) - 1 or text.endswith("\n"):
                raise


def find_unaccounted(history: History) -> Iterator[str]:
    """I1: every generated sample is trained or dropped in its committed step, or its attempt has ended."""
    for line in history.of("committed"):
        lost = line["generated"] - line["trained"] - sum(line["dropped"].values())
        if lost:
            yield f"{_place(line)}: {lost} of {line['generated']} samples are neither trained nor dropped"
    generated, trained, dropped = (_samples(history, kind) for kind in ("generated", "trained", "dropped"))
    for place in sorted(trained.keys() | dropped.keys()):
        made_up = (trained[place] + dropped[place]).keys() - generated[place].keys()
        if made_up:
            yield f"{place}: samples {sorted(made_up)} were used and never generated"
        both = trained[place].keys() & dropped[place].keys()
        if both:
            yield f"{place}: samples {sorted(both)} were trained on and dropped"
    yield from _find_lost(history, generated, trained, dropped)


def _find_lost(
    history: History,
    generated: Mapping[Key, Counter[int]],
    trained: Mapping[Key, Counter[int]],
    dropped: Mapping[Key, Counter[int]],
) -> Iterator[str]:
    """Compare the samples of each step with what its commit says, and find steps that an attempt passed over."""
    commits = {(line["run"], line["epoch"], line["step"]): line for line in history.of("committed")}
    committed = history.committed_epochs()
    for place, samples in sorted(generated.items()):
        run, epoch, step = place
        if committed.get((run, step)) == epoch and (trained.get(place) or dropped.get(place)):
            left = samples.keys() - trained[place].keys() - dropped[place].keys()
            if left:
                yield f"{place}: samples {sorted(left)} were generated and are in no account"
        line = commits.get(place)
        if line and line["generated"] != len(samples):
            yield f"{place}: {len(samples)} samples were generated, the commit counts {line['generated']}"
        later = any(other_run == run and e == epoch and s > step for (other_run, s), e in committed.items())
        if later and committed.get((run, step)) != epoch:
            yield f"{place}: the attempt went on to a later step and never committed this one"


def find_commit_faults(history: History) -> Iterator[str]:
    """I2: steps are committed once and without gap, commits stay, one writer at a time, effects happen once."""
    yield from _find_ledger_faults(history)
    yield from _find_lost_commits(history)
    yield from _find_second_writers(history)
    yield from _find_recomputed(history)
    yield from _find_effects(history)


def _find_ledger_faults(history: History) -> Iterator[str]:
    steps: dict[str, list[int]] = defaultdict(list)
    epochs: dict[str, list[int]] = defaultdict(list)
    for line in sorted(history.of("ledger_step"), key=lambda line: line["step"]):
        if not line.get("rolled_back"):
            steps[line["run"]].append(line["step"])
            epochs[line["run"]].append(line["epoch"])
    for run, numbers in steps.items():
        if twice := [step for step, count in Counter(numbers).items() if count > 1]:
            yield f"run {run}: steps {twice} are committed more than once"
        if missing := sorted(set(range(max(numbers) + 1)) - set(numbers)):
            yield f"run {run}: steps {missing} are missing before step {max(numbers)}"
        if epochs[run] != sorted(epochs[run]):
            yield f"run {run}: the epochs of its steps go backwards: {epochs[run]}"
    for line in history.of("ledger_run"):
        count = len(set(steps[line["run"]]))
        if line["committed"] != count:
            yield f"run {line['run']}: {line['committed']} committed steps are reported, the ledger holds {count}"
        if line["state"] == "SUCCEEDED" and count != line["total"]:
            yield f"run {line['run']} succeeded with {count} of {line['total']} steps"


def _find_lost_commits(history: History) -> Iterator[str]:
    """What was seen committed stays committed, and is in the ledger at the end."""
    known: dict[str, list[tuple[float, int]]] = defaultdict(lambda: [(-math.inf, 0)])
    rolled_back: dict[str, float] = defaultdict(lambda: -math.inf)
    for line in history.of("observed", "committed", "rolled_back"):
        seen, now = known[line["run"]], line.get("t", math.inf)
        if line["kind"] == "rolled_back":
            seen.append((now, line["to_step"]))
            rolled_back[line["run"]] = now
            continue
        count = line["step"] + 1 if line["kind"] == "committed" else line["committed"]
        before = seen[bisect_right(seen, line.get("asked", now), key=lambda pair: pair[0]) - 1][1]
        if line["kind"] == "observed" and count < before and not was_rolled_back(history.of, line):
            yield f"run {line['run']}: {before} steps were committed, later only {count}"
        if line.get("asked", now) >= rolled_back[line["run"]]:  # else it may be from before
            seen.append((now, max(count, seen[-1][1])))
    for line in history.of("ledger_run"):
        run, most = line["run"], known[line["run"]][-1][1]
        if line["committed"] < most:
            yield f"run {run}: {most} steps were committed, the ledger ends with {line['committed']}"
    places = Counter((line["run"], line.get("branch", 0), line["step"]) for line in history.of("committed"))
    for (run, branch, step), count in places.items():
        if count > 1:
            yield f"run {run} branch {branch}: step {step} was committed {count} times"


def _find_second_writers(history: History) -> Iterator[str]:
    """No writer of an earlier attempt is accepted after one of a later attempt."""
    attempts = Counter((line["run"], line["epoch"]) for line in history.of("attempt"))
    for (run, epoch), count in attempts.items():
        if count > 1:
            yield f"run {run}: two writers: {count} processes held the lease of attempt {epoch}"
    newest: dict[str, int] = {}
    for line in history.of("committed", "activated"):
        if "epoch" not in line:
            continue
        run, epoch = line["run"], line["epoch"]
        if epoch < newest.get(run, 0):
            yield f"run {run}: two writers: epoch {epoch} was accepted ({line['kind']}) after epoch {newest[run]}"
        newest[run] = max(epoch, newest.get(run, 0))


def _find_recomputed(history: History) -> Iterator[str]:
    """An attempt computes at most one step that an earlier one had begun."""
    first: dict[Key, int] = {}
    again: Counter[Key] = Counter()
    for line in history.of("begun", "rolled_back"):
        if line["kind"] == "rolled_back":
            first = {(run, step): e for (run, step), e in first.items() if run != line["run"] or step < line["to_step"]}
            continue
        if first.setdefault((line["run"], line["step"]), line["epoch"]) != line["epoch"]:
            again[line["run"], line["epoch"]] += 1
    for (run, epoch), count in again.items():
        if count > 1:
            yield f"run {run}: attempt {epoch} computed {count} steps again"


def _find_effects(history: History) -> Iterator[str]:
    applied = Counter(line["intent"] for line in history.of("applied"))
    acked = {line["intent"] for line in history.of("acked")}
    for intent, count in applied.items():
        if count > 1:
            yield f"{intent} was applied {count} times"
    for intent in sorted(acked - applied.keys() if applied else ()):
        yield f"{intent} was confirmed and never applied"
    for line in history.of("wanted"):
        if line["intent"] not in acked:
            yield f"{line['intent']} was lost: its caller got no answer in the end"


def find_samples_trained_twice(history: History) -> Iterator[str]:
    """I3: a sample is trained on at most once, as far as the training was kept."""
    committed = history.committed_epochs()
    updates: Counter[Key] = Counter()
    for line in history.of("trained"):
        if committed.get((line["run"], line["step"])) == line["epoch"]:
            updates.update((line["run"], line["step"], sample) for sample in line["samples"])
    rows: Counter[Key] = Counter(
        (line["run"], line.get("branch", 0), line["step"], line["sample"])
        for line in history.of("ledger_sample")
        if line["state"] == "trained"
    )
    for place, count in sorted((updates | rows).items()):
        if count > 1:
            yield f"sample {place} was trained on {count} times"


def find_wrong_versions(history: History) -> Iterator[str]:
    """I4: what was trained on was sampled by a version inside the window, with the hash that this version has."""
    begun = {(line["run"], line["epoch"], line["step"]): line for line in history.of("begun")}
    hashes: dict[Key, str] = {(line["run"], line["policy_version"]): line["sha256"] for line in history.of("exported")}
    trained = _samples(history, "trained")
    versions: dict[Key, set[Key]] = defaultdict(set)
    for line in history.of("generated"):
        place = line["run"], line["epoch"], line["step"]
        if line["sample"] not in trained.get(place, ()):
            continue
        version, sha256 = line["policy_version"], line["sha256"]
        versions[place].add((version, sha256))
        yield from _judge_version(place, version, sha256, begun.get(place), hashes)
    for place, found in versions.items():
        if len(found) > 1 and not begun.get(place, {}).get("max_staleness", 0):
            yield f"{place}: a mixed batch, sampled by {sorted(found)}"


def _judge_version(
    place: Key, version: int, sha256: str, begun: Line | None, hashes: Mapping[Key, str]
) -> Iterator[str]:
    newest = begun["policy_version"] if begun else version
    oldest = newest - (begun.get("max_staleness", 0) if begun else 0)
    if not oldest <= version <= newest:
        yield f"{place}: trained on a sample of version {version}, the window is {oldest} to {newest}"
    wanted = "" if version == 0 else hashes.get((place[0], version), sha256)
    if sha256 != wanted:
        yield f"{place}: a sample of version {version} came from adapter {sha256!r}, which is {wanted!r}"


def find_oracle_mismatches(history: History, oracle: Mapping[str, float]) -> Iterator[str]:
    """I4: an answer is exactly what its version must answer."""
    for line in history.of("generated", "served"):
        if "key" not in line:
            continue
        if line["key"] not in oracle:
            yield f"{line['key']}: the oracle knows no such answer"
        elif not abs(line["logprob"] - oracle[line["key"]]) <= LOGPROB_TOLERANCE:
            yield f"{line['key']}: {line['logprob']!r} was answered, the oracle says {oracle[line['key']]!r}"


def find_unverified_adapters(history: History) -> Iterator[str]:
    """I5: what is active has been proven in the same life of the same generator, and is not known to be bad."""
    bad = {line["sha256"]: line["why"] for line in history.of("offered") if not line["valid"]}
    proven: dict[Any, set[Key]] = defaultdict(set)
    for line in history.of("started", "proven", "activated"):
        generator = line["generator"]
        if line["kind"] == "started":
            proven[generator].clear()
            continue
        adapter = line["run"], line["policy_version"], line["sha256"]
        if line["sha256"] in bad and line["policy_version"]:
            yield f"{generator}: adapter {adapter} was {line['kind']} although it is bad: {bad[line['sha256']]}"
        if line["kind"] == "proven":
            proven[generator].add(adapter)
        elif line["policy_version"] and adapter not in proven[generator]:
            yield f"{generator}: adapter {adapter} is active and was never proven there"


def find_different_bits(history: History) -> Iterator[str]:
    """I7: runs that must be alike have the same bytes wherever they were recorded."""
    parts: dict[Key, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    runs: dict[str, set[str]] = defaultdict(set)
    last: dict[Key, int] = {}
    for line in history.of("state"):
        parts[line["like"], line["policy_version"], line["part"]][line["sha256"]].add(line["run"])
        runs[line["like"]].add(line["run"])
        final = line["like"], line["part"]
        last[final] = max(line["policy_version"], last.get(final, 0))
    for (like, version, part), found in sorted(parts.items()):
        if len(found) > 1:
            differing = sorted((sorted(names), sha[:12]) for sha, names in found.items())
            yield f"{like}: {part} of version {version} differs: {differing}"
        absent = runs[like] - set().union(*found.values())
        if version == last[like, part] and absent:
            yield f"{like}: {part} of the final version {version} was not recorded for {sorted(absent)}"


def _samples(history: History, kind: str) -> defaultdict[Key, Counter[int]]:
    """Return how often each sample occurs by (run, epoch, step)."""
    found: defaultdict[Key, Counter[int]] = defaultdict(Counter)
    for line in history.of(kind):
        numbers = line["samples"] if "samples" in line else [line["sample"]]
        found[line["run"], line["epoch"], line["step"]].update(numbers)
    return found


def _place(line: Line) -> str:
    return f"run {line['run']} step {line['step']} (epoch {line['epoch']})"


INVARIANTS: Final[Mapping[str, Callable[[History], Iterator[str]]]] = {
    "I1": find_unaccounted,
    "I2": find_commit_faults,
    "I3": find_samples_trained_twice,
    "I4": lambda history: chain(find_wrong_versions(history), find_reused_versions(history.of)),
    "I5": lambda history: chain(find_unverified_adapters(history), find_bad_policies(history.of)),
    "I6": lambda history: find_bad_calls(history.of),
    "I7": find_different_bits,
    "I8": lambda history: find_lost_shares(history.of),
    "I9": lambda history: find_growth(history.of),
}
