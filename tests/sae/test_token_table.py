"""Token tables: means against plain sums, learning against automatic differentiation, and that nothing encodes without the ids."""
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from nursery import nursery, ranks
from safetensors.numpy import load_file

from saerad.activations.extraction import ExtractionConfig, residuals
from saerad.activations.store import TOKEN_SCHEMA, Store, StoreWriter
from saerad.analysis.sparse_probing import at_l0
from saerad.core import UserError
from saerad.interpretation.delphi import export_delphi
from saerad.interpretation.exemplars import ExemplarsConfig, collect_exemplars, context_windows, lean_tokens
from saerad.interpretation.hard_negatives import fired_in
from saerad.sae import kernels
from saerad.sae.convert import FORMATS, convert, doctor, read_sae, sample_tokens, sample_vectors
from saerad.sae.encoder import BatchEncoder, Encoder, FeatureEncoder, encode_rows
from saerad.sae.evaluation import dead_share, fvu, reconstruction, spliced_losses
from saerad.sae.model import MatryoshkaSAE, SAEConfig
from saerad.sae.sweep import train_sweep
from saerad.sae.token_table import RowAdam, TokenTable, row_gradients, token_ids, token_means, unique_without_waiting
from saerad.sae.training import Job, Trainer, TrainingConfig, initial_sae, train_sae
from saerad.show.portraits import read_prompts
from saerad.steering.interventions import Batch, adding, clamping, scaling, write_steered
from saerad.studies.record import StudiesConfig
from saerad.studies.sources import open_source
from saerad.subjects.subject import layers_path, random_mini

D, WORDS = 16, 30
SHAPE = SAEConfig(expansion=2, k=3, group_fractions=(1/4, 1/4, 1/2))
CFG = TrainingConfig(steps=24, batch_size=128, lr=3e-3, start_rows=512, checkpoint_every=10, log_every=1)


def store_of(folder, sinks: float = 1.0) -> Store:
    """80 studies of 40 tokens, whose vectors are half their word and half a few of 24 directions; the first two of each are image tokens."""
    draw, chance = torch.Generator().manual_seed(7), np.random.default_rng(7)
    basis, words = torch.randn(24, D, generator=draw), 3 * torch.randn(WORDS, D, generator=draw)
    with StoreWriter(folder, "key", D, "float32") as writer:
        for n in range(80):
            ids = chance.zipf(1.4, 40).clip(max=WORDS) - 1
            rows = (torch.rand(40, 24, generator=draw) * (torch.rand(40, 24, generator=draw) < 0.1)) @ basis + words[ids] + 1
            rows[5] *= sinks
            of_study = {"study": [f"s{n}"] * 40, "patient": [f"p{n}"] * 40, "split": ["train" if n < 60 else "test"] * 40}
            of_token = {"position": list(range(40)), "section": ["image"] * 2 + ["findings"] * 38, "token_id": (100 + 2 * ids).tolist(),
                        "text": ["x"] * 40}
            empty = {"view": [""] * 40} | {k: [-1] * 40 for k in ("row", "col", "start", "end")}
            writer.add(rows, pa.table(of_study | of_token | empty).select(TOKEN_SCHEMA.names).cast(TOKEN_SCHEMA))
        writer.finish()
    return Store.open(folder)


@pytest.fixture(scope="module")
def store(tmp_path_factory): return store_of(tmp_path_factory.mktemp("words") / "store")


@pytest.fixture(scope="module")
def trained(store, tmp_path_factory):
    """An SAE of each way, equally long trained, by name; and where they lie."""
    out = tmp_path_factory.mktemp("saes")
    saes = {how: train_sae(store, SHAPE.model_copy(update={"token_table": how}), CFG.model_copy(update={"steps": 150}), 0, out / how)
            for how in ("none", "mean", "learned")}
    return SimpleNamespace(out=out, **saes)


def ids_of(store, rows): return torch.from_numpy(token_ids(store, rows))


# --- the means

@pytest.mark.parametrize("shrinkage", [0.0, 10.0])
def test_means_are_those_of_plain_sums(store, shrinkage):
    table, rows = token_means(store, shrinkage, block=700), store.where("train")
    x, tokens = store.read(rows).double(), store.tokens.take(rows)
    text = tokens["section"].to_numpy(zero_copy_only=False) != "image"
    general = x.mean(0)
    assert torch.allclose(table.rows[-1].double(), general, atol=1e-5)
    for token in np.unique(tokens["token_id"].to_numpy()[text]):
        own = x[torch.from_numpy(text & (tokens["token_id"].to_numpy() == token))]
        expected = (own.sum(0) + shrinkage * general) / (len(own) + shrinkage)
        assert torch.allclose(table(torch.tensor([int(token)]))[0].double(), expected, atol=1e-5)


