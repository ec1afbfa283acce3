"""Other libraries' layouts: exact round trips, refusals, the hub, and what the doctor says."""
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch as st
import torch
from conftest import Rows
from hub_server import HubServer

from saerad.core import UserError
from saerad.sae.convert import FORMATS, convert, doctor, folded, read_sae
from saerad.sae.kinds import KINDS, Kind
from saerad.sae.model import TENSORS, MatryoshkaSAE, SAEConfig

# --- other layouts

def test_folding_the_scale_changes_units_and_nothing_else(sae, x):
    other = MatryoshkaSAE(16, sae.group_sizes, sae.k)
    other.load_state_dict(folded(sae.tensors()))
    assert torch.allclose(other.encode(x), sae.encode(x) * 7.5, atol=1e-4)
    assert torch.allclose(other(x), sae(x), atol=1e-4)


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("kind", ["batch_topk", "topk"])
def test_round_trips_end_with_the_same_bytes(sae, x, tmp_path, to, kind):
    sae.kind = kind
    sae.save(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "out", to, force=True)
    convert(tmp_path / "out", tmp_path / "back", "saerad")
    for name in ("sae.safetensors", "config.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "back" / name).read_bytes(), name


def jumping(sae: MatryoshkaSAE) -> MatryoshkaSAE:
    """`sae` as a JumpReLU SAE, every feature with a threshold of its own."""
    other = MatryoshkaSAE(16, sae.group_sizes, sae.k, sae.level_weights, kind="jumprelu", kind_options={"bandwidth": 0.5})
    thresholds = torch.linspace(0.05, 0.6, 64)[torch.randperm(64, generator=torch.Generator().manual_seed(5))]
    other.load_state_dict(sae.state_dict() | {"log_threshold": thresholds.log()})
    return other


def test_thresholds_of_features_are_read_folded_and_written(sae, x, tmp_path):
    sae = jumping(sae)
    sae.save(tmp_path / "ours")
    checkpoint = read_sae(tmp_path / "ours")
    assert checkpoint.rule == "jumprelu" and checkpoint.tensors.keys() == {*TENSORS, "log_threshold"}
    assert checkpoint.sae().rule == sae.rule and torch.equal(checkpoint.sae().encode(x), sae.encode(x))
    wide = replace(checkpoint, tensors=folded(checkpoint.tensors)).sae()
    assert wide.scale == 1 and torch.equal(wide.encode(x) > 0, sae.encode(x) > 0) and torch.allclose(wide(x), sae(x), atol=1e-4)
    assert "one per feature, median 0.3" in doctor(tmp_path / "ours", Rows(x)) and "jumprelu" in doctor(tmp_path / "ours")
    for to in ("saerad", "sae_lens"):
        convert(tmp_path / "ours", tmp_path / to, to)
        convert(tmp_path / to, tmp_path / f"back from {to}", "saerad")
        for name in ("sae.safetensors", "config.json"):
            assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / f"back from {to}" / name).read_bytes(), (to, name)


def test_sae_lens_runs_thresholds_of_features_as_we_do(sae, x, tmp_path):
    sae = jumping(sae)
    sae.save(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "sl", "sae_lens")
    state = st.load_file(tmp_path / "sl/sae_weights.safetensors")
    pre = (x - state["b_dec"]) @ state["W_enc"] + state["b_enc"]
    assert torch.allclose((pre.relu() * (pre > state["threshold"])) @ state["W_dec"] + state["b_dec"], sae(x), atol=1e-4)
    kept = read_sae(tmp_path / "sl")
    assert kept.k == 8 and torch.equal(kept.sae().encode(x), sae.encode(x))
    moved = state["threshold"].clone()
    moved[7], moved[9] = 3.0, -1.0                                    # below 0 is as 0
    st.save_file(state | {"threshold": moved}, tmp_path / "sl/sae_weights.safetensors")
    found = read_sae(tmp_path / "sl")
    assert any("ignored" in note for note in found.notes) and found.rule == "jumprelu" and found.k is None
    assert torch.equal(found.sae().encode(x) > 0, (pre > moved) & (pre > 0)) and "one per feature" in doctor(tmp_path / "sl")


