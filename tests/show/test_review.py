"""The review pack: what it hides, what a browser keeps and exports, and what readers' answers come to."""
import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import yaml
from sklearn.metrics import cohen_kappa_score

from saerad.core import UserError, read_json, read_table, write_json, write_table
from saerad.run.cli import main
from saerad.show.invented import invent_run
from saerad.show.review import (
    bootstrap_interval,
    chosen_features,
    cohen,
    disagreements,
    draw_agreement,
    fleiss,
    review_pack,
    review_score,
    shuffled_items,
    write_review,
)
from saerad.show.run_folder import Run

NASTY = '<script>document.title = "broken"</script>'


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = invent_run(tmp_path_factory.mktemp("run"))
    rows = read_table(folder / "exemplars/exemplars.parquet").to_pylist()
    for row in rows: row["tokens"][4] = NASTY
    write_table(folder / "exemplars/exemplars.parquet", pa.Table.from_pylist(rows))
    return folder


@pytest.fixture(scope="module")
def pack(run, tmp_path_factory):
    return review_pack(run, tmp_path_factory.mktemp("pack"), "top:8", contexts=4)


def answers(pack, name, rate, items=None):
    key = read_json(pack.with_name("key.json"))
    ratings = {i: {"fits": rate(k)} for i, k in key["items"].items() if items is None or i in items}
    write_json(pack.with_name(f"{name}.json"), {"pack": key["pack"], "reader": name, "items": ratings})
    return pack.with_name(f"{name}.json")


def test_features_are_chosen_by_rank_or_by_number(run):
    scores = read_table(run / "interpretations/interpretations.parquet").to_pandas()
    top = chosen_features(Run(run), "top:5")
    assert top.f1.is_monotonic_decreasing and top.explanation.is_unique and top.f1.iloc[0] == scores.f1.max()
    two = scores[scores.f1.notna()].feature[:2].tolist()
    assert chosen_features(Run(run), f"{two[1]},{two[0]}").feature.tolist() == two[::-1]
    for wrong, message in (("best", "write top:50"), ("top:0", "write top:50"), ("99999,1", "no scored explanation")):
        with pytest.raises(UserError, match=message): chosen_features(Run(run), wrong)


def test_controls_carry_another_explanation_and_nothing_else_does(run):
    chosen = chosen_features(Run(run), "top:8")
    explanations = chosen.set_index("feature").explanation
    items = shuffled_items(chosen, 0.25, 0)
    assert sum(not i["own"] for i in items) == 2 and sorted(i["feature"] for i in items) == sorted(chosen.feature)
    for item in items: assert (explanations[item["feature"]] == item["explanation"]) == item["own"]
    assert all(i["own"] for i in shuffled_items(chosen, 0, 0)) and shuffled_items(chosen, 0.25, 0) == items != shuffled_items(chosen, 0.25, 1)


def test_the_page_hides_numbers_studies_scores_and_the_key(run, pack):
    page, key = pack.read_text(encoding="utf-8"), read_json(pack.with_name("key.json"))
    body = page.split("<main>")[1].split("</main>")[0]
    assert body.count('<section class="item"') == 8 == len(key["items"])
    studies = {e["study"] for e in read_table(run / "exemplars/exemplars.parquet").to_pylist()}
    for secret in ("F1", "control", "own", "study", *(f">{s}<" for s in studies),
                   *(str(round(k["f1"], 2)) for k in key["items"].values())): assert secret not in body, secret
    assert NASTY not in page and "&lt;script&gt;document" in page and "default-src 'none'" in page
    assert pack.read_bytes() == review_pack(run, pack.parent.parent / "again", "top:8", contexts=4).read_bytes()


def test_a_published_run_gives_no_pack(run, tmp_path):
    (run / "config.yaml").write_text(yaml.safe_dump({"atlas": {"publish": True}}), encoding="utf-8")
    try:
        with pytest.raises(UserError, match="publish"): review_pack(run, tmp_path / "pack")
    finally: (run / "config.yaml").unlink()
    assert not (tmp_path / "pack").exists()


