"""Training: gradients against automatic differentiation, AuxK, the threshold, and resuming after a kill."""
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch as st
import torch
from nursery import nursery

from saerad.core import UserError, prefetch, rng
from saerad.sae import kernels
from saerad.sae.convert import doctor
from saerad.sae.kinds import batch_topk
from saerad.sae.model import MatryoshkaSAE, SAEConfig
from saerad.sae.training import (
    Job,
    Log,
    MeasuredEngine,
    Trainer,
    TrainingConfig,
    aux_gradients,
    aux_loss,
    dense_loss,
    geometric_median,
    initial_sae,
    memory_needed,
    reference_loss,
    sparse_loss,
    train_sae,
    train_saes,
)

D = 12


class Vectors:
    """Made-up structured vectors, dealt as a store deals them."""
    d = D

    def __init__(self, n: int = 4000, slow: float = 0.0):
        draw = torch.Generator().manual_seed(0)
        parts = torch.randn(24, D, generator=draw)
        on = torch.rand(n, 24, generator=draw) < 0.1
        self.x = 3 * (on * torch.rand(n, 24, generator=draw)) @ parts + 0.05 * torch.randn(n, D, generator=draw) + 1
        self.meta, self.slow = {"n": n}, slow

    def batches(self, split, batch_size, seed, start=0):
        step = start
        while True:
            if self.slow: time.sleep(self.slow)
            rows = rng(seed, split, step).integers(len(self.x), size=batch_size)
            yield step, rows, self.x[rows]
            step += 1


def plain_loss(sae: MatryoshkaSAE, x: torch.Tensor, k: int) -> torch.Tensor:
    """The definition, word for word, for automatic differentiation."""
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    cut = pre.relu().flatten().sort(descending=True).values[min(k * len(x), pre.numel()) - 1]
    z = torch.where((pre >= cut) & (pre > 0), pre, torch.zeros(()).to(pre))
    total = 0.0
    for weight, prefix in zip(sae.level_weights, sae.prefixes, strict=True):
        rebuilt = z[:, :prefix] @ sae.W_dec[:prefix] + sae.b_dec
        total = total + weight * ((rebuilt - x) ** 2).sum(1).mean()
    return total


def make(cfg: SAEConfig, seed: int = 0) -> tuple[MatryoshkaSAE, torch.Tensor]:
    sae = MatryoshkaSAE.from_config(D, cfg, seed).double()
    draw = torch.Generator().manual_seed(seed)
    for p in (sae.b_enc, sae.b_dec, sae.W_enc): p.data += 0.1 * torch.randn(p.shape, generator=draw, dtype=torch.float64)
    return sae, torch.randn(40, D, generator=draw, dtype=torch.float64)


NATIVE = ["native"] if kernels.native() else []

CASES = {
    "ascending": SAEConfig(k=5), "reversed": SAEConfig(k=5, group_order="reversed"),
    "weights": SAEConfig(k=5, level_weights=(0.5, 0.0, 3.0, 1.0, 2.0)), "one group": SAEConfig(k=5, group_fractions=(1.0,)),
    "two groups": SAEConfig(k=3, group_fractions=(0.3, 0.7)), "k is everything": SAEConfig(k=48), "k is one": SAEConfig(k=1)}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("loss", [reference_loss, sparse_loss, dense_loss])
def test_loss_and_gradients_are_those_of_the_definition(name, loss):
    sae, x = make(CASES[name])
    found = loss(sae, x, batch_topk(sae.preactivations(x).detach(), sae.k))
    expected = plain_loss(sae, x, sae.k)
    expected.backward()
    assert found.value == pytest.approx(expected.item(), rel=1e-12)
    for n, p in sae.named_parameters():
        assert found.gradients[n].shape == p.shape
        assert torch.allclose(found.gradients[n], p.grad, rtol=1e-10, atol=1e-13), n


