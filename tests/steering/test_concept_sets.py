"""Concept sets: what is chosen from reports and activations, what is moved, and where; on a small real store and subject model."""
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saerad.activations.extraction import ExtractionConfig, extract, residuals
from saerad.activations.store import Store
from saerad.core import UserError, rng
from saerad.sae.model import MatryoshkaSAE
from saerad.steering.concept_sets import (
    ConceptSets,
    ConceptSetsConfig,
    added_values,
    adjusted_contrasts,
    alive_features,
    cells_of,
    choose_sets,
    concept_interventions,
    concepts_summary,
    erased_values,
    example_of,
    feature_reader,
    film_with,
    patch_rows,
    places_in,
    planned,
    position_contrasts,
    random_set,
    stated_places,
    steer_concepts,
)
from saerad.steering.interventions import adding, write_steered
from saerad.steering.judges import JudgeConfig, reader_of
from saerad.studies.findings import Finding, Reading
from saerad.studies.phantom import painted, phantom_source
from saerad.studies.record import StudiesConfig
from saerad.subjects.subject import random_mini


@pytest.fixture(scope="module")
def world():
    return phantom_source(0, StudiesConfig(train_patients=30, validation_patients=1, test_patients=4))


@pytest.fixture(scope="module")
def subject(): return random_mini()


@pytest.fixture(scope="module")
def store(world, subject, tmp_path_factory):
    return extract(world, subject, ExtractionConfig(layer=0, image_tokens="sample:16"), tmp_path_factory.mktemp("store"))


def drawn_sae(store: Store, groups: tuple[int, ...]) -> MatryoshkaSAE:
    """An untrained SAE with tied weights and the store's scale, so that its features fire."""
    made = MatryoshkaSAE(store.d, groups, k=8)
    with torch.no_grad():
        made.scale.fill_(float(store.read(store.where("train")[:500]).norm(dim=1).mean()))
        made.threshold.fill_(0.01)
        made.W_enc.copy_(torch.randn(store.d, sum(groups), generator=torch.Generator().manual_seed(0)))
        made.W_dec.copy_(torch.nn.functional.normalize(made.W_enc.T, dim=1))
    return made


@pytest.fixture(scope="module")
def sae(store): return drawn_sae(store, (32, 32))


def test_what_a_report_affirms():
    reading = Reading((Finding("effusion", "bilateral"), Finding("nodule", "left", change="resolved"), Finding("oedema", certainty="absent"),
                       Finding("atelectasis", "right", certainty="uncertain")))
    assert places_in(reading) == {("effusion", "left"), ("effusion", "right"), ("atelectasis", "right")}


def test_places_need_enough_reports(world):
    train, read = world.split("train"), reader_of(world)
    places, stated = stated_places(train, read, least=5)
    everything, every = stated_places(train, read)
    assert set(places) == {p for p, n in zip(everything, every.sum(0), strict=True) if n >= 5} and (stated.sum(0) >= 5).all()
    for study, row in zip(train, stated, strict=True):
        assert {p for p, there in zip(places, row, strict=True) if there} == places_in(read(study.sections["findings"])) & set(places)


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_company_is_not_blamed(seed):
    """What each finding adds is found where findings come together, which a plain difference of means gets wrong."""
    draw = rng(seed)
    first = draw.random(600) < 0.4
    stated = torch.from_numpy(np.stack([first, np.where(first, draw.random(600) < 0.7, draw.random(600) < 0.2)], 1))
    true = torch.tensor([[5.0, -1.0], [2.0, 0.0], [0.0, 3.0]])
    values = torch.cat([torch.ones(600, 1), stated.float()], 1) @ true
    assert torch.allclose(adjusted_contrasts(values, stated, ridge=1e-3), true, atol=1e-2)
    plain = values[stated[:, 0]].mean(0) - values[~stated[:, 0]].mean(0)
    assert plain[1] > 1


