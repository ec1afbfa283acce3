"""Logit lens, neighbours and views of features, against plain arithmetic."""
import numpy as np
import pytest
import torch
from scipy import sparse

from saerad.activations.extraction import residuals
from saerad.core import UserError, read_table
from saerad.sae.encoder import Encoder
from saerad.sae.model import MatryoshkaSAE
from saerad.show.portraits import (
    PAINTED,
    PortraitsConfig,
    firing_columns,
    logit_lens,
    nearest_features,
    portray,
    read_prompts,
    strongest_views,
    study_table,
    study_views,
    telling,
    top_tokens,
    view_activations,
    word_firings,
    words_of,
)
from saerad.studies.phantom import painted
from saerad.studies.record import Source, StudiesConfig
from saerad.studies.sources import open_source
from saerad.subjects.subject import random_mini


@pytest.fixture(scope="module")
def subject(): return random_mini()


@pytest.fixture(scope="module")
def sae(subject):
    one = MatryoshkaSAE(subject.d_model, [24, 40], 8)
    one.threshold.fill_(0.02)                  # low, so that features fire on a random model's patches too
    one.scale.fill_(2.0)
    return one


@pytest.fixture(scope="module")
def source(): return open_source(StudiesConfig(source="phantom:0", train_patients=1, validation_patients=1, test_patients=3))


def test_the_logit_lens_is_the_direction_through_gain_and_unembedding_without_the_mean(subject, sae):
    gain, head = subject.model.get_decoder().norm.weight.float(), subject.model.lm_head.weight.float()
    plain = torch.stack([head @ (gain * row) for row in sae.W_dec.detach()])
    plain = plain - plain.mean(1, keepdim=True)
    ids, logits = top_tokens(sae, logit_lens(subject), 3, block=10)
    assert np.allclose(logits[:, :3], plain.topk(3).values, atol=1e-4) and np.allclose(logits[:, 3:], -(-plain).topk(3).values, atol=1e-4)
    assert (ids[:, 0] == plain.argmax(1).numpy()).mean() > 0.95 and ids.shape == (64, 6)


def test_neighbours_are_the_others_by_cosine(sae):
    near, cosine = nearest_features(sae, 5, block=7)
    plain = torch.nn.functional.cosine_similarity(sae.W_dec[:, None], sae.W_dec[None], dim=-1).detach().fill_diagonal_(-2)
    assert np.allclose(cosine, plain.topk(5).values, atol=1e-5) and all(i not in row for i, row in enumerate(near))
    assert nearest_features(sae, 999)[0].shape == (64, 63)


def test_views_hold_what_the_sae_reads_at_each_patch(subject, sae, source):
    prompt = subject.prompt(source.split("test")[0])
    stream = residuals(subject, [prompt], 1)[0]
    for study, view, grid, z in view_activations(subject, sae, 1, [prompt]):
        here = np.flatnonzero((prompt.section == "image") & (prompt.view == view))
        place = prompt.row[here].astype(int) * grid[1] + prompt.col[here]
        assert study == prompt.study and sorted(place) == list(range(grid[0] * grid[1]))
        assert np.allclose(z.toarray()[place], sae.encode(stream[here].float()).numpy(), atol=1e-5)


def test_each_feature_keeps_its_strongest_views():
    def view(name, *peaks): return name, "frontal", (2,
                                                     2), sparse.csc_matrix(np.array([[0, 0, 0], peaks, [0, 0, 0],
                                                             [0, p / 2 if (p := peaks[1]) else 0, 0]], np.float32))
    table = strongest_views([view("a", 1, 2, 0), view("b", 3, 1, 0), view("c", 2, 0, 0)], 2).to_pylist()
    assert [(r["feature"], r["study"], r["peak"]) for r in table] == [(0, "b", 3), (0, "c", 2), (1, "a", 2),
                                                                      (1, "b", 1)], "the third feature sees nothing"
    assert table[2]["patches"] == [1, 3] and table[2]["activations"] == [2.0, 1.0]
    ours = strongest_views([view("a", 1, 2, 0), view("b", 3, 1, 0), view("c", 2, 0, 0)], 2, {"a": "x", "b": "y", "c": "y"}).to_pylist()
    assert [(r["feature"], r["study"]) for r in ours] == [(0, "b"), (0, "a"), (1, "a"), (1, "b")], "no patient is shown twice"
    assert len(strongest_views([], 2)) == 0 and len(strongest_views([view("a", 0, 0, 0)], 2)) == 0


