"""Figures of a run: drawn from its tables, skipped with a reason, and the same bytes every time."""
import json
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import yaml
from PIL import Image

from saerad.core import UserError, read_table, write_json, write_table
from saerad.show.figures import (
    OUTCOME_COLOURS,
    PLOTS,
    SHADES,
    FiguresConfig,
    collect_concepts,
    collect_density,
    collect_doses,
    collect_effects,
    collect_f1,
    collect_fidelity,
    collect_film,
    collect_levels,
    collect_negatives,
    collect_on_target,
    collect_signs,
    collect_steering,
    draw_figures,
    draw_plot,
    house_style,
    plot_f1,
    plot_fidelity,
)
from saerad.show.invented import invent_run
from saerad.show.run_folder import Run
from saerad.steering.judges import OUTCOMES


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return invent_run(tmp_path_factory.mktemp("run"))


def grey(colour):
    return float(np.dot(mpl.colors.to_rgb(colour), (0.299, 0.587, 0.114)))


def test_every_figure_is_written_three_times(run):
    drawn = draw_figures(run, FiguresConfig(dpi=60))
    assert set(drawn.written) == set(PLOTS) - {"film"} and drawn.skipped == {"film": "config.yaml is not there"}
    for name in drawn.written:
        svg, png, numbers = (run / "figures" / f"{name}{ending}" for ending in (".svg", ".png", ".csv"))
        assert svg.read_text(encoding="utf-8").startswith("<?xml") and len(pd.read_csv(numbers)) > 0
        assert Image.open(png).width == pytest.approx(60 * (7 if PLOTS[name].wide else 3.5), abs=1)


@pytest.mark.parametrize("name", ["training", "density", "steering"])
def test_drawing_again_gives_the_same_bytes(run, tmp_path, name):
    other = invent_run(tmp_path)
    for folder in (run, other): draw_figures(folder, FiguresConfig(dpi=60), [name])
    for ending in (".svg", ".png", ".csv"):
        first, second = ((folder / "figures" / f"{name}{ending}").read_bytes() for folder in (run, other))
        assert first == second
    assert b"dc:date" not in (run / "figures" / f"{name}.svg").read_bytes()


def test_changed_numbers_change_the_figure(run, tmp_path):
    other = invent_run(tmp_path, seed=1)
    for folder in (run, other): draw_figures(folder, FiguresConfig(dpi=60), ["f1"])
    assert (run / "figures/f1.svg").read_bytes() != (other / "figures/f1.svg").read_bytes()


def test_an_unfinished_run_skips_by_name_and_leaves_nothing_stale(tmp_path):
    invent_run(tmp_path)
    draw_figures(tmp_path, FiguresConfig(dpi=60), ["steering", "f1"])
    (tmp_path / "steering/judgements.parquet").unlink()
    drawn = draw_figures(tmp_path, FiguresConfig(dpi=60), ["steering", "f1"])
    assert drawn.written == ["f1"] and drawn.skipped == {"steering": "steering/judgements.parquet is not there"}
    assert not list((tmp_path / "figures").glob("steering.*"))
    assert set(draw_figures(tmp_path / "empty").skipped) == set(PLOTS)


def test_tables_without_rows_are_skipped_too(tmp_path):
    invent_run(tmp_path)
    for name in ("steering/judgements.parquet", "interpretations/interpretations.parquet", "sae/concepts.parquet"):
        write_table(tmp_path / name, read_table(tmp_path / name).slice(0, 0))
    for name in ("steering", "signs", "f1", "precision_recall", "frequency_f1", "concepts"):
        assert draw_plot(name, tmp_path) == "there are no numbers to draw", name


def test_a_run_in_which_nothing_could_be_scored_or_fired(tmp_path):
    invent_run(tmp_path)
    path = tmp_path / "interpretations/interpretations.parquet"
    table = read_table(path).to_pandas()
    table[["f1", "precision", "recall"]] = np.nan
    write_table(path, pa.Table.from_pandas(table))
    features = read_table(tmp_path / "exemplars/features.parquet").to_pandas()
    features["density"] = 0.0
    write_table(tmp_path / "exemplars/features.parquet", pa.Table.from_pandas(features))
    assert draw_plot("f1", tmp_path) == draw_plot("sections", tmp_path) == "there are no numbers to draw"
    assert draw_plot("density", tmp_path) == "there are no numbers to draw"


