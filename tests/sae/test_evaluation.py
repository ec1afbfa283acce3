"""Evaluation: variance, splicing into a real model, rankings against a plain reference, and concepts on a real phantom."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import sparse
from sklearn.metrics import roc_auc_score

from saerad.activations.extraction import ExtractionConfig, extract, kept_tokens
from saerad.core import UserError, read_table
from saerad.sae.evaluation import (
    EvaluationConfig,
    _whole_studies,
    aurocs,
    centred_ranks,
    concept_recovery,
    concept_tokens,
    concepts_of,
    count_absorbed,
    dead_share,
    decoder_agreement,
    decoder_cosine,
    density_histogram,
    evaluate,
    evenly_spaced,
    finding_f1,
    fvu,
    loss_recovered,
    read_batch,
    reconstruction,
    report_finding_f1,
    report_targets,
    shuffled_weights,
    spliced_losses,
    spliced_positions,
    study_maxima,
    union_of,
    with_other_views,
)
from saerad.sae.model import MatryoshkaSAE, SAEConfig
from saerad.studies.grammar import CONCEPTS
from saerad.studies.record import StudiesConfig
from saerad.studies.sources import open_source
from saerad.subjects.subject import random_mini

LAYER = 4


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small phantom, a random subject model, its store and an SAE that rebuilds exactly: features are ± the dimensions."""
    source = open_source(StudiesConfig(source="phantom:3", train_patients=14, validation_patients=1, test_patients=8))
    subject = random_mini(0)
    store = extract(source, subject, ExtractionConfig(layer=LAYER), tmp_path_factory.mktemp("run") / "activations")
    sae = MatryoshkaSAE(256, (128, 128, 256), k=256)
    sae.W_dec.data = torch.cat([torch.eye(256), -torch.eye(256)])
    sae.W_enc.data = sae.W_dec.data.T.contiguous()
    sae.threshold.fill_(0.0)
    sae.scale.fill_(2.0)
    return SimpleNamespace(source=source, subject=subject, store=store, sae=sae)


# --- reconstruction

def test_fvu_of_known_errors():
    x = torch.randn(500, 6, generator=torch.Generator().manual_seed(0)) + 100
    assert fvu(x, x) == 0 and fvu(x, x.mean(0).expand_as(x)) == pytest.approx(1)
    assert fvu(x, 2 * x.mean(0) - x) == pytest.approx(4, rel=1e-4)
    assert np.isnan(fvu(x[:1], x[:1]))


def test_spread_keeps_first_and_last_and_order():
    rows = np.arange(1000) * 3
    assert np.array_equal(evenly_spaced(rows, 5000), rows)
    some = evenly_spaced(rows, 10)
    assert len(some) == 10 and some[0] == 0 and some[-1] == rows[-1] and (np.diff(some) > 0).all()


def test_reconstruction_of_an_exact_sae(world):
    rows = world.store.where("test")
    found = reconstruction(world.store, world.sae, rows)
    assert found["fvu"] == pytest.approx(0, abs=1e-6) and found["rows"] == len(rows)
    assert found["l0"] == pytest.approx(256, abs=1)
    assert list(found["fvu_by_prefix"]) == ["128", "256", "512"]
    levels = list(found["fvu_by_prefix"].values())
    assert levels[0] > levels[1] > levels[2]
    assert set(found["fvu_by_section"]) == set(world.store.tokens["section"].to_numpy()[rows])


def test_silent_is_of_the_rows_and_dead_of_the_whole_store(world):
    rows = world.store.where("test")
    def never_on(rows): return ~(world.sae.encode(world.store.read(rows)) > 0).any(0)
    assert reconstruction(world.store, world.sae, rows)["silent"] == pytest.approx(float(never_on(rows).float().mean()))
    world.sae.b_enc.data[:64] = -1e6
    try:
        dead = never_on(np.arange(len(world.store)))
        assert dead[:64].all() and not dead.all()
        assert dead_share(world.store, world.sae, batch=1000) == pytest.approx(float(dead.float().mean()))
        assert dead_share(world.store, world.sae) <= reconstruction(world.store, world.sae, rows)["silent"]
    finally: world.sae.b_enc.data.zero_()


def test_an_sae_of_another_width_is_refused(world):
    with pytest.raises(UserError, match="width 8.*width 256"):
        reconstruction(world.store, MatryoshkaSAE(8, (8,), 1), world.store.where("test"))


# --- splicing

def prompts_of(world, n):
    return [world.subject.prompt(s, s.sections["findings"]) for s in world.source.split("test")[:n]]