def test_rows_of_patches_know_their_place(world, store, subject):
    rows = patch_rows(store)
    assert set(rows.study) <= {s.study for s in world.split("train")} and len(rows) > 100
    study = world[rows.study[0]]
    prompt = subject.prompt(study, study.sections["findings"])
    own = rows[rows.study == study.study]
    stream = residuals(subject, [prompt], 0)[0]
    for r in own.itertuples():
        at = np.flatnonzero((prompt.section == "image") & (prompt.view == "frontal") & (prompt.row == r.row) & (prompt.col == r.col))
        assert torch.allclose(store.read(np.array([r.store_row]))[0], stream[at[0]], atol=1e-4)


def test_a_store_without_patches_is_refused(world, subject, tmp_path):
    few = phantom_source(0, StudiesConfig(train_patients=3, validation_patients=1, test_patients=1))
    for tokens in ("last", "none"):
        with pytest.raises(UserError, match="more_image_tokens"):
            patch_rows(extract(few, subject, ExtractionConfig(layer=0, image_tokens=tokens), tmp_path / tokens))


def test_contrasts_are_those_of_each_cell(world, store, sae):
    train = world.split("train")
    places, stated = stated_places(train, reader_of(world), least=5)
    cells, found = position_contrasts(store, feature_reader(store, sae), [s.study for s in train], stated)
    assert found.shape == (len(cells), len(places) + 1, sae.width) and len(set(cells)) == len(cells)
    rows, number = patch_rows(store), {s.study: i for i, s in enumerate(train)}
    own = rows[(rows.row == cells[3][0]) & (rows.col == cells[3][1])]
    z = sae.encode(store.read(own.store_row.to_numpy()).float()).detach()
    assert torch.allclose(found[3], adjusted_contrasts(z, torch.from_numpy(stated[[number[s] for s in own.study]])), atol=1e-4)


def made_sets(sae, size=3):
    cells = [(r, c) for r in range(8) for c in range(8)]
    found = torch.zeros(64, 3, sae.width)
    found[:, 0] = 0.5
    found[:, 1, 7], found[5, 1, 9], found[:, 1, 11] = 0.2, 40.0, -0.3     # one cell may count for more than all cells together
    found[:, 2, 20] = 1.0
    return choose_sets(cells, found, [("effusion", "left"), ("picc", "")], sae, size)


def test_the_set_is_what_moves_the_stream_most(sae):
    sets = made_sets(sae)
    assert sets.features[0] == [9, 11, 7] and sets.features[1][0] == 20
    assert torch.equal(sets.contrast[0][5], torch.tensor([40.0, -0.3, 0.2])) and (sets.before[0] == 0.5).all()
    assert torch.equal(added_values(sets, ("effusion", "left"), 2.0), sets.contrast[0] * 2)


def test_erasing_takes_what_is_above_and_nothing_else():
    before, active = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[3.0, 0.5, 1.0]])
    assert torch.equal(erased_values(before, active, 1.0), torch.tensor([[-2.0, -0.5, 0.0]]))
    assert torch.equal(erased_values(before, active, 0.5), torch.tensor([[-1.0, -0.25, 0.0]]))


