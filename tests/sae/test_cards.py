"""The fused engine, interpreted on a processor: every kernel beside plain arithmetic, steps beside the reference; and compiled for a card."""
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_training import KINDS, NATIVE, Vectors
from torch.utils._python_dispatch import TorchDispatchMode

from saerad.core import UserError
from saerad.sae import cards as module
from saerad.sae import training
from saerad.sae.model import MatryoshkaSAE, SAEConfig
from saerad.sae.token_table import TokenTable
from saerad.sae.training import MeasuredEngine, Trainer, TrainingConfig, choose_engine, initial_sae

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"                # on a card the kernels run there, elsewhere they are interpreted
pytest.importorskip("triton", minversion="3.7" if DEVICE == "cpu" else None, reason="no Triton here, or one whose interpreter numpy has left behind")


@pytest.fixture(scope="module")
def cards():
    """The module as it is where Triton can be used; `training` uses its engine meanwhile."""
    if DEVICE == "cuda":
        yield module
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAERAD_TRITON", "interpret")
        interpreted = importlib.reload(module)
        for engine in (interpreted.FusedEngine, interpreted.FusedSparseEngine): patch.setitem(training.ENGINES, engine.name, engine)
        yield interpreted
    again = importlib.reload(module)
    training.ENGINES |= {"fused": again.FusedEngine, "fused_sparse": again.FusedSparseEngine}


def numbers(*shape: int, seed: int = 0) -> torch.Tensor: return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


# --- the cut

@pytest.mark.parametrize(("n", "width", "want", "spare"), [(5, 40, 17, 2.0), (17, 130, 300, 1.05), (33, 257, 40, 3.0)])
def test_the_cut_is_that_of_a_sort_from_whatever_the_last_one_was(cards, n, width, want, spare):
    find = cards.Cut(DEVICE, spare)
    for step, guess in enumerate((0.0, None, 1e6, 1e-6)):             # nothing known, the last one, far too high, far too low
        pre, bias = numbers(n, width, seed=step), numbers(width, seed=9) / 5
        if guess is not None: find.guess.fill_(guess)
        assert find(pre, bias, want).item() == (pre + bias).flatten().sort(descending=True).values[want - 1].item()


def test_the_cut_among_equals_and_where_little_is_positive(cards):
    find, bias = cards.Cut(DEVICE), torch.zeros(6, device=DEVICE)
    ties = torch.tensor([[2.0, 1, 1, 1, 1, 0]], device=DEVICE).repeat(3, 1)
    assert [find(ties, bias, want).item() for want in (1, 3, 4, 15, 16, 18)] == [2, 2, 1, 1, 0, 0]
    for want in (1, 7): assert find(-ties, bias, want).item() == 0     # all negative


# --- passes

def test_what_is_selected_counted_and_smallest(cards):
    pre, bias = numbers(37, 150), numbers(150, seed=1) / 3
    whole = pre + bias
    for cut in (whole.new_tensor([0.7]), whole.new_tensor([-1.0]), whole.topk(5, dim=1).values[:, -1].contiguous(), whole.new_tensor([99.0])):
        z, fired, kept, least = cards.select(pre, bias, cut, torch.float32)
        on = (whole > 0) & (whole >= cut[:, None])
        assert torch.equal(z, torch.where(on, whole, 0)) and int(kept) == int(on.sum())
        assert torch.equal(fired > 0, on.any(0)) and float(least) == (float(whole[on].min()) if on.any() else 0)


@pytest.mark.parametrize(("groups", "n", "d"), [(1, 3, 5), (3, 11, 100), (5, 33, 33)])
def test_errors_of_all_levels_and_gradients_of_all_groups(cards, groups, n, d):
    x, b_dec, shares, weights = numbers(n, d), numbers(d, seed=1), numbers(groups, n, d, seed=2), numbers(groups, seed=3).abs()
    at_group, residual, levels = cards.errors(x, b_dec, shares, weights)
    wrong = shares.double().cumsum(0) + b_dec - x
    by_level = 2 / n * weights[:, None, None] * wrong
    assert torch.allclose(levels.double(), wrong.square().sum(2).mean(1)) and torch.allclose(residual.double(), -wrong[-1], atol=1e-5)
    assert torch.allclose(at_group.double(), by_level.flip(0).cumsum(0).flip(0), atol=1e-5)


def test_slopes_stay_where_something_was_kept(cards):
    slope, z = numbers(35, 140), numbers(35, 140, seed=1).relu()
    expected = torch.where(z > 0, slope, 0)
    assert torch.allclose(cards.mask_slopes(slope, z), expected.sum(0), atol=1e-5) and torch.equal(slope, expected)


