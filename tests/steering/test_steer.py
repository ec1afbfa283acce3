"""Steering: what explanations promise, what counts as on target, and the stage on a small real subject model."""
import math
import re
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from judge_server import JudgeServer
from scipy.stats import spearmanr
from word_server import completion

from saerad.core import UserError, read_json, read_table
from saerad.interpretation.endpoint import EndpointConfig
from saerad.sae.model import MatryoshkaSAE
from saerad.steering import steer as steering
from saerad.steering.judges import OUTCOMES, Target, direction, finding_differences, judge, on_target, reader_of, repeats, target_of
from saerad.steering.steer import (
    SteeringConfig,
    baselines_table,
    choose_studies,
    features_to_steer,
    judgements_table,
    mean_differences,
    notes_of,
    other_films,
    side_by_side,
    sign_spearman,
    steer,
    steering_summary,
    steering_vector,
    unreadable_baselines,
    with_film_of,
)
from saerad.studies.findings import Finding, Reading, read_findings
from saerad.studies.record import Source, Study, View
from saerad.subjects.subject import random_mini

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
    from saerad.studies.findings import PHANTOM_KINDS
    from saerad.studies.grammar import CONCEPTS
    named = {target_of(name).kinds for name, c in CONCEPTS.items() if c.kind == "visual" and name != "nothing in view"}
    assert {frozenset({k}) for k in PHANTOM_KINDS} <= named


# ---------------------------------------------------------------- what has changed
def test_differences_pair_the_most_similar():
    small, large, right = (Finding("effusion", s, "", z) for s, z in (("left", "small"), ("left", "large"), ("right", "small")))
    found = finding_differences(Reading((small,)), Reading((large, right)))
    assert len(found) == 2 and found[0].before == small and found[1].before is None
    assert sum(len(d.altered) for d in found) == 1


def test_denials_do_not_count_and_doubt_does():
    absent, possible, present = (Finding("nodule", certainty=c) for c in ("absent", "uncertain", "present"))
    assert finding_differences(Reading((absent,)), Reading(())) == []
    assert finding_differences(Reading((possible,)), Reading((present,)))[0].altered == ("certainty",)
    assert finding_differences(Reading((absent,)), Reading((present,)))[0].before is None


FINDINGS = st.builds(Finding, st.sampled_from(["effusion", "nodule", "picc"]), st.sampled_from(["", "left", "right"]),
                     st.just(""), st.sampled_from(["", "small", "large"]), st.sampled_from(["", "new", "resolved"]),
                     st.sampled_from(["present", "absent", "uncertain"]))
READINGS = st.lists(FINDINGS, max_size=4).map(lambda fs: Reading(tuple(fs)))


@settings(max_examples=200, deadline=None)
@given(READINGS, READINGS)
def test_differences_account_for_every_change_once(old, new):
    affirmed = [sorted(f for f in r.findings if f.certainty != "absent") for r in (old, new)]
    left = list(affirmed[0])
    for d in finding_differences(old, new):
        if d.before: left.remove(d.before)
        if d.after: left.append(d.after)
    assert sorted(left) == affirmed[1]
    assert finding_differences(old, old) == []


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
    assert all(direction(d, target) in (-1, 0, 1) for d in finding_differences(old, new) if on_target(d, target))


# ---------------------------------------------------------------- broken reports
def test_a_broken_report_is_degenerate_and_nothing_else():
    babble = "no effusion is seen and " * 8
    assert repeats(babble) == 8 and repeats("one two three") == 0
    for text, why in ((babble, "repeats"), ("", "empty"), (" . ", "empty"), ("Purple monkeys. Green cats. Effusion.", "unread")):
        j = judge("Effusion.", text, EFFUSION)
        assert j.harms == ()
        assert (j.outcome, j.broken, j.on_direction) == ("degenerate", why, None)
    assert judge("Effusion.", "Purple monkeys. Effusion.", EFFUSION).outcome == "unchanged"
    assert judge("Effusion.", babble, EFFUSION, cfg=SteeringConfig(max_repeats=8)).outcome == "on_target_only"
    odd = [judge("Effusion.", "Nodule.", EFFUSION, perplexity=p).broken for p in (None, 3.0, 1e3)]
    assert odd == ["", "", "perplexity"]


