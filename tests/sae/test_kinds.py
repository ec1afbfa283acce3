"""Kinds of SAE: their rules, JumpReLU's straight-through gradients against their definition, engines, files, resuming, and a kind of one's own."""
import json
import math
from dataclasses import dataclass

import pytest
import safetensors.torch as st
import torch
from test_training import NATIVE, Vectors

from saerad.core import UserError
from saerad.run.cli import main
from saerad.sae.kinds import KINDS, JumpReLU, Kind, kind_of
from saerad.sae.model import MatryoshkaSAE, SAEConfig
from saerad.sae.training import ENGINES, Trainer, TrainingConfig, choose_engine, dense_loss, initial_sae, reference_loss, train_sae

D = 12
JUMPS = {"groups": SAEConfig(k=5, kind="jumprelu"),
         "reversed": SAEConfig(k=5, kind="jumprelu", group_order="reversed", level_weights=(1, 0, 2, 1, 3)),
         "one group": SAEConfig(k=5, kind="jumprelu", group_fractions=(1.0,), kind_options={"bandwidth": 0.5, "l0_weight": 2.0})}
SETTINGS = TrainingConfig(steps=120, batch_size=128, lr=3e-3, dead_after=0.05, start_rows=512, checkpoint_every=20, log_every=7)


def make(cfg: SAEConfig) -> tuple[MatryoshkaSAE, torch.Tensor]:
    sae = MatryoshkaSAE.from_config(D, cfg).double()
    draw = torch.Generator().manual_seed(0)
    for p in (sae.b_enc, sae.b_dec, sae.W_enc): p.data += 0.1 * torch.randn(p.shape, generator=draw, dtype=torch.float64)
    x = torch.randn(40, D, generator=draw, dtype=torch.float64)
    sae.rule.prepare(sae, x)
    if cfg.kind == "jumprelu": sae.log_threshold.data += 0.2 * torch.randn(sae.width, generator=draw, dtype=torch.float64)
    return sae, x