def test_image_tokens_and_unknown_ids_have_the_general_mean(store):
    table, first = token_means(store), store.study_rows()["s0"].start
    ids = token_ids(store, np.arange(first, first + 3))
    assert (ids[:2] == -1).all() and ids[2] >= 100
    for unknown in (-1, 0, 99, 101, 10**6): assert torch.equal(table(torch.tensor(unknown)), table.rows[-1])
    assert torch.equal(TokenTable(torch.zeros(0), torch.ones(1, D))(torch.tensor([[3, -1]])), torch.ones(1, 2, D))


def test_sinks_do_not_move_the_means(tmp_path, store):
    sinks = store_of(tmp_path / "sinks", 1000.0)
    apart = token_means(sinks, longest=100.0).rows - token_means(store).rows
    assert apart.abs().max() < 0.5 and (token_means(sinks).rows - token_means(store).rows).abs().max() > 10


@settings(max_examples=60, deadline=None)
@given(some.lists(some.integers(0, 6), min_size=1, max_size=40))
def test_gradients_without_waiting_are_those_with_it(places):
    places, last = torch.tensor(places), 6
    at, which = unique_without_waiting(places, last)
    assert torch.equal(at[which], places) and set(at.tolist()) <= {*places.tolist(), last} and len(at) == len(places)
    names = at[at != last].tolist()
    assert len(names) == len(set(names))


def test_the_gradient_of_the_table_is_that_of_automatic_differentiation(store):
    sae = initial_sae(store, SHAPE.model_copy(update={"token_table": "learned"}), CFG, 0).double()
    rows = store.where("train")[:200]
    x, tokens = store.read(rows).double(), ids_of(store, rows)
    z = torch.rand(200, sae.width, dtype=torch.float64)
    told = (sae.table.rows / sae.scale).requires_grad_()              # in the units of the loss
    places = sae.table.places(tokens)
    residual = x / sae.scale - told[places] - z @ sae.W_dec.detach() - sae.b_dec.detach()
    [expected] = torch.autograd.grad(residual.square().sum(1).mean(), [told])
    at, found = row_gradients(places, residual.detach(), len(sae.table.ids))
    expected[-1] = 0
    assert torch.allclose(expected[at], found, atol=1e-12) and found.abs().max() > 1e-4
    assert not expected[[i for i in range(len(expected)) if i not in at.tolist()]].any()


