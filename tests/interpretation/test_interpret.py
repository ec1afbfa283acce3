"""Interpretation: the lexical sentence and its rule, scores against plain counting, and an endpoint with everything that goes wrong."""
import base64
import io
import json
import random
import socket
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, f1_score, precision_score, recall_score
from word_server import BatchServer, WordServer, completion
from word_world import MIXED, NEVER, WORDS, make_sae, make_store

from saerad.core import UserError, file_hash, read_table, write_json, write_table
from saerad.interpretation.endpoint import (
    CallFailed,
    Endpoint,
    EndpointConfig,
    Ledger,
    Pace,
    Reply,
    check_destination,
    host_of,
    is_loopback,
    key_of,
)
from saerad.interpretation.exemplars import Context, Example, Exemplars, ExemplarsConfig, collect_exemplars
from saerad.interpretation.hard_negatives import add_hard_negatives
from saerad.interpretation.interpret import (
    Explanation,
    InterpretationConfig,
    Lexical,
    at_prevalence,
    by_source,
    check_settings,
    checked_estimate,
    compare_explanations,
    description_names_truth,
    detect_prompt,
    estimate_cost,
    examination,
    explain_prompt,
    features_to_explain,
    interpret,
    interpretation_summary,
    named_files,
    names,
    planned_exemplars,
    protocol_of,
    read_explanations,
    repeated_explanations,
    score,
    view_images,
)
from saerad.interpretation.lexical import NO_RULE, Bits, Clause, find_rule, read_rule, rule_sentence, strongest, window, words
from saerad.interpretation.protocols import fuzz_items, protocol_files, protocol_names, read_protocol
from saerad.interpretation.replies import parse_list

