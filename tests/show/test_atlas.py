"""The atlas and the report: what they show, what they must never show, and that a browser can open them from disk."""
import base64
import json
import re
import shutil

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from saerad.core import UserError, read_json, read_table, write_json, write_table
from saerad.sae.model import MatryoshkaSAE
from saerad.show.atlas import (
    FEATURE_COLUMNS,
    NOTICES,
    QUESTIONS,
    WHAT_TO_SEE,
    AtlasConfig,
    build_atlas,
    changes,
    concept_features,
    example_steered,
    feature_table,
    finding_boxes,
    headlines,
    is_template,
    pick_contexts,
    shade,
    share_inside,
    write_atlas,
    write_report,
)
from saerad.show.figures import PLOTS, FiguresConfig, draw_figures
from saerad.show.invented import invent_run
from saerad.show.run_folder import Run
from saerad.steering.judges import OUTCOMES
from saerad.studies.record import StudiesConfig
from saerad.studies.sources import open_source

NASTY = '<script>document.title = "broken"</script>'


def with_views(folder):
    "An invented run on a small phantom, with views for every third feature and hostile markup in texts and explanations."
    studies = {"source": "phantom:0", "train_patients": 3, "validation_patients": 1, "test_patients": 2}
    (folder / "config.yaml").write_text(yaml.safe_dump({"studies": studies, "subject": {"model": "mini"}}), encoding="utf-8")
    ids = [s.study for s in open_source(StudiesConfig(**studies))]
    rows = read_table(folder / "exemplars/exemplars.parquet").to_pylist()
    for row in rows: row["tokens"][4] = NASTY
    write_table(folder / "exemplars/exemplars.parquet", pa.Table.from_pylist(rows))
    path = folder / "interpretations/interpretations.parquet"
    table = read_table(path).to_pandas()
    best = int(table.f1.idxmax())
    table.loc[best, "explanation"] = f"fires on {NASTY}"
    write_table(path, pa.Table.from_pandas(table))
    features = read_table(folder / "exemplars/features.parquet").to_pandas()
    features.loc[best, [c for c in features if c.startswith("in_")]] = 0.0
    features.loc[best, ["in_image", "in_findings"]] = 0.5
    write_table(folder / "exemplars/features.parquet", pa.Table.from_pandas(features))
    views = [{"feature": f, "study": ids[0], "view": "frontal", "rows": 8, "columns": 8, "peak": 2.0, "patches": [9, 10], "activations": [1.0, 2.0]}
             for f in sorted({best, *range(0, len(table), 3)})]
    write_table(folder / "portraits/views.parquet", pa.Table.from_pylist(views))
    with_studies(folder, best, ids)
    return best


def with_studies(folder, best, ids):
    "Two studies that were read, and a painted finding on which the best feature rises."
    text = [" There", " is", " an", " effusion", f" {NASTY}", "."]
    rows = [{"study": study, "patient": study[:7], "split": "test", "tokens": text, "sections": ["findings"] * 6,
             "features": [[0], [0], [], [best, 1], [best], [0]], "activations": [[0.5], [0.4], [], [3.0, 1.0], [2.0], [0.2]]} for study in ids[:2]]
    write_table(folder / "portraits/studies.parquet", pa.Table.from_pylist(rows))
    seen = [{"feature": f, "study": study, "view": "frontal", "rows": 8, "columns": 8, "peak": 2.0, "patches": [9, 10], "activations": [1.0, 2.0]}
            for study in ids[:2] for f in (best, 1)]
    write_table(folder / "portraits/study_views.parquet", pa.Table.from_pylist(seen))
    write_table(folder / "portraits/painted.parquet", pa.Table.from_pylist([
        {"feature": best, "study": ids[0], "kind": "effusion", "side": "left", "zone": "", "severity": "large", "rise": 1.5, "rows": 8, "columns": 8,
         "patches_before": [], "activations_before": [], "patches_after": [57, 58], "activations_after": [1.5, 0.5]}]))
    portraits = read_table(folder / "portraits/portraits.parquet").to_pandas()
    fires = {best: [3, 4, 9, 10], 1: [3, 9]}
    portraits["fires_at"] = [fires.get(f, []) for f in portraits.feature]
    portraits["on_images"] = [0.5 if f == best else 0.0 for f in portraits.feature]
    write_table(folder / "portraits/portraits.parquet", pa.Table.from_pandas(portraits, preserve_index=False))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    run = invent_run(tmp_path_factory.mktemp("run"))
    best = with_views(run)
    draw_figures(run, FiguresConfig(dpi=60), ["f1", "steering", "film"])
    build_atlas(run)
    return run, best


@pytest.fixture
def copy(built, tmp_path):
    shutil.copytree(built[0], tmp_path / "run")
    return tmp_path / "run"


def data(path):
    "The arguments of the call in a data script."
    call = re.fullmatch(r"saerad\.\w+\((.*)\);\n", path.read_text(encoding="utf-8"), re.DOTALL)[1]
    return json.loads(f"[{call}]")


def everything(folder):
    return "\n".join(p.read_text(encoding="utf-8") for p in sorted(folder.rglob("*")) if p.suffix in (".html", ".js"))


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
        ("The subject model's own reports find what is on the radiograph with a macro F1 of 0.91.",
         "What the model does not know, no feature can show.")]


def test_the_report_says_the_three_senses_with_their_intervals_and_controls():
    case = {"reports": 40, "strict": [0.1, 0.05, 0.2], "paper": [0.2, 0.1, 0.3], "clinical": [0.15, 0.1, 0.2], "towards": [0.3, 0.2, 0.4]}
    nothing = {"reports": 0, **dict.fromkeys(("strict", "paper", "clinical", "towards"), [None] * 3)}
    steer = {"on_target": case, "addition": {"shown": case, "blank": case}, "suppression": {}, "random": {"on_target": nothing},
             "baselines": 4, "unreadable_baselines": 3}
    told = headlines({"steering": steer})
    assert told[0] == ("Purely on target over all reports: strictly 10 % [5, 20], in the paper's wording 20 % [10, 30], clinically 15 % [10, 20] "
                       "(40 reports).", "Random directions of the same length: none were tried.")
    assert [claim.split(":")[0] for claim, _ in told[1:2]] == ["Where a finding was absent, pushing for it added it and nothing else"]
    assert told[2][0] == "3 of 4 of the model's own reports cannot be read before any steering." and len(told) == 3