def test_only_the_frontal_view_is_moved(world, subject, sae):
    """And the set's features go to where they were told, to the study's own activations."""
    study = next(s for s in world if s.prior is not None)
    prompt, sets = subject.prompt(study), made_sets(sae)
    at, cell = cells_of(prompt, sets.cells)
    assert len(at) == 64 and (prompt.view[at] == "frontal").all() and [(prompt.row[i], prompt.col[i]) for i in at] == [sets.cells[i] for i in cell]
    assert "prior" in prompt.view
    stream = residuals(subject, [prompt], 0)[0]
    cfg = ConceptSetsConfig(size=3, random_sets=2, erase=1.0, erase_by="mean")
    plan = [(("effusion", "left"), 1), (("effusion", "left"), -1)]
    edits = concept_interventions(sae, sets, list(range(64)), prompt, stream, plan, cfg, 0)
    assert [what["method"] for what, _ in edits] == ["concept_set", "random", "random"] * 2
    assert [what["sign"] for what, _ in edits] == [1] * 3 + [-1] * 3
    others = np.setdiff1d(np.arange(len(prompt)), at)
    for _, e in edits: assert not e.per_token[others].any()
    for own, *rest in (edits[:3], edits[3:]):
        length = own[1].per_token.norm(dim=1)
        for what, e in rest:
            assert set(what["features"]).isdisjoint(own[0]["features"]) and len(set(what["features"])) == 3
            assert torch.allclose(e.per_token.norm(dim=1), length, atol=1e-3)
    added = (sets.contrast[0][cell] @ sae.W_dec[sets.features[0]].detach()) * float(sae.scale)
    assert torch.allclose(edits[0][1].per_token[at], added, atol=1e-3)
    active = sae.encode(stream[at]).detach()[:, sets.features[0]]
    lowered = (active.minimum(torch.tensor(0.5)) - active) @ sae.W_dec[sets.features[0]].detach() * float(sae.scale)
    assert torch.allclose(edits[3][1].per_token[at], lowered, atol=1e-3)
    plain = concept_interventions(sae, sets, list(range(64)), prompt, stream, plan, ConceptSetsConfig(size=3, erase=0.5), 0)
    assert [what["method"] for what, _ in plain] == ["concept_set", "random"] * 2
    assert torch.allclose(plain[2][1].per_token[at], -added / 2, atol=1e-3)


def test_fewer_features_may_erase_than_add(sae, subject, world):
    prompt, sets = subject.prompt(world.split("test")[0]), made_sets(sae)
    stream, place = torch.randn(len(prompt), sae.d, generator=torch.Generator().manual_seed(0)) * float(sae.scale), sets.places[0]
    for by in ("contrast", "mean"):
        few, all_of_them = (ConceptSetsConfig(size=3, erase_size=n, random_sets=0, erase_by=by) for n in (2, None))
        (more, added), (less, gone) = concept_interventions(sae, sets, range(4), prompt, stream, [(place, 1), (place, -1)], few, 0)
        assert more["features"] == sets.features[0] and less["features"] == sets.features[0][:2]
        fewer = replace(sets, features=[f[:2] for f in sets.features], **{n: [v[:, :2] for v in getattr(sets, n)] for n in ("before", "contrast")})
        (_, expected), = concept_interventions(sae, fewer, range(4), prompt, stream, [(place, -1)], all_of_them, 0)
        (_, whole), = concept_interventions(sae, sets, range(4), prompt, stream, [(place, 1)], all_of_them, 0)
        assert torch.equal(gone.per_token, expected.per_token) and torch.equal(added.per_token, whole.per_token)


def test_a_plan_adds_what_is_absent_and_erases_what_is_there(world, sae):
    read, sets = reader_of(world), made_sets(sae)
    for study in world.split("test"):
        there = places_in(read(study.sections["findings"]))
        plan = planned(study, sets, read, ConceptSetsConfig(size=3, absent=1), 0)
        assert plan == planned(study, sets, read, ConceptSetsConfig(size=3, absent=1), 0) and sum(sign > 0 for _, sign in plan) <= 1
        for place, sign in plan: assert (place in there) == (sign < 0) and (sign < 0 or place[0] not in {k for k, _ in there})


def test_random_sets_are_others():
    assert len(set(random_set(range(20), [1, 2, 3], 0, "a"))) == 3 and not {1, 2, 3} & set(random_set(range(20), [1, 2, 3], 0, "a"))
    assert random_set(range(20), [1, 2], 0, "a") == random_set(range(20), [1, 2], 0, "a") != random_set(range(20), [1, 2], 0, "b")
    assert random_set([1, 4], [1, 2, 3], 0, "a") == [4]


