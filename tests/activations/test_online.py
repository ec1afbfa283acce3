"""Online: rows straight from the model, the same rows as a store's, resumed anywhere."""
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from test_extraction import studies, tiny

from saerad.activations.extraction import ExtractionConfig, extract
from saerad.activations.online import Online
from saerad.activations.store import Store
from saerad.core import UserError
from saerad.sae.model import SAEConfig
from saerad.sae.training import TrainingConfig, train_sae
from saerad.subjects.subject import Subject

CFG = ExtractionConfig(layer=0, batch_size=4)


@pytest.fixture(scope="module")
def subject() -> Subject: return tiny()


@pytest.fixture(scope="module")
def store(subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return extract(studies(24), subject, CFG, tmp_path_factory.mktemp("online"))


def online(subject: Subject, rows: int) -> Online: return Online(studies(24), subject, CFG, memory=rows * 3 * 4 * subject.d_model)


def rounded(x: torch.Tensor) -> Counter: return Counter(tuple(r) for r in (x * 1e3).round().int().tolist())


@pytest.mark.parametrize("rows", [50, 173, 5000])
def test_an_epoch_holds_every_row_once(subject: Subject, store: Store, rows: int) -> None:
    train = store.read(store.where("train"))
    stream, dealt, places = online(subject, rows).batches("train", 16, seed=0), [], []
    while 16 * len(dealt) < 2 * len(train) + 2 * rows:
        step, place, x = next(stream)
        assert step == len(dealt) and x.shape == (16, subject.d_model) and x.dtype == torch.float32
        dealt.append(x)
        places.append(place)
    place, x = np.concatenate(places), torch.cat(dealt)
    for epoch in range(2):
        own = torch.from_numpy(np.flatnonzero(place // len(train) == epoch))
        assert len(own) == len(train) and len(set(place[own])) == len(train)
        nearest = torch.cdist(x[own], train).min(1)
        assert nearest.values.max() < 1e-3
        assert (rounded(x[own]) - rounded(train)).total() < len(train) / 50       # rounding may differ at an edge here and there


def test_begins_at_any_step_with_the_same_batch(subject: Subject) -> None:
    stream = online(subject, 173).batches("train", 16, seed=3)
    steps = [next(stream) for _ in range(70)]
    for start in (1, 10, 11, 40, 69):
        step, places, x = next(online(subject, 173).batches("train", 16, seed=3, start=start))
        assert step == start and np.array_equal(places, steps[start][1]) and torch.allclose(x, steps[start][2], atol=1e-4)
    assert not np.array_equal(next(online(subject, 173).batches("train", 16, seed=4))[1], steps[0][1])


def test_a_dictionary_can_be_trained_from_it(subject: Subject, tmp_path: Path) -> None:
    cfg = TrainingConfig(steps=30, batch_size=64, start_rows=256, lr=3e-3, log_every=1)
    sae = train_sae(online(subject, 500), SAEConfig(k=4), cfg, 0, tmp_path)
    assert (tmp_path / "sae.safetensors").exists() and float(sae.scale) > 0


def test_what_it_cannot_do_is_said(subject: Subject) -> None:
    with pytest.raises(UserError, match="validation"): online(subject, 100).batches("validation", 16, 0)
    with pytest.raises(UserError, match="generated"): Online(studies(4), subject, CFG.model_copy(update={"reports": "generated"}))
