"""Exemplars of 16,384 features at k = 256: seconds and bytes on disk, beside delphi's latent cache and constructor over the same tokens.

With `SAERAD_BENCH_TOKENS=10000000` we read that many tokens. Delphi reads a quarter of 102,400 and all of them, and what more tokens would cost it is
on the line through the two; it has as much to do for every token and for every firing. Needs 1 KB of disk a token, in `SAERAD_BENCH_FOLDER`.
"""
import multiprocessing
import os
import resource
import sys
import tempfile
import time
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from _bench import report
from anyio.abc import SocketAttribute  # noqa: F401 (first: nnsight gives every object a `.save`, which this class would take for its own)

from saerad.activations.store import TOKEN_SCHEMA, Store, StoreWriter
from saerad.core import progress
from saerad.interpretation.exemplars import Collector, ExemplarsConfig, collect_exemplars
from saerad.sae.encoder import Encoder
from saerad.sae.model import MatryoshkaSAE

LENGTH, WINDOW, CONSTRUCTED = 128, 8, 256     # tokens a study, tokens either side of a peak, features that delphi's constructor is timed on
MIXTURES = 16_384     # different sums of features that tokens are mixed from
WORDS = np.array([f" word{i}" for i in range(5000)])


def make_tokens(studies):
    """A token table: every study one section of findings, two in three patients explain."""
    n = studies * LENGTH
    number = np.repeat(np.arange(studies), LENGTH)
    ids = np.random.default_rng(0).integers(0, len(WORDS), n)
    names = {"study": np.char.add("s", np.arange(studies).astype(str)), "patient": np.char.add("p", np.arange(studies).astype(str)),
             "split": np.where(np.arange(studies) % 3, "train", "test")}
    coded = {k: pa.DictionaryArray.from_arrays(pa.array(number.astype(np.int32)), pa.array(v)) for k, v in names.items()}
    blank = {k: pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, np.int32)), pa.array([v])) for k, v in (("section", "findings"), ("view", ""))}
    words = {"text": pa.DictionaryArray.from_arrays(pa.array(ids.astype(np.int32)), pa.array(WORDS)), "token_id": pa.array(ids.astype(np.int32))}
    none = {k: np.full(n, -1, np.int16) for k in ("row", "col")} | {k: np.full(n, -1, np.int32) for k in ("start", "end")}
    return pa.table({**coded, **blank, **words, **none, "position": np.tile(np.arange(LENGTH, dtype=np.int32), studies)})


