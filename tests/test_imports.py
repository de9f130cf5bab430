"""Imports run one way, and what is public is documented: read from the source, without importing it."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = "voxelmorph_monai"
ROOT = Path(__file__).parents[1] / PACKAGE
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted(ROOT.rglob("*.py"))
    if "label_app" not in path.parts  # a server's app: it stands outside, and may import everything
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in SOURCES.items()}
modules = pytest.mark.parametrize("name", TREES)

# Which rooms each room may import from: a folder of the package, or a module that lies beside them. Within a folder
# modules may import each other, without cycles. A new module beside the folders gets a line here, which is where its
# place is decided.
ALLOWED = {
    "__init__": {"cli"},  # lazily: what it imported at once, blocks would need too
    "affines": set(),
    "lazy": set(),
    "progress": {"lazy"},
    "switch": set(),
    "threads": set(),
    "compiled": set(),
    "kernels": {"switch"},
    "loops": {"compiled", "threads"},
    "scan_loops": {"compiled", "threads"},
    "blocks": {"kernels"},
    "memory": set(),
    "unet": {"blocks"},
    "networks": {"blocks", "unet"},
    "losses": {"blocks", "kernels"},
    "metrics": {"blocks", "lazy"},
    "epoch_metrics": {"metrics"},
    "synthesis": {"blocks", "losses"},
    "folds": {"blocks", "kernels"},
    "objective": {"blocks", "kernels", "losses", "metrics"},
    "descent": {"blocks", "kernels", "objective"},
    "refinement": {"blocks", "descent", "folds", "metrics", "networks", "objective", "progress"},
    "io": {"affines", "lazy", "threads"},
    "space": {"affines", "io", "lazy", "switch"},
    "maps": {"affines", "blocks", "io", "lazy", "space", "switch"},
    "pages": {"affines", "anatomy", "io", "lazy", "maps", "pose", "progress", "space"},
    "drawing": {"lazy"},
    "pictures": {"affines", "drawing", "io", "lazy", "pages"},
    "report": {"affines", "blocks", "io", "maps", "metrics", "pictures", "space", "switch"},
    "data": {"affines", "io"},
    "transforms": {"affines", "blocks", "engines", "evaluation", "io", "maps", "metrics", "report", "space"},
    "engines": set(),
    "config_checks": set(),
    "evaluation": {"io", "pictures"},
    "handlers": {"data", "engines", "evaluation", "io", "model_card", "networks"},
    "model_card": {"__init__", "io", "networks"},
    "vxmdense": {"blocks", "networks"},
    "groupwise": {"blocks", "objective", "progress", "refinement"},
    "atlas": {"blocks", "losses", "networks", "refinement", "space"},
    "segmentation_transforms": {"affines", "io", "space"},
    "atlas_transforms": {"affines", "atlas", "io", "segmentation_transforms", "space"},
    "pose": {"affines", "blocks", "lazy"},
    "anatomy": {"affines", "blocks", "lazy", "networks", "pose", "space", "switch"},
    "anatomy_transforms": {"affines", "anatomy", "io", "segmentation_transforms", "space"},
    "anatomy_training": {"networks"},
}
ALLOWED["apps"] = {"__init__", *ALLOWED}
ALLOWED["commands"] = {"__init__", "apps", "drawing", "maps", "pages", "space"}
ALLOWED["cli"] = {"commands", "memory", "threads"}
LAZY = {"__init__", "cli", "commands"}  # help appears at once only if a command imports what it needs when it runs

# An app is one command. What several of them are made of:
SHARED_BY_APPS = {
    "bids",
    "cohort",
    "heads",
    "options",
    "outputs",
    "processes",
    "register",
    "register_files",
    "result",
    "shipped",
}


def room(name: str) -> str:
    return name.split(".")[0]


def imports(tree: ast.AST) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


def later(tree: ast.AST) -> set[str]:
    """Dotted names of the modules that ``tree`` has imported when they are used."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "lazy"]
    return {ast.literal_eval(call.args[0]) for call in calls}


