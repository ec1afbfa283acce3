"""Checkpoints that the peers' own classes write, at random settings, mean here what they mean there: `make peers` installs them and runs this."""
import dataclasses
import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from saerad.sae.convert import DICTIONARY_LEARNING, NEUTRAL, OBEYED, SAE_LENS, WITHOUT_EFFECT, read_sae

D, WIDTH, K = 8, 32, 4
SEEDS = some.integers(0, 2**20)
few = settings(max_examples=40, deadline=None)


def known(library: str) -> set[str]: return {*OBEYED[library].split(), *NEUTRAL[library], *WITHOUT_EFFECT[library].split()}


def drawn(model: torch.nn.Module, seed: int) -> torch.Tensor:
    """Every parameter drawn anew, decoder rows of 0.25 to 1.75; gives vectors to read."""
    draw = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        p.data = torch.randn(p.shape, generator=draw)
        if name in ("threshold", "activation_function.log_jumprelu_threshold"): p.data = torch.rand(p.shape, generator=draw)
        if name in ("W_dec", "W_D"): p.data *= (torch.rand(len(p), generator=draw) * 1.5 + 0.25)[:, None] / p.norm(dim=1, keepdim=True)
        if name == "decoder.weight": p.data /= p.norm(dim=0, keepdim=True)
    return torch.randn(24, D, generator=draw) * 3