# ---- the atlas ------------------------------------------------------------------------------------------------------

def test_the_table_has_every_feature_and_its_scores(built):
    run, _ = built
    [table] = data(run / "atlas/data/table.js")
    scores = read_table(run / "interpretations/interpretations.parquet").to_pandas()
    names = [c["name"] for c in table["columns"]]
    assert names == [c["name"] for c in FEATURE_COLUMNS] and [r[0] for r in table["rows"]] == scores.feature.tolist()
    f1 = [r[names.index("f1")] for r in table["rows"]]
    assert [v is None for v in f1] == scores.f1.isna().tolist() and max(v for v in f1 if v) == pytest.approx(scores.f1.max(), abs=1e-5)
    measured = read_table(run / "steering/steerability.parquet").to_pandas().set_index("feature").measured
    shown = {r[0]: r[names.index("steerability")] for r in table["rows"] if r[names.index("steerability")] is not None}
    assert shown == pytest.approx(measured.to_dict(), abs=1e-5)
    findings = {r[names.index("finding")] for r in table["rows"] if r[1] and "effusion" in r[1]}
    assert findings == {"effusion"}


def test_a_page_holds_the_feature_that_it_names(built):
    run, best = built
    number, features = data(run / f"atlas/data/features-{best // 32:04d}.js")
    page = features[str(best)]
    exemplars = [e for e in read_table(run / "exemplars/exemplars.parquet").to_pylist() if e["feature"] == best]
    shown = [c for g in page["groups"] for c in g["contexts"]]
    assert number == best // 32 and len(shown) == len(exemplars)
    strongest = max((e for e in exemplars if e["decile"] == 10), key=lambda e: max(e["activations"]))
    assert shown[0]["activations"] == pytest.approx(strongest["activations"], abs=0.006) and page["groups"][0]["title"].startswith("Strongest")
    assert sum(page["places"].values()) == pytest.approx(1, abs=1e-3)
    assert len(page["doses"]) == 4 and all(sum(d[o] for o in OUTCOMES) == pytest.approx(1, abs=1e-3) for d in page["doses"])
    assert len(page["steered"]) == 4 and "on target" in page["steered"][0]["title"]
    assert page["neighbours"][0][0] == (best + 1) % 160 and len(page["promoted"]) == len(page["suppressed"]) == 5
    [view] = page["views"]
    assert (run / "atlas" / view["image"]).stat().st_size > 500 and view["patches"] == [10, 9] and view["boxes"]
    assert len(page["histogram"]["edges"]) == len(page["histogram"]["counts"]) + 1 and page["histogram"]["counts"][0] > 0


def test_the_table_names_features_with_the_same_explanation(built):
    run, _ = built
    [table] = data(run / "atlas/data/table.js")
    scores = read_table(run / "interpretations/interpretations.parquet").to_pandas().set_index("feature")
    names = [c["name"] for c in table["columns"]]
    alike = {r[0]: r[names.index("alike")] for r in table["rows"]}
    for first, rows in scores[scores.group >= 0].groupby("group"):
        assert {alike[f] for f in rows.index} == ({min(rows.index)} if len(rows) > 1 else {None}), first
    assert {alike[f] for f in scores.index[scores.group < 0]} == {None}


def test_a_table_without_groups_of_explanations_shows_none(copy):
    path = copy / "interpretations/interpretations.parquet"
    write_table(path, read_table(path).drop_columns("group"))
    assert feature_table(Run(copy)).alike.isna().all()


def test_contexts_come_by_tenth_strongest_first_and_image_tokens_stay_out():
    rows = [{"feature": f, "role": "score_active", "section": "findings" if i else "image", "tokens": ["a", "b"], "activations": [0.0, float(d + i)],
             "peak": 1, "decile": d} for f in (3, 4) for d in (1, 10, 5) for i in range(4)]
    rows.append(rows[1] | {"role": "score_silent", "activations": [99.0, 99.0]})
    picked = pick_contexts(pa.Table.from_pylist(rows), AtlasConfig(exemplars=2, per_decile=1)).to_pylist()
    assert [(p["feature"], p["decile"], p["activations"][1]) for p in picked] == [(f, *rest) for f in (3, 4)
            for rest in ((10, 13.0), (10, 12.0), (5, 8.0), (1, 4.0))]
    assert len(pick_contexts(pa.Table.from_pylist(rows).slice(0, 0), AtlasConfig())) == 0


@given(st.integers(0, 7), st.integers(0, 7))
def test_a_box_around_one_patch_holds_its_activation_alone(y, x):
    box = {"left": 12.5 * x + 1, "top": 12.5 * y + 1, "width": 10, "height": 10}
    heat = np.arange(1.0, 65)
    inside, area = share_inside(box, 8, 8, range(64), heat)
    assert inside == pytest.approx(heat[8 * y + x] / heat.sum()) and area == 1 / 64


def test_boxes_are_those_that_the_phantom_drew():
    studies = list(open_source(StudiesConfig(source="phantom:0", train_patients=9, validation_patients=1, test_patients=1)))
    study = max(studies, key=lambda s: len(s.truth.findings))
    boxes = finding_boxes(study, "frontal")
    assert len(boxes) == len(study.truth.boxes) > 0 and all(0 <= b["left"] and b["left"] + b["width"] <= 100 for b in boxes)
    assert finding_boxes(study, "lateral") == finding_boxes(None, "frontal") == []
    patches = next(iter(study.truth.patches.values()))
    assert share_inside(boxes[0], 8, 8, np.flatnonzero(patches), np.ones(patches.sum()))[0] == 1
    later = next(s for s in studies if s.prior and s.prior.truth.findings)
    assert len(finding_boxes(later, "prior")) == len(later.prior.truth.findings)