def test_kappas_are_those_of_scikit_learn_and_of_fleiss_own_example():
    draw = np.random.default_rng(0)
    a, b = draw.integers(0, 3, 200), draw.integers(0, 3, 200)
    b = np.where(draw.random(200) < 0.5, a, b)
    assert cohen(a, b) == pytest.approx(cohen_kappa_score(a, b)) and cohen(a, b, True) == pytest.approx(cohen_kappa_score(a, b, weights="linear"))
    counts = np.array([[5, 1, 0], [0, 4, 2], [3, 3, 0], [0, 0, 6], [2, 2, 2]])           # by hand, after Fleiss (1971)
    ratings = np.array([np.repeat([0, 1, 2], row) for row in counts])
    share, agreed = counts.sum(0) / counts.sum(), ((counts**2).sum(1) - 6) / 30
    assert fleiss(ratings) == pytest.approx((agreed.mean() - (share**2).sum()) / (1 - (share**2).sum()))
    assert np.isnan(cohen(np.ones(4), np.ones(4))) and np.isnan(fleiss(np.ones((4, 2))))


def test_an_interval_covers_its_value_and_shrinks_with_more_items():
    draw = np.random.default_rng(1)
    few, many = (bootstrap_interval(cohen, a, np.where(draw.random(n) < 0.6, a, draw.integers(0, 3, n)))
                 for n in (20, 500) for a in [draw.integers(0, 3, n)])
    for found in (few, many): assert found["low"] < found["value"] < found["high"]
    assert many["high"] - many["low"] < (few["high"] - few["low"]) / 2
    assert bootstrap_interval(cohen, np.ones(5), np.ones(5)) == {"value": None, "low": None, "high": None, "items": 5}


def test_readers_who_know_agree_and_a_kind_one_cannot_tell_controls(pack):
    files = [answers(pack, name, lambda k: 2 if k["own"] else 0) for name in ("AB", "CD")]
    found = review_score(files)
    assert found["between_readers"]["pairs"]["AB and CD"]["cohen"]["value"] == found["between_readers"]["fleiss"]["value"] == 1
    assert found["with_scores"]["own_over_control_auroc"]["value"] == 1 and found["readers"]["AB"]["mean_control"] == 0
    kind = review_score([answers(pack, "EF", lambda k: 2)])
    assert kind["with_scores"]["own_over_control_auroc"]["value"] == 0.5 and kind["between_readers"] == {"pairs": {}, "fleiss": None}
    assert kind["with_scores"]["f1_spearman"]["value"] is None


def test_ratings_that_rise_with_f1_correlate_with_it(pack):
    middle = np.median([k["f1"] for k in read_json(pack.with_name("key.json"))["items"].values()])
    found = review_score(answers(pack, "GH", lambda k: 2 if k["f1"] > middle else 1))
    assert found["with_scores"]["f1_spearman"]["value"] > 0.7 and found["readers"]["GH"]["rated"] == 8


def test_readers_who_rated_different_items_are_compared_on_what_both_rated(pack):
    found = review_score([answers(pack, "IJ", lambda k: int(k["own"]), {"1", "2", "3", "4"}),
                          answers(pack, "KL", lambda k: int(k["own"]), {"3", "4", "5"})])
    assert found["between_readers"]["pairs"]["IJ and KL"]["cohen"]["items"] == 2
    assert found["readers"]["KL"]["rated"] == 3


@pytest.mark.parametrize("wrong, message", [({"pack": "another"}, "another|no answers to the pack"), ({"items": {}}, "no ratings"),
                                         ({"items": {"1": {"fits": 7}}}, "the rating 7"),
                                         ({"items": {"99": {"fits": 1}}}, "item 99"), ([], "no answers")])
def test_files_that_cannot_be_scored_are_named(pack, tmp_path, wrong, message):
    key = read_json(pack.with_name("key.json"))
    write_json(tmp_path / "key.json", key)
    write_json(tmp_path / "a.json", {"pack": key["pack"], "reader": "A", "items": {"1": {"fits": 1}}} | wrong if isinstance(wrong, dict) else wrong)
    with pytest.raises(UserError, match=message): review_score(tmp_path / "a.json")


def test_the_key_is_needed_and_a_reader_counts_once(pack, tmp_path):
    file = answers(pack, "MN", lambda k: 1)
    with pytest.raises(UserError, match="both of the reader"): review_score([file, file])
    (tmp_path / "alone.json").write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(UserError, match="--key"): review_score(tmp_path / "alone.json")
    assert review_score(tmp_path / "alone.json", pack.with_name("key.json"))["readers"]["MN"]["rated"] == 8