# ---------------------------------------------------------------- choices
SAID = pa.table({"feature": [0, 1, 2, 3, 4, 5], "f1": [0.99, 0.9, 0.9, None, 0.6, float("nan")],
                 "explanation": ["full stops", "effusion", "pleural effusions", "nodule", "nodule", "fracture"]})


def test_top_takes_the_best_that_name_a_target_one_each():
    assert list(features_to_steer(SteeringConfig(features="top:8"), SAID, 8)) == [1, 4]
    assert list(features_to_steer(SteeringConfig(features="top:2", one_per_target=False), SAID, 8)) == [1, 2]


def test_named_features_and_concepts():
    assert features_to_steer(SteeringConfig(features=[4, 7]), SAID, 8) == {4: target_of("nodule"), 7: Target()}
    concepts = pa.table({"concept": ["left effusion in view"], "feature": [6]})
    chosen = features_to_steer(SteeringConfig(features="concept:left effusion in view"), SAID, 8, concepts)
    assert chosen == {6: target_of("left effusion")}
    with pytest.raises(UserError, match="feature 8; the SAE has features 0 to 7"):
        features_to_steer(SteeringConfig(features=[8]), SAID, 8)
    with pytest.raises(UserError, match="did you mean 'left effusion in view'"):
        features_to_steer(SteeringConfig(features="concept:left effusion"), SAID, 8, concepts)
    with pytest.raises(UserError, match="not measured"): features_to_steer(SteeringConfig(features="concept:x"), SAID, 8)


def test_a_dead_feature_is_refused_by_name():
    said = SAID.append_column("density", pa.array([0.1, 0.1, 0.1, 0.1, 0.0, 0.1]))
    with pytest.raises(UserError, match="feature 4, which is dead"): features_to_steer(SteeringConfig(features=[1, 4]), said, 8)


@pytest.mark.parametrize("wrong", [{"features": "best:3"}, {"features": "top:0"}, {"features": []}, {"alphas": []}, {"alphas": [0, 1]},
                                   {"alphas": [5, 5]}, {"alphas": [math.inf]}, {"alphas": ["strong"]}, {"alphas": [True]},
                                   {"alphas": [0.5, 1], "method": "scale"}])
def test_wrong_settings_are_named(wrong):
    with pytest.raises(UserError, match=f"steering.{next(iter(wrong))}"): SteeringConfig(**wrong)


def pictured(name: str, patient: str, split: str, words: int) -> Study:
    pixels = np.random.default_rng(len(name) + words).integers(0, 255, (112, 112)).astype(np.uint8)
    return Study(name, patient, split, {"indication": "cough " * words, "findings": "Effusion."}, {"frontal": View(name, lambda: pixels)})


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
    from saerad.studies.grammar import parse_report
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


CFG = SteeringConfig(features=[1, 4], alphas=(-30, 30), studies=2, controls=1, max_new_tokens=5, batch_size=4,
                     compare=("random", "other_feature", "prompt"))


def test_push_has_the_length_that_was_asked_for(sae):
    row = sae.W_dec.detach()[3]
    assert torch.allclose(steering_vector(sae, 3, -10, CFG, 0), -10 * row, atol=1e-5)
    scaled = SteeringConfig(unit="scale")
    assert float(steering_vector(sae, 3, 2, scaled, 0).norm()) == pytest.approx(14, rel=1e-5)
    control = steering_vector(sae, -1, 10, CFG, 0)
    assert float(control.norm()) == pytest.approx(10, rel=1e-5)
    assert torch.equal(control, steering_vector(sae, -1, 10, CFG, 0)) and not torch.equal(control, steering_vector(sae, -2, 10, CFG, 0))
    assert float((control / 10 @ row).abs()) < 0.3


@pytest.fixture(scope="module")
def run(source, subject, sae, tmp_path_factory):
    out = tmp_path_factory.mktemp("steering")
    steer(source, subject, sae, SAID, CFG, 0, out, layer=4)
    return out


