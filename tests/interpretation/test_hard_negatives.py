"""Hard negatives: silent, from the right patients, near in the ways that they name, and drawn in turn."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from word_world import MIXED, make_sae, make_store

from saerad.core import file_hash, read_table
from saerad.interpretation.exemplars import Exemplars, ExemplarsConfig, collect_exemplars, context_windows
from saerad.interpretation.hard_negatives import (
    SOURCES,
    Habit,
    Mention,
    add_hard_negatives,
    habits,
    hard_negative_windows,
    nearest_features,
    neighbour_windows,
    round_robin,
)
from saerad.sae.model import MatryoshkaSAE

CFG = ExemplarsConfig(min_explain=5, min_score=5)


@pytest.fixture(scope="module")
def store(tmp_path_factory): return make_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def dense(store): return make_sae().encode(store.read(np.arange(len(store)))).numpy()


@pytest.fixture(scope="module")
def hard(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("hard")
    collect_exemplars(store, make_sae(), CFG, 0, out)
    add_hard_negatives(store, make_sae(), CFG, 0, out)
    return out, read_table(out / "near.parquet").to_pandas()


def test_hard_negatives_are_silent_and_from_their_side(store, hard, dense):
    table, around = hard[1], context_windows(store.tokens, CFG.window)
    assert set(table.source) <= set(SOURCES) and {"nearest"} < set(table.source)
    for e in table.sample(300, random_state=0).itertuples():
        assert not (dense[around.low(np.array([e.row]))[0]:around.high(np.array([e.row]))[0] + 1, e.feature] > 0).any()
        assert (e.split == "train") == (e.role == "explain_near")
    counts = table.groupby(["feature", "role"]).size().unstack()
    assert counts.explain_near.max() <= CFG.explain_hard and counts.score_near.max() <= CFG.score_hard
    assert not table.duplicated(["feature", "role", "row"]).any()


def test_hard_negatives_reach_the_interpreter(hard):
    f = next(f for f in Exemplars(hard[0]).contexts() if f.feature == MIXED)
    mine = hard[1][hard[1].feature == MIXED]
    explain, scoring = ((mine.role == role).sum() for role in ("explain_near", "score_near"))
    assert len(f.hard_silent) == explain and len(f.hard_scoring) == len(f.hard_sources) == scoring
    assert f.hard_sources == tuple(mine[mine.role == "score_near"].source)


def test_new_exemplars_forget_old_hard_negatives(store, hard, tmp_path):
    collect_exemplars(store, make_sae(), CFG, 0, tmp_path)
    add_hard_negatives(store, make_sae(), CFG, 0, tmp_path)
    assert file_hash(tmp_path / "near.parquet") == file_hash(hard[0] / "near.parquet")
    collect_exemplars(store, make_sae(), CFG, 0, tmp_path)
    assert not (tmp_path / "near.parquet").exists()


def test_habits_and_the_ways_to_be_near():
    mentions = [Mention(i, "effusion", "present", "left" if i < 8 else "right", "small", "findings") for i in range(16)]
    mentions += [Mention(20 + i, "effusion", "absent", "", "", "findings") for i in range(8)]
    mentions += [Mention(40 + i, "nodule", "present", "", "", "findings") for i in range(40)]
    fired = np.array([[m.kind == "effusion" and m.side == "left"] for m in mentions])
    habit = habits(mentions, fired)[0]
    assert habit == Habit("effusion", "present", "left", "small", "findings")
    columns = {c: np.array([getattr(m, c) for m in mentions]) for c in ("kind", "certainty", "side", "severity", "section")}
    section, view = np.array(["findings"] * len(mentions)), np.array([""] * len(mentions))
    pool = SimpleNamespace(fired=fired, mentioned=columns, words={}, section=section, view=view)
    found = hard_negative_windows(pool, 0, habit, np.zeros(0, int), "", ("findings",))
    assert found["side"].tolist() == list(range(8, 16)) and found["negated"].tolist() == list(range(16, 24))
    assert not len(found["nearest"]) and not len(found["severity"]) and not len(found["view"])
    assert habits(mentions, np.zeros((len(mentions), 1), bool)) == [Habit()]


def test_every_way_to_be_near():
    """Ten windows, one feature that fires in the first three; each other window is near in one way, or in none."""
    mentioned = {c: np.array([""] * 10, object) for c in ("kind", "certainty", "side", "severity", "section")}
    for i, (kind, certainty, severity) in {0: ("effusion", "present", "small"), 3: ("effusion", "absent", ""), 4: ("effusion", "present", "large"),
                                           5: ("nodule", "present", "large"), 6: ("effusion", "present", "small")}.items():
        mentioned["kind"][i], mentioned["certainty"][i], mentioned["severity"][i] = kind, certainty, severity
    section = np.array(["findings"] * 6 + ["indication", "findings", "image", "image"])
    view = np.array([""] * 8 + ["frontal", "lateral"])
    fired = np.zeros((10, 4), bool)
    fired[[0, 1, 2], 0] = True
    pool = SimpleNamespace(fired=fired, mentioned=mentioned, words={"fluid": np.array([1, 7])}, section=section, view=view)
    habit = Habit("effusion", "present", "", "small", "findings")
    windows = {s: w.tolist() for s, w in hard_negative_windows(pool, 0, habit, np.array([1]), "fluid", ("findings",)).items()}
    assert set(windows) == set(SOURCES)
    assert windows == {"nearest": [], "negated": [3], "side": [], "severity": [4], "word": [7], "section": [6], "view": []}
    fired[8, 0] = True
    pool.view[9] = "frontal"
    assert hard_negative_windows(pool, 0, habit, np.array([1]), "", ("image",))["view"].tolist() == [9]
    assert not len(hard_negative_windows(pool, 0, habit, np.array([1]), "", ("findings",))["view"])   # an image or two are no home


def test_nearest_windows_are_those_of_many_and_rare_features():
    fired = np.zeros((100, 4), bool)
    fired[:90, 0] = True               # fires nearly everywhere: says nothing
    fired[[5, 6], 1] = True
    fired[[6, 95], 2] = True
    fired[[5, 6], 3] = True            # not a neighbour
    among = np.arange(100) != 95
    assert neighbour_windows(fired, np.array([0, 1, 2]), among, 2).tolist() == [5, 6]
    assert neighbour_windows(fired, np.array([0, 1, 2]), among, 1).tolist() == [6]
    assert neighbour_windows(fired, np.array([1, 2]), among, 50).tolist() == [5, 6]
    assert not len(neighbour_windows(fired[:0], np.array([0]), among[:0], 5))


def test_sources_take_turns():
    chosen, kinds = round_robin({"a": np.arange(2), "b": np.arange(1, 50)}, 9, np.random.default_rng(0))
    assert len(set(chosen)) == len(chosen) == 9 and kinds.count("a") >= 1
    assert round_robin({}, 5, np.random.default_rng(0))[1] == []


def test_nearest_is_by_direction_and_never_oneself():
    sae = MatryoshkaSAE(6, (12,), 2)
    found, _ = nearest_features(sae, 3, block=5)
    unit = torch.nn.functional.normalize(sae.W_dec.detach(), dim=1)
    cosine = (unit @ unit.T).fill_diagonal_(-2)
    assert np.array_equal(found, cosine.topk(3, dim=1).indices.numpy())