@pytest.mark.parametrize("name", JUMPS)
def test_the_straight_through_gradient_is_that_of_the_paper(name):
    """Of the threshold: -θ/ε·K through what is decoded, and -K/ε through the L0 of the penalty; of what was read: 1 where a feature is on."""
    sae, x = make(JUMPS[name])
    rule, weights = sae.rule, sae.level_weights
    theta, n = sae.log_threshold.detach().exp(), len(x)
    pre = sae.preactivations(x).detach()
    on, near = pre > theta, ((pre - theta).abs() < rule.bandwidth / 2).double()
    assert near.sum() > 20
    z, at_z = pre * on, torch.zeros_like(pre)
    for weight, prefix in zip(weights, sae.prefixes, strict=True):
        error = (z[:, :prefix] @ sae.W_dec[:prefix] + sae.b_dec - x).detach()
        at_z[:, :prefix] += 2 / n * weight * error @ sae.W_dec.detach()[:prefix].T
    l0 = on.double().sum() / n
    by_l0 = rule.l0_weight * 2 * (l0 / sae.k - 1) / sae.k
    by_theta = (-theta / rule.bandwidth * near * at_z).sum(0) - by_l0 * near.sum(0) / rule.bandwidth / n
    for loss in (reference_loss, dense_loss):
        found = loss(sae, x, rule.select(sae, pre)).gradients
        assert torch.allclose(found["log_threshold"], theta * by_theta, rtol=1e-10, atol=1e-14)
        assert torch.allclose(found["b_enc"], (at_z * on).sum(0), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("cfg", [*JUMPS.values(), SAEConfig(k=5), SAEConfig(k=5, kind="topk")])
def test_the_dense_engine_is_the_reference_in_double_precision(cfg):
    sae, x = make(cfg)
    selected = sae.rule.select(sae, sae.preactivations(x).detach())
    ours, expected = dense_loss(sae, x, selected), reference_loss(sae, x, selected)
    assert ours.value == pytest.approx(expected.value, rel=1e-12) and torch.allclose(ours.levels, expected.levels)
    assert set(ours.gradients) == set(expected.gradients) == {n for n, _ in sae.named_parameters()}
    for name, g in expected.gradients.items(): assert torch.allclose(ours.gradients[name], g, rtol=1e-9, atol=1e-13), name


def test_engines_take_equal_steps():
    logs, thresholds = {}, {}
    for engine in ("reference", "dense"):
        cfg = SETTINGS.model_copy(update={"engine": engine, "precision": "float32", "dead_after": 0.001})
        trainer = Trainer(initial_sae(Vectors(), SAEConfig(k=2, kind="jumprelu"), cfg, 0), cfg)
        batches = Vectors().batches("train", 128, 0)
        logs[engine] = [trainer.train_step(next(batches)[2]) for _ in range(12)]
        thresholds[engine] = trainer.sae.log_threshold.detach()
    assert max(m["aux"] for m in logs["dense"]) > 0
    for a, b in zip(logs["dense"], logs["reference"], strict=True): assert a == pytest.approx(b, rel=1e-3, abs=1e-5)
    assert torch.allclose(thresholds["dense"], thresholds["reference"], atol=2e-4)


@pytest.mark.parametrize("shape", [SAEConfig(k=3, kind="jumprelu"), SAEConfig(k=3, kind="jumprelu", group_fractions=(1.0,))])
def test_l0_ends_near_its_target_and_everything_comes_back_from_disk(shape, tmp_path):
    cfg = TrainingConfig(steps=500, batch_size=256, lr=3e-3, start_rows=1024)
    sae, x = train_sae(Vectors(), shape, cfg, 0, tmp_path), Vectors().x
    z = sae.encode(x)
    assert (z > 0).sum(1).float().mean() == pytest.approx(3, abs=0.4)
    assert (sae(x) - x).square().sum() < 0.4 * (x - x.mean(0)).square().sum()
    assert sae.log_threshold.std() > 0.01                                     # each has learnt its own
    assert torch.equal(z > 0, sae.preactivations(x / sae.scale) > sae.log_threshold.exp())
    assert torch.allclose(torch.cat([sae.encode(row[None]) for row in x[:20]]), z[:20], atol=1e-5)
    again, config = MatryoshkaSAE.load(tmp_path), json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert torch.allclose(again.encode(x), z, atol=1e-5)
    assert again.kind_name == config["kind"] == ("matryoshka_" if len(sae.group_sizes) > 1 else "") + "jumprelu"
    st.save_file({n: t for n, t in sae.tensors().items() if n != "log_threshold"}, tmp_path / "sae.safetensors")
    with pytest.raises(UserError, match="no tensor log_threshold"): MatryoshkaSAE.load(tmp_path)


def test_stopped_and_resumed_ends_with_the_same_bytes(tmp_path):
    class Stops(Vectors):
        def batches(self, *args, **kwargs):
            for step, rows, x in super().batches(*args, **kwargs):
                if step == 70: raise KeyboardInterrupt
                yield step, rows, x
    shape = SAEConfig(k=3, kind="jumprelu", kind_options={"bandwidth": 0.1})
    train_sae(Vectors(), shape, SETTINGS, 0, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt): train_sae(Stops(), shape, SETTINGS, 0, tmp_path / "stopped")
    train_sae(Vectors(), shape, SETTINGS, 0, tmp_path / "stopped")
    for name in ("sae.safetensors", "config.json", "metrics.jsonl", "checkpoint/state.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes(), name
    assert "adam.log_threshold.exp_avg" in st.load_file(tmp_path / "whole/checkpoint/state.safetensors")
    assert MatryoshkaSAE.load(tmp_path / "whole").rule == JumpReLU(bandwidth=0.1)


def test_fast_engines_refuse_what_they_cannot_do_and_auto_falls_back():
    sae = MatryoshkaSAE.from_config(256, SAEConfig(kind="jumprelu"))
    assert choose_engine(TrainingConfig(), sae).name == choose_engine(TrainingConfig(engine="dense"), sae).name == "dense"
    assert choose_engine(TrainingConfig(engine="reference"), sae).name == "reference"
    for engine in ("sparse", *NATIVE):
        with pytest.raises(UserError, match=f"engine {engine} does not do the kind jumprelu; use auto"):
            choose_engine(TrainingConfig(engine=engine), sae)
    for kind in ("batch_topk", "topk"): assert all(engine.supports(kind) for engine in ENGINES.values())


@pytest.mark.parametrize(("settings", "word"), [
    ({"kind": "jumprellu"}, "sae.kind is 'jumprellu'; use one of batch_topk, topk, jumprelu"),
    ({"kind": "topk", "kind_options": {"bandwidth": 0.1}}, "no option of topk; it has none"),
    ({"kind": "jumprelu", "kind_options": {"width": 0.1}}, "it has bandwidth, l0_weight")])
def test_wrong_kinds_and_options_name_themselves(settings, word):
    with pytest.raises(UserError, match=word): SAEConfig(**settings)


@pytest.mark.parametrize(("word", "kind"), [("batch", "batch_topk"), ("token", "topk")])
def test_files_from_before_there_were_kinds_still_load(sae, x, tmp_path, word, kind):
    sae.kind = kind
    sae.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert "selection" not in config and "kind_options" not in config
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "kind"} | {"selection": word}), encoding="utf-8")
    again = MatryoshkaSAE.load(tmp_path)
    assert again.kind == kind and torch.equal(again.encode(x), sae.encode(x))


