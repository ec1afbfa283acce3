"""Real servers as they are: fields that they refuse, one slot, short contexts, answers cut off, outages; and a model that copies."""
import json
import os
import random
import re
import signal
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from nursery import nursery
from word_server import WordServer, answer, completion, logprobs
from word_world import MIXED, WORDS, make_sae, make_store

from saerad.core import UserError, read_table, write_table
from saerad.interpretation.endpoint import (
    COPIED,
    CUT_OFF,
    ENDPOINT_FAILED,
    TOO_LONG,
    CallFailed,
    Endpoint,
    EndpointConfig,
    Lanes,
    Ledger,
    TooLong,
    can_replay,
    check_endpoint_answers,
    dressed,
    rooms,
    schema_of,
)
from saerad.interpretation.exemplars import Context, Example, ExemplarsConfig, FeatureContexts, collect_exemplars
from saerad.interpretation.interpret import HABIT, InterpretationConfig, LanguageModel, check_answered, interpret, protocol_of, replay_note
from saerad.interpretation.replies import parse_list

OPEN = SimpleNamespace(may_leave=True)


@pytest.fixture(autouse=True)
def no_key(monkeypatch): monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def endpoint(server, path, kind=EndpointConfig, said=None, **changes):
    """An endpoint at a server, with a ledger of its own."""
    fields = {"base_url": server.url, "model": "words", "requests_per_second": 1000.0, "timeout_s": 20.0, **changes}
    return Endpoint(kind(**fields), Ledger(path), True, (said if said is not None else []).append)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Exemplars of three features."""
    base = tmp_path_factory.mktemp("world")
    cfg = ExemplarsConfig(min_explain=5, min_score=5, score_active=20, score_silent=20)
    collect_exemplars(make_store(base / "store"), make_sae(), cfg, 0, base / "e")
    features = read_table(base / "e/features.parquet")
    kept = pc.is_in(features["feature"], pa.array([WORDS.index("effusion"), WORDS.index("normal"), MIXED]))
    at = features.schema.get_field_index("status")
    write_table(base / "e/features.parquet", features.set_column(at, "status", pc.if_else(kept, features["status"], "dead")))
    return base / "e"


def question(i=0):
    return [{"role": "system", "content": "Decide."}, {"role": "user", "content": f"Description: fluid\nExcerpts:\n1. fluid {i}\n2. x"}]


def context(text, row=0): return Context(row, tuple(f" {w}" for w in text.split()), "findings", "", 0)


def feature(active=4, silent=6, length=5):
    """A feature that fires on the word fluid."""
    words, row = (" fluid", *(" word",) * (length - 1)), iter(range(1000))
    fires = [Example(next(row), words, "findings", "", 0, (1.0, *(0.0,) * (length - 1)), 0) for _ in range(active)]
    rest = [context("air" + "".join(words[1:]), next(row)) for _ in range(silent)]
    return FeatureContexts(0, 0.1, tuple(fires), tuple(rest), (*(context("".join(words), next(row)) for _ in range(6)), *rest[:6]),
                           np.arange(12) < 6, ())


# fields that a server does not know

COMPLAINTS = {"openai": lambda f: {"error": {"message": f"Unsupported parameter: '{f}' is not supported with this model.", "code": "unsupported"}},
              "fastapi": lambda f: {"detail": [{"loc": ["body", f], "msg": "Extra inputs are not permitted", "type": "extra_forbidden"}]},
              "plain": lambda f: {"detail": f"{f}: unknown field"}, "llama": lambda f: {"error": {"code": 501, "message": f"{f} is not implemented"}}}


@pytest.mark.parametrize(("status", "words"), [(400, "openai"), (404, "plain"), (422, "fastapi"), (500, "plain"), (501, "llama")])
@pytest.mark.parametrize("field", ["response_format", "seed", "temperature", "max_tokens", "logprobs"])
def test_a_field_that_is_refused_is_left_out_said_once_and_remembered(tmp_path, field, status, words):
    def trouble(number, body): return (status, {}, json.dumps(COMPLAINTS[words](field))) if field in body else None
    said, settings = [], {"seed": 3, "structured": True}
    schema = schema_of("active", {"type": "array"}, 2)
    with WordServer(trouble) as server:
        first = endpoint(server, tmp_path / "l", said=said, **settings)
        replies = [first.ask(question(i), 60, schema, sure=True) for i in range(3)]
        assert all(parse_list(r.text, 2) == [True, False] for r in replies) and len(server.bodies) == 4 and len(said) == 1 and field in said[0]
        if field == "max_tokens": assert server.bodies[-1]["max_completion_tokens"] == 60
        again = endpoint(server, tmp_path / "l", said=said, **settings)
        assert again.ask(question(0), 60, schema, sure=True) == replies[0] and len(server.bodies) == 4       # from the ledger
        again.ask(question(9), 60, schema, sure=True)
        assert len(server.bodies) == 5 and len(said) == 1 and field not in server.bodies[-1]


@pytest.mark.parametrize("status", [400, 422, 500, 501])
def test_a_complaint_that_names_nothing_is_answered_by_leaving_extras_out(tmp_path, status):
    with WordServer(lambda number, body: (status, {}, "nope") if "response_format" in body else None) as server:
        one = endpoint(server, tmp_path / "l", structured=True)
        one.stopping.wait = lambda seconds: None
        assert one.ask(question(), 60, schema_of("active", {"type": "array"}, 2), sure=True).text == "[1, 0]"
        assert one.without == {"response_format"} and "logprobs" in server.bodies[-1]


def test_a_fault_that_passes_costs_no_field(tmp_path):
    with WordServer(lambda number, body: (500, {}, "oops") if number in (1, 2, 3) else None) as server:
        one = endpoint(server, tmp_path / "l", structured=True)
        one.stopping.wait = lambda seconds: None
        for i in range(2): one.ask(question(i), 60, schema_of("active", {"type": "array"}, 2), sure=True)
        assert not one.without and len(server.bodies) == 5


def test_a_schema_without_numbers_of_items_is_better_than_none():
    schema = schema_of("active", {"type": "array"}, 5)
    sent = dressed({"response_format": schema}, {"item counts"})
    assert "minItems" not in json.dumps(sent) and "minItems" in json.dumps(schema)


# wrong settings

@pytest.mark.parametrize(("changes", "models", "status", "body", "words"), [
    ({"base_url": "cut"}, ["words"], 404, {"detail": "Not Found"}, r"set interpretation.base_url to http://127.0.0.1:\d+/v1\."),
    ({"model": "wrods"}, ["words", "other"], 404, {"error": {"message": "none"}}, "no model 'wrods', but words, other; correct interpretation.model"),
    ({}, ["words"], 404, {"detail": "Not Found"}, "answers no chat there .HTTP 404: Not Found."),
    ({}, ["words"], 401, {"detail": "bad key"}, "refuses the key in OPENAI_API_KEY"),
    ({}, ["words"], 422, {"detail": [{"loc": ["body", "messages"], "msg": "odd"}]}, "HTTP 422: body.messages: odd")])
def test_a_wrong_setting_is_named_in_one_sentence(tmp_path, changes, models, status, body, words):
    with WordServer(lambda number, _: (status, {}, json.dumps(body)), models=models) as server:
        if changes.get("base_url"): changes = {"base_url": server.url.removesuffix("/v1")}
        with pytest.raises(UserError, match=words) as told: endpoint(server, tmp_path / "l", **changes).ask(question(), 60)
    assert str(told.value).endswith(".") and "\n" not in str(told.value) and len(server.bodies) == 1


def test_an_endpoint_is_looked_at_before_work_starts(monkeypatch):
    with WordServer(models=["words"]) as server:
        check_endpoint_answers(EndpointConfig(base_url=server.url))
        with pytest.raises(UserError, match=f"set interpretation.base_url to {server.url}"):
            check_endpoint_answers(EndpointConfig(base_url=server.url.removesuffix("/v1")))
        assert not server.bodies
    with pytest.raises(UserError, match="does not answer"): check_endpoint_answers(EndpointConfig(base_url="http://127.0.0.1:9/v1"))


@pytest.mark.parametrize("address", ["http://127.0.0.1:99999/v1", "http://127.0.0.1:port/v1", "http://[::1/v1", "http:///v1", "127.0.0.1:8000/v1"])
def test_an_address_that_is_none_is_named(address, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with pytest.raises(UserError, match="give an address such as"): check_endpoint_answers(EndpointConfig(base_url=address))


# one slot

def test_one_slot_is_kept_busy_and_nothing_times_out(tmp_path):
    """As with ten seconds an answer and sixty of patience, a hundred times as fast."""
    with WordServer(latency=0.1, slots=1) as server:
        one = endpoint(server, tmp_path / "l", timeout_s=0.6, concurrency=32, requests_per_second=None)
        with ThreadPoolExecutor(32) as pool: list(pool.map(lambda i: one.ask(question(i), 60), range(30)))
        spans = sorted(server.worked)
    busy = sum(end - begin for begin, end in spans) / (spans[-1][1] - spans[0][0])
    assert len(server.bodies) == len(spans) == 30 and busy > 0.9, busy
    settled = one.lanes.before[0] if one.lanes.before else one.lanes.open      # the last answer may come while twice as many are tried
    assert settled <= 8


def test_a_server_for_everybody_is_used_to_the_full():
    now = [0.0]
    lanes = Lanes(32, clock=lambda: now[0])
    while now[0] < 10:      # whoever asks is answered after a second
        while lanes.busy < lanes.open: lanes.enter()
        now[0] += 1
        for _ in range(lanes.busy): lanes.leave(1.0, 500)
    assert lanes.open == 32


def test_lanes_are_no_limit_below_the_pace():
    """A pace of fifty calls a second and answers after 0.3 s need fifteen lanes, wherever the beginning ended."""
    now = [0.0]
    lanes, sent = Lanes(32, clock=lambda: now[0]), deque()
    lanes.eager, lanes.open, start = False, 3, 0.0
    while now[0] < 20:
        while lanes.busy < lanes.open:
            lanes.enter()
            start = max(now[0], start + 1 / 50)
            sent.append(start + 0.3)
        now[0] = max(now[0], sent.popleft())
        lanes.leave(0.3, 500, 50.0)
    assert lanes.open >= 16


def test_patience_grows_with_the_question_the_server_and_the_queue():
    lanes = Lanes(32)
    assert lanes.patience(3000, 60.0) == 60 + 200 and lanes.patience(150, 60.0) == 70      # before the first answer
    lanes.enter()
    lanes.leave(30.0, 3000)
    assert lanes.patience(3000, 60.0) >= 60 + 4 * 30
    before = lanes.open
    lanes.fewer()
    assert lanes.open == max(1, before // 2)


def test_a_time_out_waits_longer_the_next_time(tmp_path):
    waits = []
    def late(number, body):
        waits.append(number)
        if number < 2: time.sleep(0.5 if number else 0.3)
    with WordServer(late) as server:
        one = endpoint(server, tmp_path / "l", timeout_s=0.2)
        one.lanes.cost = 1e-9
        assert one.ask(question(), 60).text == "[1, 0]"
    assert len(waits) == 3 and one.asked == 3


# short contexts

def short(limit):
    """A server whose model has room for so many characters."""
    words = {"error": {"code": 400, "message": "the request exceeds the available context size, try increasing it"}}
    return lambda number, body: (400, {}, json.dumps(words)) if sum(len(m["content"]) for m in body["messages"]) > limit else None


def model(server, path, **changes): return LanguageModel(endpoint(server, path, InterpretationConfig, interpreter="openai", **changes),
                                                         InterpretationConfig(interpreter="openai", **changes))


def test_a_long_prompt_is_asked_with_fewer_examples(tmp_path):
    one, troubles = feature(active=16, silent=16, length=40), Counter()
    with WordServer(short(2500)) as server:
        asked = model(server, tmp_path / "l")
        said = asked.explain(one)
        assert said.text == "fluid" and not said.trouble
        assert asked.detect(said, one.scoring, troubles) == [True] * 6 + [False] * 6 and not troubles
        count = len(server.bodies)
        assert model(server, tmp_path / "l").explain(one) == said and len(server.bodies) == count      # what was too long is not tried again
        with pytest.raises(TooLong): asked.endpoint.ask([{"role": "user", "content": "x" * 3000}], 5)
    assert protocol_of(InterpretationConfig()).active == 25


@pytest.mark.parametrize(("status", "body"), [
    (400, {"error": {"message": "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens."}}),
    (400, {"error": {"message": "Please lower it.", "code": "context_length_exceeded"}}),
    (400, {"error": {"message": "Please reduce the length of the messages or completion."}}),
    (400, {"error": {"message": "The input token count (40000) exceeds the maximum number of tokens allowed (32768)."}}),
    (400, {"error": "Requested tokens (5000) exceed context window of 4096"}),
    (413, {"error": {"message": "Request too large for model"}}),
    (422, {"error": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096. Given: 5000 `inputs` tokens"}),
    (500, {"error": {"message": "prompt is too long: 5000 tokens > 4096"}})])
def test_servers_have_many_words_for_too_long(tmp_path, status, body):
    """Those of OpenAI, Azure, Groq, Gemini, llama-cpp-python, a proxy, text-generation-inference and Anthropic."""
    with WordServer(lambda number, _: (status, {}, json.dumps(body))) as server:
        one = endpoint(server, tmp_path / "l")
        with pytest.raises(TooLong): one.ask(question(), 60)
        assert len(server.bodies) == 1 and not one.without


def test_a_prompt_that_never_fits_is_that_features_problem(tmp_path):
    one, troubles = feature(), Counter()
    with WordServer(short(10)) as server:
        asked = model(server, tmp_path / "l")
        assert asked.explain(one).trouble == TOO_LONG
        assert asked.detect(SimpleNamespace(text="fluid"), one.scoring, troubles) == [None] * 12 and set(troubles) == {TOO_LONG}


# answers that are cut off

def thinks(number, body):
    """A model that needs three hundred tokens before it answers."""
    if body["max_tokens"] < 300: return 200, {}, completion("<think>Let me see. [1, 1]", finish_reason="length", usage=50)
    return 200, {}, completion("<think>Let me see. [1, 1]</think>" + answer(body))


def rows(path, table="calls"):
    ledger = Ledger(path)
    found = [(key, json.loads(reply)) for key, _, reply in ledger.db.execute(f"SELECT * FROM {table}")]
    ledger.close()
    return found


def ask_list(one, i=0): return one.ask_for(question(i), lambda t: parse_list(t, 2), "Answer with a list of 2 numbers.", 60)


def test_an_answer_that_was_cut_off_is_asked_for_with_more_room(tmp_path):
    with WordServer(thinks) as server:
        one = endpoint(server, tmp_path / "l")
        assert [ask_list(one, i).value for i in range(3)] == [[True, False]] * 3
        assert [b["max_tokens"] for b in server.bodies] == [60, 480, 480, 480]       # once it is known to think, it gets the room at once
        assert one.spent == 0 and Ledger(tmp_path / "l").tokens().tokens_in >= 50     # the reply that was cut off was paid for
        assert all(not reply.get("cut") for _, reply in rows(tmp_path / "l")) and len(rows(tmp_path / "l")) == 3
        again = endpoint(server, tmp_path / "l")
        assert [ask_list(again, i).value for i in range(3)] == [[True, False]] * 3 and len(server.bodies) == 4


def test_the_most_room_is_a_setting_and_what_is_cut_off_then_is_named_so(tmp_path):
    with WordServer(thinks) as server:
        one = endpoint(server, tmp_path / "l", most_tokens=200)
        assert ask_list(one) == ask_list(one) and ask_list(one).why == CUT_OFF and [b["max_tokens"] for b in server.bodies] == [60, 200]
        assert not rows(tmp_path / "l")
        assert ask_list(endpoint(server, tmp_path / "l", most_tokens=400)).value == [True, False]       # more room, and it is asked again
    assert rooms(60, 4096) == [60, 480, 4096] and rooms(3000, 4096) == [3000]


def test_a_model_that_writes_on_after_its_answer_is_stopped_once_and_then_believed(tmp_path):
    with WordServer(lambda number, body: (200, {}, completion(answer(body) + " and so on" * 9, finish_reason="length"))) as server:
        one = endpoint(server, tmp_path / "l")
        assert [ask_list(one, i).value for i in range(3)] == [[True, False]] * 3
        assert [b["max_tokens"] for b in server.bodies] == [60, 480, 60, 60] and not rows(tmp_path / "l")
        assert ask_list(endpoint(server, tmp_path / "l"), 2).value == [True, False] and len(server.bodies) == 4


def test_a_draft_in_the_thoughts_is_no_answer(tmp_path):
    """The server keeps thoughts apart, and the model's first guess is wrong."""
    def drafts(number, body):
        thought = "First I would say [1, 1]. But then"
        if body["max_tokens"] < 1000: return 200, {}, completion(None, reasoning_content=thought, finish_reason="length")
        return 200, {}, completion(answer(body), reasoning_content=thought)
    with WordServer(drafts) as server:
        one = endpoint(server, tmp_path / "l")
        assert [ask_list(one, i).value for i in range(3)] == [[True, False]] * 3 and not one.goes_on
        assert [b["max_tokens"] for b in server.bodies] == [60, 480, 4096, 4096, 4096]


