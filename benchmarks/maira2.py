"""MAIRA-2 with random weights: tokens a second up to its hookpoint, memory, the share of the machine's measured matrix rate, and the
hours that the paper's 34.7 million kept tokens would take. At full size in bfloat16 where there is a GPU, small and in float32 otherwise."""
import os
from dataclasses import dataclass

import numpy as np
import torch
from _bench import alternate, report

from saerad.activations.extraction import ExtractionConfig, hooked_rows, kept_tokens
from saerad.core import torch_rng
from saerad.subjects.maira2 import Maira2Config, Maira2ForConditionalGeneration
from saerad.subjects.subject import Prompt, Subject, train_tokenizer

PAPER_TOKENS = 34.7e6


@dataclass(frozen=True)
class Shape:
    """Sizes of a network of MAIRA-2's make and of what it is given."""
    layer: int = 15
    studies: int = 4            # in one batch
    images: int = 2             # a frontal and a lateral view
    kept: int = 170             # tokens of the texts that are kept
    boilerplate: int = 130
    image_size: int = 518
    vision: tuple[int, int, int] = (768, 12, 12)                 # width, layers, heads
    text: tuple[int, int, int, int] = (4096, 32, 32, 11008)      # width, layers, heads, inner width
    vocabulary: int = 32207
    matrix: int = 8192          # side of the square product that measures the machine


FULL = Shape()
SMALL = Shape(layer=3, studies=2, image_size=112, vision=(192, 3, 6), text=(256, 6, 4, 688), vocabulary=2000, matrix=1024)


def config(shape: Shape) -> Maira2Config:
    """The configuration of the network."""
    (vw, vl, vh), (w, n, h, inner) = shape.vision, shape.text
    return Maira2Config(image_token_index=3, vision_config={
        "model_type": "dinov2", "hidden_size": vw, "num_hidden_layers": vl, "num_attention_heads": vh, "image_size": shape.image_size,
        "out_features": [f"stage{vl}"]}, text_config={
        "model_type": "llama", "vocab_size": shape.vocabulary, "hidden_size": w, "intermediate_size": inner, "num_hidden_layers": n,
        "num_attention_heads": h, "max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 1.5}})


@torch.no_grad()
def subject_of(shape: Shape, device: str, dtype: torch.dtype) -> Subject:
    """The network with random weights, made on its device, so that 28 GB never pass through the host."""
    with torch.device(device): model = Maira2ForConditionalGeneration._from_config(config(shape), dtype=dtype)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1: parameter.normal_(0, 0.02)
        else: parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return Subject("random MAIRA-2", model, train_tokenizer(["the lungs are clear"] * 5, 300), lambda study, report: None, hash="random")


def prompt_of(shape: Shape, number: int) -> Prompt:
    """Images first, then the prompt's own words, then the report; a report is up to a third shorter than the longest."""
    patches, chance = shape.images * (shape.image_size // 14) ** 2, torch_rng(0, "bench", "maira2", number)
    kept = shape.kept - int(torch.randint(shape.kept // 3, (1,), generator=chance))
    sizes = {"image": patches, "boilerplate": shape.boilerplate, "findings": kept}
    section = np.repeat(list(sizes), list(sizes.values()))
    ids = torch.randint(4, 300, (len(section),), generator=chance)
    ids[:patches] = 3
    view, none = np.where(section == "image", "frontal", ""), np.full(len(section), -1)
    pixels = torch.randn(shape.images, 3, shape.image_size, shape.image_size, generator=chance)
    return Prompt(str(number), ids, pixels, ("frontal", "lateral")[:shape.images], section, view, none, none, none, none)


def operations(shape: Shape, tokens: list[int]) -> float:
    """Multiplications and additions of one batch up to the hookpoint: products with weights, and causal attention."""
    (vw, vl, _), (w, _, _, inner) = shape.vision, shape.text
    patches = (shape.image_size // 14) ** 2 + 1
    vision = len(tokens) * shape.images * vl * (2 * patches * 12 * vw**2 + 4 * patches**2 * vw)
    projector = 2 * len(tokens) * shape.images * (patches - 1) * (vw * w + 3 * w**2)
    text = (shape.layer + 1) * sum(2 * n * (4 * w**2 + 3 * w * inner) + 2 * n**2 * w for n in tokens)
    return float(vision + projector + text)


def measure(quick: bool) -> tuple[str, dict, dict, dict]:
    """The shape, our rates, the machine's, and the share of its matrix rate that the pass reaches."""
    cuda = torch.cuda.is_available()
    shape = FULL if cuda and os.environ.get("SAERAD_MAIRA2", "full") == "full" else SMALL
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    subject, cfg = subject_of(shape, device, dtype), ExtractionConfig(layer=shape.layer)
    prompts = [prompt_of(shape, i) for i in range(shape.studies)]
    keeps = [kept_tokens(p, cfg) for p in prompts]
    square = torch.randn(shape.matrix, shape.matrix, device=device, dtype=dtype)

    def sync() -> None:
        if cuda: torch.cuda.synchronize()

    def product() -> None:
        for _ in range(4): square @ square
        sync()

    def ours() -> None:
        rows = hooked_rows(subject, prompts, [shape.layer], keeps)[shape.layer]
        assert torch.isfinite(rows).all()
        sync()
    ours(), product()
    took = alternate(3 if quick else 10, ours=ours, product=product)
    tokens, kept = sum(map(len, prompts)), int(sum(k.sum() for k in keeps))
    reached = operations(shape, [len(p) for p in prompts]) / took["ours"] / 1e12
    possible = 4 * 2 * shape.matrix**3 / took["product"] / 1e12
    memory = torch.cuda.max_memory_allocated() / 1e9 if cuda else None
    found = {"matrix_rate": reached, "tokens_per_s": tokens / took["ours"], "kept_tokens_per_s": kept / took["ours"],
             "hours_for_the_paper": PAPER_TOKENS / (kept / took["ours"]) / 3600 if shape is FULL else None, "gpu_memory_gb": memory}
    name = f"{'full size' if shape is FULL else 'small'}, {len(prompts)} studies of {tokens // len(prompts)} tokens, layer {shape.layer}"
    kind = str(dtype).removeprefix("torch.")
    return f"{name}, {kind} on {device}, TFLOP/s", found, {"matrix_rate": possible}, {"matrix_rate": reached / possible}


if __name__ == "__main__": report("maira2", measure)