@pytest.mark.parametrize("to", ["dictionary_learning", "sparsify"])
@pytest.mark.parametrize("force", [False, True])
def test_thresholds_of_features_are_refused_where_there_is_no_form_for_them(sae, tmp_path, to, force):
    jumping(sae).save(tmp_path / "ours")
    with pytest.raises(UserError, match=f"is of the kind jumprelu, which {to} has no form for; convert it to sae_lens or saerad."):
        convert(tmp_path / "ours", tmp_path / "out", to, force)
    assert not (tmp_path / "out").exists()


def test_a_kind_of_ones_own_is_kept_and_goes_nowhere_else(sae, x, tmp_path, monkeypatch):
    class ReLU(Kind):
        def activate(self, sae, pre): return pre.relu()
    monkeypatch.setitem(KINDS, "relu", ReLU())
    sae.kind = "relu"
    sae.save(tmp_path / "ours")
    assert torch.equal(read_sae(tmp_path / "ours").sae().encode(x), sae.encode(x)) and "relu" in doctor(tmp_path / "ours")
    with pytest.raises(UserError, match="kind relu, which sae_lens has no form for; convert it to saerad."):
        convert(tmp_path / "ours", tmp_path / "out", "sae_lens", force=True)
    convert(tmp_path / "ours", tmp_path / "back", "saerad")
    assert (tmp_path / "back/config.json").read_bytes() == (tmp_path / "ours/config.json").read_bytes()


