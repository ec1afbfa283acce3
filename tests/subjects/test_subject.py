"""Prompts, token origins, generation and loading of subject models, on real networks that are small."""
import copy
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from torch.nn import functional as F
from transformers import (
    BitImageProcessorPil,
    BloomConfig,
    CLIPVisionConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from saerad.activations.extraction import ExtractionConfig, prepare_study
from saerad.core import UserError, rng
from saerad.steering.interventions import adding, write_steered
from saerad.studies.record import Study, View
from saerad.subjects.maira2 import OLD_PARTS, OLD_PREFIXES, Maira2Config, Maira2ForConditionalGeneration, load_maira2, load_strictly, new_name
from saerad.subjects.subject import (
    MEAN,
    STD,
    SubjectConfig,
    chat_subject,
    context_of,
    follow_images,
    layers_path,
    open_subject,
    plain_subject,
    prepare_image,
    random_mini,
    train_tokenizer,
    whole_letters,
)

DATA = Path(os.environ.get("SAERAD_DATA", Path(__file__).parents[3] / "shared" / "data"))
WORDS = ["Findings:", "Indication:", "Technique:", "Comparison:", "Prior report:", "Frontal:", "N/A", "fever", "oedème", "≥ 2 cm", "no", "No", "the",
         "heart", "\n", "effusion.", "INDICATION:", "10%"]


def picture(seed, height=112, width=112):
    return View(f"picture-{seed}", lambda: rng(seed, "picture").integers(0, 256, (height, width)).astype(np.uint8))


def study(seed=0, prior=False, lateral=False, **sections):
    said = {"findings": "The heart is large. Indication: none."}
    before = Study(f"before-{seed}", "p", "train", said, {"frontal": picture(900 + seed)}) if prior else None
    views = {"frontal": picture(seed)} | ({"lateral": picture(500 + seed)} if lateral else {})
    return Study(f"study-{seed}", "p", "train", sections or {"indication": "fever", "findings": "No effusion."}, views, prior=before)


@pytest.fixture(scope="module")
def mini():
    return random_mini(0)


def check_origins(subject, prompt, sections):
    """Every character of every section that is not white space belongs to exactly that section, in order."""
    texts = subject.texts(prompt)
    for name, text in sections.items():
        at = np.flatnonzero(prompt.section == name)
        covered = np.zeros(len(text), bool)
        for i in at:
            own = text[prompt.start[i]:prompt.end[i]]
            if texts[i]: assert own.strip() == texts[i].strip()     # of a letter in bytes only the last has a text
            covered[prompt.start[i]:prompt.end[i]] = True
        assert all(c or t.isspace() for c, t in zip(covered, text, strict=True)), (name, text)
        assert (np.diff(prompt.start[at]) >= 0).all() and (np.diff(at) == 1).all()
    assert set(prompt.section) == {"boilerplate", *(["image"] if prompt.views else []), *sections}
    outside = np.isin(prompt.section, ("image", "boilerplate"))
    assert (prompt.start[outside] == -1).all() and (prompt.end[outside] == -1).all()
    assert ((prompt.row >= 0) == (prompt.section == "image")).all() and ((prompt.view != "") == (prompt.section == "image")).all()


# ---------------------------------------------------------------- prompts
@pytest.mark.parametrize("seed", range(12))
def test_origins_when_sections_hold_each_others_words(mini, seed):
    draw = rng(seed, "words")
    sections = {name: " ".join(draw.choice(WORDS, draw.integers(1, 9))).strip() or "x" for name in ("indication", "technique", "comparison")}
    report = " ".join(draw.choice(WORDS, 12)).strip()
    one = study(seed, prior=seed % 2 == 0, **sections)
    prompt = mini.prompt(one, report)
    wanted = sections | {"findings": report} | ({"prior_report": one.prior_report} if one.prior else {})
    check_origins(mini, prompt, wanted)
    assert "".join(mini.texts(prompt)) == mini.tokenizer.decode(prompt.ids)


def test_the_asking_prompt_is_the_beginning_of_the_teaching_one(mini):
    asked, taught = mini.prompt(study()), mini.prompt(study(), "No effusion.")
    assert torch.equal(asked.ids, taught.ids[:len(asked)])
    assert taught.ids[-1] == mini.tokenizer.eos_token_id and taught.section[-1] == "boilerplate"
    assert "findings" not in asked.section


def test_images_keep_view_and_place(mini):
    one = study(3, prior=True, lateral=True)
    prompt = mini.prompt(one, "No effusion.")
    assert prompt.views == ("frontal", "lateral", "prior") == tuple(dict.fromkeys(v for v in prompt.view if v))
    for view in prompt.views:
        at = prompt.view == view
        assert np.array_equal(prompt.row[at], np.repeat(np.arange(8), 8)) and np.array_equal(prompt.col[at], np.tile(np.arange(8), 8))
    for pixels, source in zip(prompt.pixels, (one.views["frontal"], one.views["lateral"], one.prior.views["frontal"]), strict=True):
        assert torch.equal(pixels, prepare_image(source.array(), 112, 1))


def test_a_section_that_spells_a_special_token_is_refused(mini):
    for bad in ("<image>", "</s>"):
        with pytest.raises(UserError, match="study-0 contains the model's special token"): mini.prompt(study(indication=f"fever {bad}"))


def test_a_study_without_a_frontal_view_is_refused(mini):
    with pytest.raises(UserError, match="no frontal view"): mini.prompt(Study("s", "p", "train", {}, {}))


def test_pictures_are_prepared_as_maira2_prepares_them():
    grey = (rng(0, "grey").random((301, 200)) * 120 + 40).astype(np.uint8)
    stretched = ((grey.astype(float) - grey.min()) / (grey.max() - grey.min()) * 255).astype(np.uint8)
    theirs = BitImageProcessorPil(size={"shortest_edge": 112}, crop_size={"height": 112, "width": 112}, image_mean=[MEAN] * 3, image_std=[STD] * 3)
    rgb = np.repeat(stretched[:, :, None], 3, 2)
    wanted = theirs(Image.fromarray(rgb), return_tensors="pt")["pixel_values"][0]
    assert torch.allclose(prepare_image(grey, 112, 3), wanted, atol=1e-5)
    assert torch.isfinite(prepare_image(np.full((50, 50), 7, np.uint8), 112)).all()


# ---------------------------------------------------------------- batches and generation
def test_padding_on_either_side_changes_nothing(mini):
    prompts = [mini.prompt(study(i, prior=i == 1), "No effusion. " * (i + 1)) for i in range(3)]
    alone = [mini.model(**mini.collate([p])).logits[0, -1] for p in prompts]
    for side in ("right", "left"):
        logits = mini.model(**mini.collate(prompts, side)).logits
        for i, p in enumerate(prompts):
            assert torch.allclose(logits[i, len(p) - 1 if side == "right" else -1], alone[i], atol=1e-4)
    left, right = (mini.loss(mini.model(**mini.collate(prompts, side)).logits, prompts, side) for side in ("left", "right"))
    assert torch.allclose(left, right, atol=1e-4) and len(left) == sum((p.section == "findings").sum() for p in prompts)


def test_loss_is_the_cross_entropy_of_findings(mini):
    prompt = mini.prompt(study(), "No effusion.")
    logp = mini.model(**mini.collate([prompt])).logits[0].log_softmax(-1)
    wanted = [-logp[i - 1, prompt.ids[i]] for i in np.flatnonzero(prompt.section == "findings")]
    assert torch.allclose(mini.loss(mini.model(**mini.collate([prompt])).logits, [prompt]), torch.stack(wanted), atol=1e-5)


def test_nnsight_reads_what_a_plain_hook_reads(mini):
    batch = mini.collate([mini.prompt(study(i), "No effusion.") for i in range(2)])
    seen = []
    handle = mini.model.model.language_model.layers[3].register_forward_hook(lambda m, i, out: seen.append(out))
    mini.model(**batch)
    handle.remove()
    hook = mini.layer(3)
    with mini.lm.trace(batch) as tracer:
        stream = hook.output.save()
        tracer.stop()
    assert torch.equal(stream, seen[0])


def test_generation_in_batches_equals_one_at_a_time_and_a_plain_hook(mini):
    prompts = [mini.prompt(study(i, prior=i % 2 == 0)) for i in range(5)]
    add = torch.randn(5, mini.d_model, generator=torch.Generator().manual_seed(0)) * 4
    assert mini.generate(prompts, 8, batch_size=3) == [mini.generate([p], 8)[0] for p in prompts]
    together = mini.generate(prompts, 8, layer=4, add=add, batch_size=3)
    for i, prompt in enumerate(prompts):
        handle = mini.model.model.language_model.layers[4].register_forward_hook(lambda m, x, out, i=i: out + add[i])
        assert mini.generate([prompt], 8)[0] == together[i]
        handle.remove()
    assert together != mini.generate(prompts, 8)


def test_a_zero_vector_changes_nothing_and_reports_end_at_eos(mini):
    prompts = [mini.prompt(study(i)) for i in range(4)]
    long = mini.generate_ids(mini.collate(prompts, "left"), 10)
    own = random_mini(0)
    own.model.generation_config.eos_token_id = sorted({int(row[3]) for row in long} | {int(long[0, 0])})
    short, pushed = own.generate(prompts, 10), own.generate(prompts, 10, layer=2, add=torch.zeros(4, own.d_model))
    assert short == pushed
    ids = own.generate_ids(own.collate(prompts, "left"), 10, 2, torch.zeros(4, own.d_model))
    assert ids.shape[1] <= 4 and (ids[0, 1:] == own.tokenizer.pad_token_id).all()


WISHES = {"num_beams": 3, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "min_new_tokens": 6, "do_sample": True, "temperature": 0.3,
          "top_k": 5, "suppress_tokens": [5, 6], "begin_suppress_tokens": [4], "bad_words_ids": [[8]], "length_penalty": 2.0, "max_length": 5,
          "exponential_decay_length_penalty": [2, 1.5], "forced_eos_token_id": 1, "use_cache": False}


def likeliest(subject, prompt, steps, layer=None, add=None):
    """Greedy ids without a cache and without transformers' own writing, up to the token that ends a report."""
    ids, out, seen = prompt.ids[None], [], {} if prompt.pixels is None else {"pixel_values": prompt.pixels}
    layers = subject.model.get_submodule(layers_path(subject.model))
    handle = layers[layer].register_forward_hook(lambda m, x, h: h + add) if layer is not None else None
    while len(out) < steps and out[-1:] != [subject.tokenizer.eos_token_id]:
        out.append(int(subject.model(input_ids=ids, attention_mask=torch.ones_like(ids), **seen).logits[0, -1].argmax()))
        ids = torch.cat([ids, torch.tensor([[out[-1]]])], 1)
    if handle: handle.remove()
    return subject.tokenizer.decode(out, skip_special_tokens=True).strip()


def tiny_llama(tokenizer):
    ids = dict(zip(("bos_token_id", "eos_token_id", "pad_token_id"), (0, 1, 2), strict=True))
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
                                        max_position_embeddings=1024, **ids))