@pytest.mark.parametrize("message", [{"text": [{"type": "text", "text": "[1, 0]"}]}, {"text": None, "reasoning_content": "<think>So [1, 0]"},
                                     {"text": "", "reasoning": "So it is [1, 0]."}, {"text": "Hm.</think>```json\n[1, 0]\n```", "tool_calls": []}])
def test_replies_in_every_dress_come_through_the_client(tmp_path, message):
    with WordServer(lambda number, body: (200, {}, completion(message["text"], **{k: v for k, v in message.items() if k != "text"}))) as server:
        assert ask_list(endpoint(server, tmp_path / "l")).value == [True, False] and len(server.bodies) == 1


def test_an_empty_reply_is_asked_for_again_in_the_same_turn(tmp_path):
    with WordServer(lambda number, body: (200, {}, completion(None if number == 0 else "[1, 0]"))) as server:
        assert ask_list(endpoint(server, tmp_path / "l")).value == [True, False]
    again = server.bodies[1]["messages"]
    assert [m["role"] for m in again] == ["system", "user"] and "could not be read" in again[1]["content"]


def test_a_repair_answered_literally_is_no_answer(tmp_path):
    def parrot(number, body): return 200, {}, completion(body["messages"][-1]["content"] if len(body["messages"]) > 2 else "Hm.")
    with WordServer(parrot) as server:
        asked, troubles = model(server, tmp_path / "l"), Counter()
        assert asked.explain(feature()).trouble == "parse failure"
        assert set(asked.detect(SimpleNamespace(text="x"), feature().scoring, troubles)) == {None} and set(troubles) == {"parse failure"}