def test_the_stage_writes_its_tables(run, source):
    generations, judgements, verdicts = (read_table(run / f"{name}.parquet") for name in ("generations", "judgements", "verdicts"))
    assert sorted(p.name for p in run.iterdir()) == ["baselines.parquet", "generations.parquet", "judgements.parquet", "steering.json",
                                                        "verdicts.parquet"]
    methods = generations.to_pandas().method.value_counts().to_dict()
    assert methods == {"add": 2 * 2 * 2, "random": 2 * 2, "prompt": 2 * 2 * 2}       # two features, two strengths, two studies
    judged = judgements.to_pandas()
    assert judged.method.value_counts().to_dict() == {"add": 8, "random": 8, "other_feature": 8, "prompt": 8}
    assert set(generations.to_pandas().query("method != 'prompt'").norm) == {30.0}
    assert {source[s].split for s in generations["study"].to_pylist()} == {"test"}
    assert set(judged.outcome) <= set(OUTCOMES) and set(judged[judged.control].feature) == {1, 4}
    assert (judged.control == (judged.method != "add")).all()
    assert set(judged[judged.method == "random"].direction) == {-1}
    crossed = judged[judged.method == "other_feature"]
    assert ((crossed.feature == 1) == (crossed.direction == 4)).all()
    assert verdicts.num_rows == len(judged)                       # of a single judge, the rules


def test_texts_are_those_of_pushing_one_report_at_a_time(run, source, subject, sae):
    rows = [r for r in read_table(run / "generations.parquet").to_pylist() if r["method"] in ("add", "random")]
    for row in rows[::3]:
        prompt, add = subject.prompt(source[row["study"]], None), steering_vector(sae, row["feature"], row["alpha"], CFG, 0)[None]
        assert subject.generate([prompt], 5, layer=4, add=add) == [row["steered"]]
        assert subject.generate([prompt], 5) == [row["baseline"]]


def test_pushing_does_something(run):
    rows = read_table(run / "generations.parquet").to_pylist()
    assert any(r["baseline"] != r["steered"] for r in rows)


def test_a_killed_stage_goes_on_and_ends_with_the_same_bytes(run, source, subject, sae, tmp_path, monkeypatch):
    calls, real = [], steering.write_steered
    def mortal(*args, **kw):
        calls.append(1)
        if len(calls) == 2: raise KeyboardInterrupt
        return real(*args, **kw)
    monkeypatch.setattr(steering, "write_steered", mortal)
    with pytest.raises(KeyboardInterrupt): steer(source, subject, sae, SAID, CFG, 0, tmp_path, layer=4)
    assert [p.name for p in tmp_path.glob("parts-*/*")] == ["00000.parquet"]
    steer(source, subject, sae, SAID, CFG, 0, tmp_path, layer=4)
    assert len(calls) == 2 + 3                                    # 7 reports a study are 2 batches of 4; the first was kept
    for name in ("generations.parquet", "judgements.parquet", "verdicts.parquet", "steering.json"):
        assert (tmp_path / name).read_bytes() == (run / name).read_bytes()


def test_parts_of_other_settings_are_not_used(source, subject, sae, tmp_path, monkeypatch):
    def stop(*args, **kw): raise KeyboardInterrupt
    old = tmp_path / "parts-000000000000"
    old.mkdir()
    (old / "00000.parquet").write_bytes(b"of another plan")
    monkeypatch.setattr(steering, "write_steered", stop)
    with pytest.raises(KeyboardInterrupt): steer(source, subject, sae, SAID, CFG, 0, tmp_path, layer=4)


