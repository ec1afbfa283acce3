"""Sparse probing and its kin on made-up activations whose right answer is known, and against the evaluation on a real store."""
import os
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from saerad.activations.extraction import ExtractionConfig, extract
from saerad.analysis import sparse_probing as sp
from saerad.core import UserError
from saerad.interpretation.groups import feature_groups, neighbour_groups, outermost
from saerad.sae.encoder import encode_rows
from saerad.sae.evaluation import EvaluationConfig, concept_recovery, fvu
from saerad.sae.model import MatryoshkaSAE, SAEConfig
from saerad.sae.training import TrainingConfig, train_sae
from saerad.studies.record import StudiesConfig
from saerad.studies.sources import open_source
from saerad.subjects.subject import random_mini


def asked(marks, patients=20, names=None):
    """Items that are tokens, each with its marks; patients take turns."""
    n = len(marks)
    names = names or tuple(f"concept {j}" for j in range(marks.shape[1]))
    return sp.Asked(tuple(names), np.arange(n), np.arange(n), marks.astype(float), np.arange(n) % patients)


def plain_sae(rows, threshold=0.0):
    """An SAE with these decoder rows, tied, and no bias."""
    rows = torch.nn.functional.normalize(torch.as_tensor(rows, dtype=torch.float32), dim=1)
    sae = MatryoshkaSAE(rows.shape[1], (len(rows),), k=2, drawn=False)
    sae.W_dec.data, sae.W_enc.data = rows, rows.T.contiguous()
    sae.threshold.fill_(threshold)
    return sae.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def spread():
    """A concept that is there when any of three features is on, and noise."""
    draw = np.random.default_rng(0)
    def split(n):
        on = draw.random((n, 8)) < 0.1
        return sparse.csr_matrix(on * draw.uniform(0.5, 1.5, on.shape)), asked(np.stack([on[:, :3].any(1), on[:, 4]], 1))
    return (*split(4000), *split(1500))


@pytest.mark.parametrize("by", ["forward", "means", "l1"])
def test_a_concept_spread_over_three_features_needs_three(spread, by):
    z, train, z_test, test = spread
    probed = sp.sparse_probing(z, train, z_test, test, sizes=(1, 2, 3), by=by, draws=10)
    wide = probed.concepts.pivot(index="concept", columns="features", values="auroc")
    assert (wide.loc["concept 0"].diff().dropna() > 0.05).all() and wide.loc["concept 0", 3] > 0.999 and wide.loc["concept 1", 1] > 0.999
    assert set(probed.concepts.query("concept == 'concept 0' and features == 3").chosen.item()) == {0, 1, 2}
    assert probed.curve.told.tolist() == [0.5, 0.5, 1.0] and (probed.curve.accuracy.diff().dropna() > 0).all()


def test_numbers_are_scikit_learns(spread):
    z, train, z_test, test = spread
    probed = sp.sparse_probing(z, train, z_test, test, sizes=(2,), draws=5).concepts.iloc[0]
    mark, x, x_test = train.marks[:, 0], z[:, probed.chosen].toarray(), z_test[:, probed.chosen].toarray()
    balance = np.where(mark > 0, 1, mark.sum() / (mark == 0).sum())
    theirs = LogisticRegression(tol=1e-9, max_iter=1000).fit(x / x.std(0), mark, balance)
    assert probed.auroc == pytest.approx(roc_auc_score(test.marks[:, 0], theirs.decision_function(x_test / x.std(0))), abs=1e-4)
    assert probed.accuracy == pytest.approx(balanced_accuracy_score(test.marks[:, 0], theirs.predict(x_test / x.std(0))), abs=1e-6)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31), st.integers(1, 3), st.floats(0.05, 0.9))
