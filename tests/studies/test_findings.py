"""The rule-based reader of findings: scope, attributes, traps, and agreement with the tags of real reports."""
import os
import re
import tarfile
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saerad.studies.findings import (
    ATTRIBUTES,
    CERTAINTIES,
    CHANGES,
    KINDS,
    SEVERITIES,
    SIDES,
    ZONES,
    Finding,
    Reading,
    certainty_of,
    chexpert,
    describe_finding,
    marked_findings,
    mentions,
    read_findings,
    sentences,
    statements,
)

DATA = Path(os.environ.get("SAERAD_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


def said(text: str) -> set[str]:
    return {describe_finding(f) for f in read_findings(text).findings}


def test_kinds_counts_what_is_there():
    reading = Reading((Finding("effusion"), Finding("nodule", certainty="uncertain"), Finding("picc", certainty="absent"),
                       Finding("chest_tube", change="resolved")))
    assert reading.kinds() == {"effusion", "nodule"}
    assert reading.kinds(["present"]) == {"effusion"}
    assert reading.kinds(["absent"]) == {"picc"}


@pytest.mark.parametrize(("text", "expected"), [
    ("There is a small left pleural effusion.", {"small left effusion"}),
    ("No pneumothorax, effusion or fracture.", {"no pneumothorax", "no effusion", "no fracture"}),
    ("No effusion, but there is a small pneumothorax.", {"no effusion", "small pneumothorax"}),
    ("No pneumothorax. Small effusion.", {"no pneumothorax", "small effusion"}),
    ("A pneumothorax is not seen.", {"no pneumothorax"}),
    ("Free of consolidation.", {"no consolidation"}),
    ("A nodule cannot be excluded.", {"possible nodule"}),
    ("Cannot exclude pneumonia.", {"possible pneumonia"}),
    ("Opacity which may represent atelectasis.", {"opacity", "possible atelectasis"}),
    ("No change in the left effusion.", {"unchanged left effusion"}),
    ("The right chest tube has been removed.", {"resolved right chest tube"}),
    ("Left PICC and right chest tube.", {"left picc", "right chest tube"}),
    ("Right pleural effusion and left lower lobe consolidation.", {"right effusion", "left lower consolidation"}),
    ("Opacity in the right upper lobe is larger.", {"larger right upper opacity"}),
    ("Bibasilar atelectasis.", {"bilateral lower atelectasis"}),
    ("Improving moderate pulmonary edema.", {"smaller moderate oedema"}),
    ("The heart is mildly enlarged.", {"small cardiomegaly"}),
    ("The heart is normal in size.", {"no cardiomegaly"}),
    ("The heart is not enlarged.", {"no cardiomegaly"}),
    ("Heart size and mediastinal contours are normal.", {"no cardiomegaly", "no enlarged mediastinum"}),
    ("Lungs are clear.", {"no consolidation", "no opacity"}),
    ("The lungs are otherwise clear.", set()),
    ("Pericardial effusion.", set()),
    ("Heart at the upper limits of normal.", {"no cardiomegaly"}),
    ("If there is concern for fracture, consider rib views.", set()),
    ("The endotracheal tube is too high.", {"upper endotracheal tube"}),
    ("Endotracheal tube in the right main bronchus.", {"lower endotracheal tube"}),
    ("Left subclavian catheter with its tip in the right atrium.", {"left central line"}),
    ("PICC line and nasogastric tube in place.", {"picc", "enteric tube"}),
    ("New median sternotomy wires.", {"new sternotomy wires"}),
    ("SMALL LEFT EFFUSION", {"small left effusion"}),
    ("Effusion measures 1.9 cm. No nodule.", {"effusion", "no nodule"}),
])
def test_reads(text, expected):
    assert said(text) == expected


def test_a_denied_finding_has_no_attributes():
    assert read_findings("No large left effusion.").findings == (Finding("effusion", certainty="absent"),)


def test_statements_stand_where_they_are_said():
    text = "Clear lungs. No pneumothorax; a small left effusion."
    for s in statements(text):
        if s.finding.kind == "effusion": assert text[s.start:s.end] == "effusion" and s.sentence == 2
    assert [s.start for s in statements(text)] == sorted(s.start for s in statements(text))


def test_unread_holds_what_was_not_understood_and_nothing_else():
    reading = read_findings("Small effusion. Degenerative changes of the spine. Purple monkeys. 1. No nodule.")
    assert reading.unread == ("Purple monkeys",)
    assert sentences("1. No nodule. 2. x") == ["No nodule"]


def test_longest_name_wins():
    assert [k for _, _, k in mentions("peripherally inserted central catheter")] == ["picc"]
    assert certainty_of("no ", "") == "absent" and certainty_of("", "") == "present"


def test_marks_escape_and_keep_the_text():
    text = "A <b>small</b> effusion & no nodule."
    page = marked_findings(text)
    assert "<b>" not in page and page.count("<mark") == 2
    assert re.sub("<[^>]*>", "", page) == "A &lt;b&gt;small&lt;/b&gt; effusion &amp; no nodule."


@pytest.mark.parametrize(("text", "labels"), [
    ("Clear lungs. No effusion. Left PICC.", {"No Finding": 1, "Consolidation": 0, "Lung Opacity": 0, "Pleural Effusion": 0, "Support Devices": 1}),
    ("Possible pneumonia. No pneumothorax.", {"No Finding": None, "Pneumonia": -1, "Pneumothorax": 0}),
    ("Small left effusion. No right effusion.", {"No Finding": None, "Pleural Effusion": 1}),
    ("The chest tube has been removed.", {"No Finding": 1, "Support Devices": 0}),
    ("The chest tube has been removed. Left PICC.", {"No Finding": 1, "Support Devices": 1}),
    ("Hiatal hernia.", {"No Finding": None}), ("", {"No Finding": 1})])
def test_chexpert_labels(text, labels):
    told = chexpert(read_findings(text))
    assert len(told) == 14 and {k: v for k, v in told.items() if v is not None} == {k: v for k, v in labels.items() if v is not None}


WORDS = ["no", "small", "left", "right", "effusion", "pneumothorax", "may", "but", "there", "is", "not", "excluded", "heart", "normal",
         "stable", ",", ".", ";", "and", "chest", "tube", "1.", "ö", "with", "resolved", "bilateral"]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(WORDS), max_size=30).map(" ".join) | st.text(max_size=60))
