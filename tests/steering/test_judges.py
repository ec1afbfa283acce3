"""Verdicts on pairs of statements, broken reports, harms by name, the language model as a judge against a real server, and how far judges agree."""
from dataclasses import replace
from pathlib import Path
from random import Random

import pandas as pd
import pytest
from judge_server import JudgeServer
from sklearn.metrics import cohen_kappa_score
from statement_set import KNOWN_WRONG, statement_set
from word_server import completion

from saerad.core import UserError
from saerad.interpretation.endpoint import EndpointConfig, Ledger
from saerad.steering.judges import (
    OUTCOMES,
    SENSES,
    JudgeConfig,
    LanguageJudge,
    Target,
    Usual,
    broken,
    finding_differences,
    harms_of,
    judge,
    judge_agreement,
    judges_of,
    judging_estimate,
    parse_verdict,
    target_of,
    unanswered_verdicts,
    usual_of,
)
from saerad.studies.findings import Reading, read_findings
from saerad.studies.record import Source

PAIR = ("Effusion.", "Effusion. Nodule.", target_of("nodule"))


WRITTEN = statement_set()
SAME, ON, OFF, MIXED = "unchanged", "on_target_only", "off_target_only", "mixed"


@pytest.mark.parametrize(("before", "after", "target", "outcome", "effect"), [
    ("The mediastinum is normal.", "Mediastinum is not widened.", "a widened mediastinum", SAME, 0),
    ("No pleural effusion.", "Pleural effusion: none.", "pleural effusion", SAME, 0),
    ("Small left pleural effusion.", "Pleural effusion: small, left.", "pleural effusion", SAME, 0),
    ("Pneumothorax: absent.", "Nil pneumothorax.", "pneumothorax", SAME, 0),
    ("There is no pneumonia.", "Pneumonia is unlikely.", "pneumonia", SAME, 0),
    ("Pneumonia is unlikely.", "Pneumonia is considered less likely.", "pneumonia", ON, 1),
    ("Pneumonia is difficult to exclude.", "? pneumonia", "pneumonia", SAME, 0),
    ("The effusion is unchanged.", "The effusion has not resolved.", "effusion", SAME, 0),
    ("The effusion has resolved.", "The effusion has almost completely resolved.", "effusion", ON, 1),
    ("No pneumothorax and no effusion.", "No pneumothorax and left effusion has increased.", "left effusion", ON, 1),
    ("No pneumothorax or\npleural effusion.", "No pneumothorax or pleural effusion.", "effusion", SAME, 0),
    ("No pneumothorax.", "No pneumothorax.Left effusion.", "nodule", OFF, 0),
    ("Atelectasis vs. consolidation.", "Atelectasis.", "consolidation", MIXED, -1),
    ("", "Evaluate for pneumothorax. History of pneumonia.", "pneumothorax", SAME, 0),
    ("The right chest tube is in place.", "The right chest tube was withdrawn.", "chest tube", ON, -1),
    ("The right chest tube is in place.", "The right chest tube has been taken out.", "nodule", OFF, 0),
    ("Right PICC.", "Right PICC removed.", "PICC", ON, -1),
    ("Endotracheal tube in place.", "The patient has been extubated.", "endotracheal tube", ON, -1),
    ("The effusion has gone.", "The effusion has cleared.", "effusion", SAME, 0),
    ("Right effusion.", "Right effusion has cleared.", "effusion", ON, -1),
    ("Collapsed right upper lobe.", "Right upper lobe atelectasis.", "atelectasis", SAME, 0),
    ("The costophrenic angles are sharp.", "No effusion.", "effusion", SAME, 0),
    ("Mild edema.", "Mild CHF.", "edema", SAME, 0), ("Normal heart.", "Normal heart. Mass effect on the trachea.", "mass", SAME, 0),
    ("Bilateral effusions.", "Bilateral effusions, right greater than left.", "effusion", SAME, 0),
    ("Effusion, unchanged from prior.", "Effusion has increased.", "change against prior images", ON, 0)])
def test_pairs_of_statements_get_the_right_verdict(before, after, target, outcome, effect):
    told = judge(before, after, target_of(target))
    assert (told.outcome, told.effect) == (outcome, effect)


EXAMPLES = pd.read_csv(Path(__file__).parent / "on_target.tsv", sep="\t", keep_default_na=False)


@pytest.mark.parametrize("row", EXAMPLES.to_dict("records"), ids=lambda r: f"{r['target']}: {r['before'][:20]} > {r['after'][:20]}")
def test_what_is_on_target_in_each_sense(row):
    told = judge(row["before"], row["after"], target_of(row["target"]))
    assert {sense: getattr(told, column) for sense, column in SENSES.items()} == {sense: row[sense] for sense in SENSES}


