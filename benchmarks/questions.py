"""What somebody who asks waits for: an answer of `saerad ask` beside a bare pass of the model, and a report read by rules.

Ratios: the answer's time over that of a pass of the same prompt that stops at the same layer; reading a report of phantom as English over reading it
by phantom's own grammar, which knows what it may meet. `ours` has the milliseconds.
"""
import tempfile
from pathlib import Path

import numpy as np
import torch
import yaml
from _bench import alternate, report

from saerad.activations.extraction import residuals
from saerad.sae.model import MatryoshkaSAE
from saerad.show.atlas import write_atlas
from saerad.show.lab import open_run
from saerad.studies.findings import read_findings
from saerad.studies.grammar import parse_report, random_findings, write_findings

SENTENCES = ("The heart is normal.", "No pneumothorax.", "Small nodule.", "Lines and tubes are in place.", "There is a small left pleural effusion.")


def open_asker(folder: Path):
    """The bundled mini and an SAE of random directions behind layer 4: what an answer says does not matter here."""
    studies = {"source": "phantom:0", "train_patients": 2, "validation_patients": 1, "test_patients": 12}
    settings = {"studies": studies, "subject": {"model": "mini"}, "extraction": {"layer": 4}}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    torch.manual_seed(0)
    sae = MatryoshkaSAE(256, [64, 192, 768], 16)
    sae.threshold.fill_(0.03)
    sae.scale.fill_(20.0)
    sae.save(folder / "sae")
    write_atlas(folder)
    return open_run(folder).asker


def measure(quick: bool) -> tuple[str, dict, dict, dict]:
    """Shape, milliseconds, what they are set beside, and the ratios."""
    rounds, draws = 5 if quick else 25, [np.random.default_rng(i) for i in range(200)]
    texts = [write_findings(random_findings(draw), [], draw).text for draw in draws]
    with tempfile.TemporaryDirectory() as folder:
        asker = open_asker(Path(folder))
        prompts = [asker.ask(text).reading.prompt for text in SENTENCES]
        taken = alternate(rounds, answer=lambda: [asker.ask(text).as_json() for text in SENTENCES],
                          a_pass=lambda: [residuals(asker.subject, [prompt], asker.layer) for prompt in prompts],
                          grammar=lambda: [parse_report(text) for text in texts], english=lambda: [read_findings(text) for text in texts])
    each = {"answer": len(SENTENCES), "a_pass": len(SENTENCES), "grammar": len(texts), "english": len(texts)}
    ms = {f"{name}_ms": round(1000 * seconds / each[name], 3) for name, seconds in taken.items()}
    ratios = {"answer_over_pass": round(ms["answer_ms"] / ms["a_pass_ms"], 2), "english_over_grammar": round(ms["english_ms"] / ms["grammar_ms"], 2)}
    return f"{len(SENTENCES)} sentences on a radiograph, {len(texts)} reports", {k: ms[k] for k in ("answer_ms", "grammar_ms", "english_ms")}, \
        {"a_pass_ms": ms["a_pass_ms"]}, ratios


report("questions", measure)
