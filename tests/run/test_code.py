"""What of saerad works in a stage: read from imports, in a copy of the package that is edited."""
import ast
import shutil
from pathlib import Path

import pytest

from saerad.run import code
from saerad.run.code import assets_of, beginnings, changed_parts, code_of, imported, module_file, plain_syntax, working
from saerad.run.stages import STAGES

MUST = {"extract": ["subjects.maira2", "subjects.subject", "studies.phantom", "studies.sources", "activations.store", "core"],
        "train": ["assets/sae", "sae.kernels", "sae.native", "sae.ranks", "activations.online"],
        "evaluate": ["studies.phantom", "studies.grammar", "studies.findings", "sae.encoder", "assets/sae"],
        "interpret": ["assets/prompts", "assets/protocols", "interpretation.endpoint"],
        "steer": ["steering.interventions", "studies.grammar", "steering.judges"],
        "atlas": ["assets/atlas"]}


@pytest.mark.parametrize("stage, parts", MUST.items())
def test_what_decides_results_is_found(stage, parts):
    assert set(parts) <= set(code_of(stage))


@pytest.mark.parametrize("stage, room", [("extract", "sae"), ("extract", "steering"), ("extract", "interpretation"), ("train", "steering"),
                                         ("train", "show.atlas"), ("exemplars", "steering"), ("evaluate", "interpretation")])
def test_what_does_not_is_not(stage, room):
    assert [part for part in code_of(stage) if part.startswith(f"{room}.")] == []


def test_every_stage_begins_with_its_function_and_reaches_a_module():
    for stage in STAGES: assert f"run.stages.do_{stage}" in beginnings(stage) and any(module_file(p).exists() for p in beginnings(stage))


def test_no_stage_depends_on_the_code_that_runs_it():
    """Else a better message of the command line would make three hours of extraction again."""
    assert [p for stage in STAGES for p in code_of(stage) if p.startswith(("run.", "analysis.")) and module_file(p).exists()] == []


@pytest.mark.parametrize("one, other, same", [
    ("x = 1", "x=1 # so", True), ("def f():\n 'doc'\n return 1", "def f(): return 1", True), ("class A:\n 'doc'\n x = 1", "class A: x = 1", True),
    ("x = 1", "x = 1.0", False), ("x = 'a'", "x = b'a'", False), ("x = None", "x = ...", False), ("f(a, b)", "f(b, a)", False),
    ("f'{x!r}'", "f'{x!s}'", False), ("def f(): return", "def f(): return 0", False), ("def f(x, /): 0", "def f(x): 0", False),
    ("x: int = 1", "x: float = 1", False), ("async def f(): 1", "def f(): 1", False), ("if a: b\nelse: c", "if a: b", False)])
def test_what_is_the_same_program(one, other, same):
    assert (plain_syntax(ast.parse(one)) == plain_syntax(ast.parse(other))) == same


def test_assets_are_those_that_are_named():
    assert assets_of("subjects.subject") == () and assets_of("core") == ()     # the bundled model counts as the model
    assert [Path(a).name for a in assets_of("interpretation.protocols")] == ["prompts", "protocols"]


# ---------------------------------------------------------------- a copy of the package that is edited

def clear():
    for known in (code.syntax, code.imported, code._functions, code.assets_of, code._hash_of, code.code_of): known.cache_clear()


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A copy of the package whose files can be edited, and which the functions of the chapter read; and the code of every stage before."""
    true, copy = code.PACKAGE, tmp_path_factory.mktemp("copy") / "saerad"
    shutil.copytree(true, copy, ignore=shutil.ignore_patterns("__pycache__", "mini", "vendor"))
    code.PACKAGE = copy
    clear()
    yield copy, {stage: code_of(stage) for stage in STAGES}
    code.PACKAGE = true
    clear()


def edit(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def changes(before):
    clear()
    return {stage: found for stage in STAGES if (found := changed_parts(before[stage], code_of(stage)))}


def test_words_for_people_change_nothing(package):
    folder, before = package
    edit(folder / "sae/training.py", "import", "# a remark\nimport")
    edit(folder / "activations/store.py", '"""', '"""Well: ')
    edit(folder / "core.py", "def rng(seed: int, *names: Any)", "def rng(seed: int,\n        *names: Any)")
    assert changes(before) == {}


EDITS = {"subjects.maira2": ("subjects/maira2.py", "patches[:, 1:]", "patches[:, 2:]"),
         "sae.kinds": ("sae/kinds.py", "import torch", "import torch\nmore = 1"),
         "assets/sae": ("assets/sae/kernels.cpp", "#include", "// other\n#include"),
         "assets/prompts": ("assets/prompts/fuzz-1.txt", " ", "  "),
         "run.stages.do_evaluate": ("run/stages.py", "run.config.evaluation, run", "run.config.evaluation or None, run"),
         "run.stages.training_rows": ("run/stages.py", "if cfg.training.online else run.store", "if cfg.training.online else run.store or None"),
         "run.checks": ("run/checks.py", "characters / 4", "characters / 5"),
         "steering.steer": ("steering/steer.py", "def steer(", "def helper():\n    from ..sae.added import value\n    return value\n\ndef steer(")}


def test_real_changes_are_found_and_named_where_they_count(package):
    """Eight edits at once, one of which makes a module import a new one: every stage names those that it reaches, and no other."""
    folder, before = package
    (folder / "sae/added.py").write_text("value = 1\n", encoding="utf-8")
    for file, old, new in EDITS.values(): edit(folder / file, old, new)
    found = changes(before)
    for stage in STAGES:
        expected = {part for part in EDITS if part in before[stage]}
        assert set(found.get(stage, ())) == expected | ({"sae.added"} if "steering.steer" in expected else set()), stage
    assert found["extract"] == ["subjects.maira2"] and "run.stages.training_rows" in found["train"] and "assets/prompts" in found["interpret"]


def test_all_ways_to_import(package):
    lines = ["import saerad.core as c", "from saerad import core", "from . import store", "from .store import Store as S",
             "from ..core import rng, nothing", "import numpy", "from numpy import core as n", "import saerad"]
    (package[0] / "activations/ways.py").write_text("\n".join(lines), encoding="utf-8")
    assert imported("activations.ways") == {"c": "core", "core": "core", "store": "activations.store", "S": "activations.store", "rng": "core",
                                            "nothing": "core"}
    assert working(["activations.ways"]) == {"activations.ways", "activations.store", "core"}