def test_rows_are_changed_as_by_adam_and_the_others_and_the_last_stay():
    table = TokenTable(torch.arange(4), torch.randn(5, D, dtype=torch.float64), "learned")
    before, adam = table.rows.clone(), RowAdam(table, (0.9, 0.999))
    plain = torch.nn.Parameter(before[1].clone())
    torchs = torch.optim.Adam([plain], lr=0.5, betas=(0.9, 0.999))
    for i in range(6):
        residual = torch.randn(3, D, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        if i % 2: adam.step(torch.tensor([4, 2, 4]), residual, 0.1, torch.tensor(5.0))       # row 1 waits, and its steps are not counted
        else:
            adam.step(torch.tensor([1, 4, 1]), residual, 0.1, torch.tensor(5.0))
            plain.grad = -2 / 3 * (residual[0] + residual[2])
            torchs.step()
    assert torch.allclose(table.rows[1], plain, atol=1e-9)
    assert torch.equal(table.rows[[0, 3, 4]], before[[0, 3, 4]]) and not torch.equal(table.rows[2], before[2])


# --- training

ENGINES = ["reference", "dense", "sparse", *(["native"] if kernels.native() else [])]      # those of cards: see test_cards


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("how", ["mean", "learned"])
def test_an_engine_gets_the_residue_and_gives_the_residual(store, engine, how):
    cfg, rows = CFG.model_copy(update={"engine": engine, "precision": "float32", "aux_alpha": 0.0}), store.where("train")[:128]
    sae = initial_sae(store, SHAPE.model_copy(update={"token_table": how}), cfg, 0)
    trainer = Trainer(sae, cfg)
    x, tokens, before = store.read(rows), ids_of(store, rows), sae.table.rows.clone()
    residue = (x - before[sae.table.places(tokens)]) / sae.scale
    assert torch.allclose(trainer.normalised(x, tokens), residue, atol=1e-6)
    pre = sae.preactivations(residue)
    kept = torch.where(pre >= pre.flatten().topk(3 * 128).values[-1], pre, 0)
    expected = residue - kept @ sae.W_dec.detach() - sae.b_dec.detach()
    found = trainer.train_step(x, ids=tokens)
    whole = x / sae.scale
    assert found["fvu"] == pytest.approx(float(expected.detach().square().sum() / (whole - whole.mean(0)).square().sum()), rel=1e-3)
    if how == "mean": return
    assert torch.allclose(trainer.engine.residual.float(), expected.detach(), atol=1e-4)
    moved = (sae.table.rows - before).abs().amax(1) > 0
    assert moved.tolist() == [i in set(sae.table.places(tokens).tolist()) and i < len(sae.table.ids) for i in range(len(before))]


def test_scale_and_bias_are_of_the_residue(store):
    sae = initial_sae(store, SHAPE.model_copy(update={"token_table": "mean"}), CFG, 0)
    rows = store.where("train")
    residue = store.read(rows) - sae.table(ids_of(store, rows))
    assert float(sae.scale) == pytest.approx(float(residue.square().sum(1).mean().sqrt()), rel=0.05)
    assert float(sae.scale) < 0.8 * float(initial_sae(store, SHAPE, CFG, 0).scale)
    assert (residue / sae.scale - sae.b_dec).norm(dim=1).mean() < (residue / sae.scale).norm(dim=1).mean() + 1e-4


def test_a_table_helps_where_half_of_the_variance_is_the_word(trained, store):
    found = {how: reconstruction(store, getattr(trained, how), store.where("test")) for how in ("none", "mean", "learned")}
    assert found["mean"]["fvu"] < 0.9 * found["none"]["fvu"] and found["learned"]["fvu"] < 0.9 * found["none"]["fvu"]
    assert 0.5 < found["mean"]["told_by_tokens"] < 1 and "told_by_tokens" not in found["none"]
    assert list(found["none"]) == [name for name in found["mean"] if name != "told_by_tokens"]


def test_none_is_what_it_was(store, tmp_path):
    train_sae(store, SHAPE, CFG, 0, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert "token_table" not in config and set(read_sae(tmp_path).tensors) == {"W_enc", "b_enc", "W_dec", "b_dec", "threshold", "scale"}


@pytest.mark.parametrize("how", ["mean", "learned"])
@pytest.mark.parametrize("stop", [13, 20])
def test_a_killed_training_ends_with_the_same_bytes(store, tmp_path, how, stop):
    class Stops(Store):
        def batches(self, *args, **kwargs):
            for step, rows, x in super().batches(*args, **kwargs):
                if step == stop: raise KeyboardInterrupt
                yield step, rows, x
    shape = SHAPE.model_copy(update={"token_table": how})
    with pytest.raises(KeyboardInterrupt): train_sae(Stops(store.folder), shape, CFG, 0, tmp_path / "again")
    train_sae(store, shape, CFG, 0, tmp_path / "again")
    train_sae(store, shape, CFG, 0, tmp_path / "whole")
    for name in ("sae.safetensors", "config.json", "metrics.jsonl"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


RUN = """
import left_threads
import torch
torch.set_num_threads(1)
from saerad.activations.store import Store
from saerad.sae.model import SAEConfig
from saerad.sae.training import TrainingConfig, train_sae

def do(store, out, shape, cfg):
    shape, cfg = SAEConfig.model_validate_json(shape), TrainingConfig.model_validate_json(cfg)
    for shard in (False, True): train_sae(Store.open(store), shape, cfg.model_copy(update={"shard": shard}), 0, f"{out}/{shard}")
"""


def test_two_processes_learn_the_table_that_one_learns(store, tmp_path):
    here = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    env = os.environ | {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([*here, *(p for p in sys.path if p)])}
    shape, cfg = SHAPE.model_copy(update={"token_table": "learned"}), CFG.model_copy(update={"engine": "sparse"})
    with nursery(RUN, env=env) as forks:
        forks.start(store.folder, tmp_path, shape.model_dump_json(), cfg.model_dump_json(), errors=tmp_path / "errors", environments=ranks(2))
        assert forks.end() == [0, 0], (tmp_path / "errors").read_text(encoding="utf-8")[-3000:]
    one = train_sae(store, shape, cfg, 0, tmp_path / "one").tensors()
    for shard in (False, True):
        both = MatryoshkaSAE.load(tmp_path / str(shard)).tensors()
        for name, t in one.items(): assert torch.allclose(both[name], t, atol=1e-3), (shard, name)


def test_sinks_are_replaced_with_their_ids(tmp_path):
    sinks = store_of(tmp_path / "sinks", 1000.0)
    sae = initial_sae(sinks, SHAPE.model_copy(update={"token_table": "mean"}), CFG, 0)
    trainer, rows = Trainer(sae, CFG), np.arange(40)
    x, ids = trainer.ordinary(sinks.read(rows), ids_of(sinks, rows))
    assert torch.equal(x[5], x[4]) and ids[5] == ids[4] and torch.equal(ids[6:], ids_of(sinks, rows)[6:])


def test_rows_straight_from_a_model_are_refused(tmp_path):
    class Online: d, meta = D, {}
    with pytest.raises(UserError, match="training.online"): train_sae(Online(), SHAPE.model_copy(update={"token_table": "mean"}), CFG, 0, tmp_path)


def test_a_sweep_varies_the_table(store, tmp_path):
    jobs = {how: Job(store, SHAPE.model_copy(update={"token_table": how}), CFG, 0, tmp_path / how) for how in ("none", "mean")}
    table = train_sweep(jobs, 0, tmp_path, rows=500).to_pydict()
    assert table["token_table"] == ["none", "mean"] and table["fvu"][1] < table["fvu"][0]


# --- encoding

def test_encoding_takes_the_table_off_and_decoding_adds_it(trained, store):
    sae, rows = trained.mean, store.where("test")[:100]
    x, tokens = store.read(rows), ids_of(store, rows)
    bare = replace_table(sae)
    told = sae.table(tokens)
    assert torch.allclose(sae.encode(x, tokens), bare.encode(x - told), atol=1e-5)
    assert torch.allclose(sae(x, tokens), bare(x - told) + told, atol=1e-4)
    assert torch.allclose(sae.decode(sae.encode(x, tokens), 8, tokens), bare.decode(bare.encode(x - told), 8) + told, atol=1e-4)


def replace_table(sae):
    "The same SAE without its table."
    bare = sae.with_groups(sae.group_sizes)
    bare.table = None
    bare.load_state_dict({n: t for n, t in sae.state_dict().items() if not n.startswith("table.")})
    return bare.eval().requires_grad_(False)


def test_every_way_to_encode_gives_one_answer(trained, store):
    for sae in (trained.mean, trained.learned):
        rows = store.where("test")[:300]
        expected = sae.encode(store.read(rows), ids_of(store, rows))
        assert np.allclose(encode_rows(sae, store, rows, batch=128).toarray(), expected, atol=1e-6)
        assert torch.allclose(Encoder(sae)(store.read(rows), ids_of(store, rows)), expected, atol=1e-6)
        few = BatchEncoder([FeatureEncoder.of(sae, [3, 20])])(store.read(rows)[None], ids_of(store, rows)[None])[0]
        assert torch.allclose(few, expected[:, [3, 20]], atol=1e-4)
        ever = encode_rows(sae, store, np.arange(len(store))).getnnz(0) > 0
        assert dead_share(store, sae, batch=500) == pytest.approx(float((~ever).mean()))


@pytest.mark.parametrize("kind", ["batch_topk", "topk"])
def test_rows_of_a_batch_may_have_tables_of_their_own(kind):
    torch.manual_seed(0)
    saes = [MatryoshkaSAE(D, (40,), 4, seed=i, kind=kind) for i in range(3)]
    for i, sae in enumerate(saes):
        sae.threshold.fill_(0.05)
        if i: sae.table = TokenTable(torch.arange(5), torch.randn(6, D))
    x, tokens, wanted = torch.randn(3, 7, D), torch.randint(-1, 7, (3, 7)), [[1, 5], [0], [2, 3, 7]]
    found = BatchEncoder([FeatureEncoder.of(s, f) for s, f in zip(saes, wanted, strict=True)])(x, tokens)
    for i, (sae, features) in enumerate(zip(saes, wanted, strict=True)):
        assert torch.allclose(found[i, :, :len(features)], sae.encode(x[i], tokens[i])[:, features], atol=1e-5)
    one, ids = x[:1].expand(2, -1, -1), tokens[:1].expand(2, -1)
    both = BatchEncoder([FeatureEncoder.of(saes[1], [0, 1]), FeatureEncoder.of(saes[1], [2])])
    assert both.residue(one, ids).stride(0) == 0 and torch.allclose(both(one, ids), both(one.contiguous(), ids.contiguous()), atol=1e-6)


def test_without_ids_nothing_is_encoded(trained, store):
    sae, x = trained.mean, store.read(np.arange(10))
    for how in (lambda: sae.encode(x), lambda: sae(x), lambda: sae.decode(torch.zeros(10, sae.width)), lambda: Encoder(sae)(x),
                lambda: BatchEncoder([FeatureEncoder.of(sae, [0])])(x[None]), lambda: Batch([clamping(sae, [0], [1.0])]).change(x[None])):
        with pytest.raises(UserError, match="token ids"): how()
    with pytest.raises(UserError, match="10 vectors came with 1 "): sae.encode(x, torch.tensor([3]))
    assert Batch([adding(torch.ones(D))]).change(x[None]).shape == (1, 1, D)                 # adding needs none
    bare = trained.none
    assert torch.equal(bare.encode(x, torch.zeros(10)), bare.encode(x))


def test_clamping_and_scaling_edit_the_features_of_the_residue(trained, store):
    sae, rows = trained.mean, store.where("test")[:50]
    x, tokens = store.read(rows), ids_of(store, rows)
    z = sae.encode(x, tokens)
    feature = int((z > 0).sum(0).argmax())
    for how, edited in ((clamping(sae, [feature], [2.5]), torch.full((50,), 2.5)), (scaling(sae, [feature], [3.0]), 3 * z[:, feature])):
        new = z.clone()
        new[:, feature] = edited
        expected = sae.decode(new, tokens=tokens) - sae.decode(z, tokens=tokens)
        assert torch.allclose(Batch([how]).change(x[None], tokens[None])[0], expected, atol=1e-3)


class Residues(Store):
    """The same store with the vectors that the features of an SAE with a token table read."""
    def __init__(self, folder, sae):
        super().__init__(folder)
        self.sae = sae

    def read(self, rows, device=None): return self.sae.residue(super().read(rows), ids_of(self, rows))


def test_whoever_reads_a_store_finds_what_a_plain_sae_finds_in_the_residues(trained, store, tmp_path):
    sae, bare, residues = trained.learned, replace_table(trained.learned), Residues(store.folder, trained.learned)
    cfg = ExemplarsConfig(min_explain=1, min_score=1, block=500)
    one, other = (collect_exemplars(s, m, cfg, 0, tmp_path / str(m.table is None)).to_pandas() for s, m in ((store, sae), (residues, bare)))
    assert len(one) and ((one.density - other.density).abs() < 1e-9).all() and np.allclose(one["max"], other["max"], atol=1e-4)
    caches = [export_delphi(s, m, tmp_path / f"delphi-{m.table is None}", splits=1) for s, m in ((store, sae), (residues, bare))]
    (a, b) = (load_file(next(folder.glob("*.safetensors"))) for folder in caches)
    assert np.array_equal(a["locations"], b["locations"]) and np.allclose(a["activations"], b["activations"], atol=1e-2)
    around, rows = context_windows(lean_tokens(store), 4), np.arange(100, 200, 7)
    assert np.array_equal(fired_in(store, sae, around, rows, block=60), fired_in(residues, bare, around, rows))
    assert np.allclose(at_l0(sae, store, 2.0).threshold, at_l0(bare, residues, 2.0).threshold, atol=1e-5)


# --- in a subject model

@pytest.fixture(scope="module")
def subject(): return random_mini(0)


@pytest.fixture(scope="module")
def of_subject(subject):
    """An SAE for its stream, with a table of half of all ids; and two studies."""
    sae = MatryoshkaSAE(256, (64,), k=8, seed=1)
    sae.scale.fill_(5.0)
    sae.threshold.fill_(0.02)
    ids = torch.arange(0, len(subject.tokenizer), 2)
    sae.table = TokenTable(ids, torch.randn(len(ids) + 1, 256, generator=torch.Generator().manual_seed(0)))
    source = open_source(StudiesConfig(source="phantom:3", train_patients=1, validation_patients=1, test_patients=2))
    return sae.requires_grad_(False), source.split("test")[:2]


@pytest.mark.parametrize("positions", ["all", "generated"])
def test_steering_knows_the_ids_of_what_is_read_and_written(subject, of_subject, positions):
    sae, studies = of_subject
    prompt, how = subject.prompt(studies[0]), clamping(sae, [1, 5, 7], [9.0, -6.0, 8.0], positions)
    rows = [adding(torch.zeros(1, 256)), how, scaling(sae, [2, 3], [-5.0, 6.0], positions)]
    written = write_steered(subject, prompt, rows, 4, 8, perplexity=False)
    ids, layer = list(prompt.ids), subject.model.get_submodule(layers_path(subject.model))[4]
    begin = 0 if positions == "all" else len(prompt) - 1
    def change(module, args, stream):                                # the whole text anew for every token, by the SAE itself
        z = sae.encode(stream[0], torch.tensor(ids))
        new = z.clone()
        new[:, [1, 5, 7]] = torch.tensor([9.0, -6.0, 8.0])
        new[:begin] = z[:begin]
        return stream + (sae.decode(new, tokens=torch.tensor(ids)) - sae.decode(z, tokens=torch.tensor(ids)))
    handle = layer.register_forward_hook(change)
    inputs = {name: t for name, t in subject.collate([prompt]).items() if name != "position_ids"}
    try:
        with torch.no_grad():
            for _ in range(8):
                here = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64)}
                ids.append(int(subject.model(**inputs | here).logits[0, -1].argmax()))
    finally: handle.remove()
    assert ids[len(prompt):][:len(written[1].ids)] == list(written[1].ids) and written[0].ids != written[1].ids


def test_splicing_an_sae_that_rebuilds_everything_changes_nothing(subject, of_subject):
    _, studies = of_subject
    sae = MatryoshkaSAE(256, (128, 384), k=256)
    sae.W_dec.data = torch.cat([torch.eye(256), -torch.eye(256)])
    sae.W_enc.data = sae.W_dec.data.T.contiguous()
    sae.threshold.fill_(0.0)
    sae.table = of_subject[0].table
    prompts = [subject.prompt(s, s.sections["findings"]) for s in studies]
    found = spliced_losses(subject, sae.requires_grad_(False), prompts, torch.zeros(256), ExtractionConfig(layer=4), "all")
    assert found["spliced"] == pytest.approx(found["clean"], rel=1e-4) and found["zero"] != pytest.approx(found["clean"], rel=1e-3)


def test_a_reading_is_encoded_with_its_ids(subject, of_subject):
    sae, studies = of_subject
    prompts = [subject.prompt(s, s.sections["findings"]) for s in studies]
    for reading, stream in zip(read_prompts(subject, Encoder(sae), 4, prompts), residuals(subject, prompts, 4), strict=True):
        assert np.allclose(reading.z.toarray(), sae.encode(stream.float().cpu(), reading.prompt.ids), atol=1e-4)


# --- keeping

def test_saved_and_loaded_it_is_the_same(trained, tmp_path):
    for sae in (trained.mean, trained.learned):
        sae.save(tmp_path / sae.token_table)
        again = MatryoshkaSAE.load(tmp_path / sae.token_table)
        assert again.token_table == sae.token_table and all(torch.equal(t, again.tensors()[n]) for n, t in sae.tensors().items())


@pytest.mark.parametrize("to", [f for f in FORMATS if f != "saerad"])
def test_formats_without_a_place_for_it_refuse_it(trained, tmp_path, to):
    with pytest.raises(UserError, match=f"token table, which {to} has no place for"): convert(trained.out / "mean", tmp_path / "out", to, force=True)
    assert not (tmp_path / "out").exists()


def test_a_copy_in_its_own_format_keeps_it(trained, tmp_path, store):
    folder = convert(trained.out / "learned", tmp_path / "copy", "saerad", store=store)
    again = MatryoshkaSAE.load(folder)
    assert again.token_table == "learned" and torch.equal(again.table.rows, trained.learned.table.rows)


def test_files_that_disagree_are_refused(trained, tmp_path):
    trained.mean.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "token_table"}), encoding="utf-8")
    with pytest.raises(UserError, match="disagree on a token table"): MatryoshkaSAE.load(tmp_path)


def test_the_doctor_says_so_and_measures_with_the_ids(trained, store):
    said = doctor(trained.out / "mean", store)
    assert f"token table   mean, of {len(trained.mean.table.ids)} token ids" in said and "token table" not in doctor(trained.out / "none")
    checkpoint = read_sae(trained.out / "mean")
    x, tokens = sample_vectors(store, checkpoint), sample_tokens(store, checkpoint)
    assert f"FVU {fvu(x, trained.mean(x, tokens)):.4f}" in said
    with pytest.raises(UserError, match="token ids"): replace(checkpoint).sae().encode(x)
