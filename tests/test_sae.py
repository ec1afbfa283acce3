"""The SAE itself: shapes, threshold, independence of the batch, files, and other libraries' layouts."""
import json
import os

import numpy as np
import pytest
import safetensors.torch as st
import torch

from saerad.core import UserError
from saerad.sae import FORMATS, MatryoshkaSAE, SAEConfig, convert, doctor, encode_rows, folded, read_sae


@pytest.fixture
def sae() -> MatryoshkaSAE:
    sae = MatryoshkaSAE.from_config(16, SAEConfig(k=8), seed=3)
    draw = torch.Generator().manual_seed(1)
    sae.b_dec.data = torch.randn(16, generator=draw) * 0.1
    sae.b_enc.data = torch.randn(64, generator=draw) * 0.1
    sae.threshold.fill_(0.2)
    sae.scale.fill_(7.5)
    return sae


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(50, 16, generator=torch.Generator().manual_seed(2)) * 3


class Rows:
    """The two things that `encode_rows` asks of a store."""
    def __init__(self, x): self.x, self.d = x, x.shape[1]
    def read(self, rows): return self.x[rows]


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


def test_sparse_rows_equal_dense_ones(sae, x):
    rows = np.array([5, 3, 3, 49, 0])
    found = encode_rows(sae, Rows(x), rows, batch=2)
    assert found.shape == (5, 64) and found.dtype == np.float32
    assert np.allclose(found.toarray(), sae.encode(x[rows]).numpy(), atol=1e-6)
    assert encode_rows(sae, Rows(x), rows[:0]).shape == (0, 64)
    with pytest.raises(UserError, match="width 16.*width 3"): encode_rows(sae, Rows(torch.zeros(2, 3)), np.array([0]))


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
    cfg = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in cfg.items() if k != "group_sizes"}))
    with pytest.raises(UserError, match="group_sizes"): MatryoshkaSAE.load(tmp_path)


# --- other layouts

def test_folding_the_scale_changes_units_and_nothing_else(sae, x):
    other = MatryoshkaSAE(16, sae.group_sizes, sae.k)
    other.load_state_dict(folded(sae.tensors()))
    assert torch.allclose(other.encode(x), sae.encode(x) * 7.5, atol=1e-4)
    assert torch.allclose(other(x), sae(x), atol=1e-4)


@pytest.mark.parametrize("to", FORMATS)
def test_round_trips(sae, x, tmp_path, to):
    sae.save(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "out", to)
    convert(tmp_path / "out", tmp_path / "back", "saerad")
    back = MatryoshkaSAE.load(tmp_path / "back")
    assert torch.allclose(back(x), sae(x), atol=1e-4)
    assert torch.equal(back.encode(x) > 0, sae.encode(x) > 0)
    assert (back.k, back.group_sizes) == (sae.k, sae.group_sizes)
    convert(tmp_path / "back", tmp_path / "again", to)           # a second trip loses nothing at all
    ours, theirs = read_sae(tmp_path / "out").tensors, read_sae(tmp_path / "again").tensors
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_dictionary_learning_layout_by_its_own_formula(sae, x, tmp_path):
    sae.save(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "dl", "dictionary_learning")
    state = torch.load(tmp_path / "dl/ae.pt", weights_only=True)
    assert state["k"].dtype == torch.int32 and state["threshold"].dtype == torch.float32 and state["group_sizes"].dtype == torch.int64
    post = ((x - state["b_dec"]) @ state["W_enc"] + state["b_enc"]).relu()
    kept = post * (post > state["threshold"])
    assert torch.allclose(kept @ state["W_dec"] + state["b_dec"], sae(x), atol=1e-4)


