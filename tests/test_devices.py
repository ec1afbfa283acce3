"""Everything behind the model where it will run, on a device that is not this one: a tensor that is left on the CPU is an error here, as on a card.

What is found there must be what is found on the CPU, since the pretended device computes with the same numbers.
"""
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from pretend_device import DEVICE, Pretend
from test_extraction import SMALL, studies
from test_interventions import hooked, of_kind, padded, study, trained
from test_training import KINDS, D, Vectors
from word_world import make_sae, make_store

from saerad.activations.extraction import ExtractionConfig, extract, hooked_rows
from saerad.activations.store import Store
from saerad.interpretation import exemplars, hard_negatives
from saerad.interpretation.exemplars import ExemplarsConfig
from saerad.sae.encoder import BatchEncoder, Encoder, FeatureEncoder, encode_rows, sae_on
from saerad.sae.evaluation import dead_share, decoder_agreement, decoder_cosine, reconstruction, spliced_losses
from saerad.sae.model import MatryoshkaSAE, SAEConfig
from saerad.sae.training import Trainer, TrainingConfig, initial_sae
from saerad.show.portraits import logit_lens, top_tokens, view_activations
from saerad.steering.effects import output_scores
from saerad.steering.interventions import (
    Batch,
    adding,
    adding_per_token,
    clamping,
    perplexities,
    prompt_mask,
    scaling,
    write_steered,
)
from saerad.subjects.subject import random_mini

LAYER = 4


def test_the_pretended_device_refuses_what_a_card_refuses():
    with Pretend():
        there, left = torch.ones(3, device=DEVICE), torch.ones(3)
        for mix in (lambda: there + left, lambda: torch.where(there > 0, left, there), lambda: there.add_(left), lambda: left[there.long()],
                    lambda: torch.cat([there, left]), lambda: torch.nn.functional.linear(there, torch.eye(3)), lambda: there.numpy(),
                    lambda: np.asarray(there)):
            with pytest.raises((RuntimeError, TypeError), match=r"left on the CPU|another device"): mix()
        assert (there + 1).device == DEVICE and (there + torch.tensor(1.0)).tolist() == [2, 2, 2] and float(there.sum()) == 3
        assert there[torch.tensor([0, 2])].cpu().tolist() == [1, 1] and there.to("cpu").device.type == "cpu"
        assert torch.tensor([1, 2], device=DEVICE).device == torch.zeros_like(there).device == DEVICE


# --- the subject model

@pytest.fixture(scope="module")
def here(): return random_mini(0)


@pytest.fixture(scope="module")
def there():
    """The same subject model on the other device."""
    subject = random_mini(0)
    with Pretend(): subject.model.to(DEVICE)
    return subject


def test_a_model_stays_where_it_is_when_it_is_traced(there):
    with Pretend():
        assert there.device == DEVICE and there.lm is there.lm and there.device == DEVICE
        there.layer(LAYER)
        assert {p.device for p in there.model.parameters()} == {DEVICE}


def test_what_is_read_and_written_does_not_depend_on_the_device(here, there):
    """Rows of two layers, reports, pushed reports, perplexities."""
    prompt, push = here.prompt(study()), torch.randn(1, 256, generator=torch.Generator().manual_seed(0))
    def everything(subject):
        rows = hooked_rows(subject, [prompt], [LAYER, 1], [np.ones(len(prompt), dtype=bool)])
        return [*(rows[i].cpu() for i in (LAYER, 1)), subject.generate([prompt], 5), subject.generate([prompt], 5, LAYER, push),
                torch.tensor(perplexities(subject, prompt, [[5, 9, 11, 2], [7]]))]
    expected = everything(here)
    with Pretend(): found = everything(there)
    for a, b in zip(found, expected, strict=True): assert torch.allclose(a, b, atol=1e-5) if isinstance(a, torch.Tensor) else a == b


