"""Lengths of vectors: attention sinks are found, named, replaced in batches, and change neither scale nor dictionary."""
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from saerad.activations.extraction import ExtractionConfig, extract
from saerad.activations.norms import norm_limit, norm_summary, norm_table, ordinary_rows, sink_sentence, write_norms
from saerad.activations.store import TOKEN_SCHEMA, Store, StoreWriter
from saerad.core import read_json
from saerad.sae.convert import convert, doctor
from saerad.sae.evaluation import reconstruction
from saerad.sae.model import MatryoshkaSAE, SAEConfig
from saerad.sae.training import Trainer, TrainingConfig, initial_sae, train_sae
from saerad.studies.record import StudiesConfig
from saerad.studies.sources import open_source
from saerad.subjects.subject import open_subject


def store_of(folder, sinks: float, every: int = 1) -> Store:
    """160 studies of 40 tokens; in one of `every` the first token is `sinks` times as long."""
    draw = torch.Generator().manual_seed(7)
    basis = torch.randn(24, 16, generator=draw)
    with StoreWriter(folder, "key", 16, "float32") as writer:
        for n in range(160):
            on = torch.rand(40, 24, generator=draw) < 0.1
            rows = (torch.rand(40, 24, generator=draw) * on) @ basis + 1
            if n % every == 0: rows[0] *= sinks
            of_study = {"study": [f"s{n}"] * 40, "patient": [f"p{n}"] * 40, "split": ["train" if n < 120 else "test"] * 40}
            of_token = {"position": list(range(40)), "section": ["boilerplate"] * 3 + ["findings"] * 37, "token_id": [0] * 40, "text": ["x"] * 40}
            empty = {"view": [""] * 40} | {k: [-1] * 40 for k in ("row", "col", "start", "end")}
            writer.add(rows, pa.table(of_study | of_token | empty).select(TOKEN_SCHEMA.names).cast(TOKEN_SCHEMA))
        writer.finish()
    return Store.open(folder)


@settings(max_examples=60, deadline=None)
@given(some.lists(some.sampled_from([1.0, 50.0]), min_size=1, max_size=30))
def test_rows_that_are_too_long_are_replaced_by_the_one_before(lengths):
    x = torch.tensor(lengths)[:, None] * torch.ones(1, 4) / 2 + torch.arange(len(lengths))[:, None] * 1e-3
    out, fits = ordinary_rows(x, 10.0), [n == 1 for n in lengths]
    if not any(fits):
        assert torch.equal(out, x)
        return
    for i, row in enumerate(out):
        before = [j for j in range(i + 1) if fits[j]]
        assert torch.equal(row, x[before[-1] if before else fits.index(True)])
    assert ordinary_rows(x, None) is x and ordinary_rows(x, 1e6) is x


def test_sinks_are_named_by_section_and_place(tmp_path):
    store = store_of(tmp_path / "sinks", 100.0)
    said = write_norms(store)
    assert "160 of 6400 tokens" in said and "boilerplate at position 0" in said and "training.max_norm" in said
    kept = read_json(tmp_path / "sinks/norms.json")
    assert kept["longer"] == 160 and kept["share_of_squares"] > 0.95 and {g["place"] for g in kept["groups"]} == {"0", "1", "2", "later"}
    assert write_norms(store) == "" and sink_sentence(norm_summary(norm_table(store_of(tmp_path / "plain", 1.0)))) == ""


def test_a_part_of_the_studies_is_looked_at_whole(tmp_path):
    table = norm_table(store_of(tmp_path / "s", 100.0), studies=7)
    assert len(table) == 7 * 40 and (table.place == "0").sum() == 7 and (table.length > 10 * table.length.median()).sum() == 7


