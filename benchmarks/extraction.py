"""Tokens a second of extraction to disk, beside a bare forward pass of the same batches that stops at the same layer."""
import tempfile
from pathlib import Path

import torch
from _bench import alternate, report
from torch import Tensor, nn

from saerad.activations.extraction import ExtractionConfig, batches_by_length, extract
from saerad.studies.phantom import drawing_of
from saerad.studies.record import Source, StudiesConfig
from saerad.studies.sources import open_source
from saerad.subjects.maira2 import Maira2Config, Maira2ForConditionalGeneration
from saerad.subjects.subject import Subject, layers_path, plain_subject, random_mini


class Reached(Exception):
    """Raised by the hook of the bare pass, so that nothing above the layer is computed."""


def scaled_mini(width: int) -> Subject:
    """A mini with random weights whose decoder is `width` wide, so that a batch takes a while."""
    small = random_mini(0)
    config = small.model.config.to_dict()
    config["text_config"] |= {"hidden_size": width, "intermediate_size": 11 * width // 4, "num_attention_heads": width // 64,
                              "num_key_value_heads": width // 64, "head_dim": 64}
    torch.manual_seed(0)
    return plain_subject(Maira2ForConditionalGeneration(Maira2Config.from_dict(config)), small.tokenizer, f"mini of width {width}")


@torch.no_grad()
def bare_pass(subject: Subject, batches: list[dict[str, Tensor]], layer: nn.Module) -> None:
    """Forward passes that stop at a layer, with a plain hook and nothing else: no prompts, no filter, no disk."""
    def stop(*_: object) -> None: raise Reached
    handle = layer.register_forward_hook(stop)
    for batch in batches:
        try: subject.model(**batch)
        except Reached: pass
    handle.remove()


def measure(quick: bool) -> tuple[str, dict, dict, dict]:
    """The shape, our tokens a second (padding not counted), theirs, and ours over theirs."""
    subject, cfg = scaled_mini(512), ExtractionConfig(layer=4)
    patients = {"train_patients": 20 if quick else 120, "validation_patients": 1, "test_patients": 1}
    studies = open_source(StudiesConfig(source="phantom:0", **patients)).split("train")
    source = Source("phantom", studies)
    prompts = [subject.prompt(s, s.sections["findings"]) for s in studies]
    window = 4 * cfg.batch_size
    batches = [subject.collate([prompts[first + i] for i in batch]) for first in range(0, len(studies), window)
               for batch in batches_by_length([len(p) for p in prompts[first:first + window]], cfg.batch_size)]
    for batch in batches:       # like ours: no mask is needed to hide padding on the right
        for name in ("attention_mask", "position_ids"): del batch[name]
    layer = subject.model.get_submodule(layers_path(subject.model))[cfg.layer]
    with tempfile.TemporaryDirectory() as temporary:
        folders = (Path(temporary) / str(i) for i in range(100))
        extract(Source("first", studies[:2]), subject, cfg, next(folders))
        def with_films() -> None:
            drawing_of.cache_clear()
            extract(source, subject, cfg, next(folders))
        took = alternate(3, ours=lambda: extract(source, subject, cfg, next(folders)),
                         bare=lambda: bare_pass(subject, batches, layer), with_films=with_films)
    total = sum(map(len, prompts))
    each = f"{took['bare'] / len(batches):.2f} s a batch"
    shape = f"{len(studies)} studies, {total} tokens, {subject.name}, layer {cfg.layer}, {each}, tokens/s"
    return (shape, {"bare_forward": total / took["ours"], "films_drawn_too": total / took["with_films"]}, {"bare_forward": total / took["bare"]},
            {"bare_forward": took["bare"] / took["ours"]})


if __name__ == "__main__": report("extraction", measure)
