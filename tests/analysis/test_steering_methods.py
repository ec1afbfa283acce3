"""The comparison of ways of steering: what is judged how, doses from validation patients only, and what the table says."""
import numpy as np
import pandas as pd
import pytest
import torch

from saerad.analysis.steering_methods import MethodsConfig, _threshold, best_doses, judged, method_table, only_kinds, targets_of, ways_of
from saerad.sae.model import MatryoshkaSAE
from saerad.steering.interventions import Batch
from saerad.steering.judges import target_of
from saerad.studies.findings import Finding, Reading
from saerad.studies.record import StudiesConfig
from saerad.studies.sources import open_source


def test_the_threshold_is_the_one_with_the_best_f1():
    z, marked = np.array([0, 0, 0.2, 0.3, 1.0, 2.0]), np.array([0, 0, 0, 0, 1, 1], bool)
    score, level = _threshold(z, marked)
    assert score == 1.0 and 0.3 <= level < 1.0
    assert _threshold(np.zeros(4), np.array([1, 0, 0, 0], bool)) == (0.0, 0.0)


def test_concepts_are_those_that_reports_state_and_enough_of_them():
    world = open_source(StudiesConfig(source="phantom:0", train_patients=30, validation_patients=1, test_patients=1))
    features = pd.DataFrame({"concept": ["effusion", "fever", "nodule", "left", "AP"], "f1": [0.95, 0.99, 0.91, 0.5, 0.97]})
    assert list(targets_of(features, world, MethodsConfig(at_least=2))) == ["effusion", "nodule"]      # fever and AP are only in prompts
    assert list(targets_of(features, world, MethodsConfig(at_least=3))) == ["effusion", "nodule", "left"]


def test_a_reading_of_kinds_only():
    f = [Finding("effusion", "left", severity="large"), Finding("effusion", "right"), Finding("nodule", certainty="absent"),
         Finding("picc", change="resolved"), Finding("fracture", certainty="uncertain")]
    assert only_kinds(Reading(tuple(f))).findings == (Finding("effusion"), Finding("fracture"))


PAIRS = pd.DataFrame([
    ("effusion", "add", 1.0, "Nodule in the left upper lobe.", "Nodule in the right upper lobe. Small left pleural effusion.", 1.0),
    ("effusion", "add", 1.0, "No nodule.", "Small left pleural effusion.", 1.0),
    ("effusion", "add", -1.0, "No nodule.", "No nodule.", 1.0),
    ("effusion", "add", 1.0, "No nodule.", "Small left pleural effusion.", 1e3)],
    columns=["concept", "way", "alpha", "baseline", "text", "times"]).assign(study=["a", "b", "c", "d"])


def test_three_judges():
    verdicts = judged(PAIRS, {"effusion": target_of("effusion")})
    assert verdicts.outcome.tolist() == ["mixed", "on_target_only", "unchanged", "degenerate"]
    assert verdicts.outcome_kinds.tolist() == ["on_target_only", "on_target_only", "unchanged", "degenerate"]     # the nodule's side is no change
    assert verdicts.outcome_rules.tolist() == verdicts.outcome.tolist()
    assert verdicts.eligible.tolist() == [True, True, False, True]
    table = method_table(verdicts.assign(image="shown")).loc["add"]
    assert (table.on_target_only, table.kinds, table.degenerate, table.reports) == (0.25, 0.5, 0.25, 4)
    assert table.eligible == pytest.approx(1 / 3) and table.low <= 0.25 <= table.high


def test_the_dose_is_the_best_and_of_equals_the_gentlest():
    rows = [("c", "add", a, o) for a, outcomes in {0.3: "on off", 0.6: "on un", -0.6: "on un", 1.2: "on un", -1.2: "un un"}.items()
            for o in outcomes.split()]
    names = {"on": "on_target_only", "off": "off_target_only", "un": "unchanged"}
    table = pd.DataFrame(rows, columns=["concept", "way", "alpha", "outcome"]).replace({"outcome": names})
    assert best_doses(table) == {("c", "add"): 0.6}
    assert best_doses(table[table.alpha != 0.6]) == {("c", "add"): -0.6}


def test_every_way_has_the_length_that_was_asked_for():
    sae = MatryoshkaSAE(16, (6,), k=2)
    sae.scale.fill_(10.0)
    sae.threshold.fill_(0.1)
    rows = {c: torch.nn.functional.normalize(torch.randn(16), dim=0) for c in ("a", "b")}
    ways = {w.name: w for w in ways_of({"a": 1, "b": 4}, sae, 3, {3: rows, 5: rows}, rows, 0)}
    assert set(ways) == {"add", "add, writing", "add, image",
                         "clamp", "clamp, writing", "scale", "words", "other", "random", "means", "means, layer 5"}
    assert ways["means, layer 5"].layer == 5 and ways["add"].layer == 3
    for name in ("add", "add, writing", "add, image", "words", "other", "random", "means"):
        assert float(Batch([ways[name].make("a", -0.6)]).constant.norm()) == pytest.approx(6.0, rel=1e-4)
    other = Batch([ways["other"].make("a", 1.0)]).constant[0, 0]
    assert torch.allclose(other, Batch([ways["add"].make("b", 1.0)]).constant[0, 0])
