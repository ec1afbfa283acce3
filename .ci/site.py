"""The book as a site in _site/, without Quarto: nbdev renders the API into the notebooks, a short converter makes Markdown of them, Zensical the
pages. Mathematics becomes MathML here, sources become pages of their own, so the folder needs nothing from elsewhere. Then everything is checked."""
import ast
import base64
import html
import json
import posixpath
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from configparser import ConfigParser
from dataclasses import dataclass, field
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from notebooks import reading_order  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
BIN = Path(sys.executable).parent
FENCE = re.compile(r"(?s)(```.*?```|<pre>.*?</pre>|`[^`\n]+`)")
MATH = re.compile(r"(?s)\$\$(.+?)\$\$|(?<![\w\\$])\$(?=\S)([^$\n]+?)(?<=\S)\$(?![\w$])")
LINK = re.compile(r"(!?\[[^\]]*\])\(([^)\s]+)\)")
PARTS = {"studies": "Studies", "subjects": "Subject models", "activations": "Activations", "sae": "The SAE", "interpretation": "Interpretation",
         "steering": "Steering", "show": "Figures and atlas", "run": "Runs", "analysis": "Analysis", "": "Beside them", "guides": "Guides",
         "results": "What the book finds"}
ATLAS = ROOT / "runs/phantom/atlas"                 # of the bundled run; it goes into the site where `make run` has made it
LARGEST = 1_000_000                                 # bytes of a page before its images
START = ("start_interpretability", "start_radiology_ai", "start_radiologist", "start_student")
# nbdev_proc_nbs, which would install Quarto and, by whatever pip comes first, the package, although nothing here needs either
PROCESS = "from nbdev import quarto; quarto._ensure_quarto = lambda: None; quarto.nbdev_proc_nbs.__wrapped__()"
STYLE = """
.md-typeset pre.output { border-left: .2rem solid var(--md-default-fg-color--lightest); padding: .4rem .8rem;
  overflow-x: auto; font-size: .75em; line-height: 1.45 }
.md-typeset pre.wrap { white-space: pre-wrap; overflow-wrap: anywhere }
.md-typeset .shown { overflow-x: auto }
.md-typeset .shown table { display: table; font-size: .65rem; border: 0; border-collapse: collapse }
.md-typeset .shown :is(th, td) { padding: .15rem .5rem; text-align: right; border: solid var(--md-default-fg-color--lightest); border-width: 0 0 1px }
.md-typeset .shown thead tr:last-child th { border-bottom-color: var(--md-default-fg-color--light) }
.md-typeset div.math { overflow-x: auto; margin: 1em 0 }
.md-typeset math { font-size: 1.05em; font-family: "Latin Modern Math", "STIX Two Math", "Cambria Math", "DejaVu Math TeX Gyre", math }
.md-typeset pre > code { font-size: .76em }
.md-typeset .source { float: right; font-size: .6rem; margin-top: -2.6em }
.md-typeset td:first-child code { white-space: nowrap }
.md-grid { max-width: 72rem }
[data-md-color-scheme=default] .md-nav__link--active { color: #3344b8 !important }
.md-typeset :is(p, ul, ol, blockquote, h1) { max-width: 40rem }
.md-typeset p:has(img) { max-width: none }
@media (min-width: 76.25em) { .md-sidebar { width: 10.4rem } }
@media (max-width: 44.9em) {
  .md-typeset .source { float: none; display: block; margin: -.6em 0 .6em }
  .md-typeset table:not([class]) :is(th, td) { min-width: 0; padding: .4em .5em }
}
"""


DISK = """new MutationObserver(() => {          // the theme wraps wide tables later; by keys they are scrolled only where they take the focus
  for (const wrap of document.querySelectorAll(".md-typeset__scrollwrap:not([tabindex])")) wrap.tabIndex = 0;
}).observe(document, { childList: true, subtree: true });
if (location.protocol === "file:") {
  const source = SOURCE, Plain = Worker;
  const held = url => String(url).includes("/workers/search.") ? URL.createObjectURL(new Blob([source], { type: "text/javascript" })) : url;
  window.Worker = class extends Plain { constructor(url, options) { super(held(url), options); } };
}
"""


def settings() -> dict[str, str]:
    """What settings.ini says of the project."""
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(config["DEFAULT"])