def test_judging_again_generates_nothing(run, source, subject, sae, tmp_path, monkeypatch):
    def never(*args, **kw): raise AssertionError("a report was written")
    for file in run.iterdir(): shutil.copy(file, tmp_path)
    (tmp_path / "judgements.parquet").unlink()
    with monkeypatch.context() as m:
        m.setattr(steering, "write_steered", never)
        m.setattr(type(subject), "generate", never)
        steer(source, subject, sae, SAID, CFG.model_copy(update={"max_perplexity": 1e-6}), 0, tmp_path, layer=4)
        assert (tmp_path / "generations.parquet").read_bytes() == (run / "generations.parquet").read_bytes()
        assert read_table(tmp_path / "judgements.parquet").num_rows == read_table(run / "judgements.parquet").num_rows
        with pytest.raises(AssertionError):      # other texts are needed
            steer(source, subject, sae, SAID, CFG.model_copy(update={"positions": "prompt"}), 0, tmp_path, layer=4)


def test_a_strength_that_breaks_every_report_is_said(source, subject, sae, tmp_path, capsys):
    steer(source, subject, sae, SAID, CFG.model_copy(update={"max_perplexity": 1e-6, "alphas": (-30, 3000)}), 0, tmp_path, layer=4)
    assert "α = 3000 makes every report unreadable" in capsys.readouterr().out
    assert any("α = 3000" in n for n in read_json(tmp_path / "steering.json")["notes"])


@pytest.mark.parametrize("changes", [{"method": "clamp", "alphas": (0.0, 40.0)}, {"method": "scale", "alphas": (0.0, 5.0)},
                                     {"together": True}, {"images": ("shown", "other", "blank")}, {"features": [1]}])
def test_every_way_of_steering_runs_and_is_told_apart(source, subject, sae, tmp_path, changes):
    cfg = SteeringConfig(**{**CFG.model_dump(), "studies": 1, "compare": ("random", "other_feature"), **changes})
    judged = steer(source, subject, sae, SAID, cfg, 0, tmp_path, layer=4).to_pandas()
    written = read_table(tmp_path / "generations.parquet").to_pandas()
    assert set(judged[~judged.control].method) == {cfg.method} and {"random", "other_feature"} <= set(judged.method)
    if cfg.method != "add":           # the controls have each feature's own coefficient, whose size depends on the text
        assert set(written[written.method == "random"].compared_feature) == {1, 4} and written.norm.isna().all()
    if cfg.together: assert written[written.method == "add"].features.map(list).tolist() == [[1, 4]] * 2
    if len(cfg.images) == 3:
        unseen = judged[judged.image != "shown"]
        assert set(unseen.image) == {"other", "blank"} and unseen.control.all() and set(unseen.method) == {"add", "random"}


def test_other_images_need_images(source, sae, tmp_path, monkeypatch):
    blind = random_mini(0)
    lay_out = blind.lay_out
    blind.lay_out = lambda study, report: replace(lay_out(study, report), pixels=None)
    with pytest.raises(UserError, match="steering.images needs images"):
        steer(source, blind, sae, SAID, CFG.model_copy(update={"images": ("shown", "blank")}), 0, tmp_path, layer=4)


@pytest.mark.parametrize(("given", "images"), [
    ({}, ("shown",)), ({"without_image": False}, ("shown",)), ({"without_image": True}, ("shown", "blank")),
    ({"images": ["other", "shown"], "without_image": True}, ("shown", "other", "blank")), ({"images": ["blank", "shown"]}, ("shown", "blank"))])
def test_the_old_key_means_a_list_of_images(given, images):
    cfg = SteeringConfig(**given)
    assert cfg.images == images and SteeringConfig(**cfg.model_dump()) == cfg
    for wrong, words in ({"images": ["blank"]}, "list shown"), ({"images": ["shown", "shown"]}, "each once"), ({"without_image": 3}, "is 3; write"):
        with pytest.raises(UserError, match=words): SteeringConfig(**wrong)


def test_another_film_is_of_another_patient_and_the_words_stay(source, subject):
    studies = source.split("test")
    films = other_films(source, studies, 0, subject)
    shown = {s.study: s.views["frontal"].name for s in studies}
    owners = {s.views["frontal"].name: s.patient for s in studies}
    for s in studies:
        film = films[s.study]
        assert film.sections == s.sections and film.patient == s.patient and film.views["frontal"].name != shown[s.study]
        assert owners[film.views["frontal"].name] != s.patient
    again, another = (other_films(source, studies, seed, subject) for seed in (0, 1))
    names = [[f[s.study].views["frontal"].name for s in studies] for f in (films, again, another)]
    assert names[0] == names[1] != names[2]
    alone = Source("table:here", [s for s in studies if s.patient == studies[0].patient])
    with pytest.raises(UserError, match="no other test patient has the views"): other_films(alone, alone.split("test"), 0, subject)


