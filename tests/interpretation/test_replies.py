"""The reader of replies: every shape of a right answer is read, no wrong one is, and nothing that is copied or always the same counts."""
import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from word_server import completion

from saerad.interpretation.endpoint import _reply
from saerad.interpretation.protocols import ASSETS, answer_form, fill_prompt
from saerad.interpretation.replies import (
    Answers,
    chances,
    is_copied,
    is_habit,
    json_objects,
    matching_chances,
    message_text,
    parse_explanation,
    parse_list,
    plain,
    without_thoughts,
)
from saerad.steering.judges import ASK, parse_verdict

SHAPES = json.loads((Path(__file__).parent / "shapes.json").read_text(encoding="utf-8"))
PARSE = {"list": lambda text: parse_list(text, 5), "explanation": parse_explanation, "verdict": parse_verdict}
MEANT = {"list": [True, False, True, False, False], "explanation": "pleural effusion of any size", "verdict": ("mixed", 1)}


def named(shape): return f"{shape['kind']}: {shape['shape']}"


@pytest.mark.parametrize("shape", [s for s in SHAPES if s["right"]], ids=named)
def test_every_shape_of_a_right_answer_is_read(shape):
    found = PARSE[shape["kind"]](shape["reply"])
    assert (found.rstrip(".") if isinstance(found, str) else found) == MEANT[shape["kind"]]


@pytest.mark.parametrize("shape", [s for s in SHAPES if not s["right"]], ids=named)
def test_no_wrong_answer_is_read(shape): assert PARSE[shape["kind"]](shape["reply"]) is None


def test_there_are_as_many_shapes_as_were_promised():
    assert sum(s["right"] for s in SHAPES) >= 55 and sum(not s["right"] for s in SHAPES) >= 20
    assert len({(s["kind"], s["reply"]) for s in SHAPES}) == len(SHAPES)


@pytest.mark.parametrize(("text", "count", "read"), [
    ("[1]", 1, [True]), ("[1] no", 1, None), ("Excerpt [1] is silent: [0]", 1, None), ("1. no", 1, [False]), ("yes", 1, [True]), ("1 0", 1, None),
    ("1. 1\n2. 0", 2, [True, False]), ("2. yes\n1. no", 2, [False, True]), ("[[1, 0]]", 2, [True, False]), ("[1, 0]\n[1, 0]", 2, [True, False]),
    ("[1.0, 0.0]", 2, [True, False]), ("1.0\n0.0", 2, [True, False]), ("{'1': 'yes', '2': 'no'}", 2, [True, False]), ('{"1": 1, "3": 0}', 2, None),
    ("[null, 1]", 2, None), ("10", 2, None), ("[10]", 2, None), ("[" * 5000, 2, None), ("[" * 5000 + "]" * 5000, 2, None),
    ("{[1]}", 1, [True]), ('{"²": 1}', 1, None), ("1" * 5000 + ": yes", 1, None)])
def test_lists_at_the_edge(text, count, read): assert parse_list(text, count) == read


@settings(max_examples=200, deadline=None)
@given(st.lists(st.booleans(), min_size=2, max_size=30),
       st.sampled_from(["[{}]", "{}", "Sure:\n[{}]\nDone.", '{{"active": [{}]}}', "<think>[1]</think>[{}]"]))
def test_any_list_comes_back(answers, form):
    assert parse_list(form.format(", ".join("01"[a] for a in answers)), len(answers)) == answers
    assert parse_list("\n".join(f"{i}. {'yes' if a else 'no'}" for i, a in enumerate(answers, 1)), len(answers)) == answers


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="[]{}01,:.\"' \nyesnoE<think>/", max_size=60), st.integers(1, 4))
def test_any_text_is_read_or_is_none(text, count):
    found = parse_list(text, count)
    assert found is None or (len(found) == count and set(found) <= {True, False})
    parse_explanation(text), parse_verdict(text), json_objects(text)


def test_thoughts_end_before_the_answer():
    assert without_thoughts("a</think>b<think>c") == "b" and plain("<|start|>`x`</s>") == "x"
    assert plain("<|channel|>analysis<|message|>hm [1, 1]<|end|><|start|>assistant<|channel|>final<|message|>[1, 0]<|return|>") == "[1, 0]"


