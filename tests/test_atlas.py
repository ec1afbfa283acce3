"""The atlas and the report: what they show, what they must never show, and that a browser can open them from disk."""
import csv
import json
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from saerad.atlas import (
    COLUMNS,
    NOTICES,
    AtlasConfig,
    build_atlas,
    changes,
    example_steered,
    feature_table,
    headlines,
    review_pack,
    review_score,
    shade,
    write_atlas,
    write_report,
)
from saerad.core import UserError, read_table, write_table
from saerad.figures import FiguresConfig, RunTables, draw_figures, invent_run
from saerad.studies import StudiesConfig, open_source

NASTY = '<script>document.title = "broken"</script>'


def with_films(folder):
    "An invented run on a small phantom, two contexts of each feature being films."
    studies = {"source": "phantom:0", "train_patients": 3, "validation_patients": 1, "test_patients": 1}
    (folder / "config.yaml").write_text(yaml.safe_dump({"studies": studies, "subject": {"model": "mini"}}))
    ids = [s.study for s in open_source(StudiesConfig(**studies))]
    rows = read_table(folder / "exemplars/exemplars.parquet").to_pylist()
    for row in rows:
        if row["study"] == "s0": row.update(section="image", view="frontal", tokens=["[image]"], activations=[3.0], peak=0, study=ids[0])
        else: row["tokens"][4] = NASTY
    write_table(folder / "exemplars/exemplars.parquet", pa.Table.from_pylist(rows))
    path = folder / "interpretations/interpretations.parquet"
    table = read_table(path).to_pandas()
    best = table.f1.idxmax()
    table.loc[best, "explanation"] = f"fires on {NASTY}"
    write_table(path, pa.Table.from_pandas(table))
    return int(table.feature[best])


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    run = invent_run(tmp_path_factory.mktemp("run"))
    best = with_films(run)
    draw_figures(run, FiguresConfig(dpi=60), ["f1", "steering", "film"])
    build_atlas(run)
    return run, best


@pytest.fixture
def copy(built, tmp_path):
    shutil.copytree(built[0], tmp_path / "run")
    return tmp_path / "run"


def data(path):
    "The arguments of the call in a data script."
    call = re.fullmatch(r"saerad\.\w+\((.*)\);\n", path.read_text(), re.DOTALL)[1]
    return json.loads(f"[{call}]")


def everything(folder):
    return "\n".join(p.read_text() for p in sorted(folder.rglob("*")) if p.suffix in (".html", ".js"))


# ---- pieces ---------------------------------------------------------------------------------------------------------

@given(st.text("ab .\n", max_size=40), st.text("ab .\n", max_size=40))
def test_both_reports_can_be_read_off_their_changes(before, after):
    pieces = changes(before, after)
    for text, kinds in ((before, "=-"), (after, "=+")):
        assert "".join(t for k, t in pieces if k in kinds) == (text.lstrip() if text.strip() else "")
    assert changes(before, before) in ([], [["=", before.lstrip()]])


def test_changes_are_whole_words():
    assert changes("a small effusion.", "a smaller effusion.") == [["=", "a "], ["-", "small "], ["+", "smaller "], ["=", "effusion."]]


@given(st.lists(st.floats(-10, 100), max_size=6), st.floats(0, 100))
def test_shades_stay_readable(activations, top):
    shades = shade(activations, top)
    assert len(shades) == len(activations) and all(0 <= s <= 0.55 for s in shades)


def test_headlines_leave_out_what_is_missing():
    assert headlines({"sae": {"loss_recovered": 0.9, "dead": None}, "steering": None}) == headlines({}) == []
    assert headlines({"truth": {"report_finding_f1": 0.912}}) == [
        ("The subject model's own reports find what is on the film with a macro F1 of 0.91.", "")]


# ---- the atlas ------------------------------------------------------------------------------------------------------

def test_the_table_has_every_feature_and_its_scores(built):
    run, _ = built
    [table] = data(run / "atlas/data/table.js")
    scores = read_table(run / "interpretations/interpretations.parquet").to_pandas()
    names = [c["name"] for c in table["columns"]]
    assert names == [c["name"] for c in COLUMNS] and [r[0] for r in table["rows"]] == scores.feature.tolist()
    f1 = [r[names.index("f1")] for r in table["rows"]]
    assert [v is None for v in f1] == scores.f1.isna().tolist() and max(v for v in f1 if v) == pytest.approx(scores.f1.max(), abs=1e-5)
    steered = {r[0] for r in table["rows"] if r[names.index("on_target")] is not None}
    assert steered == set(read_table(run / "steering/judgements.parquet").to_pandas().query("not control").feature)


