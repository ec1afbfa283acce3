"""Every answer of an examination is kept, small, and read again by feature; probabilities become scores that nobody can cheat with."""
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, roc_auc_score

from saerad.core import UserError, rng
from saerad.interpretation.examinations import (
    EXAMINATIONS,
    Predictions,
    best_threshold,
    examination_rows,
    probability_scores,
    read_examination,
    write_examinations,
)
from saerad.interpretation.exemplars import Context


def contexts(rows): return [Context(int(r), (" a",), "findings", "", 0) for r in rows]


def invented(feature, count=220, draw=None, span=60_000_000):
    draw = draw or rng(feature, "test")
    rows = draw.choice(span, count, replace=False)
    source = [["", "", "random", "same_words", "neighbour"][i] for i in draw.integers(0, 5, count)]
    said = Predictions([[True, False, None][i] for i in draw.integers(0, 3, count)], draw.beta(2, 2, count).tolist())
    peaks = dict(zip(rows.tolist(), draw.gamma(2, 1, count), strict=True))
    return rows, source, said, peaks, examination_rows(feature, contexts(rows), source, peaks, said, [True, None] * (count // 4))


def test_what_was_written_is_read_again_feature_by_feature(tmp_path):
    made = {f: invented(f, count=20 + f) for f in range(0, 90, 3)}
    write_examinations(tmp_path / "e.parquet", [m[-1] for m in made.values()], group=8)
    assert pq.read_schema(tmp_path / "e.parquet").remove_metadata() == EXAMINATIONS
    for f, (rows, source, said, peaks, _) in made.items():
        table = read_examination(tmp_path / "e.parquet", f)
        order = np.argsort(rows)
        assert table.row.tolist() == rows[order].tolist() and set(table.feature) == {f}
        assert table.source.tolist() == [source[i] or "firing" for i in order] and table.truth.tolist() == [source[i] == "" for i in order]
        assert table.answer.tolist() == [-1 if said[i] is None else int(said[i]) for i in order]
        control = ([1, -1] * (len(rows) // 4) + [None] * len(rows))[:len(rows)]
        assert table.answer_shuffled.astype(object).where(table.answer_shuffled.notna(), None).tolist() == [control[i] for i in order]
        assert np.allclose(table.probability, np.array(said.probabilities)[order], atol=6e-4)
        assert np.allclose(table.activation, [0 if source[i] else peaks[int(rows[i])] for i in order], rtol=5e-4)
    assert not len(read_examination(tmp_path / "e.parquet", 1))


def test_a_row_costs_at_most_eight_bytes(tmp_path):
    """The worst case: contexts scattered over a store of sixty million tokens, every one with a probability."""
    write_examinations(tmp_path / "e.parquet", [invented(f)[-1] for f in range(256)])
    assert (tmp_path / "e.parquet").stat().st_size / (256 * 220) <= 8


def test_one_feature_is_read_without_the_others(tmp_path):
    write_examinations(tmp_path / "e.parquet", [invented(f, 30)[-1] for f in range(128)])
    groups = pq.ParquetFile(tmp_path / "e.parquet").metadata
    ranges = [(s.min, s.max) for i in range(groups.num_row_groups) for s in [groups.row_group(i).column(0).statistics]]
    assert ranges == [(0, 31), (32, 63), (64, 95), (96, 127)]
    damaged = (tmp_path / "e.parquet").read_bytes()
    cut = groups.row_group(2).column(1).data_page_offset     # bytes of another group are not looked at
    (tmp_path / "d.parquet").write_bytes(damaged[:cut] + b"\0" * 40 + damaged[cut + 40:])
    assert read_examination(tmp_path / "d.parquet", 7).equals(read_examination(tmp_path / "e.parquet", 7))


def test_an_absent_or_damaged_table_is_named(tmp_path):
    with pytest.raises(UserError, match=r"e\.parquet is missing; run `saerad interpret`"): read_examination(tmp_path / "e.parquet", 0)
    (tmp_path / "e.parquet").write_text("no table", encoding="utf-8")
    with pytest.raises(UserError, match="is not a Parquet table"): read_examination(tmp_path / "e.parquet", 0)


def test_answers_without_probabilities_have_none():
    table = examination_rows(3, contexts([5, 2]), ["", "random"], {5: 1.0}, [True, False]).to_pandas()
    assert table.probability.isna().all() and table.row.tolist() == [2, 5] and table.answer_shuffled.isna().all()


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 8)), min_size=1, max_size=40))
def test_the_best_threshold_is_the_best(pairs):
    truth, chance = np.array([t for t, _ in pairs]), np.array([p / 8 for _, p in pairs])
    if not truth.any(): return
    found = best_threshold(truth, chance)
    assert np.isclose(f1_score(truth, chance >= found), max(f1_score(truth, chance >= t) for t in set(chance)))


def test_scores_of_probabilities():
    draw = rng(0, "scores")
    truth = np.arange(400) % 2 == 0
    chance = np.where(truth, 0.3, 0.1) + 0.1 * draw.random(400)
    told = probability_scores(truth, chance.tolist())
    assert told == {"auroc": 1.0, "calibrated_f1": 1.0}     # although not one of them reaches one half
    noise = draw.random(400).tolist()
    assert np.isclose(probability_scores(truth, noise)["auroc"], roc_auc_score(truth, noise))
    assert all(np.isnan(v) for v in probability_scores([True, True, False], [0.1, 0.2, 0.3]).values())
    assert probability_scores(truth, [None if i % 3 else c for i, c in enumerate(chance)])["auroc"] == 1.0


def test_calibration_gains_nothing_from_noise():
    """The threshold comes from other contexts, so that probabilities without content do not beat always yes."""
    truth = np.arange(40) % 2 == 0
    found = [probability_scores(truth, rng(i, "noise").random(40).tolist())["calibrated_f1"] for i in range(100)]
    assert np.mean(found) < 2 / 3


def test_predictions_are_a_list():
    said = Predictions([True, None], [0.9, None])
    assert said == [True, None] and said.probabilities == [0.9, None] and Predictions([True]).probabilities is None
    assert pd.Series(said, dtype=object).notna().tolist() == [True, False]
