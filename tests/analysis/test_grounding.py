"""Grounding: marks of patches, heatmaps against masks, painted images, exchanged images and priors, words of a report."""
import numpy as np
import pytest
import torch

from saerad.activations.extraction import ExtractionConfig, extract
from saerad.analysis.grounding import heatmaps, image_variants, inside, on_words, painted_response, patch_marks, prior_variants, word_activations
from saerad.sae.model import MatryoshkaSAE
from saerad.studies.findings import PHANTOM_KINDS, Finding
from saerad.studies.phantom import painted
from saerad.studies.record import StudiesConfig
from saerad.studies.sources import open_source
from saerad.subjects.subject import random_mini


@pytest.fixture(scope="module")
def world():
    return open_source(StudiesConfig(source="phantom:0", train_patients=6, validation_patients=1, test_patients=6))


@pytest.fixture(scope="module")
def blind():
    return random_mini()


@pytest.fixture(scope="module")
def sae(blind):
    made = MatryoshkaSAE(blind.d_model, (32, 32), k=8)
    made.threshold.fill_(0.05)
    return made


def test_marks_are_the_truth_of_each_patch(world, blind, tmp_path):
    store = extract(world, blind, ExtractionConfig(layer=1, image_tokens="all"), tmp_path / "store")
    rows, marks = patch_marks(store, world, store.where("train"))
    tokens = store.tokens.take(rows).to_pandas()
    assert set(tokens["view"]) == {"frontal"} and len(rows) == 64 * len(world.split("train")) and marks.max() == 1
    for study in world.split("train"):
        mine = marks[np.flatnonzero(tokens.study == study.study)].toarray().reshape(8, 8, -1)
        for i, kind in enumerate(PHANTOM_KINDS):
            where = [m for f, m in study.truth.patches.items() if f.kind == kind]
            assert np.array_equal(mine[..., i] > 0, np.any(where, axis=0) if where else np.zeros((8, 8), bool))


def test_inside():
    mask = np.array([1, 1, 0, 0, 0, 0], bool)
    assert inside(np.array([3., 2, 1, 0, 0, 0]), mask) == (1.0, 1.0)
    assert inside(np.array([0., 0, 0, 0, 0, 9]), mask) == (0.375, 0.0)
    assert inside(np.zeros(6), mask) == (0.5, pytest.approx(1 / 3))
    assert np.isnan(inside(np.zeros(6), np.ones(6, bool))).all()


def test_the_response_is_the_change_inside_and_outside(world, blind, sae):
    studies = [s for s in world.split("test") if not any(f.kind == "pacemaker" for f in s.truth.findings)][:2]
    finding = Finding("pacemaker", "left")
    features, more = list(range(64)), painted(studies[1], finding)
    response = painted_response(blind, sae, 0, studies, finding, features)
    before, after = heatmaps(blind, sae, 0, [blind.prompt(studies[1]), blind.prompt(more)], features)
    where, gap = more.truth.patches[finding].ravel(), after - before
    assert response.study.tolist() == [s.study for s in studies for _ in features] and response.feature.tolist() == features * 2
    assert np.allclose(response[["inside", "outside"]][64:], np.stack([gap[where].mean(0), gap[~where].mean(0)], 1), atol=1e-5)
    assert np.abs(gap).max() > 0


def test_variants_change_what_they_say_and_nothing_else(world, blind, sae):
    studies = world.split("test")
    variants = image_variants(blind, studies, reports=True)
    for own, other, none in zip(*variants.values(), strict=True):
        assert torch.equal(own.ids, other.ids) and torch.equal(own.ids, none.ids) and not none.pixels.any()
        assert not torch.equal(own.pixels[0], other.pixels[0]) and torch.equal(own.pixels[1:], other.pixels[1:])
    later, first = next(s for s in studies if s.prior), next(s for s in studies if not s.prior)
    priors = prior_variants(later, first)
    assert priors["own"] is later and priors["none"].prior is None and priors["none"].all_views.keys() == {"frontal"}
    assert priors["another's film"].prior_report == later.prior_report and priors["another's film"].all_views["prior"] is first.views["frontal"]
    assert priors["another's report"].prior_report == first.sections["findings"]
    assert priors["another's report"].all_views["prior"] is later.all_views["prior"]
    assert priors["another's"].prior_report == first.sections["findings"] and priors["another's"].all_views["prior"] is first.views["frontal"]


def test_words_and_patches_are_read_where_they_stand(world, blind, sae):
    from saerad.activations.extraction import residuals
    study = next(s for s in world.split("train") if any("left" in w.concepts for w in s.truth.words["findings"]))
    prompt = blind.prompt(study, study.sections["findings"])
    stream = residuals(blind, [prompt], 1)[0]
    z = sae.encode(stream)
    at = on_words(prompt, study, "left")
    marked = "".join(study.sections["findings"][a:b] for a, b in zip(prompt.start[at], prompt.end[at], strict=True))
    assert "left" in marked.lower() and set(prompt.section[at]) == {"findings"}
    table = word_activations(blind, sae, 1, [prompt], [study], {"left": 3, "fever": 5})
    assert table.concept.tolist() == ["left"] and table.activation[0] == pytest.approx(float(z[at, 3].mean()), abs=1e-5)
    maps = heatmaps(blind, sae, 1, [prompt], [3])
    assert maps.shape == (1, 64, 1)
    assert np.allclose(maps[0, :, 0], z[(prompt.section == "image") & (prompt.view == "frontal")][:, 3], atol=1e-5)
