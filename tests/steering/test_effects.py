"""Intervals that know which reports belong together, the effect matrix, and prediction on held-out features."""
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from scipy.stats import binomtest

from saerad.sae.model import MatryoshkaSAE
from saerad.steering.effects import (
    co_activation,
    effect_matrix,
    geometry,
    on_target_summary,
    outcome_shares,
    output_scores,
    predicted_steerability,
    prediction_quality,
    share_interval,
    shares_apart,
    widened,
)
from saerad.studies.findings import read_findings
from saerad.subjects.subject import random_mini


def test_the_interval_is_over_studies_not_reports():
    hits, own = np.arange(60) % 2 == 0, np.arange(60)
    share, low, high = share_interval(hits, own)
    assert share == 0.5 and 0.3 < low < 0.45 and 0.55 < high < 0.7
    clustered = share_interval(np.repeat([True, False] * 3, 10), np.repeat(np.arange(6), 10))
    assert clustered[2] - clustered[1] > 2 * (high - low)
    assert share_interval(hits, own) == (share, low, high)
    assert np.isnan(share_interval([], [])).all()
    assert share_interval([True, False], ["a", "a"])[0] == 0.5 and np.isnan(share_interval([True, False], ["a", "a"])[1])


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    draw, inside = np.random.default_rng(0), 0
    for seed in range(100):
        rate = draw.beta(2, 3, size=40)                           # each study has its own
        hits = draw.random((40, 5)) < rate[:, None]
        _, low, high = share_interval(hits.ravel(), np.repeat(np.arange(40), 5), seed, 300)
        inside += low <= 0.4 <= high
    assert 88 <= inside <= 99


def judgements() -> pd.DataFrame:
    rows = [("add", a, s, f, o, e) for f in (1, 2) for a in (-1.0, 1.0) for s, o, e in
            (("s1", "on_target_only", a), ("s2", "unchanged", 0), ("s3", "mixed", -a), ("s4", "degenerate", a))]
    table = pd.DataFrame(rows, columns=["method", "alpha", "study", "feature", "outcome", "effect"])
    right = [None if e == 0 or o == "degenerate" else e * a > 0 for e, a, o in zip(table.effect, table.alpha, table.outcome, strict=True)]
    return table.assign(image="shown", on_direction=right, eligible=table.study.isin(["s1", "s2"]), harms=[("side_flipped",)] * len(table))


def test_shares_by_method_feature_and_strength():
    shares = outcome_shares(judgements())
    whole = shares[(shares.feature == -1) & shares.alpha.isna()].set_index("what").share
    assert whole[["unchanged", "on_target_only", "mixed", "off_target_only", "degenerate"]].tolist() == [0.25, 0.25, 0.25, 0, 0.25]
    assert whole["towards"] == whole["away"] == 0.25 and whole["on_target_eligible"] == 0.5 and whole["side_flipped"] == 1
    one = shares[(shares.feature == 2) & (shares.alpha == -1)].set_index("what")
    assert one.reports["mixed"] == 4 and one.share["mixed"] == 0.25
    assert (shares.low.fillna(0) <= shares.share.fillna(0)).all()


def apart_judgements() -> pd.DataFrame:
    """Six studies, of which the first three state the target, at both signs, on two images, with a random direction beside."""
    rows = []
    for method, image, pure in (("add", "shown", {"s0", "s4"}), ("add", "blank", {"s4"}), ("random", "shown", set())):
        for sign in (-1, 1):
            for i in range(6):
                stated = i < 3
                hit = f"s{i}" in pure and stated == (sign < 0)
                strict = "on_target_only" if hit else "mixed" if stated == (sign < 0) else "unchanged"
                rows.append({"method": method, "image": image, "sign": sign, "alpha": 2.0 * sign, "study": f"s{i}", "stated": stated,
                             "outcome": strict, "outcome_paper": strict if i else "on_target_only",
                             "outcome_clinical": "on_target_only" if hit else "unchanged"})
    table = pd.DataFrame(rows).assign(feature=1, effect=0, harms=[()] * len(rows))
    return table.assign(eligible=table.stated == (table.sign < 0), control=(table.method != "add") | (table.image != "shown"),
                        on_direction=(table.outcome == "on_target_only").where(table.outcome == "on_target_only", None))


def test_addition_and_suppression_stand_apart():
    cases = shares_apart(apart_judgements())
    at = cases[(cases.feature == -1) & (cases.what == "on_target_only")].set_index(["method", "image", "sign", "stated"])
    assert at.share["add", "shown", 1, "absent"] == pytest.approx(1 / 3) == at.share["add", "shown", -1, "present"]
    assert at.share["add", "blank", -1, "present"] == 0 == at.share["random", "shown", 1, "absent"] == at.share["add", "shown", 1, "present"]
    assert (at.reports == 3).all() and (at.low <= at.share).all() and (at.share <= at.high).all()
    aimless = apart_judgements().assign(stated=None)
    assert shares_apart(aimless).empty