def test_numbers_of_contexts_and_pairs_are_settings(copy):
    write_atlas(copy, AtlasConfig(exemplars=2, per_decile=0, steered=1, views=False))
    pages = {k: v for path in (copy / "atlas/data").glob("features-*.js") for k, v in data(path)[1].items()}
    assert max(sum(len(g["contexts"]) for g in p["groups"]) for p in pages.values()) == 2 and max(len(p["steered"]) for p in pages.values()) == 1
    assert not list(copy.rglob("views/*")) and not any(p["views"] for p in pages.values())


def test_no_text_can_become_markup(built):
    run, _ = built
    assert "<script>document" not in everything(run / "atlas") and "<script>document" not in (run / "report.html").read_text(encoding="utf-8")
    assert "\\u003cscript>document" in everything(run / "atlas") and "&lt;script&gt;document" in (run / "report.html").read_text(encoding="utf-8")


def test_a_published_edition_holds_no_text_no_image_and_no_study(copy):
    exemplars = read_table(copy / "exemplars/exemplars.parquet").to_pylist()
    assert "There is" in everything(copy / "atlas") and exemplars[0]["study"] in everything(copy / "atlas")
    index = build_atlas(copy, AtlasConfig(publish=True))
    shown = everything(index.parent) + (copy / "report.html").read_text(encoding="utf-8")
    studies = {f"study {e['study']}" for e in exemplars}
    for secret in ("There is a small effusion", "The heart is <normal>", "\"tokens\":[", "data:image/png", "data:image/webp", *studies):
        assert secret not in shown, secret
    assert not (copy / "atlas/views").exists() and NOTICES[True] in shown and "drawn into it" not in shown
    assert all(not p["groups"] and not p["views"] and not p["steered"] for path in index.parent.glob("data/features-*.js")
               for p in data(path)[1].values())


def test_publishing_over_a_private_atlas_leaves_none_of_it(copy):
    assert list((copy / "atlas/views").glob("*.webp"))
    (copy / "atlas/data/features-9999.js").write_text("There is a small effusion", encoding="utf-8")
    write_atlas(copy, AtlasConfig(publish=True))
    assert "There is a small effusion" not in everything(copy / "atlas") and not (copy / "atlas/views").exists()


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
    page = (build_atlas(copy).parent.parent / "report.html").read_text(encoding="utf-8")
    assert "No feature has been explained" in page and "has not been measured yet" in page and page.count("No figure was drawn of it") == 4
    assert feature_table(Run(copy)).f1.isna().all()
    index = (copy / "atlas/index.html").read_text(encoding="utf-8")
    assert "Not in this run yet: 2" in index and "saerad interpret" in index and "saerad steer" in index and "saerad exemplars" not in index
    shutil.rmtree(copy / "exemplars")
    with pytest.raises(UserError, match="saerad train"): write_atlas(copy)
    assert write_report(copy).exists()


def test_an_sae_that_nobody_has_looked_at_gives_its_features(tmp_path):
    sae = MatryoshkaSAE(4, [2, 3], 2)
    sae.threshold.fill_(0.1)
    sae.save(tmp_path / "sae")
    table = feature_table(Run(tmp_path))
    assert table.level.tolist() == [0, 0, 1, 1, 1] and set(table.status) == {"not looked at"}
    index = write_atlas(tmp_path)
    assert "Not in this run yet: 4" in index.read_text(encoding="utf-8")
    assert "Nobody has looked yet" in (index.parent / "data/features-0000.js").read_text(encoding="utf-8")


def test_a_source_that_is_gone_leaves_out_the_views(copy):
    (copy / "config.yaml").write_text(yaml.safe_dump({"studies": {"source": "mimic-cxr:/no/such/folder"}}), encoding="utf-8")
    write_atlas(copy)
    assert not (copy / "atlas/views").exists() and '"views":[{' not in everything(copy / "atlas/data")


def test_pairs_follow_the_row_that_a_judgement_names(copy):
    path, written = copy / "steering/judgements.parquet", read_table(copy / "steering/generations.parquet").to_pandas()
    other = written.assign(steered="Another method wrote this.", feature=-9)
    write_table(copy / "steering/generations.parquet", pa.Table.from_pandas(pd.concat([other, written], ignore_index=True)))
    judged = read_table(path).to_pandas()
    write_table(path, pa.Table.from_pandas(judged.assign(generation=np.arange(len(judged)) + len(other))))
    write_atlas(copy)
    assert "Another method" not in everything(copy / "atlas") and "There is " in everything(copy / "atlas")


# ---- the report -----------------------------------------------------------------------------------------------------

def test_the_report_is_one_file_with_its_figures(built):
    run, best = built
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.count("<figure>") == 3 and page.count("data:image/svg+xml;base64,") == 3
    assert f"Feature {best}:" in page and "<li>training</li>" in page and "data:image/webp;base64," in page
    assert not re.search(r'(src|href)="(?!data:|atlas/index\.html")', page), "nothing is fetched from anywhere"
    numbers = base64.b64decode(re.search(r'href="data:text/csv;base64,([^"]*)" download="f1.csv"', page)[1])
    assert numbers == (run / "figures/f1.csv").read_bytes()


def test_the_report_answers_in_a_readers_order_within_three_screens(copy, browser):
    """With every claim that a run can make, and the figures that stand beside them."""
    summary = read_json(copy / "summary.json")
    summary["interpretation"] |= {"interpreter": "endpoint", "model": "a/model-with-a-name-of-some-length", "protocol": "paper", "asked": 160,
                                  "unscored": {"dead": 3, "the reply could not be read": 12}}
    summary["steering"] |= {"unreadable_baselines": 2, "concept_sets": dict.fromkeys(("on_target_only", "random_on_target_only"), 0.25)
                            | {"on_target_only_reports": 240}}
    write_json(copy / "summary.json", summary)
    draw_figures(copy, FiguresConfig(dpi=60), ["fidelity", "concepts", "f1", "steering", "on_target", "density", "signs"])
    page = browser.page(width=1280)
    page.goto(write_report(copy).as_uri())
    asked = page.locator(".asks h2").all_inner_texts()
    assert asked == [title for title, *_ in QUESTIONS.values()]
    assert [part.locator("figure").count() for part in page.locator(".asks").all()] == [1, 1, 1, 2], "what pushing does has a figure for each claim"
    assert page.locator(".asks li").count() == page.locator(".asks li .caveat:not(:empty)").count() == 14
    assert page.locator("#appendix").evaluate("e => e.getBoundingClientRect().top + scrollY") <= 3 * 900
    drawn = len(list(copy.glob("figures/*.svg")))
    assert page.locator("figure:not(.view)").count() == page.locator("figure:not(.view) figcaption b").count() == drawn
    assert set(WHAT_TO_SEE) == set(PLOTS)
    narrow = browser.page(width=390)
    narrow.goto((copy / "report.html").as_uri())
    assert narrow.evaluate("document.documentElement.scrollWidth") <= 390