def test_a_small_step_down_the_gradient_lowers_the_loss():
    sae, x = make(SAEConfig(k=5))
    before = sparse_loss(sae, x, batch_topk(sae.preactivations(x).detach(), 5))
    for n, p in sae.named_parameters(): p.data -= 1e-3 * before.gradients[n]
    assert sparse_loss(sae, x, batch_topk(sae.preactivations(x).detach(), 5)).value < before.value


def test_groups_do_not_change_the_size_of_the_loss():
    """With the same errors at every level, any number of groups gives the same loss."""
    x = torch.randn(30, D, generator=torch.Generator().manual_seed(0))
    values = []
    for fractions in ((1.0,), (0.5, 0.5), (1/16, 1/16, 1/8, 1/4, 1/2)):
        sae = MatryoshkaSAE.from_config(D, SAEConfig(k=5, group_fractions=fractions))
        sae.W_dec.data.zero_()
        values.append(sparse_loss(sae, x, batch_topk(sae.preactivations(x).detach(), 5)).value)
    assert values == pytest.approx([values[0]] * 3, rel=1e-6)
    assert values[0] == pytest.approx(float(x.square().sum(1).mean()), rel=1e-6)


def test_nothing_positive_is_a_loss_of_the_bias_alone():
    sae, x = make(SAEConfig(k=5))
    sae.b_enc.data.fill_(-100.0)
    kept = batch_topk(sae.preactivations(x).detach(), 5)
    found = sparse_loss(sae, x, kept)
    assert len(kept.value) == 0 and kept.cut == 0
    assert found.gradients["W_enc"].count_nonzero() == 0
    assert torch.allclose(found.gradients["b_dec"], 2 * (sae.b_dec - x.mean(0)))


def test_batch_topk_keeps_the_largest_of_the_whole_batch():
    pre = torch.randn(64, 48, generator=torch.Generator().manual_seed(1))
    kept = batch_topk(pre, 5)
    expected = pre.flatten().topk(5 * 64).values
    assert torch.equal(kept.value.sort(descending=True).values, expected)
    assert kept.cut == expected[-1] and torch.equal(pre[kept.row, kept.col], kept.value)
    order = kept.row * 48 + kept.col
    assert (order.diff() > 0).all() and len(kept.row.bincount(minlength=64).unique()) > 1


def test_batch_topk_takes_what_is_positive_when_that_is_less():
    kept = batch_topk(torch.tensor([[1.0, -1.0, 0.0], [-2.0, 0.0, 3.0]]), 2)
    assert kept.value.tolist() == [1.0, 3.0] and kept.cut == 1.0


# --- AuxK

def test_aux_is_decoded_without_the_bias():
    sae, x = make(SAEConfig(k=5))
    residual = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    dead = torch.arange(10, 20)
    z = ((x - sae.b_dec) @ sae.W_enc[:, dead] + sae.b_enc[dead]).relu()
    expected = (residual - z @ sae.W_dec[dead]).square().sum() / (residual - residual.mean(0)).square().sum()
    assert aux_loss(sae, x, residual, dead, k=10).item() == pytest.approx(expected.item(), rel=1e-12)


def test_aux_uses_the_k_strongest_dead_features_of_each_token():
    sae, x = make(SAEConfig(k=5))
    residual, dead = x.clone(), torch.arange(20, 48)
    pre = ((x - sae.b_dec) @ sae.W_enc[:, dead] + sae.b_enc[dead]).relu()
    best = pre.topk(3, dim=1)
    z = torch.zeros_like(pre).scatter(1, best.indices, best.values)
    expected = (residual - z @ sae.W_dec[dead]).square().sum() / (residual - residual.mean(0)).square().sum()
    assert aux_loss(sae, x, residual, dead, k=3).item() == pytest.approx(expected.item(), rel=1e-12)


