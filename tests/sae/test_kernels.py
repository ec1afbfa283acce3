"""The compiled kernels against plain formulas, in double precision and at awkward shapes; and the machine without a compiler."""
import subprocess
import sys

import pytest
import torch

from saerad.sae import kernels

pytestmark = pytest.mark.skipif(kernels.native() is None, reason="no C++ compiler")


def make(n: int, d: int, groups: tuple[int, ...], share: float, seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=draw, dtype=torch.float64)
    W_enc, W_dec = (torch.randn(sum(groups), d, generator=draw, dtype=torch.float64, requires_grad=True) for _ in range(2))
    pre = x @ W_enc.T
    on = torch.rand(pre.shape, generator=draw) < share
    weights = torch.rand(len(groups), generator=draw, dtype=torch.float64)
    return x, W_enc, W_dec, pre, on, weights / weights.sum()


@pytest.mark.parametrize(("n", "d", "groups", "share"), [
    (1, 1, (1,), 1.0), (30, 12, (8, 16), 0.2), (7, 128, (5, 5, 10), 0.3), (50, 300, (4, 4, 8, 16, 32), 0.1), (33, 129, (64,), 0.05),
    (20, 40, (3, 3), 0.0), (5, 256, (2, 30), 1.0)])
def test_loss_and_gradients(n, d, groups, share):
    x, W_enc, W_dec, pre, on, weights = make(n, d, groups, share)
    errors = [(pre * on)[:, :p] @ W_dec[:p] - x for p in torch.tensor(groups).cumsum(0)]
    levels = torch.stack([e.square().sum(1).mean() for e in errors])
    (levels @ weights).backward()
    step = kernels.Step(x, W_enc.detach(), W_dec.detach(), groups, weights.tolist())
    places, value = kernels.places_of(n, len(W_dec), *on.nonzero().T), pre[on].detach()
    assert torch.allclose(kernels.exact_values(step, places, torch.zeros(len(W_enc), dtype=torch.float64)), value)
    found = kernels.measure(step, places, value, residual=True)
    enc, dec = kernels.gradients(step)
    assert torch.allclose(found.levels, levels) and torch.allclose(found.residual, -errors[-1].detach())
    assert torch.allclose(enc, W_enc.grad, atol=1e-12) and torch.allclose(dec, W_dec.grad, atol=1e-12)
    assert torch.allclose(found.b_dec, sum(2 / n * w * e.detach() for w, e in zip(weights, errors, strict=True)).sum(0))
    along = (W_dec.grad * W_dec.detach()).sum(1)
    square = dec.square().sum(1) - along.square() + enc.square().sum(1)
    assert torch.allclose(step.held["along"], along) and (step.held["most"] >= square * (1 - 1e-9)).all()
    for _ in range(2):                                            # asked again, it is the same
        step.call("lengths")
        assert torch.allclose(step.held["square"], square, atol=1e-12)