def front_matter(nb: nbformat.NotebookNode, otherwise: str) -> tuple[str, str]:
    """Title and description, which nbdev takes out of the first Markdown cell."""
    said = yaml.safe_load(next((c.source for c in nb.cells if c.cell_type == "raw"), "").strip().strip("-")) or {}
    return str(said.get("title", otherwise)), str(said.get("description", ""))


def module_of(at: Path) -> str:
    """Name of the module that a notebook exports; empty where it exports none."""
    text = "\n".join(c.source for c in nbformat.read(NBS / at, 4).cells if c.cell_type == "code")
    found = re.search(r"(?m)^#\|\s*default_exp\s+([\w.]+)", text)
    return found[1] if found else ""


@dataclass
class Book:
    """What the pages of one site share."""
    docs: Path
    pages: list[tuple[str, str, str]] = field(default_factory=list)     # part, title, file
    formulas: list[str] = field(default_factory=list)                   # MathML, in the order of their marks
    files: dict[str, Path] = field(default_factory=dict)                # of the repository that pages link to: address in the site → file
    names: dict[str, str] = field(default_factory=dict)                 # module:name → address
    said: dict[str, tuple[str, int]] = field(default_factory=dict)      # module:name → first line of its docstring, line in the module

    def formula(self, tex: str, display: bool) -> str:
        """A mark that survives Markdown; `finish` puts MathML in its place."""
        from latex2mathml.converter import convert
        made = convert(tex, display="block" if display else "inline").replace("<mo>&#x02016;", '<mo stretchy="false">&#x02016;')
        self.formulas.append(f'<div class="math">{made}</div>' if display else made)
        return f"FORMULA{len(self.formulas) - 1:05d}X"


def outside_code(text: str, change) -> str:
    """`text` with `change` applied to what is neither code nor preformatted."""
    return "".join(part if i % 2 else change(part) for i, part in enumerate(FENCE.split(text)))


def with_mathml(text: str, book: Book) -> str:
    """Formulas between dollars become marks."""
    return outside_code(text, lambda t: MATH.sub(lambda m: book.formula(m[1] or m[2], bool(m[1])), t))


def relinked(text: str, folder: str, book: Book, home: str) -> str:
    """Links to notebooks become links to pages, links to modules links to their sources here, and other files of the repository are taken along."""
    def target(m: re.Match) -> str:
        url, up = m[2], "../" * bool(folder)
        for prefix in ("https://saerad.github.io/saerad/", home):
            if url.startswith(prefix): return f"{m[1]}({up}{url[len(prefix):]})"
        found = re.match(r".*/blob/[^/]+/saerad/([\w/]+)\.py#L(\d+)", url)
        if found: return f"{m[1]}({up}source/{found[1]}.html#__codelineno-0-{found[2]})"
        if urlsplit(url).scheme or url.startswith("#"): return m[0]
        path, _, anchor = url.partition("#")
        where = posixpath.normpath(posixpath.join("nbs", folder, path))
        if where.startswith("nbs/") and (ROOT / where).with_suffix(".ipynb").is_file():   # nbdev has already made some of them .html
            return f"{m[1]}({up}{posixpath.splitext(where)[0][4:]}.html{'#' * bool(anchor)}{anchor})"
        file = ROOT / where
        if file.is_file():
            book.files[f"files/{where}"] = file
            return f"{m[1]}({up}files/{where})"
        return m[0]
    return outside_code(text, lambda t: LINK.sub(target, t))


def in_short(markdown: str) -> str:
    """The last paragraph of a text as one line without markup, for those who cannot see the picture under it."""
    paragraphs = [p for p in re.split(r"\n\s*\n", re.sub(r"(?m)^#+ .*$", "\n", markdown))
                  if p.strip() and p.lstrip()[0] not in "|-<`$"]
    words = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", paragraphs[-1] if paragraphs else "").split()
    text = re.sub(r"[\[\]*`$\\]", "", " ".join(words))
    if len(text) <= 160: return text
    whole = re.match(r".{40,160}[.:?](?= )", text)
    return whole[0] if whole else text[:160].rsplit(" ", 1)[0] + " …"


