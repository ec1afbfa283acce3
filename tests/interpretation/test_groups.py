"""Groups of features: planted ones are found, their activation is what it is said to be, and they are asked about like features."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from word_server import WordServer
from word_world import WORDS, make_store

from saerad.core import UserError, file_hash, read_table, write_table
from saerad.interpretation import groups as g
from saerad.interpretation.endpoint import can_replay
from saerad.interpretation.examinations import read_examination
from saerad.interpretation.exemplars import Exemplars, ExemplarsConfig, collect_exemplars
from saerad.interpretation.hard_negatives import add_hard_negatives
from saerad.interpretation.interpret import InterpretationConfig, checked_estimate, format_estimate, interpret, replay_note
from saerad.sae.model import MatryoshkaSAE

CLOSED = SimpleNamespace(may_leave=False)
EXEMPLARS = ExemplarsConfig(min_explain=5, min_score=5)
SPLIT = ("effusion", "pneumothorax", "There")          # words with a second feature, for their stronger half
PLANTED = [(WORDS.index(w), len(WORDS) + i) for i, w in enumerate(SPLIT)]


def plain_sae(rows):
    """An SAE whose encoder and decoder are these directions."""
    sae = MatryoshkaSAE(len(rows[0]), (len(rows),), k=1, drawn=False)
    sae.W_dec.data = torch.tensor(np.asarray(rows, np.float32))
    sae.W_enc.data = sae.W_dec.data.T.clone()
    return sae.eval()


def split_sae():
    """One feature a word, and for some words a second one that fires only where the first is strong."""
    sae = plain_sae([*np.eye(len(WORDS)), *np.eye(len(WORDS))[[WORDS.index(w) for w in SPLIT]]])
    with torch.no_grad():
        for bias in (sae.b_enc, sae.b_dec): bias.zero_()
        sae.b_enc[len(WORDS):] = -1.5
        sae.threshold.fill_(0.5)
    return sae


def config(server=None, **changes):
    asked = {"interpreter": "openai", "model": "words", "base_url": server.url, "concurrency": 8, "requests_per_second": 1000.0} if server else {}
    return InterpretationConfig(**{"groups": "auto", "bootstrap": 50, **asked, **changes})


@pytest.fixture(autouse=True)
def no_key(monkeypatch): monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Store, SAE, and the exemplars of its features."""
    base = tmp_path_factory.mktemp("world")
    store, sae = make_store(base / "store", studies=96), split_sae()
    collect_exemplars(store, sae, EXEMPLARS, 0, base / "exemplars")
    add_hard_negatives(store, sae, EXEMPLARS, 0, base / "exemplars")
    return SimpleNamespace(store=store, sae=sae, exemplars=base / "exemplars")


def stage(world, cfg, out):
    """What the stage does: features, then groups."""
    interpret(world.exemplars, cfg, 0, CLOSED, out, world.sae)
    return g.interpret_groups(world.store, world.sae, EXEMPLARS, cfg, 0, CLOSED, out)


