"""Statements as radiologists and chat models write them, with their right readings: tests/studies/statements.tsv.

A reading is written as `describe_finding` writes it, findings parted by semicolons, nothing where nothing is stated. The third that is called "held
out" was not looked at while the rules were mended; the sets "late", "later", "last", "after", "audit", "fresh", "lists" and "details" were written
afterwards, each read before any mending for it.
"""
import csv
from dataclasses import dataclass
from pathlib import Path

from saerad.studies.findings import CHANGES, KINDS, SEVERITIES, SIDES, ZONES, Finding

FILE = Path(__file__).parent / "studies" / "statements.tsv"
KNOWN_WRONG = {"Concern for pneumonia clinically.",                             # a question of the clinic, told by its last word only
               "Findings suspicious for, but not diagnostic of, pneumonia.",    # two heads for one noun
               "The moderate left effusion is now large.",                      # the size before the noun, not the one now
               "Status: question of pneumonia per the referring clinician.",    # a question of the clinic too, told by its last words
               "The lines have been removed.",                                  # "lines" alone may be Kerley's
               "No change in the position of the lines, and no pneumothorax.",  # the same
               "Pleural effusion:\n Small left.", "Pneumothorax:\nEffusion: small",    # a label at the end of its line
               "Consolidation at the left base and right apex.",                # two places behind one noun, or before it
               "Right upper and lower lobe consolidation.",
               "No pneumo-\nthorax."}                                           # a word that is parted
CERTAINTY = {"no": "absent", "possible": "uncertain"}


def finding_of(words: str) -> Finding:
    """The finding that `describe_finding` describes with these words."""
    kind = next(k for k in sorted(KINDS, key=len, reverse=True) if words.endswith(k.replace("_", " ")))
    told = words.removesuffix(kind.replace("_", " ")).split()
    def one_of(values: tuple[str, ...]) -> str: return next((w for w in told if w in values), "")
    return Finding(kind, one_of(SIDES), one_of(ZONES), one_of(SEVERITIES), one_of(CHANGES), CERTAINTY.get(told[0] if told else "", "present"))


@dataclass(frozen=True)
class Written:
    """One statement: its set, its construction, its text and what it means."""
    set: str
    construction: str
    text: str
    meant: tuple[Finding, ...]


def statement_set() -> list[Written]:
    """All statements, in the order of the file."""
    with open(FILE, encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    def meant(reading: str) -> tuple[Finding, ...]: return tuple(finding_of(words) for words in reading.split("; ") if words)
    return [Written(r["set"], r["construction"], r["text"].replace("\\n", "\n"), meant(r["reading"])) for r in rows]