def test_a_reader_rates_leaves_comes_back_and_exports(pack, browser, tmp_path):
    page = browser.page()
    page.goto(pack.as_uri())
    assert page.locator(".item:visible").count() == 1 and page.is_hidden("#item-1 .said") and page.title() == "Review of features"
    page.fill("#reader", "AB")
    page.fill("#item-1 [name=guess]", "an effusion, I think")
    page.check("#item-1 [name=coherence-1][value='2']")
    page.click("#item-1 .reveal")
    assert page.is_visible("#item-1 .said") and page.is_disabled("#item-1 [name=guess]")
    page.check("#item-1 [name=fits-1][value='1']")
    page.check("#item-1 [value=too_wide]")
    page.fill("#item-1 [name=comment]", "<b>wide</b>")
    page.click("#item-1 .to[data-to='2']")
    page.click("#item-2 .reveal")
    page.check("#item-2 [name=fits-2][value='2']")
    assert "2 of 8" in page.inner_text("#done")
    page.reload()                                     # the browser has kept it, and goes on where the reader left
    assert page.is_visible("#item-3") and page.locator(".item:visible").count() == 1
    page.click("#jump button >> nth=0")
    assert page.input_value("#item-1 [name=comment]") == "<b>wide</b>" and page.is_visible("#item-1 .said") and page.input_value("#reader") == "AB"
    with page.expect_download() as download: page.click("#export")
    download.value.save_as(tmp_path / "AB.json")
    exported = json.loads((tmp_path / "AB.json").read_text(encoding="utf-8"))
    assert exported["items"]["1"].pop("seconds") >= 0
    assert exported["items"]["1"] | {"at": 0} == {"guess": "an effusion, I think", "coherence": 2, "revealed": True, "fits": 1,
                                              "confusions": ["too_wide"], "comment": "<b>wide</b>", "at": 0}
    assert review_score(tmp_path / "AB.json", pack.with_name("key.json"))["readers"]["AB"]["rated"] == 2
    page.evaluate("localStorage.clear()")
    page.reload()
    assert "0 of 8" in page.inner_text("#done")
    page.set_input_files("#import", tmp_path / "AB.json")
    page.wait_for_function("document.getElementById('done').textContent.startsWith('2')")
    (tmp_path / "other.json").write_text('{"pack": "another"}', encoding="utf-8")
    page.set_input_files("#import", tmp_path / "other.json")
    page.wait_for_selector("#trouble:not([hidden])")
    assert "another pack" in page.inner_text("#trouble") and "2 of 8" in page.inner_text("#done")
    page.evaluate("localStorage.clear()")


def test_an_item_takes_two_keys_and_a_rating_can_be_taken_back(pack, browser):
    page = browser.page()
    page.goto(pack.as_uri())
    assert page.locator(".how").evaluate("e => e.getBoundingClientRect().bottom") < 900, "the instructions stand on one screen"
    for _ in range(3):
        shown = page.locator(".item:visible").get_attribute("data-item")
        page.keyboard.press("2")                      # one clear idea: the explanation appears
        assert page.is_visible(f"#item-{shown} .said") and page.is_checked(f"#item-{shown} [name=coherence-{shown}][value='2']")
        page.keyboard.press("a")                      # too wide
        page.keyboard.press("1")                      # fits partly: the next item appears
        assert page.locator(".item:visible").get_attribute("data-item") == str(int(shown) + 1)
    assert "3 of 8" in page.inner_text("#done")
    page.keyboard.press("u")
    assert "2 of 8" in page.inner_text("#done") and page.is_visible("#item-3") and page.is_visible("#item-3 .said")
    assert page.locator("#item-3 [name=fits-3]:checked").count() == 0 and page.is_disabled("#item-3 [name=coherence-3][value='0']")
    page.keyboard.press("0")
    page.keyboard.press("ArrowLeft")
    assert page.is_visible("#item-3") and page.is_checked("#item-3 [value=too_wide]") and page.is_checked("#item-3 [name=fits-3][value='0']")
    page.evaluate("localStorage.clear()")


