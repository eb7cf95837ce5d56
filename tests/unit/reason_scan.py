"""Reads from the source which reasons it gives to errors, of which classes, and where it does not spell them out.

A reason is the text of `reason=` in a call of an error class of `tether.errors`, or of a function that hands its own
parameter `reason` on to one (`refuse(..., reason="HASH_MISMATCH")`), by keyword or by position. Names of constants are
followed, also into other modules. Two more places give reasons: the `default_reason` of an error class, and a text that
is assigned to `not_ready_reason`, which the chassis sends in upper case.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tether import errors

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"tether": ROOT / "clients/python/tether", "tether_services": ROOT / "services/tether_services"}
REASON = re.compile(r"[A-Z][A-Z0-9_]{0,62}")
CODES: dict[str, str] = {
    name: value.code.name
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, errors.TetherError)
}
"""Name of each error class -> name of its status code."""
ANY_CODE = "any"
"""Code of an error that is built by `type(error)(...)`."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Given:
    """A reason that a place in the source gives."""

    reason: str
    """As it is sent."""
    codes: frozenset[str]
    """Names of the status codes of the error that it is given to."""
    module: str
    """For example tether_services.runtime.limits."""
    line: int
    """Of the call."""

    def __str__(self) -> str:
        return f"{self.reason} ({', '.join(sorted(self.codes))}) at {self.module}:{self.line}"


@dataclass(frozen=True, slots=True)
class Unclear:
    """A place that gives a reason which it does not spell out."""

    place: str
    """`module:function`, as keys of the table of such places are."""
    line: int
    """Of the call."""
    code: str
    """The expression."""
    codes: frozenset[str]
    """Names of the status codes of the error that it is given to."""


@dataclass(slots=True)
class Module:
    """One parsed file."""

    name: str
    tree: ast.Module
    constants: dict[str, str] = field(default_factory=dict)
    """Module-level names of texts."""
    imports: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Local name -> (module, name there)."""
    functions: dict[str, list[Function]] = field(default_factory=dict)
    """By name, those of classes too."""


@dataclass(slots=True)
class Scan:
    """What was found."""

    given: list[Given] = field(default_factory=list)
    unclear: list[Unclear] = field(default_factory=list)


def parse(name: str, text: str) -> Module:
    """Return a module with what is looked up in it."""
    module = Module(name, ast.parse(text))
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            module.imports |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
        elif isinstance(node, Function):
            module.functions.setdefault(node.name, []).append(node)
    for statement in module.tree.body:
        target = statement.targets[0] if isinstance(statement, ast.Assign) else getattr(statement, "target", None)
        value = getattr(statement, "value", None)
        if isinstance(target, ast.Name) and isinstance(value, ast.Constant) and isinstance(value.value, str):
            module.constants[target.id] = value.value
    return module


def read_source() -> dict[str, Module]:
    """Return every module of the two packages that is not generated, by name."""
    modules = {}
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            if "v1" not in path.relative_to(folder).parts:
                name = ".".join((package, *path.relative_to(folder).with_suffix("").parts)).removesuffix(".__init__")
                modules[name] = parse(name, path.read_text(encoding="utf-8"))
    return modules


class Scanner:
    """Looks at every call of the modules."""

    def __init__(self, modules: dict[str, Module]) -> None:
        self._modules = modules
        self._factories: dict[tuple[str, str], frozenset[str]] = {}
        """(module, function) -> codes, of functions that hand their parameter `reason` on to an error."""

    def scan(self) -> Scan:
        """Return all reasons. Factories call factories, so they are looked for until there are no more."""
        known = -1
        while known != len(self._factories):
            known = len(self._factories)
            for module in self._modules.values():
                self._find_factories(module)
        found = Scan()
        for module in self._modules.values():
            for node, inside in walk(module.tree):
                if isinstance(node, ast.Call):
                    self._look_at(module, node, inside, found)
                elif isinstance(node, ast.Assign | ast.AnnAssign):
                    found.given += readiness(module, node)
        found.given += defaults(self._modules)
        return found

    def _find_factories(self, module: Module) -> None:
        for name, functions in module.functions.items():
            for function in functions:
                if "reason" in parameters(function):
                    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
                    codes = [self._codes(module, call) for call in calls if self._hands_on(module, call)]
                    if codes:
                        self._factories[module.name, name] = frozenset().union(*codes)

    def _hands_on(self, module: Module, call: ast.Call) -> bool:
        value = self._reason_of(module, call)
        return isinstance(value, ast.Name) and value.id == "reason" and bool(self._codes(module, call))

    def _codes(self, module: Module, call: ast.Call) -> frozenset[str]:
        """Return the codes of the errors that a call makes; none if it makes none."""
        function = call.func
        if isinstance(function, ast.Call):
            return frozenset({ANY_CODE} if ast.unparse(function.func) == "type" else ())
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        if name in CODES and (isinstance(function, ast.Attribute) or self._is_ours(module, name)):
            return frozenset({CODES[name]})
        if name == "kind":  # a class that was looked up by its code
            return frozenset({ANY_CODE})
        return self._factories.get(self._home(module, name), frozenset())

    def _is_ours(self, module: Module, name: str) -> bool:
        return module.imports.get(name, ("", ""))[0] in ("tether", "tether.errors") or module.name == "tether.errors"

    def _home(self, module: Module, name: str) -> tuple[str, str]:
        return (module.name, name) if name in module.functions else module.imports.get(name, ("", name))

    def _reason_of(self, module: Module, call: ast.Call) -> ast.expr | None:
        """Return the expression of the reason in a call; None where it has none."""
        for keyword in call.keywords:
            if keyword.arg == "reason":
                return keyword.value
        function = call.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        home, name = self._home(module, name)
        if (home, name) not in self._factories:
            return None
        names = parameters(self._modules[home].functions[name][0])
        place = names.index("reason") - (names[:1] == ["self"])
        return call.args[place] if place < len(call.args) else None

    def _look_at(self, module: Module, call: ast.Call, inside: Sequence[Function], found: Scan) -> None:
        codes, value = self._codes(module, call), self._reason_of(module, call)
        if not codes or value is None or passes_on(value, inside):
            return
        texts = self._texts(module, value)
        if texts is None:
            place = f"{module.name}:{inside[-1].name if inside else ''}"
            found.unclear.append(Unclear(place, call.lineno, ast.unparse(value), codes))
        else:
            found.given += [Given(text, codes, module.name, call.lineno) for text in texts]

    def _texts(self, module: Module, value: ast.expr) -> list[str] | None:
        """Return what an expression can be; None if that is not written down in it."""
        if isinstance(value, ast.Constant):
            return [value.value] if isinstance(value.value, str) else [] if value.value is None else None
        if isinstance(value, ast.IfExp):
            both = (self._texts(module, value.body), self._texts(module, value.orelse))
            return None if None in both else [text for texts in both for text in texts or ()]
        if isinstance(value, ast.Name):
            home, name = module.imports.get(value.id, (module.name, value.id))
            text = self._modules[home].constants.get(name) if home in self._modules else None
            return None if text is None else [text]
        return None


def passes_on(value: ast.expr, inside: Sequence[Function]) -> bool:
    """Return whether a reason is only handed on: of another error, of a status code, or from a parameter."""
    if isinstance(value, ast.Attribute):
        return value.attr == "reason" or ast.unparse(value) == "code.name"
    if isinstance(value, ast.IfExp):
        return passes_on(value.body, inside) and passes_on(value.orelse, inside)
    return isinstance(value, ast.Name) and value.id == "reason" and bool(inside) and "reason" in parameters(inside[-1])


def parameters(function: Function) -> list[str]:
    """Return the names of a function's parameters in order."""
    arguments = function.args
    return [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]