OPEN, CLOSED = SimpleNamespace(may_leave=True), SimpleNamespace(may_leave=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("world")
    collect_exemplars(make_store(base / "store"), make_sae(), ExemplarsConfig(min_explain=5, min_score=5), 0, base / "exemplars")
    return base / "exemplars"


@pytest.fixture(scope="module")
def few(folder, tmp_path_factory):
    """The same tables with three features only, for the endpoint."""
    out = tmp_path_factory.mktemp("few")
    features = read_table(folder / "features.parquet").to_pandas()
    kept = [WORDS.index("effusion"), WORDS.index("normal"), MIXED, NEVER]
    features.loc[~features.feature.isin(kept), "status"] = "dead"
    about = read_table(folder / "features.parquet").schema.metadata
    write_table(out / "features.parquet", pa.Table.from_pandas(features, preserve_index=False).replace_schema_metadata(about))
    write_table(out / "exemplars.parquet", read_table(folder / "exemplars.parquet"))
    return out


@pytest.fixture(autouse=True)
def no_key(monkeypatch): monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def config(server=None, **changes):
    fields = {"interpreter": "openai", "model": "words", "base_url": server.url if server else "http://127.0.0.1:9/v1",
              "concurrency": 8, "requests_per_second": 1000.0, "bootstrap": 50, "timeout_s": 20.0, **changes}
    return InterpretationConfig(**fields)


# the sentence and its rule

@pytest.mark.parametrize("rule", [
    (), (Clause("a"),), (Clause("a"), Clause("b", near=True)), (Clause("small", "before", "effusion", place="findings"),),
    (Clause("x", "after", "y", without="no", place="prior report"), Clause("z", "after", "y", without="no", place="prior report")),
    (Clause(place="frontal image"),), (Clause(opens=True),), (Clause(place="technique", opens=True), Clause(";"), Clause(".", "before", ",")),
    (Clause("in"), Clause("before", "after", "without"), Clause("at the start"))])
def test_reading_the_sentence_gives_the_rule_back(rule):
    assert sorted(read_rule(rule_sentence(rule))) == sorted(rule)


@pytest.mark.parametrize("text", ["", "pleural effusion", "Lexical baseline: fires ", 'Lexical baseline: fires on "a"',
                                  'Lexical baseline: fires on "a" and "b".', 'Lexical baseline: fires on "a". More.'])
def test_other_sentences_are_no_rules(text):
    with pytest.raises(ValueError): read_rule(text)


def test_words_are_glued_and_cut():
    found, index = words([" Car", "dio", "meg", "aly", ",", " no", "\n", "P", "ICC", ".", " 2", ".", "5"])
    assert found == ["cardiomegaly", ",", "no", "picc", ".", "2", ".", "5"] or found[:5] == ["cardiomegaly", ",", "no", "picc", "."]
    assert index[:9] == [0, 0, 0, 0, 1, 2, -1, 3, 3]


def _contexts(texts, peak_word=None):
    made = []
    for i, text in enumerate(texts):
        tokens = tuple(f" {w}" for w in text.split())
        plain = dict(row=i, tokens=tokens, section="findings", view="", offset=3)
        if peak_word is None: made.append(Context(**plain))
        else:
            at = text.split().index(peak_word)
            made.append(Example(**plain, activations=tuple(float(j == at) for j in range(len(tokens))), peak=at))
    return made


def _f1(rule, active, silent):
    said = [any(c.holds(window(x)) for c in rule) for x in [*active, *silent]]
    return f1_score([True] * len(active) + [False] * len(silent), said)


def test_negation_is_found():
    sizes, sides = ("small", "large", "new", "stable"), ("left", "right", "basal", "apical")
    active = _contexts([f"{a} {b} effusion seen" for a in sizes for b in sides], "effusion")
    silent = _contexts([f"no {a} {b} effusion seen" for a in sizes for b in sides])
    rule = find_rule(active, silent, Bits(map(window, silent)), 0.1)
    assert _f1(rule, active, silent) == 1
    assert 'on "effusion" without "no" before it' in rule_sentence(rule)


def test_order_of_words_is_found():
    active = _contexts(["heart enlarged lungs normal ok", "fine heart enlarged lungs normal"] * 6, "enlarged")
    silent = _contexts(["lungs enlarged with normal heart", "normal heart and lungs enlarged"] * 6)
    assert _f1(find_rule(active, silent, Bits(map(window, silent)), 0.1), active, silent) == 1


def test_nothing_to_say_is_said():
    active = [e for i in range(16) for e in _contexts([f"a{i} b{i}"], f"a{i}")]
    silent = _contexts([f"c{i} d{i}" for i in range(16)])
    everywhere = [Clause(place="findings")]
    rule = find_rule(active, silent, Bits(map(window, silent)), 0.1)
    assert rule == () or list(rule) == everywhere and _f1(rule, active, silent) < 0.67
    assert rule_sentence(()) == NO_RULE and read_rule(NO_RULE) == ()


def test_prediction_uses_the_sentence_alone(folder):
    made = {f.feature: f for f in Exemplars(folder).contexts()}
    f = made[WORDS.index("effusion")]
    lexical = Lexical(f.silent)
    sentence = lexical.explain(f).text
    again = Lexical([]).detect(Explanation(-1, sentence), f.scoring, Counter())
    assert again == lexical.detect(Explanation(f.feature, sentence), f.scoring, Counter())
    assert np.mean(np.array(again) == f.truth) > 0.95


# scores

def test_scores_are_those_of_sklearn():
    draw = np.random.default_rng(0)
    truth, said = draw.random(300) < 0.4, draw.random(300) < 0.5
    s = score(truth, said.tolist(), draw)
    assert np.isclose(s.f1, f1_score(truth, said)) and np.isclose(s.precision, precision_score(truth, said))
    assert np.isclose(s.recall, recall_score(truth, said)) and np.isclose(s.balanced_accuracy, balanced_accuracy_score(truth, said))
    assert np.isclose(s.always_yes_f1, f1_score(truth, np.ones(300)))
    for name in ("precision", "recall", "f1", "balanced_accuracy"):
        assert getattr(s, f"{name}_low") < getattr(s, name) < getattr(s, f"{name}_high")


def test_bootstrap_intervals_cover():
    truth, hits = [True] * 100 + [False] * 100, Counter()
    known = {"f1": 2 * 0.7 / (0.7 + 0.2 + 1), "precision": 0.7 / 0.9, "recall": 0.7, "balanced_accuracy": 0.75}
    for i in range(200):
        draw = np.random.default_rng(i)
        said = [bool(draw.random() < (0.7 if t else 0.2)) for t in truth]
        s = score(truth, said, draw, 300)
        hits.update(name for name, value in known.items() if getattr(s, f"{name}_low") <= value <= getattr(s, f"{name}_high"))
    assert all(180 <= hits[name] <= 200 for name in known)


@pytest.mark.parametrize("n", [5, 20, 100])
def test_all_right_and_all_wrong_are_not_certain(n):
    truth, draw = [True] * n + [False] * n, np.random.default_rng(0)
    right, wrong = score(truth, truth, draw), score(truth, [not t for t in truth], draw)
    least = 0.025 ** (1 / n)
    for name in ("precision", "recall", "f1", "balanced_accuracy"):
        assert getattr(right, name) == getattr(right, f"{name}_high") == 1 and least <= getattr(right, f"{name}_low") < 1
        assert getattr(wrong, name) == getattr(wrong, f"{name}_low") == 0 and 0 < getattr(wrong, f"{name}_high") <= 1 - least
    assert right.recall_low == pytest.approx(least) and right.f1_low == pytest.approx(2 * least / (1 + least))
    silent = score(truth, [False] * (2 * n), draw)
    assert silent.recall_high == pytest.approx(1 - least) and silent.f1_high == pytest.approx(2 * (1 - least) / (2 - least))
    row, = by_source(truth, truth, [""] * n + ["random"] * n, draw)
    assert (row["f1"], row["f1_high"]) == (1, 1) and row["f1_low"] == pytest.approx(right.f1_low)


def test_the_bound_of_what_was_all_right_covers():
    truth, hits = [True] * 25 + [False] * 25, []
    for i in range(400):
        draw = np.random.default_rng(i)
        s = score(truth, [bool(draw.random() < (0.99 if t else 0.01)) for t in truth], draw, 200)
        if s.f1 == 1: hits.append(s.f1_low <= 0.99 and s.precision_low <= 0.99 and s.balanced_accuracy_low <= 0.99)
    assert len(hits) > 100 and all(hits)


def test_an_interval_of_no_width_is_the_only_one_that_changed():
    """The draws are the same with and without it, so every other number stays."""
    truth = [True] * 30 + [False] * 30
    some = score(truth, [True] * 28 + [False] * 32, np.random.default_rng(3))
    assert some.precision == 1 and some.precision_low < 1
    known = np.random.default_rng(3).multinomial(60, np.array([28, 0, 2, 30]) / 60, 1000)
    assert some.recall_low == pytest.approx(np.quantile(known[:, 0] / (known[:, 0] + known[:, 2]), 0.025))


def test_unanswered_contexts_are_left_out_not_counted_as_no():
    s = score([True, True, False, False], [True, None, False, None], np.random.default_rng(0))
    assert (s.contexts, s.f1, s.recall, s.balanced_accuracy) == (2, 1, 1, 1)


def test_nothing_answered_has_no_score():
    s = score([True, False], [None, None], np.random.default_rng(0))
    assert s.contexts == 0 and np.isnan([s.f1, s.f1_low, s.precision_high]).all()
    quiet = score([True, False], [False, False], np.random.default_rng(0))
    assert np.isnan([quiet.precision, quiet.precision_low]).all() and quiet.f1 == 0 == quiet.recall


# the stage with the baseline

@pytest.fixture(scope="module")
def lexical(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("lexical")
    return interpret(folder, InterpretationConfig(), 0, CLOSED, out), out


def test_every_feature_has_a_row_and_words_are_found(lexical):
    table, _ = lexical
    assert table.feature.tolist() == list(range(len(WORDS) + 3))
    scored = table[table.status == "scored"]
    assert scored.f1.median() > 0.95 and scored.shuffled_f1.median() < 0.6
    assert scored.explanation.str.startswith("Lexical baseline: ").all()
    assert (scored.f1_low <= scored.f1).all() and (scored.f1 <= scored.f1_high).all()
    assert "small" in table.explanation[MIXED] and "mild" in table.explanation[MIXED]
    assert set(table.negatives) == {"random"}


def test_unscored_features_have_a_reason_and_no_number(lexical):
    dead = lexical[0].loc[NEVER]
    assert (dead.status, dead.reason) == ("unscored", "dead") and np.isnan(dead.f1) and dead.scored_contexts == 0


def test_lexical_run_twice_has_the_same_bytes(folder, lexical, tmp_path):
    interpret(folder, InterpretationConfig(), 0, CLOSED, tmp_path)
    for name in ("interpretations.parquet", "ledger.sqlite"): assert file_hash(tmp_path / name) == file_hash(lexical[1] / name)


def test_summary_counts(lexical):
    table, _ = lexical
    s = interpretation_summary(table)
    scored = table[table.status == "scored"]
    assert (s["features"], s["scored"]) == (len(table), len(scored))
    assert s["f1_above_075"] == sum(f > 0.75 for f in scored.f1) and s["f1_below_05"] == sum(f < 0.5 for f in scored.f1)
    assert set(s) >= {"features", "scored", "f1_above_075", "f1_below_05", "median_f1", "shuffled_median_f1", "negatives",
                      "parse_failures", "frequency_f1_spearman"}
    assert s["unscored"] == table.reason[table.status == "unscored"].value_counts().to_dict()
    json.dumps(s, allow_nan=False)
    json.dumps(interpretation_summary(table[table.status == "unscored"]), allow_nan=False)


def test_description_names_truth():
    table = pd.DataFrame({"feature": [0, 1, 2, 3], "f1": [0.9, 0.9, 0.9, 0.5],
                          "explanation": ['fires on "effusion"', 'fires on "heart" without "pleural effusion" before it', "PICC line", "nodule"]})
    concepts = pd.DataFrame({"concept": ["effusion", "effusion", "picc", "nodule", "oedema"], "feature": [0, 1, 2, 3, 2],
                             "tracked": [True, True, True, True, False]})
    known = {n: SimpleNamespace(names=(n,)) for n in ("effusion", "picc", "nodule", "oedema")}
    assert description_names_truth(table, concepts, known) == pytest.approx(2 / 3)
    assert description_names_truth(table[table.f1 < 0.75], concepts, known) is None
    assert names("No pleural-effusion seen", ["pleural effusion"]) and not names("effusions", ["effusion"])


# where text may go

@pytest.mark.parametrize("url", ["http://localhost:1/v1", "http://127.8.9.1/v1", "http://[::1]:8/v1"])
def test_loopback_is_allowed(url): check_destination(EndpointConfig(base_url=url), may_leave=False)


@pytest.mark.parametrize("url", ["https://api.openai.com/v1", "http://localhost.evil.org/v1", "http://127.0.0.1.evil.org/v1", "http://0.0.0.0/v1",
                                 "http://10.0.0.1/v1"])
def test_elsewhere_is_refused_unless_named(url):
    with pytest.raises(UserError, match="may not leave"): check_destination(EndpointConfig(base_url=url), may_leave=False)
    check_destination(EndpointConfig(base_url=url), may_leave=True)
    check_destination(EndpointConfig(base_url=url, allow_text_to=(host_of(url),)), may_leave=False)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://localhost", "", "http://", "http://me:secret@localhost/v1", "http://[::1"])
def test_addresses_that_are_none(url):
    with pytest.raises(UserError, match="base_url") as e: host_of(url)
    assert "secret" not in str(e.value)


def test_hosts_are_compared_whole():
    assert is_loopback("localhost") and not is_loopback("localhost.example")
    with pytest.raises(UserError):
        check_destination(EndpointConfig(base_url="http://a.example.org/v1", allow_text_to=("example.org",)), may_leave=False)


def test_credentialed_text_sends_nothing(few, tmp_path):
    cfg = config(base_url="http://203.0.113.7/v1")
    with pytest.raises(UserError, match="may not leave the machine"): interpret(few, cfg, 0, CLOSED, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_proxy_is_not_used_for_loopback(few, tmp_path, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"): monkeypatch.setenv(name, "http://127.0.0.1:9")
    with WordServer() as server: interpret(few, config(server), 0, CLOSED, tmp_path)
    assert server.bodies


def test_a_redirect_is_not_followed(few, tmp_path):
    with WordServer() as other, WordServer(lambda n, b: (307, {"location": other.url + "/chat/completions"}, "")) as server:
        with pytest.raises(UserError, match="HTTP 307"): interpret(few, config(server), 0, CLOSED, tmp_path)
    assert not other.bodies


# the endpoint

def test_the_papers_protocol(few, tmp_path):
    with WordServer() as server: table = interpret(few, config(server), 0, CLOSED, tmp_path)
    scored = table[table.status == "scored"]
    assert len(scored) == 3 and scored.f1.min() > 0.8 and (scored.parse_failures == 0).all()
    explains = [b for b in server.bodies if b["messages"][1]["content"].startswith("Active")]
    assert len(explains) == 3 and all(b["temperature"] == 0 for b in server.bodies)
    assert len(server.bodies) == estimate_cost(Exemplars(few).features, config())["calls"]
    text = explains[0]["messages"][1]["content"]
    assert text.count("activations:") == 25 and "<<" in text and ", 10)" in text
    detects = [b["messages"][1]["content"] for b in server.bodies if not b["messages"][1]["content"].startswith("Active")]
    assert all("<<" not in t and len(t.splitlines()) <= 7 for t in detects)


def test_the_prompts_of_a_feature(few):
    f = next(Exemplars(few).contexts())
    said = explain_prompt(f, protocol_of(config(tell_section=True)))[1]["content"]
    assert "[findings]" in said and "[findings]" not in explain_prompt(f, protocol_of(config()))[1]["content"]
    told = detect_prompt("x", f.scoring[:3], protocol_of(config()))[0]["content"]
    assert told.endswith("[answer 1, answer 2, answer 3]") and parse_list(told, 3) is None


def test_a_replay_needs_no_endpoint_and_gives_the_same_bytes(few, tmp_path):
    with WordServer() as server: interpret(few, config(server), 0, CLOSED, tmp_path)
    before = {n: file_hash(tmp_path / n) for n in ("examinations.parquet", "interpretations.parquet", "ledger.sqlite")}
    (tmp_path / "interpretations.parquet").unlink()
    interpret(few, config(server), 0, CLOSED, tmp_path)
    assert before == {n: file_hash(tmp_path / n) for n in before}
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(before)


def test_the_key_is_used_and_never_stored(few, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    with WordServer() as server: interpret(few, config(server, api_key_env="MY_KEY"), 0, CLOSED, tmp_path)
    assert server.keys == {"Bearer sk-very-secret"}
    assert all(b"very-secret" not in p.read_bytes() for p in tmp_path.iterdir())


def test_without_a_key_a_hosted_endpoint_is_not_asked(few, tmp_path):
    with pytest.raises(UserError, match="OPENAI_API_KEY is not set"):
        interpret(few, config(base_url="https://api.example.org/v1"), 0, OPEN, tmp_path)


def test_nobody_there_is_one_sentence(few, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with pytest.raises(UserError, match=f"nobody answers at http://127.0.0.1:{port}/v1"):
        interpret(few, config(base_url=f"http://127.0.0.1:{port}/v1"), 0, CLOSED, tmp_path)
    assert not (tmp_path / "interpretations.parquet").exists()


@pytest.mark.parametrize(("status", "match"), [(401, "refuses the key"), (404, "knows no model 'words'"), (422, "does not accept the request")])
def test_what_waiting_cannot_mend_is_said_at_once(few, tmp_path, status, match):
    with WordServer(lambda n, b: (status, {}, '{"error": {"message": "no"}}')) as server:
        with pytest.raises(UserError, match=match): interpret(few, config(server, concurrency=1), 0, CLOSED, tmp_path)
    assert len(server.bodies) <= 3


def test_a_quota_that_is_used_up_is_said_at_once(few, tmp_path):
    with WordServer(lambda n, b: (429, {}, '{"error": {"message": "no", "code": "insufficient_quota"}}')) as server:
        with pytest.raises(UserError, match="quota of the key is used up"): interpret(few, config(server, concurrency=1), 0, CLOSED, tmp_path)
    assert len(server.bodies) <= 3


def test_a_model_that_takes_no_temperature_is_sent_none(few, tmp_path):
    with WordServer() as server: interpret(few, config(server, temperature=None), 0, CLOSED, tmp_path)
    assert server.bodies and not any("temperature" in b for b in server.bodies)


def faults(number, body):
    """One reply in five goes wrong, each time in another way; asked again, all is well."""
    ways = ((429, {"retry-after": "0.05"}, "{}"), (500, {}, "oops"), "drop", (200, {}, completion("[1, 0")[:40]), (503, {"retry-after": "0"}, ""),
            (200, {"content-type": "text/html"}, "<html>"), (200, {}, '{"choices": []}'))
    return ways[number // 5 % len(ways)] if number % 5 == 4 else None


def test_faults_on_the_way_change_nothing(few, tmp_path):
    with WordServer() as server: interpret(few, config(server), 0, CLOSED, tmp_path / "calm")
    good = read_table(tmp_path / "calm" / "interpretations.parquet")
    with WordServer(faults) as server: interpret(few, config(server), 0, CLOSED, tmp_path / "rough")
    assert read_table(tmp_path / "rough" / "interpretations.parquet").equals(good)
    assert len(server.bodies) > 40


def test_a_time_out_is_tried_again(few, tmp_path):
    slow = Counter()
    def trouble(number, body):
        slow["n"] += 1
        if slow["n"] == 1: time.sleep(1.5)
    with WordServer(trouble) as server: table = interpret(few, config(server, timeout_s=0.75, concurrency=2), 0, CLOSED, tmp_path)
    assert (table.status == "scored").sum() == 3


def _spoil(share, text, **message):
    """Spoil a share of detection prompts for good, by their content, so that the repair fails too."""
    def trouble(number, body):
        asked = body["messages"][1]["content"]
        if asked.startswith("Active") or sum(map(ord, asked)) % 100 >= 100 * share: return None
        return 200, {}, completion(text, **message)
    return trouble


def test_parse_failures_are_counted_and_never_scored_as_no(few, tmp_path):
    with WordServer(_spoil(0.3, "I think it is [1, 0, 2]")) as server: table = interpret(few, config(server), 0, CLOSED, tmp_path)
    scored = table[table.status == "scored"]
    assert len(scored) == 3 and (scored.parse_failures > 0).all()
    features = Exemplars(few).features.set_index("feature").loc[scored.feature]
    assert (scored.scored_contexts.to_numpy() < (features.score_active + features.score_silent).to_numpy()).all()
    assert scored.recall.min() > 0.8
    repairs = [b for b in server.bodies if len(b["messages"]) == 4]
    assert repairs and repairs[0]["messages"][2]["content"] == "I think it is [1, 0, 2]"
    assert interpretation_summary(table)["parse_failures"] == scored.parse_failures.sum()


def test_refusals_are_counted(few, tmp_path):
    with WordServer(_spoil(0.3, None, refusal="I cannot help with that.")) as server: table = interpret(few, config(server), 0, CLOSED, tmp_path)
    assert table.refusals.sum() > 0 and table.parse_failures.sum() == 0
    assert (table.status == "scored").sum() == 3


def test_too_few_answers_give_no_score(few, tmp_path):
    with WordServer(_spoil(1, "yes")) as server: table = interpret(few, config(server), 0, CLOSED, tmp_path)
    asked = table[table.scored_contexts == 0].loc[[WORDS.index("effusion"), MIXED]]
    assert set(asked.status) == {"unscored"} and asked.f1.isna().all()
    assert asked.reason.str.fullmatch(r"0 of \d+ contexts answered \(parse failure\)").all()


def test_no_explanation_no_score(few, tmp_path):
    def trouble(number, body):
        if body["messages"][1]["content"].startswith("Active"): return 200, {}, completion("It is about words.")
    with WordServer(trouble) as server: table = interpret(few, config(server), 0, CLOSED, tmp_path)
    asked = table.loc[[WORDS.index("effusion"), MIXED]]
    assert set(asked.reason) == {"no explanation: parse failure"} and (asked.parse_failures == 1).all()
    assert all(b["messages"][1]["content"].startswith("Active") for b in server.bodies)


def test_one_repair_is_enough(few, tmp_path):
    def trouble(number, body): return (200, {}, completion("Well, I see.")) if len(body["messages"]) == 2 and number % 3 == 0 else None
    with WordServer(trouble) as server: table = interpret(few, config(server), 0, CLOSED, tmp_path)
    assert (table.status == "scored").sum() == 3 and table.parse_failures.sum() == 0


@pytest.mark.parametrize("protocol", ["paper", "saerad"])
def test_the_estimate_is_what_is_sent(near, tmp_path, protocol):
    with WordServer() as server:
        cfg = config(server, protocol=protocol)
        needed = estimate_cost(Exemplars(near).features, cfg, Exemplars(near).contexts())
        interpret(near, cfg, 0, CLOSED, tmp_path)
    sent = sum(len(m["content"]) for b in server.bodies for m in b["messages"]) / cfg.token_characters
    assert 0.8 * needed["tokens_in"] <= sent <= 1.1 * needed["tokens_in"] and len(server.bodies) <= needed["calls"]


def test_a_budget_is_kept(few, tmp_path):
    with pytest.raises(UserError, match="max_calls is 10"): interpret(few, config(max_calls=10), 0, CLOSED, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_ledger_is_named(few, tmp_path):
    (tmp_path / "ledger.sqlite").write_bytes(b"not a database at all, but long enough to be looked at" * 10)
    with pytest.raises(UserError, match="ledger.sqlite is not a ledger"): interpret(few, config(), 0, CLOSED, tmp_path)


EVERY_FAULT = {"429": (429, {"retry-after": "0.05"}, "{}"), "500": (500, {}, "oops"), "time-out": "late", "dropped": "drop",
               "cut JSON": (200, {}, completion("[1, 0")[:40]), "refusal": (200, {}, completion(None, refusal="I cannot.")),
               "wrong length": (200, {}, completion("[1, 0, 1]"))}


@pytest.mark.parametrize("protocol", ["paper", "saerad"])
def test_one_reply_in_five_fails_and_no_feature_is_lost(near, tmp_path, protocol):
    sent = Counter()
    def trouble(number, body):
        if number % 5 != 4: return None
        kind = list(EVERY_FAULT)[number // 5 % len(EVERY_FAULT)]
        sent[kind] += 1
        if EVERY_FAULT[kind] == "late": time.sleep(1.2)
        return None if EVERY_FAULT[kind] == "late" else EVERY_FAULT[kind]
    with WordServer(trouble) as server:
        cfg = config(server, protocol=protocol, timeout_s=0.8, concurrency=4)
        runs = [interpret(near, cfg, seed, CLOSED, tmp_path / str(seed)) for seed in range(1 if protocol == "paper" else 6)]
    ok = Exemplars(near).features.status == "ok"
    ended = pd.concat([table[ok.to_numpy()] for table in runs])
    assert set(sent) == set(EVERY_FAULT) and sum(sent.values()) >= len(server.bodies) // 5 - 1
    assert len(ended) == len(runs) * ok.sum() and ((ended.status == "scored") | (ended.reason != "")).all()
    assert ended.f1[ended.status != "scored"].isna().all() and ended.refusals.sum() + ended.parse_failures.sum() <= sum(sent.values())
    assert ended.refusals.sum() > 0 and (ended[ended.status == "scored"].f1 > 0.6).all()


@pytest.mark.parametrize("text", ["[1, 0, 2, 0, 1]", "[1, 0, -1, 0, 1]", "[10, 0, 1, 0, 1]"])
def test_numbers_outside_the_range_are_no_answer(few, tmp_path, text):
    with WordServer(_spoil(1, text)) as server: table = interpret(few, config(server, shuffled=False), 0, CLOSED, tmp_path)
    asked = table.loc[[WORDS.index("effusion"), MIXED]]
    assert asked.f1.isna().all() and asked.reason.str.fullmatch(r"0 of \d+ contexts answered \(parse failure\)").all()
    repairs = [b for b in server.bodies if len(b["messages"]) == 4]
    assert repairs and "each 0 or 1" in repairs[0]["messages"][3]["content"]


def test_a_feature_with_too_few_contexts_is_unscored_with_that_reason(tmp_path_factory, tmp_path):
    base = tmp_path_factory.mktemp("scarce")
    collect_exemplars(make_store(base / "store"), make_sae(), ExemplarsConfig(min_score=90), 0, base / "exemplars")
    table = interpret(base / "exemplars", InterpretationConfig(bootstrap=1), 0, CLOSED, tmp_path).set_index("feature")
    scarce = table.loc[WORDS.index("apical")]
    assert (scarce.status, scarce.reason, scarce.explanation) == ("unscored", "too few contexts", "") and np.isnan(scarce.f1)


def test_equal_ledgers_have_equal_bytes(few, tmp_path):
    with WordServer() as server:
        for name, width in (("one", 1), ("many", 8)): interpret(few, config(server, concurrency=width), 0, CLOSED, tmp_path / name)
    assert file_hash(tmp_path / "one" / "ledger.sqlite") == file_hash(tmp_path / "many" / "ledger.sqlite")


# parts

def drive(limit, seconds, room=10.0, latency=0.3, workers=10**6, faulty=0.0, seed=0):
    """A pace before an endpoint that lets `limit(now)` calls a second in, and `room` at once: its rate and the starts of calls let in and refused.

    A share `faulty` is refused at any speed; at most `workers` calls are under way.
    """
    now, size, last, draw, answers, path, let_in, refused = [0.0], room, 0.0, random.Random(seed), deque(), [], [], []
    pace = Pace(clock=lambda: now[0])
    while now[0] < seconds:
        while len(answers) >= workers: _answer(pace, now, answers, latency)
        start = now[0] + pace.slot()
        while answers and answers[0] <= start: _answer(pace, now, answers, latency)
        room, last, now[0] = min(size, room + (start - last) * limit(start)), start, start
        path.append(pace.rate)
        if room >= 1 and draw.random() >= faulty:
            room -= 1
            let_in.append(start)
            answers.append(start + latency)
        else:
            refused.append(start)
            pace.slower(0.1)
    return pace, path, let_in, refused


def _answer(pace, now, answers, latency):
    now[0] = max(now[0], answers.popleft())
    pace.faster(latency)


@pytest.mark.parametrize(("limit", "room", "latency", "at_once", "most_refused"), [
    (5, 5, 0.3, 0.98, 0.09), (10, 10, 2.0, 0.98, 0.06), (50, 10, 0.3, 0.95, 0.05), (50, 5, 0.0, 0.95, 0.05), (50, 50, 0.05, 0.95, 0.05),
    (200, 40, 1.0, 0.7, 0.05), (1000, 200, 0.3, 0.83, 0.05)])
def test_the_pace_finds_a_limit_and_keeps_to_it(limit, room, latency, at_once, most_refused):
    """`at_once`: share of the limit that is held in the first twelve seconds."""
    _, _, let_in, refused = drive(lambda now: limit, 60, room, latency)
    late, in_vain = (sum(t > 20 for t in some) for some in (let_in, refused))
    assert 0.97 * limit <= late / 40 <= limit + room / 40 and in_vain <= most_refused * late
    assert sum(t <= 12 for t in let_in) >= at_once * 12 * limit


def test_the_pace_follows_a_limit_that_changes():
    _, path, let_in, refused = drive(lambda now: 50 if now < 20 else 10 if now < 40 else 80, 70)
    def held(a, b): return sum(a < t <= b for t in let_in) / (b - a)
    assert held(25, 40) == pytest.approx(10, rel=0.1) and held(60, 70) == pytest.approx(80, rel=0.05)
    assert len(refused) < 0.08 * len(let_in)


def test_the_first_refusal_sets_the_rate_to_what_was_let_in():
    now = [0.0]
    pace = Pace(clock=lambda: now[0])
    for _ in range(40): now[0] += pace.slot()      # 20 calls a second
    pace.rate = 1000.0
    pace.slower(0.1)
    assert pace.rate == pytest.approx(0.92 * 20, rel=0.03)
    before = pace.rate
    pace.slower(0.1)                               # one refusal more says nothing new
    assert pace.rate == before


def test_a_few_refusals_at_any_speed_do_not_stop_the_pace():
    _, path, let_in, refused = drive(lambda now: 10_000, 60, room=1000.0, faulty=0.03)
    assert 0.01 < len(refused) / len(let_in) < 0.06 and min(path[-1000:]) > 40


def in_a_minute(limit, faulty, seed):
    """Calls a second let in over the second half of a minute, and the share of them that were refused in it."""
    _, _, let_in, refused = drive(limit, 60, room=10.0, workers=32, faulty=faulty, seed=seed)
    late, in_vain = (sum(t > 30 for t in some) for some in (let_in, refused))
    return late / 30, in_vain / (late + in_vain)


def test_refusals_that_do_not_depend_on_the_speed_are_told_apart():
    """Every fifth is refused at any speed: the pace steps back, sees that it is no use, and goes up to the limit all the same."""
    for limit, least in ((10_000, 70), (50, 40)):
        held, refused = np.median([in_a_minute(lambda now, limit=limit: limit, 0.2, seed) for seed in range(12)], axis=0)
        assert held > least and 0.15 < refused < 0.3, (limit, held, refused)


def test_what_was_refused_anyway_is_forgotten_when_it_ends():
    """A fault of half a minute: afterwards a limit is held as by a pace that never saw one."""
    now = [0.0]
    pace = Pace(clock=lambda: now[0])
    pace.anyway, pace.stepped = 0.3, 0.0
    room, last, let_in, refused = 10.0, 0.0, 0, 0
    while now[0] < 60:
        now[0] += pace.slot()
        room, last = min(10.0, room + 20 * (now[0] - last)), now[0]
        if room >= 1:
            room, let_in = room - 1, let_in + 1
            pace.faster(0.3)
        else:
            refused += 1
            pace.slower(0.1)
    assert pace.anyway < 0.1 and let_in > 0.93 * 20 * 60 and refused < 0.15 * let_in


def test_a_limit_that_falls_is_no_fault():
    pace, path, let_in, refused = drive(lambda now: 20 if now < 10 else 5, 60, room=5.0, workers=32)
    assert pace.anyway == 0 and max(path[-50:]) < 7 and len(refused) < 0.2 * len(let_in)


def test_an_endpoint_that_refuses_every_fifth_call_is_not_crawled_through(tmp_path):
    """A real server: 150 calls, one in five refused at any speed."""
    draw = random.Random(0)
    faulty = [draw.random() < 0.2 for _ in range(1000)]
    with WordServer(lambda number, body: (429, {"retry-after": "0.05"}, "{}") if faulty[number] else None) as server:
        endpoint = Endpoint(EndpointConfig(base_url=server.url, model="words", attempts=20, concurrency=16), Ledger(tmp_path / "ledger.sqlite"), True)
        asked = [[{"role": "system", "content": ""}, {"role": "user", "content": f"Description: x\nExcerpts:\n1. call {i}"}] for i in range(150)]
        began = time.monotonic()
        with ThreadPoolExecutor(16) as pool: replies = list(pool.map(lambda m: endpoint.ask(m, 5), asked))
        took = time.monotonic() - began
        endpoint.close()
    assert len(replies) == 150 and endpoint.asked == len(server.bodies) < 230 and took < 25


def test_a_rate_that_nobody_waits_for_does_not_rise():
    pace, path, _, _ = drive(lambda now: 10_000, 60, room=1000.0, workers=10)
    assert path[-1] < 3 * 10 / 0.3


def test_a_long_pause_is_everybodys_and_says_nothing_of_the_limit():
    now = [0.0]
    pace = Pace(clock=lambda: now[0])
    for _ in range(40): now[0] += pace.slot()
    pace.slower(30.0)
    rate = pace.rate
    assert pace.slot() == pytest.approx(30) and pace.rate == pytest.approx(0.92 * 20, rel=0.03)
    now[0] += 30
    for _ in range(3): now[0] += pace.slot()
    pace.slower(0.1)
    assert pace.rate == rate


def test_calls_take_turns_and_keep_the_rate_they_were_given():
    pace, began = Pace(200.0), []
    with ThreadPoolExecutor(16) as pool: list(pool.map(lambda i: began.append(pace.wait()), range(60)))
    assert max(began) - min(began) >= 58 / 200 and pace.rate == 200
    pace.slower(0.1)
    pace.faster(0.1)
    assert pace.rate == 200


def test_the_ledger_keeps_the_first_answer(tmp_path):
    from saerad.interpretation.endpoint import Reply
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.put("k", {"a": 1}, Reply("first"))
    ledger.put("k", {"a": 1}, Reply("second"))
    assert ledger.get("k").text == "first" and ledger.get("other") is None and len(ledger) == 1
    ledger.settle()
    assert Ledger(tmp_path / "ledger.sqlite").get("k").text == "first"


def test_another_endpoint_is_another_question(few, tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    with WordServer() as a, WordServer() as b:
        for server in (a, b, b): Endpoint(config(server), ledger, may_leave=False).ask(detect_prompt("x", [], protocol_of(config())), 5)
    assert (len(a.bodies), len(b.bodies)) == (1, 1)


# protocols

def test_protocols_are_files_and_unknown_ones_are_named(tmp_path):
    assert protocol_names() == ["paper", "saerad"]
    with pytest.raises(UserError, match="interpretation.protocol is 'papr'; it must be one of paper, saerad"): read_protocol("papr")
    own = tmp_path / "mine.yaml"
    own.write_text("explain_prompt: mine-1\ndetect_prompt: detect-paper-1\n", encoding="utf-8")
    with pytest.raises(UserError, match="mine-1"): read_protocol(str(own))
    (tmp_path / "mine-1.txt").write_text("Explain.", encoding="utf-8")
    assert read_protocol(str(own)).active == 25
    (tmp_path / "mine-1.txt").write_text("Explain as {json}.", encoding="utf-8")
    own.write_text("explain_prompt: mine-1\ndetect_prompt: detect-paper-1\nactive: 5\n", encoding="utf-8")
    with pytest.raises(UserError, match="mine-1.txt has braces around something other than scale"): read_protocol(str(own))
    own.write_text("explain_promt: x\n", encoding="utf-8")
    with pytest.raises(UserError, match="mine.yaml is not a protocol"): read_protocol(str(own))


def test_a_protocol_of_ones_own_is_asked_with_its_own_prompts(few, tmp_path):
    own = tmp_path / "mine.yaml"
    own.write_text("explain_prompt: mine-1\ndetect_prompt: detect-paper-1\nscore_active: 5\nscore_silent: 5\ncontrol: 5\n", encoding="utf-8")
    (tmp_path / "mine-1.txt").write_text("Explain on a scale to {scale}, as {{json}}.", encoding="utf-8")
    with WordServer() as server: table = interpret(few, config(server, protocol=str(own)), 0, CLOSED, tmp_path / "out")
    asked = {b["messages"][0]["content"] for b in server.bodies if b["messages"][1]["content"].startswith("Active")}
    assert asked == {"Explain on a scale to 10, as {json}."} and set(table.protocol) == {"mine"}
    assert protocol_files(str(own)) == [own, tmp_path / "mine-1.txt"] and protocol_files("saerad") == []
    assert named_files(config(protocol=str(own), descriptions=str(own))) == [own, tmp_path / "mine-1.txt", own]
    with pytest.raises(UserError, match="absent.csv does not exist"): named_files(config(descriptions=str(tmp_path / "absent.csv")))


@pytest.fixture(scope="module")
def near(tmp_path_factory):
    """Exemplars of four features with near misses."""
    base = tmp_path_factory.mktemp("near")
    store, sae = make_store(base / "store"), make_sae()
    cfg = ExemplarsConfig(min_explain=5, min_score=5, explain_from="deciles")
    collect_exemplars(store, sae, cfg, 0, base / "exemplars")
    add_hard_negatives(store, sae, cfg, 0, base / "exemplars")
    features = read_table(base / "exemplars" / "features.parquet").to_pandas()
    features.loc[~features.feature.isin([WORDS.index("effusion"), WORDS.index("small"), MIXED]), "status"] = "dead"
    write_table(base / "exemplars" / "features.parquet", pa.Table.from_pandas(features, preserve_index=False))
    return base / "exemplars"


def test_our_protocol_tells_contrasts_and_scores_by_source(near, tmp_path):
    with WordServer() as server: table = interpret(near, config(server, protocol="saerad"), 0, CLOSED, tmp_path)
    scored = table[table.status == "scored"]
    assert len(scored) == 3 and set(table.protocol) == {"saerad"}
    sources = {s["source"] for row in scored.by_source for s in row}
    assert {"random", "nearest"} <= sources and scored.near_f1.notna().all() and scored.fuzz_f1.notna().all()
    explains = [b["messages"][1]["content"] for b in server.bodies if b["messages"][1]["content"].startswith("Active")]
    assert all("Near misses:" in t and "[findings; " in t and "activations:" not in t for t in explains)
    detects = [b["messages"][1]["content"] for b in server.bodies if not b["messages"][1]["content"].startswith("Active")]
    assert all(t.splitlines()[-1].startswith("Description: ") and len(t.splitlines()) <= 27 for t in detects)
    assert len(server.bodies) <= estimate_cost(Exemplars(near).features, config(protocol="saerad"))["calls"]


def test_the_control_begins_like_the_examination(near, tmp_path):
    with WordServer() as server: interpret(near, config(server, protocol="saerad"), 0, CLOSED, tmp_path)
    asked = [b["messages"][1]["content"].rpartition("\nDescription: ") for b in server.bodies]
    beginnings = Counter(head for head, mark, _ in asked if mark and "<<" not in head)
    assert sum(n == 2 for n in beginnings.values()) == 3    # one prompt of each feature


def test_no_examination_is_worth_its_name_without_the_others_patients(near):
    p = read_protocol("saerad")
    for f in Exemplars(near).contexts():
        contexts, truth, source = examination(f, p, 0)
        assert truth.sum() == min(40, f.truth.sum()) and (source == "random").sum() == min(40, (~f.truth).sum())
        assert len({c.row for c in contexts if c.low >= 0}) > 0 and not (truth & (source != "")).any()
        told = {c.study for c in (*f.active, *f.silent, *f.hard_silent)}
        assert not told & {c.study for c in contexts}


def test_scores_by_source_are_those_of_plain_counting():
    truth = [True] * 10 + [False] * 20
    said = [True] * 8 + [False] * 2 + [True] * 1 + [False] * 9 + [True] * 5 + [False] * 4 + [None]
    rows = {r["source"]: r for r in by_source(truth, said, [""] * 10 + ["random"] * 10 + ["side"] * 10, np.random.default_rng(0), 200)}
    assert rows["random"]["false_positive_rate"] == pytest.approx(0.1)
    assert rows["side"]["false_positive_rate"] == pytest.approx(5 / 9) and rows["side"]["contexts"] == 9
    assert rows["random"]["f1"] == pytest.approx(2 * 0.8 / 1.9) and rows["side"]["f1_low"] < rows["side"]["f1"] < rows["side"]["f1_high"]


def test_prevalence():
    precision, f1 = at_prevalence(0.9, 0.05, 0.01)
    assert precision == pytest.approx(0.009 / (0.009 + 0.0495)) and f1 == pytest.approx(2 * precision * 0.9 / (precision + 0.9))
    assert np.isnan(at_prevalence(0, 0, 0.1)[0])


def test_fuzzing_moves_half_of_the_marks(near):
    f = next(Exemplars(near).contexts())
    items, truth = fuzz_items(f, 20, np.random.default_rng(0))
    marks = {c.row: m for c, m in zip(f.scoring, f.marks, strict=False)}
    assert sum(truth) == len(truth) // 2 and all((m == marks[c.row]) == t for (c, m), t in zip(items, truth, strict=True))
    assert all(set(m).isdisjoint(marks[c.row]) for (c, m), t in zip(items, truth, strict=True) if not t)


# endpoints of every kind

def test_structured_answers(few, tmp_path):
    with WordServer() as server: table = interpret(few, config(server, structured=True), 0, CLOSED, tmp_path)
    assert (table.status == "scored").sum() == 3 and all("response_format" in b for b in server.bodies)


def test_an_endpoint_that_knows_no_schema_is_asked_in_words_and_replayed(few, tmp_path):
    def trouble(number, body): return (400, {}, '{"error": {"message": "response_format is not supported"}}') if "response_format" in body else None
    with WordServer(trouble) as server:
        table = interpret(few, config(server, structured=True), 0, CLOSED, tmp_path)
        asked = len(server.bodies)
        assert (table.status == "scored").sum() == 3 and sum("response_format" in b for b in server.bodies) <= 8
        interpret(few, config(server, structured=True), 0, CLOSED, tmp_path)
        assert len(server.bodies) == asked


def test_azure(few, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "azure-key")
    with WordServer() as server:
        cfg = config(server, api="azure", base_url=server.url.removesuffix("/v1"), api_version="2024-10-21")
        assert (interpret(few, cfg, 0, CLOSED, tmp_path).status == "scored").sum() == 3
    assert server.paths == {"/openai/deployments/words/chat/completions?api-version=2024-10-21"}


def test_headers_set_the_pace():
    pace = Pace(clock=lambda: 0.0)
    pace.read_limits({"x-ratelimit-limit-requests": "600", "x-ratelimit-limit-tokens": "60000"}, 500)
    assert pace.rate == pytest.approx(0.98 * 2)
    for _ in range(2): pace.slot()
    assert pace.held
    pace.faster(0.01)
    assert pace.rate == pytest.approx(0.98 * 2)
    pace.read_limits({"x-ratelimit-limit-requests": "600", "x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1m2.5s"}, 10)
    assert pace.slot() == pytest.approx(60)
    silent = Pace(clock=lambda: 0.0)
    silent.read_limits({}, 100)
    assert silent.rate == 20 and silent.cap == float("inf")


def test_a_budget_stops_cleanly_and_goes_on(few, tmp_path):
    prices = {"price_in": 1000.0, "price_out": 0.0, "concurrency": 1}
    with WordServer() as server:
        needed = estimate_cost(Exemplars(few).features, config(server, **prices), Exemplars(few).contexts())
        cfg = config(server, budget=needed["cost"] / 2, **prices)
        server.headers = {}
        table = interpret(few, cfg, 0, CLOSED, tmp_path)
    spent = table[table.reason.str.contains("the budget is spent")]
    ended = table[table.feature.isin(Exemplars(few).features.query("status == 'ok'").feature)]
    assert len(ended) == 3 and ((ended.status == "scored") | (ended.reason != "")).all()
    assert len(spent) and 0 < len(server.bodies) < needed["calls"]
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix == ".parquet") == ["examinations.parquet", "interpretations.parquet"]


def test_a_spent_budget_asks_no_more(few, tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.put("earlier", {}, Reply("paid", tokens_in=2_000_000))
    with WordServer() as server:
        endpoint = Endpoint(config(server, price_in=1.0, price_out=1.0, budget=2.0), ledger, may_leave=False)
        with pytest.raises(CallFailed, match="the budget is spent"): endpoint.ask([{"role": "user", "content": "x"}], 5)
    assert endpoint.spent == pytest.approx(2.0) and not server.bodies


def test_a_budget_smaller_than_one_feature(few, tmp_path):
    with pytest.raises(UserError, match="budget is 0.001 and one feature needs about"):
        interpret(few, config(budget=0.001, price_in=10.0, price_out=10.0), 0, CLOSED, tmp_path / "out")
    with pytest.raises(UserError, match="budget needs interpretation.price_in"): interpret(few, config(budget=1.0), 0, CLOSED, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_settings_can_be_checked_before_anything_exists(tmp_path, monkeypatch):
    check_settings(config())
    for changes, match in (({"budget": 1.0}, "price_in"), ({"protocol": "papr"}, "papr"), ({"descriptions": str(tmp_path / "no.csv")}, "no.csv")):
        with pytest.raises(UserError, match=match): check_settings(config(**changes))
    (tmp_path / "odd.csv").write_text("feature,words\n1,x\n", encoding="utf-8")
    with pytest.raises(UserError, match="no column for explanation"): check_settings(config(descriptions=str(tmp_path / "odd.csv")))
    with pytest.raises(UserError, match="OPENAI_API_KEY is not set"): key_of(config(base_url="https://api.example.org/v1"))
    assert key_of(config()) == "none"
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    assert key_of(config(base_url="https://api.example.org/v1")) == "k"


def test_a_batch_gives_the_bytes_of_single_calls(few, tmp_path):
    with WordServer() as server: single = interpret(few, config(server), 0, CLOSED, tmp_path / "single")
    with BatchServer() as server:
        batched = interpret(few, config(server, batch=True, batch_poll_s=0.01), 0, CLOSED, tmp_path / "batch")
        assert len(server.batches) == 2 and not (tmp_path / "batch" / "batch.json").exists()
        interpret(few, config(server, batch=True, batch_poll_s=0.01), 0, CLOSED, tmp_path / "batch")
        assert len(server.batches) == 2
    assert batched.drop(columns="by_source").equals(single.drop(columns="by_source"))


def test_a_batch_is_no_larger_than_the_budget(few, tmp_path):
    prices = {"price_in": 1000.0, "price_out": 0.0, "batch": True, "batch_poll_s": 0.01}
    budget = estimate_cost(Exemplars(few).features, config(**prices), Exemplars(few).contexts())["cost"] / 2
    with BatchServer() as server:
        table = interpret(few, config(server, budget=budget, **prices), 0, CLOSED, tmp_path)
        assert (table.status == "scored").sum() == 3 and len(server.batches) > 2    # each answer was cheap, so there was money for another batch
        asked = [sum(len(m["content"]) for q in lines for m in q["body"]["messages"]) / 3500 for lines in server.files.values()]
        assert max(asked) <= budget < sum(asked)
        ledger = Ledger(tmp_path / "ledger.sqlite")
        ledger.put("earlier", {}, Reply("paid", tokens_in=1_000_000))
        endpoint = Endpoint(config(server, budget=budget, **prices), ledger, may_leave=False)
        with pytest.raises(CallFailed, match="the budget is spent"): endpoint.ask([{"role": "user", "content": "x"}], 5)
        assert not endpoint.waiting


def test_a_batch_that_was_paid_for_is_waited_for(few, tmp_path):
    with BatchServer() as server:
        cfg, question = config(server, batch=True, batch_poll_s=0.01), detect_prompt("x", _contexts(["y"]), protocol_of(config()))
        endpoint = Endpoint(cfg, Ledger(tmp_path / "ledger.sqlite"), may_leave=False)
        with pytest.raises(CallFailed): endpoint.ask(question, 5)
        endpoint.client = endpoint._connect()
        write_json(tmp_path / "batch.json", {"id": endpoint._upload_batch(endpoint.waiting), "requests": endpoint.waiting})   # killed here
        again = Endpoint(cfg, Ledger(tmp_path / "ledger.sqlite"), may_leave=False)
        assert again.submit_batch(say=lambda text: None) == 1 and len(server.batches) == 1
        assert again.ask(question, 5).text == "[0]"


def test_no_batch_api_is_said(few, tmp_path):
    with WordServer(lambda n, b: (404, {}, "{}")) as server:
        with pytest.raises(UserError, match="takes no batches"): interpret(few, config(server, batch=True), 0, CLOSED, tmp_path)


def test_pictures_are_shown_and_not_kept(few, tmp_path):
    picture = SimpleNamespace(array=lambda: np.arange(64, dtype=np.uint8).reshape(8, 8))
    class Source:
        may_leave = True
        def __getitem__(self, study): return SimpleNamespace(all_views={"frontal": picture})
    with WordServer() as server: table = interpret(few, config(server, images=True), 0, Source(), tmp_path)
    shown = [b for b in server.bodies if isinstance(b["messages"][1]["content"], list)]
    parts = [p for b in shown for p in b["messages"][1]["content"] if p["type"] == "image_url"]
    assert parts and all(p["image_url"]["url"].startswith("data:image/png") for p in parts)
    explains = [b["messages"][1]["content"] for b in shown if b["messages"][1]["content"][0]["text"].startswith("Active")]
    assert len(explains) == 3
    for told in explains:       # a picture behind each of the first eight active excerpts, and behind no other line
        before = [a["text"] for a, b in zip(told, told[1:], strict=False) if b["type"] == "image_url"]
        assert [line.split(".")[0] for line in before] == [str(i) for i in range(1, 9)]
    needed = estimate_cost(Exemplars(few).features, config(server, images=True), Exemplars(few).contexts())
    blind = estimate_cost(Exemplars(few).features, config(server, images=True, picture_tokens=0), Exemplars(few).contexts())
    assert len(parts) == (needed["tokens_in"] - blind["tokens_in"]) / 350 and len(server.bodies) == needed["calls"]
    scored = table[table.status == "scored"]
    assert np.allclose(scored.visual_index, scored.visual_f1 - scored.f1)
    assert b"data:image/png" not in (tmp_path / "ledger.sqlite").read_bytes()


@pytest.mark.parametrize("shape, grid, patch, box", [
    ((128, 128), (8, 8), (7, 7), (112, 112, 128, 128)), ((400, 600), (37, 37), (36, 36), (332, 417, 341, 426)),
    ((1110, 740), (37, 37), (0, 5), (85, 46, 94, 55)), ((300, 300), (4, 6), (1, 2), (75, 100, 150, 150))])
def test_a_patch_is_framed_where_the_model_saw_it(shape, grid, patch, box):
    """`box`: first row and column of the patch and those behind it, in the picture that is sent (at most 512 pixels)."""
    film = SimpleNamespace(array=lambda: np.full(shape, 100, np.uint8))
    source = {"s": SimpleNamespace(all_views={"frontal": film})}
    def look(context, grid):
        url = view_images(source, grid=grid)(context)
        return np.array(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))))
    context = Context(0, ("[image]",), "image", "frontal", 0, study="s", patch=patch)
    framed, (top, left, bottom, right) = look(context, grid), box
    white = np.argwhere(framed == 255)
    assert (*white.min(0), *(white.max(0) + 1)) == box and (framed[top + 1:bottom - 1, left + 1:right - 1] == 100).all()
    assert max(framed.shape) <= 512 and (framed == 0).any()
    assert (look(context, (0, 0)) == 100).all() and (look(context, (1, 9)) == 100).all()
    assert (look(replace(context, patch=(-1, -1)), grid) == 100).all()


def test_the_frame_follows_the_subjects_grid_through_the_stage(folder, tmp_path):
    features = read_table(folder / "features.parquet")
    kept = features.to_pandas()
    kept.loc[kept.feature != WORDS.index("[image]"), "status"] = "dead"
    write_table(tmp_path / "features.parquet", pa.Table.from_pandas(kept, preserve_index=False).replace_schema_metadata(features.schema.metadata))
    write_table(tmp_path / "exemplars.parquet", read_table(folder / "exemplars.parquet"))
    film = SimpleNamespace(array=lambda: np.full((370, 370), 100, np.uint8))
    class Source:
        may_leave = True
        def __getitem__(self, study): return SimpleNamespace(all_views={"frontal": film})
    with WordServer() as server: interpret(tmp_path, config(server, images=True), 0, Source(), tmp_path / "out")
    shown = [b["messages"] for b in server.bodies if isinstance(b["messages"][1]["content"], list)]
    assert shown and all("framed in white" in m[0]["content"] for m in shown)
    urls = {p["image_url"]["url"] for m in shown for p in m[1]["content"] if p["type"] == "image_url"}
    films = [np.array(Image.open(io.BytesIO(base64.b64decode(u.split(",")[1])))) for u in urls]
    boxes = {tuple(np.argwhere(f == 255).min(0)) for f in films if (f == 255).any()}
    assert boxes == {(360, 360)} and any((f == 100).all() for f in films)     # image tokens framed, words not


# the descriptions of others

def test_descriptions_of_others_are_examined(few, tmp_path):
    theirs = tmp_path / "released.csv"
    theirs.write_text(f"latent_id,Interpretation\n{WORDS.index('effusion')},mentions of effusion\n{MIXED},mentions of the aorta\n", encoding="utf-8")
    cfg = InterpretationConfig(descriptions=str(theirs), description_columns={"explanation": "Interpretation"})
    table = interpret(few, cfg, 0, CLOSED, tmp_path / "out").set_index("feature")
    assert table.f1[WORDS.index("effusion")] > 0.95 and table.recall[MIXED] == 0
    assert table.reason[WORDS.index("normal")] == "no explanation: not described"


def test_tables_that_are_none_are_named(tmp_path):
    with pytest.raises(UserError, match="x.docx is no table"): read_explanations(tmp_path / "x.docx")
    with pytest.raises(UserError, match="missing.csv does not exist"): read_explanations(tmp_path / "missing.csv")
    (tmp_path / "a.csv").write_text("feature,words\n1,x\n", encoding="utf-8")
    with pytest.raises(UserError, match="no column for explanation .it has feature, words."): read_explanations(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text("feature,label\nnone,x\n", encoding="utf-8")
    with pytest.raises(UserError, match="feature 'none'; it must end in a number"): read_explanations(tmp_path / "b.csv")


def test_comparison_feature_by_feature(tmp_path):
    ours = pd.DataFrame({"feature": [1, 2], "explanation": ["left effusion", "wires"], "f1": [0.9, 0.8]})
    rows = [{"feature": "layers.15/latent_1", "description": "effusion left", "f1": 0.7}, {"feature": "3", "description": "x", "f1": 0.1}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    both = compare_explanations(ours, read_explanations(tmp_path / "t.jsonl"))
    assert both.feature.tolist() == [1] and both.words_shared[0] == 1 and both.f1_theirs[0] == pytest.approx(0.7)


def test_repeated_descriptions_are_grouped():
    said = ["small left effusion seen", "seen: a small, left effusion", "right effusion", "", "pacemaker", ""]
    assert repeated_explanations(said) == [0, 0, 2, -1, 4, -1]
    five = ["small left effusion", "effusion, left and small.", 'fires on ","', 'fires on "."', 'fires on "and"']
    assert repeated_explanations(five) == [0, 0, 2, 3, 4]


def test_exemplars_of_another_sae(near, tmp_path, folder):
    other = make_sae()
    with pytest.raises(UserError, match="made with another SAE"):
        other.threshold.fill_(0.7)
        interpret(folder, InterpretationConfig(), 0, CLOSED, tmp_path / "out", other)
    interpret(folder, InterpretationConfig(bootstrap=1), 0, CLOSED, tmp_path / "out", make_sae())


def test_the_strongest_are_said_apart_and_predict_nothing():
    told = [("left nodule",) if i < 10 else ("right nodule",) for i in range(50)]
    active = [Example(i, (" lung", " nodule"), "findings", "", 3, (0., 9. - i / 10), 1, stated=t) for i, t in enumerate(told)]
    assert strongest(active, tell_study=True) == ' Strongest where the report states "left nodule".'
    assert strongest(active, tell_study=False) == "" and strongest(active[:10], True) == ""
    rule = (Clause("nodule", stated="left nodule"), Clause(place="frontal image", stated="central line"))
    assert sorted(read_rule(rule_sentence(rule) + strongest(active, True))) == sorted(rule)


# the choice of features, and the record of their examinations

def test_features_are_chosen_in_every_way(folder):
    features = Exemplars(folder).features
    ok = features[features.status == "ok"]
    assert features_to_explain(features, "all", 0) == ok.feature.tolist()
    few, more = (set(features_to_explain(features, f"sample:{n}", 0)) for n in (3, 6))
    assert len(few) == 3 and len(more) == 6 and few < more <= set(ok.feature) and few != set(features_to_explain(features, "sample:3", 1))
    assert len(features_to_explain(features, "sample:9999", 0)) == len(ok)
    top = features_to_explain(features, "top:4 by density", 0)
    assert top == features_to_explain(features, "top:4", 0) and set(top) == set(ok.nlargest(4, "density", keep="first").feature)
    assert features_to_explain(features, "level:0", 0) == ok[ok.level == 0].feature.tolist()
    assert features_to_explain(features, (NEVER, int(ok.feature.iloc[0])), 0) == [ok.feature.iloc[0]]      # a dead one keeps its own reason


@pytest.mark.parametrize("choice, sentence", [
    ((4, 9999), "names feature 9999; the SAE has features 0 to"), ((-1,), "names feature -1"),
    ("top:3 by wisdom", "has no numbers wisdom; it has .*density"), ("level:7", "the SAE has levels 0 to 1")])
def test_a_feature_that_does_not_exist_is_named(folder, choice, sentence):
    with pytest.raises(UserError, match=sentence): features_to_explain(Exemplars(folder).features, choice, 0)


def test_the_form_of_a_choice_is_checked_with_the_config():
    assert InterpretationConfig(features=7).features == (7,) and InterpretationConfig(features=[3, 1]).features == (3, 1)
    for wrong in ("best", "top:0", "top:", "sample:x", "level:", "top:3 by "):
        with pytest.raises(UserError, match="interpretation.features is .*; give all, a list of feature"): InterpretationConfig(features=wrong)


def test_only_chosen_features_are_asked_about(folder, tmp_path):
    made = Exemplars(folder)
    cfg = InterpretationConfig(features="sample:4", bootstrap=10)
    table, chosen = interpret(folder, cfg, 0, CLOSED, tmp_path), features_to_explain(made.features, "sample:4", 0)
    assert set(table[table.reason != "not chosen"].query("reason not in ['dead', 'too few contexts']").feature) == set(chosen)
    assert len(table) == len(made.features) and set(read_table(tmp_path / "examinations.parquet")["feature"].to_pylist()) <= set(chosen)
    whole = interpret(folder, cfg.model_copy(update={"features": "all"}), 0, CLOSED, tmp_path / "all").set_index("feature")
    kept = table.set_index("feature").loc[chosen]
    assert (kept.explanation == whole.loc[chosen].explanation).all() and np.allclose(kept.f1, whole.loc[chosen].f1)   # as if all had been
    said = interpretation_summary(table)
    assert (said["asked"], said["interpreter"], said["model"], said["protocol"]) == (4, "lexical", "", "paper")


def test_the_estimate_counts_what_was_chosen(few, folder):
    cfg = config(features="sample:2")
    chosen, every = checked_estimate(Exemplars(folder), cfg), checked_estimate(Exemplars(folder), config())
    assert chosen["features"] == chosen["explain"] == 2 < every["features"] and chosen["tokens_in"] < every["tokens_in"]
    assert estimate_cost(planned_exemplars(500, ExemplarsConfig())[0], cfg)["features"] == 2


def test_one_feature_is_read_by_itself(folder):
    made = Exemplars(folder)
    for f in list(made.contexts())[:3]:
        alone = made[f.feature]
        assert [vars(a) for a in alone.active] == [vars(a) for a in f.active] and (alone.truth == f.truth).all()
        assert alone.marks == f.marks and alone.peaks == f.peaks and len(f.peaks) == f.truth.sum() and min(f.peaks) > 0
    with pytest.raises(UserError, match="has no feature 9999; it has features 0 to"): made[9999]
    with pytest.raises(UserError, match=f"feature {NEVER} has no contexts \\(dead\\)"): made[NEVER]


def test_the_record_gives_every_score_again(near, tmp_path):
    """F1, the control's F1 and the false positive rates of each source are those of the answers that were kept."""
    table = interpret(near, InterpretationConfig(protocol="saerad", bootstrap=10), 0, CLOSED, tmp_path).set_index("feature")
    record = read_table(tmp_path / "examinations.parquet").to_pandas()
    assert set(record.feature) == set(table[table.status == "scored"].index)
    assert (record.groupby("feature").row.diff().dropna() >= 0).all()
    for f, rows in record.groupby("feature"):
        plain = rows[rows.source.isin(["firing", "random"])]
        assert np.isclose(table.f1[f], f1_score(plain.truth, plain.answer == 1))
        control = plain[plain.answer_shuffled.notna()]
        if len(control) and not np.isnan(table.shuffled_f1[f]):
            assert np.isclose(table.shuffled_f1[f], f1_score(control.truth, control.answer_shuffled == 1))
        for source in table.by_source[f]:
            assert np.isclose(source["false_positive_rate"], (rows[rows.source == source["source"]].answer == 1).mean())
        assert (rows[rows.truth].activation > 0).all() and (rows[~rows.truth].activation == 0).all()