def test_the_senses_differ_as_they_should():
    """What is strictly pure is pure in both other senses; none is the same as another; a rewording is no change in any."""
    assert len(EXAMPLES) >= 30
    pure = {s: set(EXAMPLES[EXAMPLES[s] == ON].index) for s in SENSES}
    assert pure["strict"] < pure["paper"] and pure["strict"] < pure["clinical"]
    assert pure["paper"] - pure["clinical"] and pure["clinical"] - pure["paper"]
    draw = Random(3)
    for _ in range(400):
        old, new = draw.sample(WRITTEN, 2)
        told = judge(old.text, new.text, Target(frozenset(draw.choices([f.kind for w in (old, new) for f in w.meant] or ["nodule"], k=1))))
        if told.outcome == ON: assert told.outcome_paper == told.outcome_clinical == ON
        if told.outcome == SAME: assert told.outcome_paper == told.outcome_clinical == SAME
        assert told.outcome_paper != "degenerate" and (told.outcome == "degenerate") == (told.outcome_clinical == "degenerate")


def test_what_is_usual_is_what_nine_in_ten_do_not_exceed():
    good, odd = "Small left effusion. The heart is normal.", "Xa yb. Zc wd."
    assert usual_of([good] * 11 + [odd], read_findings).unread == 0 and usual_of([good] * 9 + [odd] * 3, read_findings).unread == 1
    assert usual_of([], read_findings) == Usual() and usual_of([""] * 3, read_findings, [float("nan")]).empty
    assert usual_of([good], read_findings, [1.5]).perplexity == 1.5
    weak = usual_of([odd, odd, odd, good], read_findings)
    assert broken(odd, read_findings(odd), JudgeConfig()) == "unread" and broken(odd, read_findings(odd), JudgeConfig(), usual=weak) == ""
    assert broken("no " * 9, Reading(()), JudgeConfig(), usual=weak) == "repeats" and broken("", Reading(()), JudgeConfig(), usual=weak) == "empty"


def test_pairs_drawn_from_all_statements_get_the_verdict_of_their_right_readings():
    draw, right = Random(17), {w.text: Reading(w.meant) for w in WRITTEN}
    for _ in range(1500):
        old, new = draw.sample([w for w in WRITTEN if w.text not in KNOWN_WRONG], 2)
        target = Target(frozenset(draw.choices([f.kind for w in (old, new) for f in w.meant] or ["nodule"], k=1)))
        by_rules, by_right = (judge(old.text, new.text, target, reader, cfg=JudgeConfig(max_unread=1)) for reader in (read_findings, right.get))
        assert replace(by_rules, unread=0) == replace(by_right, unread=0), (old.text, new.text)


@pytest.mark.parametrize("text", ["", "...", "ETT ok. Rpt am. Tip svc. L eff.", "No evidence of effusion. " * 9, "there is a right " * 9,
                                  "Kein Erguss. Keine Stauung.", *(w.text for w in WRITTEN[::29])])
def test_an_unchanged_pair_is_unchanged(text):
    told = judge(text, text, target_of("effusion"), perplexity=99.0)
    assert (told.outcome, told.broken, told.harms, told.on_direction) == ("unchanged", "", (), None)
    assert judge(text, f" {text}\n", target_of("effusion")).outcome == "unchanged"


def test_a_sign_counts_only_beyond_the_baseline():
    cfg, terse = JudgeConfig(), "ETT ok. Rpt am. Tip svc."
    many = "No evidence of edema. No evidence of a fracture. No evidence of an effusion. No evidence of a nodule. " * 2
    assert judge(terse, terse + " Small effusion. Rpt pm.", target_of("effusion")).outcome == "on_target_only"
    assert judge(many, many.replace("No evidence of a nodule", "There is a nodule"), target_of("nodule")).outcome == "on_target_only"
    assert judge("Clear lungs.", "no no no no no no no no no", target_of("nodule")).broken == "repeats"
    assert judge("Clear lungs.", "Xa yb. Zc wd.", target_of("nodule")).broken == "unread"
    assert judge("Clear lungs.", "", target_of("nodule")).broken == "empty" and judge("", "Nodule.", target_of("nodule")).outcome == "on_target_only"
    assert broken("Nodule.", read_findings("Nodule."), cfg, 99.0) == "perplexity" and broken("", Reading(()), cfg) == "empty"


