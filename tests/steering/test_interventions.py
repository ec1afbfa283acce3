"""What is done to the residual stream, against plain hooks and plain arithmetic, and that a batch is what its rows are alone."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from saerad.core import UserError
from saerad.sae.model import MatryoshkaSAE
from saerad.steering.interventions import (
    Batch,
    BufferedLayer,
    SharedPromptLayer,
    adding,
    adding_per_token,
    attend_shared,
    buffered_cache,
    can_share,
    clamping,
    perplexities,
    prompt_mask,
    scaling,
    sentence_ends,
    sharing,
    write_steered,
    written_mask,
)
from saerad.studies.record import StudiesConfig, Study, View
from saerad.studies.sources import open_source
from saerad.subjects.subject import layers_path, open_subject, random_mini


def study(words: int = 3) -> Study:
    pixels = np.random.default_rng(words).integers(0, 255, (112, 112)).astype(np.uint8)
    return Study("s", "p", "test", {"indication": "cough " * words}, {"frontal": View("s", lambda: pixels)})


@pytest.fixture(scope="module")
def subject(): return random_mini(0)


@pytest.fixture(scope="module")
def prompt(subject): return subject.prompt(study())


def trained(width: int = 12, d: int = 256, scale: float = 5.0) -> MatryoshkaSAE:
    sae = MatryoshkaSAE(d, (width,), k=2, seed=1)
    sae.W_enc.data, sae.b_enc.data = sae.W_dec.data.T * 1.3, torch.linspace(-0.1, 0.1, width)
    sae.b_dec.data = torch.full((d,), 0.01)
    sae.scale.fill_(scale)
    sae.threshold.fill_(0.05)
    return sae


# ---------------------------------------------------------------- the formula
@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.floats(-3, 3))
def test_clamped_and_scaled_features_are_what_was_asked_and_the_error_stays(seed, value):
    sae = trained(width=4, d=8)
    sae.W_dec.data = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))[0][:4]      # at right angles
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(seed)) * 5
    z, row = sae.encode(x), sae.W_dec.detach()[2] * sae.scale
    clamped = x + Batch([clamping(sae, [2], [value])]).change(x[None])[0]
    assert torch.allclose(clamped, x + (value - z[:, 2:3]) * row, atol=1e-4)
    scaled = x + Batch([scaling(sae, [2], [value])]).change(x[None])[0]
    assert torch.allclose(scaled, x + (value - 1) * z[:, 2:3] * row, atol=1e-4)
    other = [0, 1, 3]
    decoded, again = sae.decode(z), sae.decode(z.index_fill(1, torch.tensor([2]), value))
    assert torch.allclose(clamped - again, x - decoded, atol=1e-4)       # the reconstruction error is untouched
    assert torch.allclose((clamped @ sae.W_dec.detach().T)[:, other], (x @ sae.W_dec.detach().T)[:, other], atol=1e-3)


def test_scaling_by_one_and_adding_nothing_do_nothing():
    sae, x = trained(), torch.randn(2, 3, 256)
    for how in (scaling(sae, [1, 2], [1.0, 1.0]), adding(torch.zeros(2, 256))):
        assert float(Batch([how, how]).change(x).abs().max()) == 0


def test_rows_with_different_numbers_of_features_do_not_disturb_each_other():
    sae, x = trained(), torch.randn(3, 5, 256, generator=torch.Generator().manual_seed(0)) * 5
    rows = [clamping(sae, [1], [2.0]), scaling(sae, [0, 4, 7], [0.0, 3.0, -1.0]), adding(torch.randn(2, 256))]
    together = Batch(rows)
    for i, how in enumerate(rows):
        alone = Batch([how]).change(x[i:i + 1])
        assert torch.allclose(together.change(x)[i], alone.expand(1, 5, 256)[0], atol=1e-4)
    assert torch.allclose(together.select([2, 0]).change(x[[2, 0]]), together.change(x)[[2, 0]], atol=1e-5)


# ---------------------------------------------------------------- an intervention and the encoder agree on what fires
def of_kind(kind: str, width: int = 12, d: int = 8, seed: int = 1) -> MatryoshkaSAE:
    """A small SAE of a kind that fires on most tokens, with more features above its threshold than a TopK keeps."""
    sae = MatryoshkaSAE(d, (width // 2, width - width // 2), k=3, seed=seed, kind=kind)
    sae.b_enc.data, sae.b_dec.data = torch.linspace(-0.1, 0.2, width), torch.full((d,), 0.1)
    sae.scale.fill_(5.0)
    sae.threshold.fill_(0.05)
    return sae


KINDS = ("batch_topk", "topk")


def tokens_for(sae: MatryoshkaSAE, n: int = 40) -> torch.Tensor:
    return torch.randn(n, sae.d, generator=torch.Generator().manual_seed(5)) * 5


def passed_over(sae: MatryoshkaSAE, x: torch.Tensor) -> tuple[int, int]:
    """A token and a feature that is above the threshold there, but not among those that `encode` keeps."""
    pre = sae.preactivations(x / sae.scale)
    return tuple(((pre > sae.threshold + 0.1) & (sae.encode(x) == 0)).nonzero()[0].tolist())


def test_a_feature_outside_the_top_k_is_silent_to_clamping_and_scaling():
    sae = of_kind("topk")
    x = tokens_for(sae)
    token, feature = passed_over(sae, x)
    here = x[None, token:token + 1]
    assert float(Batch([clamping(sae, [feature], [0.0])]).change(here).abs().max()) == 0
    assert float(Batch([scaling(sae, [feature], [2.0])]).change(here).abs().max()) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_scaling_by_two_adds_the_encoded_activation_once_more(kind):
    sae = of_kind(kind)
    x = tokens_for(sae)
    z = sae.encode(x)
    for feature in range(sae.width):
        expected = z[:, feature:feature + 1] * sae.W_dec.detach()[feature] * sae.scale
        assert torch.allclose(Batch([scaling(sae, [feature], [2.0])]).change(x[None])[0], expected, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_is_the_edited_encoding_decoded_minus_the_encoding_decoded(kind):
    sae = of_kind(kind)
    x = tokens_for(sae)
    z, at = sae.encode(x), [2, 7, 9]
    clamped, scaled = z.clone(), z.clone()
    clamped[:, at] = torch.tensor([0.0, 1.5, -1.0])
    scaled[:, at] *= torch.tensor([0.0, 2.0, -1.0])
    for how, edited in ((clamping(sae, at, [0.0, 1.5, -1.0]), clamped), (scaling(sae, at, [0.0, 2.0, -1.0]), scaled)):
        assert torch.allclose(Batch([how]).change(x[None])[0], (sae.decode(edited) - sae.decode(z)).detach(), atol=1e-4)


def test_rows_of_different_saes_and_kinds_beside_plain_vectors():
    saes = {kind: of_kind(kind, seed=i) for i, kind in enumerate((*KINDS, "batch_topk"))} | {"another topk": of_kind("topk", width=20, seed=9)}
    rows, expected = [], []
    x = tokens_for(saes["topk"], 30).view(5, 6, 8)
    x = torch.cat([x, x.flip(1)])
    for i, (sae, at) in enumerate(((saes["topk"], [1, 5]), (saes["batch_topk"], [3]), (saes["another topk"], [19, 0, 4]), (saes["topk"], [11]))):
        rows += [scaling(sae, at, [float(j) for j in range(len(at))]), adding(torch.ones(1, 8) * i)]
        z = sae.encode(x[2 * i])
        factors = torch.zeros(sae.width).index_fill(0, torch.tensor(at), 1.0)
        factors[at] = torch.tensor([float(j) - 1 for j in range(len(at))])
        expected += [((z * factors) @ sae.W_dec * sae.scale).detach(), torch.full((6, 8), float(i))]
    batch, x = Batch(rows), x[:8]
    assert torch.allclose(batch.change(x), torch.stack(expected), atol=1e-4)
    keep = [6, 1, 4, 0]
    assert torch.allclose(batch.select(keep).change(x[keep]), torch.stack(expected)[keep], atol=1e-4)
    one = x[:1].expand(8, -1, -1)                 # a prompt: all rows read the same stream
    assert torch.allclose(batch.change(one), batch.change(one.contiguous()), atol=1e-5)


def test_a_threshold_kind_is_gated_as_it_always_was():
    """Bit for bit: the products of the features' own encoder rows with the raw stream, where they are above the threshold."""
    sae = of_kind("batch_topk")
    x, t, at = tokens_for(sae).view(2, 20, 8), sae.tensors(), [4, 1]
    pre = torch.einsum("rtd,rnd->rtn", x, (t["W_enc"][:, at].T / 5.0).expand(2, -1, -1)) + (t["b_enc"][at] - t["b_dec"] @ t["W_enc"][:, at])
    z = torch.where(pre > float(sae.threshold), pre, 0)
    coefficients = torch.tensor([1.0, 2.0]) - z
    expected = torch.einsum("rtn,rnd->rtd", coefficients, (t["W_dec"][at] * 5.0).expand(2, -1, -1))
    assert torch.equal(Batch([clamping(sae, at, [1.0, 2.0])] * 2).change(x), expected)


