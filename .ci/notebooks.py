"""The book's own tools: check, test, execute, readme, site. Run by the Makefile; needs no Quarto and no git."""
import argparse
import ast
import builtins
import difflib
import filecmp
import gc
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
BIN = Path(sys.executable).parent
KERNEL = {"display_name": "python3", "language": "python", "name": "python3"}
SKIP = re.compile(r"(?m)^#\|\s*eval:\s*false")
QUIET = {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore:IProgress not found", "IN_TEST": "1", "PYTHONHASHSEED": "0",
         "TRITON_INTERPRET": "1"}     # by whichever chapter Triton is imported first, the one on its kernels needs it so
# What a stored output must not hold: it would differ on the next machine, or on the next run.
UNSTABLE = {"an address in memory": r"\b0x[0-9a-f]{9,}", "a path of one machine": r"(?<![\w.])/(?:home|root|work|tmp|Users|var/folders)/",
            "a progress bar": r"\d+%\|.{0,12}[█▏▎▍▌▋▊▉ ]{3}", "a traceback": r"Traceback \(most recent call last\)"}


def reading_order() -> list[str]:
    """The chapters as the front page names them, by their path in nbs/; the front page comes first."""
    text = "\n".join(c.source for c in nbformat.read(NBS / "index.ipynb", 4).cells if c.cell_type == "markdown")
    return ["index.ipynb", *dict.fromkeys(re.findall(r"\]\(([\w/]+\.ipynb)\)", text.partition("## The book")[2] + text))]


def notebooks(folder: Path = NBS) -> list[Path]:
    """Every notebook of the book, in reading order; of a folder, or one alone."""
    if folder.suffix == ".ipynb": return [folder]
    order = {name: i for i, name in enumerate(reading_order())}
    found = (p for p in folder.rglob("*.ipynb") if not any(part[0] in "._" for part in p.relative_to(folder).parts))
    return sorted(found, key=lambda p: (order.get(p.relative_to(NBS).as_posix(), len(order)), p))


def check_front_page() -> list[str]:
    """Every chapter can be found from the front page."""
    named = set(reading_order())
    return [f"nbs/index.ipynb does not link to {name}" for p in notebooks() if (name := p.relative_to(NBS).as_posix()) not in named]


def copy_of_the_book(to: str) -> Path:
    """What nbdev reads and writes, somewhere else."""
    copy = Path(to) / "book"
    copy.mkdir()
    for name in ("settings.ini", "setup.py"): shutil.copy(ROOT / name, copy)
    shutil.copytree(NBS, copy / "nbs", ignore=shutil.ignore_patterns(".*", "_*.ipynb"))
    shutil.copytree(ROOT / "saerad", copy / "saerad", ignore=shutil.ignore_patterns("assets", "__pycache__"))
    return copy


def different(ours: Path, theirs: Path, pattern: str) -> list[str]:
    """Names of files that are on one side only, or not the same bytes on both."""
    names = {p.relative_to(side).as_posix() for side in (ours, theirs) for p in side.rglob(pattern) if "__pycache__" not in p.parts}
    return sorted(n for n in names if not ((ours / n).exists() and (theirs / n).exists() and filecmp.cmp(ours / n, theirs / n, shallow=False)))


def check_export() -> list[str]:
    """The modules are what the notebooks say, and the notebooks are clean."""
    with tempfile.TemporaryDirectory() as temp:
        copy = copy_of_the_book(temp)
        for old in (copy / "saerad").rglob("*.py"):
            if old.name != "__init__.py": old.unlink()  # a module whose notebook is gone must show up too
        env = {**os.environ, "PYTHONPATH": str(copy)}
        for tool in ("nbdev_export", "nbdev_clean"): subprocess.run([BIN / tool], cwd=copy, check=True, env=env)
        return ([f"saerad/{n} is not what its notebook exports: run `make export`" for n in different(ROOT / "saerad", copy / "saerad", "*.py")] +
                [f"nbs/{n} is not clean: run `make export`" for n in different(NBS, copy / "nbs", "*.ipynb") if "checkpoint" not in n])