@pytest.mark.parametrize("capacity", [4000, 50])
def test_entries_are_listed_by_row_and_by_feature(cards, capacity):
    """With less space than there are entries the last ones are left out, and nothing is written elsewhere."""
    pre, bias, sizes = numbers(20, 130), numbers(130, seed=1) / 3, [2, 0, 60, 68]
    ends = torch.tensor([0, *torch.tensor(sizes).cumsum(0)], dtype=torch.int32, device=DEVICE)
    kept = cards.entries(pre, bias, pre.new_tensor([0.9]), ends, capacity)
    row, col = ((pre + bias) >= 0.9).nonzero().T[:, :capacity]
    assert 50 < int(((pre + bias) >= 0.9).sum()) < 4000 and torch.equal(kept.rows[:len(row)].long(), row)
    assert torch.equal(kept.cols[:len(row)].long(), col) and bool((kept.cols[len(row):] == 130).all())
    assert torch.equal(kept.values[:len(row)], (pre + bias)[row, col])
    for i in range(20 * 4):
        here = (row == i // 4) & (col >= ends[i % 4]) & (col < ends[i % 4 + 1])
        assert int(here.sum()) == int(kept.begins[i + 1] - kept.begins[i])
    for feature in range(130):
        mine = kept.order[kept.of_feature[feature]:kept.of_feature[feature + 1]]
        assert torch.equal(mine, (col == feature).nonzero().squeeze(1))


def test_places_for_the_dead(cards):
    dead = numbers(50) > 0.8
    at, taken = cards.dead_places(dead, 16)
    assert at[taken].tolist() == dead.nonzero().flatten().tolist() and int(taken.sum()) == int(dead.sum()) < 16
    assert not cards.dead_places(torch.zeros(5, dtype=torch.bool, device=DEVICE), 4)[1].any()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 9), st.sampled_from([30, 200, 900]))
def test_no_more_features_are_dead_than_the_bound_says(seed, every, limit):
    """Whatever fires when, and however large the batches are."""
    draw, since = torch.Generator().manual_seed(seed), torch.zeros(20, dtype=torch.int64)
    bound, often = module.DeadBound(since, limit, every), torch.rand(20, generator=draw) ** 3
    for _ in range(60):
        tokens = int(torch.randint(1, 40, (), generator=draw))
        assert int((since > limit).sum()) <= bound(tokens)
        since.add_(tokens).mul_(torch.rand(20, generator=draw) > often)


# --- steps

def steps(engine: str, shape: SAEConfig, n: int, batch: int = 16, **more) -> tuple[Trainer, list[dict[str, float]]]:
    cfg = TrainingConfig(engine=engine, **({"steps": 40, "batch_size": batch, "lr": 3e-3, "start_rows": 256, "precision": "float32"} | more))
    trainer, log = Trainer(initial_sae(Vectors(500), shape, cfg, 0).to(DEVICE), cfg), []
    for _, _, x in Vectors(500).batches("train", batch, 0):
        log.append(trainer.train_step(x))
        if trainer.step == n: return trainer, log


def difference(one: Trainer, other: Trainer) -> float:
    return max(float((p - other.sae.get_parameter(n)).detach().abs().max()) for n, p in one.sae.named_parameters())


SPARSE = ["reversed, weighted", "topk"]                 # the rest of a step is the same code

@pytest.mark.parametrize(("engine", "kind"), [*(("fused", kind) for kind in KINDS), *(("fused_sparse", kind) for kind in SPARSE)])
def test_the_steps_are_those_of_the_reference(cards, engine, kind):
    shape = KINDS[kind].model_copy(update={"expansion": 2})
    (ours, log), (theirs, expected) = (steps(e, shape, 3, threshold_start=0.05) for e in (engine, "reference"))
    for a, b in zip(log, expected, strict=True): assert a == pytest.approx(b, rel=1e-5, abs=1e-7)
    assert log[-1]["threshold"] > 0 and difference(ours, theirs) < 2e-6
    assert torch.equal(ours.tokens_since_fired, theirs.tokens_since_fired)


@pytest.mark.parametrize(("engine", "aux_k"), [("fused", 2), ("fused", 400), ("fused_sparse", 2)])
def test_the_silent_are_revived_as_the_reference_does(cards, engine, aux_k):
    dead = {"dead_after": 0.02, "aux_k": aux_k, "aux_alpha": 1.0, "clip": 0.05}
    (ours, log), (theirs, expected) = (steps(e, SAEConfig(k=1, expansion=2), 4, **dead) for e in (engine, "reference"))
    assert max(m["aux"] for m in log) > 0 and max(m["dead"] for m in log) > 0.1
    for a, b in zip(log, expected, strict=True): assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
    assert difference(ours, theirs) < 1e-4         # Adam divides small gradients by themselves


