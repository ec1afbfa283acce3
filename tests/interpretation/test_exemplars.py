"""Exemplars: counts against plain counting, roles against the splits, and the same bytes whatever the block size."""
import numpy as np
import pyarrow as pa
import pytest
from word_world import MIXED, NEVER, SIZES, WORDS, make_sae, make_store

from saerad.core import UserError, file_hash, read_table, write_table
from saerad.interpretation.exemplars import (
    EDGES,
    ROLES,
    SCHEMA,
    Collector,
    Exemplars,
    ExemplarsConfig,
    Sample,
    collect_exemplars,
    context_windows,
    draw_tickets,
    histogram_bins,
    patch_grid,
    stated_findings,
    study_blocks,
)
from saerad.sae.model import MatryoshkaSAE

CFG = ExemplarsConfig(min_explain=5, min_score=5)


@pytest.fixture(scope="module")
def store(tmp_path_factory): return make_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def made(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("exemplars")
    collect_exemplars(store, make_sae(), CFG, 0, out)
    return Exemplars(out)


@pytest.fixture(scope="module")
def dense(store): return make_sae().encode(store.read(np.arange(len(store)))).numpy()


def test_statistics_are_those_of_plain_counting(store, made, dense):
    f = made.features
    assert np.allclose(f.density, (dense > 0).mean(0))
    assert np.allclose(f["max"], dense.max(0))
    fires = np.maximum((dense > 0).sum(0), 1)
    assert np.allclose(f.mean_active, dense.sum(0) / fires)
    section = np.array(store.tokens["section"].to_pylist())
    for place in ("image", "indication", "findings"):
        assert np.allclose(f[f"in_{place}"], (dense[section == place] > 0).sum(0) / fires)
    assert f.level.tolist() == [0] * len(WORDS) + [1] * 3


def test_status(made):
    status = made.features.status
    assert status[MIXED] == "ok" and status[NEVER] == "dead"
    assert set(status) <= {"ok", "dead", "too few contexts"}


def test_too_few_contexts_is_said_and_not_interpreted(store, tmp_path):
    collect_exemplars(store, make_sae(), ExemplarsConfig(min_score=90), 0, tmp_path)
    made = Exemplars(tmp_path)
    few = made.features[made.features.status == "too few contexts"].feature
    assert WORDS.index("apical") in set(few)
    assert not {f.feature for f in made.contexts()} & set(few)


def test_windows_hold_what_the_store_holds(store, made, dense):
    tokens = store.tokens.to_pandas()
    table = read_table(made.folder / "exemplars.parquet")
    assert table.schema == SCHEMA
    for e in table.to_pandas().sample(400, random_state=0).itertuples():
        low = e.row - e.peak
        here = tokens.iloc[low:low + len(e.tokens)]
        assert here.study.nunique() == here.section.nunique() == 1
        assert (here.study.iloc[0], here.patient.iloc[0], here.section.iloc[0]) == (e.study, e.patient, e.section)
        assert list(e.tokens) == [t or "[image]" for t in here.text]
        assert np.allclose(e.activations, dense[low:low + len(e.tokens), e.feature])
        before = tokens.iloc[low - e.offset:low]
        assert (before.section == e.section).all() and (before.study == e.study).all()
        if e.role.endswith("active"): assert e.activations[e.peak] == max(e.activations) > 0 and e.decile >= 1
        else: assert not np.any(e.activations) and e.decile == 0


def test_nobody_explains_and_scores(made):
    table = read_table(made.folder / "exemplars.parquet").to_pandas()
    explains = table.role.str.startswith("explain")
    assert set(table[explains].split) == {"train"}
    assert set(table[~explains].split) == {"validation", "test"}
    assert not set(table[explains].patient) & set(table[~explains].patient)
    assert set(table.role) == set(ROLES)


def test_explaining_takes_the_top_and_scoring_all_deciles(made):
    mixed = made.of(MIXED)
    explain, scoring = (mixed[mixed.role == r] for r in ("explain_active", "score_active"))
    silent = mixed[mixed.role == "score_silent"]
    assert len(explain) == 25 and explain.decile.min() >= 7 and (explain.decile == 10).any()
    assert len(scoring) == len(silent) and set(scoring.decile) == set(range(1, 11))
    per_decile = scoring.groupby("decile").size()
    assert per_decile.max() - per_decile.min() <= 1
    assert not mixed.duplicated(["role", "row"]).any()
    fired = [np.array(t)[np.array(a) > 0] for t, a in zip(explain.tokens, explain.activations, strict=True)]
    assert {w.strip() for row in fired for w in row} <= set(SIZES)


def test_same_bytes_for_any_block_size(store, made, tmp_path):
    for i, size in enumerate((1, 300, 100_000)):
        collect_exemplars(store, make_sae(), CFG.model_copy(update={"block": size}), 0, tmp_path / str(i))
        for name in ("features.parquet", "exemplars.parquet"):
            assert file_hash(tmp_path / str(i) / name) == file_hash(made.folder / name)


def test_another_seed_is_another_sample(store, made, tmp_path):
    collect_exemplars(store, make_sae(), CFG, 1, tmp_path)
    assert not Exemplars(tmp_path).of(MIXED).row.equals(made.of(MIXED).row)


def test_bounded_sample_is_uniform_and_of_the_lowest_tickets(store, tmp_path, dense):
    cfg = CFG.model_copy(update={"candidates": 20, "block": 64})
    collect_exemplars(store, make_sae(), cfg, 0, tmp_path)
    word = WORDS.index("is")
    side = np.array([s == "train" for s in store.tokens["split"].to_pylist()])
    around = context_windows(store.tokens, cfg.window)
    firing = np.flatnonzero((dense[:, word] > 0) & side)
    peaks = [r for r in firing if dense[around.low(r):around.high(r) + 1, word].max() == dense[r, word]]
    tickets = draw_tickets(np.array(peaks), np.full(len(peaks), word), 0)
    winners = set(np.array(peaks)[np.argsort(tickets)[:20]])
    chosen = Exemplars(tmp_path).of(word)
    assert set(chosen[chosen.role == "explain_active"].row) <= winners


def test_blocks_hold_whole_studies(store):
    study = np.array(store.tokens["study"].to_pylist())
    for size in (1, 50, 10**9):
        ranges = list(study_blocks(store.tokens, size))
        assert ranges[0][0] == 0 and ranges[-1][1] == len(store)
        assert all(b == c for (_, b), (c, _) in zip(ranges, ranges[1:], strict=False))
        assert all(study[b - 1] != study[b] for _, b in ranges[:-1])


def test_a_leak_is_an_error(tmp_path):
    leaky = make_store(tmp_path / "store", studies=16, leak=True)
    with pytest.raises(UserError, match="patient 'p0000' on the explaining and the scoring side"):
        collect_exemplars(leaky, make_sae(), CFG, 0, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_leak_put_into_the_table_is_an_error(made, tmp_path):
    table = read_table(made.folder / "exemplars.parquet")
    same = table.set_column(table.schema.get_field_index("patient"), "patient", [["p1"] * len(table)])
    write_table(tmp_path / "exemplars.parquet", same)
    write_table(tmp_path / "features.parquet", read_table(made.folder / "features.parquet"))
    with pytest.raises(UserError, match="explains and scores feature"): list(Exemplars(tmp_path).contexts())


def test_one_split_on_both_sides_is_an_error(store, tmp_path):
    with pytest.raises(UserError, match="'train' is in explain_splits and score_splits"):
        collect_exemplars(store, make_sae(), ExemplarsConfig(score_splits=("train", "test")), 0, tmp_path)


def test_the_sae_of_another_store_is_an_error(store, tmp_path):
    with pytest.raises(UserError, match="width"): collect_exemplars(store, MatryoshkaSAE(7, (14,), 2), CFG, 0, tmp_path)


def test_missing_and_damaged_tables_are_named(made, tmp_path):
    with pytest.raises(UserError, match="features.parquet is missing"): Exemplars(tmp_path)
    write_table(tmp_path / "features.parquet", read_table(made.folder / "features.parquet"))
    (tmp_path / "exemplars.parquet").write_bytes(b"no table")
    with pytest.raises(UserError, match="exemplars.parquet is not"): Exemplars(tmp_path)


def test_a_scorer_sees_no_activation(made):
    for contexts in made.contexts():
        assert not any(hasattr(c, name) for c in contexts.scoring for name in ("activations", "peak"))
        assert len(contexts.truth) == len(contexts.scoring) and contexts.truth.any() and not contexts.truth.all()

# beside the contexts

def test_a_sample_holds_the_lowest_tickets_whatever_the_order():
    draw = np.random.default_rng(0)
    group, ticket = draw.integers(0, 5, 2000), draw.permutation(2000).astype(np.uint64)
    values = ticket[:, None].astype(np.float32)
    for step in (1, 37, 2000):
        held = Sample(6, 40, 1)
        for i in range(0, 2000, step): held.add(group[i:i + step], ticket[i:i + step], ticket[i:i + step].astype(np.int64), values[i:i + step])
        for g in range(5):
            rows, found = held.of(g)
            assert rows.tolist() == sorted(ticket[group == g])[:40] == found[:, 0].astype(int).tolist()
        assert len(held.of(5)[0]) == 0 and held.limit[5] == np.iinfo(np.uint64).max


@pytest.mark.parametrize(("value", "lower"), [(1.0, 1.0), (1.49, 1.0), (1.5, 1.5), (3.0, 3.0), (1e-9, EDGES[0]), (1e9, EDGES[-1]), (0.75, 0.75)])
def test_bins_are_half_octaves(value, lower):
    assert EDGES[histogram_bins(np.array([value], np.float32))[0]] == lower


def test_histograms_places_and_deciles(store, made, dense):
    f = made.features
    assert np.array_equal([h.sum() for h in f.histogram], (dense > 0).sum(0))
    frontal = np.array([v == "frontal" for v in store.tokens["view"].to_pylist()])
    assert np.allclose(f.view_frontal, (dense[frontal] > 0).sum(0) / np.maximum((dense > 0).sum(0), 1))
    before = store.tokens.to_pandas().groupby(["study", "section", "view"]).cumcount().to_numpy()     # tokens of the section before each
    assert np.allclose(f.offset, ((dense > 0) * before[:, None]).sum(0) / np.maximum((dense > 0).sum(0), 1))
    some = f[f.status == "ok"]
    assert all(len(d) == 9 and (np.diff(d) >= 0).all() and d[-1] <= m for d, m in zip(some.deciles, some["max"], strict=True))


def test_what_reports_state():
    assert "large left effusion" in stated_findings("Large left pleural effusion. No pneumothorax.")
    assert "pneumothorax" not in stated_findings("No pneumothorax.")
    assert stated_findings("Heart size is normal.") == ("no findings",)


@pytest.mark.parametrize("rows, columns", [(8, 8), (37, 37), (1, 12)])
def test_the_grid_of_patches_is_that_of_the_tokens(rows, columns):
    place = np.divmod(np.arange(rows * columns), columns)
    every = pa.table({name: np.append(p, -1).astype(np.int16) for name, p in zip(("row", "col"), place, strict=True)})
    assert patch_grid(every) == patch_grid(every.slice(rows * columns - 1)) == (rows, columns)   # the last patch alone tells it too
    assert patch_grid(every.slice(rows * columns)) == (0, 0) == patch_grid(every.slice(0, 0))


def test_exemplars_remember_the_grid_and_where_a_patch_was(made):
    assert made.grid == (37, 37)
    f = next(f for f in made.contexts() if f.feature == WORDS.index("[image]"))
    assert {c.patch for c in f.active} == {(36, 36)} and {c.patch for c in f.silent if c.section != "image"} == {(-1, -1)}


def test_an_unknown_view_is_named(tmp_path):
    store = make_store(tmp_path / "store", studies=16)
    table = store.tokens.set_column(store.tokens.schema.get_field_index("view"), "view", [["oblique"] * len(store)])
    with pytest.raises(UserError, match="has a view 'oblique'; it must be one of frontal, lateral, prior"): Collector(table, 3, CFG, 0)