def same(a: torch.Tensor, b: torch.Tensor) -> bool: return torch.allclose(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


@few
@given(SEEDS, some.booleans(), some.booleans(), some.sampled_from(["topk", "jumprelu"]))
def test_sae_lens(seed, subtracts, by_norm, architecture):
    registry = pytest.importorskip("sae_lens.registry")
    make, config = registry.SAE_CLASS_REGISTRY[architecture]
    more = {"k": K, "rescale_acts_by_decoder_norm": by_norm} if architecture == "topk" else {}
    theirs = make(config(d_in=D, d_sae=WIDTH, apply_b_dec_to_input=subtracts, **more))
    x = drawn(theirs, seed)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        theirs.save_model(folder)
        ours = read_sae(folder).sae()
        assert same(ours.encode(x), theirs.encode(x)) and same(ours(x), theirs(x))


@few
@given(SEEDS, some.booleans(), some.booleans(), some.sampled_from(["batchtopk", "matryoshka_batchtopk"]))
def test_sae_lens_in_training_is_what_sae_lens_saves_for_use(seed, subtracts, by_norm, architecture):
    lens = pytest.importorskip("sae_lens")
    from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
    make, config = SAE_TRAINING_CLASS_REGISTRY[architecture]
    more = {"matryoshka_widths": [8, 16, WIDTH]} if architecture.startswith("matryoshka") else {}
    theirs = make(config(d_in=D, d_sae=WIDTH, k=K, apply_b_dec_to_input=subtracts, rescale_acts_by_decoder_norm=by_norm, **more))
    x = drawn(theirs, seed)
    theirs.topk_threshold.fill_(1.5)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        theirs.save_inference_model(f"{folder}/use")
        theirs.save_model(f"{folder}/training")
        finished = lens.SAE.load_from_disk(f"{folder}/use")
        for kept in ("training", "use"):
            ours = read_sae(f"{folder}/{kept}").sae()
            assert same(ours.encode(x), finished.encode(x)) and same(ours(x), finished(x)), kept


@few
@given(SEEDS, some.sampled_from(["AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder"]))
def test_dictionary_learning(seed, name):
    pytest.importorskip("dictionary_learning")
    from dictionary_learning.dictionary import JumpReluAutoEncoder
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK
    theirs = {"AutoEncoderTopK": lambda: AutoEncoderTopK(D, WIDTH, K), "BatchTopKSAE": lambda: BatchTopKSAE(D, WIDTH, K),
              "MatryoshkaBatchTopKSAE": lambda: MatryoshkaBatchTopKSAE(D, WIDTH, K, [8, 8, 16]),
              "JumpReluAutoEncoder": lambda: JumpReluAutoEncoder(D, WIDTH)}[name]()
    x = drawn(theirs, seed)
    if name != "JumpReluAutoEncoder": theirs.threshold.fill_(1.5)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        torch.save(theirs.state_dict(), f"{folder}/ae.pt")
        Path(folder, "config.json").write_text(json.dumps({"trainer": {"dict_class": name, "k": K}, "buffer": {}}), encoding="utf-8")
        ours = read_sae(folder).sae()
        assert same(ours.encode(x), theirs.encode(x)) and same(ours(x), theirs(x))


@few
@given(SEEDS)
def test_sparsify(seed):
    sparsify = pytest.importorskip("sparsify")
    theirs = sparsify.SparseCoder(D, sparsify.SparseCoderConfig(num_latents=WIDTH, k=K))
    x = drawn(theirs, seed)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        theirs.save_to_disk(folder)
        ours, top = read_sae(folder).sae(), theirs.encode(x)
        features = torch.zeros(len(x), WIDTH).scatter(1, top.top_indices, top.top_acts)
        assert same(ours.encode(x), features) and same(ours(x), theirs(x).sae_out)


@few
@given(SEEDS, some.sampled_from(["relu", "jumprelu", "topk"]), some.booleans(), some.booleans(), some.booleans())
def test_llamascopium(seed, act, by_norm, bias, folded):
    sae = pytest.importorskip("llamascopium.models.sae")
    cfg = sae.SAEConfig(hook_point_in="h", hook_point_out="h", d_model=D, expansion_factor=4, act_fn=act, top_k=K, use_decoder_bias=bias,
                        sparsity_include_decoder_norm=by_norm)
    theirs = sae.SparseAutoEncoder(cfg)
    theirs.set_dataset_average_activation_norm({"h": 12.0})
    x = drawn(theirs, seed)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        theirs.save_pretrained(folder, fold_activation_scale=folded)
        theirs.cfg.save_hyperparameters(folder)
        ours, scale = read_sae(folder).sae(), 1.0 if folded else 12 / D**0.5
        features = theirs.encode(x / scale)
        sizes = theirs.W_D.norm(dim=1) if by_norm and act == "topk" else 1.0
        assert same(ours.encode(x), features * sizes) and same(ours(x), theirs.decode(features) * scale)


def test_no_key_that_the_peers_write_is_unknown():
    registry = pytest.importorskip("sae_lens.registry")
    for kinds in (registry.SAE_CLASS_REGISTRY, registry.SAE_TRAINING_CLASS_REGISTRY):
        for name in SAE_LENS.keys() & kinds.keys():
            assert {f.name for f in dataclasses.fields(kinds[name][1])} <= known("sae_lens"), name
    sparsify = pytest.importorskip("sparsify")
    assert {f.name for f in dataclasses.fields(sparsify.SparseCoderConfig)} <= known("sparsify")
    sae = pytest.importorskip("llamascopium.models.sae")
    assert sae.SAEConfig.model_fields.keys() <= known("llamascopium")


def test_no_key_of_dictionary_learning_is_unknown():
    pytest.importorskip("dictionary_learning")
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer
    common = {"steps": 10_000, "activation_dim": D, "dict_size": WIDTH, "layer": 1, "lm_name": "m", "device": "cpu"}
    made = [TopKTrainer(k=K, **common), BatchTopKTrainer(k=K, **common), JumpReluTrainer(**common),
            MatryoshkaBatchTopKTrainer(k=K, group_fractions=[0.25, 0.75], **common)]
    for trainer in made:
        assert set(trainer.config) <= known("dictionary_learning") and trainer.config["dict_class"] in DICTIONARY_LEARNING


def test_the_peers_open_the_released_sae_and_find_the_same_features():
    """Its matrices are float16 in the files; both libraries read them into float32."""
    sae_lens, utils = pytest.importorskip("sae_lens"), pytest.importorskip("dictionary_learning.utils")
    released = Path(__file__).parents[2] / "nbs/results/release/sae"
    ours = read_sae(released / "saerad").sae()
    x = 12 * torch.randn(200, 256, generator=torch.Generator().manual_seed(0))
    lens, learning = sae_lens.SAE.load_from_disk(released / "sae_lens"), utils.load_dictionary(released / "dictionary_learning", "cpu")[0]
    with torch.no_grad():
        for theirs, found in ((lens, lens.encode(x)), (learning, learning.encode(x, use_threshold=True))):
            assert torch.equal(found > 0, ours.encode(x) > 0) and same(theirs(x), ours(x)) and theirs.W_enc.dtype == torch.float32