def test_never_fails_and_keeps_to_its_words(text):
    for f in read_findings(text).findings:
        assert f.kind in KINDS and f.certainty in CERTAINTIES
        assert f.side in ("", *SIDES) and f.zone in ("", *ZONES)
        assert f.severity in ("", *SEVERITIES) and f.change in ("", *CHANGES)
        for attribute in ("side", "zone", "severity"): assert attribute in ATTRIBUTES[f.kind] or not getattr(f, attribute)
        if f.certainty == "absent": assert f == Finding(f.kind, certainty="absent")


# precision and recall on OpenI's odd-numbered reports, measured once and rounded down by 0.03
FLOORS = {"effusion": (["Pleural Effusion"], 0.83, 0.95), "pneumothorax": (["Pneumothorax", "Hydropneumothorax"], 0.97, 0.90),
          "consolidation": (["Consolidation"], 0.75, 0.97), "atelectasis": (["Pulmonary Atelectasis"], 0.77, 0.96),
          "cardiomegaly": (["Cardiomegaly", "Cardiac Shadow/enlarged"], 0.96, 0.88),
          "oedema": (["Pulmonary Edema", "Pulmonary Congestion"], 0.77, 0.78), "nodule": (["Nodule", "Mass"], 0.53, 0.92),
          "fracture": (["Fractures, Bone"], 0.67, 0.93), "opacity": (["Opacity", "Airspace Disease", "Infiltrate"], 0.94, 0.92),
          "pneumonia": (["Pneumonia"], 0.41, 0.97), "hernia": (["Hernia, Hiatal"], 0.87, 0.97)}


@pytest.fixture(scope="module")
def tagged():
    tarball = DATA / "openi" / "NLMCXR_reports.tgz"
    if not tarball.exists(): pytest.skip(f"OpenI's reports are not at {tarball}")
    out = []
    with tarfile.open(tarball) as tar:
        for member in tar:
            if not member.name.endswith(".xml") or int(Path(member.name).stem) % 2 == 0: continue
            root = ET.parse(tar.extractfile(member)).getroot()
            sections = {a.get("Label"): a.text or "" for a in root.iter("AbstractText")}
            tags = [t.text for t in root.iter("major")]
            text = f"{sections.get('FINDINGS', '')} {sections.get('IMPRESSION', '')}"
            if tags != ["No Indexing"]: out.append((read_findings(text), len(sentences(text)), tags))
    return out


@pytest.mark.parametrize("kind", FLOORS)
def test_agreement_with_the_tags_of_real_reports(tagged, kind):
    names, precision, recall = FLOORS[kind]
    both = [(kind in reading.kinds(), any(t.startswith(tuple(names)) for t in tags)) for reading, _, tags in tagged]
    hits = sum(r and t for r, t in both)
    assert hits / sum(r for r, _ in both) >= precision
    assert hits / sum(t for _, t in both) >= recall


def test_few_sentences_of_real_reports_are_unread(tagged):
    assert sum(len(r.unread) for r, _, _ in tagged) / sum(n for _, n, _ in tagged) < 0.03