def test_silent_rows_as_two_rows_change_nothing(seed, k, silent):
    draw = np.random.default_rng(seed)
    x = draw.random((60, k)) * (draw.random((60, 1)) > silent)
    mark = (np.arange(60) % 3 == 0).astype(float)
    w, b = sp.fit_probe(sparse.csr_matrix(x), mark)
    scale = np.where(x.std(0) > 0, x.std(0), 1)
    theirs = LogisticRegression(tol=1e-10, max_iter=2000).fit(x / scale, mark, np.where(mark > 0, 1.0, 0.5))
    assert np.allclose(w * scale, theirs.coef_[0], atol=1e-3) and b == pytest.approx(theirs.intercept_[0], abs=1e-3)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31))
def test_means_and_aurocs_of_sparse_and_dense_agree(seed):
    draw = np.random.default_rng(seed)
    x, marks = draw.random((40, 5)) * (draw.random((40, 5)) < 0.5), (draw.random((40, 2)) < 0.4).astype(float)
    marks[:2] = [[1, 1], [0, 0]]
    expected = np.array([[abs(x[m > 0, f].mean() - x[m == 0, f].mean()) for f in range(5)] for m in marks.T])
    assert np.allclose(sp.by_means(x, marks), expected) and np.allclose(sp.by_means(sparse.csr_matrix(x), marks), expected)
    signed, either = sp.by_auroc(sparse.csr_matrix(x), marks), sp.by_auroc(x, marks)
    assert np.allclose(np.abs(signed - 0.5), either - 0.5)


def test_l1_leaves_out_what_says_the_same_twice():
    draw = np.random.default_rng(1)
    first, second = (draw.random((2, 2000)) < 0.2).astype(float)
    z = np.stack([first, first + 0.01 * draw.random(2000), 0.6 * second], 1)
    for columns in (z, sparse.csc_matrix(z)):
        order = sp.l1_order(columns, np.maximum(first, second), np.arange(3), 2)
        assert len(order) == 2 and 2 in order


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(2, 6), st.booleans())
def test_forward_takes_the_column_that_lowers_the_error_most(seed, columns, twin):
    """Against least squares of every next column, with items of both kinds weighing half."""
    draw = np.random.default_rng(seed)
    z = draw.random((80, columns)) * (draw.random((80, columns)) < 0.4)
    if twin: z[:, 1] = z[:, 0]
    mark = (z.sum(1) + draw.normal(size=80) > np.median(z.sum(1))).astype(float)
    weight = np.sqrt(np.where(mark > 0, 0.5 / mark.sum(), 0.5 / (mark == 0).sum()))
    def error(some):
        x = np.column_stack([np.ones(80), z[:, some]]) * weight[:, None]
        return float(((x @ np.linalg.lstsq(x, mark * weight, rcond=1e-9)[0] - mark * weight) ** 2).sum())
    for values in (z, sparse.csr_matrix(z)):
        [order] = sp.choose_features(values, mark[:, None], columns)
        assert len(order) == len(set(order)) <= columns - twin
        for i, chosen in enumerate(order):
            assert error([*order[:i], chosen]) == pytest.approx(min(error([*order[:i], f]) for f in range(columns)), abs=1e-9)


def test_forward_has_no_twins_and_says_something_of_a_concept_without_items():
    draw = np.random.default_rng(1)
    first, second = (draw.random((2, 2000)) < 0.2).astype(float)
    z, told = np.stack([first, first, 0.6 * second], 1), np.maximum(first, second)
    assert [set(c) for c in sp.choose_features(z, np.stack([told, np.zeros(2000)], 1), 3)] in ([{0, 2}, {0}], [{1, 2}, {0}])


def test_the_size_of_a_column_does_not_matter(spread):
    z, train, z_test, test = spread
    small = sparse.diags(np.r_[1e-3, np.ones(z.shape[1] - 1)])
    a, b = (sp.sparse_probing(z @ by, train, z_test @ by, test, (3,), draws=2).concepts.auroc for by in (sparse.eye(z.shape[1]), small))
    assert np.allclose(a, b, atol=1e-6)


def test_nothing_of_test_patients_chooses(spread):
    z, train, z_test, test = spread
    other = sp.Asked(test.names, test.rows, test.item, test.marks[::-1].copy(), test.patient)
    a, b = (sp.sparse_probing(z, train, z_test, of, sizes=(1, 3), draws=2).concepts for of in (test, other))
    assert a.chosen.tolist() == b.chosen.tolist() and not np.allclose(a.auroc, b.auroc)