@pytest.mark.parametrize("make", ["mini", "llama"])
def test_greedy_is_greedy_whatever_the_checkpoint_wishes(mini, tmp_path, make):
    """Baseline and steered reports, written by transformers or by our loop, are the likeliest tokens, though the checkpoint wishes otherwise."""
    model = mini.model if make == "mini" else tiny_llama(mini.tokenizer)
    model.save_pretrained(tmp_path)
    mini.tokenizer.save_pretrained(tmp_path)
    plain = open_subject(SubjectConfig(model=str(tmp_path), device="cpu"))
    path = tmp_path / "generation_config.json"
    ends = plain.tokenizer.eos_token_id
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | WISHES | {"eos_token_id": [ends, 9]}), encoding="utf-8")
    wishing = open_subject(SubjectConfig(model=str(tmp_path), device="cpu"))
    add = torch.randn(1, plain.d_model, generator=torch.Generator().manual_seed(1)) * 4
    for prompt in [plain.prompt(study(i)) for i in range(2)]:
        assert wishing.generate([prompt], 8) == [likeliest(plain, prompt, 8)]
        for vector in (torch.zeros_like(add), add):
            text = likeliest(plain, prompt, 8, 2, vector)
            assert wishing.generate([prompt], 8, layer=2, add=vector) == [text]
            assert [r.text for r in write_steered(wishing, prompt, [adding(vector)], 2, 8)] == [text]
    assert wishing.model.generation_config.eos_token_id == [ends, 9], "what ends a report is the checkpoint's to say"