@pytest.mark.parametrize("kind", ["batch_topk", "topk", "jumprelu"])
def test_activate_is_the_rule_of_inference_for_all_features(kind, x):
    sae = MatryoshkaSAE.from_config(16, SAEConfig(k=5, kind=kind))
    with pytest.raises(UserError, match="never set"): sae.activate(torch.zeros(1, 64))
    sae.threshold.fill_(0.2)
    if kind == "jumprelu": sae.log_threshold.data = torch.linspace(math.log(0.1), math.log(0.9), 64)
    pre = sae.preactivations(x)
    rule = {"batch_topk": pre > 0.2, "topk": (pre >= pre.sort(dim=1, descending=True).values[:, 4:5]) & (pre > 0),
            "jumprelu": pre > torch.linspace(math.log(0.1), math.log(0.9), 64).exp()}[kind]
    assert torch.equal(sae.activate(pre), torch.where(rule, pre, 0)) and torch.equal(sae.encode(x), sae.activate(pre))
    assert not sae.activate(pre).requires_grad


def test_a_kind_of_ones_own_trains_saves_and_loads(monkeypatch, tmp_path):
    @dataclass(frozen=True)
    class ReLUWithL1(Kind):
        l1: float = 0.1
        def activate(self, sae, pre): return pre.relu()
        def penalty(self, sae, pre, ranks=None, tokens=None): return self.l1 * pre.relu().sum() / (tokens or len(pre))
    monkeypatch.setitem(KINDS, "relu_l1", ReLUWithL1())
    active = []
    for l1 in (0.02, 0.5):
        sae = train_sae(Vectors(), SAEConfig(k=3, kind="relu_l1", kind_options={"l1": l1}), SETTINGS, 0, tmp_path / str(l1))
        again = MatryoshkaSAE.load(tmp_path / str(l1))
        assert again.rule == kind_of("relu_l1", {"l1": l1}) and torch.allclose(again.encode(Vectors().x), sae.encode(Vectors().x), atol=1e-5)
        active.append((sae.encode(Vectors().x) > 0).float().mean())
    assert active[1] < 0.7 * active[0]
    monkeypatch.delitem(KINDS, "relu_l1")
    with pytest.raises(UserError, match="sae.kind is 'relu_l1'"): MatryoshkaSAE.load(tmp_path / "0.5")


TINY = """
studies: {source: "phantom:0", train_patients: 20, validation_patients: 5, test_patients: 5}
extraction: {layer: 2}
sae: {expansion: 1, k: 8, kind: jumprelu}
training: {steps: 60, batch_size: 128, lr: null}
interpretation: {features: "sample:30", shuffled: false, bootstrap: 50}
evaluation: {loss_studies: 4, report_studies: 2, max_new_tokens: 12}
steering: {features: [0], method: clamp, alphas: [-10, 10], studies: 1, controls: 0, max_new_tokens: 12}
"""


def test_a_whole_run_with_thresholds_of_features(tmp_path, capsys):
    """Every stage from extract to atlas, and the commands that take what they leave."""
    (tmp_path / "tiny.yaml").write_text(TINY, encoding="utf-8")
    run, sae = tmp_path / "run", str(tmp_path / "run/sae")
    for arguments in (["run", str(tmp_path / "tiny.yaml"), "--out", str(run)], ["doctor", sae, "--store", str(run / "activations")],
                      ["convert", sae, str(tmp_path / "lens"), "--to", "sae_lens"], ["doctor", str(tmp_path / "lens")],
                      ["export", str(run), str(tmp_path / "cache"), "--hookpoint", "layers.2"]):
        with pytest.raises(SystemExit) as ended: main(arguments)
        shown = capsys.readouterr()
        assert ended.value.code == 0, (arguments, shown.err)
        if arguments[0] == "doctor": assert "jumprelu" in shown.out and "one per feature, median" in shown.out
    assert MatryoshkaSAE.load(sae).kind == "jumprelu" and (run / "atlas/index.html").exists() and (run / "report.html").exists()
    assert json.loads((run / "sae/evaluation.json").read_text(encoding="utf-8"))["l0"] == pytest.approx(8, abs=2)