def test_the_stage(world, subject, sae, store, tmp_path, monkeypatch):
    """Baselines are the untouched model's, a second run writes nothing, and the summary counts what is in the table."""
    cfg = ConceptSetsConfig(size=4, test_studies=3, absent=2, least=5)
    table = steer_concepts(world, subject, sae, store, 0, cfg, JudgeConfig(), 0, tmp_path, max_new_tokens=6)
    assert set(table.method) == {"concept_set", "random", "film"} and table.study.nunique() == 3
    assert {world[s].split for s in table.study} == {"test"} and set(table.patient) == {world[s].patient for s in table.study}
    study = table.study[0]
    untouched = write_steered(subject, subject.prompt(world[study]), [adding(torch.zeros(1, subject.d_model))], 0, 6)[0].text
    assert set(table.baseline[table.study == study]) == {untouched}
    found = concepts_summary(table)
    assert found["on_target_only_reports"] == found["random_on_target_only_reports"] == (table.method == "concept_set").sum()
    assert found["added_reports"] + found["erased_reports"] == found["on_target_only_reports"]
    film = table[(table.method == "film") & (table.sign > 0)].iloc[0]
    changed = painted(world[film.study], example_of((film.kind, film.side)))
    assert film.steered == subject.generate([subject.prompt(changed)], 6)[0] and {"ceiling", "of_ceiling_added_interval"} <= set(found)
    again = steer_concepts(world, subject, sae, store, 0, cfg, JudgeConfig(), 0, tmp_path, max_new_tokens=6)
    assert again.equals(table) and not list(tmp_path.glob("concept-parts-*"))


def test_shares_count_only_what_went_the_right_way():
    rows = pd.DataFrame({"study": list("aabb"), "kind": "effusion", "side": "left", "sign": [1, -1, 1, -1], "method": "concept_set",
                         "outcome": ["on_target_only", "on_target_only", "mixed", "on_target_only"], "towards": [True, False, True, True]})
    found = concepts_summary(rows)
    assert (found["on_target_only"], found["added"], found["erased"]) == (0.5, 0.5, 0.5) and found["random_on_target_only_reports"] == 0


def test_the_ceiling_is_of_the_same_findings():
    """A film that cannot be changed takes its report out of the share of the ceiling, and without films there is none."""
    sets = pd.DataFrame({"study": list("aabb"), "kind": "effusion", "side": ["left", "right"] * 2, "sign": [1, 1, 1, -1], "method": "concept_set",
                         "outcome": ["on_target_only", "unchanged", "on_target_only", "on_target_only"], "towards": True})
    assert not any("ceiling" in key for key in concepts_summary(sets))
    film = sets.iloc[:3].assign(method="film", outcome=["on_target_only", "on_target_only", "on_target_only"])
    found = concepts_summary(pd.concat([sets, film]))
    assert found["ceiling"] == 1 and found["of_ceiling"] == pytest.approx(2 / 3) and "ceiling_erased" not in found
    assert found["on_target_only"] == 0.75


def test_films_are_changed_where_the_truth_is_known(world):
    study = next(s for s in world if s.truth.findings)
    own = study.truth.findings[0]
    gone = film_with(study, (own.kind, own.side), -1)
    assert own not in gone.truth.findings and film_with(study, ("effusion", "nowhere"), -1) is None
    assert film_with(replace(study, truth=None), ("effusion", "left"), 1) is None
    assert ("picc", "left") in {(f.kind, f.side) for f in film_with(study, ("picc", "left"), 1).truth.findings}


def test_no_finding_is_stated_often_enough(world, subject, sae, store, tmp_path):
    with pytest.raises(UserError, match="concept_sets.least"):
        steer_concepts(world, subject, sae, store, 0, ConceptSetsConfig(size=4, least=500), JudgeConfig(), 0, tmp_path)


def test_alive(store, sae):
    on = alive_features(store, sae, least=20)
    z = sae.encode(store.read(patch_rows(store).store_row.sort_values().to_numpy()).float())
    assert np.array_equal(on, ((z > 0).sum(0) >= 20).numpy()) and isinstance(store, Store) and ConceptSets is not None
