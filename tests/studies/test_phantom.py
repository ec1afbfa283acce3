"""The phantom's truth has to be true: of the courses, of the pictures and of the words."""
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saerad.core import rng
from saerad.studies.findings import PHANTOM_KINDS, SEVERITIES, Finding
from saerad.studies.grammar import parse_report
from saerad.studies.phantom import PAINTERS, SIZE, draw_anatomy, draw_study, erased, painted, patient_states, phantom_source
from saerad.studies.record import StudiesConfig, split_of

patients = st.integers(0, 50_000)


@given(patients)
@settings(max_examples=200, deadline=None)
def test_a_change_is_a_step_between_two_studies(patient):
    states = patient_states(0, patient)
    assert 1 <= len(states) <= 4 and states == patient_states(0, patient)
    assert all(not f.change for f in states[0].findings) and not states[0].resolved
    for before, now in zip(states, states[1:], strict=False):
        was = {(f.kind, f.side): f for f in before.findings}
        for f in now.findings:
            old = was.get((f.kind, f.side))
            assert (old is None) == (f.change == "new")
            if old is None: continue
            assert f.zone == old.zone
            step = SEVERITIES.index(f.severity) - SEVERITIES.index(old.severity) if f.severity else 0
            assert f.change == {1: "larger", 0: "unchanged", -1: "smaller"}[step]
        gone = set(was) - {(f.kind, f.side) for f in now.findings}
        assert gone == {(f.kind, f.side) for f in now.resolved} - {(f.kind, f.side) for f in now.findings}