def test_the_steered_example_prefers_what_changed_on_target(built):
    run, _ = built
    title = example_steered(Run(run), AtlasConfig())["title"]
    assert title.endswith("on target only")
    assert example_steered(Run(run), AtlasConfig(publish=True)) is None


# ---- in a browser ---------------------------------------------------------------------------------------------------

def test_every_library_is_in_the_folder_with_its_licence(built):
    vendor = built[0] / "atlas/vendor"
    licences = (vendor / "LICENSES.txt").read_text(encoding="utf-8")
    assert "tabulator-tables" in licences and "@observablehq/plot" in licences
    assert sum(f.stat().st_size for f in vendor.iterdir()) < 600_000
    page = (vendor.parent / "index.html").read_text(encoding="utf-8")
    assert not re.search(r'(src|href)="(https?:)?//', page)
    assert all((vendor.parent / link).exists() for link in re.findall(r'(?:src|href)="(?!data:)([^"#]+)"', page))


def first(page): return page.inner_text("#table .tabulator-row a >> nth=0")


def test_the_atlas_searches_sorts_filters_opens_goes_back_and_shares_links(built, browser):
    run, best = built
    page, url = browser.page(), (run / "atlas/index.html").as_uri()
    page.goto(url)
    page.wait_for_selector("#table .tabulator-row a")
    page.select_option("#order", "f1")
    page.select_option("#alike", "all")
    assert int(first(page)) == best and NASTY in page.inner_text("#table .tabulator-row >> nth=0")
    page.click("#table [tabulator-field=feature] button >> nth=0")
    page.keyboard.press("Enter")           # the heading is a button: Enter sorts the other way
    assert page.get_attribute("#table .tabulator-col[tabulator-field=feature]", "aria-sort") == "ascending" and first(page) == "0"
    assert "sort=feature%3Aasc" in page.url
    page.fill("#search", "pneumothorax")
    assert all("pneumothorax" in t for t in page.locator("#table .tabulator-row").all_inner_texts())
    found = int(page.inner_text("#count").split()[0])
    page.click("#more summary")
    page.select_option("#level", "2")
    page.fill("#f1-from", "0.3")
    kept = int(page.inner_text("#count").split()[0])
    assert 0 < kept < found
    shared = page.url
    page.locator("#table .tabulator-row a >> nth=0").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#feature h1")
    opened = page.inner_text("#feature h1")
    page.go_back()
    page.wait_for_selector("#list:not([hidden])")
    assert page.url == shared and page.input_value("#search") == "pneumothorax" and int(page.inner_text("#count").split()[0]) == kept
    other = browser.page()                 # the link in another window brings the same rows, and the other one the same feature
    other.goto(shared)
    other.wait_for_selector("#table .tabulator-row a")
    assert int(other.inner_text("#count").split()[0]) == kept and first(other) == opened.split()[1] and other.input_value("#f1-from") == "0.3"
    page.click("#clear")
    assert page.inner_text("#count") == "160 of 160 features" and page.is_hidden("#clear")


def test_a_feature_page_shows_it_all_and_runs_no_markup(built, browser):
    run, best = built
    page = browser.page()
    page.goto((run / "atlas/index.html").as_uri() + f"#feature={best}")
    page.wait_for_selector("#feature .context")
    assert page.inner_text("#feature h1") == f"Feature {best}" and page.locator("#feature .token.peak").count() == 6
    assert page.locator("#feature .card svg[role=img][aria-label]").count() == 4, "histogram, places, outcomes, doses"
    assert page.locator("#feature .views .picture .box b").count() > 0 and page.locator("#feature .views .heat rect[fill='#F0A000']").count() == 4
    assert page.locator("#feature .pair ins, #feature .pair del").count() > 0 and "<normal>" in page.inner_text("#feature")
    assert page.locator("#feature .near a").count() == 8 and page.locator("#feature .words li").count() == 10
    assert page.evaluate("document.title") == f"Feature {best}" and NASTY in page.inner_text("#feature .explanation")
    page.keyboard.press("ArrowRight")
    page.wait_for_function(f"(document.querySelector('#feature h1')?.textContent ?? 'Feature {best}') !== 'Feature {best}'")
    turned = page.inner_text("#feature h1").split()[1]
    page.keyboard.press("Escape")
    page.wait_for_selector("#list:not([hidden])")
    page.wait_for_function(f"document.activeElement.textContent === '{turned}'")          # one goes on from the row that one left
    assert page.title() not in (f"Feature {best}", f"Feature {turned}")
    page.goto((run / "report.html").as_uri())
    assert "broken" not in page.title()


def test_activations_are_read_without_a_mouse(built, browser):
    run, best = built
    page = browser.page(width=390)
    page.goto((run / "atlas/index.html").as_uri() + f"#feature={best}")
    page.wait_for_selector("#feature .context")
    beside = "e => getComputedStyle(e, '::after').content"
    peak = page.locator("#feature .decile .token.peak").first
    assert peak.evaluate(beside) == "none"
    page.get_by_label("write the activations").focus()
    page.keyboard.press("Space")
    assert peak.evaluate(beside) == f'"{peak.get_attribute("title")}"' and page.evaluate("document.documentElement.scrollWidth") <= 390


def shown(page): return int(page.inner_text("#count").split()[0].replace(",", ""))