def test_another_film_brings_its_prior_along():
    def film(name): return View(name, lambda: np.eye(4, dtype=np.uint8))
    def visit(name, **more): return Study(name, name, "test", {"findings": name}, {"frontal": film(f"{name} now")}, **more)
    mine, theirs = (visit(n, prior=visit(f"{n} before")) for n in ("mine", "theirs"))
    swapped = with_film_of(mine, theirs)
    assert {k: v.name for k, v in swapped.all_views.items()} == {"frontal": "theirs now", "prior": "theirs before now"}
    assert swapped.prior_report == mine.prior_report and swapped.sections == mine.sections


def test_every_image_has_its_own_baseline(source, subject, sae, tmp_path):
    cfg = CFG.model_copy(update={"images": ("shown", "other", "blank"), "compare": ("random",), "max_new_tokens": 8})
    steer(source, subject, sae, SAID, cfg, 0, tmp_path, layer=4)
    written, at_zero = (read_table(tmp_path / f"{n}.parquet").to_pandas() for n in ("generations", "baselines"))
    films = other_films(source, choose_studies(source, 2, 0, subject, 40), 0, subject)
    for (study, image), rows in written.groupby(["study", "image"]):
        prompt = subject.prompt(films[study] if image == "other" else source[study])
        if image == "blank": prompt = replace(prompt, pixels=torch.zeros_like(prompt.pixels))
        assert set(rows.baseline) == {subject.generate([prompt], 8)[0]}
    assert len(at_zero) == 2 * 3 * 2 and set(at_zero.alpha) == {0} and set(at_zero.method) == {"none"} and at_zero.control.all()
    assert set(at_zero.outcome) | set(at_zero.outcome_paper) | set(at_zero.outcome_clinical) == {"unchanged"} and not at_zero.degenerate.any()


def test_a_study_without_the_picture_that_is_needed_is_named(subject, sae, tmp_path):
    bare = [Study(f"{split}{i}", f"{split}-p{i}", split, {"findings": "Effusion."}, {}) for split in ("train", "test") for i in range(2)]
    with pytest.raises(UserError, match="has no frontal view"): steer(Source("table:here", bare), subject, sae, SAID, CFG, 0, tmp_path, layer=4)


def test_studies_that_the_model_cannot_read_are_passed_over(source, subject):
    def told(study, **sections): return replace(study, sections=dict(study.sections) | sections)
    every = [told(s, findings="The lungs are clear.") if s.study[-1] in "13" else s for s in source]
    mixed = Source("table:here", [told(s, indication="fever " * 900) if s.study in ("test0", "test1", "train0") else s for s in every])
    assert [s.study for s in choose_studies(mixed, 9, 0, subject, 20)] == ["test2", "test3", "test4"]
    without = Source("table:here", [s for s in every if s.study != "train0"])
    ours, theirs = (mean_differences(x, subject, {0: target_of("effusion")}, 4, 0, least=1)[0] for x in (mixed, without))
    assert torch.allclose(ours, theirs, atol=1e-5)
    with pytest.raises(UserError, match="study test[01] needs"): choose_studies(Source("table:here", mixed.split("test")[:2]), 2, 0, subject)