def test_intervals_are_over_patients(spread):
    """With one patient there is nothing to draw; more patients, a wider interval than none."""
    z, train, z_test, test = spread
    alone = sp.Asked(test.names, test.rows, test.item, test.marks, np.zeros(len(test.marks)))
    same = sp.sparse_probing(z, train, z_test, alone, sizes=(2,), draws=20).curve.iloc[0]
    many = sp.sparse_probing(z, train, z_test, test, sizes=(2,), draws=20).curve.iloc[0]
    assert same.auroc_low == pytest.approx(same.auroc) == pytest.approx(same.auroc_high) and many.auroc_low < many.auroc < many.auroc_high


def test_pooling():
    values = np.array([[1.0, 0.0], [3.0, 2.0], [5.0, 7.0]])
    of = sp.Asked(("any",), np.arange(3), np.array([0, 0, 1]), np.zeros((2, 1)), np.array(["a", "b"]))
    for how, expected in (("max", [[3, 2], [5, 7]]), ("mean", [[2, 1], [5, 7]])):
        assert np.allclose(sp.pooled(values, of, how), expected)
        assert np.allclose(sp.pooled(sparse.csr_matrix(values), of, how).toarray(), expected)


def test_balanced_accuracy_is_scikit_learns():
    draw = np.random.default_rng(2)
    says, marks = draw.random((2, 50, 3)) < 0.4
    assert sp.balanced_accuracy(says, marks) == pytest.approx([balanced_accuracy_score(m, s) for s, m in zip(says.T, marks.T, strict=True)])
    assert np.isnan(sp.balanced_accuracy(np.ones(3), np.ones(3)))


# taking features away

@pytest.fixture(scope="module")
def carried():
    """Three facts, each along one axis and told by the feature of that axis; the fourth feature is noise."""
    draw, sae = np.random.default_rng(3), plain_sae(np.eye(4))
    def split(n):
        on = draw.random((n, 4)) < 0.4
        x = on * draw.uniform(1, 2, on.shape)
        return x, sparse.csr_matrix(sae.encode(torch.as_tensor(x, dtype=torch.float32)).numpy()), asked(on[:, :3], names=("a", "b", "c"))
    return sae, split(600), split(400)


def test_perturbation_hurts_the_probe_it_aims_at(carried):
    sae, (x, z, train), (x_test, z_test, test) = carried
    table = sp.targeted_perturbation(sae, x, z, train, x_test, z_test, test, sizes=(1,))
    assert (table.intended > 0.45).all() and (table.unintended.abs() < 0.02).all()
    assert np.allclose(table.score, table.intended - table.unintended)


def test_perturbation_of_directions_that_are_shared_hurts_all(carried):
    _, (x, _, train), (x_test, _, test) = carried
    mixed = plain_sae([[1, 1, 1, 0], [0, 0, 0, 1]])
    z, z_test = (sparse.csr_matrix(mixed.encode(torch.as_tensor(v, dtype=torch.float32)).numpy()) for v in (x, x_test))
    table = sp.targeted_perturbation(mixed, x, z, train, x_test, z_test, test, sizes=(1,))
    assert (table.unintended > 0.1).all() and (table.score < 0.2).all()


def test_ablation_is_that_of_the_vectors(carried):
    sae, (x, z, train), _ = carried
    sae.scale.fill_(2.0)
    try:
        z = sparse.csr_matrix(sae.encode(torch.as_tensor(x, dtype=torch.float32)).numpy())
        w, b = sp.linear_probes(x, train.marks)
        gone = z.toarray()
        gone[:, [1, 3]] = 0
        error = x - sae.decode(torch.from_numpy(z.toarray())).numpy()                         # stays as it is
        longhand = sae.decode(torch.from_numpy(gone)).numpy() + error
        assert np.allclose(sp.without_features(sae, x @ w + b, z, w, [1, 3]), longhand @ w + b, atol=1e-4)
    finally: sae.scale.fill_(1.0)