@pytest.mark.parametrize("extra", [False, True])
def test_clipping_is_of_the_whole_gradient_whatever_the_bound_says(extra):
    x, W_enc, W_dec, pre, on, weights = make(40, 150, (8, 24), 0.2)
    W_dec = torch.nn.functional.normalize(W_dec.detach())
    def measured():
        step = kernels.Step(x, W_enc.detach(), W_dec, (8, 24), weights.tolist())
        if extra:
            number = torch.full((32,), -1, dtype=torch.int32)
            number[[3, 30]] = torch.tensor([0, 1], dtype=torch.int32)
            draw = torch.Generator().manual_seed(5)
            step.hold(extra=number, **{f"extra_{m}": 50 * torch.randn(2, 150, generator=draw, dtype=torch.float64) for m in ("dec", "enc")})
        kernels.measure(step, kernels.places_of(40, 32, *on.nonzero().T), pre[on].detach())
        return step
    step = measured()
    bound = float(step.held["most"].sum() + 2) ** 0.5
    enc, dec = kernels.gradients(step)
    along = (dec * W_dec).sum(1)
    square = enc.square().sum(1) + dec.square().sum(1) - along.square()
    length = (float(square.sum()) + 2) ** 0.5
    assert torch.allclose(step.held["along"], along) and length <= bound and (step.held["most"] >= square * (1 - 1e-9)).all()
    for longest in (bound * 1.01, (bound + length) / 2, length * 1.01, length / 3):
        assert kernels.clipping(measured(), 2.0, longest) == pytest.approx(min(1.0, longest / length), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_apply_is_torchs_adam(dtype):
    x, W_enc, W_dec, pre, on, weights = make(40, 150, (8, 24), 0.2)
    W_enc, W_dec = (torch.nn.Parameter(torch.nn.functional.normalize(W.detach()).to(dtype)) for W in (W_enc, W_dec))
    optimizer = torch.optim.Adam([W_enc, W_dec], lr=0.01, betas=(0.9, 0.99))
    ours = {"W_enc": W_enc.detach().clone(), "W_dec": W_dec.detach().clone()}
    moments = {f"{m}_{name}": torch.zeros(kernels.block_shape(32, 150), dtype=dtype) for m in "mv" for name in ("enc", "dec")}
    places, clip = kernels.places_of(40, 32, *on.nonzero().T), 0.25
    for count in range(1, 5):
        value = (x.to(dtype) @ ours["W_enc"].T)[on]
        step = kernels.Step(x.to(dtype), ours["W_enc"], ours["W_dec"], (8, 24), weights.tolist())
        kernels.measure(step, places, value)
        enc, dec = (g.clone() for g in kernels.gradients(step))
        for name in ("grad_enc", "grad_dec"): setattr(step.record, name, None)
        kernels.apply(step, moments, clip, 0.01, (0.9, 0.99), count)
        W_enc.grad, W_dec.grad = enc * clip, (dec - (dec * W_dec).sum(1, keepdim=True) * W_dec).detach() * clip
        optimizer.step()
        with torch.no_grad(): W_dec /= W_dec.norm(dim=1, keepdim=True)
        close = {"atol": 1e-5 if dtype == torch.float32 else 1e-12}
        assert torch.allclose(ours["W_enc"], W_enc, **close) and torch.allclose(ours["W_dec"], W_dec, **close)
    for name, p in (("enc", W_enc), ("dec", W_dec)):
        for m, key in (("m", "exp_avg"), ("v", "exp_avg_sq")):
            assert torch.allclose(kernels.in_rows(moments[f"{m}_{name}"], 150), optimizer.state[p][key], **close)


@pytest.mark.parametrize(("n", "d"), [(1, 1), (3, 128), (5, 129), (2, 300)])
def test_blocks_and_back(n, d):
    x = torch.arange(1.0, n * d + 1).view(n, d)
    there = kernels.blocks(x.T.contiguous().T)
    assert there.shape == kernels.block_shape(n, d) and float(there.sum()) == float(x.sum())     # zeros beyond
    assert torch.equal(kernels.in_rows(there, d), x)


@pytest.mark.parametrize("want", [1, 2, 500, 49_000, 100_000])
def test_cut_is_the_kth_largest_positive(want):
    numbers = torch.randn(100_000, generator=torch.Generator().manual_seed(1)).bfloat16()
    numbers[:3] = torch.tensor([0.0, -0.0, float("nan")]).bfloat16()
    positive = numbers[numbers > 0].float().sort(descending=True).values
    right = positive[want - 1] if want <= len(positive) else 0
    for guess in (0.0, 0.01, 0.7, 3.0, 100.0):
        assert kernels.as_float(kernels.bfloat16_cut(numbers[3:], want, kernels.as_bits(guess))) == right


def test_places_above_are_sorted_both_ways():
    pre = torch.randn(37, 101, generator=torch.Generator().manual_seed(2)).bfloat16()
    for low in (0.0, 0.5, 100.0):
        places = kernels.places_above(pre, kernels.as_bits(low))
        row, col = ((pre >= low) & (pre > 0)).nonzero().T
        assert torch.equal(places.row_of(), row) and torch.equal(places.col.long(), col)
        assert torch.equal(places.row[places.number.argsort()].long(), row)
        assert torch.equal(torch.repeat_interleave(torch.arange(101), places.col_ptr.diff()), col[places.number.long()])
    half = places_half = kernels.places_above(pre, 0).chosen(torch.arange((pre > 0).sum()) % 2 == 0)
    assert len(half.col) == len(places_half.row) == ((pre > 0).sum() + 1) // 2


@pytest.mark.parametrize("by_avx2", [False, True])
@pytest.mark.parametrize(("n", "d", "width"), [(1, 1, 1), (3, 5, 7), (40, 33, 100), (64, 300, 70)])
def test_integers_in_their_units_are_about_the_product(n, d, width, by_avx2, monkeypatch):
    draw = torch.Generator().manual_seed(3)
    x, W, b = torch.randn(n, d, generator=draw), torch.randn(width, d, generator=draw), torch.randn(width, generator=draw)
    x[0] = 0
    small, unit, square = kernels.quantised(x)
    assert torch.allclose(square, x.square().sum(1))
    assert torch.equal(unit, x.abs().amax(1) / 127) and torch.equal(small[0], torch.zeros(d, dtype=torch.int8))
    assert torch.allclose(small.float() * unit[:, None], x, atol=float(unit.max()) * 0.51)
    pre, right, most = torch.empty(n, width, dtype=torch.bfloat16), x @ W.T + b, 63 if by_avx2 else 127
    monkeypatch.setattr(kernels, "has_int8_units", lambda: not by_avx2)
    kernels.has_int8.cache_clear()
    if not kernels.has_int8(): pytest.skip("a processor without AVX2")
    error = kernels.rough_products(x, W, b, pre, features=32)
    kernels.has_int8.cache_clear()
    (small, unit, _), (small_W, unit_W, _) = kernels.quantised(x, most), kernels.quantised(W, most)
    exactly = (small.int() @ small_W.int().T).float() * unit[:, None] * unit_W + b
    assert torch.allclose(pre.float(), exactly, rtol=2**-8, atol=1e-6)
    assert ((pre.float() - right).abs() <= 6 * error + 2**-8 * right.abs()).all() and error < 0.04 * d ** 0.5 + 1e-6


@pytest.mark.parametrize(("n", "features", "d"), [(1, 1, 1), (4, 16, 8), (5, 17, 9), (7, 33, 31), (130, 70, 1024)])
def test_the_products_of_avx2_are_exact_up_to_their_largest_numbers(n, features, d):
    draw = torch.Generator().manual_seed(d)
    x, w = (torch.randint(-63, 64, (rows, d), generator=draw, dtype=torch.int8) for rows in (n, features))
    x[0], w[0], w[-1] = 63, -63, 63                               # the sums that come nearest to what 16 bits hold
    sums = kernels.int8_products(x, w, units=False)
    if sums is None: pytest.skip("a processor without AVX2")
    assert torch.equal(sums.long(), x.long() @ w.long().T) and sums[0, -1] == 63 * 63 * d


def test_bits_and_numbers():
    for value in (1.0, 0.37, 3e-5, 1e20): assert kernels.as_float(kernels.as_bits(value)) == pytest.approx(value, rel=2**-7)
    assert kernels.as_float(kernels.as_bits(0.37)) <= 0.37 and kernels.as_bits(0.0) == kernels.as_bits(-1.0) == 0


@pytest.mark.parametrize(("setting", "value"), [("SAERAD_NATIVE", "0"), ("PATH", "/nowhere"), ("CXX", "false")])
def test_without_a_compiler_there_are_no_kernels_and_no_error(setting, value, tmp_path):
    import os
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), setting: value}
    done = subprocess.run([sys.executable, "-c", "from saerad.sae import kernels; print(kernels.native())"], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "None" and not done.stderr and not list(tmp_path.rglob("*.part"))
