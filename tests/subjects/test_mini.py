"""Training mini: the lessons are right, an interruption changes nothing, and the shipped model looks at the picture."""
import json
import os
import signal
import sys
import time

import numpy as np
import pytest
import torch
from nursery import nursery

from saerad.core import UserError, file_hash
from saerad.sae.evaluation import report_findings
from saerad.studies.findings import PHANTOM_KINDS
from saerad.studies.phantom import phantom_source
from saerad.studies.record import Source, StudiesConfig, Study
from saerad.subjects.mini import (
    DecoderConfig,
    MiniConfig,
    answers_of,
    findings_of,
    gather_views,
    lessons_of,
    patch_places,
    report_loss,
    train_decoder,
    train_mini,
    training_batches,
)
from saerad.subjects.subject import SubjectConfig, find_checkpoint, new_mini, open_subject, train_tokenizer


@pytest.fixture(scope="module")
def source():
    return phantom_source(0, StudiesConfig(train_patients=12, validation_patients=3, test_patients=1))


@pytest.fixture(scope="module")
def mini():
    return open_subject(SubjectConfig(model="mini"))


def test_answers_and_places_agree_with_the_truth(source):
    questions = ["effusion", "effusion left", "effusion left at least large", "pacemaker"]
    for study in source:
        kinds = {f.kind for f in study.truth.findings}
        answers = dict(zip(questions, answers_of(study, questions), strict=True))
        assert answers["effusion"] == ("effusion" in kinds) and answers["pacemaker"] == ("pacemaker" in kinds)
        assert answers["effusion left"] <= answers["effusion"] and answers["effusion left at least large"] <= answers["effusion left"]
        assert {PHANTOM_KINDS[k] for k in np.flatnonzero(patch_places(study).any(0))} == kinds


def test_without_a_truth_the_report_is_read():
    study = Study("s", "p", "train", {"findings": "There is a small left pleural effusion. No pneumothorax."})
    assert {f.kind for f in findings_of(study)} == {"effusion"} and patch_places(study) is None


def test_batches_hold_every_lesson_once():
    lengths = list(np.random.default_rng(0).integers(10, 300, 101))
    batches = training_batches(lengths, 8, np.random.default_rng(1))
    assert sorted(np.concatenate(batches)) == list(range(101))
    assert np.median([np.ptp([lengths[i] for i in b]) for b in batches]) < 40


def test_the_loss_is_that_of_the_model_itself(source):
    """Against a plain forward pass of one study at a time through the whole network, pictures included."""
    tokenizer = train_tokenizer(t for s in source for t in s.sections.values())
    model = new_mini(tokenizer, 0).eval()
    pictures, rows = gather_views(source.studies, 112)
    from saerad.subjects.mini import all_patches
    patches = all_patches(model.model.vision_tower, pictures)
    lessons = lessons_of(source.split("train")[:4], tokenizer, 64, rows, ["effusion"])
    with torch.no_grad():
        together = float(report_loss(model, lessons, patches, None)[0])
        total = count = 0
        for lesson in lessons:
            pixels = torch.stack([(torch.from_numpy(pictures[r])[None].float() / 255 - .5307) / .2583 for r in lesson.views])
            logits = model(input_ids=torch.from_numpy(lesson.ids)[None], pixel_values=pixels).logits[0, lesson.begin:-1]
            total += float(torch.nn.functional.cross_entropy(logits, torch.from_numpy(lesson.ids[lesson.begin + 1:]), reduction="sum"))
            count += len(logits)
    assert abs(together - total / count) < 2e-3  # the cached patches are bfloat16


TRAIN = """
import torch, torch._dynamo; torch.set_num_threads(1)
from saerad.subjects.mini import DecoderConfig, train_decoder
from saerad.studies.phantom import phantom_source
from saerad.studies.record import StudiesConfig
def do(folder):
    source = phantom_source(0, StudiesConfig(train_patients=80, validation_patients=3, test_patients=1))
    train_decoder(source, folder, DecoderConfig(epochs=5, width=32, layers=2, vocabulary=400, batch=8))
"""


def test_a_killed_training_ends_with_the_same_weights(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    with nursery(TRAIN, env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}) as forks:
        forks.start(whole)
        assert forks.end() == [0]
        [child], until = forks.start(broken), time.monotonic() + 120
        while not (broken / "checkpoint.pt").exists() and time.monotonic() < until: time.sleep(.01)
        os.kill(child, signal.SIGKILL)
        assert forks.end() == [-signal.SIGKILL]
        assert (broken / "checkpoint.pt").exists() and not (broken / "model.safetensors").exists(), "killed too late to say anything"
        forks.start(broken)
        assert forks.end() == [0]
    assert file_hash(whole / "model.safetensors") == file_hash(broken / "model.safetensors")
    assert len(json.loads((broken / "training.json").read_text(encoding="utf-8"))["losses"]) == 5
    assert not (broken / "checkpoint.pt").exists()


def test_a_decoder_can_be_opened_and_learns_something(tmp_path, source):
    log = train_decoder(source, tmp_path, DecoderConfig(epochs=4, width=32, layers=2, vocabulary=400, batch=8))
    assert log[-1]["held_out"] < log[0]["held_out"]
    subject = open_subject(SubjectConfig(model=str(tmp_path)))
    assert subject.n_layers == 2 and subject.d_model == 32
    assert isinstance(subject.generate([subject.prompt(source.studies[0])], max_new_tokens=3)[0], str)


def test_a_very_small_mini_goes_through_all_its_lessons(tmp_path, source):
    log = train_mini(source, tmp_path, MiniConfig(vision_epochs=1, epochs=1, batch=8))
    assert log[0]["held_out"] > 0 and (tmp_path / "model.safetensors").exists()
    assert open_subject(SubjectConfig(model=str(tmp_path))).d_model == 256


def test_sources_that_cannot_teach_are_named(tmp_path):
    words = Source("table:words.csv", [Study("s", "p", "train", {"findings": "Clear lungs."})])
    with pytest.raises(UserError, match="table:words.csv has no images"): train_mini(words, tmp_path / "a")
    empty = Source("table:empty.csv", [Study("s", "p", "train", {"indication": "Cough."})])
    with pytest.raises(UserError, match="no training study with findings"): train_decoder(empty, tmp_path / "b")


def test_the_shipped_mini_is_small(mini):
    assert sum(p.numel() for p in mini.model.parameters()) <= 12_000_000 and mini.n_layers >= 8
    assert (find_checkpoint(SubjectConfig()) / "model.safetensors").stat().st_size <= 25 * 2**20


def test_the_shipped_mini_reports_what_it_sees(mini):
    """Held-out patients; the full numbers, on more studies, stand in the chapter and in a run's summary."""
    test = phantom_source(0, StudiesConfig(train_patients=1, validation_patients=1, test_patients=24)).split("test")
    own, other = (np.mean(list(report_findings(mini, test, shuffle_images=shuffle).values())) for shuffle in (False, True))
    assert own >= .85 and own - other >= .30