def test_a_store_has_the_same_rows(here, there, tmp_path):
    cfg = SMALL.model_copy(update={"more_layers": (3,)})
    extract(studies(6), here, cfg, tmp_path / "here")
    with Pretend(): extract(studies(6), there, cfg, tmp_path / "there")
    for folder in (".", "layer-03"):
        one, other = (Store.open(tmp_path / side / folder) for side in ("here", "there"))
        assert one.tokens.equals(other.tokens) and torch.allclose(one.read(one.where()), other.read(other.where()), rtol=1e-4, atol=1e-5)


def interventions(prompt) -> list:
    """Every way of changing the stream, at every kind of position, with SAEs that stand on the CPU."""
    v, field = (torch.randn(n, 256, generator=torch.Generator().manual_seed(3)) * 2 for n in (1, len(prompt)))
    return [how for positions in ("all", "prompt", "image", "generated") for how in
            (adding(v, positions), clamping(trained(), [1, 5], [9.0, -4.0], positions), scaling(trained(), [0, 3], [-8.0, 9.0], positions),
             scaling(of_kind("topk", d=256), [0, 3, 5], [-8.0, 9.0, 9.0], positions))] + [adding(v, "all", 1), adding_per_token(field)]


def test_steering_is_equal_at_every_kind_of_position(here, there):
    prompt = here.prompt(study())
    expected = [w.ids for w in write_steered(here, prompt, interventions(prompt), LAYER, 6, perplexity=False)]
    assert len(set(expected)) > 5
    with Pretend(): assert [w.ids for w in write_steered(there, prompt, interventions(prompt), LAYER, 6, perplexity=False)] == expected


def test_a_plain_hook_on_the_device_agrees(there):
    with Pretend():
        prompt, how = there.prompt(study()), scaling(of_kind("topk", d=256), [0, 3], [-8.0, 9.0])
        where = prompt_mask(prompt.section, [how])[..., None].to(DEVICE)
        expected = hooked(there, prompt, LAYER, lambda stream, first: Batch([how], DEVICE).change(stream) * (where if first else 1.0), 5)
        got = write_steered(there, prompt, [how], LAYER, 5, perplexity=False)[0]
        assert padded(list(got.ids), expected, there.tokenizer.pad_token_id) == expected


@pytest.mark.parametrize("kind", ["batch_topk", "topk"])
def test_losses_with_a_reconstruction_spliced_in(here, there, kind):
    sae, prompts = of_kind(kind, d=256), [here.prompt(study(n), "There is a small left pleural effusion.") for n in (3, 5)]
    arguments = sae, prompts, torch.zeros(256), ExtractionConfig(layer=LAYER), "kept"
    expected = spliced_losses(here, *arguments)
    with Pretend(): assert spliced_losses(there, *arguments) == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_lenses_scores_and_views_are_the_same_there(here, there):
    sae, prompts = of_kind("batch_topk", d=256), [here.prompt(study(2))]
    def everything(subject):
        views = list(view_activations(subject, sae, LAYER, prompts))
        return [output_scores(subject, sae, [1, 4, 7]), *top_tokens(sae, logit_lens(subject), 3), *(z.toarray() for *_, z in views)]
    expected = everything(here)
    with Pretend(): found = everything(there)
    assert len(found) == len(expected) > 3
    for a, b in zip(found, expected, strict=True): assert np.allclose(a, b, atol=1e-4)


# --- the SAE

def test_the_encoder_leaves_its_numbers_there_or_brings_them_home(sae, x):
    with Pretend():
        away = sae_on(sae, DEVICE)
        assert sae_on(sae, DEVICE) is away and sae_on(away, DEVICE) is away and away.W_enc.device == DEVICE
        sae.threshold.fill_(0.3)
        assert sae_on(sae, DEVICE) is not away and float(sae_on(sae, DEVICE).threshold) == pytest.approx(0.3)
        away = sae_on(sae, DEVICE)
        stays, comes = Encoder(away).on_device(x), Encoder(away)(x)
        assert stays.device == DEVICE and comes.device.type == "cpu" and torch.equal(comes, stays.cpu())
    assert torch.allclose(comes, sae.encode(x), atol=1e-6)