@pytest.mark.parametrize(("kind", "word"), [("batch_topk", "batch"), ("topk", "token")])
def test_files_beside_that_say_selection_are_still_read(sae, tmp_path, kind, word):
    sae.kind = kind
    sae.save(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "out", "sae_lens", force=True)
    cfg = json.loads((tmp_path / "out/saerad.json").read_text(encoding="utf-8"))
    assert cfg["rule"] == kind and "selection" not in cfg
    before = {k: v for k, v in cfg.items() if k not in ("rule", "kind_options")} | {"selection": word}
    (tmp_path / "out/saerad.json").write_text(json.dumps(before), encoding="utf-8")
    convert(tmp_path / "out", tmp_path / "back", "saerad")
    for name in ("sae.safetensors", "config.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "back" / name).read_bytes(), name


@pytest.mark.parametrize("to", FORMATS[1:])
def test_without_our_files_beside_it_a_copy_still_means_the_same(sae, x, tmp_path, to):
    if to == "sparsify": sae = MatryoshkaSAE.from_config(16, SAEConfig(k=8, group_fractions=(1.0,), kind="topk"))
    if to == "sparsify": sae.threshold.fill_(0.0)
    sae.save(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "out", to)
    for name in ("saerad.json", "saerad.safetensors"): (tmp_path / "out" / name).unlink()
    convert(tmp_path / "out", tmp_path / "back", "saerad")
    back = MatryoshkaSAE.load(tmp_path / "back")
    assert torch.allclose(back(x), sae(x), atol=1e-4) and torch.equal(back.encode(x) > 0, sae.encode(x) > 0)


def test_our_file_beside_other_weights_is_ignored(sae, x, tmp_path):
    sae.save(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "out", "dictionary_learning")
    state = torch.load(tmp_path / "out/ae.pt", weights_only=True)
    torch.save(state | {"b_enc": state["b_enc"] + 1}, tmp_path / "out/ae.pt")
    found = read_sae(tmp_path / "out")
    assert any("ignored" in note for note in found.notes) and torch.equal(found.tensors["b_enc"], state["b_enc"] + 1)


def test_a_lossy_export_is_refused_unless_forced(sae, tmp_path):
    sae.save(tmp_path / "ours")
    with pytest.raises(UserError, match="no threshold.*--force"): convert(tmp_path / "ours", tmp_path / "out", "sparsify")
    sae.kind = "topk"
    sae.save(tmp_path / "token")
    for to in ("sae_lens", "dictionary_learning"):
        with pytest.raises(UserError, match="no Matryoshka"): convert(tmp_path / "token", tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka_batchtopk"])
@pytest.mark.parametrize("subtracts", [True, False])
def test_sae_lens_chooses_by_activation_times_decoder_norm(x, tmp_path, architecture, subtracts):
    draw = torch.Generator().manual_seed(3)
    w_enc, w_dec = torch.randn(16, 64, generator=draw), torch.randn(64, 16, generator=draw)
    w_dec *= (torch.rand(64, generator=draw) * 1.5 + 0.25)[:, None] / w_dec.norm(dim=1, keepdim=True)
    b_enc, b_dec = torch.randn(64, generator=draw), torch.randn(16, generator=draw)
    norms = w_dec.norm(dim=1)
    pre = ((x - b_dec if subtracts else x) @ w_enc + b_enc) * norms           # as their encode and decode are written
    cut = float(pre.relu().flatten().topk(8 * len(x)).values[-1])
    if architecture == "topk": features = torch.zeros_like(pre).scatter(1, pre.topk(8).indices, pre.topk(8).values.relu())
    else: features = pre.relu() * (pre > cut)
    state = {"W_enc": w_enc, "b_enc": b_enc, "W_dec": w_dec, "b_dec": b_dec, "topk_threshold": torch.tensor(cut, dtype=torch.double)}
    st.save_file(state, tmp_path / "sae_weights.safetensors")
    cfg = {"architecture": architecture, "k": 8, "rescale_acts_by_decoder_norm": True, "apply_b_dec_to_input": subtracts}
    if architecture.startswith("matryoshka"): cfg["matryoshka_widths"] = [16, 64]
    (tmp_path / "cfg.json").write_text(json.dumps(cfg), encoding="utf-8")
    found = read_sae(tmp_path).sae()
    assert torch.allclose(found.encode(x), features, atol=1e-4) and features.any()
    assert torch.allclose(found(x), (features / norms) @ w_dec + b_dec, atol=1e-4)


def test_every_key_is_obeyed_or_refused(sae, tmp_path):
    st.save_file(folded(sae.tensors()), tmp_path / "sae_weights.safetensors")
    good = {"architecture": "jumprelu", "d_in": 16, "d_sae": 64, "normalize_activations": None, "hook_name": "blocks.4"}
    (tmp_path / "cfg.json").write_text(json.dumps(good), encoding="utf-8")
    read_sae(tmp_path)
    for key, value, said in (("reshape_activations", "hook_z", "only none is read"), ("normalize_activations", "layer_norm", "Fold the norm in"),
                             ("finetuning_scaling_factor", True, "only False is read"), ("softcap", 30.0, "'softcap' does to the features")):
        (tmp_path / "cfg.json").write_text(json.dumps(good | {key: value}), encoding="utf-8")
        with pytest.raises(UserError, match=said): read_sae(tmp_path)


def test_a_plain_relu_autoencoder_is_not_taken_for_a_topk(sae, tmp_path):
    t = folded(sae.tensors())
    state = {"encoder.weight": t["W_enc"].T.clone(), "encoder.bias": t["b_enc"], "decoder.weight": t["W_dec"].T.clone(), "bias": t["b_dec"]}
    torch.save(state, tmp_path / "ae.pt")
    with pytest.raises(UserError, match="neither k nor thresholds"): read_sae(tmp_path)
    for trainer, said in (({"dict_class": "GatedAutoEncoder"}, "dict_class is 'GatedAutoEncoder'"), ({"norm_by": "rms"}, "what 'norm_by' does")):
        (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer}), encoding="utf-8")
        with pytest.raises(UserError, match=said): read_sae(tmp_path)