def test_the_page_of_numbers_has_every_sense_with_its_interval_and_its_control():
    told = on_target_summary(apart_judgements())
    assert told["on_target"]["reports"] == 12 and told["on_target"]["strict"][0] == pytest.approx(2 / 12, abs=1e-4)
    assert told["on_target"]["paper"][0] == pytest.approx(3 / 12, abs=1e-4)                        # the first study is pure in the paper's wording
    assert list(told["addition"]) == ["shown", "blank"] and told["addition"]["shown"]["reports"] == 3
    share, low, high = told["suppression"]["shown"]["clinical"]
    assert low <= share <= high and share == pytest.approx(1 / 3, abs=1e-4) == told["suppression"]["shown"]["towards"][0]
    assert told["suppression"]["blank"]["strict"] == [0, 0, pytest.approx(1 - 0.025 ** (1 / 3), abs=1e-4)]  # three studies
    assert widened(1.0, 1.0, 1.0, 12) == (pytest.approx(binomtest(12, 12).proportion_ci(method="exact").low), 1.0)
    assert np.isnan(widened(0.0, 0.0, 0.0, 1)[1])
    assert told["suppression"]["blank"]["strict"][0] == 0 and told["random"]["addition"]["shown"]["strict"][0] == 0
    assert on_target_summary(judgements()) == {}                                                   # of an older run
    nothing = on_target_summary(apart_judgements().iloc[:0])
    assert nothing["on_target"] == {"reports": 0, "strict": [None] * 3, "paper": [None] * 3, "clinical": [None] * 3, "towards": [None] * 3}
    assert nothing["addition"] == {}


def test_the_effect_matrix_is_the_change_within_pairs():
    pairs = [("Effusion.", "Effusion. Nodule.", 1.0), ("Clear lungs.", "Effusion.", 1.0), ("Effusion.", "Clear lungs.", -1.0)]
    table = pd.DataFrame([{"baseline": b, "steered": s, "alpha": a, "study": str(i)} for i, (b, s, a) in enumerate(pairs)])
    table = table.assign(method="add", image="shown", degenerate=False, target="effusion", generation=range(3))
    matrix = effect_matrix(table, table, read_findings).set_index(["sign", "finding"])
    assert matrix.change[1, "effusion"] == 0.5 and matrix.change[1, "nodule"] == 0.5 and matrix.change[-1, "effusion"] == -1
    assert matrix.baseline[1, "effusion"] == 0.5 and matrix.steered[1, "effusion"] == 1
    assert matrix.low[1, "nodule"] <= 0.5 <= matrix.high[1, "nodule"]
    blank = table.assign(image="blank")
    assert effect_matrix(blank, blank, read_findings).empty


def test_geometry_and_co_activation_against_plain_loops():
    sae, draw = MatryoshkaSAE(6, (5,), 1), np.random.default_rng(0)
    told = geometry(sae, [3, 0]).set_index("feature")
    rows = torch.nn.functional.normalize(sae.W_dec.detach(), dim=1)
    assert told.crowding[3] == pytest.approx(max(float(rows[3] @ rows[j]) for j in range(5) if j != 3), abs=1e-6)
    assert told.alike[0] == pytest.approx(1.0, abs=1e-6)                  # the encoder starts as the decoder
    z = np.maximum(draw.normal(size=(50, 5)), 0)
    z[:, 4] = 0
    on = z > 0
    expected = [max((on[:, i] & on[:, j]).sum() / max((on[:, i] | on[:, j]).sum(), 1) for j in range(5) if j != i) for i in (0, 4)]
    assert co_activation(sparse.csr_matrix(z), [0, 4]) == pytest.approx(expected)


def test_the_output_score_finds_the_row_that_writes_a_word():
    subject, sae = random_mini(0), MatryoshkaSAE(256, (3,), 1)
    sae.scale.fill_(20.0)
    word = subject.model.get_output_embeddings().weight[300].detach()
    sae.W_dec.data[1] = word / word.norm()
    assert int(output_scores(subject, sae, [0, 1, 2]).argmax()) == 1


def test_a_feature_is_predicted_from_the_others_only():
    draw = np.random.default_rng(1)
    table = pd.DataFrame({"output_score": draw.normal(size=20), "crowding": draw.normal(size=20)})
    table["measured"] = table.output_score
    told = predicted_steerability(table)
    assert np.corrcoef(told.predicted, told.measured)[0, 1] > 0.95
    wild = table.copy()
    wild.loc[7, "measured"] = 1e3
    assert predicted_steerability(wild).predicted[7] == pytest.approx(told.predicted[7])       # its own value was not seen
    assert prediction_quality(table, shuffles=30)["p"] < 0.05
    null = [prediction_quality(table.assign(measured=draw.normal(size=20)), seed=i, shuffles=19)["p"] for i in range(8)]
    assert max(null) > 0.3
    assert predicted_steerability(table[:3]).predicted.isna().all()
