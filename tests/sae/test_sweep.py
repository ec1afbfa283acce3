"""Sweeps: combinations, one table, and each SAE as it would have been alone."""
import json

import numpy as np
import pytest

from saerad.core import UserError, read_table
from saerad.run.cli import run_sweep
from saerad.run.config import load_config, validated, with_settings
from saerad.sae.model import MatryoshkaSAE
from saerad.sae.sweep import combinations
from saerad.show.run_folder import Run

SMALL = {"studies": {"source": "phantom:3", "train_patients": 14, "validation_patients": 3, "test_patients": 2}, "extraction": {"layer": 4},
         "training": {"steps": 20, "batch_size": 128, "start_rows": 256, "lr": 0.003, "threshold_start": 0.0},
         "sweep": {"grid": {"sae.k": [8, 16], "seed": [0, 1], "extraction.layer": [4, 2]}, "rows": 300}}


def test_combinations_have_names_that_can_be_folders():
    found = combinations({"sae.k": [1, 2], "sae.group_fractions": [[0.5, 0.5]], "training.lr": [None]})
    assert list(found) == ["k=1,group_fractions=_0.5,_0.5_,lr=None", "k=2,group_fractions=_0.5,_0.5_,lr=None"]
    assert found["k=1,group_fractions=_0.5,_0.5_,lr=None"] == ["sae.k=1", "sae.group_fractions=[0.5, 0.5]", "training.lr=null"]


def test_a_sweep_over_layers_and_seeds(tmp_path):
    from saerad.activations.extraction import extract
    from saerad.run.config import changed
    from saerad.sae.training import train_sae
    config = validated(SMALL, "the test")
    run = Run(tmp_path, config)
    extract(run.source, run.subject, config.extraction, tmp_path / "activations")
    variants = {name: changed(config, values) for name, values in combinations(config.sweep.grid).items()}
    table = run_sweep(run, variants).to_pandas()
    assert len(table) == 8 and table["name"].is_unique and set(table["k"]) == {8, 16} and table["store"].nunique() == 2
    assert np.isfinite(table[["fvu", "l0", "silent", "decoder_cosine", "seed_agreement"]].to_numpy()).all()
    assert (table["split"] == "validation").all() and (table["rows"] == 300).all()
    assert read_table(tmp_path / "sweep/table.parquet").num_rows == 8
    for kind in ("svg", "png"): assert (tmp_path / f"sweep/sweep.{kind}").stat().st_size > 1000
    alone = variants["k=16,seed=0,layer=4"]
    train_sae(run.store, alone.sae, alone.training, 0, tmp_path / "alone")
    there = tmp_path / "sweep/k=16,seed=0,layer=4"
    assert (there / "sae.safetensors").read_bytes() == (tmp_path / "alone/sae.safetensors").read_bytes()
    assert MatryoshkaSAE.load(there).k == 16 and json.loads((there / "config.json").read_text(encoding="utf-8"))["k"] == 16


def test_keys_that_cannot_vary_are_named(tmp_path):
    config = validated(SMALL, "the test")
    other = validated(with_settings(SMALL, ["figures={}", "steering.alphas=[1]"]), "the test")
    with pytest.raises(UserError, match="sweep.grid"): run_sweep(Run(tmp_path, config), {"a": other})


def test_the_shipped_configs_have_a_sweep():
    from pathlib import Path
    for path in (Path(__file__).parents[2] / "configs").glob("*.yaml"): assert len(combinations(load_config(path).sweep.grid)) >= 2