def test_aux_reaches_encoder_and_decoder_of_the_dead_and_of_no_other():
    sae, x = make(SAEConfig(k=5))
    dead = torch.tensor([3, 40])
    aux_loss(sae, x, x.clone(), dead, k=2).backward()
    alive = torch.ones(48, dtype=torch.bool)
    alive[dead] = False
    for gradient in (sae.W_enc.grad.T, sae.W_dec.grad, sae.b_enc.grad[:, None]):
        assert gradient[dead].abs().sum(1).min() > 0
        assert gradient[alive].count_nonzero() == 0


def test_dead_features_come_back():
    """Features that start with a bias against firing come back with AuxK, and stay silent without it."""
    dead = {}
    for alpha in (1.0, 0.0):
        cfg = TrainingConfig(steps=250, batch_size=128, lr=5e-3, dead_after=0.1, aux_alpha=alpha, start_rows=512, encoder_start=1.0)
        trainer = Trainer(initial_sae(Vectors(), SAEConfig(k=1, group_fractions=(1.0,)), cfg, 0), cfg)
        trainer.sae.b_enc.data[6:] = -0.3
        for _, _, x in Vectors().batches("train", 128, 0):
            metrics = trainer.train_step(x)
            if trainer.step == cfg.steps: break
        dead[alpha] = metrics["dead"]
    assert dead[0.0] > 0.3 > 0.1 > dead[1.0]


@pytest.mark.parametrize("k", [1, 3, 28, 60])
def test_aux_gradients_by_hand_are_those_of_automatic_differentiation(k):
    sae, x = make(SAEConfig(k=5))
    residual, dead = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64), torch.arange(20, 48)
    expected = aux_loss(sae, x, residual, dead, k)
    expected.backward()
    value, found = aux_gradients(sae, x, residual, dead, k)
    assert value == pytest.approx(expected.item(), rel=1e-12)
    rows = {"W_enc": sae.W_enc.grad.T[dead], "W_dec": sae.W_dec.grad[dead], "b_enc": sae.b_enc.grad[dead], "b_dec": sae.b_dec.grad}
    for name, grad in rows.items():
        assert torch.allclose(found[name], grad, rtol=1e-9, atol=1e-13), name


# --- engines

ENGINES = ["reference", "dense", "sparse", *NATIVE]
KINDS = {"matryoshka": SAEConfig(k=4), "reversed, weighted": SAEConfig(k=4, group_order="reversed", level_weights=(1, 0, 2, 1, 3)),
         "batch topk": SAEConfig(k=4, group_fractions=(1.0,)), "topk": SAEConfig(k=4, group_fractions=(1.0,), kind="topk"),
         "matryoshka topk": SAEConfig(k=4, kind="topk")}


def steps(engine: str, shape: SAEConfig, n: int = 12, **settings) -> tuple[MatryoshkaSAE, list[dict[str, float]]]:
    cfg = TrainingConfig(engine=engine, precision="float32", **({"steps": 60, "batch_size": 128, "lr": 3e-3, "start_rows": 512} | settings))
    trainer, log = Trainer(initial_sae(Vectors(), shape, cfg, 0), cfg), []
    for _, _, x in Vectors().batches("train", 128, 0):
        log.append(trainer.train_step(x))
        if trainer.step == n: return trainer, log


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ENGINES[1:])
def test_every_engine_takes_the_steps_of_the_reference(engine, kind):
    ours, log = steps(engine, KINDS[kind])
    theirs, expected = steps("reference", KINDS[kind])
    assert ours.engine.name == engine
    for a, b in zip(log, expected, strict=True): assert a == pytest.approx(b, rel=2e-4, abs=1e-6)
    for name, p in ours.sae.named_parameters(): assert torch.allclose(p, theirs.sae.get_parameter(name), atol=2e-4), name


