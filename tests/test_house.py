"""The house: rooms in one direction without a circle, and the names that a user needs in one place."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

import saerad

PACKAGE = Path(saerad.__file__).parent
ROOMS = ("core", "studies", "subjects", "activations", "sae", "interpretation", "steering", "show", "run", "analysis")   # data go this way


def name_of(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {name_of(p): p for p in sorted(PACKAGE.rglob("*.py")) if not p.name.startswith("_")}


def imports(name):
    """Modules of the package that a module imports, wherever in it."""
    here, found = ["saerad", *name.split(".")], set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import): found |= {a.name for a in node.names}
        if not isinstance(node, ast.ImportFrom): continue
        base = ".".join(here[:-node.level] + ([node.module] if node.module else [])) if node.level else node.module
        found |= {base} | {f"{base}.{a.name}" for a in node.names}
    return {f.removeprefix("saerad.") for f in found} & set(MODULES)


def test_every_module_stands_in_a_room():
    assert {name.partition(".")[0] for name in MODULES} == set(ROOMS)
    assert all(p.parent == PACKAGE or (p.parent / "__init__.py").read_text(encoding="utf-8").startswith('"""') for p in MODULES.values())


@pytest.mark.parametrize("name", MODULES)
def test_no_module_imports_a_later_room(name):
    rank = ROOMS.index(name.partition(".")[0])
    assert [other for other in imports(name) if ROOMS.index(other.partition(".")[0]) > rank] == []


def test_there_is_no_circle():
    """Modules can be put in an order in which each imports only earlier ones."""
    left = {name: imports(name) for name in MODULES}
    while ready := [name for name, needs in left.items() if not needs & set(left)]:
        for name in ready: del left[name]
    assert not left


@pytest.mark.parametrize("name", saerad.__all__)
def test_what_a_user_needs_is_in_one_place(name):
    assert getattr(saerad, name).__name__ == name and name in dir(saerad)


def test_a_name_that_is_not_there_is_an_ordinary_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"): saerad.nothing  # noqa: B018


def test_editors_see_what_is_there():
    """The imports for type checkers are those that are made."""
    block = next(n for n in ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8")).body if isinstance(n, ast.If))
    shown = {a.name: n.module for n in block.body for a in n.names}
    assert shown == saerad._HOME


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, saerad; sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'transformers', 'nnsight')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