def test_spurious_removal_mends_a_biased_probe(carried):
    sae, (x, z, train), (x_test, z_test, test) = carried
    draw, louder = np.random.default_rng(6), np.array([1.0, 3.0, 1.0, 3.0])            # the second fact, whose absence has a feature of its own
    def both(v, of):
        v = v.copy()
        v[:, 3] = (1 - of.marks[:, 1]) * draw.uniform(1, 2, len(v))
        return v * louder, sparse.csr_matrix(v * louder)
    table = sp.spurious_removal(sae, *both(x, train), train, *both(x_test, test), test, ("a", "b"), sizes=(1, 2))
    row = table[(table["keep"] == "a") & (table.features == 2)].iloc[0]
    assert row.counts and row.biased < 0.8 and row.clean > 0.95 and row.score > 0.8 and row.ranked > 0.8
    assert table.groupby("keep").counts.nunique().tolist() == [1, 1] and table.counts.sum() == 2


def test_a_fact_whose_absence_has_no_feature_is_mended_in_rank_only(carried):
    sae, (x, z, train), (x_test, z_test, test) = carried
    louder, axes = np.array([1.0, 3.0, 1.0, 1.0]), sparse.diags([1.0, 3.0, 1.0, 1.0])
    table = sp.spurious_removal(sae, x * louder, z @ axes, train, x_test * louder, z_test @ axes, test, ("a", "b"), sizes=(1,))
    row = table[table["keep"] == "a"].iloc[0]
    assert row.score < 0.2 and row.ranked > 0.8


def test_too_few_of_a_combination_is_said(carried):
    sae, (x, z, train), (x_test, z_test, test) = carried
    never = sp.Asked(("a", "b"), train.rows, train.item, np.stack([train.marks[:, 0], 1 - train.marks[:, 0]], 1), train.patient)
    with pytest.raises(UserError, match="has 0 items, and 8 are needed"):
        sp.spurious_removal(sae, x, z, never, x_test, z_test, test, ("a", "b"))


def test_absorption():
    """One word by its own feature, one by another's alone, one by both, one by nothing that points there."""
    sae = plain_sae([[1, 0, 0], [0.8, 0.6, 0], [0, 0, 1]])
    x = np.array([[1.0, 0, 0], [0.8, 0.6, 0], [1.8, 0.6, 0], [1.0, 0, 1.0], [0.0, 1.0, 0]])
    z = np.array([[1.0, 0, 0], [0, 1.0, 0], [1.0, 1.0, 0], [0, 0, 1.0], [0, 1.0, 0]])
    def of(items): return sp.absorption(sae, x[items], z[items], np.ones(len(items)), [0], np.array([2.0, 0, 0]), -1.0)
    assert of([0]) == {"items": 1, "full": 0.0, "fraction": 0.0}
    assert of([1]) == {"items": 1, "full": 1.0, "fraction": 1.0}
    assert of([2])["full"] == 0 and of([2])["fraction"] == pytest.approx(0.8 / 1.8)
    assert of([3]) == {"items": 1, "full": 0.0, "fraction": 0.0}
    assert of([0, 1])["full"] == 0.5 and of([4])["items"] == 0                        # the last one the probe does not call right


# groups

def test_groups_are_found_without_labels():
    """Two bundles of directions: each becomes a group, and as a group tells what none of its members does."""
    draw = np.random.default_rng(4)
    sae = plain_sae([[1, 0.1, 0, 0], [1, -0.1, 0, 0], [1, 0, 0.1, 0], [0, 0, 0.1, 1], [0, 0.1, 0, 1]])
    which = draw.integers(0, 5, 2000)
    z = sparse.csr_matrix(np.eye(5)[which] * draw.uniform(0.5, 1.5, (2000, 1)))
    train, test = (asked(np.isin(part, (0, 1, 2))[:, None]) for part in (which[:1000], which[1000:]))
    groups = feature_groups(sae, z[:1000], edge=0.5)
    assert {(0, 1, 2), (3, 4)} <= set(groups) and outermost(groups) == [(0, 1, 2), (3, 4)]
    for how in ("along", "sum", "max"):
        told = sp.told_by_groups(sae, groups, z[:1000], train, z[1000:], test, how, draws=5).concepts.iloc[0]
        assert told.auroc == 1 and tuple(told.chosen) == (0, 1, 2)
    assert sp.told_by_groups(sae, [(f,) for f in range(5)], z[:1000], train, z[1000:], test, draws=5).concepts.auroc[0] < 0.8