@pytest.mark.parametrize("one", ENGINES[1:])
@pytest.mark.parametrize("other", ENGINES[1:])
def test_a_checkpoint_of_one_engine_is_taken_up_by_another(one, other, tmp_path):
    (there, _), (here, _) = steps(one, SAEConfig(k=4), 5), steps(other, SAEConfig(k=4), 1)
    there.save(tmp_path / "checkpoint", "same run")
    assert here.restore(tmp_path / "checkpoint", "same run") and here.step == 5
    for name, p in there.sae.named_parameters():
        mine = here.sae.get_parameter(name)
        assert torch.equal(mine, p)
        for key, moment in there.optimizer.state[p].items():
            assert moment.any() and torch.equal(here.engine.to_rows(name, here.optimizer.state[mine][key]), there.engine.to_rows(name, moment))


@pytest.mark.parametrize("engine", ENGINES[1:])
def test_every_engine_revives_as_the_reference_does(engine):
    dead = {"dead_after": 0.001, "aux_k": 3, "aux_alpha": 1.0, "clip": 0.05}
    (ours, log), (theirs, expected) = (steps(e, SAEConfig(k=1), **dead) for e in (engine, "reference"))
    assert max(m["aux"] for m in log) > 0 and max(m["dead"] for m in log) > 0.1
    for a, b in zip(log, expected, strict=True): assert a == pytest.approx(b, rel=1e-3, abs=1e-5)
    for name, p in ours.sae.named_parameters(): assert torch.allclose(p, theirs.sae.get_parameter(name), atol=1e-3), name


@pytest.mark.skipif(not NATIVE, reason="no C++ compiler")
@pytest.mark.parametrize("kind", ["batch_topk", "topk"])
@pytest.mark.parametrize("precision", ["int8", "int8 by AVX2", "bfloat16", "float32"])
def test_a_rough_search_keeps_what_float32_keeps(kind, precision, monkeypatch):
    if "AVX2" in precision: monkeypatch.setattr(kernels, "has_int8_units", lambda: False)
    cfg = TrainingConfig(engine="native", precision=precision.split()[0], steps=10, batch_size=256)
    trainer = Trainer(MatryoshkaSAE.from_config(96, SAEConfig(k=9, kind=kind)), cfg)
    for seed in range(4):
        x = torch.randn(256, 96, generator=torch.Generator().manual_seed(seed)) / 96 ** 0.5
        expected = trainer.select(x, 256)
        step = kernels.Step(x, trainer.sae.W_enc.detach().T, trainer.sae.W_dec.detach(), trainer.sae.group_sizes, trainer.sae.level_weights)
        places, value, cut = getattr(trainer.engine.search, kind)(step, x)
        assert torch.equal(places.row_of() * 384 + places.col, expected.row * 384 + expected.col)
        assert torch.allclose(value, expected.value, rtol=1e-5) and cut == pytest.approx(expected.cut, rel=1e-5)


@pytest.mark.skipif(not NATIVE, reason="no C++ compiler")
@pytest.mark.parametrize("precision", ["int8", "bfloat16"])
def test_a_margin_that_is_too_small_is_widened(precision):
    trainer = Trainer(MatryoshkaSAE.from_config(96, SAEConfig(k=9)), TrainingConfig(engine="native", precision=precision, batch_size=256))
    x = torch.randn(256, 96, generator=torch.Generator().manual_seed(0)) / 96 ** 0.5
    step = kernels.Step(x, trainer.sae.W_enc.detach().T, trainer.sae.W_dec.detach(), trainer.sae.group_sizes, trainer.sae.level_weights)
    narrow, wide = trainer.engine.search.batch_topk(step, x, margin=1e-6), trainer.engine.search.batch_topk(step, x, margin=0.5)
    assert torch.equal(narrow[0].col, wide[0].col) and narrow[2] == wide[2]


