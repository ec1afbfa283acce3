"""One encoder: rows of a store, blocks of a large SAE and a few features are what `encode` gives, for every kind and on every device."""
import numpy as np
import pytest
import torch
from conftest import Rows
from word_world import make_sae

from saerad.core import UserError
from saerad.sae import kernels
from saerad.sae.encoder import BatchEncoder, Encoder, FeatureEncoder, RoundedFeatures, active_entries, encode_rows
from saerad.sae.model import MatryoshkaSAE

KINDS = ("batch_topk", "topk")
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no graphics card")))


def small_sae(kind: str, width: int = 24, seed: int = 1) -> MatryoshkaSAE:
    sae = MatryoshkaSAE(8, (width // 2, width - width // 2), k=3, seed=seed, kind=kind)
    sae.b_enc.data, sae.b_dec.data = torch.linspace(-0.1, 0.2, width), torch.full((8,), 0.1)
    sae.scale.fill_(5.0)
    sae.threshold.fill_(0.3)
    return sae


def raw_rows(n: int = 60) -> torch.Tensor:
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(4)) * 5


# rows of a store, and what is active

def test_sparse_rows_equal_dense_ones():
    sae, x = small_sae("batch_topk"), raw_rows()
    rows = np.array([5, 3, 3, 49, 0])
    found = encode_rows(sae, Rows(x), rows, batch=2)
    assert found.shape == (5, 24) and found.dtype == np.float32
    assert np.allclose(found.toarray(), sae.encode(x[rows]).numpy(), atol=1e-6)
    assert encode_rows(sae, Rows(x), rows[:0]).shape == (0, 24)
    with pytest.raises(UserError, match="width 8.*width 3"): encode_rows(sae, Rows(torch.zeros(2, 3)), np.array([0]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_taken_to_the_sae_and_features_come_back(kind, device):
    x, z = raw_rows(), small_sae(kind).encode(raw_rows())
    sae = small_sae(kind).to(device)
    dense, sparse = Encoder(sae)(x), encode_rows(sae, Rows(x), np.arange(len(x)), batch=7)
    assert dense.device.type == "cpu" and dense.dtype == torch.float32
    assert torch.allclose(dense, z, atol=1e-5) and np.allclose(sparse.toarray(), z, atol=1e-5)
    few = BatchEncoder([FeatureEncoder.of(sae, range(24))])(x[None])
    assert few.device.type == "cpu" and torch.allclose(few[0], z, atol=1e-5)


def test_active_entries_are_those_that_fire():
    z = np.array([[0, 2, 0], [0, 0, 0], [1, 0, 3]], np.float32)
    row, feature, value = active_entries(z, z > 0)
    assert (row.tolist(), feature.tolist(), value.tolist()) == ([0, 2, 2], [1, 0, 2], [2, 1, 3])


# a few features

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("features", [[3], [0, 23, 7], list(range(24))])
def test_a_few_features_are_what_all_of_them_would_be(kind, features):
    sae, x = small_sae(kind), raw_rows()
    z = BatchEncoder([FeatureEncoder.of(sae, features)])(x[None])[0]
    assert torch.allclose(z, sae.encode(x)[:, features], atol=1e-5)
    assert torch.equal(z > 0, sae.encode(x)[:, features] > 0)


def test_rows_of_a_batch_ask_for_their_own_features_of_their_own_sae():
    saes = [small_sae("topk"), small_sae("batch_topk"), small_sae("topk", seed=2), small_sae("topk")]
    asked = [[1, 5], [3], [], [2, 0, 9]]
    x = raw_rows().view(4, 15, 8)
    for stream in (x, x[:1].expand(4, -1, -1)):                    # each row its own tokens, or all the same
        z = BatchEncoder([FeatureEncoder.of(sae, at) if at else FeatureEncoder.silent(2, 8) for sae, at in zip(saes, asked, strict=True)])(stream)
        assert z.shape == (4, 15, 3)
        for i, (sae, at) in enumerate(zip(saes, asked, strict=True)):
            assert torch.allclose(z[i, :, :len(at)], sae.encode(stream[i])[:, at], atol=1e-5) and not z[i, :, len(at):].any()


def test_long_streams_are_encoded_in_parts(monkeypatch):
    from saerad.sae import encoder
    sae, x, features = small_sae("topk"), raw_rows().view(2, 30, 8), torch.tensor([[1, 2], [3, -1]])
    whole, parts = encoder._among_all(sae, x, features), encoder._among_all(sae, x, features, block=7)
    assert torch.allclose(whole, parts, atol=1e-6) and not whole[1, :, 1].any()


# a large SAE

def large(bias=0.0, k=64, d=256, width=16_384):
    """A dictionary that is large enough to be searched, with features of many lengths, and a source of rows for it."""
    sae, draw = MatryoshkaSAE(d, (width // 4, width - width // 4), k), torch.Generator().manual_seed(1)
    with torch.no_grad():
        sae.W_enc.mul_(0.5 + torch.rand(width, generator=draw))
        sae.b_enc.copy_(bias * torch.randn(width, generator=draw))
        sae.b_dec.copy_(0.1 * torch.randn(d, generator=draw) / d**0.5)
        sae.scale.fill_(7.0)
        pre = sae.preactivations(torch.randn(64, d, generator=draw) / d**0.5)
        sae.threshold.copy_(pre.flatten().topk(64 * k).values[-1])
    return sae.eval(), lambda n: 7 * torch.randn(n, d, generator=draw) / d**0.5 * torch.rand(n, 1, generator=draw).mul(2)


def searched(sae):
    encode = Encoder(sae)
    if not encode.searches: pytest.skip("no compiler, or a processor without units for bfloat16")
    return encode


@pytest.mark.parametrize("bias", [0.0, 0.1])
def test_a_searched_block_is_the_encoded_block(bias):
    sae, rows = large(bias)
    encode, t = searched(sae), float(sae.threshold)
    for n in (200, 90, 130):          # the array is used again, by fewer rows and by more
        x = rows(n)
        x[3], x[5], x[7] = x[3] * 50, 0, x[7] * 4     # one beyond what can be searched, an empty one, a long one
        z, plain = encode(x), sae.encode(x)
        differ = (z > 0) != (plain > 0)
        assert encode.dense_rows.tolist() == [3] and z.shape == plain.shape and differ.sum() <= 3
        assert torch.allclose(z[~differ], plain[~differ], atol=2e-5, rtol=1e-5) and ((z + plain)[differ] < t + 1e-5).all()


@pytest.mark.parametrize("bias", [0.0, 0.1])
def test_no_rounded_product_is_further_off_than_stated(bias):
    sae, rows = large(bias)
    x = rows(100) / sae.scale - sae.b_dec
    rounded = RoundedFeatures.of(sae.W_enc.detach().T.contiguous(), sae.b_enc.detach())
    exact = (x.double() @ sae.W_enc.double() + sae.b_enc.double()).detach()
    for product in (torch.addmm(rounded.b.bfloat16(), x.bfloat16(), rounded.W.T), x.bfloat16().float() @ rounded.W.T.float() + rounded.b):
        assert ((product.double() - exact).abs() <= rounded.error_bound(x)[:, None] + 2**-7 * exact.abs()).all()


def test_what_fires_does_not_depend_on_the_block():
    sae, rows = large()
    encode, x = searched(sae), rows(120)
    x[4] *= 60
    whole = encode(x).clone()
    assert all(torch.equal(Encoder(sae)(x[a:b]), whole[a:b]) for a, b in ((5, 6), (6, 50), (50, 120)))


def test_only_large_dictionaries_are_searched(monkeypatch):
    sae, rows = large()
    assert not Encoder(make_sae()).searches
    monkeypatch.setattr(kernels, "native", lambda: None)
    x = rows(10)
    assert not Encoder(sae).searches and torch.equal(Encoder(sae)(x), sae.encode(x))
    sae.kind = "topk"
    assert not Encoder(sae).searches