def test_a_page_holds_the_feature_that_it_names(built):
    run, best = built
    number, features = data(run / f"atlas/data/features-{best // 32:04d}.js")
    page = features[str(best)]
    exemplars = [e for e in read_table(run / "exemplars/exemplars.parquet").to_pylist() if e["feature"] == best]
    assert number == best // 32 and len(page["exemplars"]) == len(exemplars)
    assert page["exemplars"][0]["activations"] == pytest.approx(max((e["activations"] for e in exemplars), key=max), abs=1e-4)
    assert sum(page["places"].values()) == pytest.approx(1, abs=1e-3)
    for shares in page["outcomes"].values(): assert sum(shares.values()) == pytest.approx(1)
    assert len(page["steered"]) == 4 and "on target" in page["steered"][0]["title"]
    films = [e["film"] for e in page["exemplars"] if e["film"]]
    assert len(films) == 1 and (run / "atlas" / films[0]).stat().st_size > 500


def test_numbers_of_contexts_and_pairs_are_settings(copy):
    write_atlas(copy, AtlasConfig(exemplars=2, steered=1, films=False))
    pages = {k: v for path in (copy / "atlas/data").glob("features-*.js") for k, v in data(path)[1].items()}
    assert max(len(p["exemplars"]) for p in pages.values()) == 2 and max(len(p["steered"]) for p in pages.values()) == 1
    assert not list(copy.rglob("films/*"))


def test_no_text_can_become_markup(built):
    run, _ = built
    assert "<script>document" not in everything(run / "atlas") and "<script>document" not in (run / "report.html").read_text()
    assert "\\u003cscript>document" in everything(run / "atlas") and "&lt;script&gt;document" in (run / "report.html").read_text()


def test_a_published_edition_holds_no_text_no_film_and_no_study(copy):
    exemplars = read_table(copy / "exemplars/exemplars.parquet").to_pylist()
    assert "There is" in everything(copy / "atlas") and exemplars[0]["study"] in everything(copy / "atlas")
    index = build_atlas(copy, AtlasConfig(publish=True))
    shown = everything(index.parent) + (copy / "report.html").read_text()
    studies = {f"study {e['study']}" for e in exemplars}
    for secret in ("There is", "\"tokens\"", "[image]", "data:image/png", *studies): assert secret not in shown, secret
    assert not (copy / "atlas/films").exists() and NOTICES[True] in shown and "drawn into it" not in shown
    assert all(not p["exemplars"] and not p["steered"] for path in index.parent.glob("data/features-*.js") for p in data(path)[1].values())


def test_publishing_over_a_private_atlas_leaves_none_of_it(copy):
    assert list((copy / "atlas/films").glob("*.png"))
    (copy / "atlas/data/features-9999.js").write_text("There is a small effusion")
    write_atlas(copy, AtlasConfig(publish=True))
    assert "There is" not in everything(copy / "atlas") and not (copy / "atlas/films").exists()


def test_the_same_run_gives_the_same_bytes(copy):
    def all_bytes(): return {p.relative_to(copy): p.read_bytes() for p in (*copy.glob("atlas/**/*.*"), copy / "report.html")}
    build_atlas(copy)
    first = all_bytes()
    build_atlas(copy)
    assert all_bytes() == first


def test_an_unfinished_run(copy):
    shutil.rmtree(copy / "steering")
    shutil.rmtree(copy / "interpretations")
    shutil.rmtree(copy / "figures")
    (copy / "config.yaml").unlink()
    (copy / "summary.json").unlink()
    page = (build_atlas(copy).parent.parent / "report.html").read_text()
    assert "No feature has been described" in page and "No stage has left a number" in page and "No figures" in page
    assert feature_table(RunTables(copy)).f1.isna().all()
    shutil.rmtree(copy / "exemplars")
    with pytest.raises(UserError, match="saerad exemplars"): write_atlas(copy)
    assert write_report(copy).exists()


def test_a_source_that_is_gone_leaves_words_instead_of_films(copy):
    (copy / "config.yaml").write_text(yaml.safe_dump({"studies": {"source": "mimic-cxr:/no/such/folder"}}))
    write_atlas(copy)
    assert "[image]" in everything(copy / "atlas") and not (copy / "atlas/films").exists()


# ---- the report -----------------------------------------------------------------------------------------------------

def test_the_report_is_one_file_with_its_figures(built):
    run, best = built
    page = (run / "report.html").read_text()
    assert page.count("<figure>") == 3 and page.count("data:image/svg+xml;base64,") == 3
    assert f"Feature {best}:" in page and "data:image/png;base64," in page and "Left out: training" in page
    assert not re.search(r'(src|href)="(?!data:|atlas/index\.html")', page), "nothing is fetched from anywhere"