def test_one_scored_feature_is_enough_for_its_figures(tmp_path):
    invent_run(tmp_path)
    path = tmp_path / "interpretations/interpretations.parquet"
    table = read_table(path).to_pandas()
    write_table(path, pa.Table.from_pandas(table[table.f1.notna()].head(1)))
    for name in ("f1", "precision_recall", "frequency_f1"): assert not isinstance(draw_plot(name, tmp_path), str), name


def test_the_numbers_behind_steering_are_shares_with_random_directions_apart(run):
    numbers = collect_steering(Run(run))
    assert numbers[list(OUTCOMES)].sum(axis=1).tolist() == pytest.approx([1] * 8)
    assert numbers.control.tolist() == [False] * 4 + [True] * 4 and numbers.reports.tolist() == [48] * 4 + [6] * 4
    assert numbers.pushed.tolist() == ["feature"] * 4 + ["random"] * 4
    judged = read_table(run / "steering/judgements.parquet").to_pandas()
    mine = judged[~judged.control & (judged.alpha == 10)]
    assert numbers[(~numbers.control) & (numbers.alpha == 10)].unchanged.item() == pytest.approx((mine.outcome == "unchanged").mean())


def test_a_degenerate_report_counts_as_nothing_else(tmp_path):
    rows = [{"feature": 1, "alpha": a, "outcome": "on_target_only", "degenerate": a > 0, "control": False} for a in (-5.0, 5.0)]
    write_table(tmp_path / "steering/judgements.parquet", pa.Table.from_pylist(rows))
    numbers = collect_steering(Run(tmp_path)).set_index("alpha")
    assert numbers.degenerate.to_dict() == {-5.0: 0, 5.0: 1} and numbers.on_target_only.to_dict() == {-5.0: 1, 5.0: 0}


def test_signs_need_both_signs_and_leave_random_directions_out(run, tmp_path):
    assert len(collect_signs(Run(run))) == 8
    rows = [{"feature": 1, "alpha": a, "outcome": "mixed", "degenerate": False, "control": False} for a in (5.0, 10.0)]
    write_table(tmp_path / "steering/judgements.parquet", pa.Table.from_pylist(rows))
    assert collect_signs(Run(tmp_path)) is None


def test_prefixes_are_ordered_as_numbers_and_missing_parts_of_an_evaluation_are_fine(run, tmp_path):
    numbers = collect_fidelity(Run(run))
    assert numbers[numbers.panel == "prefix"].name.tolist() == ["64", "128", "256", "512", "1024"]
    write_json(tmp_path / "sae/evaluation.json", {"fvu_by_prefix": {"8": 0.5}, "fvu_by_section": {"findings": 0.5}})
    assert not isinstance(draw_plot("fidelity", tmp_path), str)


def test_only_scored_features_and_examined_concepts_are_drawn(run):
    scores = read_table(run / "interpretations/interpretations.parquet").to_pandas()
    assert len(collect_f1(Run(run))) == scores.f1.notna().sum() < len(scores)
    assert collect_concepts(Run(run)).auroc_test.is_monotonic_decreasing
    assert len(collect_density(Run(run))) == len(scores), "dead features count too"


def test_colours_keep_their_order_in_grey():
    outcomes = sorted(grey(c) for c in OUTCOME_COLOURS.values())
    assert min(np.diff(outcomes)) > 0.1 and list(OUTCOME_COLOURS) == list(OUTCOMES)
    assert min(np.diff([grey(c) for c in SHADES])) > 0.05


def test_the_house_style_stays_in_the_house():
    before = dict(mpl.rcParams)
    with house_style(): assert mpl.rcParams["svg.hashsalt"] == "saerad"
    assert dict(mpl.rcParams) == before


