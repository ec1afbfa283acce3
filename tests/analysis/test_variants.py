"""Variants of a run: the same bytes as runs of their own, nothing done twice, and differences against plain statistics."""
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from saerad.analysis.variants import differences, run_variants, t_interval, variant_table
from saerad.core import UserError, read_json
from saerad.run.checks import check_hookpoints
from saerad.run.config import changed, validated
from saerad.run.stages import run_config

SMALL = {"studies": {"source": "phantom:3", "train_patients": 14, "validation_patients": 3, "test_patients": 4},
         "extraction": {"layer": 4, "more_layers": [2]},
         "sae": {"expansion": 1}, "training": {"steps": 20, "batch_size": 128, "start_rows": 256, "lr": 0.003, "threshold_start": 0.0},
         "evaluation": {"loss_studies": 2, "report_studies": 0, "rows": 300}}
SETTINGS = {"a": ["sae.k=8"], "b": ["sae.k=16"], "c": ["sae.k=8", "seed=1", "extraction.layer=2"]}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("variants")
    return folder, run_variants(validated(SMALL, "the test"), SETTINGS, folder, say=lambda line: None)


def test_a_variant_has_the_bytes_of_a_run_of_its_own(done, tmp_path):
    folder, variants = done
    for name in ("b", "c"):
        own = changed(validated(SMALL, "the test"), [*SETTINGS[name], "extraction.more_layers=[]"])
        run_config(own, tmp_path / name, last="evaluate", say=lambda line: None)
        for file in ("sae/sae.safetensors", "sae/concepts.parquet", "config.yaml"):
            assert (variants[name] / file).read_bytes() == (tmp_path / name / file).read_bytes(), (name, file)
        stages = read_json(variants[name] / "manifest.json")["stages"]
        assert stages.keys() == {"train", "evaluate"} and all(
            stages[s]["key"] == read_json(tmp_path / name / "manifest.json")["stages"][s]["key"] for s in stages)


def test_what_is_finished_is_skipped_and_what_is_lost_is_made_again(done):
    folder, variants = done
    lines = []
    before = (variants["a"] / "sae/sae.safetensors").read_bytes()
    run_variants(validated(SMALL, "the test"), SETTINGS, folder, say=lines.append)
    assert lines == ["extract    finished before"]
    (variants["a"] / "sae/sae.safetensors").unlink()
    run_variants(validated(SMALL, "the test"), SETTINGS, folder, say=lines.append)
    assert [line.split()[:2] for line in lines[2:]] == [["a:", "train"]]
    assert (variants["a"] / "sae/sae.safetensors").read_bytes() == before


def test_what_cannot_be_shared_is_named(tmp_path):
    for setting, word in (("studies.test_patients=2", "studies"), ("extraction.boilerplate=true", "extraction"), ("extraction.layer=5", "layer 5")):
        with pytest.raises(UserError, match=word): run_variants(validated(SMALL, "the test"), {"x": [setting]}, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_variant_has_one_hookpoint_with_its_own_image_tokens(tmp_path):
    """Where the further layers keep other image tokens than the main one, and concept sets are steered at one of them."""
    more = {"extraction": {"layer": 4, "more_layers": [2], "more_image_tokens": "sample:4"}, "concept_sets": {"size": 2, "hookpoint": 2}}
    settings = {"x": ["sae.k=8"], "y": ["sae.k=8", "extraction.layer=2"]}
    variants = run_variants(validated(SMALL | more, "the test"), settings, tmp_path, "train", lambda line: None)
    for variant, tokens, sets in ((variants["x"], "last", 0), (variants["y"], "sample:4", 2)):
        assert variant.config.extraction.image_tokens == variant.store.meta["made_from"]["settings"]["image_tokens"] == tokens
        assert variant.config.concept_sets.size == sets and variant.config.extraction.more_layers == ()
        check_hookpoints(variant.config)


def test_a_table_has_the_numbers_of_every_variant(done):
    table = variant_table(done[1], SETTINGS).set_index("name")
    for name, variant in done[1].items():
        evaluation = read_json(variant / "sae/evaluation.json")
        assert table.fvu[name] == evaluation["fvu"] and table.loss_mean[name] == evaluation["loss_mean"]
    assert list(table.k) == [8, 16, 8] and table.seed["c"] == 1 and table.layer["c"] == 2
    assert (table.features == 256).all() and "interpretation_features" not in table    # that stage has not run


def test_t_interval_is_that_of_the_t_test():
    x = np.array([0.3, 0.1, 0.25, 0.5])
    mean, low, high = t_interval([*x, float("nan")])
    assert (low, high) == pytest.approx(stats.t.interval(0.95, 3, loc=x.mean(), scale=stats.sem(x))) and mean == pytest.approx(x.mean())
    assert np.isnan(t_interval([0.3])[1]) and np.isnan(t_interval([])[0])


def test_differences_are_paired_by_seed():
    table = pd.DataFrame({"order": ["a", "a", "b", "b"], "seed": [0, 1, 1, 0], "f1": [0.2, 0.6, 0.7, 0.3]})
    row = differences(table, "order", "a", ["f1"]).iloc[0]
    assert row.pairs == 2 and row.difference == pytest.approx(0.1) and row.high - row.low == pytest.approx(0, abs=1e-9)
