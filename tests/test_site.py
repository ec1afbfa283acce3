"""The site, built without Quarto from a small copy of the book: it works from a folder opened from disk, and its own check finds what is broken."""
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from conftest import violations

ROOT = Path(__file__).resolve().parent.parent
# a front page, pictures and formulas, two modules, a page in a folder, and three chapters that are looked for by words of the field
CHAPTERS = ("index", "sae/model", "sae/training", "guides/start_student", "show/portraits", "analysis/sparse_probing",
            "interpretation/hard_negatives")


def module(path):
    """A script's functions, under a name of its own."""
    spec = importlib.util.spec_from_file_location(f"site_of_{path.parent.parent.name}", path)
    made = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = made           # dataclasses look their module up
    spec.loader.exec_module(made)
    return made


def without_the_rest(text, chapter):
    """Markdown whose links to chapters that were left out are their words alone."""
    def kept(m):
        at = os.path.normpath(os.path.join(os.path.dirname(chapter), m[2]))
        return m[0] if at.removesuffix(".ipynb") in CHAPTERS or not m[2].endswith(".ipynb") else m[1]
    return re.sub(r"\[([^\]]*)\]\(([^)\s#]+)[^)\s]*\)", kept, text)


def copied(to, chapters=CHAPTERS):
    """The book with a few of its chapters, and the whole package."""
    for name in (".ci/site.py", ".ci/notebooks.py", "settings.ini", "setup.py", "README.md", *(f"nbs/{c}.ipynb" for c in chapters)):
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, to / name)
    shutil.copytree(ROOT / "saerad", to / "saerad", ignore=shutil.ignore_patterns("assets", "__pycache__"))      # nbdev writes into it
    (to / "saerad/assets").symlink_to(ROOT / "saerad/assets")
    for chapter in chapters:
        nb = nbformat.read(to / f"nbs/{chapter}.ipynb", 4)
        for cell in nb.cells:
            if cell.cell_type == "markdown": cell.source = without_the_rest(cell.source, chapter)
        nbformat.write(nb, to / f"nbs/{chapter}.ipynb")
    for name in ("configs", "benchmarks", "figures", "LICENSE"):
        if (ROOT / name).exists(): (to / name).symlink_to(ROOT / name)
    return to


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site's folder, the builder that made it, and what it knows of the book."""
    pytest.importorskip("zensical", reason="the site's generator is not installed")
    pytest.importorskip("latex2mathml", reason="the site's formulas are not installed")
    top = copied(tmp_path_factory.mktemp("book"))
    builder = module(top / ".ci/site.py")
    subprocess.run([sys.executable, "-c", builder.PROCESS], cwd=top, check=True, env={**os.environ, "PYTHONPATH": str(top)})
    book = builder.build(top / "_proc", top / "_site")
    return SimpleNamespace(folder=top / "_site", builder=builder, book=book)


def test_the_site_has_no_fault(site):
    """Links, anchors, pictures, raw markup; and a page for every name that the copied chapters export."""
    assert site.builder.check(site.folder) == []
    mine = [key for key in site.book.said if key.split(":")[0] in ("sae.model", "sae.training")]
    assert len(mine) > 20 and set(mine) <= set(site.book.names)
    assert all((site.folder / site.book.names[key].partition("#")[0]).is_file() for key in mine)


QUARTO = """#!/bin/sh
mkdir -p _docs
case "$*" in *README.md*) echo "Another README" > _docs/README.md;; *) echo '<img src="../figures/film.png">' > _docs/index.html;; esac
"""