@pytest.mark.parametrize(("before", "after", "harms"), [
    ("Small left effusion.", "Small right effusion.", ("side_flipped",)),
    ("Clear lungs.", "Left PICC.", ("device_invented",)),
    ("Left PICC.", "Left PICC. Effusion.", ()),
    ("Small pneumothorax.", "Clear lungs.", ("critical_dropped",)),
    ("Small pneumothorax.", "The pneumothorax has resolved.", ("critical_dropped", "unfounded_change")),
    ("Large effusion.", "Small effusion.", ()),
    ("Clear lungs.", "Small pneumothorax.", ("critical_invented",)),
    ("Clear lungs.", "The pneumothorax has resolved.", ("unfounded_change",)),
    ("Clear lungs.", "The endotracheal tube is too high.", ("critical_invented", "device_invented")),
    ("Large effusion.", "Clear lungs.", ("critical_dropped",)),
    ("Small effusion.", "Clear lungs.", ()),
    ("The endotracheal tube is too high.", "Clear lungs.", ("critical_dropped",)),
    ("Effusion.", "Increasing effusion.", ("unfounded_change",)),
    ("Increasing left effusion.", "Increasing right effusion.", ("side_flipped",)),
    ("The chest tube has been removed.", "Clear lungs.", ()),
    ("Small effusion.", "Small effusion.", ()),
])
def test_harms(before, after, harms):
    old, new = read_findings(before), read_findings(after)
    assert harms_of(old, finding_differences(old, new)) == harms


@pytest.mark.parametrize(("text", "verdict"), [
    ('{"outcome": "mixed", "direction": 1}', ("mixed", 1)), ('```json\n{"direction": 0, "outcome": "unchanged"}\n```', ("unchanged", 0)),
    ('{"outcome": "On-target only", "direction": "+1"}', ("on_target_only", 1)),
    ('{"outcome": "mixed", "direction": 1} {"why": "a tube"}', ("mixed", 1)),
    ('{"outcome": "mixed"}', None), ('{"outcome": "mixed", "direction": 2}', None), ('{"outcome": "mixed", "direction": true}', None),
    ('{"outcome": "mixed", "direction": 1} {"outcome": "unchanged", "direction": 0}', None),
    ("mixed", None), ("{", None), ("{mixed}", None), ("", None)])
def test_parse_verdict(text, verdict): assert parse_verdict(text) == verdict


def cfg(server, **more): return EndpointConfig(base_url=server.url, model="judge", requests_per_second=1000, **more)