def imported(tree: ast.AST) -> set[str]:
    """Dotted names that ``tree`` imports: a module, or one and a name in it; relative ones written out."""
    names = later(tree)
    for node in imports(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        else:
            base = ".".join(filter(None, [PACKAGE if node.level else "", node.module or ""]))
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def ours(tree: ast.AST) -> set[str]:
    """Modules of the package that ``tree`` imports; the package itself, for its version, is ``__init__``."""
    names = [name.removeprefix(PACKAGE).lstrip(".") for name in imported(tree) if name.split(".")[0] == PACKAGE]
    return {module_of(name) for name in names}


def module_of(name: str) -> str:
    """The module that a dotted name is, or lies in."""
    while name and name not in SOURCES:
        name = name.rpartition(".")[0]
    return name or "__init__"


def test_the_reader_sees_every_spelling() -> None:
    source = """
import torch.nn as nn
import voxelmorph_monai.losses
from voxelmorph_monai import blocks, __version__
from . import metrics
from .io.atomic import atomic
from voxelmorph_monai.space import scan
def f():
    from voxelmorph_monai.networks import UNet
report = lazy("voxelmorph_monai.report")
"""
    expected = {"report", "losses", "blocks", "__init__", "metrics", "io.atomic", "space.scan", "networks"}
    assert ours(ast.parse(source)) == expected
    assert "torch.nn" in imported(ast.parse(source))


@modules
def test_modules_import_only_from_below(name: str) -> None:
    here = room(name)
    assert here in ALLOWED, f"{name} has no place yet: say in ALLOWED what it may import"
    assert {room(other) for other in ours(TREES[name])} - {here} <= ALLOWED[here]


@pytest.mark.parametrize("name", [name for name in TREES if room(name) == "apps"])
def test_apps_do_not_import_one_another(name: str) -> None:
    others = {other.removeprefix("apps.") for other in ours(TREES[name]) if room(other) == "apps"}
    assert others <= SHARED_BY_APPS


def test_blocks_needs_torch_alone() -> None:
    for module in ("blocks", "kernels"):
        roots = {name.split(".")[0] for name in imported(TREES[module])}
        assert roots - set(sys.stdlib_module_names) - {PACKAGE} == {"torch"}
    assert ours(TREES["blocks"]) == {"kernels"}


def test_no_cycles() -> None:
    order = list(TopologicalSorter({name: ours(tree) for name, tree in TREES.items()}).static_order())  # raises on one
    assert set(order) == set(TREES)


@modules
def test_no_wildcards(name: str) -> None:
    assert not [target for target in imported(TREES[name]) if target.endswith(".*")]


@pytest.mark.parametrize("name", [name for name in sorted(TREES) if room(name) not in LAZY])
def test_no_imports_inside_functions(name: str) -> None:
    functions = [f for f in ast.walk(TREES[name]) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert not {f.name for f in functions if imports(f)}


def assignments(tree: ast.Module) -> dict[str, ast.expr]:
    """What a module assigns to its names, by name."""
    found = {ast.unparse(t): n.value for n in tree.body if isinstance(n, ast.Assign) for t in n.targets}
    return found | {ast.unparse(n.target): n.value for n in tree.body if isinstance(n, ast.AnnAssign) and n.value}


@modules
def test_what_other_modules_import_is_public(name: str) -> None:
    dotted = {each.removeprefix(f"{PACKAGE}.") for each in imported(TREES[name]) if each.startswith(f"{PACKAGE}.")}
    used = {(module_of(each), each.removeprefix(f"{module_of(each)}.")) for each in dotted - SOURCES.keys()}
    used = {(module, each) for module, each in used if module != "__init__"}  # it offers names of other modules
    assert not [
        f"{module}.{each}"
        for module, each in sorted(used)
        if each not in ast.literal_eval(assignments(TREES[module])["__all__"])
    ]


@pytest.mark.parametrize("name", [name for name in TREES if room(name) == name or not name.endswith("__init__")][1:])
def test_public_names_are_documented(name: str) -> None:
    body, assigned = TREES[name].body, assignments(TREES[name])
    assert "__all__" in assigned, f"{name}.py must say in __all__ what is public"
    public = ast.literal_eval(assigned["__all__"])
    assert public
    assert ast.get_docstring(TREES[name])
    defined = {n.name: n for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    assert set(public) <= defined.keys() | assigned.keys()
    assert not [each for each in public if each in defined and not ast.get_docstring(defined[each])]
