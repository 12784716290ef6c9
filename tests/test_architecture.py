"""The package's own structure: who imports whom, and that nobody reaches into another module."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fastrel"
FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    """Module name of a file of the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


@functools.cache
def tree_of(path: Path) -> ast.Module:
    """A file of the package, parsed."""
    return ast.parse(path.read_text())


def imports(path: Path) -> Iterator[tuple[str, ast.stmt]]:
    """Modules of this package that a file imports, anywhere in it: also inside functions and for type checkers."""
    own = name_of(path)
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in found:
            if name.startswith("fastrel.triton_kernels"):  # beside the package in a checkout
                continue
            while name and name not in MODULES:
                name = name.rpartition(".")[0]
            if name and name != own:
                yield name, node


def circle(graph: dict[str, set[str]]) -> list[str] | None:
    """Modules that import each other in a circle, if there are any."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str] | None:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        for other in sorted(graph.get(name, ())):
            found = visit(other, [*path, name])
            if found:
                return found
        done.add(name)
        return None

    return next((found for name in sorted(graph) if (found := visit(name, []))), None)


def test_no_module_imports_itself_by_way_of_others() -> None:
    # A package's name stands for what is defined in its __init__; `from package import module` counts for the module.
    graph = {name_of(path): {name for name, _ in imports(path)} for path in FILES}
    assert circle(graph) is None


def test_a_circle_would_be_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]


#: Who may import whom: a folder, and what it must not know.
FORBIDDEN = {
    "fastrel.reference": ["fastrel."],
    "fastrel.graph": ["fastrel.transform", "fastrel.rules", "fastrel.methods", "fastrel.ops", "fastrel.backends", "fastrel.engine"],
    "fastrel.rules": ["fastrel.engine", "fastrel.explainer", "fastrel.methods", "fastrel.backends"],
    "fastrel.transform": ["fastrel.engine", "fastrel.explainer", "fastrel.methods"],
    "fastrel.eager": ["fastrel.rules", "fastrel.transform", "fastrel.graph", "fastrel.ops"],
    "fastrel.functional": ["fastrel.rules", "fastrel.transform", "fastrel.graph"],
}  # fmt: skip


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_layers_know_only_what_lies_below(folder: str) -> None:
    bad = [
        f"{name_of(path)} imports {name}"
        for path in FILES
        if name_of(path) == folder or name_of(path).startswith(folder + ".")
        for name, _ in imports(path)
        if not (name == folder or name.startswith(folder + "."))
        and any(name.startswith(prefix) for prefix in FORBIDDEN[folder])
    ]
    assert not bad


#: Torch's own, without which some things cannot be asked.
TORCH = {"_schema", "_version", "_base", "_modules", "_parameters", "_buffers"}


def _private(tree: ast.Module) -> Iterator[str]:
    """Private attributes of other objects than self, cls and what the module itself defines."""
    own = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))}
    assigned = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    fields = {
        node.target.id for node in ast.walk(tree) if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            if node.attr in own | assigned | fields:
                continue
            yield node.attr
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastrel"):
            yield from (alias.name for alias in node.names if alias.name.startswith("_"))


def test_no_module_uses_anothers_private_names() -> None:
    """Names that begin with an underscore and are defined in one module of this package are used in no other."""
    trees = {name_of(path): tree_of(path) for path in FILES}
    defined = {
        name: {
            found
            for node in ast.walk(tree)
            for found in (
                [node.name] if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
                else [node.attr] if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
                else [node.target.id] if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
                else []
            )
            if found.startswith("_") and not found.startswith("__")
        }
        for name, tree in trees.items()
    }  # fmt: skip
    everything = set().union(*defined.values()) - TORCH
    bad = {name: sorted(set(_private(tree)) & everything) for name, tree in trees.items()}
    assert not {name: used for name, used in bad.items() if used}


#: What needs pyarrow or torch, which those who import it can do without.
LATE = ("fastrel.batch.reading", "fastrel.data.tables", "fastrel.demo")


def test_imports_inside_functions_are_of_what_may_be_missing_or_is_heavy() -> None:
    """Of this package only in commands, which start fast, and of `LATE`."""
    bad = []
    for path in FILES:
        inside = {
            id(node)
            for function in ast.walk(tree_of(path))
            if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
            for node in ast.walk(function)
        }
        local = path.relative_to(PACKAGE).parts[0]
        for name, node in imports(path):
            starts_fast = local in ("commands", "cli.py", "render", "demo", "explanation.py")
            if id(node) in inside and name not in LATE and not starts_fast:
                bad.append(f"{name_of(path)} imports {name} in a function")
    assert not bad