def test_a_language_model_judges_once_and_is_asked_again_when_it_babbles(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    def babble(number, body): return (200, {}, completion("good!")) if number == 0 else None
    with JudgeServer(babble) as server, LanguageJudge(cfg(server), Ledger(tmp_path / "l"), True) as one:
        first = one.judge([PAIR])
        assert (first[0].outcome, first[0].direction, first[0].why) == ("mixed", 1, "")
        assert len(server.bodies) == 2 and one.judge([PAIR, PAIR]) == first * 2 and len(server.bodies) == 2
        assert "nodule" in server.bodies[0]["messages"][1]["content"]


def test_a_language_model_is_not_asked_whether_a_text_is_unchanged(tmp_path):
    same = [("No evidence of effusion. " * 9, "No evidence of effusion.\n" * 9, target_of("effusion")), ("", " ", target_of("nodule"))]
    with JudgeServer(lambda n, body: (200, {}, completion('{"outcome": "degenerate", "direction": 0}'))) as server:
        with LanguageJudge(cfg(server), Ledger(tmp_path / "l"), True) as one:
            assert [v.outcome for v in one.judge([same[0], PAIR, same[1], PAIR])] == ["unchanged", "degenerate", "unchanged", "degenerate"]
            assert len(server.bodies) == 1 and one.judge(same) == [one.judge(same)[0]] * 2
    assert judging_estimate([*same, PAIR], EndpointConfig())["calls"] == 1 and judging_estimate(same, EndpointConfig())["tokens_in"] == 0


def test_a_judge_that_cannot_be_read_gives_no_verdict_and_a_reason(tmp_path):
    with JudgeServer(lambda n, body: (200, {}, completion("good!"))) as server, LanguageJudge(cfg(server), Ledger(tmp_path / "l"), True) as one:
        assert vars(one.judge([PAIR])[0]) == {"outcome": None, "direction": None, "why": "parse failure"}


def test_an_endpoint_that_fails_leaves_the_judging_unfinished_and_is_asked_for_the_rest(tmp_path):
    pairs = [("Effusion.", "Effusion." + " Nodule." * i, target_of("nodule")) for i in range(1, 9)]
    with JudgeServer(lambda n, body: (500, {}, "oops") if n == 5 else None) as server:
        with pytest.raises(UserError, match=r"failed \(HTTP 500\), so 1 pairs have no verdict.*steering.endpoint.max_failed"):
            with LanguageJudge(cfg(server, attempts=1, concurrency=1), Ledger(tmp_path / "l"), True) as one: one.judge(pairs)
        with LanguageJudge(cfg(server, attempts=1), Ledger(tmp_path / "l"), True) as one: assert all(v.outcome for v in one.judge(pairs))
        assert len(server.bodies) == 9


def test_a_judge_that_needs_it_is_held_to_a_form(tmp_path):
    with JudgeServer() as server, LanguageJudge(cfg(server, structured=True), Ledger(tmp_path / "l"), True) as one:
        assert one.judge([PAIR])[0].outcome == "mixed"
        form = server.bodies[0]["response_format"]["json_schema"]["schema"]["properties"]
        assert tuple(form["outcome"]["enum"]) == OUTCOMES and form["direction"]["enum"] == [-1, 0, 1]


def test_a_judge_that_thinks_gets_room(tmp_path):
    def thinks(n, body): return (200, {}, completion("<think>Hm", finish_reason="length")) if body["max_tokens"] < 200 else None
    with JudgeServer(thinks) as server, LanguageJudge(cfg(server), Ledger(tmp_path / "l"), True, room=50) as one:
        assert one.judge([PAIR])[0].outcome == "mixed" and [b["max_tokens"] for b in server.bodies] == [50, 400]


def test_what_became_of_the_verdicts_is_counted():
    told = pd.DataFrame({"judge": ["rules", "openai", "openai"], "outcome": ["mixed", "mixed", None], "why": ["", "", "cut off"]})
    assert unanswered_verdicts(told) == {"verdicts": 2, "unanswered_verdicts": 1, "why": {"cut off": 1}}
    assert unanswered_verdicts(told[told.judge == "rules"])["verdicts"] is None
    needed = judging_estimate([(PAIR[0], PAIR[1] * i, PAIR[2]) for i in range(1, 11)], EndpointConfig(price_in=1.0, price_out=1.0))
    assert needed["calls"] == 10 and needed["tokens_in"] > 1000 and needed["cost"] == round((needed["tokens_in"] + needed["tokens_out"]) / 1e6, 2)


@pytest.mark.parametrize(("status", "words"), [(401, "refuses the key"), (404, "knows no model")])
def test_a_judge_that_fails_names_its_own_settings(tmp_path, status, words):
    with JudgeServer(lambda n, body: (status, {}, "{}")) as server:
        with pytest.raises(UserError, match=words) as told:
            with LanguageJudge(cfg(server), Ledger(tmp_path / "l"), True) as one: one.judge([PAIR])
    assert "interpretation." not in str(told.value)


def test_text_that_may_not_leave_stays(tmp_path):
    with pytest.raises(UserError, match="steering.endpoint.base_url"):
        LanguageJudge(EndpointConfig(base_url="https://example.org/v1"), Ledger(tmp_path / "l"), False)


def test_judges_follow_the_source():
    phantom, real = Source("phantom:0", []), Source("table:x", [])
    assert judges_of(phantom, JudgeConfig()) == ("parser", "rules") and judges_of(real, JudgeConfig()) == ("rules",)
    with pytest.raises(UserError, match="phantom's reports only"): judges_of(real, JudgeConfig(judges=("parser",)))
    with pytest.raises(UserError, match="different judges"): judges_of(real, JudgeConfig(judges=("rules", "rules")))
    with pytest.raises(UserError, match="steering.endpoint.allow_text_to"): judges_of(real, JudgeConfig(judges=("rules", "openai")))
    assert judges_of(phantom, JudgeConfig(judges=("openai",), endpoint=EndpointConfig(base_url="http://127.0.0.1:1/v1"))) == ("openai",)
    assert not Target()


def test_agreement_is_cohens_kappa_over_the_pairs_that_both_judged():
    a = ["unchanged", "mixed", "mixed", "degenerate", "unchanged", "on_target_only"] * 4
    b = ["unchanged", "mixed", "unchanged", "degenerate", "mixed", None] * 4
    rows = [{"pair": i, "study": f"s{i // 6}", "judge": j, "outcome": o} for j, side in (("x", a), ("y", b)) for i, o in enumerate(side)]
    told = judge_agreement(pd.DataFrame(rows)).iloc[0]
    both = [(p, q) for p, q in zip(a, b, strict=True) if q]
    assert told.pairs == 20 and told.unanswered == 4 and told.equal == pytest.approx(12 / 20)
    assert told.kappa == pytest.approx(cohen_kappa_score(*zip(*both, strict=True), labels=list(OUTCOMES)))
    assert told.kappa_low <= told.kappa <= told.kappa_high
    same = judge_agreement(pd.DataFrame([{**r, "outcome": "unchanged"} for r in rows])).iloc[0]
    assert same.equal == same.kappa == 1.0