def test_a_prompt_longer_than_the_model_reads_names_the_study_and_both_lengths(mini):
    long = study(indication="fever " * 900)
    with pytest.raises(UserError, match=r"study study-0 needs (\d{4}) tokens, but random mini 0 reads 1024 at once"): mini.prompt(long)
    prompt = mini.prompt(study())
    room = mini.context - len(prompt)
    with pytest.raises(UserError, match=rf"study study-0 needs {len(prompt)} tokens and a report up to {room + 1} .subject.max_report_tokens."):
        mini.generate([prompt], room + 1)
    with pytest.raises(UserError, match="study-0 needs"):
        write_steered(mini, prompt, [adding(torch.zeros(1, mini.d_model))], 4, room + 1)
    with pytest.raises(UserError, match="study study-0 needs"): mini.prompt(study(), "No effusion. " * room)
    assert len(mini.prompt(study(), "x " * 100)) < 1024


def test_a_study_without_room_for_a_report_is_a_problem_of_the_study(mini):
    tight = plain_subject(mini.model, mini.tokenizer, "tight", max_report_tokens=mini.context - 1)
    written, given = (prepare_study(tight, study(), report, ExtractionConfig()) for report in (None, "Clear."))
    assert "study-0 needs" in written.problem and written.prompt is None and not given.problem