# a model that copies, one with a habit, one that is sure

def test_an_example_that_is_copied_is_flagged_and_not_scored(tmp_path):
    own = tmp_path / "mine.yaml"
    own.write_text("explain_prompt: explain-paper-1\ndetect_prompt: mine-1\ncontexts_per_prompt: 6\n", encoding="utf-8")
    (tmp_path / "mine-1.txt").write_text("Answer with {count} numbers, for example [1, 0, 1, 0, 1, 0].", encoding="utf-8")
    def copies(number, body): return 200, {}, completion("[1, 0, 1, 0, 1, 0]")
    with WordServer(copies) as server:
        troubles = Counter()
        said = model(server, tmp_path / "l", protocol=str(own)).detect(SimpleNamespace(text="x"), feature().scoring, troubles)
    assert set(said) == {None} and set(troubles) == {COPIED}


def test_the_same_list_in_every_prompt_is_flagged_and_not_scored(tmp_path):
    contexts = [context("fluid", i) for i in range(40)]
    for text, kept in (("[1, 0, 1, 0, 1]", None), ("[0, 0, 0, 0, 0]", False)):
        with WordServer(lambda number, body, text=text: (200, {}, completion(text))) as server:
            troubles = Counter()
            assert set(model(server, tmp_path / str(kept)).detect(SimpleNamespace(text="x"), contexts, troubles)) == {kept}
            assert bool(troubles[HABIT]) == (kept is None)