def test_every_filter_keeps_what_it_says(built, browser):
    run, _ = built
    table = feature_table(Run(run))
    page = browser.page()
    page.goto((run / "atlas/index.html").as_uri())
    page.wait_for_selector("#table .tabulator-row a")
    page.select_option("#alike", "all")
    page.click("#more summary")
    for name in ("level", "mainly", "view", "finding", "status"):
        value = page.locator(f"#{name} option").evaluate_all("options => options.map(o => o.value)")[1]
        page.select_option(f"#{name}", value)
        assert shown(page) == table[name].map(lambda cell, v=value: v in str(cell).split("; ")).sum() > 0, name
        page.click("#clear")
    for name, unit in (("f1", 1), ("density", 100), ("steerability", 1)):
        values = table[name].astype(float).round(5) * unit
        low, high = round(values.quantile(0.3), 3), round(values.quantile(0.8), 3)
        page.fill(f"#{name}-from", str(low))
        page.fill(f"#{name}-to", str(high))
        assert shown(page) == values.between(low, high).sum() > 0, name
        page.click("#clear")
    assert shown(page) == len(table)


def test_the_link_to_a_feature_can_be_taken_along(built, browser):
    run, best = built
    page, asked = browser.page(), []
    page.on("dialog", lambda d: (asked.append(d.default_value), d.dismiss()))       # where nothing may be copied the link is shown
    page.goto((run / "atlas/index.html").as_uri() + f"#search=zebra&feature={best}")
    page.click("#feature nav .copy")
    page.wait_for_timeout(200)
    assert page.inner_text("#feature nav .copy") == "Copied" or asked == [(run / "atlas/index.html").as_uri() + f"#feature={best}"]


CONTRAST = """() => {
  const numbers = text => text.match(/[\\d.]+/g).map(Number);
  const linear = v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4, weights = [0.2126, 0.7152, 0.0722];
  const light = colour => weights.reduce((sum, weight, i) => sum + weight * linear(colour[i] / 255), 0);
  const over = ([r, g, b, a = 1], below) => [r, g, b].map((v, i) => a * v + (1 - a) * below[i]);
  const behind = e => e ? over(numbers(getComputedStyle(e).backgroundColor), behind(e.parentElement)) : [255, 255, 255];
  const written = e => e.checkVisibility() && !e.closest('svg') && [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
  return [...document.querySelectorAll('body *')].filter(written).map(e => {
    const back = behind(e), [a, b] = [light(back), light(over(numbers(getComputedStyle(e).color), back))].sort((x, y) => x - y);
    return [(b + 0.05) / (a + 0.05), e.tagName + ' ' + e.textContent.slice(0, 40)];
  }).sort((x, y) => x[0] - y[0])[0];
}"""


def test_text_stands_out_from_what_is_behind_it(built, browser):
    run, best = built
    for where in ("atlas/index.html", f"atlas/index.html#feature={best}", "report.html"):
        page = browser.page()
        page.goto(f"{run.as_uri()}/{where}")
        page.wait_for_timeout(500)
        ratio, text = page.evaluate(CONTRAST)
        assert ratio >= 4.5, (where, text)


def test_features_explained_alike_are_named_and_can_be_seen_side_by_side(built, browser):
    run, _ = built
    table = feature_table(Run(run)).set_index("feature")
    together = table.index[table.alike == table.alike.value_counts().index[0]].tolist()
    one, others = together[1], [f for f in together if f != together[1]]
    page = browser.page()
    page.goto((run / "atlas/index.html").as_uri() + f"#search=zebra&feature={one}")
    page.wait_for_selector("#feature .alike")
    named = [int(a) for a in page.locator("#feature .alike a").all_inner_texts()[:-1]]
    assert named == others[:12] and (f"and {len(others) - 12} more" in page.inner_text("#feature .alike")) == (len(others) > 12)
    page.click("#feature .alike a >> nth=-1")
    page.wait_for_selector("#list:not([hidden])")
    assert page.inner_text("#count") == f"{len(together)} of 160 features" and page.input_value("#search") == ""
    assert page.locator("#alike option:checked").inner_text() == f"like feature {together[0]}"
    kept = {}
    for value in ("", "others", "alone"):
        page.select_option("#alike", value)
        kept[value] = int(page.inner_text("#count").split()[0])
    grouped, unexplained = table.alike.notna(), ~table.explanation.fillna("").astype(bool)
    assert kept == {"others": grouped.sum(), "alone": (~grouped & ~unexplained).sum(), "": (~grouped).sum() + table.alike.nunique()}
    page.select_option("#alike", "all")
    assert page.inner_text("#count") == "160 of 160 features" and "alike=all" in page.url


def test_whatever_the_tab_key_reaches_can_be_seen_to_have_the_focus(built, browser):
    run, _ = built
    page = browser.page()
    page.goto((run / "atlas/index.html").as_uri())
    page.wait_for_selector("#table .tabulator-row a")
    style, reached = "(e => [e.tagName, getComputedStyle(e).outlineStyle, parseFloat(getComputedStyle(e).outlineWidth)])", []
    for _ in range(70):
        page.keyboard.press("Tab")
        reached.append(page.evaluate(f"{style}(document.activeElement)"))
    assert {"INPUT", "SELECT", "BUTTON", "A", "SUMMARY"} <= {tag for tag, *_ in reached}
    assert all(line != "none" and width >= 2 for _, line, width in reached)


def test_a_half_done_run_says_in_words_what_is_not_there_yet(copy, browser):
    for name in ("interpretations", "steering", "portraits"): shutil.rmtree(copy / name)
    page = browser.page()
    page.goto(write_atlas(copy).as_uri() + "#feature=0")
    page.wait_for_selector("#feature .context")
    text = page.inner_text("#feature")
    assert "It has no explanation yet." in text and "saerad portray does it" in text and "This feature was not steered." in text
    page.keyboard.press("Escape")
    page.wait_for_selector("#list:not([hidden])")
    assert "Not in this run yet: 3" in page.inner_text("header") and "`" not in text + page.inner_text("body")


def test_every_control_has_a_name_and_every_picture_says_what_it_is(built, browser):
    run, best = built
    page = browser.page()
    page.goto((run / "atlas/index.html").as_uri() + f"#feature={best}")
    page.wait_for_selector("#feature .context")
    unnamed = page.evaluate("""[...document.querySelectorAll('input, select, textarea')]
      .filter(e => !e.labels?.length && !e.getAttribute('aria-label')).length
      + [...document.querySelectorAll('button, a')].filter(e => !e.textContent.trim()).length
      + [...document.querySelectorAll('#feature svg')].filter(e => !e.closest('[aria-label]') && !e.getAttribute('aria-label')).length""")
    assert unnamed == 0 and page.get_attribute("html", "lang") == "en" and page.locator("main").count() == 1


