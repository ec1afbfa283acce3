"""Steered reports a second, all interventions on a study in one batch, against one report at a time.

The peer is the faster of two: nnsight's own generation with the push spliced into every step, and our writer with a single row.
"""
import torch
from _bench import alternate, report

from saerad.steering.interventions import adding, write_steered
from saerad.studies.record import StudiesConfig
from saerad.studies.sources import open_source
from saerad.subjects.subject import open_subject

LAYER, LENGTH = 4, 9.0      # of the pushes, in raw residual units: about 0.17 of a typical vector of mini


def measure(quick):
    subject, rows, n = open_subject(), 64, (1 if quick else 3)
    studies = open_source(StudiesConfig(source="phantom:0", train_patients=n, validation_patients=1, test_patients=1)).split("train")[:n]
    prompts = [subject.prompt(s) for s in studies]
    noise = torch.randn(rows, subject.d_model, generator=torch.Generator().manual_seed(0))
    pushes = LENGTH * noise / noise.norm(dim=1, keepdim=True)
    few = range(0, rows, 16)        # of the batch, one at a time: enough to measure a rate
    said: dict[str, list[str]] = {}

    def together():
        every = [write_steered(subject, p, [adding(v) for v in pushes], LAYER, perplexity=False) for p in prompts]
        said["together"] = [texts[i].text for texts in every for i in few]

    def single():
        said["single"] = [write_steered(subject, p, [adding(pushes[i])], LAYER, perplexity=False)[0].text for p in prompts for i in few]

    def generate():
        said["generate"] = [subject.generate([p], layer=LAYER, add=pushes[i:i + 1])[0] for p in prompts for i in few]

    together()
    taken = alternate(1 if quick else 3, together=together, single=single, generate=generate)
    alone = len(prompts) * len(few) / torch.tensor([taken["single"], taken["generate"]])
    ours, theirs = len(prompts) * rows / taken["together"], float(alone.max())
    same = sum(a == b == c for a, b, c in zip(said["together"], said["single"], said["generate"], strict=True))
    shape = f"{len(prompts)} studies x {rows} pushes, mini; {same} of {len(said['single'])} reports equal in all three; reports a second"
    return shape, {"one_at_a_time": ours}, {"one_at_a_time": theirs}, {"one_at_a_time": ours / theirs}


report("steering", measure)