def test_their_jumprelu_does_not_subtract_the_bias(sae, x, tmp_path):
    t = folded(sae.tensors()) | {"threshold": torch.linspace(-0.1, 0.6, 64)}
    torch.save({n: t[n] for n in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}, tmp_path / "ae.pt")
    pre = x @ t["W_enc"] + t["b_enc"]
    features = (pre * (pre > t["threshold"])).relu()
    found, rebuilt = read_sae(tmp_path), features @ t["W_dec"] + t["b_dec"]
    assert found.rule == "jumprelu" and found.k is None
    assert torch.allclose(found.sae().encode(x), features, atol=1e-3) and torch.allclose(found.sae()(x), rebuilt, atol=1e-3)


@pytest.mark.parametrize("act", ["relu", "jumprelu", "topk", "batchtopk"])
@pytest.mark.parametrize("by_norm", [True, False])
@pytest.mark.parametrize("norm", ["inference", "dataset-wise"])
def test_llamascopium_layout_by_its_own_formula(x, tmp_path, act, by_norm, norm):
    draw = torch.Generator().manual_seed(4)
    t = {"W_E": torch.randn(16, 64, generator=draw), "b_E": torch.randn(64, generator=draw), "W_D": torch.randn(64, 16, generator=draw),
         "b_D": torch.randn(16, generator=draw), "activation_function.log_jumprelu_threshold": torch.randn(64, generator=draw),
         "dataset_average_activation_norm.h": torch.tensor(12.0)}
    st.save_file(t, tmp_path / "sae_weights.safetensors")
    cfg = {"sae_type": "sae", "act_fn": act, "top_k": 8, "sparsity_include_decoder_norm": by_norm, "norm_activation": norm, "d_model": 16,
           "hook_point_in": "h", "hook_point_out": "h", "use_glu_encoder": False, "expansion_factor": 4.0, "use_decoder_bias": True}
    (tmp_path / "config.json").write_text(json.dumps(cfg), encoding="utf-8")
    scale, norms = (12 / 4 if norm == "dataset-wise" else 1.0), t["W_D"].norm(dim=1) if by_norm else torch.ones(64)
    pre = (x / scale @ t["W_E"] + t["b_E"]) * norms
    if act == "jumprelu": features = pre * (pre > t["activation_function.log_jumprelu_threshold"].exp())
    elif act == "relu": features = pre.relu()
    else: features = torch.zeros_like(pre).scatter(1, pre.relu().topk(8).indices, pre.relu().topk(8).values)
    features = features / norms
    found = read_sae(tmp_path)
    assert found.sure and (found.k == 8) == ("topk" in act)
    if act == "batchtopk":                      # which features are on depends on their batch: no threshold is stored
        with pytest.raises(UserError, match="threshold was never set"): found.sae()
        return
    sizes = norms if act == "topk" else 1
    assert torch.allclose(found.sae().encode(x), features * sizes, atol=1e-3)
    assert torch.allclose(found.sae()(x), (features @ t["W_D"] + t["b_D"]) * scale, atol=1e-3)
    for key, value in (("use_glu_encoder", True), ("sae_type", "clt"), ("norm_activation", "token-wise"), ("hook_point_out", "other"), ("new", 1)):
        (tmp_path / "config.json").write_text(json.dumps(cfg | {key: value}), encoding="utf-8")
        with pytest.raises(UserError, match=key): read_sae(tmp_path)