def test_probabilities_stand_beside_the_answers_where_they_are_offered(tmp_path):
    def sure(number, body):
        assert body["logprobs"] is True
        return 200, {}, completion(answer(body), logprobs=logprobs(answer(body), 0.75))
    with WordServer(sure) as server:
        asked = model(server, tmp_path / "l")
        said = asked.detect(SimpleNamespace(text="fluid"), feature().scoring, Counter())
        assert said.probabilities == [0.75] * 6 + [0.25] * 6
        again = model(server, tmp_path / "l").detect(SimpleNamespace(text="fluid"), feature().scoring, Counter())
        assert again.probabilities == said.probabilities and len(server.bodies) == 3            # the ledger keeps them
    with WordServer() as server:
        assert model(server, tmp_path / "m").detect(SimpleNamespace(text="fluid"), feature().scoring, Counter()).probabilities is None
        assert model(server, tmp_path / "n", probabilities=False).detect(SimpleNamespace(text="fluid"), feature().scoring, Counter())
        assert "logprobs" not in server.bodies[-1]


# outages

def test_features_that_an_endpoint_failed_leave_the_stage_unfinished():
    ended = [{"reason": "0 of 20 contexts answered (endpoint: time-out)"}, {"reason": "no explanation: endpoint: HTTP 500"}, {"reason": ""}, {}]
    cfg = InterpretationConfig(base_url="http://127.0.0.1:9/v1")
    with pytest.raises(UserError, match=r"failed \(time-out\), so 2 features have no score; run again"): check_answered(ended, cfg)
    check_answered(ended, cfg.model_copy(update={"max_failed": 0.5}))
    check_answered([{"reason": "0 of 20 contexts answered (parse failure)"}], cfg)


