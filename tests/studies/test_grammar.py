"""The phantom's language: exact on what it writes, forgiving of what it does not."""
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saerad.studies.findings import CHANGES, PHANTOM_KINDS, SEVERITIES, ZONES, Finding
from saerad.studies.grammar import (
    CONCEPTS,
    EMPTY_WORDS,
    FORMS,
    NEGATABLE,
    NORMAL,
    PHANTOM_ATTRIBUTES,
    concept_of,
    mark,
    name_finding,
    parse_report,
    random_findings,
    visual_concepts,
    write_findings,
    write_sections,
)


@st.composite
def studies(draw):
    """(findings, prior, projection, seed) of one study; a finding at most of a kind and side, attributes free."""
    prior = draw(st.sampled_from([None, (), (Finding("effusion", "left", severity="small"),)]))
    spots = [(k, s) for k in PHANTOM_KINDS for s in (("left", "right") if "side" in PHANTOM_ATTRIBUTES[k] else ("",))]
    findings = []
    for kind, side in draw(st.lists(st.sampled_from(spots), unique=True, max_size=10)):
        own = PHANTOM_ATTRIBUTES[kind]
        zone = draw(st.sampled_from(("", "upper", "lower") if kind == "endotracheal_tube" else ("", *ZONES))) if "zone" in own else ""
        severity = draw(st.sampled_from(("", *SEVERITIES))) if "severity" in own else ""
        change = draw(st.sampled_from(("", *CHANGES))) if prior is not None else ""
        certainty = draw(st.sampled_from(("present", "present", "uncertain"))) if change != "resolved" else "present"
        findings.append(Finding(kind, side, zone, severity, change, certainty))
    if prior is not None and any(not f.change for f in findings) and any(f.change for f in findings):
        findings = [f if f.change else replace(f, change="unchanged") for f in findings]   # against a prior, all or none have changes
    return findings, prior, draw(st.sampled_from(("AP", "PA", ""))), draw(st.integers(0, 2**32))


def denied(report):
    """Kinds whose absence the tags tell, without the reader's help."""
    tags = {c for w in report.words for c in w.concepts}
    named = {k for k in NEGATABLE if f"{concept_of(k)} absent" in tags}
    return named.union(*(kinds for concept, kinds, _ in NORMAL.values() if concept in tags))


@settings(max_examples=600, deadline=None)
@given(studies())
def test_round_trip(study):
    findings, prior, projection, seed = study
    report = write_sections(findings, prior, projection, np.random.default_rng(seed))["findings"]
    reading = parse_report(report.text)
    assert {f for f in reading.findings if f.certainty != "absent"} == set(findings), report.text
    assert all(f == Finding(f.kind, certainty="absent") for f in reading.findings if f.certainty == "absent")
    assert reading.kinds(["absent"]) == denied(report), report.text
    assert not reading.unread, report.text
    assert reading.kinds(["absent"]).isdisjoint(f.kind for f in findings), report.text
    assert 15 <= len(report.words) <= 75, report.text
    assert len(set(reading.findings)) == len(reading.findings)


@settings(max_examples=200, deadline=None)
@given(studies())
def test_every_word_is_tagged_and_tells_the_truth(study):
    findings, prior, projection, seed = study
    sections = write_sections(findings, prior, projection, np.random.default_rng(seed))
    assert list(sections) == ["indication", "technique", "comparison", "findings"]
    for section in sections.values():
        words = [section.text[w.start:w.end] for w in section.words]
        assert words == re.findall(r"[A-Za-z]+", section.text)
        assert len(words) == len(section.text.split())
        for word, tag in zip(words, section.words, strict=True):
            assert all(CONCEPTS[c].kind == "word" for c in tag.concepts)
            assert not (tag.concepts and word.lower() in EMPTY_WORDS)
    tags = {c for w in sections["findings"].words for c in w.concepts}
    kinds = {concept_of(k) for k in FORMS}
    assert tags & kinds == {concept_of(f.kind) for f in findings}
    assert tags & {"hedged"} == ({"hedged"} if any(f.certainty == "uncertain" for f in findings) else set())
    changes = {f.change for f in findings} - {""}
    assert changes <= tags and tags & set(CHANGES) <= changes | {"unchanged"}     # "the lungs remain clear"
    assert tags & set(SEVERITIES) == {f.severity for f in findings} - {""}