def test_in_bfloat16_it_is_the_reference_roughly_and_the_copies_are_the_weights(cards):
    ours, log = steps("fused", SAEConfig(k=4, expansion=2), 4, precision="bfloat16")
    _, expected = steps("reference", SAEConfig(k=4, expansion=2), 4)
    for a, b in zip(log, expected, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.02) and a["l0"] == pytest.approx(b["l0"], abs=0.3)         # ties
    assert_copies(ours)
    assert torch.allclose(ours.sae.W_dec.norm(dim=1), torch.ones(24, device=DEVICE), atol=1e-6)


def assert_copies(trainer: Trainer) -> None:
    """The interpreter cuts numbers off where a card rounds them."""
    for copy, weight in zip(trainer.engine.rounded, (trainer.sae.W_enc.T, trainer.sae.W_dec), strict=True):
        assert torch.allclose(copy.float(), weight, rtol=2**-7 if DEVICE == "cpu" else 2**-8, atol=1e-30)


@pytest.mark.parametrize("engine", ["fused", "fused_sparse"])
def test_a_token_table_learns_from_what_a_step_leaves(cards, engine):
    def trainer(name: str) -> Trainer:
        cfg = TrainingConfig(engine=name, steps=40, batch_size=32, lr=3e-3, start_rows=256, precision="float32")
        sae = initial_sae(Vectors(500), SAEConfig(k=2, expansion=2), cfg, 0)
        sae.table = TokenTable(torch.arange(4), numbers(5, sae.d, seed=1).cpu(), "learned")
        return Trainer(sae.to(DEVICE), cfg)
    x, ids, (here, there) = Vectors(500).x[:32], torch.arange(32) % 6, (trainer(engine), trainer("dense"))
    for _ in range(4):                                       # on a card the last of them are replayed
        assert here.train_step(x, ids=ids) == pytest.approx(there.train_step(x, ids=ids), rel=1e-4, abs=1e-6)
        assert torch.allclose(here.engine.residual.float(), there.engine.residual, atol=1e-4)
    assert torch.allclose(here.sae.table.rows, there.sae.table.rows, atol=1e-4) and difference(here, there) < 1e-4


@pytest.mark.parametrize("other", ["dense", *NATIVE])
def test_a_checkpoint_goes_from_engine_to_engine(cards, other, tmp_path):
    shape = SAEConfig(k=4, expansion=2)
    for one, two in ((other, "fused"), ("fused", other)):
        (there, _), (here, _) = steps(one, shape, 3), steps(two, shape, 1)
        there.save(tmp_path / "state", "same")
        assert here.restore(tmp_path / "state", "same") and difference(here, there) == 0
        batches = Vectors(500).batches("train", 16, 0, start=3)
        x = next(batches)[2]
        assert here.train_step(x) == pytest.approx(there.train_step(x), rel=1e-5, abs=1e-7) and difference(here, there) < 2e-6


@pytest.mark.parametrize("precision", ["float32", *(["bfloat16"] if DEVICE == "cuda" else [])])
def test_resumed_it_ends_with_the_same_bits(cards, precision, tmp_path):
    whole, _ = steps("fused", SAEConfig(k=2, expansion=2), 6, dead_after=0.05, precision=precision)
    half, _ = steps("fused", SAEConfig(k=2, expansion=2), 3, dead_after=0.05, precision=precision)
    half.save(tmp_path / "state", "same")
    again = Trainer(initial_sae(Vectors(500), SAEConfig(k=2, expansion=2), half.cfg, 0).to(DEVICE), half.cfg)
    assert again.restore(tmp_path / "state", "same")
    for _, (_, _, x) in zip(range(3), Vectors(500).batches("train", 16, 0, start=3), strict=False): again.train_step(x, measured=False)
    assert again.step == whole.step and difference(again, whole) == 0 and torch.equal(again.tokens_since_fired, whole.tokens_since_fired)
    assert torch.equal(again.sae.threshold, whole.sae.threshold)


def test_it_sees_that_somebody_else_has_changed_the_weights(cards):
    trainer, _ = steps("fused", SAEConfig(k=2, expansion=2), 1, precision="bfloat16")
    with torch.no_grad(): trainer.sae.W_dec[3] = torch.nn.functional.normalize(torch.arange(12.0), dim=0).to(DEVICE)
    trainer.engine.look_again = lambda plain=trainer.engine.look_again: (plain(), seen.append(1))
    seen = []
    for _ in range(2): trainer.train_step(Vectors(500).x[:32])
    assert seen == [1]
    assert_copies(trainer)


