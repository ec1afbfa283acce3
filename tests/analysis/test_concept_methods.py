"""Ceilings and methods of concept sets: gradients, plans, verdicts and shares, on a small real subject model and store."""
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from test_concept_sets import drawn_sae

from saerad.activations.extraction import ExtractionConfig, extract, residuals
from saerad.analysis.concept_methods import (
    ConceptMethod,
    ConceptMethodsConfig,
    Hookpoint,
    Material,
    best_strengths,
    ceiling_rows,
    changed_films,
    concept_methods,
    concept_table,
    concept_verdicts,
    known_before,
    learn,
    learn_words,
    log_probability,
    method_change,
    method_reports,
    method_rows,
    methods_elsewhere,
    on_films,
    placed_change,
    probe_scores,
    probe_vectors,
    targeted_at_words,
    told_before,
)
from saerad.core import UserError, rng
from saerad.steering.concept_sets import places_in
from saerad.steering.effects import share_of_ceiling
from saerad.steering.interventions import decoder_layer, replaced, write_steered
from saerad.steering.judges import reader_of
from saerad.studies.phantom import phantom_source
from saerad.studies.record import StudiesConfig
from saerad.subjects.subject import random_mini

PLACES = [("cardiomegaly", ""), ("effusion", "left"), ("picc", "right")]


@pytest.fixture(scope="module")
def world(): return phantom_source(0, StudiesConfig(train_patients=30, validation_patients=1, test_patients=4))


@pytest.fixture(scope="module")
def subject(): return random_mini()


