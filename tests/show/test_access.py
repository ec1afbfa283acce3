"""Every kind of page that a reader opens, at two widths: no violation of WCAG 2.2 A or AA that axe-core finds, and nothing wider than a phone.

The pages that need a server are in test_ask.py, those of the book's site in test_site.py."""
import shutil

import pytest
from conftest import violations
from test_atlas import with_views

from saerad.show.atlas import AtlasConfig, build_atlas
from saerad.show.figures import FiguresConfig, draw_figures
from saerad.show.invented import invent_run
from saerad.show.lab import compare
from saerad.show.review import review_pack


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = invent_run(tmp_path_factory.mktemp("run"))
    best = with_views(folder)
    draw_figures(folder, FiguresConfig(dpi=60), ["f1", "steering"])
    build_atlas(folder)
    review_pack(folder, folder / "review", "top:4", contexts=3)
    shutil.copytree(folder, folder / "published")
    build_atlas(folder / "published", AtlasConfig(publish=True))
    compare(folder, folder / "published").write(folder / "comparison.html")
    return folder, best


PAGES = {"first": ("atlas/index.html", ".concept"),
         "feature": ("atlas/index.html#feature=BEST", "#feature .context"),
         "study": ("atlas/index.html#page=study&id=p000000-s1", "#page .reading"), "studies": ("atlas/index.html#page=study", "#page .studies"),
         "compare": ("atlas/index.html#page=compare&a=BEST&b=1", "#page .sides"),
         "choose a pair": ("atlas/index.html#page=compare&a=BEST", "#page form"),
         "group": ("atlas/index.html#page=group&id=0", "#page table"),
         "pinned": ("atlas/index.html#page=pins&pins=BEST,1", "#page table"), "ask": ("atlas/index.html#page=ask", "#page .notice"),
         "report": ("report.html", ".asks"), "review": ("review/review.html", ".item"), "comparison of runs": ("comparison.html", "table"),
         "published": ("published/atlas/index.html", "#table .tabulator-row a"),
         "published feature": ("published/atlas/index.html#feature=BEST", "#feature .scores")}


@pytest.mark.parametrize("name", PAGES)
def test_no_violation_is_found(run, browser, axe, name):
    (folder, best), (where, ready) = run, PAGES[name]
    page = browser.page(width=1280)
    page.goto(f"{folder.as_uri()}/{where.replace('BEST', str(best))}")
    page.wait_for_selector(ready)
    if name == "first": page.wait_for_selector("#table .tabulator-row a")
    assert violations(page, axe) == []
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert violations(page, axe) == [], "and a finger finds every control"


def test_an_enlarged_film_and_an_open_filter_have_none_either(run, browser, axe):
    folder, best = run
    page = browser.page(width=1280)
    page.goto(f"{folder.as_uri()}/atlas/index.html")
    page.wait_for_selector("#table .tabulator-row a")
    page.click("#more summary")
    assert violations(page, axe) == []
    page.goto(f"{folder.as_uri()}/atlas/index.html#feature={best}")
    page.click("#feature .larger >> nth=0")
    page.wait_for_selector("dialog[open]")
    assert violations(page, axe) == []