def shown(cell: nbformat.NotebookNode, stem: str, number: int, folder: Path, about: str) -> Iterator[str]:
    """A code cell's outputs: pictures beside the page, tables as they are, text preformatted; `about` says what a picture shows."""
    for j, out in enumerate(cell.outputs):
        data = out.get("data", {})
        picture = next((k for k in ("image/svg+xml", "image/png", "image/jpeg") if k in data), None)
        if picture:
            name = f"{stem}-{number}-{j}.{ {'image/svg+xml': 'svg', 'image/png': 'png', 'image/jpeg': 'jpg'}[picture] }"
            raw = data[picture]
            (folder / name).write_bytes(raw.encode() if picture.endswith("xml") else base64.b64decode(raw))
            yield f"[![{about or 'what the cell above shows'}]({name})]({name})"        # a phone shows it small; alone it can be made larger
        elif "text/markdown" in data: yield data["text/markdown"]
        elif "text/html" in data: yield f'<div class="shown">{one_block(data["text/html"])}</div>'
        else:
            text = out.get("text", "") or data.get("text/plain", "")
            columns = re.search(r"\S {3,}\S", text)            # a table in plain text must keep its lines, a sentence need not
            if text.strip(): yield f'<pre class="output{"" if columns else " wrap"}">{as_text(text)}</pre>'


def one_block(markup: str) -> str:
    """HTML that Markdown takes as one block: no empty lines, no indentation."""
    return "\n".join(line.strip() for line in re.sub(r"(?s)<style.*?</style>", "", markup).splitlines() if line.strip())


def as_text(text: str) -> str:
    """Text for a <pre>, whose empty lines do not end it."""
    return html.escape(text.rstrip()).replace("\n\n", "\n&#8203;\n").replace("\n\n", "\n&#8203;\n")


def modules() -> dict[str, Path]:
    """Every module of the package with its file, by its name inside the package: sae.model."""
    return {".".join(p.relative_to(ROOT / "saerad").with_suffix("").parts): p for p in sorted((ROOT / "saerad").rglob("[!_]*.py"))}


def file_of(module: str) -> Path: return (ROOT / "saerad").joinpath(*module.split(".")).with_suffix(".py")


def source_page(module: str) -> str: return f"source/{module.replace('.', '/')}"


def fields_of(module: str, name: str) -> str:
    """The fields of a class with their comments, as they stand in its module; nothing for what has none."""
    source = file_of(module).read_text(encoding="utf-8")
    made = next((n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == name), None)
    fields = [n for n in made.body if isinstance(n, ast.AnnAssign)] if made else []
    if not fields: return ""
    lines = source.split("\n")[fields[0].lineno - 1:fields[-1].end_lineno]
    return f"\n\n```python\n{textwrap.dedent(chr(10).join(lines))}\n```"


def documented(text: str, name: str, book: Book, page: str, module: str) -> str:
    """What `show_doc(name)` wrote, under the name as it is called, with an anchor that is the name itself and a link to the source."""
    book.names.setdefault(f"{module}:{name}", f"{page}#{name}")
    line = book.said.get(f"{module}:{name}", ("", 1))[1]
    source = f'<span class="source">[source]({"../" * page.count("/")}{source_page(module)}.html#__codelineno-0-{line})</span>'
    text = re.sub(r'\[source\]\([^)]*\)\{[^}]*\}\n*', "", text.removeprefix("---\n\n"))
    text = re.sub(r"<(?:\w+\.)*(\w+) object at 0x[0-9a-f]+>", r"\1()", text).replace(f"{ROOT}/", "")      # defaults, as one would write them
    fields = fields_of(module, name)
    if fields: text = re.sub(r"(?s)```python\s+def [^`]*\*\*data[^`]*```\s*", "", text, count=1)      # pydantic's own signature says less
    return re.sub(r"(?m)^(#{2,4}) \S+$", rf'<a id="{name}"></a>\n\n\1 {name}\n\n{source}', text, count=1) + fields


def markdown_of(nb: nbformat.NotebookNode, at: Path, folder: Path, book: Book) -> str:
    """One processed notebook as Markdown."""
    title, description = front_matter(nb, at.stem)
    parts, stem, page, module = [f"# {title}"] + [f"> {description}"] * bool(description), at.stem, at.with_suffix(".html").as_posix(), module_of(at)
    about = description
    for i, cell in enumerate(nb.cells):
        if cell.cell_type == "raw": continue
        if cell.cell_type == "markdown":
            parts.append(with_mathml(cell.source, book))
            about = in_short(cell.source) or about
            continue
        if "include: false" in cell.source: continue
        source = "\n".join(s for s in cell.source.split("\n") if not s.startswith("#|")).strip()
        called = re.match(r"show_doc\(([\w.]+)", source)
        if called:
            parts += [documented(part, called[1], book, page, module) for part in shown(cell, stem, i, folder, about)]
            continue
        if source and "echo: false" not in cell.source: parts.append(f"```python\n{source}\n```")
        parts += shown(cell, stem, i, folder, about)
    return "\n\n".join(parts) + "\n"