@pytest.mark.parametrize("rope, context", [
    (None, 1024), ({"rope_type": "linear", "factor": 1.5}, 1536), ({"rope_type": "dynamic", "factor": 2.0}, 2048),
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
    ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 128}, 1024)])
def test_the_context_of_stretched_positions(mini, rope, context):
    config = copy.deepcopy(mini.model.config)
    if rope: config.text_config.rope_parameters = rope | {"rope_theta": 10000.0}
    assert context_of(config) == context


def test_the_context_of_other_makes():
    assert context_of(GPT2Config(n_positions=64)) == 64 and context_of(BloomConfig()) is None


@pytest.mark.parametrize("text", ["Größe 3 µm – naïve, 5°", "é", "ü" * 5, "日本語 🫁 x", "plain"])
def test_a_letter_in_bytes_is_shown_as_the_letter(mini, text):
    prompt = mini.prompt(study(indication=text))
    texts = [t for t, name in zip(mini.texts(prompt), prompt.section, strict=True) if name == "indication"]
    assert "".join(texts).strip() == text and "�" not in "".join(texts)
    known = {}
    assert mini.texts(prompt, known) == mini.texts(prompt, known) == mini.texts(prompt), "what is remembered of a byte is not the letter"
    assert [t for t in texts if t.strip() and not t.isascii()] == [c for c in text if not c.isascii()] or "–" in text


def test_a_byte_that_belongs_to_no_letter_stays_what_it_is(mini):
    byte = mini.tokenizer.convert_tokens_to_ids("Ã")
    assert whole_letters(["a", "�", "b"], lambda a, b: mini.text_of([byte, mini.tokenizer.convert_tokens_to_ids("b")][:b - a])) == ["a", "�", "b"]


def test_a_layer_that_does_not_exist(mini):
    for i in (8, -1, 99):
        with pytest.raises(UserError, match=f"layer {i} does not exist: random mini 0 has 8 layers, 0 to 7"): mini.layer(i)


def test_hash_follows_the_weights(mini):
    assert random_mini(0).hash == mini.hash != random_mini(1).hash
    other = random_mini(0)
    other.model.lm_head.weight[0, 0] += 1
    assert plain_subject(other.model, other.tokenizer, "other").hash != mini.hash


def test_mini_fits_the_package(mini, tmp_path):
    assert sum(p.numel() for p in mini.model.parameters()) <= 12e6
    tokenizer = train_tokenizer([f"word{i} " * 3 for i in range(900)])
    assert len(tokenizer) == 1024 and tokenizer.convert_tokens_to_ids(["<s>", "</s>", "<pad>", "<image>"]) == [0, 1, 2, 3]
    mini.model.to(torch.bfloat16).save_pretrained(tmp_path)
    mini.model.to(torch.float32)
    mini.tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size <= 25e6
    loaded = open_subject(SubjectConfig(model=str(tmp_path), device="cpu"))
    assert torch.equal(loaded.prompt(study(), "No effusion.").ids, mini.prompt(study(), "No effusion.").ids)
    assert loaded.model.dtype == torch.float32 and torch.equal(loaded.model.lm_head.weight, mini.model.lm_head.weight)
    assert loaded.hash != open_subject(SubjectConfig(model=str(tmp_path), dtype="bfloat16", device="cpu")).hash


# ---------------------------------------------------------------- MAIRA-2
PROCESSOR = '''
import numpy as np
from PIL import Image
from transformers import LlavaProcessor

class Maira2Processor(LlavaProcessor):
    """A stand-in with the entry point of MAIRA-2's own processor and wording of ours."""
    def format_reporting_input(self, current_frontal, current_lateral, prior_frontal, indication, technique, comparison, prior_report,
                               get_grounding=False, assistant_text=None):
        shown = [image for image in (current_frontal, current_lateral, prior_frontal) if image is not None]
        text = "USER: Frontal <image>" + (" Lateral <image>" if current_lateral else "") + (" Prior <image>" if prior_frontal else "")
        if prior_frontal: text += f" PRIOR_REPORT: {prior_report or 'N/A'}"
        text += f" INDICATION: {indication or 'N/A'} TECHNIQUE: {technique or 'N/A'} COMPARISON: {comparison or 'N/A'} ASSISTANT:"
        if assistant_text is not None: text += f" {assistant_text}</s>"
        return text, [Image.fromarray(self.stretch(np.asarray(image, dtype=float))) for image in shown]

    @staticmethod
    def stretch(image):
        return ((image - image.min()) / (image.max() - image.min()) * 255).astype(np.uint8)
'''


def old_name(name):
    for old, new in OLD_PARTS.items(): name = name.replace(new, old)
    return next((old + name.removeprefix(new) for old, new in OLD_PREFIXES.items() if name.startswith(new)), name)