def test_sae_lens_layout_by_its_own_formula(sae, x, tmp_path):
    sae.save(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "sl", "sae_lens")
    cfg, state = json.loads((tmp_path / "sl/cfg.json").read_text()), st.load_file(tmp_path / "sl/sae_weights.safetensors")
    assert cfg["architecture"] == "jumprelu" and cfg["apply_b_dec_to_input"] and state["threshold"].shape == (64,)
    pre = (x - state["b_dec"]) @ state["W_enc"] + state["b_enc"]
    assert torch.allclose((pre.relu() * (pre > state["threshold"])) @ state["W_dec"] + state["b_dec"], sae(x), atol=1e-4)
    del cfg["metadata"]                         # as SAELens itself would write it
    (tmp_path / "sl/cfg.json").write_text(json.dumps(cfg | {"apply_b_dec_to_input": False}))
    st.save_file(state | {"b_enc": state["b_enc"] - state["b_dec"] @ state["W_enc"]}, tmp_path / "sl/sae_weights.safetensors")
    found = read_sae(tmp_path / "sl")
    assert found.k is None and found.group_sizes == (64,)
    assert torch.allclose(found.sae()(x), sae(x), atol=1e-3)
    with pytest.raises(UserError, match="does not say its k"): convert(tmp_path / "sl", tmp_path / "no", "dictionary_learning")
    assert not (tmp_path / "no").exists()


def test_a_training_backup_keeps_its_norm_factor_as_the_scale(sae, x, tmp_path):
    t = sae.tensors()
    state = {n: t[n] for n in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
    state |= {"k": torch.tensor(8, dtype=torch.int32), "group_sizes": torch.tensor(sae.group_sizes)}
    torch.save({"step": 10, "ae": state, "optimizer": {}, "config": {}, "norm_factor": 7.5}, tmp_path / "ae.pt")
    assert torch.equal(read_sae(tmp_path / "ae.pt").sae()(x), sae(x))
    assert "backup" in doctor(tmp_path)


@pytest.mark.parametrize("bias", ["b_dec", "bias"])
def test_one_group_kinds_have_transposed_weights(sae, x, tmp_path, bias):
    t = folded(sae.tensors())
    torch.save({"encoder.weight": t["W_enc"].T.clone(), "encoder.bias": t["b_enc"], "decoder.weight": t["W_dec"].T.clone(), bias: t["b_dec"],
                "k": torch.tensor(8), "threshold": t["threshold"]}, tmp_path / "ae.pt")
    found = read_sae(tmp_path)
    assert found.group_sizes == (64,) and torch.allclose(found.sae()(x), sae(x), atol=1e-4)


class Bomb:
    def __reduce__(self): return os.mkdir, (os.environ["BOMB"],)


def test_a_pickle_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    torch.save({"W_enc": Bomb()}, tmp_path / "ae.pt")
    with pytest.raises(UserError, match="refused"): read_sae(tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_unknown_checkpoints_say_what_was_found(tmp_path):
    with pytest.raises(UserError, match="does not exist"): doctor(tmp_path / "nothing")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="found notes.txt"): doctor(tmp_path)
    torch.save({"encoder": torch.zeros(1)}, tmp_path / "ae.pt")
    with pytest.raises(UserError, match="no W_enc among encoder"): doctor(tmp_path)
    torch.save([1, 2], tmp_path / "ae.pt")
    with pytest.raises(UserError, match="list"): doctor(tmp_path)
    (tmp_path / "ae.pt").write_bytes(b"cut off")
    with pytest.raises(UserError): doctor(tmp_path)


def test_doctor_names_what_costs_most(sae, tmp_path):
    t = sae.tensors()
    torch.save({n: t[n] for n in ("W_enc", "b_enc", "W_dec", "b_dec")} | {"W_dec": 2 * t["W_dec"], "k": torch.tensor(8),
               "threshold": torch.tensor(-1.0), "group_sizes": torch.tensor([32, 16, 8, 4, 4])}, tmp_path / "ae.pt")
    said = doctor(tmp_path)
    for word in ("dictionary_learning", "reversed", "never set", "not of length 1", "16 → 64", "8"): assert word in said
    with pytest.raises(UserError, match="never set"): convert(tmp_path, tmp_path / "out", "saerad")
    assert not (tmp_path / "out").exists()
    sae.save(tmp_path / "good")
    assert "note" not in doctor(tmp_path / "good") and "ascending" in doctor(tmp_path / "good")


def test_convert_refuses_a_full_folder_and_an_unknown_layout(sae, tmp_path):
    sae.save(tmp_path / "ours")
    with pytest.raises(UserError, match="not empty"): convert(tmp_path / "ours", tmp_path / "ours", "sae_lens")
    with pytest.raises(UserError, match="choose one of"): convert(tmp_path / "ours", tmp_path / "new", "sparse")