def test_csv_is_what_was_drawn(run):
    draw_figures(run, FiguresConfig(dpi=60), ["f1"])
    _, numbers = draw_plot("f1", run)
    pd.testing.assert_frame_equal(pd.read_csv(run / "figures/f1.csv"), numbers.reset_index(drop=True), check_dtype=False, rtol=1e-5)


def test_a_film_is_drawn_for_the_phantom_and_never_for_another_source(tmp_path):
    studies = {"source": "phantom:0", "train_patients": 2, "validation_patients": 1, "test_patients": 3}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"studies": studies}), encoding="utf-8")
    numbers = collect_film(Run(tmp_path))
    assert np.ptp(np.array(numbers.attrs["image"])) > 50 and (numbers.right > numbers.left).all() and numbers.study.nunique() == 1
    assert not isinstance(draw_plot("film", tmp_path), str)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"studies": studies | {"source": "mimic-cxr:/data"}}), encoding="utf-8")
    assert draw_plot("film", tmp_path) == "there are no numbers to draw"


def test_lines_of_a_log_and_absent_files(tmp_path):
    tables = Run(tmp_path)
    assert tables.table("a.parquet") is None and tables.json("a.json") is None and tables.settings == {}
    (tmp_path / "log.jsonl").write_text('{"a": 1}\n\n{"a": 2}\n', encoding="utf-8")
    assert tables.json("log.jsonl") == [{"a": 1}, {"a": 2}]
    assert json.loads((invent_run(tmp_path) / "summary.json").read_text(encoding="utf-8"))["sae"]["k"] == 32 and Path(tmp_path).exists()


def test_each_figure_is_a_function_of_a_run_that_returns_its_axes(run, tmp_path):
    ax = plot_f1(run)
    assert ax.get_xlabel().startswith("F1") and ax.figure.get_size_inches()[0] == FiguresConfig().column
    given = mpl.figure.Figure().subplots()
    assert plot_f1(Run(run), given) is given and given.patches
    assert len(plot_fidelity(run)) == 3
    with pytest.raises(UserError, match="interpretations.parquet is not there"): plot_f1(tmp_path)
    mpl.pyplot.close("all")


def test_doses_have_intervals_over_patients_and_controls_apart(run):
    numbers = collect_doses(Run(run))
    ours = numbers[(numbers.pushed == "feature") & (numbers.what == "changed")].set_index("alpha")
    assert ours.index.tolist() == [-10, -5, 5,
                                   10] and (ours.low <= ours.share).all() and (ours.share <= ours.high).all() and (ours.high > ours.low).all()
    judged = read_table(run / "steering/judgements.parquet").to_pandas()
    assert ours.share[10] == pytest.approx((judged[~judged.control & (judged.alpha == 10)].outcome != "unchanged").mean())
    assert set(numbers.pushed) == {"feature", "random"}


def test_the_effect_matrix_takes_the_sign_of_alpha_and_frames_targets(run):
    numbers = collect_effects(Run(run)).set_index(["target", "finding"])
    assert numbers.effect["effusion", "effusion"] == pytest.approx(0.4) and numbers.effect["effusion", "pneumothorax"] == pytest.approx(0.05)
    assert numbers[numbers.targeted].index.tolist() == [(t, t) for t in sorted({t for t, _ in numbers.index})]


def test_levels_carry_the_order_of_the_groups_and_negatives_their_source(run):
    numbers = collect_levels(Run(run))
    assert numbers.attrs["order"] == "ascending" and numbers.attrs["sizes"][0] == 64 and numbers.level.nunique() == 5
    sources = collect_negatives(Run(run)).groupby("source").f1.median()
    assert sources["random"] > sources["same_words"] > sources["neighbour"]


def test_a_run_judged_in_several_ways_has_a_bar_for_each(tmp_path):
    rows = [{"feature": 1, "alpha": 5.0, "outcome": "mixed", "degenerate": False, "control": method != "add" or image == "blank", "method": method,
             "image": image}
            for method, image in (("add", "shown"), ("add", "blank"), ("other_feature", "shown"), ("random", "shown"))]
    write_table(tmp_path / "steering/judgements.parquet", pa.Table.from_pylist(rows))
    assert collect_steering(Run(tmp_path)).pushed.tolist() == ["feature", "blank image", "other feature", "random"]