# on a real store

@pytest.fixture(scope="module")
def real(tmp_path_factory):
    source = open_source(StudiesConfig(source="phantom:0", train_patients=30, validation_patients=1, test_patients=15))
    store = extract(source, random_mini(), ExtractionConfig(layer=0, image_tokens="none"), tmp_path_factory.mktemp("store"))
    sae = train_sae(store, SAEConfig(k=16, expansion=2), TrainingConfig(steps=30, batch_size=256), 0, tmp_path_factory.mktemp("sae"))
    return source, store, sae


def test_the_curve_starts_at_the_evaluation(real):
    """Words and facts of the picture, concept by concept."""
    source, store, sae = real
    table = concept_recovery(store, sae, source, EvaluationConfig(min_positives=(20, 8))).to_pandas().dropna(subset="feature")
    seen = {s.study: s.truth.visual for s in source}
    names = [c.name for c in sp.concepts_of("visual")]
    for kind, pair in (("word", [sp.ask_tokens(store, source, s) for s in ("train", "test")]),
                       ("visual", [sp.ask_studies(store, seen, names, s) for s in ("train", "test")])):
        expected = table[table.kind == kind]
        if expected.empty: continue
        train, test = sp.with_enough(*pair)
        z, z_test = (sp.pooled(encode_rows(sae, store, of.rows), of, "max") for of in (train, test))
        probed = sp.sparse_probing(z, train, z_test, test, sizes=(1,), draws=2)
        assert probed.concepts.concept.tolist() == expected.concept.tolist()
        assert np.allclose(probed.concepts.auroc, expected.auroc_test)
        assert [c[0] for c in probed.concepts.chosen] == expected.feature.astype(int).tolist()
        assert probed.curve.told[0] == pytest.approx(expected.tracked.mean())


def test_groups_by_surroundings(real):
    source, store, sae = real
    rows = sp.ask_tokens(store, source, "train").rows
    z = encode_rows(sae, store, rows)
    groups, often = neighbour_groups(store, z, rows, largest=12, least=15), z.tocsc().getnnz(0)
    alone, merged = [g for g in groups if len(g) == 1], [g for g in groups if len(g) > 1]
    assert [f for f, in alone] == np.flatnonzero(often).tolist() and len(set(groups)) == len(groups)
    assert merged and max(map(len, merged)) <= 12 and often[np.concatenate(merged)].min() >= 15
    assert all(set(a) <= set(b) or not set(a) & set(b) for a in merged for b in merged if len(a) <= len(b))       # nested
    shuffled = neighbour_groups(store, z[:, ::-1], rows, largest=12, least=15)                                    # by what features do, not by number
    assert {tuple(sorted(sae.width - 1 - f for f in g)) for g in shuffled} == set(groups)


def test_equal_l0_and_the_readers(real):
    source, store, sae = real
    rows = store.where("train")
    for of in (sp.at_l0(sae, store, 10), sp.random_sae(sae, store, 10)):
        assert encode_rows(of, store, rows).getnnz(1).mean() == pytest.approx(10, rel=0.1)
    assert float(sp.at_l0(sae, store, 10).threshold) != float(sae.threshold)
    train, test = sp.with_enough(sp.ask_tokens(store, source, "train"), sp.ask_tokens(store, source, "test"))
    train, test = train.only(range(4)), test.only(range(4))
    curves = sp.compare_readers(sp.readers(store, sae), store, train, test, sizes=(1, 5), draws=5)
    assert curves.groupby("reader").size().to_dict() == {"SAE": 2, "random SAE": 2, "PCA": 2, "coordinates": 2, "dense probe": 1}
    assert (curves.told_low <= curves.told_high).all() and curves.auroc.between(0.4, 1).all()