def way_to_the_atlas(folder: str) -> str:
    """What stands at the head of every chapter of results: the features that it speaks of are one click away."""
    if folder != "results": return ""
    if ATLAS.is_dir(): return "[The features of the bundled run in its atlas](../atlas/index.html)\n\n"
    return "[How to look at a run's features: the atlas](../show/atlas.html) (`make run` makes the bundled run's, in `runs/phantom/atlas`)\n\n"


def write_pages(processed: Path, book: Book) -> None:
    """Every notebook that nbdev processed becomes a page."""
    config = settings()
    home = f"{config['doc_host']}{config['doc_baseurl']}/"
    order = {name: i for i, name in enumerate(reading_order())}
    found = [p.relative_to(processed) for p in processed.rglob("*.ipynb")]
    for at in sorted(found, key=lambda at: (order.get(at.as_posix(), len(order)), at)):
        path = processed / at
        if any(part[0] in "._" for part in at.parts): continue
        nb = nbformat.read(path, 4)
        out = book.docs / at.with_suffix(".md")
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = "" if at.parent == Path(".") else at.parent.as_posix()
        text = relinked(markdown_of(nb, at, out.parent, book), folder, book, home)
        out.write_text(re.sub(r"(?m)\A(# .*\n\n(?:> .*\n\n)?)", lambda m, way=way_to_the_atlas(folder): m[0] + way, text), encoding="utf-8")
        book.pages.append((folder, front_matter(nb, at.stem)[0], at.with_suffix(".md").as_posix()))


def summaries() -> dict[str, tuple[str, int]]:
    """First line of the docstring, and line in its module, of everything public in the package, by module and name."""
    lines = {}
    for module, path in modules().items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                patched = [a.annotation for a in getattr(node, "args", ast.arguments([], [])).args[:1]
                           if any("patch" in ast.unparse(d) for d in node.decorator_list)]
                owner = f"{ast.unparse(patched[0])}." if patched and patched[0] is not None else ""
                lines[f"{module}:{owner}{node.name}"] = ((ast.get_docstring(node) or "").split("\n")[0], node.lineno)
    return lines