@settings(max_examples=100, deadline=None)
@given(studies())
def test_without_a_prior_there_is_no_comparison(study):
    findings, _, projection, seed = study
    sections = write_sections(findings, None, projection, np.random.default_rng(seed))
    tags = {c for section in sections.values() for w in section.words for c in w.concepts}
    assert tags.isdisjoint(CHANGES) and "comparison with a prior" not in tags and "has prior" not in tags and "no prior" in tags
    told = {f for f in parse_report(sections["findings"].text).findings if f.certainty != "absent"}
    assert told == {replace(f, change="") for f in findings if f.change != "resolved"}


def test_comparison_and_technique_agree_with_the_study():
    for seed in range(50):
        for prior in (None, []):
            sections = write_sections([], prior, "AP", np.random.default_rng(seed))
            assert "AP" in sections["technique"].text.split() and "PA" not in sections["technique"].text.split()
            assert sections["comparison"].text.startswith("No") == (prior is None)


def test_a_seed_fixes_the_words():
    findings = random_findings(np.random.default_rng(3), .3)
    one, two, other = (write_sections(findings, [], "PA", np.random.default_rng(s)) for s in (5, 5, 6))
    assert one == two and one != other


def test_bilateral_is_two_findings():
    both = Finding("effusion", "bilateral", severity="small")
    texts = [write_findings([both], None, np.random.default_rng(i)).text for i in range(40)]
    assert any("ilateral" in t for t in texts) and any("ilateral" not in t for t in texts)
    for text in texts:
        assert {f for f in parse_report(text).findings if f.certainty == "present"} == {replace(both, side=s) for s in ("left", "right")}


def test_absent_findings_are_the_writers_choice():
    text = write_findings([Finding("effusion", certainty="absent"), Finding("picc", "left")], None, np.random.default_rng(0)).text
    assert {f for f in parse_report(text).findings if f.certainty != "absent"} == {Finding("picc", "left")}


@pytest.mark.parametrize("change", ["", "new", "unchanged", "resolved"])
def test_a_misplaced_tube_is_never_called_well_placed(change):
    tube, wires = Finding("endotracheal_tube", zone="lower", change=change), Finding("sternotomy_wires", change=change)
    rng = np.random.default_rng(0)
    for i in range(400):
        report = write_findings([tube, wires][:1 + i % 2], [] if change else None, rng)
        for sentence in report.text.split(". "):
            assert not (re.search("ndotracheal|ET tube", sentence) and re.search("standard|good", sentence)), report.text
        assert "device too low" in {c for w in report.words for c in w.concepts}


def test_vocabulary_is_small_and_closed():
    rng, words, cased = np.random.default_rng(0), set(), set()
    for i in range(3000):
        findings = random_findings(rng, .15, i % 2 == 1)
        for section in write_sections(findings, [] if i % 2 else None, ("AP", "PA", "")[i % 3], rng).values():
            cased |= set(re.findall(r"[A-Za-z]+", section.text))
    words = {w.lower() for w in cased}
    assert len(words) < 300 and len(cased) < 400


def test_the_language_is_rich():
    rng = np.random.default_rng(0)
    effusion = Finding("effusion", "left", severity="small")
    reports = [write_findings([effusion], None, rng).text for _ in range(4000)]
    sentences = {sentence for report in reports for sentence in report.split(". ") if "left" in sentence.lower()}
    assert len(sentences) > 100


