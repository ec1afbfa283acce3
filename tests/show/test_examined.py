"""Hits, misses and false alarms of a feature are shown where its score is, with their words; a published edition holds none of them."""
import json
import re
import shutil
from collections import Counter
from types import SimpleNamespace

import pandas as pd
import pyarrow as pa
import pytest
from word_world import make_sae, make_store

from saerad.core import read_table, write_json, write_table
from saerad.interpretation.exemplars import ExemplarsConfig, collect_exemplars
from saerad.interpretation.hard_negatives import add_hard_negatives
from saerad.interpretation.interpret import InterpretationConfig, interpret, interpretation_summary
from saerad.show.atlas import AtlasConfig, build_atlas, headlines
from saerad.show.examined import examined_pages, judged_contexts, kinds_of, named_tokens
from saerad.show.lab import open_run

OPEN = SimpleNamespace(may_leave=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The word world, examined with explanations that look for a word, a third of them for the wrong one."""
    folder = tmp_path_factory.mktemp("run")
    cfg = ExemplarsConfig(min_explain=5, min_score=5, explain_active=8, explain_silent=8, score_active=20, score_silent=20, near_pool=200)
    store, sae = make_store(folder / "store"), make_sae()
    collect_exemplars(store, sae, cfg, 0, folder / "exemplars")
    add_hard_negatives(store, sae, cfg, 0, folder / "exemplars")
    ours = interpret(folder / "exemplars", InterpretationConfig(bootstrap=10), 0, OPEN, folder / "ours")
    texts = ours[ours.status == "scored"][["feature", "explanation"]].reset_index(drop=True)
    texts.loc[::3, "explanation"] = texts.explanation.iloc[::-1].to_numpy()[::3]
    texts.to_csv(folder / "theirs.csv", index=False)
    interpret(folder / "exemplars", InterpretationConfig(descriptions=str(folder / "theirs.csv"), bootstrap=10, protocol="saerad"), 0, OPEN,
              folder / "interpretations")
    write_json(folder / "summary.json", {})
    return open_run(folder)


def test_every_judged_context_has_its_words_and_its_kind(run):
    record = read_table(run / "interpretations/examinations.parquet").to_pandas()
    seen = Counter()
    for feature, rows in record.groupby("feature"):
        judged = judged_contexts(run.examinations(feature), run.exemplars(feature))
        assert len(judged) == len(rows) and judged.tokens.map(len).gt(0).all()
        seen.update(judged.kind)
        firing = judged[judged.truth]
        assert (firing.activations.map(max).round(2) - firing.activation).abs().max() < 0.02
    assert seen["hit"] and seen["miss"] and seen["false alarm"] and not seen["unread"]


def test_kinds():
    truth, answer = pd.Series([True, True, True, False, False, False]), pd.Series([1, 0, -1, 1, 0, -1])
    assert kinds_of(truth, answer).tolist() == ["hit", "miss", "unread", "false alarm", "", "unread"]


def test_words_are_named_in_all_their_pieces():
    tokens = [" Small", " eff", "usion", ",", " not", " an", " effusion", "."]
    assert named_tokens(tokens, False, "effusions of any kind") == [False] * 8
    assert named_tokens(tokens, False, 'on "effusion" after ","') == [False, True, True, True, False, False, True, False]


def test_pages_of_some_features_are_those_of_each(run):
    together = examined_pages(run, 0, 1000)
    assert together and all(examined_pages(run, f, f + 1) == {f: page} for f, page in list(together.items())[:4])
    for f, page in together.items():
        table = run.examinations(f)
        assert f"{((table.source == 'firing') & (table.answer == 1)).sum()} of {table.truth.sum()} contexts in which it fires" in page["about"]
        assert all(len(c["tokens"]) == len(c["activations"]) == len(c["named"]) for g in page["groups"] for c in g["contexts"])
        assert all(len(g["contexts"]) <= 4 for g in page["groups"])


def test_the_scores_of_one_feature(run):
    table = run.table("interpretations/interpretations.parquet").set_index("feature")
    f = int(table.f1.dropna().index[2])
    assert run.scores(f)["f1"] == table.f1[f] and run.scores(99_999) is None
    assert set(run.exemplars(f).role) >= {"explain_active", "score_active", "score_near"}


def test_the_laboratory_folds_them_under_the_feature(run):
    f = next(f for f, page in examined_pages(run, 0, 1000).items() if {"Mis", "Fal"} <= {g["title"][:3] for g in page["groups"]})
    html = run[f]._repr_html_()
    assert "<summary>Misses: it fires, and the answer was no" in html and "<summary>False alarms" in html and "outline:1px solid" in html


def data_of(index):
    for path in sorted((index.parent / "data").glob("features-*.js")):
        yield from json.loads(re.fullmatch(r"saerad\.put\(\d+, (.*)\);\n", path.read_text(encoding="utf-8"), re.S)[1]).values()


def test_a_published_edition_holds_no_judged_context(run):
    assert any(page["examined"] and page["examined"]["groups"] for page in data_of(build_atlas(run, AtlasConfig(views=False))))
    assert all(page["examined"] is None for page in data_of(build_atlas(run, AtlasConfig(publish=True))))


def test_a_page_shows_its_examination(run, browser):
    index = build_atlas(run, AtlasConfig(views=False))
    f = next(f for f, page in examined_pages(run, 0, 1000).items() if any(g["title"].startswith("False") for g in page["groups"]))
    page = browser.page()
    page.goto(f"{index.as_uri()}#feature={f}")
    section = page.locator("section", has=page.get_by_role("heading", name="Its examination"))
    assert "The answer was yes for" in section.inner_text() and section.locator("summary", has_text="False alarms").count() == 1
    assert section.locator(".token.named").count() > 0


def test_what_probabilities_are_worth_stands_beside_the_f1(run, tmp_path, browser):
    shutil.copytree(run.folder, tmp_path / "sure")
    path = tmp_path / "sure/interpretations/interpretations.parquet"
    table = read_table(path).to_pandas()
    for name, value in (("auroc", 0.713), ("calibrated_f1", 0.641)): table[name] = value
    write_table(path, pa.Table.from_pandas(table, preserve_index=False))
    f, sure = int(table.feature[table.f1.notna()].iloc[0]), open_run(tmp_path / "sure")
    assert "auroc 0.71; calibrated f1 0.64" in sure[f]._repr_html_() and "auroc" not in run[f]._repr_html_()
    page = browser.page()
    for folder, told in ((sure, True), (run, False)):
        page.goto(f"{build_atlas(folder, AtlasConfig(views=False)).as_uri()}#feature={f}")
        shown = page.get_by_role("list", name="Scores").inner_text()
        assert ("AUROC of its probabilities" in shown and "0.71" in shown and "0.64" in shown) == told


def test_who_was_asked_stands_first(run, tmp_path):
    table = run.table("interpretations/interpretations.parquet")
    said = interpretation_summary(table)
    assert (said["interpreter"], said["protocol"]) == ("lexical", "saerad")
    claim, caveat = headlines({"interpretation": said})[0]
    assert claim.startswith("The lexical interpreter was asked by the protocol saerad to explain") and f"of {len(table):,} features" in claim


def test_a_report_of_failures_says_so(tmp_path):
    failed = pd.DataFrame({"feature": range(30), "level": 0, "density": 0.1, "interpreter": "openai", "model": "small-mind", "protocol": "paper",
                           "f1": None, "shuffled_f1": None, "explanation": "", "status": "unscored", "negatives": "random", "parse_failures": 1,
                           "refusals": 0, "scored_contexts": 0,
                           "reason": ["no explanation: parse failure"] * 20 + ["not chosen"] * 10})
    write_table(tmp_path / "interpretations/interpretations.parquet", pa.Table.from_pandas(failed))
    features = {"feature": range(30), "level": [0] * 30, "density": [0.1] * 30, "max": [1.0] * 30, "mean_active": [1.0] * 30, "status": ["ok"] * 30}
    write_table(tmp_path / "exemplars/features.parquet", pa.table(features))
    write_json(tmp_path / "summary.json", {"interpretation": interpretation_summary(failed)})
    build_atlas(tmp_path, AtlasConfig())
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "The openai interpreter (small-mind) was asked by the protocol paper to explain 20 of 30 features." in page
    assert "20 features were tried and none could be scored." in page and "most often because: no explanation: parse failure." in page
