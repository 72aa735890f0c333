"""Imports within a baked package run one way, never from `core` to the owner."""

import ast
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

from ..support.answers import Answers, combinations, label
from ..support.projects import Bake

Graph = dict[str, set[str]]


@pytest.mark.parametrize("answers", combinations("pool", "worker"), ids=label)
def test_imports_run_one_way(bake: Bake, answers: Answers) -> None:
    graph = imports(bake(project_slug="app", **answers) / "app")
    TopologicalSorter(graph).prepare()  # Raises CycleError.
    for module, imported in graph.items():
        if module.startswith("app.core"):
            assert [name for name in imported if not name.startswith("app.core")] == []


def test_cycle_and_import_of_owner_module_are_detected(tmp_path: Path) -> None:
    (tmp_path / "core").mkdir()
    (tmp_path / "__init__.py").write_text("from . import core")
    (tmp_path / "notes.py").write_text("from .core.db import get_db")
    (tmp_path / "core" / "__init__.py").write_text("from . import db")
    (tmp_path / "core" / "db.py").write_text("def f():\n    from .. import notes")
    graph = imports(tmp_path)
    name = tmp_path.name
    assert graph[f"{name}.core.db"] == {f"{name}.notes"}
    with pytest.raises(ValueError, match="cycle"):
        TopologicalSorter(graph).prepare()


def imports(package: Path) -> Graph:
    """Return the modules of the package that each one imports, even in functions."""
    modules = {name(path, package): path for path in package.rglob("*.py")}
    return {
        module: imported(module, path) & modules.keys() - {module}
        for module, path in modules.items()
    }


def name(path: Path, package: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def imported(module: str, path: Path) -> set[str]:
    parent = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = resolve_name("." * node.level + (node.module or ""), parent)
            if node.module:
                found.add(origin)
            found |= {f"{origin}.{alias.name}" for alias in node.names}
    return found
