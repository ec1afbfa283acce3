"""Steering: what explanations promise, what counts as on target, and the stage on a small real subject model."""
import math
import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from saerad.core import UserError, read_table
from saerad.findings import Finding, Reading, read_findings
from saerad.sae import MatryoshkaSAE
from saerad.steering import (
    OUTCOMES,
    SteeringConfig,
    Target,
    choose_features,
    choose_studies,
    differences,
    direction,
    judge,
    on_target,
    push,
    reader_of,
    repeats,
    side_by_side,
    sign_spearman,
    steer,
    steering_summary,
    target_of,
)
from saerad.studies import Picture, Source, Study
from saerad.subjects import random_mini

EFFUSION = Target(frozenset({"effusion"}))


# ---------------------------------------------------------------- what an explanation promises
@pytest.mark.parametrize(("explanation", "kinds", "words"), [
    ("mentions of pleural effusion on the left", {"effusion"}, {("side", "left")}),
    ("describing findings without comparison to prior images", set(), {("change", "")}),
    ("chest tubes", {"chest_tube"}, set()),
    ("words for chest_tube", {"chest_tube"}, set()),
    ("medical tubes", {"endotracheal_tube", "enteric_tube", "chest_tube"}, set()),
    ('Lexical baseline: fires on "tube" after "chest" in findings.', {"chest_tube"}, set()),
    ('Lexical baseline: fires on "a", "small" before "effusion" in comparison.', {"effusion"}, {("severity", "small")}),
    ('Lexical baseline: fires on "nodule" without "pneumothorax" before it.', {"nodule"}, set()),
    ('Lexical baseline: fires on "the" in prior report at the start of the section.', set(), set()),
    ("the hedge words possible and may", set(), {("certainty", "uncertain")}),
    ("unchanged or stable findings", set(), {("change", "unchanged")}),
    ("line breaks of a poem", {"central_line", "picc"}, set()),     # a loose name can mislead, which the table of judgements shows
    ("", set(), set()),
])
def test_target_of(explanation, kinds, words):
    target = target_of(explanation)
    assert (target.kinds, target.words) == (kinds, words)
    assert target.less == ("without comparison" in explanation)
    assert bool(target_of(explanation)) == bool(kinds or words)


def test_every_visual_concept_of_phantom_is_a_target():
    from saerad.findings import PHANTOM_KINDS
    from saerad.grammar import CONCEPTS
    named = {target_of(name).kinds for name, c in CONCEPTS.items() if c.kind == "visual" and name != "nothing in view"}
    assert {frozenset({k}) for k in PHANTOM_KINDS} <= named


# ---------------------------------------------------------------- what has changed
def test_differences_pair_the_most_similar():
    small, large, right = (Finding("effusion", s, "", z) for s, z in (("left", "small"), ("left", "large"), ("right", "small")))
    found = differences(Reading((small,)), Reading((large, right)))
    assert len(found) == 2 and found[0].before == small and found[1].before is None
    assert sum(len(d.altered) for d in found) == 1


def test_denials_do_not_count_and_doubt_does():
    absent, possible, present = (Finding("nodule", certainty=c) for c in ("absent", "uncertain", "present"))
    assert differences(Reading((absent,)), Reading(())) == []
    assert differences(Reading((possible,)), Reading((present,)))[0].altered == ("certainty",)
    assert differences(Reading((absent,)), Reading((present,)))[0].before is None


FINDINGS = st.builds(Finding, st.sampled_from(["effusion", "nodule", "picc"]), st.sampled_from(["", "left", "right"]),
                     st.just(""), st.sampled_from(["", "small", "large"]), st.sampled_from(["", "new", "resolved"]),
                     st.sampled_from(["present", "absent", "uncertain"]))
READINGS = st.lists(FINDINGS, max_size=4).map(lambda fs: Reading(tuple(fs)))


@settings(max_examples=200, deadline=None)
@given(READINGS, READINGS)
def test_differences_account_for_every_change_once(old, new):
    affirmed = [sorted(f for f in r.findings if f.certainty != "absent") for r in (old, new)]
    left = list(affirmed[0])
    for d in differences(old, new):
        if d.before: left.remove(d.before)
        if d.after: left.append(d.after)
    assert sorted(left) == affirmed[1]
    assert differences(old, old) == []


