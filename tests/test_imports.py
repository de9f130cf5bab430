"""Imports run one way, and what is public is documented: read from the source, without importing it."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = "voxelmorph_monai"
SOURCES = {path.stem: path for path in sorted((Path(__file__).parents[1] / PACKAGE).glob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in SOURCES.items()}
modules = pytest.mark.parametrize("name", TREES)

# What of ours each module may import. A new module gets a line here, which is where its place is decided.
ALLOWED = {
    "__init__": set(),  # it runs before any module, so what it imported, blocks would need too
    "blocks": set(),
    "networks": {"blocks"},
    "losses": {"blocks"},
    "metrics": {"blocks"},
    "files": set(),
    "formats": set(),
    "spaces": {"files", "formats"},
    "data": {"spaces"},
    "datasets": {"data", "files", "spaces"},
    "pictures": {"files", "spaces"},
    "results": {"blocks", "files", "metrics", "pictures", "spaces"},
    "transforms": {"blocks", "metrics", "results", "spaces"},
    "affine": {"spaces"},
    "synthesis": {"blocks", "losses"},
    "processes": set(),
    "preparation": {"affine", "files", "processes", "spaces", "synthesis"},
    "engines": {"networks"},
    "evaluation": {"files", "formats", "pictures"},
    "comparison": {"evaluation", "files", "pictures"},
    "handlers": {"data", "engines", "evaluation", "files", "networks"},
    "distribution": {"files", "networks"},
    "quickstart": {"atlas_bundle", "preparation", "registration", "spaces"},
    "weights": {"files", "networks"},
    "registration": {
        "__init__",
        "affine",
        "blocks",
        "files",
        "formats",
        "networks",
        "preparation",
        "refinement",
        "results",
        "spaces",
    },
    "propagation": {"atlas", "blocks", "files", "preparation", "registration", "results", "spaces"},
    "atlas": {"affine", "blocks", "files", "losses", "networks", "preparation", "refinement", "spaces"},
    "atlas_bundle": {"atlas", "files", "networks", "preparation", "registration", "spaces", "transforms"},
    "cohort": {"files", "formats", "processes", "registration"},
    "uncertainty": {"files", "networks", "preparation", "registration", "spaces"},
    "refinement": {"blocks", "losses", "metrics", "networks"},
    "chains": {"blocks", "spaces"},
    "foreign_files": {"files", "formats", "spaces"},
    "transform_files": {"chains", "files", "foreign_files", "formats", "spaces"},
    "points": {"files", "spaces"},
    "apply": {"chains", "formats", "points", "results", "spaces", "transform_files"},
    "cli": set(SOURCES) - {"__init__", "cli"},
}
LAZY = {"cli"}  # help appears at once only if a command imports what it needs when it runs


def imports(tree: ast.AST) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


def imported(tree: ast.AST) -> set[str]:
    """Dotted names that ``tree`` imports: a module, or one and a name in it; relative ones written out."""
    names = set()
    for node in imports(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        else:
            base = ".".join(filter(None, [PACKAGE if node.level else "", node.module or ""]))
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def ours(tree: ast.AST) -> set[str]:
    """Modules of the package that ``tree`` imports; the package itself, for its version, is ``__init__``."""
    parts = [name.split(".") for name in imported(tree)]
    inside = [part[1] if len(part) > 1 else "__init__" for part in parts if part[0] == PACKAGE]
    return {name if name in SOURCES else "__init__" for name in inside}


def test_the_reader_sees_every_spelling() -> None:
    source = """
import torch.nn as nn
import voxelmorph_monai.losses
from voxelmorph_monai import blocks, __version__
from . import metrics
from .files import atomic
def f():
    from voxelmorph_monai.networks import UNet
"""
    expected = {"losses", "blocks", "__init__", "metrics", "files", "networks"}
    assert ours(ast.parse(source)) == expected
    assert "torch.nn" in imported(ast.parse(source))


@modules
def test_modules_import_only_from_below(name: str) -> None:
    assert name in ALLOWED, f"{name}.py has no place yet: say in ALLOWED what it may import"
    assert ours(TREES[name]) <= ALLOWED[name]


def test_blocks_needs_torch_alone() -> None:
    roots = {name.split(".")[0] for name in imported(TREES["blocks"])}
    assert roots - set(sys.stdlib_module_names) == {"torch"}


def test_no_cycles() -> None:
    order = list(TopologicalSorter({name: ours(tree) for name, tree in TREES.items()}).static_order())  # raises on one
    assert set(order) == set(TREES)


@modules
def test_no_wildcards(name: str) -> None:
    assert not [target for target in imported(TREES[name]) if target.endswith(".*")]


@pytest.mark.parametrize("name", sorted(set(TREES) - LAZY))
def test_no_imports_inside_functions(name: str) -> None:
    functions = [f for f in ast.walk(TREES[name]) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert not {f.name for f in functions if imports(f)}


@pytest.mark.parametrize("name", sorted(set(TREES) - {"__init__"}))
def test_public_names_are_documented(name: str) -> None:
    body = TREES[name].body
    assigned = {ast.unparse(t): n.value for n in body if isinstance(n, ast.Assign) for t in n.targets}
    assigned |= {ast.unparse(n.target): n.value for n in body if isinstance(n, ast.AnnAssign) and n.value}
    assert "__all__" in assigned, f"{name}.py must say in __all__ what is public"
    public = ast.literal_eval(assigned["__all__"])
    assert public
    assert ast.get_docstring(TREES[name])
    defined = {n.name: n for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    assert set(public) <= defined.keys() | assigned.keys()
    assert not [each for each in public if each in defined and not ast.get_docstring(defined[each])]