class NothingIsAsked(TorchDispatchMode):
    """Raises where a number would go to the host, which on a card waits for all work before it and cannot be recorded as a graph."""
    ASKS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "bincount")

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        assert operator._schema.name.removeprefix("aten::") not in self.ASKS, operator
        bools = [t for t in args[1] if t is not None and t.dtype == torch.bool] if operator._schema.name.startswith("aten::index.") else []
        assert not bools, "an index by a mask"
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["batch_topk", "topk"])
@pytest.mark.parametrize("engine", ["fused", "fused_sparse"])
@pytest.mark.parametrize("capacity", [0, 16])
def test_a_step_asks_the_device_for_nothing(cards, kind, engine, capacity, monkeypatch):
    trainer, _ = steps(engine, SAEConfig(k=2, expansion=2, kind=kind), 1)
    trainer.engine.look_again()
    for name in vars(cards):                                          # the interpreter itself reads numbers; kernels ask nothing by their nature
        if name.endswith("_kernel"): monkeypatch.setattr(cards, name, NoKernel())
    x = trainer.normalised(Vectors(500).x[:32])
    with torch.no_grad(), NothingIsAsked(): trainer.engine.compute(x, capacity)


class NoKernel:
    def __getitem__(self, grid): return lambda *args, **kwargs: None


# --- which engine

def test_it_is_refused_with_a_sentence_where_it_cannot_work(cards, monkeypatch):
    sae = MatryoshkaSAE.from_config(12, SAEConfig(k=3)).to(DEVICE)
    assert choose_engine(TrainingConfig(engine="fused"), sae).name == "fused"
    assert choose_engine(TrainingConfig(), sae).name == ("sparse" if DEVICE == "cpu" else "measure")
    with pytest.raises(UserError, match="does not do the kind jumprelu"):
        choose_engine(TrainingConfig(engine="fused"), MatryoshkaSAE.from_config(12, SAEConfig(k=3, kind="jumprelu")).to(DEVICE))
    with pytest.raises(UserError, match="float32 weights"): choose_engine(TrainingConfig(engine="fused"), sae.double())
    monkeypatch.delenv("SAERAD_TRITON", raising=False)
    with pytest.raises(UserError, match="fused needs Triton and a card; use auto"): choose_engine(TrainingConfig(engine="fused"), sae.float().cpu())


@pytest.mark.parametrize("environment", [{}, {"TRITON_INTERPRET": "1", "SAERAD_TRITON": "0"}])
def test_without_triton_everything_else_is_there(environment):
    code = "import sys\nfrom saerad.sae import cards, training\nassert cards.triton is None and 'triton' not in sys.modules\n" \
           "print(training.ENGINES['fused'].refuses(training.MatryoshkaSAE(4, (8,), 1), training.Ranks()))"
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "SAERAD_TRITON")} | environment | {"CUDA_VISIBLE_DEVICES": ""}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout == "needs Triton and a card\n", done.stderr


def test_the_fastest_is_measured_in_whole_steps_and_one_that_fails_is_left_out(cards, monkeypatch, tmp_path):
    shape = SAEConfig(k=2, expansion=1, group_fractions=(1.0,))
    trainer, x = steps("dense", shape, 1)[0], Vectors(500).x[:16]
    before = trainer.sae.W_dec.detach().clone()
    measure = MeasuredEngine(trainer)
    assert measure.candidates() == ["dense", "sparse", "fused", "fused_sparse"]
    assert measure.fastest(x) in measure.candidates() and torch.equal(before, trainer.sae.W_dec)
    monkeypatch.setattr(cards.FusedEngine, "compute", lambda self, *args: 1 / 0)
    with pytest.warns(UserWarning, match="fused does not work here .ZeroDivisionError"): assert measure.seconds("fused", x) == float("inf")
    monkeypatch.setattr(MeasuredEngine, "fastest", lambda self, *args: "sparse")
    trainer.engine = measure
    trainer.train_step(x)
    trainer.save(tmp_path / "state", "same")
    again = Trainer(MatryoshkaSAE.from_config(12, shape).to(DEVICE), trainer.cfg)
    again.engine = MeasuredEngine(again)
    assert again.restore(tmp_path / "state", "same") and again.engine.name == "sparse"                  # it stays with what was chosen


def test_the_kernels_compile_for_a_card(tmp_path):
    """To machine code, which the interpreter does not show to be possible."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(Path(__file__).parent / "compile_cards.py"), "90"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 13 and all(int(size) > 1000 for _, size in lines), done.stderr[-2000:]