# ---------------------------------------------------------------- where
def test_masks():
    section = np.array(["boilerplate", "image", "image", "indication"])
    v = torch.ones(1, 2)
    rows = [adding(v, p, s) for p, s in (("all", 0), ("prompt", 0), ("image", 0), ("generated", 0), ("all", 1))]
    assert prompt_mask(section, rows).int().tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    assert written_mask(np.zeros(5, int), rows).int().tolist() == [1, 0, 0, 1, 0]
    assert written_mask(np.full(5, 2), rows).int().tolist() == [1, 0, 0, 1, 1]


def hooked(subject, prompt, layer: int, change, most: int) -> list[int]:
    """The same intervention by a forward hook and transformers' own generation: `change(stream, first)` gives what is added."""
    calls = []
    def hook(module, args, output):
        calls.append(1)
        return output + change(output, len(calls) == 1)
    handle = subject.model.get_submodule(layers_path(subject.model))[layer].register_forward_hook(hook)
    try: return subject.generate_ids(subject.collate([prompt]), most)[0].tolist()
    finally: handle.remove()


def padded(ids: list[int], like: list[int], pad: int) -> list[int]: return [*ids, *[pad] * (len(like) - len(ids))]


@pytest.mark.parametrize("positions", ["all", "prompt", "image", "generated"])
@pytest.mark.parametrize("kind", ["add", "clamp", "scale", "scale topk"])
def test_equal_to_a_forward_hook_at_every_kind_of_position(subject, prompt, positions, kind):
    sae, v = trained(), torch.randn(1, 256, generator=torch.Generator().manual_seed(3)) * 2
    how = {"add": adding(v, positions),
           "clamp": clamping(sae, [1, 5], [9.0, -4.0], positions),
           "scale": scaling(sae, [0, 3], [-8.0, 9.0], positions),
           "scale topk": scaling(of_kind("topk", d=256), [0, 3, 5], [-8.0, 9.0, 9.0], positions)}[kind]
    where = prompt_mask(prompt.section, [how])[..., None].to(subject.device)
    later = 1.0 if positions in ("all", "generated") else 0.0
    def change(stream, first): return Batch([how], subject.device).change(stream) * (where if first else later)
    expected = hooked(subject, prompt, 4, change, 8)
    got = write_steered(subject, prompt, [adding(torch.zeros(1, 256)), how, how], 4, 8, perplexity=False)
    assert [padded(list(w.ids), expected, subject.tokenizer.pad_token_id) for w in got[1:]] == [expected] * 2