def test_a_portrait_of_every_feature_is_written(subject, sae, source, tmp_path):
    table = portray(source, subject, sae, 1, PortraitsConfig(tokens=4, neighbours=3, view_studies=2, views=1), tmp_path)
    assert table.num_rows == 64 and table.equals(read_table(tmp_path / "portraits.parquet"))
    row = table.slice(5, 1).to_pylist()[0]
    assert len(row["promoted"]) == len(row["suppressed_by"]) == 4 \
        and len(row["neighbours"]) == 3 and row["promoted_by"] == sorted(row["promoted_by"], reverse=True)
    views = read_table(tmp_path / "views.parquet").to_pandas()
    assert views.feature.is_unique and set(views.study) <= {s.study for s in source.split("test")}
    with pytest.raises(UserError): portray(source, subject, MatryoshkaSAE(8, [16], 2), 1, PortraitsConfig(), tmp_path)


@pytest.fixture(scope="module")
def readings(subject, sae, source):
    studies = source.split("test")[:2]
    return read_prompts(subject, Encoder(sae), 1, [subject.prompt(s, s.sections["findings"]) for s in studies])


def test_a_reading_holds_every_token_and_the_views_of_its_prompt(subject, sae, readings):
    for reading in readings:
        assert reading.z.shape == (len(reading.prompt), sae.width) and len(reading.tokens) == len(reading.prompt)
        alone = list(view_activations(subject, sae, 1, [reading.prompt]))
        for (study, view, grid, z), mine in zip(alone, reading.views(), strict=True):
            assert (study, view, grid) == mine[:3] and np.allclose(z.toarray(), mine[3].toarray(), atol=1e-4)


def test_the_words_of_a_study_carry_its_most_telling_features(source, sae, readings):
    words = word_firings(readings, sae.width)
    rows = study_table(source, readings, words, 3).to_pylist()
    assert [r["study"] for r in rows] == [r.prompt.study for r in readings] and all(r["split"] == "test" for r in rows)
    findings = "".join(t for t, s in zip(rows[0]["tokens"], rows[0]["sections"], strict=True) if s == "findings")
    assert findings.strip() == source[rows[0]["study"]].sections["findings"] and not {"image", "boilerplate"} & set(rows[0]["sections"])
    worth = np.log(words.shape[0] / np.maximum(np.diff(words.indptr), 1))
    z = readings[0].z[words_of(readings[0])].toarray()
    for i, (features, values) in enumerate(zip(rows[0]["features"], rows[0]["activations"], strict=True)):
        value = z[i] * worth
        assert np.allclose(z[i, features], values) and len(features) == min(3, np.count_nonzero(z[i]))
        if features: assert value[features].min() >= np.delete(value, features).max() - 1e-6
    assert telling(sparse.csr_matrix((2, 5)), np.ones(5), 3) == ([[], []], [[], []])


def test_features_that_fire_everywhere_do_not_lead_a_view(readings):
    table = study_views(readings, 4).to_pandas()
    everywhere = set(range(64)) - {f for r in readings for *_, z in r.views() for f in np.flatnonzero(z.max(axis=0).toarray() == 0)}
    assert not everywhere & set(table.feature) and (table.groupby(["study", "view"]).size() <= 4).all()


def test_the_words_on_which_a_feature_fires_are_numbered_through_all_studies(sae, readings):
    words = word_firings(readings, sae.width)
    columns, dense = firing_columns(readings, words), np.concatenate([r.z[words_of(r)].toarray() for r in readings])
    for f in (0, 7, 63): assert columns["fires_at"][f].tolist() == np.flatnonzero(dense[:, f]).tolist()
    patches = np.concatenate([r.z[r.prompt.section == "image"].toarray() for r in readings]) > 0
    rates = patches.mean(0), (dense > 0).mean(0)
    known = rates[0] + rates[1] > 0
    assert np.allclose(np.array(columns["on_images"], float)[known], rates[0][known] / (rates[0] + rates[1])[known])


def test_a_painted_finding_shows_the_features_that_rise(subject, sae, tmp_path):
    source = open_source(StudiesConfig(source="phantom:0", train_patients=1, validation_patients=1, test_patients=20))
    source = Source(source.spec, [s for s in source if s.study in ("p000059-s1", "p000059-s2")])        # the second is healthy
    portray(source, subject, sae, 1, PortraitsConfig(view_studies=2, view_features=2), tmp_path)
    table = read_table(tmp_path / "painted.parquet").to_pandas()
    [study] = set(table.study)
    assert not source[study].truth.findings and (table.rise > 0).all() and (table.groupby("kind").size() <= 2).all()
    row = table.iloc[0]
    finding = next(f for f in PAINTED if f.kind == row.kind)
    for when, version in (("before", source[study]), ("after", painted(source[study], finding))):
        heat = next(z for _, view, _, z in view_activations(subject, sae, 1, [subject.prompt(version)]) if view == "frontal")[:, [row.feature]]
        assert heat.indices.tolist() == row[f"patches_{when}"].tolist() and np.allclose(heat.data, row[f"activations_{when}"], atol=1e-4)