@pytest.mark.skipif(not NATIVE, reason="no C++ compiler")
def test_a_stream_too_uneven_for_integers_is_searched_in_bfloat16_and_just_as_exactly():
    trainer = Trainer(MatryoshkaSAE.from_config(96, SAEConfig(k=9)), TrainingConfig(engine="native", precision="int8", batch_size=256))
    draw = torch.Generator().manual_seed(0)
    for step_number in range(3):
        x = torch.randn(256, 96, generator=draw) / 96 ** 0.5
        x[:, 5] += 40
        with torch.no_grad(): trainer.sae.W_enc[5] = 0
        expected = trainer.select(x, 256)
        step = kernels.Step(x, trainer.sae.W_enc.detach().T, trainer.sae.W_dec.detach(), trainer.sae.group_sizes, trainer.sae.level_weights)
        places, value, _ = trainer.engine.search.batch_topk(step, x)
        assert torch.equal(places.row_of() * 384 + places.col, expected.row * 384 + expected.col) and not trainer.engine.search.use_int8, step_number
        assert torch.allclose(value, expected.value, rtol=1e-5)


def test_the_fastest_engine_is_measured():
    trainer = Trainer(MatryoshkaSAE.from_config(96, SAEConfig(k=9)), TrainingConfig(engine="dense", batch_size=64))
    measure = MeasuredEngine(trainer)
    assert measure.candidates() == ["dense", "sparse"] and measure.fastest(torch.randn(64, 96)) in measure.candidates()


def test_threads_do_not_change_a_bit():
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(steps(NATIVE[0] if NATIVE else "sparse", SAEConfig(k=4), n=3)[0].sae.W_dec.detach().clone())
    finally: torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found)


def test_engines_and_devices_that_cannot_work_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "native", lambda: None)
    sae = MatryoshkaSAE.from_config(D, SAEConfig(k=3))
    assert Trainer(sae, TrainingConfig()).engine.name == "sparse"
    with pytest.raises(UserError, match="compiler"): Trainer(sae, TrainingConfig(engine="native"))
    for device, word in (("tpu", "use auto"), ("cuda:7" if not torch.cuda.is_available() else "meta", "CUDA|use auto")):
        with pytest.raises(UserError, match=word): train_sae(Vectors(), SAEConfig(k=3), TrainingConfig(device=device), 0, tmp_path / "a")


