"""Plain readers of the stream against scikit-learn, and that nothing of a test patient is used to find a direction."""
import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score

from saerad.activations.extraction import ExtractionConfig, extract
from saerad.analysis.probes import direction_recovery, mean_directions, probe_directions, ranked_aurocs
from saerad.sae.evaluation import EvaluationConfig, concept_tokens, concepts_of
from saerad.studies.record import StudiesConfig
from saerad.studies.sources import open_source
from saerad.subjects.subject import random_mini


@pytest.fixture(scope="module")
def made():
    draw = np.random.default_rng(1)
    x = draw.normal(size=(300, 6)) * [1, 2, 3, 4, 5, 6] + 2
    return x, (draw.random((300, 3)) < 0.3).astype(float)


def test_directions(made):
    x, marks = made
    means = np.stack([x[m > 0].mean(0) - x[m == 0].mean(0) for m in marks.T], 1)
    assert np.allclose(mean_directions(x, marks), means)
    alpha = 0.1 * ((x - x.mean(0)) ** 2).sum() / 6
    assert np.allclose(probe_directions(x, marks, 0.1), Ridge(alpha=alpha).fit(x, marks).coef_.T, atol=1e-8)


def test_aurocs_with_ties(made):
    x, marks = made
    scores = x.round()
    aurocs = ranked_aurocs(scores, marks)
    assert aurocs.shape == (3, 6) and aurocs[1, 4] == pytest.approx(roc_auc_score(marks[:, 1], scores[:, 4]))


def test_recovery_is_judged_on_test_patients(tmp_path):
    source = open_source(StudiesConfig(source="phantom:0", train_patients=30, validation_patients=1, test_patients=15))
    store = extract(source, random_mini(), ExtractionConfig(layer=0, image_tokens="none"), tmp_path / "store")
    recovered = direction_recovery(store, source, EvaluationConfig(min_positives=(20, 8)))
    assert set(recovered.way) == {"coordinate", "means", "probe"} and recovered.groupby("way").concept.nunique().nunique() == 1
    name = "left"
    (rows, marks), (rows_test, marks_test) = (concept_tokens(store, source, store.where(s)) for s in ("train", "test"))
    j = [c.name for c in concepts_of("word")].index(name)
    x, y, mark = store.read(rows).numpy(), store.read(rows_test).numpy(), marks[:, [j]].toarray()
    expected = roc_auc_score(marks_test[:, [j]].toarray().ravel(), (y @ mean_directions(x, mark)).ravel())
    assert recovered[(recovered.concept == name) & (recovered.way == "means")].auroc_test.item() == pytest.approx(expected, abs=1e-4)