def test_a_field_is_added_to_the_prompt_token_by_token_and_to_its_row_alone(subject, prompt):
    field = torch.randn(len(prompt), 256, generator=torch.Generator().manual_seed(4)) * 2
    expected = hooked(subject, prompt, 4, lambda stream, first: field.to(stream) if first else 0.0 * stream, 8)
    rows = [adding(torch.zeros(1, 256)), adding_per_token(field), adding(field[:1])]
    plain, placed, pushed = write_steered(subject, prompt, rows, 4, 8, perplexity=False)
    pad = subject.tokenizer.pad_token_id
    assert padded(list(placed.ids), expected, pad) == expected
    assert plain.ids == write_steered(subject, prompt, [adding(torch.zeros(1, 256))], 4, 8, perplexity=False)[0].ids != placed.ids
    assert pushed.ids == write_steered(subject, prompt, [adding(field[:1])], 4, 8, perplexity=False)[0].ids


def test_two_hookpoints_are_two_forward_hooks_and_a_row_has_only_its_own(subject, prompt):
    low, high = torch.randn(2, 1, 256, generator=torch.Generator().manual_seed(5)) * 2
    field = torch.randn(len(prompt), 256, generator=torch.Generator().manual_seed(6))
    both, clamped = {2: adding(low), 5: adding(high, "generated")}, {3: adding_per_token(field), 6: clamping(trained(), [1, 5], [9.0, -4.0])}
    def by_hooks(edits: dict) -> list[int]:
        def hook(how, places, first):
            def change(module, args, output):
                there = places if first.pop() else 1.0 if how.positions in ("all", "generated") else 0.0
                first.append(False)
                field = how.per_token if how.per_token is not None and torch.is_tensor(there) else 0.0
                return output + Batch([how]).change(output) * there + field
            return change
        layers = subject.model.get_submodule(layers_path(subject.model))
        handles = [layers[at].register_forward_hook(hook(how, prompt_mask(prompt.section, [how])[..., None], [True])) for at, how in edits.items()]
        try: return subject.generate_ids(subject.collate([prompt]), 8)[0].tolist()
        finally: [h.remove() for h in handles]
    written = write_steered(subject, prompt, [adding(torch.zeros(1, 256)), both, clamped, {2: adding(low)}, adding(low)], 2, 8, perplexity=False)
    pad = subject.tokenizer.pad_token_id
    for w, edits in zip(written[1:4], (both, clamped, {2: adding(low)}), strict=True):
        expected = by_hooks(edits)
        assert padded(list(w.ids), expected, pad) == expected
    assert written[3].ids == written[4].ids and len({w.ids for w in written}) == 4