def test_sinks_change_neither_scale_nor_dictionary(tmp_path):
    cfg = TrainingConfig(steps=150, batch_size=256, lr=5e-3, start_rows=1024, threshold_beta=0.9)
    found = {}
    for name, sinks, times in (("plain", 1.0, 10.0), ("sinks", 100.0, 10.0), ("all", 100.0, None)):
        store = store_of(tmp_path / name, sinks, every=12)                           # one token in 480
        sae = train_sae(store, SAEConfig(expansion=4, k=4), cfg.model_copy(update={"max_norm": times}), 0, tmp_path / f"{name}-sae")
        found[name] = sae, reconstruction(store, sae, store.where("test"))
    plain, sinks, everything = (found[n] for n in ("plain", "sinks", "all"))
    assert abs(float(sinks[0].scale / plain[0].scale) - 1) < 0.05 and float(everything[0].scale / plain[0].scale) > 2
    assert abs(sinks[1]["fvu_without_sinks"] - plain[1]["fvu"]) < 0.02 and plain[1]["sinks"] == 0 < sinks[1]["sinks"]
    assert everything[1]["fvu_without_sinks"] > 1.5 * sinks[1]["fvu_without_sinks"]
    again = MatryoshkaSAE.load(tmp_path / "sinks-sae")
    assert again.max_norm == sinks[0].max_norm and MatryoshkaSAE.load(tmp_path / "all-sae").max_norm is None
    for to in ("sae_lens", "saerad"): convert(tmp_path / "sinks-sae", tmp_path / to, to)
    convert(tmp_path / "sae_lens", tmp_path / "back", "saerad")
    for name in ("saerad", "back"): assert (tmp_path / name / "config.json").read_bytes() == (tmp_path / "sinks-sae/config.json").read_bytes()
    assert "attention sinks with 9" in doctor(tmp_path / "sinks-sae", store_of(tmp_path / "more", 100.0, every=4))


def test_without_sinks_nothing_changes(tmp_path):
    store = store_of(tmp_path / "s", 1.0)
    cfg = TrainingConfig(steps=10, batch_size=64, start_rows=256)
    for times in (10.0, None): train_sae(store, SAEConfig(expansion=2, k=4), cfg.model_copy(update={"max_norm": times}), 0, tmp_path / str(times))
    assert (tmp_path / "10.0/sae.safetensors").read_bytes() == (tmp_path / "None/sae.safetensors").read_bytes()


@pytest.mark.parametrize("engine", ["reference", "dense", "sparse"])
def test_a_checkpoint_knows_the_limit(tmp_path, engine):
    store = store_of(tmp_path / "s", 100.0, every=12)
    cfg = TrainingConfig(steps=20, batch_size=64, start_rows=256, engine=engine)
    first, second = (Trainer(initial_sae(store, SAEConfig(expansion=2, k=4), cfg, 0), cfg) for _ in range(2))
    x = store.read(np.arange(64))
    first.train_step(x)
    first.save(tmp_path / "state.safetensors", "print")
    second.sae.max_norm = None
    assert second.restore(tmp_path / "state.safetensors", "print") and second.sae.max_norm == first.sae.max_norm == norm_limit_of(store, cfg)
    assert first.train_step(x) == second.train_step(x)


def norm_limit_of(store, cfg) -> float:
    reader = store.batches("train", cfg.batch_size, 0)
    return norm_limit(torch.cat([next(reader)[2] for _ in range(cfg.start_rows // cfg.batch_size)]), 10.0)


def test_a_store_that_was_finished_without_its_lengths_gets_them(tmp_path):
    source = open_source(StudiesConfig(source="phantom:0", train_patients=2, validation_patients=1, test_patients=1))
    subject, cfg = open_subject(), ExtractionConfig(layer=1)
    extract(source, subject, cfg, tmp_path)
    written = (tmp_path / "norms.json").read_bytes()
    (tmp_path / "norms.json").unlink()              # killed between the store and its lengths
    extract(source, subject, cfg, tmp_path)
    assert (tmp_path / "norms.json").read_bytes() == written