@pytest.mark.parametrize("width", [800, 900, 1280, 1900])
def test_the_table_leaves_room_for_explanations_and_every_heading(built, browser, width):
    page = browser.page(width=width)
    page.goto((built[0] / "atlas/index.html").as_uri())
    page.wait_for_selector("#table .tabulator-row")
    columns = page.evaluate("""[...document.querySelectorAll(".tabulator-col")].filter(c => c.offsetWidth).map(c => {
        const button = c.querySelector("button"), title = c.querySelector(".tabulator-col-title");
        return [c.getAttribute("tabulator-field"), c.offsetWidth, button.getBoundingClientRect().width <= title.clientWidth + 1] })""")
    assert {name: wide for name, wide, _ in columns}["explanation"] >= 200
    assert all(fits for _, _, fits in columns), columns


def test_a_phone_scrolls_down_and_never_sideways(built, browser):
    run, best = built
    page = browser.page(width=390)
    for url in ("", f"#feature={best}"):
        page.goto("about:blank")
        page.goto((run / "atlas/index.html").as_uri() + url)
        page.wait_for_selector("#feature .context" if url else "#table .tabulator-row a")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


# ---- the first page, studies, comparisons, films ------------------------------------------------------------------

def test_the_first_page_opens_on_what_was_found_steered_and_failed(built, browser):
    run, _ = built
    page = browser.page()
    page.goto((run / "atlas/index.html").as_uri())
    page.wait_for_selector("#table .tabulator-row a")
    assert [page.inner_text(f"#found h2 >> nth={i}") for i in range(3)] == ["What the features are of", "What was steered", "What failed"]
    assert page.locator(".concept").count() == 6 and page.locator("#found tbody tr").count() == 8 and page.locator(".failed li").count() >= 3
    place = "e => e.getBoundingClientRect().top"
    assert page.locator("#found").evaluate(place) < page.locator("#table").evaluate(place)
    page.click("#found button >> text=Show")
    assert page.locator(".concept").count() > 6 and page.evaluate("document.activeElement.closest('.concept') !== null")
    page.click(".concept a >> nth=0")
    page.wait_for_selector("#feature h1")


def test_concepts_stand_with_their_best_feature_and_failures_with_their_number(built):
    run, _ = built
    [table] = data(run / "atlas/data/table.js")
    concepts = read_table(run / "sae/concepts.parquet").to_pandas()
    for card in table["first"]["concepts"]:
        row = concepts[concepts.concept == card["concept"]].iloc[0]
        assert card["feature"] == row.feature and f"{row.auroc_test:.2f}" in card["measure"] and ("below" in card["measure"]) != row.tracked
    scores = read_table(run / "interpretations/interpretations.parquet").to_pandas()
    assert any(f["text"].startswith(f"{(scores.f1 <= scores.shuffled_f1).sum()} explanations score no better") for f in table["first"]["failed"])
    assert any(f["text"].startswith(f"{(scores.f1 < 0.5).sum()} explanations reach") for f in table["first"]["failed"])


@pytest.mark.parametrize("text, template", [('fires on "is" after "effusion"; on "."', True), ('fires on "is", "catheter"', False),
                                            ("lines and tubes", False),
                                            ('fires on "the" before "left". Strongest with "opacity".', True), ("", False), (None, False)])
def test_template_words_are_told_from_others(text, template): assert is_template(text) == template


def test_template_words_are_set_aside_and_orders_are_kept_in_the_address(copy, browser):
    path = copy / "interpretations/interpretations.parquet"
    table = read_table(path).to_pandas()
    plain = table.index[table.f1.notna()][:5]
    table.loc[plain, "explanation"], table.loc[plain, "group"] = 'fires on "is" after "there"', -1
    write_table(path, pa.Table.from_pandas(table))
    page = browser.page()
    page.goto(write_atlas(copy).as_uri() + "#alike=all")
    page.wait_for_selector("#table .tabulator-row a")
    assert shown(page) == 160
    page.check("#template")
    assert shown(page) == 155 and "template=aside" in page.url
    page.select_option("#order", "steerability")
    values = read_table(copy / "steering/steerability.parquet").to_pandas().set_index("feature").measured.drop(plain, errors="ignore")
    assert int(first(page)) == values.idxmax() and "sort=steerability" in page.url


def test_a_study_has_a_page_with_its_features_and_back(built, browser):
    run, best = built
    page = browser.page()
    page.goto((run / "atlas/index.html").as_uri() + f"#feature={best}")
    page.click("#feature .views figcaption a >> nth=0")
    page.wait_for_selector("#page .reading")
    assert page.inner_text("#page h1").startswith("Study p0") and NASTY in page.inner_text("#page .reading")
    assert page.locator("#page .firing tbody tr").count() == 3 and page.inner_text("#page .firing tbody tr >> nth=0").startswith(str(best))
    page.click("#page .reading .token >> text=effusion")
    assert [int(a) for a in page.locator("#page .says a").all_inner_texts()] == [best, 1]
    page.focus("#page .reading")
    page.keyboard.press("ArrowLeft")
    assert "an" in page.inner_text("#page .says h3") and page.locator("#page .token.at").inner_text() == "an", "words are reached by key too"
    page.click("#page .reading .token >> text=effusion")
    page.hover(f"#page tr[data-feature='{best}']")
    lit = page.locator("#page .reading .token").evaluate_all("tokens => tokens.map(t => t.style.background.startsWith('rgba'))")
    assert lit == [False, False, False, True, True, False]
    page.select_option("#page .many select", "1")
    page.click("#page .says a >> nth=0")
    page.wait_for_selector("#feature h1")
    assert page.inner_text("#feature h1") == f"Feature {best}" and page.title() == f"Feature {best}"