@pytest.fixture(scope="module")
def old_checkpoint(tmp_path_factory):
    """A small MAIRA-2 in the layout of the published one: old names, shards with an index, a processor as code."""
    folder = tmp_path_factory.mktemp("maira2")
    tokenizer = train_tokenizer(["No effusion. The heart is large. fever"] * 30)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    config = {
        "model_type": "maira2", "architectures": ["Maira2ForConditionalGeneration"], "image_token_index": 3, "pad_token_id": 2, "hidden_size": 48,
        "projector_n_layers": 4, "projector_hidden_act": "gelu", "vision_feature_layer": -1, "vision_feature_select_strategy": "default",
        "torch_dtype": "float32",
        "text_config": {"model_type": "llama", "vocab_size": len(tokenizer), "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
                        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
                        "rope_scaling": {"factor": 1.5, "type": "linear"}, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2},
        "vision_config": {"model_type": "dinov2", "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 56,
                          "patch_size": 14, "num_channels": 3, "layer_norm_eps": 1e-6, "out_features": ["stage3"], "apply_layernorm": True,
                          "reshape_hidden_states": False}}
    torch.manual_seed(0)
    model = Maira2ForConditionalGeneration(Maira2Config.from_dict(json.loads(json.dumps(config))))
    weights = {old_name(k): torch.randn_like(v) * 0.2 + (1 if "norm" in k and k.endswith("weight") else 0) for k, v in model.state_dict().items()}
    names = sorted(weights)
    shards = {f"model-{i + 1:05}-of-00003.safetensors": names[i::3] for i in range(3)}
    for shard, own in shards.items(): save_file({k: weights[k] for k in own}, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {k: s for s, own in shards.items() for k in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tokenizer.save_pretrained(folder)
    (folder / "processing_maira2.py").write_text(PROCESSOR, encoding="utf-8")
    code = {"processor_class": "Maira2Processor", "auto_map": {"AutoProcessor": "processing_maira2.Maira2Processor"}}
    (folder / "processor_config.json").write_text(json.dumps(code | {"image_token": "<image>", "patch_size": 14,
                                                                     "vision_feature_select_strategy": "default"}), encoding="utf-8")
    (folder / "preprocessor_config.json").write_text(json.dumps(code | {
        "image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56},
        "image_mean": [MEAN] * 3, "image_std": [STD] * 3, "resample": 3, "do_convert_rgb": True}), encoding="utf-8")
    return folder


def heads(x, n): return x.reshape(len(x), n, -1).transpose(0, 1)


def plain_vision(w, pixels, n_layers=3, n_heads=2, patch=14):
    """DINOv2 from its definition: [channels, height, width] -> layer-normed patches, without CLS."""
    w = {k.removeprefix("vision_tower."): v for k, v in w.items() if k.startswith("vision_tower.")}
    squares = F.unfold(pixels[None], patch, stride=patch)[0].T
    x = squares @ w["embeddings.patch_embeddings.projection.weight"].flatten(1).T + w["embeddings.patch_embeddings.projection.bias"]
    x = torch.cat([w["embeddings.cls_token"][0], x]) + w["embeddings.position_embeddings"][0]
    def linear(x, name): return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]
    def norm(x, name): return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)
    for i in range(n_layers):
        at = f"encoder.layer.{i}"
        h = norm(x, f"{at}.norm1")
        q, k, v = (heads(linear(h, f"{at}.attention.attention.{n}"), n_heads) for n in ("query", "key", "value"))
        mixed = ((q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = x + w[f"{at}.layer_scale1.lambda1"] * linear(mixed, f"{at}.attention.output.dense")
        x = x + w[f"{at}.layer_scale2.lambda1"] * linear(F.gelu(linear(norm(x, f"{at}.norm2"), f"{at}.mlp.fc1")), f"{at}.mlp.fc2")
    return norm(x, "layernorm")[1:]


def plain_maira2(w, ids, images, n_layers=3, n_heads=4, factor=1.5):
    """Last-token logits from the definition of the network: ids with image tokens, pictures in order."""
    x = w["language_model.model.embed_tokens.weight"][ids].clone()
    patches = []
    for pixels in images:
        h = plain_vision(w, pixels)
        for i in (0, 2, 4, 6):
            h = h @ w[f"multi_modal_projector.layers.{i}.weight"].T + w[f"multi_modal_projector.layers.{i}.bias"]
            if i < 6: h = F.gelu(h)
        patches.append(h)
    x[ids == 3] = torch.cat(patches)
    def norm(x, name): return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w[name]
    size = x.shape[1] // n_heads
    angle = (torch.arange(len(x)) / factor)[:, None] / 10000 ** (torch.arange(0, size, 2) / size)
    cos, sin = torch.cat([angle.cos()] * 2, 1), torch.cat([angle.sin()] * 2, 1)
    def turn(x): return x * cos + torch.cat([-x[..., size // 2:], x[..., :size // 2]], -1) * sin
    ahead = torch.full((len(x), len(x)), -torch.inf).triu(1)
    for i in range(n_layers):
        at = f"language_model.model.layers.{i}"
        h = norm(x, f"{at}.input_layernorm.weight")
        q, k, v = (heads(h @ w[f"{at}.self_attn.{n}_proj.weight"].T, n_heads) for n in "qkv")
        mixed = ((turn(q) @ turn(k).transpose(1, 2) / size ** 0.5 + ahead).softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = x + mixed @ w[f"{at}.self_attn.o_proj.weight"].T
        h = norm(x, f"{at}.post_attention_layernorm.weight")
        x = x + (F.silu(h @ w[f"{at}.mlp.gate_proj.weight"].T) * (h @ w[f"{at}.mlp.up_proj.weight"].T)) @ w[f"{at}.mlp.down_proj.weight"].T
    return norm(x, "language_model.model.norm.weight")[-1] @ w["language_model.lm_head.weight"].T


def weights_of(folder):
    return {k: v for shard in sorted(folder.glob("*.safetensors")) for k, v in load_file(shard).items()}


@pytest.fixture(scope="module")
def maira(old_checkpoint):
    return open_subject(SubjectConfig(model=str(old_checkpoint), trust_remote_code=True, device="cpu"))


@pytest.mark.parametrize("prior,lateral", [(False, False), (False, True), (True, True)])
def test_maira2_equals_a_plain_computation_of_the_same_network(maira, old_checkpoint, prior, lateral):
    prompt = maira.prompt(study(5, prior=prior, lateral=lateral), "The heart is large.")
    wanted = plain_maira2(weights_of(old_checkpoint), prompt.ids, prompt.pixels)
    logits = maira.model(**maira.collate([prompt])).logits[0, -1]
    assert wanted.abs().max() > 1 and torch.allclose(logits, wanted, atol=1e-4)
    both = maira.collate([prompt, maira.prompt(study(6), "No effusion. The heart is large. No effusion.")], "left")
    assert torch.allclose(maira.model(**both).logits[0, -1], wanted, atol=1e-4)
    if lateral:  # the order matters, or the test above shows nothing
        swapped = plain_maira2(weights_of(old_checkpoint), prompt.ids, prompt.pixels.flip(0))
        assert not torch.allclose(logits, swapped, atol=1e-2)


def test_maira2_takes_the_feature_maps_and_drops_the_class_token(maira, old_checkpoint):
    pixels = maira.prompt(study(1)).pixels
    features = maira.model.get_image_features(pixels)
    assert torch.allclose(features.last_hidden_state[0], plain_vision(weights_of(old_checkpoint), pixels[0]), atol=1e-4)
    assert [tuple(f.shape) for f in features.pooler_output] == [(16, 48)]
    hidden = maira.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
    assert not torch.allclose(features.last_hidden_state, hidden, atol=1e-2)


def test_maira2_prompts_are_the_processors_own(maira):
    one = study(2, prior=True, lateral=True, indication="TECHNIQUE: no", technique="COMPARISON: N/A INDICATION", comparison="ASSISTANT: The heart")
    prompt = maira.prompt(one, "PRIOR_REPORT: The heart is large.")
    wanted = {k: one.sections[k] for k in ("indication", "technique", "comparison")}
    check_origins(maira, prompt, wanted | {"findings": "PRIOR_REPORT: The heart is large.", "prior_report": one.prior_report})
    assert prompt.views == ("frontal", "lateral", "prior") and (prompt.view == "prior").sum() == 16
    text = maira.tokenizer.decode(prompt.ids).replace("<image>" * 16, "<image>")
    assert text.startswith("<s>USER: Frontal <image> Lateral <image> Prior <image> PRIOR_REPORT: The heart") and text.endswith("large.</s>")
    for pixels, source in zip(prompt.pixels, (one.views["frontal"], one.views["lateral"], one.prior.views["frontal"]), strict=True):
        assert torch.allclose(pixels, prepare_image(source.array(), 56), atol=1e-5)
    assert maira.generate([prompt, maira.prompt(study(1))], 4, layer=1, add=torch.zeros(2, 48)) == maira.generate([prompt, maira.prompt(study(1))], 4)


def test_maira2_at_full_size_has_the_522_tensors_of_the_checkpoint():
    config = Maira2Config(
        vision_config={"model_type": "dinov2", "image_size": 518, "out_features": ["stage12"]},
        text_config={"model_type": "llama", "vocab_size": 32207, "rope_scaling": {"factor": 1.5, "type": "linear"}})
    with torch.device("meta"): model = Maira2ForConditionalGeneration(config)
    own = {new_name(name) for name in model.state_dict()}       # some versions of transformers have the old names in DINOv2
    names = [old_name(name) for name in own]
    assert {"vision_tower.encoder.layer.11.attention.attention.query.weight", "vision_tower.encoder.layer.0.attention.output.dense.bias",
            "language_model.model.layers.31.mlp.gate_proj.weight", "multi_modal_projector.layers.6.bias",
            "language_model.lm_head.weight"} < set(names)
    assert len(names) == 522 and {new_name(n) for n in names} == own and not any(n.startswith("model.") for n in names)


def test_code_of_a_checkpoint_runs_only_when_allowed(old_checkpoint):
    with pytest.raises(UserError, match="trust_remote_code"): open_subject(SubjectConfig(model=str(old_checkpoint)))


def copy_of(folder, to):
    to.mkdir()
    for file in folder.iterdir():
        if file.is_file(): (to / file.name).write_bytes(file.read_bytes())
    return to


def test_damaged_checkpoints_are_named(old_checkpoint, tmp_path):
    shard = "model-00002-of-00003.safetensors"
    def damaged(name, change):
        folder = copy_of(old_checkpoint, tmp_path / name)
        weights = load_file(folder / shard)
        change(folder, weights)
        with pytest.raises(UserError) as e: load_maira2(folder)
        return str(e.value)
    key = sorted(load_file(old_checkpoint / shard))[0]
    def rewrite(folder, weights): save_file(weights, folder / shard)
    assert f"no tensor {new_name(key)}" in damaged("missing", lambda f, w: rewrite(f, {k: v for k, v in w.items() if k != key}))
    assert "holds model.vision_tower.more" in damaged("surplus", lambda f, w: rewrite(f, w | {"vision_tower.more": torch.ones(1)}))
    assert "has shape (1,)" in damaged("shape", lambda f, w: rewrite(f, w | {key: torch.ones(1)}))
    assert f"{shard} is missing" in damaged("shard", lambda f, w: (f / shard).unlink())
    assert "not a whole safetensors file" in damaged("cut", lambda f, w: (f / shard).write_bytes((f / shard).read_bytes()[:-100]))
    odd = json.dumps({"text_config": {"model_type": "llama", "hidden_size": 7}})
    assert "does not describe" in damaged("config", lambda f, w: (f / "config.json").write_text(odd, encoding="utf-8"))


def test_either_layout_loads_to_the_same_weights(old_checkpoint, tmp_path):
    old = load_maira2(old_checkpoint)
    old.save_pretrained(tmp_path)
    new = load_maira2(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(old.state_dict().values(), new.state_dict().values(), strict=True))
    fresh = Maira2ForConditionalGeneration(old.config)
    load_strictly(fresh, old_checkpoint)
    assert torch.equal(fresh.lm_head.weight, old.lm_head.weight)


# ---------------------------------------------------------------- other checkpoints
TEMPLATE = ("{% for m in messages %}{{ m['role'] | upper }}: {% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}"
            "{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}\n{% endfor %}"
            "{% if add_generation_prompt %}ASSISTANT: {% endif %}")


def test_a_llava_from_a_folder(tmp_path):
    tokenizer = train_tokenizer(["No effusion. The heart is large. fever"] * 30)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28,
                                       patch_size=14),
        text_config=LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2),
        image_token_index=3))
    images = BitImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, do_convert_rgb=True)
    processor = LlavaProcessor(images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
                               chat_template=TEMPLATE)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    subject = open_subject(SubjectConfig(model=str(tmp_path), device="cpu"))
    one = study(4, prior=True, indication="Findings: heart", comparison="fever fever")
    prompt = subject.prompt(one, "No effusion.")
    check_origins(subject, prompt, one.sections | {"prior_report": one.prior_report, "findings": "No effusion."})
    assert prompt.views == ("frontal", "prior") and (prompt.section == "image").sum() == 8 and prompt.row.max() == prompt.col.max() == 1
    assert len(subject.generate([prompt, subject.prompt(study(1))], 3, layer=1, add=torch.zeros(2, 32))) == 2
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop(sorted(weights)[0])
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="no tensor"): open_subject(SubjectConfig(model=str(tmp_path)))