def test_the_steered_example_prefers_what_changed_on_target(built):
    run, _ = built
    title = example_steered(RunTables(run), AtlasConfig())["title"]
    assert title.endswith("on target only")
    assert example_steered(RunTables(run), AtlasConfig(publish=True)) is None


# ---- review ---------------------------------------------------------------------------------------------------------

def test_a_pack_hides_what_it_asks(built, tmp_path):
    run, _ = built
    sheet = review_pack(run, tmp_path, features=8)
    rows, key = (list(csv.DictReader(open(tmp_path / n))) for n in ("sheet.csv", "key.csv"))
    assert [r["item"] for r in rows] == [k["item"] for k in key] and {k["own"] for k in key} == {"0", "1"}
    scores = read_table(run / "interpretations/interpretations.parquet").to_pandas().set_index("feature").explanation
    for row, item in zip(rows, key, strict=True):
        assert (scores[int(item["feature"])] == row["description"]) == (item["own"] == "1")
    page = (tmp_path / "contexts.html").read_text()
    assert "F1 0" not in page and "<script>document" not in page and page.count("<h2>") == len(rows)
    assert sheet.read_bytes() == review_pack(run, tmp_path, features=8).read_bytes()


def fill(sheet, ratings):
    rows = list(csv.DictReader(open(sheet)))
    with open(sheet, "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(row | {"fits": rating} for row, rating in zip(rows, ratings, strict=True))


def test_ratings_are_scored_apart_from_controls(built, tmp_path):
    sheet = review_pack(built[0], tmp_path, features=8)
    own = [k["own"] == "1" for k in csv.DictReader(open(tmp_path / "key.csv"))]
    fill(sheet, ["2" if o else "1" for o in own])
    found = review_score(sheet)
    assert (found["rated"], found["mean_own"], found["mean_control"], found["f1_spearman"]) == (len(own), 2.0, 1.0, None)
    fill(sheet, ["2", *[""] * (len(own) - 1)])
    assert review_score(sheet)["rated"] == 1
    fill(sheet, ["3", *[""] * (len(own) - 1)])
    with pytest.raises(UserError, match="item 1 has the rating '3'"): review_score(sheet)
    fill(sheet, [""] * len(own))
    with pytest.raises(UserError, match="no ratings"): review_score(sheet)
    with pytest.raises(UserError, match="missing"): review_score(tmp_path / "no" / "sheet.csv")


def test_a_published_run_gives_no_pack(copy, tmp_path):
    (copy / "config.yaml").write_text(yaml.safe_dump({"atlas": {"publish": True}}))
    with pytest.raises(UserError, match="publish"): review_pack(copy, tmp_path / "pack")
    assert not (tmp_path / "pack").exists()


# ---- in a browser ---------------------------------------------------------------------------------------------------

CHROMIUM = next((p for p in ("/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome") if Path(p).exists()), None)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_atlas_opens_from_disk_searches_sorts_and_shows_a_feature(built):
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    run, best = built
    with api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(60_000)
        errors, asked = [], []
        page.on("pageerror", lambda e: errors.append(str(e)))
        page.on("request", lambda r: asked.append(r.url))
        page.goto((run / "atlas/index.html").as_uri())
        page.wait_for_selector("tbody tr")
        first = page.inner_text("tbody tr:first-child td:first-child")
        assert int(first) == best and NASTY in page.inner_text("tbody tr:first-child")
        page.click("th[data-name=feature] button")
        page.click("th[data-name=feature] button")
        assert page.get_attribute("th[data-name=feature]", "aria-sort") == "ascending"
        page.fill("#search", "pneumothorax")
        assert all("pneumothorax" in t for t in page.locator("tbody tr").all_inner_texts())
        page.fill("#search", f"{best}")
        page.click(f'a[href="#feature={best}"]')
        page.wait_for_selector("#feature .context")
        assert page.inner_text("#feature h1") == f"Feature {best}" and page.locator("#feature .token.peak").count() > 0
        assert page.locator("#feature .context img").evaluate("image => image.naturalWidth") == 112
        assert page.locator("#feature .pair ins, #feature .pair del").count() > 0 and "object HTML" not in page.inner_text("#feature")
        page.click("#feature nav a")
        page.wait_for_selector("#list:not([hidden])")
        page.goto((run / "report.html").as_uri())
        assert "broken" not in page.title() and errors == [] and all(url.startswith(("file:", "data:")) for url in asked)
        browser.close()