@pytest.fixture(scope="module")
def made(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("made")
    return out, stage(world, config(), out)


# found

def test_planted_groups_are_found_named_and_scored(made):
    out, table = made
    found = {tuple(sorted(features)): row for features, row in zip(table.features, table.itertuples(), strict=True)}
    for planted, word in zip(PLANTED, SPLIT, strict=True):
        row = found[planted]
        assert row.name == word.lower() and row.status == "scored" and row.f1 > 0.95 > row.shuffled_f1 and word.lower() in row.explanation
        assert row.protocol == "paper" and row.interpreter == "lexical" and row.scored_contexts > 20
    flat = [f for features in table.features for f in features]
    assert len(flat) == len(set(flat)) and (table["size"] >= 2).all(), "no feature is in two groups"
    assert table.columns.tolist() == g.GROUPS.names and table.group.tolist() == list(range(len(table)))


def test_members_say_how_they_belong(made):
    rows = {tuple(sorted(features)): members for features, members in zip(made[1].features, made[1].members, strict=True)}
    first, second = rows[PLANTED[0]]
    assert first["feature"] == PLANTED[0][0] and first["share"] > second["share"], "the word's own feature fires more often and more strongly"
    assert first["share"] + second["share"] == pytest.approx(1) and second["directions"] == pytest.approx(1) and second["words"] == pytest.approx(1)


def test_the_activation_of_a_group_is_that_of_its_members_along_its_direction(world, made):
    out, table = made
    groups, dense = [tuple(sorted(f)) for f in table.features], world.sae.encode(world.store.read(np.arange(len(world.store)))).numpy()
    pooled = g.group_scores(world.sae, groups, sparse.csr_matrix(dense)).toarray()
    assert np.allclose(pooled[:, groups.index(PLANTED[0])], dense[:, list(PLANTED[0])].sum(1)), "members that point one way are added up"
    exemplars = read_table(out / "groups/exemplars.parquet").to_pandas()
    active = exemplars[exemplars.role.isin(["explain_active", "score_active"])]
    peaks = [a[p] for a, p in zip(active.activations, active.peak, strict=True)]
    assert np.allclose(peaks, pooled[active.row, active.feature], rtol=1e-5)
    silent = exemplars[exemplars.role == "score_silent"]
    for row in silent.head(50).itertuples():
        around = slice(row.row - row.peak, row.row - row.peak + len(row.tokens))
        assert pooled[around, row.feature].max() == 0
    features = read_table(out / "groups/features.parquet").to_pandas()
    assert np.allclose(features.density, (pooled > 0).mean(0)) and np.allclose(table["max"], pooled.max(0), rtol=1e-5)


def test_an_sae_of_groups_gives_the_same_in_parts(world):
    sae, groups = world.sae, [PLANTED[0], PLANTED[1], (0, 1, 2)]
    grouped, x = g.GroupedSAE(sae, groups), world.store.read(np.arange(300))
    expected = g.group_scores(sae, groups, sparse.csr_matrix(sae.encode(x).numpy())).toarray()
    assert np.allclose(grouped.encode(x).numpy(), expected, atol=1e-6) and grouped.level(0) == 0 and grouped.width == 3
    assert np.allclose(grouped.W_dec.norm(dim=1).numpy(), 1)


def test_signs_on_known_profiles():
    z = sparse.csr_matrix(np.array([[1, 0, 0], [3, 1, 0], [0, 0, 2]], float))
    profile = g.word_profiles(z, np.array([0, 1, 2]))
    assert np.allclose(profile @ profile.T, [[1, 0.75 ** 0.5, 0], [0.75 ** 0.5, 1, 0], [0, 0, 1]])
    lines = g.explanation_profiles(["left effusion", "effusion", "", "heart"])
    assert 0 < (lines @ lines.T)[0, 1] < 1 and not lines[2].any() and (lines @ lines.T)[0, 3] == 0


def test_neighbours_end_where_a_section_ends():
    """Features 0 and 1 fire beside word 9, 2 and 3 beside word 8, and 4 beside 8 and, across the end of its section, beside 9."""
    token = np.array([0, 9, 1, 9, 2, 8, 3, 8, 8, 4, 9])
    section = np.array([0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5])
    z = sparse.csr_matrix(np.eye(5))
    near = g.neighbour_profiles(z, np.array([0, 2, 4, 6, 9]), token, section, reach=1)
    likeness = near @ near.T
    assert np.allclose(likeness[[0, 2, 2], [1, 3, 4]], 1) and (likeness[:2, 2:] < 0).all()


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31), st.integers(2, 9), st.sampled_from([0.0, 0.3, 0.8]))
def test_groups_share_no_feature_and_hold_together(seed, largest, least):
    draw = np.random.default_rng(seed)
    rows = draw.normal(size=(12, 3))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    signs = g.Signs(np.arange(20, 32), {"directions": rows @ rows.T}, np.ones(12))
    found = g.found_groups(signs, {"directions": 1.0}, largest, least)
    flat = [f for group in found for f in group]
    assert len(flat) == len(set(flat)) and all(2 <= len(group) <= largest for group in found)
    for group in found:
        pairs = [float(rows[a - 20] @ rows[b - 20]) for a in group for b in group if a < b]
        assert np.mean(pairs) >= least - 1e-6, "what every merge keeps, the mean of all pairs keeps"