@pytest.fixture(scope="module")
def real(): return open_subject()


@pytest.fixture(scope="module")
def told(real):
    """A prompt that the bundled model knows what to do with."""
    world = open_source(StudiesConfig(source="phantom:0", train_patients=1, validation_patients=1, test_patients=1))
    return real.prompt(world.split("train")[0])


def test_rows_are_what_they_are_alone_on_a_model_that_ends_its_reports(real, told):
    noise = torch.randn(24, 256, generator=torch.Generator().manual_seed(0))
    rows = [adding(30 * v[None] / v.norm() * (i % 4) / 3, "all", i % 3) for i, v in enumerate(noise)]
    together = write_steered(real, told, rows, 4, 60)
    assert len({len(w.ids) for w in together}) > 1                # some were taken out before the others
    for i in range(0, 24, 5): assert write_steered(real, told, [rows[i]], 4, 60)[0].ids == together[i].ids
    split = write_steered(real, told, rows, 4, 60, batch_size=7)
    assert [w.ids for w in split] == [w.ids for w in together]


def test_from_a_sentence_on_the_report_is_the_baseline_up_to_there(real, told):
    hard = adding(torch.randn(1, 256, generator=torch.Generator().manual_seed(2)) * 4, "all", 1)
    plain, late = write_steered(real, told, [adding(torch.zeros(1, 256)), hard], 4, 60)
    ends = sentence_ends(real)
    first = next(i for i, t in enumerate(plain.ids) if ends[t]) + 1
    assert late.ids[:first] == plain.ids[:first] and late.ids != plain.ids


def test_image_positions_need_an_image(subject, prompt):
    blind = replace(prompt, section=np.where(prompt.section == "image", "boilerplate", prompt.section))
    with pytest.raises(UserError, match="no image tokens"): write_steered(subject, blind, [adding(torch.ones(1, 256), "image")], 4, 4)
    with pytest.raises(UserError, match="layer 99"): write_steered(subject, prompt, [adding(torch.ones(1, 256))], 99, 4)


