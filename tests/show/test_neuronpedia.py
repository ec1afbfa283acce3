"""What is written for other people's tools: the columns that Neuronpedia's exporter and importer name, and nothing that may not leave."""
import gzip
import json

import numpy as np
import pandas as pd
import pytest
import yaml

from saerad.core import UserError, read_table
from saerad.show.atlas import FEATURE_COLUMNS
from saerad.show.invented import invent_run
from saerad.show.neuronpedia import export_csv, export_neuronpedia

# the columns of Neuronpedia's export-data.py (commit 1a80fe9), by table; `notes` of its schema.prisma (commit 008d504)
NEURON = set("modelId layer index maxActApprox creatorId frac_nonzero freq_hist_data_bar_heights freq_hist_data_bar_values "
             "logits_hist_data_bar_heights logits_hist_data_bar_values neuron_alignment_indices neuron_alignment_l1 "
             "neuron_alignment_values correlated_neurons_indices "
             "correlated_neurons_l1 correlated_neurons_pearson decoder_weights_dist neg_str neg_values pos_str pos_values sourceSetName "
             "topkCosSimIndices topkCosSimValues vector vectorLabel hookName vectorDefaultSteerStrength hasVector".split())
EXPLANATION = set("id modelId layer index authorId description embedding notes typeName explanationModelName umap_x umap_y umap_cluster "
                  "umap_log_feature_sparsity".split())
# of SAEDashboard's converter to the same layout
ACTIVATION = set("id tokens index layer modelId maxValue maxValueTokenIndex minValue values creatorId dataSource dataIndex dfaValues dfaTargetIndex "
                 "dfaMaxValue createdAt lossValues logitContributions binMin binMax binContains qualifyingTokenIndex".split())


@pytest.fixture(scope="module")
def run(tmp_path_factory): return invent_run(tmp_path_factory.mktemp("run"))


def rows_of(path):
    with gzip.open(path, "rt", encoding="utf-8") as f: return [json.loads(line) for line in f]


def test_the_folder_is_that_of_the_importer(run, tmp_path):
    made = export_neuronpedia(run, tmp_path, model="mini")
    assert made == tmp_path / "mini/4-res-saerad"
    files = {p.relative_to(made).as_posix() for p in made.rglob("*") if p.is_file()}
    assert files == {*(f"{name}.jsonl" for name in ("model", "release", "sourceset", "source")),
                     *(f"{kind}/batch-0.jsonl.gz" for kind in ("features", "activations", "explanations"))}
    [source] = [json.loads(line) for line in (made / "source.jsonl").read_text(encoding="utf-8").splitlines()]
    assert (source["id"], source["modelId"], source["setName"]) == ("4-res-saerad", "mini", "res-saerad")


def test_every_line_has_the_columns_of_its_table_and_says_what_the_run_says(run, tmp_path):
    made = export_neuronpedia(run, tmp_path, model="mini", contexts=3)
    features, activations, explanations = (rows_of(made / f"{kind}/batch-0.jsonl.gz") for kind in ("features", "activations", "explanations"))
    scores = read_table(run / "interpretations/interpretations.parquet").to_pandas()
    table = read_table(run / "exemplars/features.parquet").to_pandas()
    assert set(features[0]) <= NEURON and set(activations[0]) <= ACTIVATION and set(explanations[0]) <= EXPLANATION
    assert [row["index"] for row in features] == [str(f) for f in table.feature] and all(row["layer"] == "4-res-saerad" for row in features)
    assert np.allclose([row["frac_nonzero"] for row in features], table.density, atol=1e-6)
    for row, histogram in zip(features[:40], table.histogram[:40], strict=True):
        heights, values = row["freq_hist_data_bar_heights"], row["freq_hist_data_bar_values"]
        assert sum(heights) == sum(histogram) and len(heights) == len(values) and values == sorted(values)
    explained = scores[scores.explanation != ""]
    assert all(row["typeName"] is row["explanationModelName"] is None for row in explanations), "an instance refuses names it has not"
    assert {row["notes"] for row in explanations} == {"by saerad's interpreter lexical, protocol paper"}
    assert {row["index"]: row["description"] for row in explanations} == dict(zip(explained.feature.astype(str), explained.explanation, strict=True))
    assert len({row["id"] for row in activations}) == len(activations)
    for row in activations:
        assert row["values"][row["maxValueTokenIndex"]] == row["maxValue"] == max(row["values"]) and len(row["tokens"]) == len(row["values"])
    again = export_neuronpedia(run, tmp_path / "again", model="mini", contexts=3)
    assert all(p.read_bytes() == (again / p.relative_to(made)).read_bytes() for p in made.rglob("*") if p.is_file())
    with pytest.raises(UserError, match="is not empty"): export_neuronpedia(run, tmp_path, model="mini")


def test_text_that_may_not_leave_is_not_written(tmp_path):
    run = invent_run(tmp_path / "run")
    (tmp_path / "reports.csv").write_text("study,patient,findings\n" + "".join(f"s{i},p{i},Clear lungs.\n" for i in range(9)), encoding="utf-8")
    settings = {"studies": {"source": f"table:{tmp_path / 'reports.csv'}"}, "subject": {"model": "mini"}}
    (run / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    with pytest.raises(UserError, match="may not leave"): export_neuronpedia(run, tmp_path / "upload")
    assert not (tmp_path / "upload").exists()
    made = export_neuronpedia(run, tmp_path / "upload", texts=False)
    assert not (made / "activations").exists() and "There" not in "".join(map(str, rows_of(made / "features/batch-0.jsonl.gz")))


def test_the_table_as_csv_is_the_atlas_table_and_holds_no_formula(run, tmp_path):
    table = pd.read_csv(export_csv(run, tmp_path / "features.csv"))
    assert list(table.columns) == [column["name"] for column in FEATURE_COLUMNS] and len(table) == 160
    text = (tmp_path / "features.csv").read_text(encoding="utf-8")
    assert not any(cell.startswith(("=", "@")) for line in text.splitlines() for cell in line.split(","))
