"""OpenI's reports and the MeSH tags that people gave them; read where they lie, never copied."""
import os
import tarfile
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

# a kind and the beginnings of the tags that say the same
SAME = {"effusion": ["Pleural Effusion"], "pneumothorax": ["Pneumothorax", "Hydropneumothorax"], "consolidation": ["Consolidation"],
        "atelectasis": ["Pulmonary Atelectasis"], "cardiomegaly": ["Cardiomegaly", "Cardiac Shadow/enlarged"],
        "oedema": ["Pulmonary Edema", "Pulmonary Congestion"], "nodule": ["Nodule", "Mass"], "fracture": ["Fractures, Bone"],
        "opacity": ["Opacity", "Airspace Disease", "Infiltrate"], "pneumonia": ["Pneumonia"], "hernia": ["Hernia, Hiatal"]}


def tarball() -> Path:
    """Where the reports would lie."""
    folder = os.environ.get("SAERAD_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")
    return Path(folder) / "openi" / "NLMCXR_reports.tgz"


def tagged_reports(odd: bool = True) -> Iterator[tuple[str, list[str]]]:
    """Findings with impression, and tags, of every report with an odd (or even) number that somebody indexed."""
    with tarfile.open(tarball()) as tar:
        for member in tar:
            if not member.name.endswith(".xml") or int(Path(member.name).stem) % 2 != odd: continue
            root = ET.parse(tar.extractfile(member)).getroot()
            sections, tags = {a.get("Label"): a.text or "" for a in root.iter("AbstractText")}, [t.text for t in root.iter("major")]
            if tags != ["No Indexing"]: yield f"{sections.get('FINDINGS', '')} {sections.get('IMPRESSION', '')}", tags


def tags_say(kind: str, tags: list[str]) -> bool:
    """Whether one of the tags is of a kind."""
    return any(tag.startswith(tuple(SAME[kind])) for tag in tags)