def test_an_endpoint_that_breaks_down_is_asked_for_the_rest_by_the_next_run(world, tmp_path):
    """One server, which fails for good after 20 answers and is mended later."""
    with WordServer(lambda number, body: (500, {}, "out of memory") if number >= 20 else None) as server:
        cfg = InterpretationConfig(interpreter="openai", base_url=server.url, model="words", attempts=1, requests_per_second=1000.0, bootstrap=20)
        (tmp_path / "interpretations.parquet").write_bytes(b"what was there before")
        with pytest.raises(UserError, match=r"out of memory|HTTP 500"): interpret(world, cfg, 0, OPEN, tmp_path)
        assert (tmp_path / "interpretations.parquet").read_bytes() == b"what was there before" and len(rows(tmp_path / "ledger.sqlite")) == 20
        assert not can_replay(tmp_path / "ledger.sqlite", replay_note(cfg))
        asked, server.trouble = len(server.bodies), lambda number, body: None
        table = interpret(world, cfg, 0, OPEN, tmp_path)
        assert (table.status == "scored").sum() == 3 and can_replay(tmp_path / "ledger.sqlite", replay_note(cfg))
        before = {json.dumps(b, sort_keys=True) for b in server.bodies[:20]}
        assert not before & {json.dumps(b, sort_keys=True) for b in server.bodies[asked:]}
    assert read_table(tmp_path / "interpretations.parquet").num_rows == len(table)