def test_predicted_tokens_are_the_findings_and_their_end(world):
    prompts = prompts_of(world, 3)
    study, position = report_targets(prompts)
    for i, prompt in enumerate(prompts):
        at = position[study == i].numpy()
        assert set(prompt.section[at[:-1]]) == {"findings"} and at[-1] == len(prompt) - 1
        assert len(at) == (prompt.section == "findings").sum() + 1


def test_loss_is_that_of_a_bare_pass(world):
    prompts = prompts_of(world, 2)
    batch = world.subject.collate(prompts)
    with torch.no_grad(): logits = world.subject.model(**batch).logits
    study, position = report_targets(prompts)
    plain = torch.nn.functional.cross_entropy(logits[study, position - 1], batch["input_ids"][study, position], reduction="sum")
    assert read_batch(world.subject, prompts, LAYER).loss == pytest.approx(float(plain), rel=1e-5)


def test_splicing_changes_the_chosen_positions_and_nothing_before_them(world):
    prompts = prompts_of(world, 1)
    clean = read_batch(world.subject, prompts, LAYER)
    stream, last = clean.stream.clone(), len(prompts[0]) - 6
    stream[0, last:] = 0
    changed = read_batch(world.subject, prompts, LAYER, stream)
    same = torch.isclose(clean.logp, changed.logp, atol=1e-4).all(1)
    assert same[:-6].all() and not same[-3:].any()
    again = read_batch(world.subject, prompts, LAYER, clean.stream)
    assert torch.allclose(again.logp, clean.logp, atol=1e-4)


def test_positions_are_the_stored_ones_or_all(world):
    prompts, cfg = prompts_of(world, 3), ExtractionConfig(layer=LAYER)
    width = max(map(len, prompts))
    kept, every = (spliced_positions(prompts, cfg, how, width) for how in ("kept", "all"))
    for i, prompt in enumerate(prompts):
        assert np.array_equal(np.flatnonzero(kept[i]), np.flatnonzero(kept_tokens(prompt, cfg)))
        assert every[i].sum() == len(prompt)
    rows = world.store.study_rows()[world.source.split("test")[0].study]
    assert kept[0].sum() == len(rows)


def test_an_exact_sae_recovers_everything_and_a_useless_one_nothing(world):
    prompts, cfg = prompts_of(world, 3), ExtractionConfig(layer=LAYER)
    mean = torch.zeros(256)
    exact = spliced_losses(world.subject, world.sae, prompts, mean, cfg, "kept")
    assert exact["spliced"] == pytest.approx(exact["clean"], rel=1e-5) and exact["kl"] == pytest.approx(0, abs=1e-3)
    assert exact["mean"] == pytest.approx(exact["zero"], rel=1e-6)
    silent = MatryoshkaSAE(256, (256,), 1)
    silent.threshold.fill_(1e9)
    nothing = spliced_losses(world.subject, silent, prompts, mean, cfg, "kept")
    assert nothing["spliced"] == pytest.approx(nothing["zero"], rel=1e-6)


@pytest.mark.parametrize("splice", ["kept", "all"])
def test_loss_recovered_is_the_share_of_the_way(world, splice):
    found = loss_recovered(world.store, world.sae, world.subject, world.source.split("test")[:4], EvaluationConfig(splice=splice, batch_size=3))
    way = (found["loss_zero"] - found["loss_spliced"]) / (found["loss_zero"] - found["loss_clean"])
    assert found["loss_recovered"] == pytest.approx(way) and found["perplexity"] == pytest.approx(np.exp(found["loss_clean"]))
    assert found["loss_spliced"] == pytest.approx(found["loss_clean"], abs=1e-4) and found["splice"] == splice


# --- rankings

def ties(n, features, seed):
    draw = np.random.default_rng(seed)
    values = draw.integers(0, 4, size=(n, features)) * (draw.random((n, features)) < 0.4)      # many zeros and many ties
    values[:, 0], values[:, 1] = 0, draw.random(n) + 0.1                                           # never on; always on
    return values.astype(float)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_aurocs_equal_the_plain_ones(seed):
    z = ties(200, 12, seed)
    marks = (np.random.default_rng(seed + 9).random((200, 5)) < 0.2).astype(float)
    found = aurocs(sparse.csr_matrix(z), sparse.csr_matrix(marks))
    expected = [[roc_auc_score(marks[:, c], z[:, f]) for f in range(12)] for c in range(5)]
    assert np.allclose(found, expected, atol=1e-12)


def test_aurocs_where_there_is_nothing_to_tell():
    found = aurocs(sparse.csr_matrix(ties(20, 3, 0)), sparse.csr_matrix(np.c_[np.zeros(20), np.ones(20)]))
    assert np.isnan(found).all()
    assert centred_ranks(sparse.csr_matrix((5, 3))).nnz == 0