def test_where_quarto_is_installed_nbdev_asks_it_and_the_readme_stays_ours(tmp_path):
    """Quarto itself is not here: a script stands in for it, so this says what is asked of it and not what it makes of that."""
    top = copied(tmp_path, ("index", "guides/start_student"))
    (top / "bin").mkdir()
    (top / "bin/quarto").write_text(QUARTO, encoding="utf-8")
    (top / "bin/quarto").chmod(0o755)
    (top / "README.md").unlink()                    # as old as can be, so that nbdev writes one
    env = {**os.environ, "PYTHONPATH": str(top), "PATH": f"{top / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run([sys.executable, top / ".ci/notebooks.py", "site"], cwd=top, check=True, env=env)
    assert (top / "README.md").read_text(encoding="utf-8").startswith("<!-- generated from nbs/index.ipynb")
    assert (top / "_site/index.html").read_text(encoding="utf-8") == '<img src="figures/film.png">\n' and (top / "_site/figures/film.png").is_file()
    assert (top / "_proc/index.ipynb").is_file() and (top / "_proc/guides/start_student.ipynb").is_file()


PLANTED = {"a link to a page that is not there": ('<a href="nothing.html">x</a>', "nothing.html, which is not there"),
           "a link to a place that is not on the page": ('<a href="sae/model.html#nowhere">x</a>', "no such place"),
           "a picture that is missing": ('<img src="gone.png" alt="">', "gone.png, which is not there"),
           "a script from elsewhere": ('<script src="https://example.org/x.js"></script>', "loads https://example.org/x.js"),
           "an address in memory": ("<pre>f(x=&lt;Ranks object at 0x7efec5&gt;)</pre>", "shows an address in memory"),
           "a raw link": ("<p>see [this](that.ipynb)</p>", "shows an unrendered link"),
           "a raw formula's mark": ("<p>FORMULA00001X</p>", "shows"), "raw emphasis": ("<p>it is **bold** here</p>", "shows unrendered emphasis")}


@pytest.mark.parametrize("what", PLANTED)
def test_the_check_finds(what, site, tmp_path):
    markup, said = PLANTED[what]
    for name in ("index.html", "sae/model.html"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(site.folder / name, tmp_path / name)
    before = set(site.builder.check(tmp_path))
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    (tmp_path / "index.html").write_text(page.replace("</article>", f"{markup}</article>", 1), encoding="utf-8")
    [problem] = set(site.builder.check(tmp_path)) - before
    assert problem.startswith("index.html") and said in problem


def test_a_page_that_is_too_large_is_found(site, tmp_path):
    (tmp_path / "index.html").write_text(f"<p>{'words ' * 200_000}</p>", encoding="utf-8")
    [problem] = site.builder.check(tmp_path)
    assert problem == "index.html has 1.2 MB before its images; cut it in two"


def test_results_lead_to_the_atlas_in_one_click(site, monkeypatch, tmp_path):
    assert "../show/atlas.html" in site.builder.way_to_the_atlas("results") and site.builder.way_to_the_atlas("sae") == ""
    monkeypatch.setattr(site.builder, "ATLAS", tmp_path)
    assert "(../atlas/index.html)" in site.builder.way_to_the_atlas("results")


FIELD_WORDS = {"logit lens": "show.portraits:logit_lens", "hard negatives": "interpretation.hard_negatives:add_hard_negatives",
               "activation patching": "analysis.patching", "sparse probing": "analysis.sparse_probing:sparse_probing",
               "dead features": "sae.training", "JumpReLU": "sae.model"}


@pytest.mark.parametrize("words", FIELD_WORDS)
def test_a_word_of_the_field_leads_to_its_function(words):
    """The search reads headings, prose and docstrings; it parts names at underscores, so a function is found by the words in its name."""
    module, _, name = FIELD_WORDS[words].partition(":")
    chapter = nbformat.read(ROOT / f"nbs/{module.replace('.', '/')}.ipynb", 4)
    prose = " ".join(c.source for c in chapter.cells if c.cell_type == "markdown")
    code = "".join(c.source for c in chapter.cells if c.cell_type == "code")
    assert re.search(words.replace(" ", r"\W+"), prose, re.IGNORECASE), "the chapter uses the field's word"
    assert not name or (f"def {name}(" in code and set(words.split()) & set(name.split("_")))


def test_a_name_without_a_page_is_found(site):
    less = SimpleNamespace(said={"sae.model:Nothing": ("", 1)}, names={})
    assert site.builder.check(site.folder, less) == ["sae.model:Nothing has no page of its own"]


def test_the_search_answers_in_a_folder_opened_from_disk(site, browser):
    page = browser.page()
    page.goto((site.folder / "index.html").as_uri())
    page.click(".md-search__button")
    page.keyboard.type("Matryoshka")
    hit = page.locator("a[href*='sae/model.html']").filter(has_text="Matryoshka").last
    hit.click()
    page.wait_for_url(re.compile(r"sae/model\.html"))
    assert "The sparse autoencoder" in page.inner_text("h1")


SEARCHED = {"logit lens": "show/portraits.html#logit_lens", "sparse probing": "analysis/sparse_probing.html#sparse_probing",
            "hard negatives": "interpretation/hard_negatives.html"}


@pytest.mark.parametrize("words", SEARCHED)
def test_the_search_finds_a_function_by_the_word_of_the_field(site, browser, words):
    page, (chapter, _, name) = browser.page(), SEARCHED[words].partition("#")
    page.goto((site.folder / "index.html").as_uri())
    page.click(".md-search__button")
    page.keyboard.type(words)
    page.get_by_text(re.compile(r"^\d+ results?$")).first.wait_for()
    page.keyboard.press("Enter")                    # the first of them
    page.wait_for_url(re.compile(rf"{re.escape(chapter)}\b.*{name}$"))


def test_formulas_are_drawn_and_pictures_are_there(site, browser):
    page = browser.page()
    page.goto((site.folder / "sae/training.html").as_uri())
    formulas = page.locator("article math").all()
    assert len(formulas) > 4 and all(f.bounding_box()["width"] > 0 for f in formulas)
    assert page.locator("div.math math[display=block] mfrac").count() >= 2 and "$" not in page.inner_text("article p >> nth=0")
    wide = page.evaluate("[...document.querySelectorAll('article img')].map(i => i.complete ? i.naturalWidth : -1)")
    alone = page.evaluate("[...document.querySelectorAll('article img')].filter(i => !i.alt.trim()).length")
    assert wide and min(wide) > 50 and alone == 0


def test_links_lead_from_page_to_page_and_into_the_reference(site, browser):
    page = browser.page()
    page.goto((site.folder / "index.html").as_uri())
    page.locator("article a[href='guides/start_student.html']").first.click()
    page.wait_for_url(re.compile(r"guides/start_student\.html"))
    page.go_back()
    page.goto((site.folder / "names.html").as_uri())
    page.locator("article a", has_text=re.compile("^SAEConfig$")).click()
    page.wait_for_url(re.compile(r"sae/model\.html#SAEConfig"))
    assert page.locator("#SAEConfig").count() == 1 and "group_fractions" in page.inner_text("article")
    page.locator(".source a").first.click()
    page.wait_for_url(re.compile(r"source/sae/model\.html#"))
    assert "saerad/sae/model.py" in page.inner_text("h1")


@pytest.mark.parametrize("name", ["index", "sae/training", "show/portraits", "names", "source/sae/model"])
def test_a_page_of_the_site_is_for_everybody(site, browser, axe, name):
    for width in (1280, 390):
        page = browser.page(width=width)
        page.goto((site.folder / f"{name}.html").as_uri())
        assert violations(page, axe) == [], width


def test_a_page_of_the_site_fits_a_phone(site, browser):
    page = browser.page(width=390)
    for name in ("index", "sae/model", "sae/training", "names"):
        page.goto((site.folder / f"{name}.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, name