def test_a_text_model_with_a_chat_template(mini):
    tokenizer = train_tokenizer(["No effusion. The heart is large. fever"] * 30)
    tokenizer.chat_template = TEMPLATE
    model = transformers.LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2,
                                                      num_attention_heads=2))
    subject = chat_subject(model, tokenizer, "chat")
    one = study(4, prior=True, indication="Findings: USER: heart", technique="AP")
    prompt = subject.prompt(one, "No effusion.")
    check_origins(subject, prompt, one.sections | {"prior_report": one.prior_report, "findings": "No effusion."})
    assert prompt.pixels is None and tokenizer.decode(subject.prompt(one).ids).endswith("ASSISTANT: ")
    tokenizer.chat_template = "{{ messages[0]['content'] | upper | truncate(20) }}"
    with pytest.raises(UserError, match="prompt template"): subject.prompt(one)


@pytest.mark.parametrize("make", ["gpt2", "bloom"])
def test_layers_are_found_where_another_make_keeps_them(make, tmp_path):
    tokenizer = train_tokenizer(["No effusion. The heart is large. fever"] * 30)
    kind = {"gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel), "bloom": (transformers.BloomConfig, transformers.BloomForCausalLM)}[make]
    size = {"n_embd": 32} if make == "gpt2" else {"hidden_size": 32}
    torch.manual_seed(0)
    kind[1](kind[0](vocab_size=len(tokenizer), n_layer=3, n_head=2, bos_token_id=0, eos_token_id=1, **size)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    if make == "bloom":
        with pytest.raises(UserError, match="return more than the residual stream"): open_subject(SubjectConfig(model=str(tmp_path)))
        return
    subject = open_subject(SubjectConfig(model=str(tmp_path), device="cpu"))
    prompts = [subject.prompt(study(i, indication="heart " * i + "fever")) for i in range(3)]
    add = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)) * 3
    assert subject.generate(prompts, 6, layer=1, add=add) == [subject.generate([p], 6, layer=1, add=add[i:i + 1])[0] for i, p in enumerate(prompts)]