def test_study_maxima():
    z = sparse.csr_matrix(np.array([[1., 0], [3, 0], [0, 2], [0, 5]]))
    names, top = study_maxima(z, ["b", "b", "a", "a"])
    assert names == ["b", "a"] and np.array_equal(top.toarray(), [[3, 0], [0, 5]])


# --- concepts

def test_concept_tokens_are_the_tokens_that_overlap_its_words(world):
    rows = world.store.where("test")
    text, marks = concept_tokens(world.store, world.source, rows)
    table = world.store.tokens.take(text).to_pylist()
    assert {t["section"] for t in table} <= {"indication", "technique", "comparison", "findings"}
    names, marked = [c.name for c in concepts_of("word")], marks.toarray()
    for i in range(0, len(table), 37):
        t = table[i]
        words = world.source[t["study"]].truth.words[t["section"]]
        expected = {name for w in words for name in w.concepts if max(w.start, t["start"]) < min(w.end, t["end"])}
        assert {names[j] for j in np.flatnonzero(marked[i])} == expected
    left = marked[:, names.index("left")] > 0
    whole = [world.source[t["study"]].sections[t["section"]] for t in table]
    assert left.any()
    for t, s, is_left in zip(table, whole, left, strict=True):
        around = s[max(0, t["start"] - 4):t["end"] + 4].lower()
        if is_left: assert "l" in around or "eft" in around


class Marked:
    """An SAE stand-in that cheats: feature j fires where word concept j is, and feature 0 nowhere else."""
    def __init__(self, store, source, features):
        text, marks = concept_tokens(store, source, np.arange(len(store)))
        self.z = sparse.lil_matrix((len(store), features), dtype=np.float32)
        self.z[text] = marks[:, :features]


def test_a_feature_that_fires_on_a_concepts_words_is_found(world, monkeypatch):
    cheat = Marked(world.store, world.source, 40)
    monkeypatch.setattr("saerad.sae.evaluation.encode_rows", lambda sae, store, rows: cheat.z.tocsr()[rows])
    table = concept_recovery(world.store, world.sae, world.source, EvaluationConfig(min_positives=(3, 2))).to_pylist()
    assert [r["concept"] for r in table] == [c.name for c in concepts_of("word")] + [c.name for c in concepts_of("visual")]
    assert len(table) == len(CONCEPTS)
    told = [(j, r) for j, r in enumerate(table[:40]) if r["feature"] is not None]
    assert len(told) > 10
    for j, row in told: assert row["feature"] == j and row["auroc_test"] == 1 and row["tracked"]
    for row in table:
        enough = row["positives_train"] >= 3 and row["positives_test"] >= 2
        assert (row["feature"] is not None) == enough and (enough or not row["tracked"])