def test_random_directions_on_other_images_stay_apart_from_features(tmp_path):
    rows = [{"feature": 1, "alpha": 5.0, "outcome": "mixed", "degenerate": False, "control": True, "method": method, "image": image}
            for method in ("add", "random") for image in ("other", "blank")]
    write_table(tmp_path / "steering/judgements.parquet", pa.Table.from_pylist(rows))
    assert sorted(collect_steering(Run(tmp_path)).pushed) == ["another film", "blank image", "random, another film", "random, blank image"]


def test_additions_and_suppressions_stand_apart_by_image_and_sense(run, tmp_path):
    numbers = collect_on_target(Run(run)).set_index(["case", "pushed", "what"])
    judged = read_table(run / "steering/judgements.parquet").to_pandas()
    mine = judged[~judged.control & (judged.alpha > 0) & ~judged.stated]
    assert numbers.share["addition", "feature", "purely: strict"] == pytest.approx((mine.outcome == "on_target_only").mean())
    assert numbers.share["addition", "feature", "purely: clinically"] == pytest.approx((mine.outcome_clinical == "on_target_only").mean())
    assert numbers.reports["suppression", "feature", "purely: strict"] == (~judged.control & (judged.alpha < 0) & judged.stated).sum()
    assert (numbers.low <= numbers.share).all() and (numbers.share <= numbers.high).all() and set(numbers.film) == {"its own film"}
    write_table(tmp_path / "steering/judgements.parquet", pa.Table.from_pandas(pd.concat([
        judged.assign(image=image, method=np.where(judged.control, "random", "add"), control=judged.control | (image != "shown"))
        for image in ("shown", "other", "blank")])))
    drawn = draw_plot("on_target", tmp_path)[1]
    films = ("its own film", "another film", "blank image")
    assert set(zip(drawn.film, drawn.pushed, strict=True)) == {(f, w) for f in films for w in ("feature", "random")}
    write_table(tmp_path / "steering/judgements.parquet", pa.Table.from_pandas(judged.drop(columns="outcome_paper")))
    assert draw_plot("on_target", tmp_path) == "there are no numbers to draw"


def test_the_untouched_reports_stand_at_zero(tmp_path):
    invent_run(tmp_path)
    own = [{"image": "shown", "study": f"s{i}", "patient": f"p{i}", "outcome": "unchanged", "on": 0, "degenerate": False,
            "unreadable": "unread" if i < 3 else ""} for i in range(4)]
    write_table(tmp_path / "steering/baselines.parquet", pa.Table.from_pylist(own))
    zero = collect_doses(Run(tmp_path)).query("alpha == 0 and pushed == 'feature'").set_index("what")
    assert zero.share.to_dict() == {"changed": 0, "on target": 0, "degenerate": 0, "unreadable": 0.75} and (zero.reports == 4).all()
    assert not isinstance(draw_plot("doses", tmp_path), str)


def test_letters_are_matplotlibs_own_whatever_the_machine_has(tmp_path):
    """A font of the same name that is found first, as on a machine with an edition of its own, draws nothing."""
    code = """
import shutil, sys
from pathlib import Path
import matplotlib
from matplotlib import font_manager
own = Path(matplotlib.get_data_path(), "fonts/ttf")
other = shutil.copy(own / "DejaVuSans.ttf", sys.argv[1])
fonts = font_manager.fontManager
fonts.addfont(other)
fonts.ttflist.insert(0, fonts.ttflist.pop())
assert font_manager.findfont("DejaVu Sans") == other
from saerad.show.figures import house_style
with house_style():
    for weight in ("normal", "bold"):
        assert Path(font_manager.findfont(font_manager.FontProperties("DejaVu Sans", weight=weight))).parent == own
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "other.ttf")], check=True, timeout=120)