def test_sparsify_layout_by_its_own_formula(x, tmp_path):
    sae = MatryoshkaSAE.from_config(16, SAEConfig(k=8, group_fractions=(1.0,), kind="topk"))
    sae.threshold.fill_(0.0)
    sae.scale.fill_(3.1)
    sae.save(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "sp", "sparsify")
    t, cfg = st.load_file(tmp_path / "sp/sae.safetensors"), json.loads((tmp_path / "sp/cfg.json").read_text(encoding="utf-8"))
    pre = torch.nn.functional.linear(x - t["b_dec"], t["encoder.weight"], t["encoder.bias"]).relu()
    top = pre.topk(cfg["k"], dim=1)
    rebuilt = torch.zeros_like(pre).scatter(1, top.indices, top.values) @ t["W_dec"] + t["b_dec"]
    assert torch.allclose(rebuilt, sae(x), atol=1e-4)
    st.save_file(t | {"W_skip": torch.zeros(16, 16)}, tmp_path / "sp/sae.safetensors")
    with pytest.raises(UserError, match="skip"): read_sae(tmp_path / "sp")


def test_a_sae_lens_training_checkpoint_has_cumulative_widths(sae, x, tmp_path):
    t = folded(sae.tensors())
    state = {n: t[n] for n in ("W_enc", "b_enc", "W_dec", "b_dec")} | {"topk_threshold": t["threshold"].double()}
    st.save_file(state, tmp_path / "sae_weights.safetensors")
    cfg = {"architecture": "matryoshka_batchtopk", "d_in": 16, "d_sae": 64, "k": 8.0, "matryoshka_widths": [4, 8, 16, 32, 64]}
    (tmp_path / "cfg.json").write_text(json.dumps(cfg), encoding="utf-8")
    found = read_sae(tmp_path)
    assert found.group_sizes == (4, 4, 8, 16, 32) and found.k == 8
    assert torch.allclose(found.sae()(x), sae(x), atol=1e-4)
    (tmp_path / "cfg.json").write_text(json.dumps(cfg | {"architecture": "gated"}), encoding="utf-8")
    with pytest.raises(UserError, match="gated"): read_sae(tmp_path)


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
    cfg, state = json.loads((tmp_path / "sl/cfg.json").read_text(encoding="utf-8")), st.load_file(tmp_path / "sl/sae_weights.safetensors")
    assert cfg["architecture"] == "jumprelu" and cfg["apply_b_dec_to_input"] and state["threshold"].shape == (64,)
    pre = (x - state["b_dec"]) @ state["W_enc"] + state["b_enc"]
    assert torch.allclose((pre.relu() * (pre > state["threshold"])) @ state["W_dec"] + state["b_dec"], sae(x), atol=1e-4)
    del cfg["metadata"]                         # as SAELens itself would write it
    (tmp_path / "sl/cfg.json").write_text(json.dumps(cfg | {"apply_b_dec_to_input": False}), encoding="utf-8")
    st.save_file(state | {"b_enc": state["b_enc"] - state["b_dec"] @ state["W_enc"]}, tmp_path / "sl/sae_weights.safetensors")
    found = read_sae(tmp_path / "sl")
    assert found.k is None and found.group_sizes == (64,)
    assert torch.allclose(found.sae()(x), sae(x), atol=1e-3)
    for name in ("saerad.json", "saerad.safetensors"): (tmp_path / "sl" / name).unlink(missing_ok=True)
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
    (tmp_path / "notes.txt").write_text("x", encoding="utf-8")
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


# --- the doctor with activations