def test_a_language_model_judges_and_replays(run, source, subject, sae, tmp_path):
    for file in run.iterdir(): shutil.copy(file, tmp_path)
    with JudgeServer() as server:
        cfg = CFG.model_copy(update={"judges": ("rules", "openai"), "endpoint": EndpointConfig(base_url=server.url, model="judge", concurrency=4)})
        steer(source, subject, sae, SAID, cfg, 0, tmp_path, layer=4)
        asked = len(server.bodies)
        assert asked and server.keys == {"Bearer none"}
        pairs = {b["messages"][1]["content"] for b in server.bodies}
        assert len(pairs) == asked and not any("α" in p or "30" in p for p in pairs)       # each pair once, and not how hard it was pushed
    before = {n: (tmp_path / n).read_bytes() for n in ("judgements.parquet", "verdicts.parquet", "ledger.sqlite")}
    told = read_json(tmp_path / "steering.json")
    assert told["verdicts"] == told["agreement"][0]["pairs"] and told["unanswered_verdicts"] == 0
    assert told["judges"] == ["rules", "openai"] and told["agreement"][0]["pairs"] == read_table(tmp_path / "judgements.parquet").num_rows
    steer(source, subject, sae, SAID, cfg, 0, tmp_path, layer=4)              # the server is gone: the ledger answers
    assert {n: (tmp_path / n).read_bytes() for n in before} == before


def test_a_judge_that_says_nothing_is_counted_and_told(run, source, subject, sae, tmp_path, capsys):
    for file in run.iterdir(): shutil.copy(file, tmp_path)
    with JudgeServer(lambda number, body: (200, {}, completion("good!"))) as server:
        cfg = CFG.model_copy(update={"judges": ("rules", "openai"), "endpoint": EndpointConfig(base_url=server.url, model="judge")})
        steer(source, subject, sae, SAID, cfg, 0, tmp_path, layer=4)
    told, said = read_json(tmp_path / "steering.json"), capsys.readouterr().out
    silent, pairs = told["unanswered_verdicts"], read_table(tmp_path / "generations.parquet").to_pylist()
    changed = {i for i, p in enumerate(pairs) if p["baseline"].split() != p["steered"].split()}          # nobody is asked about the others
    assert silent == sum(g in changed for g in read_table(tmp_path / "judgements.parquet")["generation"].to_pylist()) > 0
    assert told["why"] == {"parse failure": silent}
    assert f"no verdict on {silent} of {told['verdicts']} pairs" in said and "pairs to judge, about" in said


def test_a_judge_that_fails_is_named_and_the_rest_is_kept(run, source, subject, sae, tmp_path):
    for file in run.iterdir(): shutil.copy(file, tmp_path)
    cfg = CFG.model_copy(update={"judges": ("rules", "openai"), "endpoint": EndpointConfig(base_url="http://127.0.0.1:9/v1", attempts=2)})
    with pytest.raises(UserError, match="steering.endpoint.base_url"): steer(source, subject, sae, SAID, cfg, 0, tmp_path, layer=4)
    for name in ("generations", "judgements"): assert (tmp_path / f"{name}.parquet").read_bytes() == (run / f"{name}.parquet").read_bytes()


def test_nothing_to_steer_is_an_empty_table_not_a_failure(source, subject, sae, tmp_path):
    table = steer(source, subject, sae, SAID.slice(0, 1), SteeringConfig(), 0, tmp_path, layer=4)
    assert "nothing was steered" in read_json(tmp_path / "steering.json")["notes"][0]
    assert table.num_rows == 0 and read_table(tmp_path / "generations.parquet").num_rows == 0
    summary = steering_summary(table)
    assert summary["features"] == 0 and summary["unchanged"] is None and summary["sign_spearman"] is None


def test_a_layer_or_a_width_that_does_not_fit_is_named(source, subject, sae, tmp_path):
    with pytest.raises(UserError, match="layer"): steer(source, subject, sae, SAID, CFG, 0, tmp_path, layer=99)
    with pytest.raises(UserError, match="width"): steer(source, subject, MatryoshkaSAE(8, (2,), 1), SAID, CFG, 0, tmp_path, layer=4)


# ---------------------------------------------------------------- the untouched reports first
BABBLE = ("Xa yb zc. Wd ve uf.", "Qo po. Ri si.", "Ta ub vc. We xf.", "Small left effusion. The heart is normal.")


