"""The layout of the package: imports go down, never round in a circle, and functions can be read at one sitting.

Everything here reads `src/` as text; `docs/` and CONTRIBUTING describe the same layout in words.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "bayeslora"
# Top floor first. A package imports from its own floor's packages and from those below it.
FLOORS = [
    {"cli"},
    {"report"},
    {"runs"},
    {"evaluation", "training"},
    {"posthoc"},
    {"prediction"},
    {"export"},
    {"runtime"},
    {"cost"},
    {"data"},
    {"methods"},
    {"optim"},
    {"posterior"},
    {"quantization"},
    {"_lazy", "_peft", "errors", "files", "model_card", "vocabulary"},
]
TOP = {"", "__main__", "_peft_hook"}
"""The package itself, what runs its command, and what teaches PEFT its methods: above every floor."""
LONGEST_FUNCTION = 60
MOST_LINES = 43983
MOST_LINES_OF_COMMANDS = 2841


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    names = ((path.relative_to(SOURCE.parent).with_suffix("").parts, path) for path in sorted(SOURCE.rglob("*.py")))
    return {".".join(parts).removesuffix(".__init__"): path for parts, path in names}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(name: str, *, everywhere: bool) -> Iterator[str]:
    """Modules of the package that a module imports: at its top level, or in its functions as well."""
    top = tree(modules()[name])
    nodes = ast.walk(top) if everywhere else iter(_run_at_import(top))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules())
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in modules():
                    yield inner
                elif node.module in modules():
                    yield node.module


def _run_at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Statements that run when the module is imported; what only a type checker reads is not among them."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _run_at_import(child)


def room(name: str) -> str:
    """The first part of a module's name below `bayeslora`; empty for the package itself."""
    return name.split(".")[1] if "." in name else ""


def floor(name: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if name in rooms)


def test_every_room_has_a_floor() -> None:
    rooms = {room(name) for name in modules()} - TOP
    assert rooms <= set().union(*FLOORS)


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_only_go_down(name: str) -> None:
    """Also those inside functions: an import that is put off goes the same way as one that is not."""
    if room(name) in TOP:
        return
    others = {other for other in imported(name, everywhere=True) if room(other) not in TOP}
    above = {other for other in others if _is_above(room(other), room(name))}
    assert not above, f"{name} imports from a higher floor: {sorted(above)}"


def _is_above(other: str, own: str) -> bool:
    return other != own and floor(other) <= floor(own) and not {other, own} <= FLOORS[-1]


def test_no_circle_of_imports() -> None:
    """A package's `__init__` only gathers names, so what its modules import from each other is looked at instead."""
    graph = {
        name: {other for other in imported(name, everywhere=False) if modules()[other].name != "__init__.py"} - {name}
        for name, path in modules().items()
        if path.name != "__init__.py"
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"a circle of imports: {' > '.join((*trail[trail.index(name) :], name))}"
        if name in done:
            return
        for other in sorted(graph[name]):
            visit(other, (*trail, name))
        done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("name", sorted(modules()))
def test_functions_can_be_read_at_one_sitting(name: str) -> None:
    long = [
        f"{node.name} ({node.end_lineno - node.lineno + 1} lines)"
        for node in ast.walk(tree(modules()[name]))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > LONGEST_FUNCTION
    ]
    assert not long, f"functions of {name} over {LONGEST_FUNCTION} lines: {long}"


def _lines(paths: list[Path]) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def test_the_library_stays_small() -> None:
    assert _lines(list(modules().values())) <= MOST_LINES
    assert _lines(list((SOURCE / "cli").rglob("*.py"))) <= MOST_LINES_OF_COMMANDS


def test_nothing_but_the_commands_imports_the_commands() -> None:
    """A library user has every step of `bayeslora train` at an address outside `cli`."""
    root = SOURCE.parents[1]
    own = [path for path in modules().values() if "cli" not in path.parts and path.name != "__main__.py"]
    others = [path for folder in ("benchmarks", "examples", "tests") for path in sorted((root / folder).rglob("*.py"))]
    of_commands = (root / "tests" / "cli", root / "tests" / "test_documentation.py")
    for path in own + [path for path in others if not any(path.is_relative_to(test) for test in of_commands)]:
        for node in ast.walk(tree(path)):
            # A test or benchmark may run a command as a user does, by its entry point.
            if isinstance(node, ast.ImportFrom) and (path in own or node.module != "bayeslora.cli.main"):
                assert not (node.module or "").startswith("bayeslora.cli"), f"{path} imports {node.module}"