def test_more_dictionary_than_memory_says_what_fits(monkeypatch, tmp_path):
    monkeypatch.setattr("saerad.sae.training.memory_free", lambda device: memory_needed(D, 8 * D, 128))
    with pytest.raises(UserError, match="sae.expansion 8 fits"):
        train_sae(Vectors(), SAEConfig(k=3, expansion=64), TrainingConfig(batch_size=128), 0, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_several_saes_on_one_stream_are_those_that_train_alone(tmp_path):
    store = Vectors()
    shapes = {"a": SAEConfig(k=3), "b": SAEConfig(k=5, expansion=2, group_order="reversed"), "c": SAEConfig(k=3)}
    shorter = SETTINGS.model_copy(update={"steps": 60})
    jobs = [Job(store, s, shorter if n == "b" else SETTINGS, int(n == "c"), tmp_path / n) for n, s in shapes.items()]
    assert [sae.k for sae in train_saes(jobs, 0)] == [3, 5, 3]
    for job in jobs[:2]:
        train_sae(store, job.sae, job.training, 0, tmp_path / "alone" / job.out.name)
        for name in ("sae.safetensors", "metrics.jsonl"):
            assert (job.out / name).read_bytes() == (tmp_path / "alone" / job.out.name / name).read_bytes()
    assert not torch.equal(*(st.load_file(tmp_path / n / "sae.safetensors")["W_dec"] for n in "ac"))
    other = Job(store, shapes["a"], SETTINGS.model_copy(update={"batch_size": 64}), 0, tmp_path / "d")
    with pytest.raises(UserError, match="batch_size differs"): train_saes([jobs[0], other], 0)


def test_the_next_batch_is_read_ahead_and_errors_arrive():
    made = []
    def items():
        for i in range(3):
            made.append(i)
            yield i
        raise RuntimeError("the disk")
    reader = prefetch(items())
    assert next(reader) == 0
    assert next(reader) == 1 and made[:2] == [0, 1]
    assert next(reader) == 2
    with pytest.raises(RuntimeError, match="the disk"): next(reader)


def test_tensorboard_gets_every_metric_where_it_is_installed(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first, last in ((0, 3), (2, 4)):                             # killed after step 3 with a checkpoint of step 2
        with Log(tmp_path, first) as log:
            for step in range(first + 1, last + 1): log.write({"step": step, "fvu": 1 / step, "l0": 4.0})
    board = events.EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert sorted(board.Tags()["scalars"]) == ["fvu", "l0"]
    assert [(e.step, round(e.value, 4)) for e in board.Scalars("fvu")] == [(1, 1.0), (2, 0.5), (3, 0.3333), (4, 0.25)]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [m["step"] for m in lines] == [1, 2, 3, 4]


# --- a step

@pytest.mark.parametrize("engine", ["sparse", *NATIVE])
def test_decoder_rows_stay_at_length_one_and_move_sideways(engine):
    cfg = TrainingConfig(steps=50, batch_size=64, lr=1e-2, start_rows=256, engine=engine)
    trainer = Trainer(initial_sae(Vectors(), SAEConfig(k=3), cfg, 0), cfg)
    x = Vectors().x[:64]
    for _ in range(5):
        before = trainer.sae.W_dec.detach().clone()
        trainer.train_step(x)
        assert torch.allclose(trainer.sae.W_dec.norm(dim=1), torch.ones(48), atol=1e-6)
        if trainer.engine.name == "native": continue                      # it never writes gradients down
        assert (trainer.sae.W_dec.grad * before).sum(1).abs().max() < 1e-6
        norm = torch.stack([p.grad.norm() for p in trainer.sae.parameters()]).norm()
        assert norm <= cfg.clip * 1.001


def test_threshold_is_one_average_a_step_and_float32():
    cfg = TrainingConfig(steps=20, batch_size=64, threshold_start=0.5, threshold_beta=0.9, start_rows=256, log_every=1)
    trainer = Trainer(initial_sae(Vectors(), SAEConfig(k=3), cfg, 0), cfg)
    expected = None
    for _, _, x in Vectors().batches("train", 64, 0):
        with torch.no_grad(): cut = batch_topk(trainer.sae.preactivations(x / trainer.sae.scale), 3).cut
        if trainer.step >= 10: expected = cut if expected is None else 0.9 * expected + 0.1 * cut
        trainer.train_step(x)
        assert trainer.sae.threshold.dtype == torch.float32
        assert float(trainer.sae.threshold) == pytest.approx(-1.0 if expected is None else expected, rel=1e-5)
        if trainer.step == cfg.steps: break


def test_silence_is_counted_in_tokens():
    cfg = TrainingConfig(steps=20, batch_size=64, start_rows=256)
    trainer = Trainer(initial_sae(Vectors(), SAEConfig(k=3), cfg, 0), cfg)
    trainer.sae.b_enc.data[7] = -100.0
    for _ in range(3): trainer.train_step(Vectors().x[:64])
    assert trainer.tokens_since_fired[7] == 3 * 64 and trainer.tokens_since_fired.min() == 0


def test_inference_is_as_sparse_as_training(tmp_path):
    cfg = TrainingConfig(steps=400, batch_size=256, lr=3e-3, threshold_beta=0.95, start_rows=1024)
    sae = train_sae(Vectors(), SAEConfig(k=3), cfg, 0, tmp_path)
    assert (sae.encode(Vectors().x) > 0).sum(1).float().mean() == pytest.approx(3, abs=0.3)


def test_start_is_scale_and_geometric_median():
    store, cfg = Vectors(), TrainingConfig(steps=1, batch_size=100, start_rows=1000)
    sae = initial_sae(store, SAEConfig(k=3), cfg, 0)
    reader = store.batches("train", 100, 0)
    x = torch.cat([next(reader)[2] for _ in range(10)])
    assert float(sae.scale) == pytest.approx(float(x.square().sum(1).mean().sqrt()), rel=1e-6)
    assert torch.allclose(sae.b_dec, geometric_median(x / sae.scale), atol=1e-5)
    assert torch.allclose(sae.W_enc, 0.1 * sae.W_dec.T)
    for kind, given, expected in (("jumprelu", None, 1.0), ("topk", None, 0.1), ("batch_topk", 0.5, 0.5)):
        other = initial_sae(store, SAEConfig(k=3, kind=kind), cfg.model_copy(update={"encoder_start": given}), 0)
        assert torch.allclose(other.W_enc, expected * other.W_dec.T)
    far = torch.cat([x, torch.full((5, D), 1e6)])
    assert (geometric_median(far) - geometric_median(x)).norm() < 1 < (far.mean(0) - x.mean(0)).norm()


def test_rate_rises_stays_and_falls():
    cfg = TrainingConfig(steps=100, warmup=0.1, decay=0.2, lr=None)
    rates = [cfg.rate(s, 2**14) for s in range(100)]
    assert rates[0] == pytest.approx(2e-5) and rates[9:81] == pytest.approx([2e-4] * 72) and 0 < rates[-1] < 2e-5
    assert cfg.rate(50, 2**10) == pytest.approx(8e-4)
    assert TrainingConfig(steps=10, lr=1e-3, warmup=0, decay=0).rate(9, 5) == 1e-3


def test_the_automatic_rate_follows_width_and_steps():
    def full(steps, width=2**10, lr="auto"): return TrainingConfig(steps=steps, lr=lr).full_rate(width)
    usual = full(1, lr=None)
    assert TrainingConfig().lr == "auto" and usual == pytest.approx(8e-4) and full(10**4, lr=3e-3) == 3e-3
    by_steps = [full(steps) / usual for steps in (10, 500, 2000, 10_000, 10**9)]
    assert by_steps == sorted(by_steps, reverse=True) and by_steps[0] == pytest.approx(10) and by_steps[-1] == pytest.approx(1, rel=0.01)
    assert full(2000, 2**12) == pytest.approx(full(2000) / 2)
    assert max(TrainingConfig(steps=2000).rate(step, 2**10) for step in range(2000)) == pytest.approx(full(2000))
    for wrong in ("fast", -1, 0):
        with pytest.raises(UserError, match="training.lr is .*; give auto"): TrainingConfig(lr=wrong)


def test_the_rate_that_was_used_is_recorded_and_said(tmp_path):
    """A run at `auto` that is stopped and resumed is the run at that number, and the files beside the SAE say the number."""
    auto = SETTINGS.model_copy(update={"lr": "auto", "steps": 40})
    number = auto.full_rate(4 * D)
    class Stops(Vectors):
        def batches(self, *args, **kwargs):
            for step, rows, x in super().batches(*args, **kwargs):
                if step == 30: raise KeyboardInterrupt
                yield step, rows, x
    with pytest.raises(KeyboardInterrupt): train_sae(Stops(), SAEConfig(k=3), auto, 0, tmp_path / "auto")
    assert not (tmp_path / "auto/training.json").exists()
    train_sae(Vectors(), SAEConfig(k=3), auto, 0, tmp_path / "auto")
    train_sae(Vectors(), SAEConfig(k=3), auto.model_copy(update={"lr": number}), 0, tmp_path / "number")
    assert (tmp_path / "auto/sae.safetensors").read_bytes() == (tmp_path / "number/sae.safetensors").read_bytes()
    used = json.loads((tmp_path / "auto/training.json").read_text(encoding="utf-8"))
    assert used == {"lr": number, "lr_asked": "auto", "steps": 40, "batch_size": 128, "warmup": 0.05, "decay": 0.2}
    assert f"note: trained for 40 steps of 128 tokens at a rate of {number:.3g} (asked for: auto)" in doctor(tmp_path / "auto")
    assert "asked for" not in doctor(tmp_path / "number")
    (tmp_path / "number/training.json").unlink()
    assert "at a rate of" not in doctor(tmp_path / "number")


def test_wrong_inputs_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match="k is 99"): train_sae(Vectors(), SAEConfig(k=99), TrainingConfig(), 0, tmp_path / "a")
    store = Vectors()
    store.x[:] = 0
    with pytest.raises(UserError, match="length of 0"): train_sae(store, SAEConfig(k=3), TrainingConfig(), 0, tmp_path / "a")
    assert not (tmp_path / "a").exists()


# --- resuming

RUN = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/.."]
import torch._dynamo
from test_training import SETTINGS, Vectors
from saerad.sae.model import SAEConfig
from saerad.sae.training import train_sae
def do(folder): train_sae(Vectors(slow=0.002), SAEConfig(k=3), SETTINGS, 0, folder)
"""
# Equal bytes are promised on a processor: a card may add up in another order, and measures which engine it uses.
SETTINGS = TrainingConfig(steps=200, batch_size=128, lr=3e-3, dead_after=0.05, start_rows=512, checkpoint_every=20, log_every=7, device="cpu")


def test_killed_and_resumed_ends_with_the_same_bytes(tmp_path):
    train_sae(Vectors(), SAEConfig(k=3), SETTINGS, 0, tmp_path / "whole")
    env = os.environ | {"TQDM_DISABLE": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with nursery(RUN, str(Path(__file__).parent), env=env) as forks:
        [child], log, deadline = forks.start(tmp_path / "killed"), tmp_path / "killed/metrics.jsonl", time.monotonic() + 240
        while time.monotonic() < deadline:
            if log.exists() and log.read_text(encoding="utf-8").count("\n") > 14: break          # about a third of the way
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)
        assert forks.end() == [-signal.SIGKILL], "the run ended before it could be killed"
        assert not (tmp_path / "killed/sae.safetensors").exists() and (tmp_path / "killed/checkpoint/state.safetensors").exists()
        forks.start(tmp_path / "killed")
        assert forks.end() == [0]
    for name in ("sae.safetensors", "config.json", "metrics.jsonl", "checkpoint/state.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name


def test_resume_really_starts_at_the_checkpoint(tmp_path):
    train_sae(Vectors(), SAEConfig(k=3), SETTINGS, 0, tmp_path)
    class Watched(Vectors):
        asked = []
        def batches(self, split, batch_size, seed, start=0):
            self.asked.append(start)
            return super().batches(split, batch_size, seed, start)
    fewer = tmp_path / "fewer"
    class Stops(Vectors):
        def batches(self, *args, **kwargs):
            for step, rows, x in super().batches(*args, **kwargs):
                if step == 130: raise KeyboardInterrupt
                yield step, rows, x
    with pytest.raises(KeyboardInterrupt): train_sae(Stops(), SAEConfig(k=3), SETTINGS, 0, fewer)
    train_sae(Watched(), SAEConfig(k=3), SETTINGS, 0, fewer)
    assert Watched.asked == [120]
    assert (fewer / "sae.safetensors").read_bytes() == (tmp_path / "sae.safetensors").read_bytes()


def test_a_checkpoint_of_another_run_is_not_resumed(tmp_path):
    short = SETTINGS.model_copy(update={"steps": 40})
    first = train_sae(Vectors(), SAEConfig(k=3), short, 0, tmp_path)
    other = train_sae(Vectors(), SAEConfig(k=3), short, 1, tmp_path)
    assert not torch.equal(first.W_dec, other.W_dec)
    again = train_sae(Vectors(), SAEConfig(k=3), short, 0, tmp_path)
    assert torch.equal(first.W_dec, again.W_dec)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [m["step"] for m in lines] == [7, 14, 21, 28, 35, 40]
