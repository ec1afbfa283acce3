"""Harms by name, the language model as a judge against a real server, and how far judges agree."""
import pandas as pd
import pytest
from judge_server import JudgeServer
from sklearn.metrics import cohen_kappa_score
from word_server import completion

from saerad.core import UserError
from saerad.interpretation.endpoint import EndpointConfig, Ledger
from saerad.steering.judges import (
    OUTCOMES,
    JudgeConfig,
    LanguageJudge,
    Target,
    finding_differences,
    harms_of,
    judge_agreement,
    judges_of,
    judging_estimate,
    parse_verdict,
    target_of,
    unanswered_verdicts,
)
from saerad.studies.findings import read_findings
from saerad.studies.record import Source

PAIR = ("Effusion.", "Effusion. Nodule.", target_of("nodule"))


@pytest.mark.parametrize(("before", "after", "harms"), [
    ("Small left effusion.", "Small right effusion.", ("side_flipped",)),
    ("Clear lungs.", "Left PICC.", ("device_invented",)),
    ("Left PICC.", "Left PICC. Effusion.", ()),
    ("Small pneumothorax.", "Clear lungs.", ("critical_dropped",)),
    ("Small pneumothorax.", "The pneumothorax has resolved.", ("critical_dropped", "unfounded_change")),
    ("Large effusion.", "Small effusion.", ()),
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


def test_a_judge_that_cannot_be_read_gives_no_verdict_and_a_reason(tmp_path):
    with JudgeServer(lambda n, body: (200, {}, completion("good!"))) as server, LanguageJudge(cfg(server), Ledger(tmp_path / "l"), True) as one:
        assert vars(one.judge([PAIR])[0]) == {"outcome": None, "direction": None, "why": "parse failure"}


def test_an_endpoint_that_fails_leaves_the_judging_unfinished_and_is_asked_for_the_rest(tmp_path):
    pairs = [("Effusion.", "Effusion." + " Nodule." * i, target_of("nodule")) for i in range(8)]
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
    needed = judging_estimate([PAIR] * 10, EndpointConfig(price_in=1.0, price_out=1.0))
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
