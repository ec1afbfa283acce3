"""The SAE itself: shapes, threshold, independence of the batch, files, and other libraries' layouts."""
import json
import os

import pytest
import safetensors.torch as st
import torch

from saerad.core import UserError
from saerad.sae.model import MatryoshkaSAE, SAEConfig

# --- settings

@pytest.mark.parametrize(("settings", "word"), [
    ({"k": 0}, "sae.k"), ({"expansion": 0}, "sae.expansion"), ({"group_fractions": (0.5, 0.4)}, "adds up to 0.9"),
    ({"group_fractions": (0.5, 0.25, 0.25)}, "narrow to wide"), ({"group_fractions": (0.0, 1.0)}, "above 0"),
    ({"group_fractions": ()}, "above 0"), ({"level_weights": (1.0,)}, "level_weights"),
    ({"group_fractions": (0.5, 0.5), "level_weights": (1.0, 0.0)}, "level_weights")])
def test_wrong_settings_name_themselves(settings, word):
    with pytest.raises(UserError, match=word): SAEConfig(**settings)


def test_k_above_the_dictionary():
    assert sum(SAEConfig(k=64, expansion=4).group_sizes(16)) == 64
    with pytest.raises(UserError, match="k is 65.*64 features"): SAEConfig(k=65, expansion=4).group_sizes(16)
    with pytest.raises(UserError, match="empty"): SAEConfig(k=1, expansion=1).group_sizes(4)


@pytest.mark.parametrize("d", [16, 100, 256, 4096])
def test_groups_fill_the_dictionary_in_either_order(d):
    up, down = (SAEConfig(k=1, group_order=order).group_sizes(d) for order in ("ascending", "reversed"))
    assert sum(up) == sum(down) == 4 * d
    assert list(up) == sorted(up) and down == up[::-1]


def test_order_is_read_off_the_sizes():
    cases = {(1, 2, 4): "ascending", (4, 2, 1): "reversed", (4, 1, 2): "mixed", (7,): "single", (2, 2): "ascending"}
    for sizes, order in cases.items(): assert MatryoshkaSAE(2, sizes, 1).group_order == order


def test_level_of_a_feature_at_the_borders():
    sae = MatryoshkaSAE(2, (2, 3, 5), 1)
    assert [sae.level(f) for f in range(10)] == [0, 0, 1, 1, 1, 2, 2, 2, 2, 2]


def test_level_weights_add_up_to_one():
    sae = MatryoshkaSAE.from_config(16, SAEConfig(k=1, level_weights=(1, 1, 1, 1, 6)))
    assert sae.level_weights == pytest.approx((.1, .1, .1, .1, .6))


# --- encoding and decoding

def test_encode_is_the_plain_formula_with_a_strict_threshold(sae, x):
    pre = (x / 7.5 - sae.b_dec) @ sae.W_enc + sae.b_enc
    kept = torch.where(pre > 0.2, pre, 0)
    assert torch.allclose(sae.encode(x), kept, atol=1e-6)
    assert torch.allclose(sae(x), (kept @ sae.W_dec + sae.b_dec) * 7.5, atol=1e-5)


def test_exactly_at_the_threshold_is_off():
    sae = MatryoshkaSAE(1, (1,), 1)
    sae.W_enc.data.fill_(1.0)
    sae.threshold.fill_(0.5)
    above = torch.nextafter(torch.tensor(0.5), torch.tensor(1.0))
    assert sae.encode(torch.tensor([[0.5]])).item() == 0
    assert sae.encode(above.view(1, 1)).item() == above


def test_threshold_zero_keeps_positive_and_an_unset_one_is_refused(sae, x):
    sae.threshold.fill_(0.0)
    assert (sae.encode(x) >= 0).all()
    sae.threshold.fill_(-1.0)
    with pytest.raises(UserError, match="never set"): sae.encode(x)


def test_a_token_does_not_know_its_batch(sae, x):
    alone = torch.cat([sae.encode(row[None]) for row in x])
    among_giants = sae.encode(torch.cat([1000 * x, x, torch.zeros_like(x)]))[len(x):2 * len(x)]
    shuffled = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    for other in (among_giants, sae.encode(x[shuffled])[shuffled.argsort()]):
        assert torch.equal(alone > 0, other > 0)
        assert torch.allclose(alone, other, atol=1e-6)