SAID = {
    "Small left effusion.": {Finding("effusion", "left", severity="small")},
    "small LEFT effusion": {Finding("effusion", "left", severity="small")},
    "There is a small left-sided pleural effusion, unchanged from the prior study.":
        {Finding("effusion", "left", severity="small", change="unchanged")},
    "Small left and moderate right pleural effusions": {Finding("effusion", "left", severity="small"),
                                                        Finding("effusion", "right", severity="moderate")},
    "Bilateral small pleural effusions are larger.": {Finding("effusion", s, severity="small", change="larger") for s in ("left", "right")},
    "Left effusion, small and new.": {Finding("effusion", "left", severity="small", change="new")},
    "There is no effusion, pneumothorax or focal consolidation.": {Finding(k, certainty="absent") for k in
                                                                   ("effusion", "pneumothorax", "consolidation")},
    "Small left effusion without pneumothorax.": {Finding("effusion", "left", severity="small"), Finding("pneumothorax", certainty="absent")},
    "Possible nodule in the right upper lobe.": {Finding("nodule", "right", "upper", certainty="uncertain")},
    "The effusion has increased while the left picc is unchanged": {Finding("effusion", change="larger"),
                                                                    Finding("picc", "left", change="unchanged")},
    "No residual left pneumothorax.": {Finding("pneumothorax", "left", change="resolved")},
    "The left effusion is no longer seen.": {Finding("effusion", "left", change="resolved")},
    "No significant change in the left effusion.": {Finding("effusion", "left", change="unchanged")},
    "The heart is not enlarged.": {Finding("cardiomegaly", certainty="absent")},
    "The endotracheal tube is in the right main bronchus.": {Finding("endotracheal_tube", zone="lower")},
    "Consolidation in the left lower lobe and right upper lobe.": {Finding("consolidation", "left", "lower"),
                                                                   Finding("consolidation", "right", "upper")},
    "small small left left effusion effusion": {Finding("effusion", "left", severity="small")},
    "Small left effusion No pneumothorax Left PICC": {Finding("effusion", "left", severity="small"),
                                                      Finding("pneumothorax", certainty="absent"), Finding("picc", "left")},
    "left effusion right nodule": {Finding("effusion", "left"), Finding("nodule", "right")},
    "Endotracheal": {Finding("endotracheal_tube")},
    "Small left effusion. Effusion. Left effusion.": {Finding("effusion", "left", severity="small")},
}


@pytest.mark.parametrize("text", SAID)
def test_reads(text):
    reading = parse_report(text)
    assert set(reading.findings) == SAID[text] and not reading.unread


@pytest.mark.parametrize("text, unread", [
    ("", ()), ("...", ()), (",,, and or.", (",,, and or",)), ("Banana. Small left effusion. The of.", ("Banana", "The of")),
    ("Left left left.", ("Left left left",)), ("The lungs are", ("The lungs are",)), ("Normal.", ("Normal",)), ("No. No.", ("No", "No")),
])
def test_tells_what_it_could_not_read(text, unread):
    assert parse_report(text).unread == unread


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.text(max_size=200), st.lists(st.sampled_from(sorted(
    {w for c in CONCEPTS.values() for n in c.names for w in n.split()} | {".", ",", "and", "or", "\n", "The", "A", "é", "7", "<pad>"})), max_size=40)
    .map(" ".join)))
def test_never_raises_and_says_no_more_when_said_twice(text):
    once, twice = parse_report(text), parse_report(f"{text}\n{text}")
    assert once.findings == twice.findings
    assert all(f.kind in PHANTOM_KINDS and f.side in ("", "left", "right") for f in once.findings)
    assert all(not getattr(f, a) for f in once.findings for a in ("side", "zone", "severity") if a not in PHANTOM_ATTRIBUTES[f.kind])