def outputs_of(cell) -> str:
    """The text of a cell's outputs."""
    texts = []
    for out in cell.get("outputs", []):
        texts.append(out.get("text", ""))
        texts += [v for k, v in out.get("data", {}).items() if k.startswith("text/") and isinstance(v, str)]
    return "\n".join(texts)


def check_notebook(path: Path) -> list[str]:
    """A notebook was executed whole, without error, by the kernel that all share, and stores nothing that will not come again."""
    nb, problems, name = nbformat.read(path, 4), [], path.relative_to(ROOT)
    if nb.metadata.get("kernelspec") != KERNEL: problems.append(f"{name}: kernelspec {nb.metadata.get('kernelspec')}, not {KERNEL}")
    code = [c for c in nb.cells if c.cell_type == "code" and not SKIP.search(c.source)]
    shown = [c for c in code if not re.search(r"(?m)^#\|\s*(export|hide|default_exp)", c.source)]
    problems += check_opening(nb, name) + check_picture(nb, name) + check_looks(nb, name) + check_imports(nb, name) + check_record(nb, name)
    if any(last_is_a_value(c.source) for c in shown) and not any(c.outputs for c in shown): problems.append(f"{name}: was never executed")
    for i, cell in enumerate(nb.cells):
        if cell.cell_type != "code": continue
        if any(o.output_type == "error" for o in cell.outputs): problems.append(f"{name}, cell {i}: ended in an error")
        if not cell.outputs and cell in shown and last_is_a_value(cell.source):
            problems.append(f"{name}, cell {i}: ends in a value but shows none: execute it again")
        problems += [f"{name}, cell {i}: the output holds {what}" for what, pattern in UNSTABLE.items() if re.search(pattern, outputs_of(cell))]
    return problems


def check_opening(nb, name: Path) -> list[str]:
    """nbdev takes the first Markdown cell for title and description, and leaves out of the page whatever else it holds."""
    first = next((c.source.strip() for c in nb.cells if c.cell_type == "markdown"), "")
    if re.fullmatch(r"# .+(\n> .+)?(\n- [\w-]+: .+)*", first): return []
    return [f"{name}: the first Markdown cell must hold the title and a line of description after `>`, and nothing else"]


def check_record(nb, name: Path) -> list[str]:
    """A chapter of results says when it was run at full size and with which commit, or, in its first lines, that it was not."""
    if NBS / "results" not in (ROOT / name).parents: return []
    if any(NOTICE.fullmatch(c.source) for c in nb.cells[:3]) or any(RECORD.fullmatch(c.source) for c in nb.cells): return []
    return [f"{name}: neither says when it was run at full size nor, in its first lines, that it was not: `make results CHAPTERS={name.name[:2]}`"]


def shows(cell) -> bool:
    """Whether a reader sees a picture there, drawn by the cell or put into its prose."""
    if cell.cell_type == "markdown": return bool(re.search(r"!\[|<img|<svg", cell.source))
    data = [o.get("data", {}) for o in cell.get("outputs", [])]
    return any(key.startswith("image/") for d in data for key in d) or any(re.search("<img|<svg", d.get("text/html", "")) for d in data)


def check_picture(nb, name: Path) -> list[str]:
    """A chapter opens with a picture: one of its first cells shows it, before any code that is exported but imports."""
    exported = next((i for i, c in enumerate(nb.cells) if re.match(r"#\| ?exports?\b(?!\n(import|from) )", c.source)), len(nb.cells))
    if any(shows(c) for c in nb.cells[:min(exported, 13)]): return []
    return [f"{name}: no picture before its first function and among its first 13 cells"]


def check_imports(nb, name: Path) -> list[str]:
    """The site executes every cell that imports, and those alone: such a cell does nothing else, unless it is exported."""
    problems = []
    for i, cell in enumerate(nb.cells):
        if cell.cell_type != "code" or SKIP.search(cell.source) or re.match(r"#\| ?export", cell.source) or "nbdev_export()" in cell.source: continue
        try: nodes = list(ast.walk(ast.parse(cell.source)))
        except SyntaxError: continue        # a magic
        both = [any(isinstance(node, kinds) for node in nodes) for kinds in ((ast.Import, ast.ImportFrom), (ast.Expr, ast.Assign))]
        if all(both): problems.append(f"{name}, cell {i}: imports and does something else too: make two cells of it")
    return problems