def test_a_ledger_that_lacks_an_answer_is_no_replay(world, tmp_path):
    """Every other question about one feature fails, which costs it the score, then a single one, which does not, then none."""
    def fails(which):
        seen = []
        def trouble(number, body):
            if "Description: effusion" not in body["messages"][1]["content"]: return None
            seen.append(number)
            return (500, {}, "oops") if which(len(seen)) else None
        return trouble
    with WordServer(fails(lambda n: n % 2)) as server:
        cfg = InterpretationConfig(interpreter="openai", base_url=server.url, model="words", attempts=1, requests_per_second=1000.0, bootstrap=20,
                                   shuffled=False, concurrency=1, min_answered=0.6)
        with pytest.raises(UserError, match="1 features have no score"): interpret(world, cfg, 0, OPEN, tmp_path)
        assert not can_replay(tmp_path / "ledger.sqlite", replay_note(cfg))
        server.trouble = fails(lambda n: n == 1)
        table = interpret(world, cfg, 0, OPEN, tmp_path)
        assert (table.status == "scored").sum() == 3 and not can_replay(tmp_path / "ledger.sqlite", replay_note(cfg))
        server.trouble = lambda number, body: None
        interpret(world, cfg, 0, OPEN, tmp_path)
        assert can_replay(tmp_path / "ledger.sqlite", replay_note(cfg))


def test_a_server_that_has_gone_stops_the_run_soon(tmp_path):
    with WordServer(lambda number, body: "drop" if number >= 3 else None) as server:
        one = endpoint(server, tmp_path / "l", attempts=2)
        one.stopping.wait = lambda seconds: None
        with pytest.raises(UserError, match="has stopped answering .connection lost."):
            for i in range(40):
                try: one.ask(question(i), 60)
                except CallFailed as e: assert str(e) == ENDPOINT_FAILED + "connection lost"
        assert len(server.bodies) < 40


def test_an_empty_ledger_is_no_replay(tmp_path):
    (tmp_path / "l").touch()
    assert not can_replay(tmp_path / "l", "x") and not can_replay(tmp_path / "absent", "x")
    Ledger(tmp_path / "m").close()
    assert not can_replay(tmp_path / "m", "x")


def test_it_is_said_how_long_the_rest_takes(tmp_path):
    said = []
    with WordServer(latency=0.01) as server:
        for i in range(25): endpoint(server, tmp_path / "l").ask(question(100 + i), 60)      # another run's answers, of which this one needs five
        one = endpoint(server, tmp_path / "l", said=said)
        one.expected = 1_000_005
        for i in (*range(100, 105), *range(21)): one.ask(question(i), 60)
    assert len(said) == 1 and re.search(r"at the pace of the first 20 answers the other 999,980 take about \d+\.\d hours", said[0])


