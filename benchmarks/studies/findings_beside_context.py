"""The reader of findings beside medspaCy's ConText: the same names, the same statements, the same reports of OpenI.

    python benchmarks/studies/findings_beside_context.py [OUT]        default nbs/results/findings/context.csv; a few minutes on 2 cores

ConText decides what the words around a name make of it; the names are found by saerad, so that only this differs. medspaCy is not a dependency:

    pip install spacy loguru && pip install --no-deps medspacy PyRuSH PyFastNER quicksectx pysbd

One of medspaCy's pins cannot be met on a current machine, hence `--no-deps`; its matcher of UMLS, which needs it, is not used.
OUT has numbers only, and no text: for each construction of tests/studies/statements.tsv how many statements were read right and how many as
their opposite, and for each kind the precision and recall on OpenI's odd-numbered reports, with uncertain findings left out or counted.
"""
import csv
import importlib
import logging
import sys
import time
import types
import warnings
from collections import defaultdict
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from openi_tags import SAME, tagged_reports, tags_say, tarball  # noqa: E402

from saerad.studies.findings import KINDS, mentions, statements  # noqa: E402


def context_pipeline():
    """medspaCy's tokenizer, sentences and ConText with its own rules, or None and a reason."""
    warnings.filterwarnings("ignore")
    quickumls = types.ModuleType("quickumls")             # imported by medspaCy, never used here
    quickumls.spacy_component = types.SimpleNamespace(SpacyQuickUMLS=object)
    sys.modules.setdefault("quickumls", quickumls)
    sys.modules.setdefault("quickumls.spacy_component", quickumls.spacy_component)
    try: medspacy, logger = importlib.import_module("medspacy"), importlib.import_module("loguru").logger
    except ImportError as e: return None, f"skipped: medspaCy cannot be imported ({e})"
    logger.remove()
    logging.disable(logging.INFO)
    return medspacy.load(medspacy_enable=["medspacy_tokenizer", "medspacy_pyrush", "medspacy_context"]), ""


def context_reader(nlp):
    """A function from a text to {(kind, certainty)} of what ConText leaves standing."""
    def read(text: str) -> set[tuple[str, str]]:
        doc = nlp.get_pipe("medspacy_pyrush")(nlp.make_doc(text))
        doc.ents = [doc.char_span(a, b, label=kind, alignment_mode="expand") for a, b, kind in mentions(text)]
        doc = nlp.get_pipe("medspacy_context")(doc)
        standing = [e for e in doc.ents if not (e._.is_negated or e._.is_historical or e._.is_hypothetical or e._.is_family)]
        return {(e.label_, "uncertain" if e._.is_uncertain else "present") for e in standing}
    return read


def our_reader(text: str) -> set[tuple[str, str]]:
    """The same of saerad; what is favoured is told apart from what is only possible."""
    standing = [s for s in statements(text) if s.finding.certainty != "absent" and s.finding.change != "resolved"]
    return {(s.finding.kind, "favoured" if s.favoured else s.finding.certainty) for s in standing}


def right_readings():
    """(construction, text, {(kind, certainty)} that stand, kinds that are denied or gone) of every statement."""
    kinds = sorted(KINDS, key=len, reverse=True)
    with open(ROOT / "tests" / "studies" / "statements.tsv", encoding="utf-8") as file:
        for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            standing, gone = set(), set()
            for words in filter(None, row["reading"].split("; ")):
                kind = next(k for k in kinds if words.endswith(k.replace("_", " ")))
                if words.startswith(("no ", "resolved ")): gone.add(kind)
                else: standing.add((kind, "uncertain" if words.startswith("possible ") else "present"))
            yield row["construction"], row["text"].replace("\\n", "\n"), standing, gone


def score_statements(name, read):
    """A row for each construction."""
    rows = defaultdict(lambda: [0, 0, 0])
    for construction, text, standing, gone in right_readings():
        told = {(k, "uncertain" if c == "favoured" else c) for k, c in read(text)}
        there, said = {k for k, c in standing if c == "present"}, {k for k, c in told if c == "present"}
        opposite = bool(said & gone - {k for k, _ in standing} or there - {k for k, _ in told})
        for i, value in enumerate((1, told == standing, opposite)): rows[construction][i] += value
    names = ("n", "right", "opposite")
    return [{"reader": name, "on": "statements", "group": group, **dict(zip(names, row, strict=True))} for group, row in rows.items()]


def score_openi(name, read, conventions):
    """A row for each kind and convention."""
    reports = list(tagged_reports())
    start = time.perf_counter()
    told = [read(text) for text, _ in reports]
    print(f"{name}: {len(reports) / (time.perf_counter() - start):.0f} reports a second")
    for convention, counted in conventions.items():
        for kind in SAME:
            said = [any(k == kind and c in counted for k, c in t) for t in told]
            true = [tags_say(kind, tags) for _, tags in reports]
            hits = sum(s and t for s, t in zip(said, true, strict=True))
            yield {"reader": name, "on": "openi", "group": kind, "convention": convention, "n": sum(true),
                   "precision": round(hits / max(sum(said), 1), 3), "recall": round(hits / max(sum(true), 1), 3)}


if __name__ == "__main__":
    out = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "nbs" / "results" / "findings" / "context.csv")
    nlp, why = context_pipeline()
    readers = {"saerad": (our_reader, {"certain": ("present",), "favoured": ("present", "favoured"), "all": ("present", "favoured", "uncertain")})}
    if nlp: readers["ConText"] = (context_reader(nlp), {"certain": ("present",), "all": ("present", "uncertain")})
    rows = []
    for name, (read, conventions) in readers.items():
        rows += score_statements(name, read)
        if tarball().exists(): rows += score_openi(name, read, conventions)
    table = pd.DataFrame(rows)
    print(table.to_string())
    if why: sys.exit(why)
    out.parent.mkdir(parents=True, exist_ok=True)
    table[table.reader == "ConText"].to_csv(out, index=False)