@pytest.mark.parametrize("kept", ["normalised", "raw"])
def test_activations_tell_whether_the_norm_was_folded_in(kept, tmp_path):
    sae = MatryoshkaSAE.from_config(32, SAEConfig(k=6))
    draw = torch.Generator().manual_seed(0)
    raw = 20 * (torch.rand(2000, 128, generator=draw) * (torch.rand(2000, 128, generator=draw) < 0.03)) @ sae.W_dec.detach()
    sae.scale.copy_(raw.square().sum(1).mean().sqrt())
    sae.threshold.fill_(0.5)
    t = folded(sae.tensors()) if kept == "raw" else sae.tensors()
    state = {n: t[n] for n in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
    torch.save(state | {"k": torch.tensor(6), "group_sizes": torch.tensor(sae.group_sizes)}, tmp_path / "ae.pt")
    said = doctor(tmp_path, Rows(raw))
    assert ("used as it is meant" in said) == (kept == "raw") and ("expects vectors divided by" in said) == (kept == "normalised")
    convert(tmp_path, tmp_path / "out", "saerad", store=Rows(raw))
    mended = MatryoshkaSAE.load(tmp_path / "out")
    assert torch.allclose(mended(raw), sae(raw), atol=1e-3)
    with pytest.raises(UserError, match="width 32.*width 5"): doctor(tmp_path, Rows(torch.zeros(3, 5)))


def test_a_threshold_can_be_measured(sae, x, tmp_path):
    t = sae.tensors()
    state = {n: t[n] for n in ("W_enc", "b_enc", "W_dec", "b_dec")} | {"threshold": torch.tensor(-1.0), "k": torch.tensor(8)}
    torch.save(state | {"group_sizes": torch.tensor(sae.group_sizes)}, tmp_path / "ae.pt")
    assert "--store" in doctor(tmp_path)
    convert(tmp_path, tmp_path / "out", "saerad", store=Rows(x))
    assert (MatryoshkaSAE.load(tmp_path / "out").encode(x) > 0).sum(1).float().mean() == pytest.approx(8, abs=0.1)


# --- the hub

HUB = """
import sys
from saerad.run.cli import main
for arguments in {commands!r}:
    try: main(arguments)
    except SystemExit as e: print("ended with", e.code, flush=True)
"""


def test_an_sae_goes_to_the_hub_and_comes_back(sae, tmp_path):
    sae.save(tmp_path / "ours")
    commands = [["convert", str(tmp_path / "ours"), "hf:me/chest/layer-4", "--to", "sae_lens"], ["doctor", "hf:me/chest/layer-4"],
                ["convert", "hf:me/chest/layer-4", str(tmp_path / "back"), "--to", "saerad"], ["doctor", "hf:me/nothing"]]
    with HubServer() as hub:
        env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "a-token", "HF_HUB_DISABLE_XET": "1",
                            "HF_HUB_OFFLINE": "0", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        done = subprocess.run([sys.executable, "-c", HUB.format(commands=commands)], env=env, capture_output=True, text=True, timeout=300)
        assert {"layer-4/sae_weights.safetensors", "layer-4/cfg.json"} <= set(hub.repositories["me/chest"]), done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("ended")] == [f"ended with {code}" for code in (0, 0, 0, 2)], done.stderr
    for name in ("sae.safetensors", "config.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "back" / name).read_bytes(), name
    assert "hf:me/nothing cannot be had from the hub" in done.stderr and "a-token" not in done.stderr + done.stdout


# --- the peers themselves, where they are installed

PEER = str(Path(__file__).parents[2] / ".venv-bench/bin/python")


@pytest.mark.skipif(not os.path.exists(PEER), reason="make bench-env installs the peers")
@pytest.mark.parametrize(("to", "code"), [
    ("dictionary_learning", "from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE as S;"
                            "s = S.from_pretrained(sys.argv[1] + '/ae.pt'); out = s(x)"),
    ("sae_lens", "from sae_lens import SAE; s = SAE.load_from_disk(sys.argv[1]); out = s.decode(s.encode(x))")])
def test_the_library_itself_reads_what_is_written(sae, x, tmp_path, to, code):
    sae.save(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "out", to)
    st.save_file({"x": x}, tmp_path / "x.safetensors")
    script = ("import sys, torch, safetensors.torch as st; x = st.load_file(sys.argv[2])['x']; " + code +
              "; st.save_file(dict(y=out.detach().contiguous()), sys.argv[3])")
    subprocess.run([PEER, "-c", script, *(str(tmp_path / n) for n in ("out", "x.safetensors", "y.safetensors"))], check=True, capture_output=True)
    assert torch.allclose(st.load_file(tmp_path / "y.safetensors")["y"], sae(x), atol=1e-3)
