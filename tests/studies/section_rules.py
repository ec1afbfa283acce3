"""A hundred made-up reports with their right findings, and the rules of MIMIC-CXR's published section parser to read them by.

The rules are those that can be observed in github.com/MIT-LCP/mimic-cxr, txt/section_parser.py (Johnson et al. 2019), written down anew; its list of
some fifty studies that were cut by hand is not here.
"""
import re
from collections.abc import Iterator

SAID = ("The lungs are clear.", "Small left pleural effusion, unchanged.", "No pneumothorax.\n Heart size is normal.",
        "Mild edema has improved.", "Patchy opacity at the right base\n may be atelectasis.",
        "Hyperinflated lungs without focal consolidation.", "The aorta is tortuous.",
        "Stable cardiomegaly.\n \n Degenerative changes of the spine.", "There is a 5 mm nodule: follow-up is advised.",
        "Sternotomy wires are intact.")
BEFORE = (" INDICATION:  Cough.\n\n COMPARISON:  ___.\n\n",
          " EXAMINATION:  CHEST (PA AND LAT)\n\n INDICATION:  ___ year old woman with fever\n\n"
          " TECHNIQUE:  PA and lateral.\n\n",
          " HISTORY:  Fall.\n\n", " REASON FOR EXAM:  Line placement.\n\n COMPARISONS:  None.\n\n",
          " CLINICAL INFORMATION:  Preoperative.\n\n")
AFTER = ("\n IMPRESSION:  As above.\n", "\n\n IMPRESSION: \n \n No acute process.\n\n RECOMMENDATION(S):  None.\n",
         "\n\n NOTIFICATION:  Discussed by phone.\n", "\n")
TITLE = "                                 FINAL REPORT\n"
TITLES = ("PA AND LATERAL VIEWS OF THE CHEST", "CHEST, TWO VIEWS", "PORTABLE AP CHEST", "FRONTAL AND LATERAL CHEST RADIOGRAPHS",
          "SINGLE AP VIEW OF THE CHEST")
MISSPELT = ("FINDINS", "FINDNGS", "FINIDNGS", "FINDINGD", "FINDIGNS")
INSIDE = ("ET TUBE:  3 cm above the carina.", "LINES AND TUBES:  Unchanged.", "BONES:  Intact.", "NG TUBE:  In the stomach.", "OTHER:  None.")


def made_up_reports() -> Iterator[tuple[str, str, str]]:
    """Construction, report, and the findings that a person would take from it ('' for none), ten of each construction."""
    for i, said in enumerate(SAID):
        before, after, plain = BEFORE[i % 5], AFTER[i % 4], " ".join(said.split())
        extra, organs = INSIDE[i % 5], f"LUNGS:  {said}\n HEART:  Normal."
        joint = "FINDINGS AND IMPRESSION" if i % 2 else "FINDINGS/IMPRESSION"
        spaced = f"{TITLE}{before} FINDINGS: \n {said}{after}"
        spaced = spaced.replace("\n ", "\n\xa0") if i % 2 else spaced.replace("\n ", "\f")
        yield "as the collection has it", f"{TITLE}{before} FINDINGS: \n \n {said}{after}", plain
        yield "a title of views for a heading", f"{TITLE}{before} {TITLES[i % 5]}:  {said}{after}", plain
        yield "findings and impression in one", f"{TITLE}{before} {joint}:  {said}\n", plain
        yield "headings in small letters", f"{TITLE}{before} Findings:  {said}{after.replace('IMPRESSION', 'Impression')}", plain
        yield "no-break spaces and form feeds", spaced, plain
        yield "an addendum after it", f"{TITLE}{before} FINDINGS:  {said}{after}{TITLE} ADDENDUM:  Seen again.\n", plain
        yield "a tube or an organ in capitals", f"{TITLE}{before} FINDINGS: \n {said}\n {extra}{after}", " ".join(f"{said} {extra}".split())
        yield "organs under an empty heading", f"{TITLE}{before} FINDINGS: \n \n {organs}{after}", " ".join(organs.split())
        yield "a misspelt heading", f"{TITLE}{before} {MISSPELT[i % 5]}:  {said}{after}", plain
        yield "no heading at all", f"{TITLE}{before.rstrip()}\n \n {said.replace(chr(10) + ' ' + chr(10), chr(10))}\n", ""


NAMES = {**dict.fromkeys(("reason for examination", "reason for exam", "clinical indication"), "indication"),
         **dict.fromkeys(("clinical history", "clinical information", "patient history"), "history"), "conclusion": "impression",
         **dict.fromkeys(("findings and impression", "findings/impression", "findings/ impression"), "impression"),
         **dict.fromkeys(("finding", "findins", "findindgs", "findgings", "findngs", "findnings", "finidngs", "reference findings"), "findings"),
         "comparisons": "comparison", "chest, two views": "findings"}
VIEWS = ("chest", "portable", "pa and lat", "lateral and pa", "ap and lateral", "lateral and ap", "frontal and", "two views", "frontal view",
         "pa view", "ap view", "one view", "lateral view", "bone window", "frontal upright", "frontal semi-upright", "ribs")


def common_name(heading: str) -> str:
    """The name that a heading is brought to: by the list, by a word inside it, or as a title of views."""
    name = heading.lower().strip()
    inside = next((word for word in ("impression", "findings", "history", "comparison", "addendum") if word in name), "")
    return NAMES.get(name) or inside or ("findings" if any(words in name for words in VIEWS) else name)


def published_findings(report: str) -> str:
    """Findings by the published rules: a heading follows a line end and one space, its own line holds no other, and the last filled one counts."""
    marks, at = [], 0
    while mark := re.compile(r"\n ([A-Z ()/,-]+):\s").search(report, at):
        marks.append(mark)
        at = max(mark.end(), report.find("\n", mark.end()))
    ends = [m.start() for m in marks[1:]] + [len(report)]
    texts = [" ".join(report[m.end():end].split()) for m, end in zip(marks, ends, strict=False) if common_name(m[1]) == "findings"]
    return next((text for text in reversed(texts) if text), "")