def test_arrows_choose_an_answer_where_one_is_chosen_and_an_item_elsewhere(pack, browser):
    page = browser.page()
    page.goto(pack.as_uri())
    page.focus("#item-1 [name=coherence-1][value='0']")
    page.keyboard.press("Space")
    page.keyboard.press("ArrowRight")
    assert page.is_visible("#item-1") and page.is_checked("#item-1 [name=coherence-1][value='1']")
    page.focus("#item-1 .reveal")
    page.keyboard.press("ArrowRight")
    assert page.is_visible("#item-2") and page.is_hidden("#item-1")
    page.evaluate("localStorage.clear()")


def test_the_command_gives_kappas_disagreements_and_a_figure(pack, capsys):
    files = [answers(pack, "UV", lambda k: 2), answers(pack, "WX", lambda k: 2 if k["own"] else 0)]
    with pytest.raises(SystemExit) as end: main(["review", "score", *map(str, files)])
    told = capsys.readouterr()
    assert end.value.code == 0 and json.loads(told.out)["between_readers"]["pairs"]["UV and WX"]["cohen"].keys() >= {"value", "low", "high"}
    assert len(pd.read_csv(pack.with_name("agreement") / "disagreements.csv")) == 2 and "agreement.svg" in told.err


def test_two_readers_share_one_file_and_see_nothing_of_each_other(pack, browser, tmp_path):
    page = browser.page()
    page.goto(pack.as_uri())
    for name, rating in (("AB", "2"), ("CD", "0")):
        page.fill("#reader", name)
        page.click("h1")
        assert "0 of 8" in page.inner_text("#done") and page.is_visible("#item-1") and page.is_hidden("#item-1 .said")
        for _ in range(8):
            page.keyboard.press("1")
            page.keyboard.press(rating)
        assert "8 of 8" in page.inner_text("#done")
    page.fill("#reader", "AB")
    page.click("h1")
    assert "8 of 8" in page.inner_text("#done") and page.is_checked("#item-1 [name=fits-1][value='2']")
    with page.expect_download() as download: page.click("#export")
    download.value.save_as(tmp_path / "both.json")
    found = review_score(tmp_path / "both.json", pack.with_name("key.json"))
    assert set(found["readers"]) == {"AB", "CD"} and found["readers"]["AB"]["mean_own"] == 2 and found["readers"]["CD"]["mean_own"] == 0
    assert found["between_readers"]["pairs"]["AB and CD"]["cohen"]["items"] == 8 and found["readers"]["AB"]["median_seconds"] is not None
    page.evaluate("localStorage.clear()")


def test_what_readers_differ_on_is_listed_with_its_contexts_and_drawn(pack, tmp_path):
    files = [answers(pack, "QR", lambda k: 2), answers(pack, "ST", lambda k: 2 if k["own"] else 0)]
    key = read_json(pack.with_name("key.json"))["items"]
    table = disagreements(files)
    assert set(table["item"]) == {int(i) for i, k in key.items() if not k["own"]} and (table.gap == 2).all() and (table.QR > table.ST).all()
    assert all("[" in text and NASTY in text for text in table.contexts) and not table.own.any()
    written = write_review(files, tmp_path / "agreed")
    assert [p.name for p in written] == ["disagreements.csv", "agreement.svg", "agreement.csv"]
    assert written[1].read_text(encoding="utf-8").lstrip().startswith("<?xml")
    assert len(pd.read_csv(written[0])) == len(table)
    drawn = pd.read_csv(written[2])
    assert len(drawn) == len(key) and (drawn["mean rating"] == (drawn.QR + drawn.ST) / 2).all() and set(drawn.own) == {True, False}
    assert len(disagreements(files[0])) == 0 and draw_agreement(files[0]).axes


def test_an_export_without_initials_is_refused(pack, browser):
    page = browser.page(width=390)
    page.goto(pack.as_uri())
    page.fill("#reader", " ")
    page.click("#export")
    assert "initials" in page.inner_text("#trouble") and page.evaluate("document.documentElement.scrollWidth") <= 390


def test_confusions_are_counted(pack):
    key = read_json(pack.with_name("key.json"))
    write_json(pack.with_name("OP.json"),
               {"pack": key["pack"], "reader": "OP",
                "items": {"1": {"fits": 1, "confusions": ["side", "time"]}, "2": {"fits": 0, "confusions": ["side"]}}})
    assert review_score(pack.with_name("OP.json"))["confusions"] == {"side": 2, "time": 1}