def test_a_few_features_for_each_row_of_a_batch():
    saes = [of_kind("topk"), of_kind("batch_topk")]
    encoders, x = [FeatureEncoder.of(saes[i % 2], range(i + 1)) for i in range(5)], torch.randn(5, 7, 8) * 5
    expected = BatchEncoder(encoders)(x)
    with Pretend(): assert torch.allclose(BatchEncoder(encoders, DEVICE)(x.to(DEVICE)).cpu(), expected, atol=1e-6)


@pytest.fixture(scope="module")
def store(tmp_path_factory): return make_store(tmp_path_factory.mktemp("words") / "store", studies=60)


def test_evaluation_is_the_same_there(store):
    sae = make_sae()
    def everything(sae):
        rows = np.arange(len(store))[::2]
        return [encode_rows(sae, store, rows).toarray(), dead_share(store, sae), decoder_cosine(sae), decoder_agreement(sae, sae),
                reconstruction(store, sae, rows)["fvu_by_prefix"], hard_negatives.nearest_features(sae, 3)[1]]
    expected = everything(sae)
    with Pretend(): found = everything(sae_on(sae, DEVICE))
    for a, b in zip(found, expected, strict=True): assert np.allclose(a, b, atol=1e-6) if isinstance(a, np.ndarray) else a == pytest.approx(b)


def test_exemplars_are_the_same_there(store, tmp_path, monkeypatch):
    cfg = ExemplarsConfig(block=100, candidates=20, silent_pool=100)
    def collect(folder):
        exemplars.collect_exemplars(store, make_sae(), cfg, 0, folder)
        hard_negatives.add_hard_negatives(store, make_sae(), cfg, 0, folder)
    collect(tmp_path / "here")
    with Pretend(), monkeypatch.context() as patch:
        for module in (exemplars, hard_negatives): patch.setattr(module, "fastest_device", lambda: DEVICE)
        collect(tmp_path / "there")
    names = sorted(p.name for p in (tmp_path / "here").iterdir())
    assert len(names) == 4 and [p.name for p in sorted((tmp_path / "there").iterdir())] == names
    for name in names: assert pq.read_table(tmp_path / "there" / name).equals(pq.read_table(tmp_path / "here" / name)), name


SHAPES = {"batch_topk": KINDS["matryoshka"], "topk": KINDS["matryoshka topk"], "jumprelu": SAEConfig(k=4, kind="jumprelu")}

@pytest.mark.parametrize("kind", SHAPES)
def test_training_takes_the_same_steps_there(kind, tmp_path):
    """With dead features, and a checkpoint that goes from one device to the other."""
    def steps(device, n, restore=None):
        cfg = TrainingConfig(engine="dense", precision="float32", steps=20, batch_size=64, lr=3e-3, start_rows=256, dead_after=0.05)
        trainer = Trainer(initial_sae(Vectors(500), SHAPES[kind], cfg, 0).to(device), cfg)
        if restore: assert trainer.restore(restore, "same")
        log = [trainer.train_step(x) for _, (_, _, x) in zip(range(n), Vectors(500).batches("train", 64, 0, start=trainer.step), strict=False)]
        return trainer, log
    trainer, expected = steps("cpu", 6)
    with Pretend():
        half, log = steps(DEVICE, 3)
        half.save(tmp_path / "state", "same")
        assert half.tokens_since_fired.device == DEVICE
        log += steps(DEVICE, 3, tmp_path / "state")[1]
    assert max(m["aux"] for m in expected) > 0
    for a, b in zip(log, expected, strict=True): assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
    resumed, more = steps("cpu", 3, tmp_path / "state")
    assert more[-1] == pytest.approx(expected[-1], rel=1e-4, abs=1e-6) and resumed.sae.d == D


def test_an_sae_is_saved_from_anywhere(sae, tmp_path):
    with Pretend(): sae_on(sae, DEVICE).save(tmp_path / "there")
    sae.save(tmp_path / "here")
    assert (tmp_path / "there/sae.safetensors").read_bytes() == (tmp_path / "here/sae.safetensors").read_bytes()
    assert MatryoshkaSAE.load(tmp_path / "there").kind == SAEConfig().kind