def test_prefixes_decode_to_the_running_sum(sae, x):
    z = sae.encode(x)
    before = torch.zeros_like(x)
    for start, prefix in zip((0, *sae.prefixes), sae.prefixes, strict=False):
        now = sae.decode(z, prefix) - sae.b_dec * 7.5
        assert torch.allclose(now - before, z[:, start:prefix] @ sae.W_dec[start:prefix] * 7.5, atol=1e-4)
        before = now
    assert torch.equal(sae.decode(z, sae.width), sae.decode(z))


def test_a_topk_kind_keeps_k_for_every_token(x):
    sae = MatryoshkaSAE.from_config(16, SAEConfig(k=5, group_fractions=(1.0,), kind="topk"))
    sae.threshold.fill_(0.0)
    pre = sae.preactivations(x)
    z = sae.encode(x)
    assert torch.equal(z > 0, (pre >= pre.sort(dim=1, descending=True).values[:, 4:5]) & (pre > 0))
    assert torch.equal(z[z > 0], pre[z > 0]) and sae.kind_name == "topk"
    assert torch.equal(torch.cat([sae.encode(row[None]) for row in x]) > 0, z > 0)


def test_kinds_have_names():
    for kind in ("batch_topk", "topk", "jumprelu"):
        for sizes, name in (((3,), kind), ((1, 2), f"matryoshka_{kind}")): assert MatryoshkaSAE(2, sizes, 1, kind=kind).kind_name == name


# --- files

def test_saved_and_loaded_is_the_same_and_equal_saes_give_equal_bytes(sae, x, tmp_path):
    for name in ("a", "b"): sae.save(tmp_path / name)
    assert (tmp_path / "a/sae.safetensors").read_bytes() == (tmp_path / "b/sae.safetensors").read_bytes()
    loaded = MatryoshkaSAE.load(tmp_path / "a")
    assert torch.equal(loaded.encode(x), sae.encode(x)) and torch.equal(loaded(x), sae(x))
    assert (loaded.k, loaded.group_sizes, loaded.level_weights) == (sae.k, sae.group_sizes, sae.level_weights)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert sorted(os.listdir(tmp_path / "a")) == ["config.json", "sae.safetensors"]


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec", "threshold", "scale"])
def test_a_missing_or_misshapen_tensor_is_named(sae, tmp_path, name):
    sae.save(tmp_path)
    tensors = sae.tensors()
    st.save_file({n: t for n, t in tensors.items() if n != name}, tmp_path / "sae.safetensors")
    with pytest.raises(UserError, match=f"no tensor {name}"): MatryoshkaSAE.load(tmp_path)
    st.save_file(tensors | {name: torch.zeros(3)}, tmp_path / "sae.safetensors")
    with pytest.raises(UserError, match=f"{name} has shape"): MatryoshkaSAE.load(tmp_path)


def test_other_damage_is_named(sae, tmp_path):
    sae.save(tmp_path)
    st.save_file(sae.tensors() | {"W_skip": torch.zeros(1)}, tmp_path / "sae.safetensors")
    with pytest.raises(UserError, match="W_skip"): MatryoshkaSAE.load(tmp_path)
    st.save_file(sae.tensors() | {"threshold": torch.tensor(-1.0)}, tmp_path / "sae.safetensors")
    with pytest.raises(UserError, match="never set"): MatryoshkaSAE.load(tmp_path)
    (tmp_path / "sae.safetensors").write_bytes(b"half a file")
    with pytest.raises(UserError, match="not a whole"): MatryoshkaSAE.load(tmp_path)
    (tmp_path / "sae.safetensors").unlink()
    with pytest.raises(UserError, match="missing"): MatryoshkaSAE.load(tmp_path)
    sae.save(tmp_path)
    cfg = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in cfg.items() if k != "group_sizes"}), encoding="utf-8")
    with pytest.raises(UserError, match="group_sizes"): MatryoshkaSAE.load(tmp_path)
