"""Steered reports a second, one vector a row of a batch, against one report at a time."""
import torch
from _bench import report, seconds

from saerad.studies import StudiesConfig, open_source
from saerad.subjects import random_mini


def measure(quick):
    subject, length, n = random_mini(0), (24 if quick else 64), (16 if quick else 48)
    studies = open_source(StudiesConfig(source="phantom:0", train_patients=n, validation_patients=1, test_patients=1)).split("train")[:n]
    prompts = [subject.prompt(s, None) for s in studies]
    add = torch.randn(len(prompts), subject.d_model, generator=torch.Generator().manual_seed(0))

    def together(): subject.generate(prompts, length, 3, add, batch_size=16)

    def one_at_a_time():
        for i, prompt in enumerate(prompts): subject.generate([prompt], length, 3, add[i:i + 1])

    ours, theirs = len(prompts) / seconds(together, 1), len(prompts) / seconds(one_at_a_time, 1)
    return (f"{len(prompts)} reports of {length} tokens, mini; reports a second",
            {"one_at_a_time": ours}, {"one_at_a_time": theirs}, {"one_at_a_time": ours / theirs})


report("steering", measure)