def test_saes_side_by_side_at_equal_l0(real):
    source, store, sae = real
    train, test = sp.with_enough(sp.ask_tokens(store, source, "train"), sp.ask_tokens(store, source, "test"))
    train, test = train.only(range(3)), test.only(range(3))
    table = sp.compare_saes({"a": sae, "b": sp.random_sae(sae, store, 30)}, store, train, test, sizes=(1, 2), l0=8, draws=5).set_index("name")
    assert table.l0.to_list() == pytest.approx([8, 8], rel=0.35)
    moved = sp.at_l0(sae, store, 8)
    x = store.read(test.rows)
    assert table.fvu["a"] == pytest.approx(fvu(x, moved(x)), rel=1e-3)
    as_runs = {name: SimpleNamespace(store=store, source=source, sae=sae) for name in ("a", "c")}
    again = sp.probing_table(as_runs, l0=8, least=(200, 60), sizes=(1,), draws=2)
    assert again.name.tolist() == ["a", "c"] and again.fvu[0] == again.fvu[1] and again.told_1.between(0, 1).all()
    assert (table.told_group >= 0).all() and table[["perturbation", "absorbed"]].notna().all().all()


def test_a_kind_without_one_threshold_is_refused(real):
    _, store, _ = real
    with pytest.raises(UserError, match="no single threshold"):
        sp.at_l0(MatryoshkaSAE(store.d, (32,), 4, kind="topk"), store, 4)


def test_questions_that_cannot_be_asked(real):
    source, store, _ = real
    with pytest.raises(UserError, match="no study of the split test has labels"): sp.ask_studies(store, {"elsewhere": {"x"}}, ["x"], "test")
    train, test = sp.ask_tokens(store, source, "train"), sp.ask_tokens(store, source, "test")
    with pytest.raises(UserError, match="no concept has 100000 items"): sp.with_enough(train, test, (100_000, 8))
    with pytest.raises(UserError, match="has no tags"): sp.tag_labels(source)


def test_studies_are_asked_by_all_their_tokens(real):
    source, store, _ = real
    labels = {s.study: {"odd"} if i % 2 else set() for i, s in enumerate(source.split("train"))}
    of = sp.ask_studies(store, labels, ["odd"], "train")
    study = np.asarray(store.tokens["study"].take(of.rows).to_pylist())
    assert len(of.marks) == len(set(study)) and all(len(set(study[of.item == i])) == 1 for i in range(len(of.marks)))
    assert all(of.marks[i, 0] == ("odd" in labels[study[of.item == i][0]]) for i in range(len(of.marks)))
    assert all(b - a in (0, 1) for a, b in pairwise(of.item))


def test_tags_of_an_invented_report(tmp_path):
    text = "<AbstractText Label='FINDINGS'>The heart is mildly enlarged.</AbstractText>"
    for i, tags in enumerate((["Cardiomegaly/mild", "Pleural Effusion/left/small"], ["normal"], ["No Indexing"])):
        majors = "".join(f"<major>{t}</major>" for t in tags)
        (tmp_path / f"{i}.xml").write_text(f"<eCitation><uId id='CXR{i}'/><MeSH>{majors}</MeSH>{text}</eCitation>", encoding="utf-8")
    labels = sp.tag_labels(open_source(f"openi:{tmp_path}"))
    assert labels == {"CXR0": {"Cardiomegaly", "Pleural Effusion"}, "CXR1": {"normal"}}


def test_tags_of_the_real_collection():
    path = Path(os.environ.get("SAERAD_DATA", Path(__file__).resolve().parents[3] / "shared" / "data")) / "openi" / "NLMCXR_reports.tgz"
    if not path.exists(): pytest.skip("OpenI's reports are not here")
    source = open_source(f"openi:{path}")
    labels = sp.tag_labels(source)
    assert len(labels) > 3000 and set(labels) <= {s.study for s in source}
    share = {tag: sum(tag in tags for tags in labels.values()) / len(labels) for tag in ("normal", "Cardiomegaly", "No Indexing")}
    assert 0.3 < share["normal"] < 0.4 and 0.05 < share["Cardiomegaly"] < 0.15 and share["No Indexing"] == 0


