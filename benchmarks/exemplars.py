"""Exemplars of 16,384 features at k = 256: seconds and bytes on disk, beside delphi's latent cache and constructor over the same tokens."""
import multiprocessing
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

from saerad.exemplars import Collector, ExemplarsConfig, collect_exemplars
from saerad.sae import MatryoshkaSAE
from saerad.store import TOKEN_SCHEMA, Store, StoreWriter

LENGTH, WINDOW, CONSTRUCTED = 128, 8, 256     # tokens a study, tokens either side of a peak, features that delphi's constructor is timed on
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


def make(folder, studies, features, d, k):
    """A store of random rows and an SAE of random features whose threshold lets about `k` fire on each."""
    sae, draw = MatryoshkaSAE(d, (features // 2, features // 2), k), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in (sae.W_enc, sae.W_dec): p.copy_(torch.nn.functional.normalize(torch.randn(p.shape, generator=draw), dim=-1))
        for p in (sae.b_enc, sae.b_dec): p.zero_()
        pre = sae.preactivations(torch.randn(2000, d, generator=draw))
        sae.threshold.fill_(float(np.quantile(pre[:200].numpy(), 1 - k / features)))
    tokens = make_tokens(studies)
    with StoreWriter(folder, "bench", d) as writer:
        for i in range(studies):
            rows = tokens.slice(i * LENGTH, LENGTH).select(TOKEN_SCHEMA.names)
            columns = [c.cast(t.type) for c, t in zip(rows.columns, TOKEN_SCHEMA, strict=True)]
            writer.add(torch.randn(LENGTH, d, generator=draw), pa.table(columns, schema=TOKEN_SCHEMA))
        return writer.finish(), sae.eval()


def ours(folder, sae, answer):
    """In a process of its own, so that its peak memory is its own: seconds, bytes and GB."""
    begin = time.perf_counter()
    collect_exemplars(Store.open(folder / "store"), sae, ExemplarsConfig(window=WINDOW), 0, folder / "ours")
    taken = time.perf_counter() - begin
    answer.put((taken, sum(f.stat().st_size for f in (folder / "ours").iterdir()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6))


def large(folder, sae, studies, answer):
    """Peak GB with the token table of 10 M tokens, once the samples are full: the rest of the pass holds no more."""
    store = Store.open(folder / "store")
    collector = Collector(make_tokens(studies), sae.width, ExemplarsConfig(window=WINDOW), 0)
    with torch.inference_mode():
        for begin in range(0, len(store) - 4096, 4096): collector.read(sae.encode(store.read(np.arange(begin, begin + 4096))), begin)
    answer.put((float((collector.sample.count == 256).mean()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6))


def apart(work, *arguments):
    """What `work` puts into its last argument, done in a fresh process."""
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=work, args=(*arguments, answer))
    process.start()
    found = answer.get(timeout=3000)
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


def delphi(folder, store, sae):
    """Seconds of the cache, seconds of the constructor for all features, and bytes."""
    latents, constructor, sampler = import_delphi()
    tokens = torch.from_numpy(np.array(store.tokens["token_id"])).long().view(-1, LENGTH)
    out, begin = folder / "delphi", time.perf_counter()
    with torch.inference_mode():
        cache = latents.LatentCache(Rows(store), {"layer": lambda x: sae.encode(x.flatten(0, 1)).view(*x.shape[:2], -1)}, batch_size=32)
        cache.run(tokens.numel(), tokens)
        cache.save_splits(16, out)
    cached = time.perf_counter() - begin
    disk = sum(f.stat().st_size for f in out.rglob("*.safetensors"))
    (out / "layer" / "config.json").write_text("{}")
    some = torch.linspace(0, sae.width - 1, min(CONSTRUCTED, sae.width)).long()
    class Plain:     # a tokenizer for the constructor: only its words are asked for
        def batch_decode(self, ids): return [str(WORDS[int(i)]) for i in torch.as_tensor(ids).flatten()]
    begin = time.perf_counter()
    chosen = sampler(n_examples_train=25, n_examples_test=100)
    made = latents.LatentDataset(out, chosen, constructor(example_ctx_len=2 * 2 * WINDOW, n_non_activating=125), Plain(), ["layer"], {"layer": some})
    count = sum(1 for _ in made)
    assert count
    return cached, (time.perf_counter() - begin) * sae.width / len(some), disk


def measure(quick):
    features, studies = (4096, 192) if quick else (16_384, 800)
    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp)
        store, sae = make(folder / "store", studies, features, 128 if quick else 512, 64 if quick else 256)
        taken, disk, memory = apart(ours, folder, sae)
        mine = {"delphi_time": taken, "delphi_disk": disk / 1e6, "memory_gb": memory}
        if not quick: mine["samples_full"], mine["memory_gb_10m_tokens"] = apart(large, folder, sae, 10_000_000 // LENGTH)
        try: cached, constructed, theirs = delphi(folder, store, sae)
        except ImportError: peers, ratios = {}, {"delphi_time": None, "delphi_disk": None}
        else:
            peers = {"delphi_time": cached + constructed, "delphi_disk": theirs / 1e6, "cache": cached, "constructor": constructed,
                     "MB at 10 M tokens, in proportion": theirs / 1e6 * 10_000_000 / (studies * LENGTH)}
            ratios = {"delphi_time": (cached + constructed) / taken, "delphi_disk": theirs / disk}
    shape = f"{studies * LENGTH} tokens, {features} features, k {sae.k}, width {sae.d}; seconds, MB (delphi constructs {CONSTRUCTED} features)"
    return shape, mine, peers, ratios


if __name__ == "__main__": report("exemplars", measure)