def test_whole_studies_are_taken(world):
    rows = world.store.where("train")
    study = world.store.tokens["study"].to_numpy()
    few = _whole_studies(world.store, "train", len(rows) // 2)
    assert 0 < len(few) <= len(rows) // 2 and study[few[-1]] != study[few[-1] + 1]
    assert np.array_equal(_whole_studies(world.store, "train", len(rows)), rows)


# --- reports

def test_f1_by_kind():
    truth = [frozenset({"effusion", "nodule"}), frozenset({"effusion"}), frozenset()]
    said = [frozenset({"effusion"}), frozenset(), frozenset({"effusion", "picc"})]
    assert finding_f1(truth, said) == {"effusion": pytest.approx(0.5), "nodule": 0.0}


def test_another_picture_is_another_patients_and_text_stays(world):
    studies = world.source.split("test")
    for old, new in zip(studies, with_other_views(studies), strict=True):
        assert new.sections == old.sections and new.study == old.study and new.truth is old.truth
        owner = next(s for s in studies if s.views["frontal"] is new.views["frontal"])
        assert owner.patient != old.patient
    same_patient = [s for s in studies if s.patient == studies[0].patient]
    with pytest.raises(UserError, match="no other patient"): with_other_views(same_patient)


def test_a_model_that_writes_the_truth_scores_one(world):
    studies = world.source.split("test")
    by_length = {}
    class Honest:
        def prompt(self, study, report): return study
        def generate(self, prompts, max_new_tokens): return [by_length.setdefault(s.study, s.sections["findings"]) for s in prompts]
    assert report_finding_f1(Honest(), studies) == 1.0


# --- all of it

def test_evaluate_writes_what_a_summary_needs(world, tmp_path):
    cfg = EvaluationConfig(rows=500, loss_studies=2, report_studies=2, max_new_tokens=4, min_positives=(3, 2))
    found = evaluate(world.store, world.sae, world.subject, world.source, cfg, tmp_path)
    assert json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8")).keys() == found.keys()
    for key in ("fvu", "l0", "dead", "loss_recovered", "loss_clean", "loss_zero", "loss_spliced", "perplexity", "concepts", "concepts_recovered",
                "report_finding_f1"): assert np.isfinite(found[key]), key
    table = read_table(tmp_path / "concepts.parquet")
    assert found["concepts"] + found["concepts_too_few"] == len(table) == len(CONCEPTS)
    assert found["rows"] == 500 and found["loss_studies"] == 2


def test_no_test_patients_is_said_plainly(world, tmp_path):
    source = SimpleNamespace(spec="phantom:3", split=lambda name: [])
    with pytest.raises(UserError, match="no test patients"):
        evaluate(world.store, world.sae, world.subject, source, EvaluationConfig(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_settings_are_checked():
    assert SAEConfig().k == 32
    with pytest.raises(ValueError): EvaluationConfig(splice="some")
    with pytest.raises(ValueError): EvaluationConfig(rows=0)


# --- repeats, seeds, splitting and the control

def test_agreement_of_a_permuted_copy_is_whole_and_of_a_stranger_none():
    one, other = (MatryoshkaSAE(64, (32, 96), 4, seed=s) for s in (0, 1))
    permuted = MatryoshkaSAE(64, (32, 96), 4)
    permuted.W_dec.data = one.W_dec.data[torch.randperm(128, generator=torch.Generator().manual_seed(0))] * 3
    assert decoder_agreement(one, permuted) == {"matched": 1.0, "mean_best": pytest.approx(1.0, abs=1e-5)}
    assert decoder_agreement(one, other)["matched"] == 0 and decoder_agreement(one, other)["mean_best"] < 0.6
    half = MatryoshkaSAE(64, (32, 96), 4, seed=1)
    half.W_dec.data[:64] = one.W_dec.data[:64]
    assert decoder_agreement(one, half)["matched"] == 0.5


def test_decoder_cosine_sees_a_repeated_row():
    sae = MatryoshkaSAE(64, (8,), 1)
    alone = decoder_cosine(sae)
    sae.W_dec.data[5] = sae.W_dec.data[2]
    assert alone["above_07"] == 0 and decoder_cosine(sae)["above_07"] == 0.25


def test_density_counts_every_feature_once():
    assert density_histogram(np.array([0, 1e-6, 5e-3, 0.5, 1.0])) == {"<1e-5": 2, "<1e-4": 0, "<1e-3": 0, "<1e-2": 1, "<1e-1": 0, "<=1": 2}


def test_a_split_concept_needs_the_union():
    mark = np.array([1, 1, 1, 1, 0, 0, 0, 0.])
    z = sparse.csc_matrix(np.array([[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0], [0, 0, 0], [0, 0, 0.]]))
    assert union_of(z, mark, [0, 1, 2]) == ([0, 1], 1.0)
    whole = sparse.csc_matrix(mark[:, None])
    assert union_of(whole, mark, [0]) == ([0], 1.0)


def test_absorbed_is_where_one_other_feature_carries_the_direction():
    sae = MatryoshkaSAE(3, (4,), 1)
    sae.W_dec.data = torch.tensor([[1., 0, 0], [0.8, 0.6, 0], [0, 0, 1.], [0.5, 0, 0.8]])
    z = sparse.csr_matrix(np.array([[0, 2, 0, 0], [0, 0, 3, 0], [0, 1, 0, 1.6], [0, 0, 0, 0.]]))
    assert count_absorbed(sae, z, np.arange(4), [0], np.array([1., 0, 0])) == 2
    assert count_absorbed(sae, z, np.arange(4), [0], np.array([1., 0, 0]), share=0.9) == 1


def test_fvu_by_medium_and_view(world):
    rows = world.store.where("test")
    found = reconstruction(world.store, world.sae, rows)
    views = set(world.store.tokens["view"].to_numpy()[rows]) - {""}
    assert set(found["fvu_by_view"]) == views and set(found["fvu_by_medium"]) <= {"image", "text"}
    assert sum(found["density"].values()) == 512


def test_kl_of_the_floors_is_counted_too(world):
    readings = spliced_losses(world.subject, world.sae, prompts_of(world, 2), torch.zeros(256), ExtractionConfig(layer=LAYER), "kept")
    assert readings["kl_zero"] == pytest.approx(readings["kl_mean"]) and readings["kl_zero"] > readings["kl"] >= -1e-4


def test_shuffled_weights_are_put_back(world):
    before = [p.detach().clone() for p in world.subject.model.parameters()]
    with shuffled_weights(world.subject):
        now = list(world.subject.model.parameters())
        assert any(not torch.equal(a, b) for a, b in zip(before, now, strict=True))
        assert all(torch.allclose(a.float().sum(), b.float().sum(), atol=1e-2) for a, b in zip(before, now, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, world.subject.model.parameters(), strict=True))
