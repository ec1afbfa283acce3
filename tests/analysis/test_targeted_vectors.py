"""Effects of vectors on later features against plain hooks, the linear map, and the vector that is solved for."""
import numpy as np
import pytest
import torch

from saerad.analysis import targeted_vectors
from saerad.analysis.targeted_vectors import (
    TargetedConfig,
    feature_effects,
    linear_effects,
    measured_effects,
    targeted_vector,
    told_effects,
    trial_vectors,
)
from saerad.sae.model import MatryoshkaSAE
from saerad.studies.phantom import phantom_source
from saerad.studies.record import StudiesConfig
from saerad.subjects.subject import layers_path, random_mini


@pytest.fixture(scope="module")
def world(): return phantom_source(0, StudiesConfig(train_patients=6, validation_patients=1, test_patients=1))


@pytest.fixture(scope="module")
def subject(): return random_mini()


@pytest.fixture(scope="module")
def sae() -> MatryoshkaSAE:
    sae = MatryoshkaSAE(256, (16, 16), k=4, seed=0)
    sae.threshold.fill_(0.0)
    sae.scale.fill_(3.0)
    return sae.requires_grad_(False)


def by_hand(subject, prompt, sae, vector, layer: int, later: int) -> torch.Tensor:
    """The features' means over the report's words, with a vector added by a plain hook."""
    layers, seen = subject.model.get_submodule(layers_path(subject.model)), []
    at, written = (torch.from_numpy(np.flatnonzero(prompt.section == name)) for name in ("image", "findings"))
    def push(module, args, out):
        out = out.clone()
        out[:, at] += vector
        return out
    handles = [layers[layer].register_forward_hook(push), layers[later].register_forward_hook(lambda m, a, out: seen.append(out))]
    with torch.no_grad(): subject.model(**subject.collate([prompt]), use_cache=False)
    for handle in handles: handle.remove()
    return sae.encode(seen[0][0, written]).mean(0)


def test_effects_are_those_of_a_plain_hook(world, subject, sae):
    study = world.split("train")[0]
    prompt = subject.prompt(study, study.sections["findings"])
    vectors = torch.randn(5, 256, generator=torch.Generator().manual_seed(0)) * 8
    found = feature_effects(subject, 1, vectors, prompt, sae, 3, batch_size=4)
    nothing = by_hand(subject, prompt, sae, torch.zeros(256), 1, 3)
    expected = torch.stack([by_hand(subject, prompt, sae, v, 1, 3) for v in vectors]) - nothing
    assert torch.allclose(found, expected, atol=1e-4) and float(expected.abs().max()) > 0.05


def test_the_mean_over_studies(world, subject, sae, tmp_path, monkeypatch):
    cfg = TargetedConfig(studies=2)
    vectors = torch.randn(3, 256, generator=torch.Generator().manual_seed(1)) * 8
    found = measured_effects(subject, 1, vectors, world, sae, 3, cfg)
    each = {s.study: feature_effects(subject, 1, vectors, subject.prompt(s, s.sections["findings"]), sae, 3) for s in world.split("train")}
    pairs = [(a, b) for a in each for b in each if a < b and torch.allclose(found, (each[a] + each[b]) / 2, atol=1e-5)]
    assert len(pairs) == 1 and torch.equal(found, measured_effects(subject, 1, vectors, world, sae, 3, cfg, out=tmp_path))
    monkeypatch.setattr(targeted_vectors, "feature_effects", None)                   # what was kept is not measured again
    assert torch.equal(found, measured_effects(subject, 1, vectors, world, sae, 3, cfg, out=tmp_path))


def test_trial_vectors_lie_in_the_leading_directions():
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)) @ torch.randn(3, 20, generator=torch.Generator().manual_seed(1)) + 5
    made = trial_vectors(x, TargetedConfig(rank=3, vectors=40, length=7.0), 0)
    basis = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[:3]
    assert torch.allclose(made.norm(dim=1), torch.full((40,), 7.0), rtol=1e-4) and torch.allclose(made @ basis.T @ basis, made, atol=1e-3)
    assert torch.linalg.matrix_rank(made) == 3 and not torch.equal(made, trial_vectors(x, TargetedConfig(rank=3, vectors=40, length=7.0), 1))


def test_a_linear_world_is_found_and_told():
    draw = torch.Generator().manual_seed(3)
    vectors, M, b = torch.randn(60, 8, generator=draw), torch.randn(8, 5, generator=draw), torch.randn(5, generator=draw)
    effects = vectors @ M + b
    found = linear_effects(vectors, effects, ridge=0.0)
    assert torch.allclose(found[0], M, atol=1e-4) and torch.allclose(found[1], b, atol=1e-4)
    assert told_effects(vectors, effects, ridge=0.0) > 0.999 and told_effects(vectors, torch.randn(60, 5, generator=draw)) < 0.3
    assert linear_effects(vectors, effects, ridge=1e6)[0].norm() < 0.01 * M.norm()


def test_the_vector_raises_its_target_and_not_what_every_vector_raises():
    draw = torch.Generator().manual_seed(4)
    M, b, target = torch.randn(12, 6, generator=draw), torch.rand(6, generator=draw), torch.eye(6)[2]
    plain, spared = (targeted_vector(M, b, target, w) for w in (0.0, 1.0))
    always = torch.nn.functional.normalize(M @ b, dim=0)
    assert torch.allclose(plain, torch.nn.functional.normalize(M[:, 2], dim=0), atol=1e-5) and float(spared.norm()) == pytest.approx(1, abs=1e-5)
    assert float(spared @ always) < float(plain @ always) and int((spared @ M).argmax()) == 2
