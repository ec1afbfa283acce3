"""The rehearsal of the paper's config, on a network of two layers: every part is real, and small."""
import sys
from pathlib import Path

import pytest

from saerad.core import read_json
from saerad.run.cli import main
from saerad.studies.sources import open_source
from saerad.subjects.subject import SubjectConfig, open_subject

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import rehearsal


def in_this_process(arguments):
    with pytest.raises(SystemExit) as ended: main(arguments)
    assert ended.value.code == 0


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rehearsal")
    return folder, rehearsal.rehearse(rehearsal.TINY, folder, in_this_process)


def test_every_stage_is_measured(rehearsed):
    folder, rows = rehearsed
    assert [r["stage"] for r in rows] == ["extract", "train", "evaluate", "exemplars", "interpret", "steer", "portray", "figures", "atlas"]
    assert all(r["done"] > 0 and r["a_second"] > 0 and r["mb"] > 0 and r["memory_gb"] > 0 for r in rows)
    assert (folder / "run/report.html").exists() and rehearsal.written(rows).splitlines()[-1].startswith("all but the endpoint: ")


def test_what_it_comes_to_is_counted(rehearsed):
    """Disk and calls do not depend on the machine, so they are known: 34.7 M rows of 4096 bfloat16 numbers, and the calls of the paper's protocol."""
    rows = {r["stage"]: r for r in rehearsed[1]}
    assert 284 < rows["extract"]["paper_gb"] < 310      # the numbers, 284.3, and the table of tokens
    assert rows["interpret"]["paper_units"] == 1_327_104 and rows["interpret"]["done"] > 10
    assert rows["extract"]["paper_units"] == 34.7e6 and rows["train"]["paper_units"] == 16_000 * 2048
    shown = rows["train"]
    assert shown["paper_hours"] == pytest.approx(shown["paper_units"] / shown["a_second"] / 3600)


def test_what_is_made_up_has_the_real_layout(rehearsed):
    folder, _ = rehearsed
    index = read_json(folder / "maira2/model.safetensors.index.json")["weight_map"]
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in index
    assert "vision_tower.encoder.layer.0.attention.attention.query.weight" in index and len(set(index.values())) == 6
    source = open_source(f"mimic-cxr:{folder / 'mimic'}")
    assert not source.may_leave and {s.split for s in source.studies} == {"train", "validation", "test"} and not source.problems
    assert all(s.views.keys() == {"frontal", "lateral"} for s in source.studies) and any(s.prior for s in source.studies)
    assert min(source.studies[0].views["frontal"].array().shape) == rehearsal.TINY.side
    subject = open_subject(SubjectConfig(model=str(folder / "maira2"), trust_remote_code=True, device="cpu"))
    prompt = subject.prompt(next(s for s in source.studies if s.prior))
    assert prompt.views == ("frontal", "lateral", "prior") and "prior_report" in prompt.section