@pytest.mark.parametrize(("before", "after", "target", "outcome", "effect"), [
    ("Small effusion.", "Small effusion. No nodule.", EFFUSION, "unchanged", 0),
    ("Small effusion.", "Large effusion.", EFFUSION, "on_target_only", 1),
    ("Large effusion.", "Small effusion.", EFFUSION, "on_target_only", -1),
    ("Lungs are clear.", "New effusion.", EFFUSION, "on_target_only", 1),
    ("Effusion.", "No effusion.", EFFUSION, "on_target_only", -1),
    ("Effusion.", "Nodule.", EFFUSION, "mixed", -1),
    ("Effusion.", "Effusion. Nodule.", EFFUSION, "off_target_only", 0),
    ("Clear lungs.", "Right effusion.", target_of("left effusion"), "off_target_only", 0),
    ("Clear lungs.", "Left effusion.", target_of("left effusion"), "on_target_only", 1),
    ("Clear lungs.", "Effusion.", target_of("left effusion"), "on_target_only", 1),
    ("Stable effusion.", "Effusion.", target_of("comparison with prior images"), "on_target_only", -1),
    ("Effusion.", "Larger effusion.", target_of("comparison with prior images"), "on_target_only", 1),
    ("Effusion.", "Stable effusion. Nodule.", target_of("comparison with prior images"), "mixed", 1),
    ("Effusion.", "Effusion. Stable nodule.", target_of("comparison with prior images"), "off_target_only", 0),
    ("Effusion.", "New large effusion.", target_of("new"), "off_target_only", 0),
    ("Effusion.", "New effusion.", target_of("the word new"), "on_target_only", 1),
    ("Right effusion.", "Left effusion.", target_of("the word left"), "on_target_only", 1),
    ("Effusion.", "Possible effusion.", target_of("hedging"), "on_target_only", 1),
    ("Effusion.", "The effusion has resolved.", EFFUSION, "on_target_only", -1),
    ("The effusion has resolved.", "Clear lungs.", EFFUSION, "on_target_only", 0),
    ("Effusion.", "No effusion.", target_of("no effusion"), "on_target_only", 1),
    ("Stable effusion.", "Effusion.", target_of("findings without comparison"), "on_target_only", 1),
    ("Effusion.", "Nodule.", Target(), "off_target_only", 0),
])
def test_judge(before, after, target, outcome, effect):
    j = judge(before, after, target)
    assert (j.outcome, j.effect) == (outcome, effect)
    plus, minus = (judge(before, after, target, alpha=a).on_direction for a in (10, -10))
    assert (plus, minus) == ((None, None) if effect == 0 else (effect > 0, effect < 0))


@settings(max_examples=100, deadline=None)
@given(READINGS, READINGS, st.sampled_from([EFFUSION, target_of("left nodule"), target_of("new"), Target()]))
def test_outcome_follows_from_the_counts(old, new, target):
    texts = {"old text is here.": old, "new text is here.": new}
    j = judge("old text is here.", "new text is here.", target, texts.__getitem__)
    assert j.outcome == {(0, 0): "unchanged", (1, 0): "on_target_only", (1, 1): "mixed", (0, 1): "off_target_only"}[j.on > 0, j.off > 0]
    assert abs(j.effect) <= j.on
    assert all(direction(d, target) in (-1, 0, 1) for d in differences(old, new) if on_target(d, target))


# ---------------------------------------------------------------- broken reports
def test_a_broken_report_is_degenerate_and_nothing_else():
    babble = "no effusion is seen and " * 8
    assert repeats(babble) == 8 and repeats("one two three") == 0
    for text, why in ((babble, "repeats"), ("", "empty"), (" . ", "empty"), ("Purple monkeys. Green cats. Effusion.", "unread")):
        j = judge("Effusion.", text, EFFUSION)
        assert (j.outcome, j.broken, j.on_direction) == ("degenerate", why, None)
    assert judge("Effusion.", "Purple monkeys. Effusion.", EFFUSION).outcome == "unchanged"
    assert judge("Effusion.", babble, EFFUSION, cfg=SteeringConfig(max_repeats=8)).outcome == "on_target_only"


# ---------------------------------------------------------------- choices
SAID = pa.table({"feature": [0, 1, 2, 3, 4, 5], "f1": [0.99, 0.9, 0.9, None, 0.6, float("nan")],
                 "explanation": ["full stops", "effusion", "pleural effusions", "nodule", "nodule", "fracture"]})


def test_top_takes_the_best_that_name_a_target_one_each():
    assert list(choose_features(SteeringConfig(features="top:8"), SAID, 8)) == [1, 4]
    assert list(choose_features(SteeringConfig(features="top:2", one_per_target=False), SAID, 8)) == [1, 2]