@given(patients)
@settings(max_examples=30, deadline=None)
def test_pictures_are_reproducible_and_use_the_whole_range(patient):
    state = patient_states(3, patient)[-1]
    film, boxes, patches = draw_study(3, state)
    assert film.shape == (SIZE, SIZE) and film.dtype == np.uint8 and film.min() == 0 and film.max() == 255
    assert np.array_equal(film, draw_study(3, state).image)
    assert set(boxes) == set(state.findings)
    for finding, (left, top, right, bottom) in boxes.items():
        rows, cols = np.nonzero(patches[finding])
        assert (rows.min(), cols.min(), rows.max(), cols.max()) == (top // 14, left // 14, (bottom - 1) // 14, (right - 1) // 14)
        assert 0 <= left < right <= SIZE and 0 <= top < bottom <= SIZE


def test_another_seed_is_another_world():
    assert patient_states(0, 1) != patient_states(1, 1)
    state = patient_states(0, 1)[0]
    assert not np.array_equal(draw_study(0, state)[0], draw_study(1, state)[0])


@pytest.mark.parametrize("kind", [k for k in PHANTOM_KINDS if k != "cardiomegaly"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_painter_changes_the_picture_inside_its_mask_and_on_its_side(kind, side):
    body = patient_states(0, 7)[0].body
    zone = {"nodule": "upper", "consolidation": "lower", "atelectasis": "lower"}.get(kind, "")
    canvas = draw_anatomy(body, "PA", 0, rng(0, "canvas"))
    before = canvas.brightness.copy()
    mask = PAINTERS[kind](canvas, Finding(kind, side, zone, "moderate"), 1.0, rng(0, kind))
    changed = np.abs(canvas.brightness - before)
    assert changed.max() > .15, "nobody could see it"
    assert changed[mask > .4].mean() > 5 * changed[mask < .01].mean()
    if kind in ("effusion", "pneumothorax", "consolidation", "atelectasis", "nodule", "fracture", "chest_tube"):
        where = (canvas.x[mask > .4].mean() - canvas.middle) * canvas.out(side)
        assert where > .05, "the patient's right is on the left of the picture"


@pytest.mark.parametrize("kind", ["effusion", "pneumothorax", "consolidation"])
def test_more_severe_is_larger(kind):
    body = patient_states(0, 7)[0].body
    areas = []
    for severity in SEVERITIES:
        canvas = draw_anatomy(body, "PA", 0, rng(0, "canvas"))
        areas.append(PAINTERS[kind](canvas, Finding(kind, "left", "lower" if kind == "consolidation" else "", severity), 1.0, rng(0, "p")).sum())
    assert areas[0] < areas[1] < areas[2]


def test_an_enlarged_heart_is_wider():
    state = replace(patient_states(0, 5)[0], findings=())
    widths = [draw_anatomy(state.body, "PA", level, rng(0, "canvas")).heart for level in range(4)]
    assert widths == sorted(widths) and widths[3] - widths[0] > .2


@pytest.fixture(scope="module")
def source():
    return phantom_source(0, StudiesConfig(train_patients=150, validation_patients=20, test_patients=30))


def test_reports_say_exactly_what_is_there(source):
    for study in source:
        reading = parse_report(study.sections["findings"])
        told = {f for f in reading.findings if f.certainty != "absent"}
        assert told == set(study.truth.findings) | set(study.truth.state.resolved), study.sections["findings"]
        assert not reading.unread


def test_every_word_has_its_place_in_the_text(source):
    for study in source:
        texts = dict(study.sections) | ({"prior_report": study.prior_report} if study.prior else {})
        assert set(study.truth.words) == set(texts)
        for name, words in study.truth.words.items():
            spans = [texts[name][w.start:w.end] for w in words]
            assert all(s and s[-1] not in ".," for s in spans)
            assert [t.strip(".,") for t in texts[name].split()] == spans


def test_splits_are_by_patient_and_sizes_are_kept(source):
    assert len({s.patient for s in source.split("train")}) == 150 and len({s.patient for s in source.split("test")}) == 30
    assert all(s.split == split_of(s.patient) for s in source)
    for study in source:
        if study.prior: assert study.prior.patient == study.patient and study.prior.split == study.split


def test_a_larger_phantom_contains_the_smaller_one(source):
    small = phantom_source(0, StudiesConfig(train_patients=10, validation_patients=2, test_patients=2))
    for study in small:
        assert study.sections == source[study.study].sections
        assert np.array_equal(study.views["frontal"].array(), source[study.study].views["frontal"].array())


def test_a_split_with_no_share_stays_empty():
    studies = phantom_source(0, StudiesConfig(fractions=(1., 0., 0.), train_patients=3))
    assert {s.split for s in studies} == {"train"}


@pytest.mark.parametrize("kind", ["effusion", "nodule", "pacemaker", "cardiomegaly"])
def test_painting_a_finding_changes_nothing_else(kind):
    study = next(s for s in phantom_source(0, StudiesConfig(train_patients=8, validation_patients=1, test_patients=1)) if not s.truth.findings)
    finding = Finding(kind, "" if kind == "cardiomegaly" else "left", "upper" if kind == "nodule" else "", "large" if kind != "nodule" else "")
    more = painted(study, finding)
    before, after = (s.views["frontal"].array().astype(int) for s in (study, more))
    assert more.truth.findings == (finding,) and more.truth.words == study.truth.words and more.sections == study.sections
    assert np.array_equal(after, painted(study, finding).views["frontal"].array()) and more.views["frontal"].name != study.views["frontal"].name
    assert study.truth.findings == () and f"{kind.replace('_', ' ')} in view" in more.truth.visual
    left, top, right, bottom = more.truth.boxes[finding]
    outside = np.ones_like(before, bool)
    outside[max(top - 8, 0):bottom + 8, max(left - 8, 0):right + 8] = False
    stretched = np.polyval(np.polyfit(before[outside], after[outside], 1), before)     # a film always uses its whole range
    changed = abs(after - stretched) > 8
    assert changed[~outside].any() and changed[outside].mean() < (0.002 if kind != "cardiomegaly" else 0.05)


@pytest.mark.parametrize("kind", PHANTOM_KINDS)
def test_erasing_a_finding_changes_nothing_else(kind):
    study = next(s for s in phantom_source(0, StudiesConfig(train_patients=150, validation_patients=1, test_patients=1))
                 if kind in {f.kind for f in s.truth.findings} and len({f.kind for f in s.truth.findings}) > 1)
    finding = next(f for f in study.truth.findings if f.kind == kind)
    less = erased(study, finding)
    before, after = (s.views["frontal"].array().astype(int) for s in (study, less))
    assert set(less.truth.findings) == set(study.truth.findings) - {finding} and less.sections == study.sections
    assert less.views["frontal"].name != study.views["frontal"].name and finding in study.truth.findings
    assert set(less.truth.boxes) == set(less.truth.findings)
    left, top, right, bottom = study.truth.boxes[finding]
    outside = np.ones_like(before, bool)
    outside[max(top - 8, 0):bottom + 8, max(left - 8, 0):right + 8] = False
    stretched = np.polyval(np.polyfit(before[outside], after[outside], 1), before)
    changed = abs(after - stretched) > 8
    assert changed[~outside].any() and changed[outside].mean() < (0.002 if kind not in ("cardiomegaly", "oedema") else 0.05)


def test_erasing_what_is_not_there_is_refused():
    study = next(s for s in phantom_source(0, StudiesConfig(train_patients=3, validation_patients=1, test_patients=1)) if not s.truth.findings)
    with pytest.raises(ValueError, match="has no"): erased(study, Finding("effusion", "left"))