@settings(max_examples=150, deadline=None)
@given(studies())
def test_damage_that_loses_nothing(study):
    findings, prior, projection, seed = study
    text = write_sections(findings, prior, projection, np.random.default_rng(seed))["findings"].text
    whole = set(parse_report(text).findings)
    for damaged in (text.lower(), text.upper(), text.replace(". ", "\n"), f"{text} {text}", text.replace(" ", "  "), f"{text} Banana split",
                    re.sub(r"(\w+)", r"\1 \1", text)):
        assert set(parse_report(damaged).findings) == whole, damaged


def test_missing_full_stops_hardly_matter():
    rng, same = np.random.default_rng(0), []
    for i in range(400):
        text = write_findings(random_findings(rng, .15, i % 2 == 1), [] if i % 2 else None, rng).text
        same.append(set(parse_report(text).findings) == set(parse_report(text.replace(".", "")).findings))
    assert np.mean(same) > .98


@settings(max_examples=100, deadline=None)
@given(studies(), st.floats(0, 1))
def test_a_truncated_report_adds_no_kinds(study, share):
    findings, prior, projection, seed = study
    text = write_sections(findings, prior, projection, np.random.default_rng(seed))["findings"].text
    words = text.split()
    cut = " ".join(words[:int(share * len(words))])
    assert {f.kind for f in parse_report(cut).findings} <= {f.kind for f in parse_report(text).findings}


def test_visual_concepts():
    large = Finding("effusion", "left", severity="large")
    assert visual_concepts([large]) == {"effusion in view", "left effusion in view", "large effusion in view"}
    assert visual_concepts([replace(large, certainty="uncertain")]) == visual_concepts([large])
    assert visual_concepts([]) == visual_concepts([replace(large, change="resolved")]) == {"nothing in view"}
    assert visual_concepts([Finding("effusion", certainty="absent")]) == {"nothing in view"}
    assert visual_concepts([Finding("nodule", "bilateral", "upper")]) >= {"left nodule in view", "right nodule in view", "upper nodule in view"}
    rng = np.random.default_rng(0)
    for _ in range(300):
        found = visual_concepts(random_findings(rng, .3))
        assert all(CONCEPTS[name].kind == "visual" for name in found)


def test_concepts_are_well_formed():
    assert len(CONCEPTS) >= 80
    for name, concept in CONCEPTS.items():
        assert concept.name == name and concept.kind in ("word", "visual") and concept.names
        assert all(n == n.lower().strip() and n for n in concept.names)
    assert {concept_of(k) for k in PHANTOM_KINDS} <= set(CONCEPTS)


def test_no_bracket_or_slot_survives():
    rng = np.random.default_rng(1)
    for i in range(1500):
        for section in write_sections(random_findings(rng, .2, i % 2 == 1), [] if i % 2 else None, "", rng).values():
            assert not re.search(r"[\[\]{}|~+]| [.,]|  |^[a-z]|\. [a-z]|NOUN|QUESTION", section.text), section.text
            assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [b-df-hj-np-tv-z]", section.text), section.text


def test_markup():
    assert mark("no [big words|b] here", "a") == (("no", ("a",)), ("big", ("b",)), ("words", ("b",)), ("here", ("a",)))
    assert mark("of the, effusion.", "effusion") == (("of", ()), ("the", ()), (",", ()), ("effusion", ("effusion",)), (".", ()))


@pytest.mark.parametrize("kind", PHANTOM_KINDS)
def test_a_noun_phrase_says_all_attributes(kind):
    rng = np.random.default_rng(0)
    for _ in range(60):
        zones = ("", "upper", "lower") if kind == "endotracheal_tube" else ("", *ZONES)
        options = {"side": ("", "left", "right"), "zone": zones, "severity": ("", *SEVERITIES)}
        finding = Finding(kind, **{a: str(rng.choice(options[a])) for a in PHANTOM_ATTRIBUTES[kind]})
        text = " ".join(word for word, _ in name_finding(finding, rng).words)
        assert parse_report(text).findings == (finding,), text