def pairs(baselines, steered, **more):
    """A table of generations: one steered report, at α = 5, for each baseline."""
    n = len(baselines)
    same = {"feature": 1, "alpha": 5.0, "method": "add", "compared_feature": -1, "image": "shown", "positions": "all"}
    numbers = [str(i) for i in range(n)]
    return pa.table({"study": numbers, "patient": numbers, "baseline": list(baselines), "steered": list(steered)}
                    | {k: [v] * n for k, v in same.items()} | {k: more.get(k, [2.0] * n) for k in ("perplexity", "baseline_perplexity")})


def test_a_weak_models_own_reports_are_told_before_alpha_is_blamed():
    targets, cfg = {1: EFFUSION}, SteeringConfig(features=[1])
    weak = pairs(BABBLE, ["Yd. Effusion. Xa. Ve.", "Qo po ri. Si ti.", "We xf.", "Left effusion. Xa yb. Zc wd. Ve."])
    judged, own = judgements_table(weak, targets, read_findings, cfg), baselines_table(weak, targets, read_findings, cfg)
    assert not any(judged["degenerate"].to_pylist()) and set(own["outcome"].to_pylist()) == {"unchanged"}
    assert unreadable_baselines(own) == {"baselines": 4, "unreadable_baselines": 3, "why": {"unread": 3}}
    notes = notes_of(judged, targets, [1], cfg, own)
    assert notes[0].startswith("this model's own reports are unreadable in 3 of 4 cases before any steering (3 with sentences that cannot be read)")
    assert not any("makes every report unreadable" in n for n in notes)


def test_a_weak_model_can_still_be_broken_further():
    targets, cfg = {1: EFFUSION}, SteeringConfig(features=[1])
    looped = pairs(BABBLE, ["no no no no no no no no no no"] * 4)
    judged, own = judgements_table(looped, targets, read_findings, cfg), baselines_table(looped, targets, read_findings, cfg)
    assert judged["broken"].to_pylist() == ["repeats"] * 4
    first, second = notes_of(judged, targets, [1], cfg, own)[:2]
    assert "3 of 4 cases before any steering" in first and "α = 5 makes every report unreadable (4 of 4)" in second


def test_one_odd_report_among_twelve_does_not_blind_the_rule():
    targets, cfg = {1: EFFUSION}, SteeringConfig(features=[1])
    own = [BABBLE[0], *["Small left effusion. The heart is normal."] * 11]
    judged = judgements_table(pairs(own, [BABBLE[1]] * 12), targets, read_findings, cfg).to_pandas()
    assert judged.broken.tolist() == ["", *["unread"] * 11]
    steered, unlikely = ["Effusion."] * 12, {"perplexity": [40.0] * 12}
    assert set(judgements_table(pairs(own, steered, **unlikely), targets, read_findings, cfg)["broken"].to_pylist()) == {"perplexity"}
    varied = pairs(own, steered, **unlikely, baseline_perplexity=[2.0] * 8 + [50.0] * 4)                # four of twelve baselines are as unlikely
    assert set(judgements_table(varied, targets, read_findings, cfg)["broken"].to_pylist()) == {""}


def test_a_good_models_reports_are_judged_as_before():
    targets, cfg = {1: EFFUSION}, SteeringConfig(features=[1])
    good = pairs(["Small left effusion. The heart is normal."] * 4, [BABBLE[0], "", "no " * 12, "Effusion."])
    judged, own = judgements_table(good, targets, read_findings, cfg), baselines_table(good, targets, read_findings, cfg)
    assert judged["broken"].to_pylist() == ["unread", "empty", "repeats", ""] and unreadable_baselines(own)["unreadable_baselines"] == 0
    assert not any("before any steering" in n for n in notes_of(judged, targets, [1], cfg, own))


# ---------------------------------------------------------------- numbers and looks
def test_shares_add_up_to_one_and_leave_the_controls_out(run):
    table = read_table(run / "judgements.parquet")
    for control in (False, True):
        summary = steering_summary(table, control)
        assert sum(summary[o] for o in OUTCOMES) == pytest.approx(1)
        assert summary["reports"] == table.filter(pc.equal(table["method"], "random" if control else "add")).num_rows
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
