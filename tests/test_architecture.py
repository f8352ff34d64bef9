"""The structure of the package: imports point downwards, files stay small, names say what they are."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "stepflash"
LEVELS = {
    "errors": 0,
    "settings": 0,
    "gguf_file": 0,
    "sandbox": 0,
    "kernels": 1,
    "model": 2,
    "weights": 3,
    "chat": 3,
    "engine": 4,
    "assistant": 5,
    "training": 5,
    "server": 6,
    "agents": 6,
    "evals": 6,
    "tools": 6,
    "nano": 6,
    "terminal": 7,
    "cli": 8,
    "__main__": 9,
    "__init__": 9,
}
MAX_LINES = 600
TORCH_FREE = ("errors", "settings", "gguf_file", "sandbox", "chat")
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)


def part_of(path: Path) -> str:
    """`stepflash/model/rope.py` -> `model`; `stepflash/cli.py` -> `cli`."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(path: Path, at_run_time: bool = True) -> Iterator[str]:
    """Modules that a file imports, also inside functions; those for type checking only are left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if at_run_time and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            skipped |= {id(inner) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def internal(path: Path) -> set[str]:
    names = {name.split(".")[1] for name in imports(path) if name.startswith("stepflash.")}
    return {name for name in names if (PACKAGE / name).exists() or (PACKAGE / f"{name}.py").exists()}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    own = part_of(path)
    assert own in LEVELS, f"{own} has no level; add it where it belongs"
    for other in internal(path) - {own, "errors"}:
        assert LEVELS[other] < LEVELS[own], f"{path.name} ({own}) must not import {other}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_are_small_and_well_named(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES
    assert path.stem not in {"utils", "helpers", "common", "misc"}


@pytest.mark.parametrize("path", [p for p in SOURCES if part_of(p) in TORCH_FREE], ids=lambda path: path.stem)
def test_no_torch_where_text_is_handled(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports(path)} & {"torch"}


def test_no_import_cycles_between_modules() -> None:
    modules = {".".join(("stepflash", *p.relative_to(PACKAGE).with_suffix("").parts)): p for p in SOURCES}
    graph = {
        module: {name for name in imports(path) if name in modules and name != module}
        for module, path in modules.items()
        if path.stem != "__init__"
    }
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join((*above[above.index(module) :], module))
        if module in done:
            return
        for name in graph.get(module, ()):
            visit(name, (*above, module))
        done.add(module)

    for module in graph:
        visit(module, ())


def test_levels_name_what_exists_once() -> None:
    parts = {part_of(path) for path in SOURCES}
    assert parts - {"__init__"} <= set(LEVELS)
    assert all(a != b for a, b in itertools.combinations(LEVELS, 2))