def make_sae(features, d, k, draw):
    """An SAE of random unit features, and what tokens are mixed from: sums of two dozen features, common ones more often than rare ones."""
    sae = MatryoshkaSAE(d, (features // 2, features // 2), k)
    with torch.no_grad():
        sae.W_dec.copy_(torch.nn.functional.normalize(torch.randn(features, d, generator=draw), dim=1))
        sae.W_enc.copy_(sae.W_dec.T)
        often = 1 / (10 + torch.randperm(features, generator=draw).float())
        some = torch.multinomial(often, MIXTURES * 24, replacement=True, generator=draw).view(MIXTURES, 24)
        strength = torch.randn(some.shape, generator=draw).exp()
        mixtures = torch.nn.functional.normalize(torch.nn.functional.embedding_bag(some, sae.W_dec, per_sample_weights=strength, mode="sum"), dim=1)
        bank = mixtures, torch.randn(MIXTURES, d, generator=draw) / d**0.5
        pre = sae.preactivations(make_rows(bank, 1000, draw))
        sae.threshold.fill_(float(np.quantile(pre.numpy(), 1 - k / features)))
    return sae.eval(), bank


def make_rows(bank, n, draw):
    """Activations: every token two mixtures, one of them fainter, and some noise."""
    mixtures, noise = bank
    a, b, c = torch.randint(MIXTURES, (3, n), generator=draw)
    faint, loud = torch.rand(2, n, 1, generator=draw)
    return mixtures[a].addcmul_(faint, mixtures[b]).addcmul_(loud, noise[c])


def make(folder, studies, features, d, k):
    """A store in bfloat16 and an SAE whose threshold lets about `k` features fire on each row."""
    draw = torch.Generator().manual_seed(0)
    sae, bank = make_sae(features, d, k, draw)
    tokens = make_tokens(studies)
    with StoreWriter(folder, "bench", d, "bfloat16") as writer:
        for begin in progress(range(0, studies, 64), "bench: making tokens"):
            n = min(64, studies - begin)
            rows = tokens.slice(begin * LENGTH, n * LENGTH).select(TOKEN_SCHEMA.names)
            table = pa.table([c.cast(t.type) for c, t in zip(rows.columns, TOKEN_SCHEMA, strict=True)], schema=TOKEN_SCHEMA)
            x = make_rows(bank, 64 * LENGTH, draw)
            for i in range(n): writer.add(x[i * LENGTH:(i + 1) * LENGTH], table.slice(i * LENGTH, LENGTH))
        return writer.finish(), sae


def ours(folder, store, sae, answer):
    """In a process of its own, so that its peak memory is its own: seconds, bytes and GB."""
    begin = time.perf_counter()
    collect_exemplars(Store.open(store), sae, ExemplarsConfig(window=WINDOW), 0, folder / "ours")
    taken = time.perf_counter() - begin
    answer.put((taken, sum(f.stat().st_size for f in (folder / "ours").iterdir()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6))


def large(folder, sae, studies, answer):
    """Peak GB with the token table of 10 M tokens, once the samples are full: the rest of the pass holds no more."""
    store = Store.open(folder / "store")
    collector, encode = Collector(make_tokens(studies), sae.width, ExemplarsConfig(window=WINDOW), 0), Encoder(sae)
    for begin in range(0, len(store) - 4096, 4096): collector.read(encode(store.read(np.arange(begin, begin + 4096))), begin)
    answer.put((float((collector.sample.count == 256).mean()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6))


def apart(work, *arguments):
    """What `work` puts into its last argument, done in a fresh process."""
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=work, args=(*arguments, answer))
    process.start()
    found = answer.get(timeout=2 * 3600)
    process.join()
    return found


def import_delphi():
    """delphi's cache and loader; two packages that it imports for other ways of choosing contexts may be absent."""
    for name in ("faiss", "sentence_transformers"):
        try: __import__(name)
        except ImportError:
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].SentenceTransformer = object
    from delphi import latents
    from delphi.config import ConstructorConfig, SamplerConfig
    return latents, ConstructorConfig, SamplerConfig


class Rows(torch.nn.Module):
    """A model whose one layer gives the stored rows, so that delphi reads the same activations from the same disk."""
    def __init__(self, store):
        super().__init__()
        self.store, self.layer, self.device, self.next = store, torch.nn.Identity(), torch.device("cpu"), 0

    def forward(self, batch):
        rows = np.arange(self.next, self.next + batch.numel())
        self.next += batch.numel()
        return self.layer(self.store.read(rows).view(*batch.shape, -1))


def delphi(out, store, sae, studies):
    """Over the first `studies` of a store: seconds of the cache, seconds of the constructor for all features, and bytes."""
    latents, constructor, sampler = import_delphi()
    tokens = torch.from_numpy(np.array(store.tokens["token_id"])).long().view(-1, LENGTH)[:studies]
    begin = time.perf_counter()
    with torch.inference_mode():
        cache = latents.LatentCache(Rows(store), {"layer": lambda x: sae.encode(x.flatten(0, 1)).view(*x.shape[:2], -1)}, batch_size=32)
        cache.run(tokens.numel(), tokens)
        cache.save_splits(16, out)
    cached = time.perf_counter() - begin
    disk = sum(f.stat().st_size for f in out.rglob("*.safetensors"))
    (out / "layer" / "config.json").write_text("{}", encoding="utf-8")
    some = torch.linspace(0, sae.width - 1, min(CONSTRUCTED, sae.width)).long()
    class Plain:     # a tokenizer for the constructor: only its words are asked for
        def batch_decode(self, ids): return [str(WORDS[int(i)]) for i in torch.as_tensor(ids).flatten()]
    begin = time.perf_counter()
    chosen = sampler(n_examples_train=25, n_examples_test=100)
    made = latents.LatentDataset(out, chosen, constructor(example_ctx_len=2 * 2 * WINDOW, n_non_activating=125), Plain(), ["layer"], {"layer": some})
    count = sum(1 for _ in made)
    assert count
    return cached, (time.perf_counter() - begin) * sae.width / len(some), disk


def beside(folder, store, sae, studies, tokens):
    """delphi's numbers over some studies and, by the line through those of a quarter of them and of all, over `tokens`."""
    cached, constructed, disk = delphi(folder / "delphi", store, sae, studies)
    told = {"delphi_time": cached + constructed, "delphi_disk": disk / 1e6, "tokens": studies * LENGTH, "cache": cached, "constructor": constructed}
    if tokens == studies * LENGTH: return told
    part = delphi(folder / "quarter", store, sae, studies // 4)
    known = {"delphi_time": part[0] + part[1], "delphi_disk": part[2] / 1e6}
    more = (tokens / LENGTH - studies) / (studies - studies // 4)
    far = {name: told[name] + more * (told[name] - known[name]) for name in known}
    return told | far | {"measured": told["delphi_time"], "measured MB": told["delphi_disk"], "a quarter": known["delphi_time"],
                         "a quarter MB": known["delphi_disk"]}


def measure(quick):
    features, studies = (4096, 192) if quick else (16_384, 800)
    d, k, many = (128, 64, studies) if quick else (512, 256, max(studies, int(os.environ.get("SAERAD_BENCH_TOKENS", 0)) // LENGTH))
    with tempfile.TemporaryDirectory(dir=os.environ.get("SAERAD_BENCH_FOLDER")) as temp:
        folder = Path(temp)
        store, sae = make(folder / "store", studies, features, d, k)
        if many > studies: make(folder / "all", many, features, d, k)
        taken, disk, memory = apart(ours, folder, folder / ("all" if many > studies else "store"), sae)
        mine = {"delphi_time": taken, "delphi_disk": disk / 1e6, "tokens": many * LENGTH, "memory_gb": memory}
        if many == studies and not quick: mine["samples_full"], mine["memory_gb_10m_tokens"] = apart(large, folder, sae, 10_000_000 // LENGTH)
        try: peers = beside(folder, store, sae, studies, many * LENGTH)
        except ImportError: peers, ratios = {}, {"delphi_time": None, "delphi_disk": None}
        else: ratios = {key: peers[key] / mine[key] for key in ("delphi_time", "delphi_disk")}
    shape = f"{many * LENGTH} tokens, {features} features, k {sae.k}, width {sae.d}; seconds, MB (delphi reads {studies * LENGTH} tokens"
    return shape + f", constructs {min(CONSTRUCTED, features)} features)", mine, peers, ratios


if __name__ == "__main__": report("exemplars", measure)
