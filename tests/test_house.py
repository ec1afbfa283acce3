"""The house: rooms in one direction without a circle, and the names that a user needs in one place."""
import ast
import json
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


def test_no_function_or_class_has_the_name_of_another():
    """Methods that are written below their class (`@patch`) belong to it, and what begins with _ to its module."""
    homes = {}
    for name, path in MODULES.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"): continue
            if not any("patch" in ast.unparse(d) for d in node.decorator_list): homes.setdefault(node.name, set()).add(name)
    assert {name: places for name, places in homes.items() if len(places) > 1} == {}


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


def bare_texts(code):
    """Lines on which a text file is read or written without saying how its letters are written; ruff sees only what it knows to be a path."""
    for call in ast.walk(ast.parse(code)):
        if not isinstance(call, ast.Call) or {"encoding"} & {k.arg for k in call.keywords}: continue
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        binary = any(isinstance(a, ast.Constant) and "b" in str(a.value) for a in call.args[1:2])
        if name in ("read_text", "write_text") or name == "open" and isinstance(call.func, ast.Name) and not binary: yield call.lineno


@pytest.mark.parametrize("code, bare", [("p.read_text()", True), ("open('b')", True), ("open('b', 'w')", True), ("p.write_text('x')", True),
                                        ("open('a', 'rb')", False), ("p.read_text(encoding='utf-8')", False), ("Image.open(p)", False)])
def test_a_text_without_an_encoding_is_seen(code, bare): assert bool(list(bare_texts(code))) == bare


@pytest.mark.parametrize("folder", ["saerad", "benchmarks", ".ci", "tests", "nbs"])
def test_text_files_are_utf8_by_name(folder):
    root, cells = PACKAGE.parent / folder, []
    for path in root.rglob("*.py"): cells.append((path.name, path.read_text(encoding="utf-8")))
    for path in root.rglob("*.ipynb"):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        cells += [(f"{path.name} {c['id']}", "".join(c["source"])) for c in notebook["cells"] if c["cell_type"] == "code"]
    if not cells: pytest.skip(f"{folder} is not here")
    plain = [(where, code) for where, code in cells if not any(line.startswith(("%", "!")) for line in code.splitlines())]
    assert [(where, line) for where, code in plain for line in bare_texts(code)] == []