# items of many tokens: pooling, strength, words

def several(items, tokens, concept, draw):
    """Studies of `tokens` tokens whose concept is loud at one token, or makes a feature come on more often and no louder."""
    mark = (draw.random(items) < 0.4).astype(float)
    item = np.repeat(np.arange(items), tokens)
    often = 0.5 if concept == "anywhere" else 0.4 + 0.2 * mark[item, None]
    z = draw.uniform(0.9, 1.0, (items * tokens, 2)) * (draw.random((items * tokens, 2)) < often)
    if concept == "anywhere": z[np.arange(items) * tokens + draw.integers(0, tokens, items), 0] += mark
    return sparse.csr_matrix(z), sp.Asked(("it",), np.arange(len(item)), item, mark[:, None], np.arange(items))


@pytest.mark.parametrize("concept,expected", [("anywhere", "max"), ("everywhere", "mean")])
def test_pooling_is_chosen_by_what_the_concept_is(concept, expected):
    draw = np.random.default_rng(7)
    (z, train), (z_held, held) = (several(n, 30, concept, draw) for n in (200, 150))
    assert sp.choose_pooling(z, train, z_held, held, sizes=(1,)) == expected


def test_some_of_the_items():
    _, of = several(6, 3, "anywhere", np.random.default_rng(8))
    some = of.of_items(np.array([1, 4]))
    assert some.rows.tolist() == [3, 4, 5, 12, 13, 14] and some.item.tolist() == [0, 0, 0, 1, 1, 1]
    assert np.array_equal(some.marks, of.marks[[1, 4]]) and some.patient.tolist() == [1, 4]
    assert np.array_equal(sp.pooled(np.arange(18.0)[some.rows][:, None], some, "max"), [[5], [14]])


def test_strength_of_the_dense_probe_is_chosen_in_validation():
    """Many columns, few items, one of them with the signal: a strong penalty does better, and only validation items say so."""
    draw = np.random.default_rng(9)
    def split(n):
        x = draw.normal(size=(n, 80))
        return x, asked((x[:, :1] + draw.normal(size=(n, 1)) > 0), patients=n, names=("it",))
    parts = [split(n) for n in (90, 400, 400)]
    flat = [p for pair in parts for p in pair]
    alone = {c: sp.logistic_probing(*flat, strengths=(c,), draws=2).concepts.auroc[0] for c in (1e-3, 100.0)}
    chosen = sp.logistic_probing(*flat, strengths=(1e-3, 100.0), draws=20)
    assert alone[1e-3] > alone[100.0] + 0.02 and chosen.concepts.auroc[0] == pytest.approx(alone[1e-3])
    backwards = [*flat[:3], sp.Asked(("it",), flat[3].rows, flat[3].item, 1 - flat[3].marks, flat[3].patient), *flat[4:]]
    assert sp.logistic_probing(*backwards, strengths=(1e-3, 100.0), draws=2).concepts.auroc[0] == pytest.approx(alone[100.0])
    assert chosen.curve.auroc_low[0] < chosen.curve.auroc[0] < chosen.curve.auroc_high[0] and chosen.concepts.features[0] == 80


def test_readers_with_validation_patients(real):
    source, store, sae = real
    seen = {s.study: {"prior" if s.prior else "none"} for s in source}
    train, test = (sp.ask_studies(store, seen, ["prior"], split) for split in ("train", "test"))
    fitted, held = (train.of_items(np.arange(first, len(train.marks), 2)) for first in (0, 1))
    reading = {"SAE": sp.readers(store, sae)["SAE"]}
    found = sp.probe_readers(reading, store, fitted, test, held, sizes=(1, 2), draws=5)
    z, z_held, z_test = (encode_rows(sae, store, of.rows) for of in (fitted, held, test))
    how = sp.choose_pooling(z, fitted, z_held, held, sizes=(1, 2))
    alone = sp.sparse_probing(sp.pooled(z, fitted, how), fitted, sp.pooled(z_test, test, how), test, sizes=(1, 2), draws=5)
    assert found["SAE"].pooled == how and found["SAE"].concepts.equals(alone.concepts)
    assert found["dense probe"].pooled in ("max", "mean") and found["dense probe"].concepts.features.tolist() == [store.d]
    table = sp.compare_readers(reading, store, fitted, test, sizes=(1, 2), draws=5, validation=held)
    assert table[table.reader == "SAE"].auroc.tolist() == found["SAE"].curve.auroc.tolist()