FORKED = """
from types import SimpleNamespace
from saerad.interpretation.endpoint import Endpoint, EndpointConfig, Ledger, stoppable
from saerad.interpretation.interpret import InterpretationConfig, interpret

def ask(url, ledger):
    endpoint = Endpoint(EndpointConfig(base_url=url, model="words"), Ledger(ledger), True)
    def one(i): return endpoint.ask([{"role": "system", "content": ""}, {"role": "user", "content": f"Description: x\\nExcerpts:\\n1. {i}"}], 5)
    with stoppable(endpoint):
        try: list(endpoint.pool.map(one, range(99)))
        finally: endpoint.close()

def run(exemplars, config, out):
    interpret(exemplars, InterpretationConfig.model_validate_json(config), 0, SimpleNamespace(may_leave=True), out)

def do(name, *arguments): {"ask": ask, "run": run}[name](*arguments)
"""


@pytest.fixture(scope="module")
def forks():
    """`do`, in as many processes as are wanted."""
    with nursery(FORKED, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}) as forks: yield forks


def wait(condition):
    until = time.monotonic() + 60
    while not condition() and time.monotonic() < until: time.sleep(0.002)


def known(ledger):
    """The requests whose answers are in a ledger."""
    if not ledger.exists(): return set()
    book = Ledger(ledger)
    asked = {row[0] for row in book.db.execute("SELECT request FROM calls")}
    book.close()
    return asked


def test_killed_ten_times_no_answer_is_paid_for_again_and_the_end_is_the_same(forks, world, tmp_path):
    def config(server): return InterpretationConfig(interpreter="openai", base_url=server.url, model="words", concurrency=3, bootstrap=20)
    with WordServer() as calm: whole = interpret(world, config(calm), 0, OPEN, tmp_path / "whole")
    calls, out, killed = len(calm.bodies), tmp_path / "cut", 0
    with WordServer(latency=0.01) as server:
        cfg = config(server)
        for i in range(10):
            before, asked = known(out / "ledger.sqlite"), len(server.bodies)
            [child] = forks.start("run", world, cfg.model_dump_json(), out, errors=tmp_path / "errors")
            wait(lambda most=asked + random.Random(i).randint(1, calls // 12): len(server.bodies) >= most)
            os.kill(child, signal.SIGKILL)
            killed += forks.end() == [-signal.SIGKILL]
            assert not [b for b in server.bodies[asked:] if json.dumps(b, ensure_ascii=False, sort_keys=True) in before]
        assert killed == 10
        again = interpret(world, cfg, 0, OPEN, out)
        asked = len(server.bodies)
        assert calls <= asked <= calls + 10 * cfg.concurrency       # at most what was under way at each kill
        interpret(world, cfg, 0, OPEN, out)
        assert len(server.bodies) == asked
    assert again.drop(columns="by_source").equals(whole.drop(columns="by_source"))


def test_ctrl_c_says_what_it_waits_for_and_a_second_one_stops(forks, tmp_path):
    errors = tmp_path / "errors"
    with WordServer(latency=30.0) as server:
        [child] = forks.start("ask", server.url, tmp_path / "l", errors=errors)
        wait(lambda: len(server.bodies) >= 2)
        os.kill(child, signal.SIGINT)
        wait(lambda: errors.read_text(encoding="utf-8").strip())
        said = errors.read_text(encoding="utf-8").strip()
        assert re.fullmatch(r"stopping: waiting for the answers to 2 calls under way, which are paid for, at most \d+ s; Ctrl-C again stops .*", said)
        time.sleep(0.3)         # it does wait
        began = time.monotonic()
        os.kill(child, signal.SIGINT)
        assert forks.end() == [130] and time.monotonic() - began < 10 and len(server.bodies) == 2


def test_ctrl_c_keeps_the_answers_under_way(forks, tmp_path):
    with WordServer(latency=0.5) as server:
        [child] = forks.start("ask", server.url, tmp_path / "l", errors=tmp_path / "errors")
        wait(lambda: len(server.bodies) >= 2)
        os.kill(child, signal.SIGINT)
        forks.end()
        assert len(known(tmp_path / "l")) == len(server.bodies) == 2
