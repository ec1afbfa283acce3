"""Explanations against the phantom's truth: tags of contexts against the tags of words, and the concept that a feature tracks."""
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from sklearn.metrics import f1_score

from saerad.activations.store import TOKEN_SCHEMA, StoreWriter
from saerad.analysis.truth import f1_of, share_named, tracked_concepts, true_concepts, truth_table
from saerad.interpretation.exemplars import Context, FeatureContexts
from saerad.studies.grammar import CONCEPTS
from saerad.studies.record import StudiesConfig
from saerad.studies.sources import open_source


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Phantom studies whose findings are stored a word a token."""
    source = open_source(StudiesConfig(source="phantom:0", train_patients=25, validation_patients=2, test_patients=2))
    blank = {"split": "train", "section": "findings", "view": "", "row": -1, "col": -1, "token_id": 0, "position": 0}
    with StoreWriter(tmp_path_factory.mktemp("store"), "words", 2) as writer:
        for s in source.split("train"):
            words = s.truth.words["findings"]
            texts = [" " + s.sections["findings"][w.start:w.end] for w in words]
            about = blank | {"study": s.study, "patient": s.patient}
            rows = [about | {"text": t, "start": w.start, "end": w.end} for t, w in zip(texts, words, strict=True)]
            writer.add(torch.zeros(len(rows), 2), pa.Table.from_pylist(rows, TOKEN_SCHEMA))
        return source, writer.finish()


def contexts(source, store, width):
    """A context of `width` words around every tenth word."""
    table = store.tokens.to_pandas()
    for study, rows in table.groupby("study", sort=False):
        first = rows.index[0]
        for low in range(first, first + len(rows) - width, 10):
            yield Context(low, tuple(table.text[low:low + width]), "findings", "", low - first, low=low, study=study)


def test_the_concepts_of_a_context_are_those_of_its_words_and_of_its_study(world):
    source, store = world
    every = list(contexts(source, store, 6))
    marks, names = true_concepts(store, source, every), list(CONCEPTS)
    for c, row in zip(every, marks, strict=True):
        study = source[c.study]
        words = study.truth.words["findings"][c.offset:c.offset + 6]
        assert {n for n, true in zip(names, row, strict=True) if true} == {n for w in words for n in w.concepts} | study.truth.visual


def test_f1_is_that_of_sklearn():
    draw = np.random.default_rng(0)
    truth, predicted = draw.random(60) < 0.4, draw.random((60, 3)) < 0.5
    assert np.allclose(f1_of(truth, predicted), [f1_score(truth, predicted[:, j]) for j in range(3)])


def test_a_feature_that_is_a_concept_is_found_to_track_it(world):
    source, store = world
    every = list(contexts(source, store, 6))
    marks = true_concepts(store, source, every)[:, list(CONCEPTS).index("effusion")]
    active, silent = ([c for c, m in zip(every, marks, strict=True) if m == want] for want in (True, False))
    half = [len(active) // 2, len(silent) // 2]
    f = FeatureContexts(7, 0.1, tuple(active[:half[0]]), tuple(silent[:half[1]]), (*active[half[0]:], *silent[half[1]:]),
                        np.arange(len(every) - sum(half)) < len(active) - half[0])
    assert tracked_concepts(store, source, [f]).to_dict("records") == [{"feature": 7, "concept": "effusion", "concept_f1": 1.0}]


def test_the_share_that_names_its_concept():
    interpretations = pd.DataFrame({"feature": [1, 2, 3, 4], "status": ["scored"] * 3 + ["unscored"], "f1": 0.9, "near_f1": 0.8, "shuffled_f1": 0.1,
                                    "explanation": ["pleural effusion", "wires", 'fires on "x" without "nodule" before it', "nodule"]})
    tracked = pd.DataFrame({"feature": [1, 2, 3, 4], "concept": ["effusion", "effusion", "nodule", "nodule"], "concept_f1": [0.9, 0.9, 0.5, 0.9]})
    table = truth_table(interpretations, tracked)
    assert table.named.tolist() == [True, False, False]
    share = share_named(table, 0.7, np.random.default_rng(0))
    assert share["features"] == 2 and share["named"] == 0.5 and share["shuffled"] == 0.5 and share["low"] <= 0.5 <= share["high"]
    assert share_named(table, 0.99, np.random.default_rng(0))["features"] == 0