def check_looks(nb, name: Path, most: int = 5) -> list[str]:
    """No more than a handful of exported cells follow each other without something to look at; cells that only import do not count."""
    unseen, problems = 0, []
    for i, cell in enumerate(nb.cells):
        if cell.cell_type != "code": continue
        if re.match(r"#\| ?exporti?\b(?!\n(import|from) )", cell.source): unseen += 1
        elif cell.outputs: unseen = 0
        if unseen == most + 1: problems.append(f"{name}, cell {i}: {unseen} exported cells in a row without a look")
    return problems


TEXT = {"Float", "Int", "Int32", "Int64", "Bool", "UInt8", "Shaped", "Literal", "Annotated"}  # whose brackets hold text that is no name


def unresolved(module: Path) -> list[str]:
    """Annotations in quotes that name what is defined only further down: the site reads them where they stand."""
    known, problems = set(dir(builtins)), []
    for node in ast.parse(module.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef): known.add(node.name)
        for inner in ast.walk(node):
            if not isinstance(inner, (ast.FunctionDef, ast.AnnAssign)): continue
            said = [inner.annotation] if isinstance(inner, ast.AnnAssign) else [inner.returns, *(a.annotation for a in ast.walk(inner.args)
                                                                                             if isinstance(a, ast.arg))]
            quoted = [text for a in said if a is not None for text in quotes(a)]
            problems += [f"{module.relative_to(ROOT)}:{inner.lineno}: the annotation {q!r} names what is not there yet" for q in quoted
                         if not {n.id for n in ast.walk(ast.parse(q, mode="eval")) if isinstance(n, ast.Name)} <= known]
        known |= {a.asname or a.name.split(".")[0] for n in ast.walk(node) if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names}
        known |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)} | {getattr(node, "name", "")}
    return problems


def quotes(annotation: ast.AST) -> list[str]:
    """Text in an annotation that stands for a type."""
    if isinstance(annotation, ast.Constant): return [annotation.value] if isinstance(annotation.value, str) else []
    if isinstance(annotation, ast.Subscript) and getattr(annotation.value, "id", "") in TEXT: return []
    return [q for child in ast.iter_child_nodes(annotation) for q in quotes(child)]


def last_is_a_value(source: str) -> bool:
    """Whether a cell's last line is a plain name or constant, which a notebook always shows (a call may return None)."""
    lines = [s for s in source.rstrip().split("\n") if s.strip() and not s.strip().startswith("#")]
    return bool(lines) and re.fullmatch(r"[\w.]+(\[[^\]]*\])?(, *[\w.]+)*", lines[-1]) is not None and lines[-1] not in ("pass", "None")


def from_the_top(text: str) -> str:
    """Markdown whose relative links, written for nbs/, start at the top of the repository."""
    return re.sub(r"\]\((?![a-z]+:|#|\.\./)([^)]+)\)", r"](nbs/\1)", text).replace("](../", "](")


def readme() -> str:
    """README.md as it follows from nbs/index.ipynb: its prose, its code and the text that the code showed."""
    parts = []
    for cell in nbformat.read(NBS / "index.ipynb", 4).cells:
        if re.search(r"(?m)^#\|\s*hide\s*$", cell.source): continue
        if cell.cell_type == "markdown": parts.append(from_the_top(cell.source.strip()))
        elif cell.cell_type == "code":
            source = "\n".join(s for s in cell.source.split("\n") if not s.startswith("#|")).strip()
            if source: parts.append(f"```python\n{source}\n```")
            shown = "\n".join(o.get("text", "") or o.get("data", {}).get("text/plain", "") for o in cell.outputs).rstrip()
            if shown: parts.append(f"```text\n{shown}\n```")
    return "<!-- generated from nbs/index.ipynb by `make export` -->\n\n" + "\n\n".join(parts) + "\n"