# ---------------------------------------------------------------- cache and perplexity
@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(["one", "three", "repeat", "select"]), min_size=1, max_size=8), st.integers(1, 9))
def test_the_buffered_cache_is_the_usual_one(steps, capacity):
    ours, theirs = BufferedLayer(capacity), DynamicCache()
    draw, rows = torch.Generator().manual_seed(0), 2
    for step in ["three", *steps]:
        if step == "repeat" and rows < 9: ours.batch_repeat_interleave(2), theirs.batch_repeat_interleave(2)
        elif step == "select": ours.batch_select_indices(torch.arange(0, rows, 2)), theirs.batch_select_indices(torch.arange(0, rows, 2))
        else:
            k, v = torch.randn(2, rows, 2, {"one": 1}.get(step, 3), 4, generator=draw)
            ours.update(k, v), theirs.update(k, v, 0)
        rows = len(ours.keys)
        assert torch.equal(ours.keys, theirs.layers[0].keys) and torch.equal(ours.values, theirs.layers[0].values)
        assert ours.get_seq_length() == theirs.get_seq_length()


def test_perplexity_is_that_of_a_plain_pass(real):
    prompt = real.prompt(study(2))
    reports = [[5, 9, 11, 2], [7], [30, 31, 32, 33, 34, 35, 36]]
    for ids, got in zip(reports, perplexities(real, prompt, reports, rows=2), strict=True):
        inputs = real.collate([prompt])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([ids], device=real.device)], 1)
        every = torch.ones_like(inputs["input_ids"])
        inputs |= {"attention_mask": every, "position_ids": every.cumsum(1) - 1}
        with torch.no_grad(): logp = real.model(**inputs).logits[0, -len(ids) - 1:-1].log_softmax(-1).cpu()
        assert got == pytest.approx(float((-logp.gather(1, torch.tensor(ids)[:, None]).mean()).exp()), rel=1e-3)
    assert len(buffered_cache(real, 5).layers) == real.n_layers


# ---------------------------------------------------------------- a prompt that rows share
@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.sampled_from([(1, 1), (2, 1), (2, 3)]), st.integers(1, 7), st.integers(1, 4), st.integers(0, 1000))
def test_attention_to_a_shared_prompt_is_torchs_attention_to_a_repeated_one(rows, heads, prompt, own, seed):
    """Also where several heads share keys (grouped-query attention)."""
    groups, each = heads
    draw = torch.Generator().manual_seed(seed)
    shared = [torch.randn(1, groups, prompt, 8, generator=draw) for _ in range(2)]
    written = [torch.randn(rows, groups, own, 8, generator=draw) for _ in range(2)]
    asked = torch.randn(rows, groups * each, 1, 8, generator=draw)
    whole = [torch.cat([s.expand(rows, -1, -1, -1), w], 2).repeat_interleave(each, 1) for s, w in zip(shared, written, strict=True)]
    written[0].prompt = tuple(shared)
    for scale in (None, 0.3):
        found, _ = attend_shared(None, asked, *written, None, scaling=scale)
        assert torch.allclose(found, torch.nn.functional.scaled_dot_product_attention(asked, *whole, scale=scale).transpose(1, 2), atol=1e-5)


def test_layers_up_to_the_changed_one_hold_the_prompt_once(subject, prompt, monkeypatch):
    """And the reports are those of rows with a prompt of their own, with rows that leave and rows that are there from a sentence on."""
    made = []
    def watched(*args):
        made.append(buffered_cache(*args))
        return made[-1]
    monkeypatch.setattr("saerad.steering.interventions.buffered_cache", watched)
    rows = [adding(torch.randn(1, 256, generator=torch.Generator().manual_seed(i)) * i, from_sentence=i % 2) for i in range(6)]
    shared = write_steered(subject, prompt, rows, 2, 30, perplexity=False)
    assert [type(layer) is SharedPromptLayer for layer in made[0].layers] == [True] * 3 + [False] * (subject.n_layers - 3)
    assert len(made[0].layers[0].prompt[0]) == 1 and made[0].get_seq_length() > len(prompt)
    assert made[0].layers[0]._buffers[0].shape[-2] == 30        # no room for a prompt in every row
    assert not subject.model.config.get_text_config()._attn_implementation.startswith("saerad")
    monkeypatch.setattr("saerad.steering.interventions.can_share", lambda subject: False)
    assert [w.ids for w in write_steered(subject, prompt, rows, 2, 30, perplexity=False)] == [w.ids for w in shared]


def test_only_what_is_known_to_be_right_is_shared(subject):
    assert can_share(subject)
    other = random_mini(0)
    other.model.set_attn_implementation("eager")
    assert not can_share(other)
    with sharing(other): assert other.model.config.get_text_config()._attn_implementation == "eager"