def walk(node: ast.AST, inside: tuple[Function, ...] = ()) -> Iterator[tuple[ast.AST, tuple[Function, ...]]]:
    """Yield every node with the functions around it, the innermost last."""
    for child in ast.iter_child_nodes(node):
        yield child, inside
        yield from walk(child, (*inside, child) if isinstance(child, Function) else inside)


def readiness(module: Module, node: ast.Assign | ast.AnnAssign) -> list[Given]:
    """Return the reason that a text assigned to `not_ready_reason` is sent as."""
    target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
    if not isinstance(target, ast.Attribute) or target.attr != "not_ready_reason":
        return []
    if not isinstance(node.value, ast.Constant) or not isinstance(node.value.value, str):
        return []
    text = node.value.value.upper().replace(" ", "_")
    return [Given(text, frozenset({errors.UnavailableError.code.name}), module.name, node.lineno)]


def defaults(modules: dict[str, Module]) -> list[Given]:
    """Return the reasons that error classes have by themselves."""
    home = modules["tether.errors"].tree
    lines = {node.name: node.lineno for node in home.body if isinstance(node, ast.ClassDef)}
    classes: list[type[errors.TetherError]] = [getattr(errors, name) for name in CODES]
    return [
        Given(error.default_reason, frozenset({error.code.name}), "tether.errors", lines[error.__name__])
        for error in classes
    ]


def written_words(module: Module) -> set[str]:
    """Return the texts of a module that look like reasons of several words, without the names that it exports."""
    texts = (node.value for node in ast.walk(module.tree) if isinstance(node, ast.Constant))
    words = {text for text in texts if isinstance(text, str) and "_" in text and REASON.fullmatch(text)}
    names = {target.id for node in module.tree.body for target in ast.walk(node) if isinstance(target, ast.Name)}
    return words - names
