"""One trial: the pure tests, run in a forked process against a module with a wrong edit in it.

The edit lives in the memory of that process alone: an import hook serves the changed source. The parent has imported
torch and everything that the tests need, so that a trial costs its tests and little more.
"""

from __future__ import annotations

import gc
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder, SourceLoader
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest

from tests.mutation.table import ROOT, SOURCES, Edit, mutate, read_source

PACKAGE = "tether_services.ppo"
TESTS = ROOT / "tests" / "unit"
# The public vectors are left out: they are not beside every checkout, and the outcome shall not depend on that.
_CHOICE = ("-x", "-q", "--tb=short", "--capture=sys", "-k", "not test_vector_")
# What costs more than the tests and tells nothing about a formula: collecting garbage in search of exceptions that
# nobody saw, and rewriting asserts for messages that nobody reads.
_UNNEEDED = ("cacheprovider", "unraisableexception", "threadexception", "xdist", "anyio")
_OPTIONS = (*_CHOICE, "--assert=plain", *(word for name in _UNNEEDED for word in ("-p", f"no:{name}")))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an edit."""

    caught_by: str
    """The first test that failed, as file::name; empty where all passed: the edit survived."""
    error: str
    """The type of what it raised; empty where all passed."""
    broken: str
    """Why the trial says nothing: the tests could not be run. Empty where they could."""


class MutatedModule(MetaPathFinder, SourceLoader):  # type: ignore[misc]  # typeshed: the loader's own bases disagree
    """Serves one module from changed source."""

    def __init__(self, module: str, source: str) -> None:
        self._name, self._path, self._source = f"{PACKAGE}.{module}", str(SOURCES / f"{module}.py"), source
        self.loaded = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the specification of the changed module, None for every other."""
        return spec_from_loader(fullname, self) if fullname == self._name else None

    def get_filename(self, fullname: str) -> str:
        """Return the path of the unchanged file, for tracebacks."""
        return self._path

    def get_data(self, path: bytes | str) -> bytes:
        """Return the changed source; there is no compiled file to read or to write."""
        if str(path) != self._path:
            raise OSError(f"{path!r} is not served here")
        self.loaded = True
        return self._source.encode()


class FirstFailure:
    """Notes the first test that fails; a plugin of pytest."""

    def __init__(self) -> None:
        self.test, self.error = "", ""

    def pytest_exception_interact(self, node: pytest.Item, call: pytest.CallInfo[object]) -> None:
        """Note where and with what the run failed."""
        if call.excinfo is not None and not self.error:
            self.test = node.nodeid.removeprefix("tests/unit/")
            self.error = call.excinfo.typename


def pure_tests(module: str) -> list[list[str]]:
    """Return the files of pure tests in the order of a trial: named after the module, importing it, all others."""
    mentions = re.compile(rf"tether_services\.ppo(\.{module} import| import .*\b{module}\b)")
    groups: list[list[str]] = [[], [], []]
    # The file that was written after such edits had survived goes last: the table shall name what else would notice.
    for path in sorted(TESTS.glob("test_ppo_*.py"), key=lambda path: (path.stem == "test_ppo_gaps", path.stem)):
        text = path.read_text(encoding="utf-8")
        if PACKAGE in text:
            place = 0 if path.stem == f"test_ppo_{module}" else 1 if mentions.search(text) else 2
            groups[place].append(str(path))
    return groups


def warm_up(log: Path) -> None:
    """Import into this process everything that the tests import, so that the forked ones find it there."""
    import torch
    import torch._dynamo  # what the first checkpoint() imports, in seconds

    torch.set_num_threads(1)
    with _output_to(log):
        files = [str(path) for path in sorted(TESTS.glob("test_ppo_*.py"))]
        pytest.main([*files, "--collect-only", "-q", "-p", "no:cacheprovider"])
    forget_project()
    gc.collect()
    gc.freeze()  # else every trial walks through all of torch when it ends


def forget_project() -> None:
    """Drop the modules that hold functions of `tether_services.ppo`: the next import reads them again."""
    for name in list(sys.modules):
        if name.startswith((PACKAGE, "tether_services.orchestrator", "tests.unit")):
            del sys.modules[name]


def try_edit(edit: Edit, log: Path) -> Outcome:
    """Return what the tests say of an edit. To be called in a process of its own, which it leaves changed."""
    module = MutatedModule(edit.module, mutate(edit, read_source(edit.module)))
    forget_project()
    sys.meta_path.insert(0, module)
    failure = FirstFailure()
    with _output_to(log):
        for files in filter(None, pure_tests(edit.module)):
            status = pytest.main([*files, *_OPTIONS], plugins=[failure])
            if status != pytest.ExitCode.OK:
                return _outcome(status, failure, log)
    return Outcome("", "", "" if module.loaded else f"no test imports {edit.module}")


def _outcome(status: int, failure: FirstFailure, log: Path) -> Outcome:
    """Return the outcome of a run that did not pass.

    A NameError is a mistake of the table and not a wrong formula, and what fails before a test has begun is not known
    to be what a test would notice.
    """
    in_a_test = status == pytest.ExitCode.TESTS_FAILED and "::" in failure.test
    if in_a_test and failure.error != "NameError":
        return Outcome(failure.test, failure.error, "")
    sys.stdout.flush()
    reason = f"pytest ended with {int(status)}, {failure.error}\n{log.read_text(encoding='utf-8')[-2000:]}"
    return Outcome("", failure.error, reason)


class _output_to:
    """Sends everything that is written to standard output and error into a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self._saved = os.dup(1), os.dup(2)
        with self._path.open("wb") as target:
            os.dup2(target.fileno(), 1)
            os.dup2(target.fileno(), 2)

    def __exit__(self, *_: object) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        for saved, stream in zip(self._saved, (1, 2), strict=True):
            os.dup2(saved, stream)
            os.close(saved)
