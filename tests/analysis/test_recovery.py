"""Recovery: weighted AUROCs against repeated items, parts of a store, and probes on vectors whose directions are known."""
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import roc_auc_score

from saerad.activations.extraction import ExtractionConfig, extract
from saerad.analysis.recovery import Part, discriminants, probe, recovery_intervals, weighted_aurocs
from saerad.core import UserError
from saerad.sae.evaluation import EvaluationConfig, concept_recovery
from saerad.studies.record import StudiesConfig
from saerad.studies.sources import open_source
from saerad.subjects.subject import random_mini

FEW = EvaluationConfig(min_positives=(2, 2))


@pytest.mark.parametrize("seed", range(4))
def test_weights_are_as_good_as_repeated_items(seed):
    draw = np.random.default_rng(seed)
    score, mark, who = draw.integers(0, 4, 60).astype(float), draw.integers(0, 2, 60).astype(float), draw.integers(0, 9, 60)
    weights = draw.multinomial(9, np.full(9, 1 / 9), 5).astype(float)
    again = [roc_auc_score(np.repeat(mark, w[who].astype(int)), np.repeat(score, w[who].astype(int))) for w in weights]
    assert weighted_aurocs(score, mark, who, weights) == pytest.approx(again)


def test_a_draw_without_a_case_has_no_auroc():
    assert np.isnan(weighted_aurocs(np.array([1., 0.]), np.array([1., 0.]), np.array([0, 1]), np.array([[1., 0.]]))).all()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    source = open_source(StudiesConfig(source="phantom:3", train_patients=30, validation_patients=1, test_patients=14))
    store = extract(source, random_mini(0), ExtractionConfig(layer=4), tmp_path_factory.mktemp("run") / "activations")
    return source, store, probe(store, source)


def test_intervals_hold_the_evaluations_own_number(world):
    source, store, dictionary = world
    concepts = concept_recovery(store, dictionary, source, FEW)
    counted = concepts.to_pandas().dropna(subset="feature")
    intervals = recovery_intervals(store, dictionary, source, concepts, draws=50)
    for kind in ("word", "visual"):
        of_kind = counted[counted.kind == kind]
        assert intervals[kind].concepts == len(of_kind) and intervals[kind].share == pytest.approx(of_kind.tracked.mean())
        assert intervals[kind].low <= intervals[kind].high
    assert intervals["all"].share == pytest.approx(counted.tracked.mean())
    assert intervals == recovery_intervals(store, dictionary, source, concepts, draws=50)


def test_a_part_holds_the_tokens_of_its_sections(world):
    source, store, _ = world
    part = Part(store, ["image"])
    assert set(store.tokens["section"].take(part.where("test")).to_pylist()) == {"image"}
    assert len(part.where("test")) == len(store.where("test", "image")) > 0
    concepts = concept_recovery(part, probe(part, source), source, FEW).to_pandas()
    assert concepts[concepts.kind == "word"].feature.isna().all() and concepts[concepts.kind == "visual"].feature.notna().any()
    with pytest.raises(UserError, match="nowhere"): Part(store, ["nowhere"])


def test_discriminants_are_those_of_scikit_learn():
    draw = np.random.default_rng(0)
    mark = (draw.random(4000) < 0.3).astype(float)
    x = draw.normal(size=(4000, 5)) @ draw.normal(size=(5, 5)) + np.outer(mark, [0.3, 0, -0.2, 0, 0.1])
    own = discriminants(torch.tensor(x, dtype=torch.float32), mark[:, None], ridge=0.0)[0].numpy()
    theirs = LinearDiscriminantAnalysis(solver="lsqr").fit(x, mark).coef_[0]
    assert own @ theirs / np.linalg.norm(own) / np.linalg.norm(theirs) > 0.999
    assert not discriminants(torch.tensor(x, dtype=torch.float32), np.zeros((4000, 1))).any()


def test_a_probe_finds_a_direction_that_was_put_in():
    """Vectors of a made-up store carry the visual concept of their study along one dimension each."""
    from saerad.sae.evaluation import concepts_of
    names, draw = [c.name for c in concepts_of("visual")][:3], np.random.default_rng(1)
    studies = {f"s{i}": SimpleNamespace(truth=SimpleNamespace(visual={n for n in names if draw.random() < 0.4}, words={})) for i in range(120)}
    x = torch.tensor(np.stack([[3.0 * (n in s.truth.visual) for n in names] + [0.0] for s in studies.values()]) + draw.normal(size=(120, 4)),
                     dtype=torch.float32)
    tokens = pa.table({"study": list(studies), "section": ["image"] * 120, "start": [-1] * 120, "end": [-1] * 120})
    store = SimpleNamespace(d=4, tokens=tokens, read=lambda rows: x[torch.from_numpy(rows)],
                            where=lambda split: np.arange(80) if split == "train" else np.arange(80, 120))
    concepts = concept_recovery(store, probe(store, studies), studies).to_pandas().set_index("concept")
    assert (concepts.auroc_test[names] > 0.9).all() and concepts.feature[names].nunique() == 3