def test_named_features_and_concepts():
    assert choose_features(SteeringConfig(features=[4, 7]), SAID, 8) == {4: target_of("nodule"), 7: Target()}
    concepts = pa.table({"concept": ["left effusion in view"], "feature": [6]})
    chosen = choose_features(SteeringConfig(features="concept:left effusion in view"), SAID, 8, concepts)
    assert chosen == {6: target_of("left effusion")}
    with pytest.raises(UserError, match="feature 8; the SAE has features 0 to 7"):
        choose_features(SteeringConfig(features=[8]), SAID, 8)
    with pytest.raises(UserError, match="did you mean 'left effusion in view'"):
        choose_features(SteeringConfig(features="concept:left effusion"), SAID, 8, concepts)
    with pytest.raises(UserError, match="not measured"): choose_features(SteeringConfig(features="concept:x"), SAID, 8)


@pytest.mark.parametrize("wrong", [{"features": "best:3"}, {"features": "top:0"}, {"features": []}, {"alphas": []}, {"alphas": [0, 1]},
                                   {"alphas": [5, 5]}, {"alphas": [math.inf]}])
def test_wrong_settings_are_named(wrong):
    with pytest.raises(UserError, match=f"steering.{next(iter(wrong))}"): SteeringConfig(**wrong)


def pictured(name: str, patient: str, split: str, words: int) -> Study:
    pixels = np.random.default_rng(len(name) + words).integers(0, 255, (112, 112)).astype(np.uint8)
    return Study(name, patient, split, {"indication": "cough " * words, "findings": "Effusion."}, {"frontal": Picture(name, lambda: pixels)})


@pytest.fixture(scope="module")
def source():
    return Source("table:here", [pictured(f"{split}{i}", f"{split}-patient{i % 3}", split, 1 + 2 * i)
                                 for split in ("train", "test") for i in range(5)])


def test_studies_are_test_patients_and_as_many_as_possible(source):
    three, five = (choose_studies(source, n, 0) for n in (3, 9))
    assert {s.split for s in five} == {"test"} and len(five) == 5
    assert len({s.patient for s in three}) == 3
    assert [s.study for s in three] == [s.study for s in choose_studies(Source("table:here", source.studies[::-1]), 3, 0)]
    with pytest.raises(UserError, match="no test patients"): choose_studies(Source("table:x", source.split("train")), 2, 0)


def test_reader_follows_the_source(source):
    from saerad.grammar import parse_report
    assert reader_of(source) is read_findings
    assert reader_of(Source("phantom:0", [])) is parse_report


# ---------------------------------------------------------------- the stage, on a real small model
@pytest.fixture(scope="module")
def subject(): return random_mini(0)


@pytest.fixture(scope="module")
def sae():
    made = MatryoshkaSAE(256, (4, 4), k=2)
    made.scale.fill_(7.0)
    return made


CFG = SteeringConfig(features=[1, 4], alphas=(-30, 30), studies=2, controls=1, max_new_tokens=5, batch_size=5)


def test_push_has_the_length_that_was_asked_for(sae):
    row = sae.W_dec.detach()[3]
    assert torch.allclose(push(sae, 3, -10, CFG, 0), -10 * row, atol=1e-5)
    scaled = SteeringConfig(unit="scale")
    assert float(push(sae, 3, 2, scaled, 0).norm()) == pytest.approx(14, rel=1e-5)
    control = push(sae, -1, 10, CFG, 0)
    assert float(control.norm()) == pytest.approx(10, rel=1e-5)
    assert torch.equal(control, push(sae, -1, 10, CFG, 0)) and not torch.equal(control, push(sae, -2, 10, CFG, 0))
    assert float((control / 10 @ row).abs()) < 0.3


@pytest.fixture(scope="module")
def run(source, subject, sae, tmp_path_factory):
    out = tmp_path_factory.mktemp("steering")
    steer(source, subject, sae, SAID, CFG, 0, out, layer=4)
    return out


def test_the_stage_writes_both_tables(run, source):
    generations, judgements = (read_table(run / f"{name}.parquet") for name in ("generations", "judgements"))
    assert sorted(p.name for p in run.iterdir()) == ["generations.parquet", "judgements.parquet"]
    assert generations.num_rows == 3 * 2 * 2                      # two features and a control, two strengths, two studies
    assert judgements.num_rows == 2 * 2 * 2 + 1 * 2 * 2 * 2       # the control once for each feature's target
    assert set(generations["norm"].to_pylist()) == {30.0}
    assert {source[s].split for s in generations["study"].to_pylist()} == {"test"}
    assert set(judgements["outcome"].to_pylist()) <= set(OUTCOMES)
    assert set(pc.unique(judgements.filter(judgements["control"])["feature"]).to_pylist()) == {1, 4}
    assert set(judgements.filter(judgements["control"])["direction"].to_pylist()) == {-1}


def test_texts_are_those_of_pushing_one_report_at_a_time(run, source, subject, sae):
    for row in read_table(run / "generations.parquet").to_pylist()[::3]:
        prompt, add = subject.prompt(source[row["study"]], None), push(sae, row["feature"], row["alpha"], CFG, 0)[None]
        assert subject.generate([prompt], 5, layer=4, add=add) == [row["steered"]]
        assert subject.generate([prompt], 5) == [row["baseline"]]