def check_readme() -> list[str]:
    """README.md is as generated, and everything that it links to is there."""
    written = (ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else ""
    dead = [link for link in re.findall(r"\]\(([^)#]+)\)", readme()) if "//" not in link and not (ROOT / link).exists()]
    problems = [f"README.md links to {link}, which is not there" for link in dead]
    return problems if written == readme() else ["README.md is not what nbs/index.ipynb says: run `make export`", *problems]


def check() -> int:
    problems = check_export() + check_readme() + check_front_page() + [p for nb in notebooks() for p in check_notebook(nb)]
    problems += [p for module in sorted((ROOT / "saerad").rglob("[!_]*.py")) for p in unresolved(module)]
    for problem in problems: print(problem)
    print(f"{len(notebooks())} notebooks, {len(problems)} problems")
    return bool(problems)


EARLIER = 3 * 60        # seconds by which the findings, which are the longest chapters, must begin before what else has to begin in time


def test_chapters(todo, done, late: float) -> None:
    """A worker: runs chapter after chapter as `nbdev_test` does, until the queue gives None; only what can begin before `late`, findings sooner."""
    os.environ.update(QUIET, TMPDIR=os.environ["SAERAD_SMALL"])
    os.nice(19)         # the tests, of which some wait for processes with a clock in hand, go first
    gc.set_threshold(50_000, 20, 100)      # as in tests/conftest.py
    from nbdev.config import get_config
    from nbdev.test import test_nb
    while (path := todo.get()) is not None:
        name = path.relative_to(NBS).as_posix()
        if time.time() > late - EARLIER * (NBS / "results" in path.parents): done.put((name, None, 0))
        else:
            began = time.process_time()
            passed, _ = test_nb(path, skip_flags=get_config().tst_flags.split(), basepath=ROOT)
            done.put((name, passed, time.process_time() - began))
    sys.stdout.flush()
    os._exit(0)         # taking down what ninety chapters left in memory takes half a minute


def test(with_tests: bool = False) -> int:
    """Run every chapter, one on each core; if asked, with the tests before them in line for the cores.

    The findings come last. Where `SAERAD_LATE` says when it gets late (seconds since 1970), what cannot begin before is left out and named.
    """
    context, cores = multiprocessing.get_context("spawn"), os.cpu_count() or 2
    todo, done = context.Queue(), context.SimpleQueue()
    for path in [*sorted(notebooks(), key=lambda p: NBS / "results" in p.parents), *[None] * cores]: todo.put(path)
    log, small = tempfile.TemporaryFile("w+", encoding="utf-8"), tempfile.TemporaryDirectory()
    os.environ["SAERAD_SMALL"] = small.name         # what many chapters begin with is made once, and never taken from an earlier day
    pytest = ["-m", "pytest", "-q", "-n", str(cores), "--dist", "loadfile", "--durations=10", "-rs", "tests"]
    tests = subprocess.Popen([sys.executable, *(pytest if with_tests else ["-c", ""])], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    late = float(os.environ.get("SAERAD_LATE", "inf"))      # tests/conftest.py reads it too
    workers = [context.Process(target=test_chapters, args=(todo, done, late)) for _ in range(cores)]
    for worker in workers: worker.start()
    results = []
    while any(w.is_alive() for w in workers) or not done.empty():
        if done.empty(): time.sleep(0.2)
        else: results.append(done.get())
    tests.wait()
    log.seek(0)
    print(log.read())
    print("seconds of a processor:")
    for name, _, seconds in sorted(results, key=lambda r: -r[2]): print(f"{name}: {seconds:.0f} s")
    left = sorted(name for name, passed, _ in results if passed is None)
    failed = {p.relative_to(NBS).as_posix() for p in notebooks()} - {name for name, passed, _ in results if passed or passed is None}
    print(f"chapters: {len(notebooks()) - len(failed) - len(left)} passed" + "".join(f"\n  failed: {name}" for name in sorted(failed))
          + "".join(f"\n  no time left for: {name} (`make test` runs it)" for name in left))
    return bool(failed or tests.returncode)


RECORD = re.compile(r"\*Run at full size on .+\*")
NOTICE = re.compile(r"\*Not yet run at full size .+\*")


def commit() -> str:
    """The commit that is checked out, and whether anything but what chapters show was changed since; "unknown" without git."""
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    try: head, changed = git("rev-parse", "--short", "HEAD"), git("status", "--porcelain", "--", "saerad", "configs")
    except (OSError, subprocess.CalledProcessError): return "commit unknown"
    return f"commit `{head}`" + " with changes" * bool(changed)


def record(nb, code: str, seconds: float) -> None:
    """Write into a chapter of results when it was run at full size, with which code and how long that took."""
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    text = (f"*Run at full size on {time.strftime('%-d %B %Y')}, {code}, in {max(1, round(seconds / 60))} min "
            f"on {threads} thread{'s' * (threads > 1)}; what was found finished in `runs/` is not in that time.*")
    nb.cells = [c for c in nb.cells if not NOTICE.fullmatch(c.source)]
    cell = next((c for c in nb.cells if RECORD.fullmatch(c.source)), None)
    if cell is None: nb.cells.append(nbformat.v4.new_markdown_cell(text))
    else: cell.source = text


def execute(folder: Path) -> int:
    """Execute notebooks, of a folder or one alone, top to bottom in a fresh kernel, without the cells marked `eval: false`; say what changed.

    What the book finds is stored at its full size: it is left as it is unless `SAERAD_FULL` is 1.
    """
    from nbclient import NotebookClient
    os.environ.update(QUIET)
    full = os.environ.get("SAERAD_FULL") == "1"
    if not notebooks(folder): print(f"{folder}: no notebook there")
    for path in notebooks(folder):
        if NBS / "results" in path.parents and not full: continue
        nb, code, began = nbformat.read(path, 4), commit(), time.monotonic()
        before = [outputs_of(c) for c in nb.cells if c.cell_type == "code"]
        kept = {i: c.outputs for i, c in enumerate(nb.cells) if c.cell_type == "code" and SKIP.search(c.source)}
        for i in kept: nb.cells[i].metadata["tags"] = ["skip-execution"]
        NotebookClient(nb, timeout=None if full else 900, kernel_name="python3", coalesce_streams=True,
                       resources={"metadata": {"path": str(path.parent)}}).execute()
        for i, outputs in kept.items(): nb.cells[i].outputs = outputs
        for cell in nb.cells:
            for key in ("tags", "execution"): cell.metadata.pop(key, None)
        nb.metadata = {"kernelspec": KERNEL}
        if NBS / "results" in path.parents: record(nb, code, time.monotonic() - began)
        nbformat.write(nb, path)
        subprocess.run([BIN / "nbdev_clean", "--fname", path], check=True, cwd=ROOT)
        after = [outputs_of(c) for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
        print(f"{path.relative_to(ROOT)}: {'outputs as they were' if before == after else 'OUTPUTS CHANGED'}", flush=True)
        for a, b in zip(before, after, strict=True):
            if a != b: print("\n".join(list(difflib.unified_diff(a.splitlines(), b.splitlines(), lineterm="", n=0))[2:12]))
    return int(not notebooks(folder))


def site() -> int:
    """The book as a site in _site/: by Quarto where it is installed, else by site.py."""
    if not shutil.which("quarto"): return subprocess.run([sys.executable, Path(__file__).with_name("site.py")], cwd=ROOT).returncode
    subprocess.run([BIN / "nbdev_docs"], cwd=ROOT, check=True)
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")       # nbdev_docs has written one of its own
    shutil.rmtree(ROOT / "_site", ignore_errors=True)
    shutil.copytree(ROOT / "_docs", ROOT / "_site")
    shutil.copytree(ROOT / "figures", ROOT / "_site/figures")
    front = ROOT / "_site/index.html"
    page = front.read_text(encoding="utf-8").replace('"../figures/', '"figures/')      # the site is a folder that can be taken elsewhere
    front.write_text(page, encoding="utf-8")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=["check", "test", "execute", "readme", "site"])
    parser.add_argument("folder", nargs="?", default="nbs")
    parser.add_argument("--with-tests", action="store_true", help="test: run pytest beside the chapters")
    args = parser.parse_args()
    if args.action == "readme": return (ROOT / "README.md").write_text(readme(), encoding="utf-8") == 0
    if args.action == "execute": return execute((ROOT / args.folder).resolve())
    if args.action == "test": return test(args.with_tests)
    return int(globals()[args.action]())


if __name__ == "__main__": sys.exit(main())
