"""Who may import whom: a table over the rooms, read from the sources, and asked of fresh interpreters."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("lpsim", "lmd", "experiments", "analysis")

# A room and the rooms that its modules may import, those that are imported for types alone included. CONTRIBUTING.md
# prints the same table. "lpsim" is lpsim/__init__.py with the public names of modules that lie in rooms.
ROOMS: dict[str, set[str]] = {
    "lpsim.formats": set(),
    "lpsim.quantization": {"lpsim.formats"},
    "lpsim.adapters": {"lpsim.formats", "lpsim.quantization"},
    "lpsim.conformance": {"lpsim.formats", "lpsim.quantization", "lpsim.adapters"},
    "lpsim.accumulators": {"lpsim.formats", "lpsim.quantization"},
    "lpsim.machine": {"lpsim.formats", "lpsim.quantization", "lpsim.accumulators"},
    "lpsim": {"lpsim.formats", "lpsim.quantization", "lpsim.accumulators", "lpsim.machine"},
    "lmd": set(),
    "experiments.training": {"lpsim", "lmd"},
    "experiments.grids": {"lpsim", "experiments.training"},
    "experiments.running": {"experiments.training", "experiments.grids"},
    "experiments.bench": {"lpsim", "lmd", "experiments.training", "experiments.grids", "analysis"},
    "experiments.command": {
        "lpsim",
        "analysis",
        "experiments.training",
        "experiments.grids",
        "experiments.running",
        "experiments.bench",
    },
    "experiments": {"experiments.training"},  # experiments/config.py, a public name
    "analysis.run_files": set(),
    "analysis.load": {"analysis.run_files"},
    "analysis.statistics": {"analysis.load"},
    "analysis.figures": {"analysis.load", "analysis.statistics"},
    "analysis.page": {"analysis.run_files", "analysis.load", "analysis.statistics", "analysis.figures"},
    "analysis": set(),
}
FORBIDDEN_AT_IMPORT = {
    "lpsim": {"numba", "triton", "mx", "qtorch", "torchao", "gfloat", "ml_dtypes", "lmd", "experiments", "analysis"},
    "lmd": {"numba", "triton", "lpsim", "experiments", "analysis"},
    "analysis": {"torch", "numba", "triton", "lpsim", "lmd", "experiments"},
}


def modules() -> dict[str, ast.Module]:
    """Every module of ours by its dotted name, parsed."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text("utf-8"))
    return found


def imported(tree: ast.Module, known: dict[str, ast.Module]) -> Iterator[str]:
    """The modules of ours that a module imports anywhere in it, also inside functions and for types alone."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in known else node.module


def room(module: str) -> str:
    """The longest name of the table that holds the module."""
    inside = [name for name in ROOMS if module == name or module.startswith(name + ".")]
    found = max(inside, key=len)
    return found if found in (module, "lmd") or "." in found or module.count(".") == 1 else module


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The import circles of a graph: its strongly connected parts of more than one node, or a node that is its own."""
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        todo = list(graph[start])
        while todo:
            node = todo.pop()
            if node not in seen:
                seen.add(node)
                todo += graph.get(node, ())
        reach[start] = seen
    parts = {frozenset(b for b in reach[a] if a in reach.get(b, ())) for a in graph if a in reach[a]}
    return sorted(sorted(part) for part in parts)


def module_graph() -> dict[str, set[str]]:
    known = modules()
    return {name: set(imported(tree, known)) - {name} for name, tree in known.items()}


def test_there_is_no_import_circle() -> None:
    assert circles(module_graph()) == []


def test_the_search_for_circles_finds_them() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d"}}) == [["b", "c"], ["d"]]


def test_rooms_import_only_what_the_table_allows() -> None:
    wrong = [
        f"{module} imports {other}, which is in {room(other)}"
        for module, others in module_graph().items()
        for other in sorted(others)
        if room(other) != room(module) and not any(room(other) in (a, *_inside(a)) for a in ROOMS[room(module)])
    ]
    assert wrong == []


def _inside(name: str) -> list[str]:
    """The rooms of a package, where the table allows the package as a whole."""
    return [other for other in ROOMS if other.startswith(name + ".")]


def test_the_table_of_rooms_has_no_circle() -> None:
    assert circles({a: {c for b in others for c in (b, *_inside(b))} for a, others in ROOMS.items()}) == []


def test_no_module_imports_another_modules_private_names() -> None:
    private = [
        f"{module}: {node.module}.{alias.name}"
        for module, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PACKAGES
        for alias in node.names
        if alias.name.startswith("_") and not alias.name.startswith("__")
    ]
    assert private == []


def test_contributing_prints_the_table() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    for name, others in ROOMS.items():
        if name not in ("experiments", "analysis"):
            row = f"| `{name}` | {', '.join(f'`{other}`' for other in sorted(others)) or 'none'} |"
            assert row in text, row


def loaded_by(statement: str, names: set[str]) -> set[str]:
    """Which of the packages a statement loads in a fresh interpreter."""
    code = f"import sys\n{statement}\nprint(*[n for n in {sorted(names)!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("package", FORBIDDEN_AT_IMPORT)
def test_a_package_loads_nothing_it_must_not(package: str) -> None:
    names = [name for name in modules() if name.split(".")[0] == package] if package == "analysis" else [package]
    assert loaded_by(f"import {', '.join(names)}", FORBIDDEN_AT_IMPORT[package]) == set()


@pytest.mark.parametrize("package", FORBIDDEN_AT_IMPORT)
def test_the_test_sees_a_forbidden_import(package: str) -> None:
    forbidden = sorted(FORBIDDEN_AT_IMPORT[package] & {"numba", "torch"})[0]
    assert loaded_by(f"import {package}, {forbidden}", FORBIDDEN_AT_IMPORT[package]) >= {forbidden}