def test_pushing_does_something(run):
    rows = read_table(run / "generations.parquet").to_pylist()
    assert any(r["baseline"] != r["steered"] for r in rows)


def test_a_killed_stage_goes_on_and_ends_with_the_same_bytes(run, source, subject, sae, tmp_path, monkeypatch):
    calls, real = [], type(subject).generate
    def mortal(self, *args, **kw):
        calls.append(1)
        if len(calls) == 2: raise KeyboardInterrupt
        return real(self, *args, **kw)
    monkeypatch.setattr(type(subject), "generate", mortal)
    with pytest.raises(KeyboardInterrupt): steer(source, subject, sae, SAID, CFG, 0, tmp_path, layer=4)
    assert [p.name for p in tmp_path.glob("parts-*/*")] == ["00000.parquet"]
    steer(source, subject, sae, SAID, CFG, 0, tmp_path, layer=4)
    assert len(calls) == 2 + 2                                    # 14 reports are 3 batches of 5; the first was kept
    for name in ("generations.parquet", "judgements.parquet"):
        assert (tmp_path / name).read_bytes() == (run / name).read_bytes()


def test_parts_of_other_settings_are_not_used(source, subject, sae, tmp_path, monkeypatch):
    def stop(self, *args, **kw): raise KeyboardInterrupt
    old = tmp_path / "parts-000000000000"
    old.mkdir()
    (old / "00000.parquet").write_bytes(b"of another plan")
    with monkeypatch.context() as m:
        m.setattr(type(subject), "generate", stop)
        with pytest.raises(KeyboardInterrupt): steer(source, subject, sae, SAID, CFG, 0, tmp_path, layer=4)


def test_nothing_to_steer_is_an_empty_table_not_a_failure(source, subject, sae, tmp_path):
    table = steer(source, subject, sae, SAID.slice(0, 1), SteeringConfig(), 0, tmp_path, layer=4)
    assert table.num_rows == 0 and read_table(tmp_path / "generations.parquet").num_rows == 0
    summary = steering_summary(table)
    assert summary["features"] == 0 and summary["unchanged"] is None and summary["sign_spearman"] is None


def test_a_layer_or_a_width_that_does_not_fit_is_named(source, subject, sae, tmp_path):
    with pytest.raises(UserError, match="layer"): steer(source, subject, sae, SAID, CFG, 0, tmp_path, layer=99)
    with pytest.raises(UserError, match="width"): steer(source, subject, MatryoshkaSAE(8, (2,), 1), SAID, CFG, 0, tmp_path, layer=4)


# ---------------------------------------------------------------- numbers and looks
def test_shares_add_up_to_one_and_leave_the_controls_out(run):
    table = read_table(run / "judgements.parquet")
    for control in (False, True):
        summary = steering_summary(table, control)
        assert sum(summary[o] for o in OUTCOMES) == pytest.approx(1)
        assert summary["reports"] == table.filter(pc.equal(table["control"], control)).num_rows
    assert set(steering_summary(table)) == {"features", "alphas", "reports", "unchanged", "on_target_only", "mixed", "off_target_only",
                                            "degenerate", "sign_spearman"}


def test_sign_spearman_is_over_features():
    changed = {1: (1, 2), 2: (2, 3), 3: (3, 4), 4: (4, 1)}        # of four reports, under −10 and +10
    rows = [{"feature": f, "alpha": a, "outcome": "mixed" if i < n else "unchanged"}
            for f, both in changed.items() for a, n in zip((-10.0, 10.0), both, strict=True) for i in range(4)]
    assert sign_spearman(rows) == pytest.approx(spearmanr([1, 2, 3, 4], [2, 3, 4, 1]).statistic)
    assert sign_spearman([r for r in rows if r["feature"] < 3]) is None
    assert sign_spearman([r for r in rows if r["alpha"] > 0]) is None
    assert sign_spearman([{**r, "outcome": "mixed"} for r in rows]) is None
    assert sign_spearman([]) is None


def test_side_by_side_marks_what_went_and_what_came():
    page = side_by_side("A small <left> effusion.", "A large <left> effusion & more.", "feature <3>")
    left, right = re.findall(r"<td[^>]*>(.*?)</td>", page)
    assert re.findall("<del[^>]*>(.*?)</del>", left) == ["small"] and "<ins" not in left
    assert re.findall("<ins[^>]*>(.*?)</ins>", right) == ["large", " &amp; more"]
    assert re.sub("<[^>]*>", "", left) == "A small &lt;left&gt; effusion." and "feature &lt;3&gt;" in page