def write_reference(book: Book) -> None:
    """A page that lists every exported name, and a page for the source of each module."""
    parts = ["# Every name", "> What each module exports, and where it is explained"]
    for module, path in modules().items():
        title = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]
        parts.append(f"## saerad.{module}\n\n{title} ([source]({source_page(module)}.md))")
        rows = [(key, key.split(":")[1], line) for key, (line, _) in book.said.items() if key.split(":")[0] == module]
        parts.append("\n".join(f"- [`{name}`]({book.names[key]}) {line}" if key in book.names else f"- `{name}` {line}" for key, name, line in rows))
        page = book.docs / f"{source_page(module)}.md"
        page.parent.mkdir(parents=True, exist_ok=True)
        code = path.read_text(encoding="utf-8")
        page.write_text(f"# saerad/{module.replace('.', '/')}.py\n\n```python linenums=\"1\"\n{code}```\n", encoding="utf-8")
    (book.docs / "names.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def navigation(book: Book) -> str:
    """The site's order: the front page, where to start, the rooms of the book, guides, results, reference."""
    def entry(title: str, page: str) -> str: return '{"' + title.replace('"', "'") + f'" = "{page}"' + "}"
    start = [entry(t, p) for _, t, p in sorted(book.pages, key=lambda x: START.index(Path(x[2]).stem) if Path(x[2]).stem in START else 99)
             if Path(p).stem in START]
    sections = ['{"saerad" = "index.md"}'] + ['{"Where to start" = [' + ", ".join(start) + "]}"] * bool(start)
    for part, heading in PARTS.items():
        mine = [entry(t, p) for folder, t, p in book.pages if folder == part and p != "index.md" and Path(p).stem not in START]
        if mine: sections.append(f'{{"{heading}" = [' + ", ".join(mine) + "]}")
    sources = [entry(f"{name.replace('.', '/')}.py", f"{source_page(name)}.md") for name in modules()]
    sections.append('{"Reference" = [{"Every name" = "names.md"}, {"Sources" = [' + ", ".join(sources) + "]}]}")
    return ",\n  ".join(sections)


def build(processed: Path, out: Path) -> Book:
    """Pages, reference, Zensical, formulas, files: the whole site, in `out`."""
    with tempfile.TemporaryDirectory() as temp:
        book = Book(Path(temp) / "docs", said=summaries())
        (book.docs / "assets").mkdir(parents=True)
        write_pages(processed, book)
        write_reference(book)
        (book.docs / "assets" / "book.css").write_text(STYLE, encoding="utf-8")
        (Path(temp) / "zensical.toml").write_text(
            f'[project]\nsite_name = "saerad"\nsite_description = "{settings()["description"]}"\nuse_directory_urls = false\n'
            f'extra_css = ["assets/book.css"]\nnav = [\n  {navigation(book)}\n]\n\n[project.theme]\nfont = false\n'
            'features = ["content.code.copy", "navigation.footer", "navigation.top", "navigation.sections", "search.highlight", "toc.follow"]\n\n'
            '[[project.theme.palette]]\nscheme = "default"\ntoggle.icon = "lucide/sun"\ntoggle.name = "Dark"\n\n'
            '[[project.theme.palette]]\nscheme = "slate"\ntoggle.icon = "lucide/moon"\ntoggle.name = "Light"\n', encoding="utf-8")
        subprocess.run([BIN / "zensical", "build", "--clean"], cwd=temp, check=True)
        finish(Path(temp) / "site", book)
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(Path(temp) / "site", out)
    return book


def finish(site: Path, book: Book) -> None:
    """Put the formulas where their marks are, and the repository's files beside the pages."""
    for page in site.rglob("*"):
        if page.suffix not in (".html", ".json", ".js"): continue
        text = page.read_text(encoding="utf-8")
        if "FORMULA" not in text: continue
        put = partial(formula_at, page=page, book=book)
        page.write_text(re.sub(r"(<p>)?FORMULA(\d{5})X(?(1)</p>)", put, text), encoding="utf-8")
    if ATLAS.is_dir(): shutil.copytree(ATLAS, site / "atlas")
    for address, file in book.files.items():
        (site / address).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, site / address)
    from_disk(site)


UNNAMED = re.compile(r'<a (?=[^>]*(?:id|href)="#?__codelineno)')


def for_keys(text: str) -> str:
    """A page's lines of code are no stops of the tab key, and what can be scrolled sideways is one."""
    text = UNNAMED.sub('<a tabindex="-1" aria-hidden="true" ', text).replace('<pre class="output', '<pre tabindex="0" class="output')
    for kind, name in (("shown", "output"), ("math", "formula")):
        text = text.replace(f'<div class="{kind}">', f'<div class="{kind}" tabindex="0" role="group" aria-label="{name}">')
    return text


def from_disk(site: Path) -> None:
    """Let the search work in a folder opened from disk, where a page may neither fetch its index nor start a worker from a file."""
    worker = json.dumps(next((site / "assets/javascripts/workers").glob("search.*.js")).read_text(encoding="utf-8")).replace("</", "<\\/")
    (site / "search.js").write_text(f"var __index = {(site / 'search.json').read_text(encoding='utf-8')};\n", encoding="utf-8")
    (site / "assets" / "disk.js").write_text(DISK.replace("SOURCE", worker), encoding="utf-8")
    for page in site.rglob("*.html"):
        up = "../" * (len(page.relative_to(site).parts) - 1)
        if page.relative_to(site).parts[0] not in ("files", "atlas"):
            text = for_keys(page.read_text(encoding="utf-8"))
            text = text.replace("<head>", f'<head><script src="{up}assets/disk.js"></script>', 1)
            page.write_text(text, encoding="utf-8")


def formula_at(m: re.Match, page: Path, book: Book) -> str:
    """The MathML of a mark; in the search index the symbols alone."""
    made = book.formulas[int(m[2])]
    if page.suffix != ".html": return json.dumps(re.sub(r"<[^>]*>", "", made), ensure_ascii=False)[1:-1]
    return made if made.startswith("<div") else f"{m[1] or ''}{made}{'</p>' * bool(m[1])}"


