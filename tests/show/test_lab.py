"""What features, runs, comparisons and studies show when they end a cell."""
import re
from urllib.parse import unquote

import pyarrow as pa
import pytest
import torch
from test_atlas import NASTY, with_views

from saerad.core import UserError, write_json, write_table
from saerad.sae.model import MatryoshkaSAE
from saerad.show.atlas import write_atlas
from saerad.show.invented import invent_run
from saerad.show.lab import compare, compare_sweep, feature_twins, open_run
from saerad.show.run_folder import Run
from saerad.studies.record import Study, View


@pytest.fixture(scope="module")
def run(tmp_path_factory): return open_run(invent_run(tmp_path_factory.mktemp("run")))


def test_a_run_shows_its_headlines(run):
    shown = run._repr_html_()
    assert "variance stays unexplained" in shown and shown.count("<li>") == 11


def test_a_feature_shows_its_explanation_scores_and_contexts_escaped(run):
    best = int(run.features.f1.idxmax())
    shown = run[best]._repr_html_()
    assert f"feature {best}" in shown and "f1 0." in shown and "shuffled f1" in shown and "rgba(0,114,178" in shown
    assert "&lt;b&gt;&amp;" in shown and "<b>&" not in shown
    with pytest.raises(UserError, match="no feature 999"): run[999]


def test_a_feature_that_fires_on_images_shows_its_views_with_patches_and_boxes(tmp_path):
    folder = invent_run(tmp_path)
    feature = open_run(folder)[with_views(folder)]
    shown = feature._repr_html_()
    assert shown.count("<svg") == 1 and "data:image/webp;base64," in shown and shown.count('fill="#F0A000"') == 2
    assert shown.count("fill:none;stroke:white") == shown.count("fill:none;stroke:black") > 0 and "class=" not in shown
    assert NASTY not in shown and "&lt;script&gt;" in shown
    table = feature.run.features
    assert "<svg" not in feature.run[table[(table.in_image < 0.1) & table.f1.notna()].feature.iloc[0]]._repr_html_()


def test_finding_wants_all_words_best_first(run):
    rows = run.find("WORD effusion")
    assert len(rows) and rows.explanation.str.contains("effusion").all() and rows.f1.dropna().is_monotonic_decreasing
    assert not len(run.find("effusion pneumothorax"))


def test_a_comparison_shows_what_differs(run, tmp_path):
    other = invent_run(tmp_path / "other", seed=1)
    comparison = compare(run.folder, other)
    assert not len(comparison.settings) and "The settings are the same" in comparison._repr_html_() and (comparison.numbers["change"] == 0).all()
    write_json(other / "config.yaml", {"sae": {"k": 16}, "out": "x"})      # JSON is YAML
    write_json(run.folder / "config.yaml", {"sae": {"k": 32}, "out": "y"})
    try: assert compare(run.folder, other).settings.loc["sae.k"].tolist() == [32, 16]
    finally: (run.folder / "config.yaml").unlink()
    assert compare(run.folder, run.folder).names == [f"{run.folder.name} (1)", f"{run.folder.name} (2)"]
    with pytest.raises(UserError, match="at least two"): compare(run.folder)
    with pytest.raises(UserError, match="is no run"): compare(run.folder, tmp_path)


def test_runs_meet_at_the_same_concept(run, tmp_path):
    other = invent_run(tmp_path / "other", seed=1)
    found = compare(run.folder, other)
    folders = zip(found.names, (run.folder, other), strict=True)
    table = {name: Run(folder).table("sae/concepts.parquet").set_index("concept") for name, folder in folders}
    for name in found.names:
        mine = found.concepts[name]
        assert set(mine.index) == set(table[name].index) and (mine.feature == table[name].feature.reindex(mine.index)).all()
    write_atlas(other)
    named, page = compare(run.folder, other), tmp_path / "pages/comparison.html"
    named.concepts.iloc[0, 2] = NASTY
    text = named.write(page).read_text(encoding="utf-8")
    assert all(f">{concept}</th>" in text for concept in found.concepts.index) and NASTY not in text and "&lt;script&gt;" in text
    links = re.findall(r'<a href="([^#]*)#feature=(\d+)">(\d+)</a>', text)
    assert [int(f) for _, f, _ in links] == found.concepts[found.names[1]].feature.dropna().astype(int).tolist()
    assert all(shown == f and (page.parent / unquote(at)).resolve() == other / "atlas/index.html" for at, f, shown in links)
    with pytest.raises(UserError, match="no sweep"): compare_sweep(run.folder)


def test_a_feature_finds_its_twin_in_another_sae_of_a_sweep(tmp_path):
    run = invent_run(tmp_path / "run")
    ours, theirs = MatryoshkaSAE(16, [160], 4), MatryoshkaSAE(16, [200], 4)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))[:160]
    theirs.W_dec.data = torch.randn(200, 16, generator=torch.Generator().manual_seed(1))
    theirs.W_dec.data[order] = 2 * ours.W_dec.data
    for sae, folder in ((ours, run / "sae"), (theirs, run / "sweep/k=4")):
        sae.threshold.fill_(0.1)
        sae.save(folder)
    twins = feature_twins(ours, theirs, block=50)
    assert twins.twin.tolist() == order.tolist() and (twins.cosine > 0.999).all()
    table = compare_sweep(run)
    assert (table["k=4"].twin == order[table["run"].feature.to_numpy()].numpy()).all()
    same = {"group_order": "ascending", "store": "activations", "token_table": False, "split": "test"}
    rows = [same | {"name": name, "k": k, "kind": kind, "fvu": k / 100}
            for name, k, kind in (("k=4", 4, "topk"), ("k=8", 8, "batch_topk"))]
    write_table(run / "sweep/table.parquet", pa.Table.from_pylist(rows))
    beside = compare(run)
    assert beside.settings.index.tolist() == ["kind"] and beside.numbers.loc["fvu"].tolist() == [0.04, 0.08] and beside.concepts.equals(table)
    assert str(table["k=4"].twin.iloc[0]) in beside.write(tmp_path / "sweep.html").read_text(encoding="utf-8")
    with pytest.raises(UserError): feature_twins(ours, MatryoshkaSAE(8, [16], 2))


def test_a_study_shows_its_views_and_texts_escaped(tmp_path):
    (tmp_path / "broken.png").write_text("no picture", encoding="utf-8")
    study = Study("s<1>", "p1", "train", {"findings": "<script>x</script> clear"}, {"frontal": View.from_file(tmp_path / "broken.png")})
    shown = study._repr_html_()
    assert "&lt;script&gt;" in shown and "<script>" not in shown and "s&lt;1&gt;" in shown and "unreadable" in shown and "truth" not in shown


def test_groups_show_themselves_and_one_shows_its_members_and_contexts_escaped(run):
    assert len(run.groups) == len(run.groups.table) > 5 and run.groups._repr_html_().count("<details>") == len(run.groups)
    shown, row = run.groups[1]._repr_html_(), run.groups[1].row
    assert f"group 1: {row['name']}" in shown and shown.count("<li>") == row["size"] and "&lt;b&gt;" in shown and "<b>&" not in shown
    with pytest.raises(UserError, match="has no group 99"): run.groups[99]