def test_words_of_a_study_are_counted_and_chosen_on_the_first(real):
    source, store, _ = real
    seen = {s.study: {"effusion"} & {w.strip(".,").lower() for w in s.sections["findings"].split()} for s in source}
    train, test = (sp.ask_studies(store, seen, ["effusion"], split) for split in ("train", "test"))
    (counts, counts_test), words = sp.word_counts(store, source, train, test)
    at = words.index("effusion")
    assert np.array_equal(np.asarray(counts[:, [at]].todense()).ravel() > 0, train.marks[:, 0] > 0) or counts[:, [at]].sum() >= train.marks.sum()
    first = source[store.tokens["study"].take(test.rows[:1]).to_pylist()[0]]
    said = " ".join(first.sections.values()).lower().split()
    assert counts_test[0, words.index("the")] == sum(w.strip(".,;:") == "the" for w in said)
    assert counts.getnnz(0).min() >= 3 and counts_test.shape == (len(test.marks), len(words))


# intervals of what taking away does

def test_accuracy_under_draws_is_the_accuracy_of_the_drawn(carried):
    draw = np.random.default_rng(10)
    marks, says, patient = draw.random((60, 2)) < 0.4, draw.random((60, 2)) < 0.5, draw.integers(0, 12, 60)
    who, weights = sp._patient_draws(patient, 5, 0)
    longhand = []
    for row in weights:
        again = np.repeat(np.arange(60), row[who].astype(int))
        longhand.append([balanced_accuracy_score(marks[again, j], says[again, j]) for j in range(2)])
    assert np.allclose(sp.drawn_accuracy(says, marks, who, weights), longhand)


def test_perturbation_has_an_interval_over_patients(carried):
    sae, (x, z, train), (x_test, z_test, test) = carried
    x_test = x_test + np.random.default_rng(11).normal(0, 0.6, x_test.shape)               # so that no probe is always right
    table = sp.targeted_perturbation(sae, x, z, train, x_test, z_test, test, sizes=(1,), draws=60)
    mean = sp.mean_scores(table).iloc[0]
    assert mean.low < mean.score < mean.high and mean.high - mean.low < 0.2 and mean.score == pytest.approx(table.score.mean()) and mean["rows"] == 3
    one = sp.Asked(test.names, test.rows, test.item, test.marks, np.zeros(len(test.marks)))
    same = sp.mean_scores(sp.targeted_perturbation(sae, x, z, train, x_test, z_test, one, sizes=(1,), draws=5)).iloc[0]
    assert same.low == pytest.approx(same.score) == pytest.approx(same.high)


def test_spurious_removal_has_an_interval_over_patients(carried):
    sae, (x, z, train), (x_test, z_test, test) = carried
    louder, axes = np.array([1.0, 3.0, 1.0, 1.0]), sparse.diags([1.0, 3.0, 1.0, 1.0])
    noisy = (x_test + np.random.default_rng(12).normal(0, 0.6, x_test.shape)) * louder
    table = sp.spurious_removal(sae, x * louder, z @ axes, train, noisy, z_test @ axes, test, ("a", "b"), sizes=(1,), draws=60)
    of = table[table["keep"] == "a"]
    ranked = sp.mean_scores(of, "ranked", "ranked_drawn").iloc[0]
    assert ranked.low < ranked.ranked < ranked.high and ranked.low > 0
    assert sp.mean_scores(of).iloc[0].low <= of.score.item() <= sp.mean_scores(of).iloc[0].high