def test_a_patients_studies_lead_to_one_another(built, copy, browser):
    page, read = browser.page(), read_table(copy / "portraits/studies.parquet").to_pandas()
    [first, second] = read.study
    page.goto((built[0] / "atlas/index.html").as_uri() + f"#page=study&id={first}")
    page.wait_for_selector("#page .reading")
    assert "The same patient" not in page.inner_text("#page")
    write_table(copy / "portraits/studies.parquet", pa.Table.from_pandas(read.assign(patient="p7")))
    page.goto(write_atlas(copy).as_uri() + f"#page=study&id={first}")
    page.wait_for_selector("#page .reading")
    page.click(f"#page .where a:text-is('{second}')")
    page.wait_for_function(f"document.querySelector('#page h1').textContent === 'Study {second}'")


def test_a_finding_that_explanations_name_has_a_control_only_where_one_was_examined(copy):
    (copy / "sae/concepts.parquet").unlink()
    path = copy / "interpretations/interpretations.parquet"
    table = read_table(path).to_pandas()
    table.loc[table.explanation.str.contains("effusion"), "shuffled_f1"] = np.nan
    write_table(path, pa.Table.from_pandas(table))
    found = concept_features(Run(copy), feature_table(Run(copy)), 9).set_index("concept").measure
    assert "control" not in found["effusion"] and "control" in found["pneumothorax"] and not found.str.contains("nan").any()


def test_two_features_stand_side_by_side(built, browser):
    run, best = built
    page = browser.page()
    page.goto((run / "atlas/index.html").as_uri() + f"#page=compare&a={best}&b=1")
    page.wait_for_selector("#page .sides")
    said = page.inner_text("#page section >> nth=0")
    assert f"feature {best} fires on 4, feature 1 on 2, both on 2: 50 %" in said and "Of 12 words" in said
    assert page.locator("#page .context .token.peak").count() >= 2 and page.locator("#page .sides .explanation").count() == 2
    assert page.inner_text("#page .token.peak >> nth=0") == "effusion"


def test_pinned_features_stay_travel_as_a_file_and_as_a_link(built, browser, tmp_path):
    run, best = built
    page = browser.page()
    index = (run / "atlas/index.html").as_uri()
    page.goto(f"{index}#feature={best}")
    page.click("#feature .pin")
    assert page.get_attribute("#feature .pin", "aria-pressed") == "true" and "(1)" in page.inner_text("#pinned")
    page.goto("about:blank")
    page.goto(f"{index}#page=pins")                        # the browser has kept it
    page.wait_for_selector("#page table")
    with page.expect_download() as download: page.click("#page button >> text=Export")
    download.value.save_as(tmp_path / "pins.json")
    assert json.loads((tmp_path / "pins.json").read_text(encoding="utf-8"))["pins"] == [best]
    page.click("#page button >> text=Remove")
    assert "(0)" in page.inner_text("#pinned")
    (tmp_path / "other.json").write_text(json.dumps({"atlas": "<b>another</b>", "pins": [1, best, 99999, "x"]}), encoding="utf-8")
    page.set_input_files("#page input[type=file]", tmp_path / "other.json")
    page.wait_for_selector("#page [role=alert] >> text=another atlas")
    assert "(2)" in page.inner_text("#pinned") and "<b>another</b>" in page.inner_text("#page")
    (tmp_path / "broken.json").write_text("[", encoding="utf-8")
    page.set_input_files("#page input[type=file]", tmp_path / "broken.json")
    page.wait_for_selector("#page [role=alert] >> text=nothing was changed")
    page.goto("about:blank")
    page.goto(f"{index}#page=pins&pins=2,3")
    page.click("#page button >> text=Keep them all")
    page.wait_for_function("document.getElementById('pinned').textContent.includes('(4)')")
    page.evaluate("localStorage.clear()")


def test_runs_of_one_title_keep_lists_of_their_own(built, copy, browser, tmp_path):
    """Numbers of features mean something in one SAE alone; all pages from disk share what a browser keeps."""
    table = read_table(copy / "exemplars/features.parquet").to_pandas()
    write_table(copy / "exemplars/features.parquet", pa.Table.from_pandas(table.assign(density=table.density * 0.9)))
    mine, other = (built[0] / "atlas/index.html").as_uri(), write_atlas(copy).as_uri()
    page = browser.page()
    page.goto(f"{mine}#feature=1")
    page.click("#feature .pin")
    title = page.evaluate("saerad.title")
    page.goto(f"{mine}#page=pins")
    with page.expect_download() as download: page.click("#page button >> text=Export")
    download.value.save_as(tmp_path / "pins.json")
    page.goto(f"{other}#page=pins")
    page.wait_for_selector("#page .notice >> text=Nothing is pinned")
    assert page.evaluate("saerad.title") == title and "(0)" in page.inner_text("#pinned")
    page.set_input_files("#page input[type=file]", tmp_path / "pins.json")
    page.wait_for_selector("#page [role=alert] >> text=another atlas")
    page.evaluate("localStorage.clear()")


def test_a_film_can_be_enlarged_windowed_and_closed_by_key(built, browser):
    run, best = built
    page = browser.page()
    page.goto((run / "atlas/index.html").as_uri() + f"#feature={best}")
    page.click("#feature .views .larger >> nth=0")
    page.wait_for_selector("dialog[open]")
    page.locator("dialog input[name=brightness]").fill("150")
    page.locator("dialog input[name=zoom]").fill("300")
    assert "brightness(150%)" in page.get_attribute("dialog img", "style") and page.get_attribute("dialog .picture", "style") == "--zoom: 3;"
    wide, frame = (page.locator(f"dialog {what}").bounding_box()["width"] for what in (".picture", ".frame"))
    assert wide > frame, "it can be moved about in"
    page.uncheck("dialog input[type=checkbox]")
    assert page.locator("dialog .box:visible").count() == 0
    page.click("dialog button >> text=Reset")
    assert page.locator("dialog .picture").bounding_box()["height"] <= page.locator("dialog .frame").bounding_box()["height"] + 1
    assert page.locator("dialog .box:visible").count() > 0
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog", state="detached")
    assert page.is_visible("#feature"), "Escape closes the window and nothing else"