# for asking: nested groups

def test_silent_features_are_in_no_group_and_firing_together_joins():
    sae = plain_sae(np.eye(4))
    z = sparse.csr_matrix(np.array([[1, 2, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 3, 0]], float))
    assert g.feature_groups(sae, z, edge=0.5) == [(0,), (1,), (2,)]
    assert (0, 1) in g.feature_groups(sae, z, edge=0.5, cofiring=1.0)
    assert np.allclose(g.firing_together(z, np.arange(3)), np.corrcoef(z[:, :3].toarray() > 0, rowvar=False))


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 2**31), st.integers(2, 9), st.sampled_from([-1.0, 0.0, 0.3]))
def test_groups_are_nested_and_outermost_is_a_partition(seed, largest, edge):
    draw = np.random.default_rng(seed)
    sae = plain_sae(draw.normal(size=(12, 3)))
    groups = g.feature_groups(sae, sparse.csr_matrix(np.ones((3, 12))), largest=largest, edge=edge)
    assert len(set(groups)) == len(groups) and max(map(len, groups)) <= max(largest, 1)
    sets = [set(g) for g in groups]
    assert all(a <= b or b <= a or a.isdisjoint(b) for a in sets for b in sets)
    assert sorted(f for g in g.outermost(groups) for f in g) == list(range(12))


@pytest.mark.parametrize("how", ["along", "sum", "max"])
def test_a_group_of_one_is_its_feature(how):
    draw = np.random.default_rng(5)
    sae, z = plain_sae(draw.normal(size=(6, 3))), sparse.random(30, 6, 0.3, "csr", random_state=0)
    scores = g.group_scores(sae, [(2,), (4,), (2, 4)], z, how).toarray()
    assert np.allclose(scores[:, :2], z[:, [2, 4]].toarray())
    both = z[:, [2, 4]].toarray()
    if how != "along": assert np.allclose(scores[:, 2], both.sum(1) if how == "sum" else both.max(1))


# files

def test_the_same_bytes_again_and_every_examination_is_kept(world, made, tmp_path):
    out, table = made
    write_table(tmp_path / "interpretations.parquet", read_table(out / "interpretations.parquet"))
    g.interpret_groups(world.store, world.sae, EXEMPLARS, config(), 0, CLOSED, tmp_path)
    names = ("groups.parquet", "groups/exemplars.parquet", "groups/features.parquet", "groups/near.parquet", "groups/examinations.parquet")
    assert all(file_hash(out / name) == file_hash(tmp_path / name) for name in names)
    sat = read_examination(out / "groups/examinations.parquet", int(table.group[0]))
    assert sat.truth.sum() > 10 and sat.answer.notna().all()


def test_the_most_active_are_kept_and_none_is_a_table_without_rows(world, made, tmp_path):
    signs = g.signs_of(world.store, world.sae, EXEMPLARS, read_table(made[0] / "interpretations.parquet").to_pandas())
    kept = g.most_active(signs, g.found_groups(signs), 2)
    assert kept == [tuple(sorted(f)) for f in made[1].features[:2]]
    none = stage(world, config(features=(WORDS.index("effusion"),)), tmp_path)
    assert len(none) == 0 and none.columns.tolist() == g.GROUPS.names and g.groups_summary(none)["groups_median_f1"] is None
    assert not (tmp_path / "groups").exists()


def test_the_summary_counts(made):
    numbers = g.groups_summary(made[1])
    assert numbers["groups"] == len(made[1]) and numbers["grouped_features"] == made[1]["size"].sum()
    assert numbers["groups_median_f1"] == pytest.approx(made[1].f1.median(), abs=1e-4)


# an endpoint

