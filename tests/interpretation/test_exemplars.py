"""Exemplars: counts against plain counting, roles against the splits, and the same bytes whatever the block size."""
import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.numpy import load_file
from word_world import MIXED, NEVER, SIZES, WORDS, make_sae, make_store

from saerad.core import UserError, file_hash, read_table, write_table
from saerad.interpretation import exemplars
from saerad.interpretation.delphi import export_delphi, rectangle
from saerad.interpretation.exemplars import (
    EDGES,
    ROLES,
    SCHEMA,
    Collector,
    Encoder,
    Exemplars,
    ExemplarsConfig,
    Sample,
    bins,
    blocks,
    collect_exemplars,
    lottery,
    patch_grid,
    stated,
    windows,
)
from saerad.interpretation.hard_negatives import SOURCES, Habit, Mention, add_near_misses, habits, near_windows, nearest, nearest_windows, take_turns
from saerad.sae import kernels
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
    around = windows(store.tokens, cfg.window)
    firing = np.flatnonzero((dense[:, word] > 0) & side)
    peaks = [r for r in firing if dense[around.low(r):around.high(r) + 1, word].max() == dense[r, word]]
    tickets = lottery(np.array(peaks), np.full(len(peaks), word), 0)
    winners = set(np.array(peaks)[np.argsort(tickets)[:20]])
    chosen = Exemplars(tmp_path).of(word)
    assert set(chosen[chosen.role == "explain_active"].row) <= winners


def test_blocks_hold_whole_studies(store):
    study = np.array(store.tokens["study"].to_pylist())
    for size in (1, 50, 10**9):
        ranges = list(blocks(store.tokens, size))
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
    assert EDGES[bins(np.array([value], np.float32))[0]] == lower


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
    assert "large left effusion" in stated("Large left pleural effusion. No pneumothorax.") and "pneumothorax" not in stated("No pneumothorax.")
    assert stated("Heart size is normal.") == ("no findings",)


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


# near misses