def test_a_view_keeps_its_own_pixels(built):
    run, best = built
    [view] = data(run / f"atlas/data/features-{best // 32:04d}.js")[1][str(best)]["views"]
    assert Image.open(run / "atlas" / view["image"]).size == (112, 112) and all(box["name"] for box in view["boxes"])


def test_views_are_as_large_as_was_asked_for_also_those_of_the_report(copy):
    build_atlas(copy, AtlasConfig(view_pixels=64))
    assert {Image.open(path).size for path in (copy / "atlas/views").glob("*.webp")} == {(64, 64)}


def test_a_painted_finding_is_shown_beside_the_same_view_without_it(built, browser):
    run, best = built
    [pair] = data(run / f"atlas/data/features-{best // 32:04d}.js")[1][str(best)]["painted"]
    plain, made = (np.asarray(Image.open(run / "atlas" / pair[when]["image"])).astype(int) for when in ("before", "after"))
    box = next(b for b in pair["after"]["boxes"] if b["name"] == "left effusion")
    inside = np.s_[int(box["top"] * 1.12):int((box["top"] + box["height"]) * 1.12), int(box["left"] * 1.12):int((box["left"] + box["width"]) * 1.12)]
    assert np.abs(plain - made)[inside].mean() > 4 * np.abs(plain - made).mean() / 3
    page = browser.page()
    page.goto((run / "atlas/index.html").as_uri() + f"#feature={best}")
    page.wait_for_selector("#feature .painted")
    assert page.locator("#feature .painted .picture").count() == 2 and page.locator("#feature .painted .heat rect").count() == 2


def test_a_feature_that_never_fires_on_patches_shows_no_film(built, browser):
    run, best = built
    pages = {int(k): v for path in (run / "atlas/data").glob("features-*.js") for k, v in data(path)[1].items()}
    silent = next(f for f, page in pages.items() if not page["views"])
    page = browser.page()
    page.goto((run / "atlas/index.html").as_uri() + f"#feature={silent}")
    page.wait_for_selector("#feature h1")
    assert page.locator("#feature .picture").count() == 0


def test_the_rows_that_are_shown_can_be_taken_along_as_csv(built, browser, tmp_path):
    run, best = built
    page = browser.page()
    page.goto((run / "atlas/index.html").as_uri() + "#alike=all&sort=f1:desc")
    page.wait_for_selector("#table .tabulator-row a")
    with page.expect_download() as download: page.click("#csv")
    download.value.save_as(tmp_path / "features.csv")
    table, ours = pd.read_csv(tmp_path / "features.csv"), feature_table(Run(run)).set_index("feature")
    assert list(table.columns) == [c["name"] for c in FEATURE_COLUMNS] and len(table) == 160 and table.feature[0] == best
    assert NASTY in table.explanation[0] and np.allclose(table.set_index("feature").f1, ours.f1.reindex(table.feature), equal_nan=True, atol=1e-5)


def test_an_atlas_from_disk_says_how_a_sentence_gets_its_answer(built, browser):
    run, _ = built
    page = browser.page()
    page.goto((run / "atlas/index.html").as_uri())
    page.wait_for_selector("#try code")
    assert "saerad atlas CONFIG --serve" in page.inner_text("#try") and "saerad ask RUN" in page.inner_text("#try")


# ---- groups of features

def test_a_group_is_one_row_that_folds_out_one_page_and_found_by_the_search(built, browser):
    run, _ = built
    groups = read_table(run / "interpretations/groups.parquet").to_pandas()
    page = browser.page(width=1280)
    page.goto(f"{run.as_uri()}/atlas/index.html")
    page.wait_for_selector("#groups summary")
    assert page.locator("#groups details").count() == 6 and f"Show {len(groups) - 6} more" in page.inner_text("#groups button")
    page.click("#groups button")
    assert page.locator("#groups details").count() == len(groups)
    assert not page.is_visible("#groups .members") and groups.name[0] in page.inner_text("#groups summary >> nth=0")
    page.click("#groups summary >> nth=0")
    assert [int(a) for a in page.locator("#groups .members >> nth=0").locator("a").all_inner_texts()] == list(groups.features[0])
    page.fill("#search", groups.name[2])
    page.wait_for_function("document.querySelectorAll('#groups details').length === 1")
    assert groups.name[2] in page.inner_text("#groups summary")
    page.click("#groups summary")
    page.click("#groups details p a")
    page.wait_for_selector("#page table")
    assert page.inner_text("#page h1") == f"Group: {groups.name[2]}" and page.locator("#page .context").count() >= 4
    assert [int(a) for a in page.locator("#page tbody th a").all_inner_texts()] == list(groups.features[2])
    page.click("#page tbody th a >> nth=0")
    page.wait_for_selector("#feature .context")
    page.click(f"#feature .grouped a:text-is('{groups.name[2]}')")
    page.wait_for_selector("#page table")
    page.goto(f"{run.as_uri()}/atlas/index.html#page=group&id=99")
    page.wait_for_selector("#page details")
    assert browser.errors == []


def test_filters_for_features_put_groups_away(built, browser):
    page = browser.page(width=1280)
    page.goto(f"{built[0].as_uri()}/atlas/index.html#level=0")
    page.wait_for_selector("#table .tabulator-row a")
    assert not page.is_visible("#groups")


def test_a_run_without_groups_shows_none_and_a_published_one_no_contexts(copy):
    write_atlas(copy, AtlasConfig(publish=True))
    assert all(group["groups"] == [] and group["examined"] is None for group in data(copy / "atlas/data/groups.js")[0].values())
    shutil.rmtree(copy / "interpretations/groups")
    (copy / "interpretations/groups.parquet").unlink()
    write_atlas(copy)
    assert data(copy / "atlas/data/table.js")[0]["groups"] == [] and not (copy / "atlas/data/groups.js").exists()


def test_a_case_of_one_study_has_no_interval():
    from saerad.show import atlas
    told = {"reports": 2, "strict": [0.0, 0.0, 0.84], "paper": [0.5, None, None], "clinical": [0.5, None, None]}
    assert atlas._case_in_words(told) == "strictly 0% [0, 84], in the paper's wording 50%, clinically 50% (2 reports)"
    assert atlas._case_in_words({"shown": {"reports": 0}}) == atlas._case_in_words(None) == ""
