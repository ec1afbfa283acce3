"""A store and an SAE in which every feature is one known word, so that every count has a right answer."""
import numpy as np
import pyarrow as pa
import torch

from saerad.activations.store import TOKEN_SCHEMA, Store, StoreWriter
from saerad.sae.model import MatryoshkaSAE

SENTENCES = ("There is a small left pleural effusion .", "There is a moderate right effusion .", "The heart is mildly enlarged .",
             "No pleural effusion or pneumothorax .", "Heart size is normal .", "A PICC tip lies in the right atrium .",
             "There is no focal consolidation .", "Small right apical pneumothorax .", "Mild pulmonary oedema is present .")
REASONS = ("Fever and cough .", "Line placement .", "Fall with chest pain .", "Shortness of breath .")
WORDS = sorted({w for s in SENTENCES + REASONS for w in s.split()} | {"[image]"})
SIZES = ("small", "Small", "Mild", "mildly")       # one feature fires on all of these
MIXED, NEVER = len(WORDS), len(WORDS) + 1


def rows(number: int, split: str, draw: np.random.Generator, patient: str | None = None) -> tuple[torch.Tensor, pa.Table]:
    """One study: the image's last token, an indication and three or four sentences of findings."""
    texts = [("image", "[image]"), ("indication", REASONS[draw.integers(len(REASONS))]),
             ("findings", " ".join(draw.choice(SENTENCES, draw.integers(3, 5), replace=False)))]
    tokens = [(section, w) for section, text in texts for w in text.split()]
    n = len(tokens)
    x = torch.zeros(n, len(WORDS))
    x[torch.arange(n), torch.tensor([WORDS.index(w) for _, w in tokens])] = torch.tensor(draw.uniform(1, 3, n), dtype=torch.float32)
    table = pa.table({"study": [f"s{number:04d}"] * n, "patient": [patient or f"p{number // 2:04d}"] * n, "split": [split] * n,
                      "section": [s for s, _ in tokens], "view": ["frontal" if s == "image" else "" for s, _ in tokens],
                      **{c: [36 if s == "image" else -1 for s, _ in tokens] for c in ("row", "col")},   # the last of 37 by 37 patches
                      "token_id": [WORDS.index(w) for _, w in tokens],
                      "text": ["" if s == "image" else w if w == "." else f" {w}" for s, w in tokens],
                      "position": list(range(n)), "start": [-1] * n, "end": [-1] * n}).cast(TOKEN_SCHEMA)
    return x, table


def make_store(folder, studies: int = 160, leak: bool = False) -> Store:
    """A store of studies, two a patient, in the splits train, validation and test."""
    draw = np.random.default_rng(0)
    with StoreWriter(folder, "word world", len(WORDS), rows_per_shard=1000) as writer:
        for i in range(studies):
            split = ("train", "train", "validation", "test")[i // 2 % 4]
            writer.add(*rows(i, split, draw, patient="p0000" if leak and i == studies - 1 else None))
        return writer.finish()


def make_sae() -> MatryoshkaSAE:
    """One feature a word, one for words of size, and two that never fire; threshold 0.5, scale 1."""
    sae = MatryoshkaSAE(len(WORDS), (len(WORDS), 3), 1)
    encoder = torch.zeros(len(WORDS), len(WORDS) + 3)
    encoder[:, :len(WORDS)] = torch.eye(len(WORDS))
    for word in SIZES: encoder[WORDS.index(word), MIXED] = 1
    with torch.no_grad():
        sae.W_enc.copy_(encoder)
        for bias in (sae.b_enc, sae.b_dec): bias.zero_()
        sae.threshold.fill_(0.5)
    return sae.eval()