def test_groups_are_asked_like_features_within_the_estimate_and_replayed(world, tmp_path):
    with WordServer() as server:
        cfg = config(server, features=[f for pair in PLANTED for f in pair])
        needed = checked_estimate(Exemplars(world.exemplars), cfg)
        table = stage(world, cfg, tmp_path)
    assert needed["groups"] == 3 == len(table) and table.f1.notna().all() and (table.interpreter == "openai").all()
    assert len(server.bodies) <= needed["calls"] and "and at most 3 groups" in format_estimate(needed, cfg)
    plain = checked_estimate(Exemplars(world.exemplars), cfg.model_copy(update={"groups": "none"}))
    assert plain["groups"] == 0 and needed["calls"] > plain["calls"]
    asked, before = len(server.bodies), {name: file_hash(tmp_path / name) for name in ("groups.parquet", "ledger.sqlite")}
    again = stage(world, cfg, tmp_path)                       # the server is gone
    assert again.equals(table) and len(server.bodies) == asked
    assert before == {name: file_hash(tmp_path / name) for name in before}
    assert all(can_replay(tmp_path / "ledger.sqlite", replay_note(cfg, what)) for what in ("features", "groups"))


def test_a_run_that_stops_among_the_groups_goes_on_there(world, tmp_path):
    stop = {"after": 10**6}
    with WordServer(lambda number, body: (401, {}, "no") if number > stop["after"] else None) as server:
        cfg = config(server, features=[f for pair in PLANTED[:2] for f in pair])
        interpret(world.exemplars, cfg, 0, CLOSED, tmp_path, world.sae)
        of_features = len(server.bodies)
        stop["after"] = of_features + 8
        with pytest.raises(UserError, match="401"): g.interpret_groups(world.store, world.sae, EXEMPLARS, cfg, 0, CLOSED, tmp_path)
        assert not (tmp_path / "groups.parquet").exists() and can_replay(tmp_path / "ledger.sqlite", replay_note(cfg))
        assert not can_replay(tmp_path / "ledger.sqlite", replay_note(cfg, "groups")), "so the endpoint must be there"
        stop["after"], refused = 10**6, len(server.bodies)
        table = g.interpret_groups(world.store, world.sae, EXEMPLARS, cfg, 0, CLOSED, tmp_path)
    asked = [json.dumps(b["messages"]) for b in (*server.bodies[:of_features + 8], *server.bodies[refused:])]
    assert table.f1.notna().all() and len(asked) - len(set(asked)) <= 1, "what was answered before is not asked again"


def test_too_many_calls_are_refused_before_anything_is_asked(world, tmp_path):
    with WordServer() as server:
        plain = checked_estimate(Exemplars(world.exemplars), config(server, groups="none"))["calls"]
        with pytest.raises(UserError, match="max_calls"): interpret(world.exemplars, config(server, max_calls=plain), 0, CLOSED, tmp_path, world.sae)
    assert not server.bodies


def test_names_from_contexts_want_a_common_word(world):
    contexts = Exemplars(world.exemplars)[WORDS.index("effusion")]
    assert g.name_of(contexts) == "effusion" and g.name_of(contexts, least=1.1) == ""


def test_names_and_table():
    lines = dict(enumerate(f"fires on {what}" for what in ("effusion after left", "pleural effusion", "heart", "the heart", "the stomach")))
    names = g.group_names([(0, 1), (2, 3), (7,)], lines, words=1)
    assert names == ["effusion", "heart", ""] and g.group_names([(0,)], {}) == [""]
    sae, z = plain_sae([[1, 0], [1, 0], [0, 1]]), sparse.csr_matrix(np.array([[1.0, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 1]]))
    table = g.group_table(sae, [(0, 1), (0, 2)], z, {0: "pleural effusion", 1: "effusion", 2: "heart"})
    assert table.density.tolist() == [0.5, 0.5] and table.cosine.tolist() == pytest.approx([1.0, 0.0]) and "effusion" in table.name[0]


def test_rows_that_groups_are_found_in_are_whole_studies_that_explain(world):
    tokens, some = world.store.tokens.select(["study", "split"]).to_pandas(), g.finding_rows(world.store, EXEMPLARS, 400)
    chosen = tokens.iloc[some]
    assert 200 < len(some) < 800 and set(chosen.split) == {"train"} and tokens.study.isin(chosen.study).sum() == len(some)