class Links(HTMLParser):
    """What a page points to, what can be pointed to in it, and its visible text outside code."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.loaded: list[str] = []        # of the targets, what a browser asks for by itself
        self.anchors: set[str] = set()
        self.text: list[str] = []
        self.code: list[str] = []
        self.inside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.anchors |= {given[a] for a in ("id", "name") if given.get(a)}
        told = tag == "link" and given.get("rel") in ("canonical", "preconnect")     # to machines, not followed
        self.targets += [given[a] for a in ("href", "src") if given.get(a) and not told]
        self.loaded += [given[a] for a in ("href", "src") if given.get(a) and not told and (tag == "link" or a == "src")]
        data = tag == "table" and "dataframe" in (given.get("class") or "")       # an output's table holds data, whatever they look like
        if tag in ("pre", "code", "script", "style", "nav", "math") or data: self.inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.inside and self.inside[-1] == tag: self.inside.pop()

    def handle_data(self, data: str) -> None:
        (self.code if self.inside else self.text).append(data)


UNSTABLE = {"an address in memory": " object at 0x", "a folder of this machine": f"{ROOT}/"}
RAW = {"an unrendered fence": r"```", "an unrendered table": r"\|\s*-{3,}\s*\|", "an unrendered formula": r"\$\$|FORMULA\d{5}",
       "an unrendered link": r"\]\([\w./#]+\)", "Quarto's own markup": r"\{=html\}|^:::|\{target=",
       "an unrendered heading": r"(?m)^#{2,4} \w", "unrendered emphasis": r"(?<!\w)\*\*\w[^*\n]*\*\*"}


def check(site: Path, book: Book | None = None) -> list[str]:
    """What is wrong with a site: links and pictures that lead nowhere, addresses elsewhere that load something, raw markup, names without a page."""
    pages = {}
    for path in sorted(site.rglob("*.html")):
        page = Links()
        page.feed(path.read_text(encoding="utf-8"))
        pages[path.relative_to(site).as_posix()] = page
    problems = []
    for name, page in pages.items():
        if name == "404.html" or name.startswith(("files/", "atlas/")): continue
        if (size := (site / name).stat().st_size) > LARGEST and not name.startswith("source/"):
            problems.append(f"{name} has {size / 1e6:.1f} MB before its images; cut it in two")
        for url in page.targets: problems += dead(url, name, pages, site)
        problems += [f"{name} loads {url}, which is not in the folder" for url in page.loaded if urlsplit(url).netloc]
        text = "\n".join(page.text)
        problems += [f"{name} shows {what}" for what, mark in UNSTABLE.items() if not name.startswith("source/") and mark in "\n".join(page.code)]
        problems += [f"{name} shows {what}: {found[0][:60]!r}" for what, pattern in RAW.items() if (found := re.search(pattern, text))]
    if book is not None:
        problems += [f"{key} has no page of its own" for key in book.said if key not in book.names]
    return problems


def dead(url: str, page: str, pages: dict[str, Links], site: Path) -> list[str]:
    """Why a link cannot be followed; nothing, where it can. Links to other sites are not followed."""
    parts = urlsplit(url)
    if parts.scheme in ("http", "https", "mailto", "data", "javascript"): return []
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), unquote(parts.path))) if parts.path else page
    if path in pages and parts.fragment and unquote(parts.fragment) not in pages[path].anchors and not parts.fragment.startswith("__"):
        return [f"{page} links to {url}: no such place on that page"]
    target = site / path
    return [] if target.is_file() or (target / "index.html").is_file() else [f"{page} links to {url}, which is not there"]


def main() -> int:
    index = ROOT / "saerad/_modidx.py"
    names = index.read_bytes()
    try: subprocess.run([sys.executable, "-c", PROCESS], cwd=ROOT, check=True)
    finally: index.write_bytes(names)       # nbdev writes it anew, without the names
    book = build(ROOT / "_proc", ROOT / "_site")
    problems = check(ROOT / "_site", book)
    for problem in problems: print(problem)
    print(f"{len(book.pages)} pages, {len(book.names)} names explained, {len(book.formulas)} formulas in _site/; {len(problems)} problems")
    return bool(problems)


if __name__ == "__main__": sys.exit(main())