def test_a_processor_that_cannot_be_followed_is_not_guessed_at():
    section = np.array(["boilerplate", "boilerplate", "indication", "boilerplate", "findings"])
    ours = {"ids": np.array([7, 3, 8, 3, 9]), "section": section, "start": np.array([-1, -1, 0, -1, 0]), "end": np.array([-1, -1, 4, -1, 3])}
    grown = follow_images(ours, np.array([7, 50, 3, 3, 51, 8, 3, 50, 3, 9]), 3, [3], ["frontal", "prior"])
    assert grown["view"].tolist() == ["", "", "frontal", "frontal", "", "", "prior", "", "prior", ""]
    assert grown["section"][5] == "indication" and grown["section"][9] == "findings" and grown["end"].tolist() == [-1] * 5 + [4] + [-1] * 3 + [3]
    for other in ([7, 3, 3, 8, 3, 10], [6, 3, 8, 3, 9], [7, 3, 3, 9], [7, 3, 5, 3, 9]):
        assert follow_images(ours, np.array(other), 3, [3], ["frontal", "prior"]) is None
    assert follow_images(ours, ours["ids"], 3, [3], ["frontal"]) is None


@pytest.mark.skipif(not (DATA / "stories260k").exists(), reason="the pretrained stories260k checkpoint is not on this machine")
def test_a_pretrained_decoder_that_nobody_here_trained():
    subject = open_subject(SubjectConfig(model=str(DATA / "stories260k" / "hf"), device="cpu"))
    one = study(1, prior=True, indication="Findings: fever", technique="Prior report: AP", findings="No effusion.")
    prompt = subject.prompt(one, one.sections["findings"])
    check_origins(subject, prompt, dict(one.sections) | {"prior_report": one.prior_report})
    assert prompt.views == () and prompt.pixels is None and (subject.n_layers, subject.d_model) == (5, 64)
    prompts = [subject.prompt(study(i, indication="Once upon a time " * (i + 1))) for i in range(4)]
    add = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    assert subject.generate(prompts, 12, layer=2, add=add) == [subject.generate([p], 12, layer=2, add=add[i:i + 1])[0] for i, p in enumerate(prompts)]
    with pytest.raises(UserError, match="hf has 5 layers, 0 to 4"): subject.layer(5)


def test_models_that_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, message in [("nobody/nothing", "cannot be had from the hub"), ("no such folder", "cannot be had from the hub"),
                          (str(tmp_path), "without config.json"), ("trained", "trained in a run")]:
        with pytest.raises(UserError, match=message) as e: open_subject(SubjectConfig(model=name))
        assert "\n" not in str(e.value) and str(e.value).endswith(".")
    with pytest.raises(UserError, match="subject.revision"):
        open_subject(SubjectConfig(model="nobody/nothing", trust_remote_code=True, revision="main"))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    with pytest.raises(UserError, match="cannot be opened"): open_subject(SubjectConfig(model=str(tmp_path)))