@pytest.fixture(scope="module")
def near(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("near")
    collect_exemplars(store, make_sae(), CFG, 0, out)
    add_near_misses(store, make_sae(), CFG, 0, out)
    return out, read_table(out / "near.parquet").to_pandas()


def test_near_misses_are_silent_and_from_their_side(store, near, dense):
    table, around = near[1], windows(store.tokens, CFG.window)
    assert set(table.source) <= set(SOURCES) and {"nearest"} < set(table.source)
    for e in table.sample(300, random_state=0).itertuples():
        assert not (dense[around.low(np.array([e.row]))[0]:around.high(np.array([e.row]))[0] + 1, e.feature] > 0).any()
        assert (e.split == "train") == (e.role == "explain_near")
    counts = table.groupby(["feature", "role"]).size().unstack()
    assert counts.explain_near.max() <= CFG.explain_hard and counts.score_near.max() <= CFG.score_hard
    assert not table.duplicated(["feature", "role", "row"]).any()


def test_near_misses_reach_the_interpreter(near):
    f = next(f for f in Exemplars(near[0]).contexts() if f.feature == MIXED)
    mine = near[1][near[1].feature == MIXED]
    explain, scoring = ((mine.role == role).sum() for role in ("explain_near", "score_near"))
    assert len(f.near_silent) == explain and len(f.near_scoring) == len(f.near_sources) == scoring
    assert f.near_sources == tuple(mine[mine.role == "score_near"].source)


def test_new_exemplars_forget_old_near_misses(store, near, tmp_path):
    collect_exemplars(store, make_sae(), CFG, 0, tmp_path)
    add_near_misses(store, make_sae(), CFG, 0, tmp_path)
    assert file_hash(tmp_path / "near.parquet") == file_hash(near[0] / "near.parquet")
    collect_exemplars(store, make_sae(), CFG, 0, tmp_path)
    assert not (tmp_path / "near.parquet").exists()


def test_habits_and_the_ways_to_be_near():
    said = [Mention(i, "effusion", "present", "left" if i < 8 else "right", "small", "findings") for i in range(16)]
    said += [Mention(20 + i, "effusion", "absent", "", "", "findings") for i in range(8)]
    said += [Mention(40 + i, "nodule", "present", "", "", "findings") for i in range(40)]
    fired = np.array([[m.kind == "effusion" and m.side == "left"] for m in said])
    habit = habits(said, fired)[0]
    assert habit == Habit("effusion", "present", "left", "small", "findings")
    columns = {c: np.array([getattr(m, c) for m in said]) for c in ("kind", "certainty", "side", "severity", "section")}
    pool = SimpleNamespace(fired=fired, said=columns, words={}, section=np.array(["findings"] * len(said)), view=np.array([""] * len(said)))
    found = near_windows(pool, 0, habit, np.zeros(0, int), "", ("findings",))
    assert found["side"].tolist() == list(range(8, 16)) and found["negated"].tolist() == list(range(16, 24))
    assert not len(found["nearest"]) and not len(found["severity"]) and not len(found["view"])
    assert habits(said, np.zeros((len(said), 1), bool)) == [Habit()]


def test_every_way_to_be_near():
    """Ten windows, one feature that fires in the first three; each other window is near in one way, or in none."""
    said = {c: np.array([""] * 10, object) for c in ("kind", "certainty", "side", "severity", "section")}
    for i, (kind, certainty, severity) in {0: ("effusion", "present", "small"), 3: ("effusion", "absent", ""), 4: ("effusion", "present", "large"),
                                           5: ("nodule", "present", "large"), 6: ("effusion", "present", "small")}.items():
        said["kind"][i], said["certainty"][i], said["severity"][i] = kind, certainty, severity
    section = np.array(["findings"] * 6 + ["indication", "findings", "image", "image"])
    view = np.array([""] * 8 + ["frontal", "lateral"])
    fired = np.zeros((10, 4), bool)
    fired[[0, 1, 2], 0] = True
    pool = SimpleNamespace(fired=fired, said=said, words={"fluid": np.array([1, 7])}, section=section, view=view)
    habit = Habit("effusion", "present", "", "small", "findings")
    found = {s: w.tolist() for s, w in near_windows(pool, 0, habit, np.array([1]), "fluid", ("findings",)).items()}
    assert set(found) == set(SOURCES)
    assert found == {"nearest": [], "negated": [3], "side": [], "severity": [4], "word": [7], "section": [6], "view": []}
    fired[8, 0] = True
    pool.view[9] = "frontal"
    assert near_windows(pool, 0, habit, np.array([1]), "", ("image",))["view"].tolist() == [9]
    assert not len(near_windows(pool, 0, habit, np.array([1]), "", ("findings",))["view"])   # an image or two are no home


def test_nearest_windows_are_those_of_many_and_rare_features():
    fired = np.zeros((100, 4), bool)
    fired[:90, 0] = True               # fires nearly everywhere: says nothing
    fired[[5, 6], 1] = True
    fired[[6, 95], 2] = True
    fired[[5, 6], 3] = True            # not a neighbour
    among = np.arange(100) != 95
    assert nearest_windows(fired, np.array([0, 1, 2]), among, 2).tolist() == [5, 6]
    assert nearest_windows(fired, np.array([0, 1, 2]), among, 1).tolist() == [6]
    assert nearest_windows(fired, np.array([1, 2]), among, 50).tolist() == [5, 6]
    assert not len(nearest_windows(fired[:0], np.array([0]), among[:0], 5))


def test_sources_take_turns():
    chosen, kinds = take_turns({"a": np.arange(2), "b": np.arange(1, 50)}, 9, np.random.default_rng(0))
    assert len(set(chosen)) == len(chosen) == 9 and kinds.count("a") >= 1
    assert take_turns({}, 5, np.random.default_rng(0))[1] == []


def test_nearest_is_by_direction_and_never_oneself():
    sae = MatryoshkaSAE(6, (12,), 2)
    found = nearest(sae, 3, block=5)
    unit = torch.nn.functional.normalize(sae.W_dec.detach(), dim=1)
    cosine = (unit @ unit.T).fill_diagonal_(-2)
    assert np.array_equal(found, cosine.topk(3, dim=1).indices.numpy())


# encoding a large dictionary

def large(bias=0.0, k=64, d=256, width=16_384):
    """A dictionary that is large enough to be searched, with features of many lengths, and a source of rows for it."""
    sae, draw = MatryoshkaSAE(d, (width // 4, width - width // 4), k), torch.Generator().manual_seed(1)
    with torch.no_grad():
        sae.W_enc.mul_(0.5 + torch.rand(width, generator=draw))
        sae.b_enc.copy_(bias * torch.randn(width, generator=draw))
        sae.b_dec.copy_(0.1 * torch.randn(d, generator=draw) / d**0.5)
        sae.scale.fill_(7.0)
        pre = sae.preactivations(torch.randn(64, d, generator=draw) / d**0.5)
        sae.threshold.copy_(pre.flatten().topk(64 * k).values[-1])
    return sae.eval(), lambda n: 7 * torch.randn(n, d, generator=draw) / d**0.5 * torch.rand(n, 1, generator=draw).mul(2)


def searched(sae):
    encode = Encoder(sae)
    if not encode.quick: pytest.skip("no compiler, or a processor without units for bfloat16")
    return encode


@pytest.mark.parametrize("bias", [0.0, 0.1])
def test_a_searched_block_is_the_encoded_block(bias):
    sae, rows = large(bias)
    encode, t = searched(sae), float(sae.threshold)
    for n in (200, 90, 130):          # the array is used again, by fewer rows and by more
        x = rows(n)
        x[3], x[5], x[7] = x[3] * 50, 0, x[7] * 4     # one beyond what can be searched, an empty one, a long one
        z, plain = encode(x), sae.encode(x)
        differ = (z > 0) != (plain > 0)
        assert encode.odd.tolist() == [3] and z.shape == plain.shape and differ.sum() <= 3
        assert torch.allclose(z[~differ], plain[~differ], atol=2e-5, rtol=1e-5) and ((z + plain)[differ] < t + 1e-5).all()


@pytest.mark.parametrize("bias", [0.0, 0.1])
def test_no_rough_product_is_further_off_than_stated(bias):
    sae, rows = large(bias)
    x = rows(100) / sae.scale - sae.b_dec
    rough = exemplars.Rough.of(sae.W_enc.detach().T.contiguous(), sae.b_enc.detach())
    exact = (x.double() @ sae.W_enc.double() + sae.b_enc.double()).detach()
    for product in (torch.addmm(rough.b.bfloat16(), x.bfloat16(), rough.W.T), x.bfloat16().float() @ rough.W.T.float() + rough.b):
        assert ((product.double() - exact).abs() <= rough.error(x)[:, None] + 2**-7 * exact.abs()).all()


def test_what_fires_does_not_depend_on_the_block():
    sae, rows = large()
    encode, x = searched(sae), rows(120)
    x[4] *= 60
    whole = encode(x).clone()
    assert all(torch.equal(Encoder(sae)(x[a:b]), whole[a:b]) for a, b in ((5, 6), (6, 50), (50, 120)))


def test_only_large_dictionaries_are_searched(monkeypatch):
    sae, rows = large()
    assert not Encoder(make_sae()).quick
    monkeypatch.setattr(kernels, "native", lambda: None)
    x = rows(10)
    assert not Encoder(sae).quick and torch.equal(Encoder(sae)(x), sae.encode(x))
    sae.kind = "topk"
    assert not Encoder(sae).quick


# the cache for delphi

def test_a_cache_for_delphi_holds_every_firing_once(store, dense, tmp_path):
    made = export_delphi(store, make_sae(), tmp_path, splits=7, length=8, block=300)
    study = np.array(store.tokens["study"].to_pylist())
    cells = rectangle(np.unique(study, return_inverse=True)[1], 8)
    back, edges = np.zeros_like(dense), []
    for path in made.glob("*.safetensors"):
        file, (first, last) = load_file(path), map(int, path.stem.split("_"))
        batch, position, feature = file["locations"].T.astype(int)
        assert len(batch) and file["locations"].dtype == np.uint16 and (position < 8).all() and (first + feature <= last).all()
        back[np.searchsorted(cells, batch * 8 + position), first + feature] = file["activations"]
        assert np.array_equal(file["tokens"].ravel()[cells], store.tokens["token_id"].to_numpy())
        edges.append((first, last))
    assert np.allclose(back, dense, rtol=1e-3) and sorted(edges)[0][0] == 0 and sorted(edges)[-1][1] == dense.shape[1] - 1
    assert all(a[1] + 1 == b[0] for a, b in zip(sorted(edges), sorted(edges)[1:], strict=False)) and not list(made.glob("*.part"))
    with pytest.raises(UserError, match="is not empty"): export_delphi(store, make_sae(), tmp_path)
    with pytest.raises(UserError, match="5000 files cannot share"): export_delphi(store, make_sae(), tmp_path / "many", splits=5000)


DELPHI = """
import json, sys
from pathlib import Path
import torch
from exemplars import import_delphi
from word_world import WORDS
latents, constructor, sampler = import_delphi()
class Words:
    def batch_decode(self, ids): return [WORDS[int(i)] for i in torch.as_tensor(ids).flatten()]
folder, chosen = Path(sys.argv[1]), torch.tensor([int(f) for f in sys.argv[2:]])
read = latents.LatentDataset(folder.parent, sampler(n_examples_train=5, n_examples_test=5, n_quantiles=5),
                             constructor(example_ctx_len=16, n_non_activating=5, min_examples=5), Words(), [folder.name], {folder.name: chosen})
for r in read: print(json.dumps([e.str_tokens[int(e.activations.argmax())] for e in [*r.train, *r.test]]))
"""


def test_delphi_itself_reads_the_cache(store, tmp_path):
    root = Path(__file__).parents[2]
    python = root / ".venv-bench/bin/python"
    if not python.exists(): pytest.skip("delphi is not installed; `make bench-env` does that")
    made = export_delphi(store, make_sae(), tmp_path, splits=5, length=32)
    known = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (root, root / "tests", root / "benchmarks")))}
    done = subprocess.run([python, "-c", DELPHI, made, str(WORDS.index("effusion")), str(MIXED)], env=known, capture_output=True, text=True)
    found = [set(json.loads(line)) for line in done.stdout.splitlines() if line.startswith("[")]
    assert done.returncode == 0 and len(found) == 2 and found[0] == {"effusion"} and found[1] <= set(SIZES), done.stderr
