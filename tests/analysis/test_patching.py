"""The way down from a painted film to one feature: each step is what it says, and a second call writes nothing."""
import numpy as np
import pandas as pd
import pytest
import torch

from saerad.analysis import patching as ceilings
from saerad.analysis.patching import STEPS, by_count, ceiling, ceiling_table, ceiling_verdicts, steps_of
from saerad.sae.model import MatryoshkaSAE
from saerad.studies.findings import Finding
from saerad.studies.record import StudiesConfig
from saerad.studies.sources import open_source
from saerad.subjects.subject import random_mini


@pytest.fixture
def dictionary():
    sae = MatryoshkaSAE(16, (24,), k=4, seed=2)
    sae.scale.fill_(3.0)
    sae.threshold.fill_(0.05)
    return sae


def test_steps(dictionary):
    draw = torch.Generator().manual_seed(0)
    before, after = torch.randn(5, 16, generator=draw), torch.randn(5, 16, generator=draw)
    image = np.array([0, 1, 1, 1, 0], bool)
    steps = steps_of(dictionary, before, after, image, torch.Generator().manual_seed(1), few=3)
    assert set(steps) == set(STEPS) - {"film"}
    fields = {name: step.per_token for name, step in steps.items() if step.per_token is not None}
    stream = fields.pop("stream")
    assert torch.allclose(stream[:-1], (after - before)[:-1]) and not stream[-1].any()         # the last token is changed by the vector that stays on
    assert torch.allclose(steps["stream"].directions[0], after[-1] - before[-1]) and steps["stream"].positions == "generated"
    assert set(steps_of(None, before, after, image, torch.Generator())) == {"stream", "patches", "end", "random"}
    assert all(not f[~image].any() for f in fields.values())                                  # only the picture is changed
    assert torch.allclose(fields["patches"][image], (after - before)[image])
    assert torch.allclose(fields["dictionary"][image], (dictionary(after) - dictionary(before))[image], atol=1e-5)
    assert torch.allclose(fields["random"].norm(dim=1), fields["patches"].norm(dim=1), atol=1e-5)
    assert torch.allclose(fields["spread"].sum(0), fields["feature"].sum(0), atol=1e-5) and torch.allclose(fields["spread"][1], fields["spread"][3])
    ranks = {name: int(torch.linalg.matrix_rank(fields[name], atol=1e-5)) for name in ("feature", "spread", "features")}
    assert ranks == {"feature": 1, "spread": 1, "features": 3}
    z = dictionary.encode(after) - dictionary.encode(before)
    largest = max(range(24), key=lambda f: float(z[image][:, f].norm()))
    assert torch.allclose(fields["feature"][1], z[1, largest] * dictionary.W_dec[largest].detach() * 3.0, atol=1e-5)
    end = steps["end"]
    assert end.per_token is None and end.positions == "generated" and torch.allclose(end.directions[0], after[-1] - before[-1])


def test_findings_that_are_there_are_not_painted_and_nothing_is_written_twice(tmp_path, monkeypatch):
    world = open_source(StudiesConfig(source="phantom:0", train_patients=1, validation_patients=1, test_patients=8))
    blind = random_mini()
    study = next(s for s in world.split("test") if s.truth.findings)
    there, absent = study.truth.findings[0].kind, next(k for k in ("nodule", "picc") if k not in {f.kind for f in study.truth.findings})
    sae = MatryoshkaSAE(blind.d_model, (8,), k=2)
    sae.threshold.fill_(0.1)
    args = (blind, sae, 2, [study], [Finding(there, "left"), Finding(absent, "left", "upper")], tmp_path)
    rows = ceiling(*args, max_new_tokens=4)
    assert set(rows.finding) == {absent} and rows.step.tolist().count("film") == 1 and set(rows.step) == set(STEPS) and len(rows) == len(STEPS)
    counted = by_count(*args[:-1], [1, 5, 8], tmp_path, max_new_tokens=4)
    assert counted.step.tolist() == ["1", "5", "8"] and counted.baseline.iloc[0] == rows.baseline.iloc[0]
    texts = rows.set_index("step").text
    assert counted.text.tolist() == [texts["feature"], texts["features"], texts["dictionary"]]      # eight are all
    monkeypatch.setattr(ceilings, "write_steered", None)
    pd.testing.assert_frame_equal(ceiling(*args, max_new_tokens=4), rows)


def test_table():
    texts = {"film": "Small left pleural effusion.", "patches": "Small left pleural effusion. Left rib fracture.", "end": "No nodule."}
    rows = pd.DataFrame([{"study": s, "finding": "effusion", "step": step, "baseline": "No nodule.", "text": texts.get(step, "Left rib fracture."),
                          "times": 1.0} for s in "ab" for step in STEPS])
    table = ceiling_table(ceiling_verdicts(rows))
    assert table.on_target_only["film"] == 1 and table["more of it"]["patches"] == 1 and table.mixed["patches"] == 1
    assert table.kinds["film"] == 1 and table.kinds["patches"] == 0
    assert table.unchanged["end"] == 1 and table.off_target_only["random"] == 1