@pytest.fixture(scope="module")
def store(world, subject, tmp_path_factory):
    return extract(world, subject, ExtractionConfig(layer=0, image_tokens="sample:16"), tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def sae(store): return drawn_sae(store, (64, 64))


@pytest.fixture(scope="module")
def words(world, store, sae) -> Material: return learn_words(store, sae, world, ConceptMethodsConfig(least=4))


@pytest.fixture(scope="module")
def material(world, subject, store, sae) -> Material:
    slopes = {p: torch.randn(64, store.d, generator=torch.Generator().manual_seed(1)) for p in PLACES}
    return learn(store, sae, world, slopes, ConceptMethodsConfig(least=4))


def test_films_are_changed_by_one_finding(world):
    study = next(s for s in world if len({(f.kind, f.side) for f in s.truth.findings}) > 1)
    there = {(f.kind, f.side) for f in study.truth.findings}
    places = sorted({*PLACES, *there})
    plan = changed_films(study, places, 2, 0)
    assert {p for p, sign, _ in plan if sign < 0} == there and sum(sign > 0 for _, sign, _ in plan) <= 2
    assert [(p, s) for p, s, _ in plan] == [(p, s) for p, s, _ in changed_films(study, places, 2, 0)]
    for place, sign, film in plan:
        now = {(f.kind, f.side) for f in film.truth.findings}
        assert now == (there | {place} if sign > 0 else there - {place}) and film.sections == study.sections
        assert place[0] not in {k for k, _ in there} or sign < 0


def test_the_gradient_is_that_of_the_log_probability(world, subject):
    study = next(s for s in world if s.prior is not None)
    report = study.sections["findings"]
    prompt = subject.prompt(study, report)
    at = torch.from_numpy(np.flatnonzero((prompt.section == "image") & (prompt.view == "frontal")))
    value, slope = log_probability(subject, study, report, 0)
    assert slope.shape == (len(at), subject.d_model) and value < 0
    step = 0.02 * slope / slope.norm()
    with replaced(decoder_layer(subject, 0), lambda x: x.index_add(1, at, step[None])): more = log_probability(subject, study, report, 0)[0]
    with replaced(decoder_layer(subject, 0), lambda x: x.index_add(1, at, -step[None])): less = log_probability(subject, study, report, 0)[0]
    assert (more - less) / 2 == pytest.approx(float((slope * step).sum()), rel=0.05)


def test_a_patched_stream_of_the_same_film_changes_nothing(world, subject):
    study = world.split("test")[0]
    rows = ceiling_rows(subject, 0, study, [(PLACES[0], 1, study)], 8)
    assert [r["method"] for r in rows] == ["film", "stream", "patches"] and {r["text"] for r in rows[1:]} == {rows[0]["baseline"]}


def test_what_methods_add(material, world, subject):
    study, number = world.split("test")[0], material.places.index(material.places[0])
    place, active = material.places[0], torch.rand(len(material.cells), material.sae.width)
    made = {w.name: w for w in concept_methods(ConceptMethodsConfig(sizes=(1, 4, 8), few=4)) if w.choose in material.ways}
    assert torch.equal(method_change(material, made["means by place"], place, -1, 2.0, active), -2 * material.stream[:, 1 + number])
    even = method_change(material, made["mean vector"], place, 1, 1.0, active)
    assert torch.allclose(even, even[:1].expand_as(even)) and torch.allclose(even[0], material.stream[:, 1 + number].mean(0), atol=1e-5)
    whole = ConceptMethod("all", "set", "contrast", material.sae.width)
    rows = material.sae.W_dec.detach() * float(material.sae.scale)
    assert torch.allclose(method_change(material, whole, place, 1, 1.0, active), material.features[:, 1 + number] @ rows, atol=1e-3)
    own = made["set of 4, contrast"]
    noise = method_change(material, ConceptMethod("r", "random", "contrast", 4), place, 1, 1.0, active)
    assert torch.allclose(noise.norm(dim=1), method_change(material, own, place, 1, 1.0, active).norm(dim=1), rtol=1e-3, atol=1e-4)
    less = ConceptMethod("less", "set, subtracted", "contrast", material.sae.width)
    added = method_change(material, whole, place, 1, 1.0, active)
    assert torch.allclose(method_change(material, less, place, -1, 2.0, active), -2 * added, atol=1e-3)
    clamped = ConceptMethod("clamped", "set, clamped", "contrast", material.sae.width)
    without = material.features[:, 0].clamp(min=0)
    for sign, wanted in ((1, without + 2 * material.features[:, 1 + number]), (-1, without)):
        assert torch.allclose(method_change(material, clamped, place, sign, 2.0, active), (wanted - active) @ rows, atol=1e-3)
    gone = method_change(material, whole, place, -1, 1.0, active)
    kept = active.minimum(material.features[:, 0].clamp(min=0))
    assert torch.allclose(gone, (kept - active) @ rows, atol=1e-3)
    written = method_rows(subject, {"image": Hookpoint(0, material)}, study, [(place, 1, w, 1.0) for w in made.values()], 6)
    assert [r["method"] for r in written] == list(made) and len({r["baseline"] for r in written}) == 1
    stream = residuals(subject, [subject.prompt(study)], 0)[0]
    assert stream.shape[1] == material.sae.d and set(known_before(material, own).kind) == {k for k, _ in material.places}


def test_words_are_learned_from_the_means_of_reports(world, store, sae, words):
    tokens = store.tokens.to_pandas()
    own = tokens[(tokens.section == "findings") & tokens.study.isin([s.study for s in world.split("train")])]
    means = {name: store.read(rows.index.to_numpy()).float().mean(0) for name, rows in own.groupby("study")}
    found = {name: set(places_in(reader_of(world)(s.sections["findings"]))) for name in means for s in [world[name]]}
    design = torch.tensor([[1.0, *(p in found[name] for p in words.places)] for name in means])
    penalty = 2 * torch.eye(design.shape[1])
    penalty[0, 0] = 0
    stream = torch.linalg.solve(design.T @ design + penalty, design.T @ torch.stack(list(means.values())))
    assert words.stream.shape[0] == 1 and torch.allclose(words.stream[0], stream, atol=1e-3)
    assert words.features.shape == (1, len(words.places) + 1, sae.width) and set(words.ways) == {"", "contrast", "probe", "mean"}


def test_where_methods_change_something(material, words, world, subject):
    prompt = subject.prompt(world.split("test")[0])
    hooks = {"image": Hookpoint(0, material), "words": Hookpoint(4, words), "later": Hookpoint(2, material)}
    made = {w.name: w for w in methods_elsewhere(ConceptMethodsConfig(sizes=(4,), few=4))}
    place = next(p for p in material.places if p in words.places)
    for w in made.values():
        m = hooks[w.at[0]].material
        change = method_change(m, w, place, 1, 1.0, torch.zeros(len(m.cells), m.sae.width))
        how = placed_change(prompt, m.cells, change, w)
        if w.positions == "image": assert how.per_token is not None and not how.per_token[prompt.section != "image"].any() and how.per_token.any()
        else: assert (how.positions, how.from_sentence) == (w.positions, w.from_sentence) and torch.allclose(how.directions[0], change[0])
    two = made["set of 4, two layers"]
    rows = method_rows(subject, hooks, world.split("test")[0], [(place, 1, two, 3.0), (place, 1, made["words, set of 4, report"], 8.0)], 6)
    one = [method_change(material, two, place, 1, 3.0, torch.zeros(len(material.cells), material.sae.width))] * 2
    edits = {at: placed_change(prompt, material.cells, c, two) for at, c in zip((0, 2), one, strict=True)}
    assert rows[0]["text"] == write_steered(subject, prompt, [edits], 0, 6)[0].text
    assert rows[0]["baseline"] == subject.generate([prompt], 6)[0]


def test_only_what_a_hookpoint_knows_is_planned_there(material, words, world, subject, tmp_path):
    known = replace(words, places=words.places[:1])
    hooks = {"image": Hookpoint(0, material), "words": Hookpoint(4, known)}
    cfg = ConceptMethodsConfig(sizes=(4,), few=4, absent=3, max_new_tokens=4)
    plan = [(ConceptMethod("image", "field"), 1, 1.0), (methods_elsewhere(cfg)[1], 1, 1.0)]
    found = method_reports(subject, hooks, world.split("test")[:2], plan, tmp_path, cfg)
    there = found[found.method != "image"]
    assert set(zip(there.kind, there.side, strict=True)) <= {known.places[0]} and len(found) > len(there)


def test_on_another_film_and_on_none(world, subject):
    study = next(s for s in world.split("test") if s.prior is None)
    films = on_films(study, world)
    pixels = {name: subject.prompt(s).pixels for name, s in films.items()}
    assert films["own"] is study and all(s.sections == study.sections and s.study == study.study for s in films.values())
    other = next(s for s in world if s.views["frontal"].name == films["another's"].views["frontal"].name)
    assert other.patient != study.patient and films["another's"].truth is other.truth and films["none"].truth is study.truth
    assert not torch.equal(pixels["own"], pixels["another's"]) and float(pixels["none"].abs().median()) < 0.01 and float(pixels["none"].std()) < 0.1
    place, sign, film = changed_films(films["another's"], PLACES, 3, 0)[0]
    assert film.views["frontal"].name.startswith(other.views["frontal"].name)
    alone = type(world)(world.spec, [s for s in world if s.split != "test"] + [study])
    with pytest.raises(UserError, match="no other test patient"): on_films(study, alone)


def test_vectors_target_what_is_written_of_a_place(material, words):
    M, b = torch.randn(material.sae.d, words.sae.width, generator=torch.Generator().manual_seed(0)), torch.zeros(words.sae.width)
    made = targeted_at_words(material, words, M, b, 4)
    for i, place in enumerate(material.places):
        if place not in words.places: assert not made.vectors["targeted"][i].any()
        else:
            number = words.places.index(place)
            best = int(words.scores["contrast"][number].argmax())
            towards = M[:, best] * words.features[0, 1 + number, best].sign()
            assert torch.allclose(made.vectors["targeted"][i], towards / towards.norm() * material.vectors["mean"][i].norm(), atol=1e-4)
    assert made.ways - material.ways == {"targeted", "targeted set"}


def test_probes_find_what_was_put_in():
    z = rng(0).random((300, 20)).astype(np.float32)
    stated = np.stack([z[:, 4] > 0.6, z[:, 7] + z[:, 2] > 1.2], 1)
    scores = probe_scores(z, stated)
    assert scores[0].argmax() == 4 and set(np.argsort(-scores[1])[:2]) == {7, 2}
    assert np.abs(probe_vectors(z, stated))[0].argmax() == 4 and np.allclose(np.linalg.norm(probe_vectors(z, stated), axis=1), 1, atol=1e-5)


def rows(method, texts, sign=1, dose=1.0):
    same = {"patient": "p", "kind": "effusion", "side": "left", "method": method, "baseline": CLEAR, "sign": sign, "dose": dose, "times": 1.0}
    return pd.DataFrame([same | {"study": f"s{i}", "text": t} for i, t in enumerate(texts)])


CLEAR = "The heart size is normal."
LEFT, RIGHT = (f"Small {side} pleural effusion. {CLEAR}" for side in ("left", "right"))


def test_verdicts_are_strict_about_side_and_direction():
    found = concept_verdicts(rows("m", [LEFT, RIGHT, CLEAR]))
    assert found.pure.tolist() == [True, False, False] and found.pure_kinds.tolist() == [True, True, False]
    other = concept_verdicts(rows("m", [LEFT.replace("normal", "mildly enlarged"), LEFT + " Moderate right pneumothorax."]))
    assert other.pure.tolist() == [False, False] and other.pure_clinical.tolist() == [True, False] and other.more.all()
    assert not concept_verdicts(rows("m", [LEFT], sign=-1)).pure[0]


def test_a_share_of_the_ceiling():
    own, film = (concept_verdicts(rows(m, t)) for m, t in (("m", [LEFT, CLEAR, CLEAR, LEFT]), ("film", [LEFT, LEFT, LEFT, LEFT])))
    share, low, high = share_of_ceiling(own, film)
    assert share == 0.5 and 0 <= low < 0.5 < high <= 1
    table = concept_table(pd.concat([own, film]))
    assert table["of ceiling"]["m"] == 0.5 and table.pure["film"] == 1.0 and table.loc["film", ["of ceiling", "from", "to"]].tolist() == [1, 1, 1]


def test_doses_are_chosen_where_most_is_pure_and_then_small():
    tried = concept_verdicts(pd.concat([rows("m", [LEFT, CLEAR], dose=1.0), rows("m", [LEFT, LEFT], dose=2.0), rows("m", [LEFT, LEFT], dose=3.0)]))
    assert best_strengths(tried) == {("m", 1): 2.0}


def test_what_is_told_before():
    draw = rng(1)
    table = pd.DataFrame({"a": draw.random(25), "b": draw.random(25)}).assign(measured=lambda t: t.a)
    told, chance = told_before(table, ("a", "b")), told_before(table.assign(measured=draw.random(25)), ("a", "b"))
    assert told["told"] > 0.9 and told["low"] > 0.8 and chance["low"] < 0.1 and chance["told"] < 0.4 and told["places"] == 25