@pytest.mark.parametrize(("message", "text"), [
    ({"content": "[1]"}, "[1]"), ({"content": [{"type": "text", "text": "[1, "}, {"type": "text", "text": "0]"}]}, "[1, 0]"),
    ({"content": None, "reasoning_content": "<think>so [1]"}, "so [1]"), ({"content": "", "reasoning": "so [1]"}, "so [1]"),
    ({"content": "[0]", "reasoning_content": "perhaps [1]"}, "[0]"), ({"content": None}, ""), ({"content": [{"type": "image_url"}]}, "")])
def test_the_text_of_a_message_wherever_it_stands(message, text):
    assert message_text(SimpleNamespace(**message)) == text


def test_cut_off_refused_and_empty_are_three_things():
    def reply(*args, **more): return _reply(json.loads(completion(*args, **more), object_hook=lambda fields: SimpleNamespace(**fields)))
    assert reply("so", finish_reason="length").cut and not reply("so", finish_reason="length").refusal
    assert reply(None, refusal="I cannot").refusal == "I cannot" and reply("", finish_reason="content_filter").refusal == "content filter"
    empty = reply(None)
    assert (empty.text, empty.refusal, empty.cut) == ("", "", False)
    assert reply(None, reasoning_content="so [1]").text == "so [1]"


PROMPTS = ["detect-paper-2", "detect-saerad-2", "fuzz-2"]


@pytest.mark.parametrize("count", [1, 2, 5, 25])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_no_prompt_holds_an_answer(prompt, count):
    told = fill_prompt(prompt, ASSETS, count=count, example=answer_form(count))
    assert parse_list(told, count) is None and parse_list(answer_form(count), count) is None


@pytest.mark.parametrize(("line", "read"), [
    ("sign-offs such as thank you for the referral", "sign-offs such as thank you for the referral"), ("fluid. Thank you!", "fluid."),
    ("the blank ___ of a name", "the blank ___ of a name"), ("'normal' and 'clear'", "'normal' and 'clear'"), ("Thanks!", None)])
def test_words_of_an_explanation_are_not_taken_for_its_dress(line, read): assert parse_explanation(f"[EXPLANATION]: {line}") == read


def test_a_verdict_and_an_explanation_cannot_be_copied():
    assert parse_verdict(ASK) is None and parse_verdict(ASK.splitlines()[-1]) is None
    told = fill_prompt("explain-paper-1", ASSETS, scale=10)
    for dress in ("Your sentence", "<your sentence>", "your sentence.", "[your sentence]"):
        assert is_copied(parse_explanation(f"[EXPLANATION]: {dress}"), told, parse_explanation)
    assert not is_copied("fluid", told, parse_explanation)
    assert is_copied([True, False], "Answer like this: [1, 0].", lambda t: parse_list(t, 2))


def test_a_habit_is_what_chance_does_not_do():
    same = [True, False, True, False, True]
    assert not is_habit([same] * 2) and not is_habit([same] * 4) and is_habit([same] * 6) and is_habit([same] * 40 + [[True]])
    assert not is_habit([[True] * 5] * 40) and not is_habit([[False] * 25] * 4) and not is_habit([same] * 20 + [[False] * 5])
    draw = random.Random(0)     # a reader that is always right, on contexts in a random order
    def shuffled(): return draw.sample([True] * 2 + [False] * 3, 5)
    assert not any(is_habit([shuffled() for _ in range(6)]) for _ in range(2000))
    assert is_habit([[True, False] * 1000] * 3)


def token(text, **options):
    top = [SimpleNamespace(token=t, logprob=math.log(p)) for t, p in options.pop("top", {text: 1.0}).items()]
    return SimpleNamespace(token=text, logprob=top[0].logprob, top_logprobs=top)


def test_chances_are_the_weight_of_yes_against_no():
    tokens = [token("["), token("1", top={"1": 0.6, "0": 0.2, "2": 0.2}), token(", "), token("0", top={"0": 0.5, " 0": 0.25, "1": 0.25})]
    assert chances(tokens) == (0.75, 0.25) and chances(None) == ()
    assert chances([token("Yes", top={"Yes": 0.4, "yes": 0.2, "No": 0.2})]) == (0.75,)
    assert matching_chances((0.9, 0.75, 0.25), [True, False]) == [0.75, 0.25]       # the first one numbers a line
    assert matching_chances((0.75, 0.25), [False, True]) is None and matching_chances((0.75,), [True, False]) is None


def test_answers_carry_their_probabilities():
    assert Answers([True, None], [0.8, None]).probabilities == [0.8, None] and Answers([True], [None]).probabilities is None
    assert Answers([True]) == [True] and Answers([True]).probabilities is None
