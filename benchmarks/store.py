"""Bytes a second of the store: written, and read in shuffled batches, beside the same bytes in one plain file in order; and its memory."""
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from _bench import alternate, report

from saerad.activations.store import CHUNK_BYTES, TOKEN_SCHEMA, Store, StoreWriter
from saerad.core import progress, torch_rng

BATCH, STUDY = 4096, 150


def tokens(number: int, n: int) -> pa.Table:
    """The table of a study of `n` tokens."""
    same = {"study": f"study{number}", "patient": f"patient{number}", "split": "train", "section": "findings", "view": "",
            "row": -1, "col": -1, "start": 0, "end": 4, "token_id": 1, "text": " lung"}
    return pa.table({k: [v] * n for k, v in same.items()} | {"position": range(n)}, schema=TOKEN_SCHEMA)


def write_store(folder: Path, x: torch.Tensor, tables: list[pa.Table], repeats: int = 1) -> None:
    """Write `x` study by study, as extraction does; a new key each time, so that nothing is taken over."""
    with StoreWriter(folder, os.urandom(8).hex(), x.shape[1], rows_per_shard=(1 << 25) // x.shape[1]) as writer:
        for i in range(repeats * len(tables)):
            at = i % len(tables)
            writer.add(x[at * STUDY:(at + 1) * STUDY], tables[at])
        writer.finish()


def write_plain(path: Path, x: torch.Tensor) -> None:
    """The same bytes into one file, chunk after chunk."""
    data = memoryview(x.numpy()).cast("B")
    with open(path, "wb") as f:
        for i in range(0, len(data), 16 * CHUNK_BYTES): f.write(data[i:i + 16 * CHUNK_BYTES])


def read_plain(path: Path, shape: torch.Size, epochs: int) -> None:
    """The same bytes out of one file, batch after batch, in order, some times over."""
    for _ in range(epochs):
        with open(path, "rb") as f:
            for _ in range(shape[0] // BATCH): torch.from_numpy(np.fromfile(f, np.float32, BATCH * shape[1]))


def read_shuffled(store: Store, epochs: int) -> None:
    """Some epochs in shuffled batches."""
    batches: Iterator = store.batches("train", BATCH, seed=0)
    for _ in range(epochs * len(store) // BATCH): next(batches)


def peer_reader(x: torch.Tensor, folder: Path, epochs: int) -> Callable[[], None] | None:
    """Some shuffled epochs of the same rows with Hugging Face datasets, from disk, where it is installed."""
    if not find_spec("datasets"): return None
    import datasets
    datasets.disable_progress_bars()
    rows = pa.FixedSizeListArray.from_arrays(pa.array(x.numpy().reshape(-1)), x.shape[1])
    datasets.Dataset(pa.table({"x": rows})).save_to_disk(folder)
    data = datasets.load_from_disk(folder).with_format("torch")

    def read() -> None:
        for seed in range(epochs):
            shuffled = data.shuffle(seed=seed)
            for i in range(0, len(data), BATCH): shuffled[i:i + BATCH]["x"]
    return read


READER = """
import resource, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from store import BATCH, Store
store, begin = Store.open(Path(sys.argv[1])), time.perf_counter()
batches = store.batches("train", BATCH, seed=0)
for _ in range(len(store) // BATCH): next(batches)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, time.perf_counter() - begin)
"""


def memory(gigabytes: float, temporary: str, d: int = 4096) -> tuple[float, float]:
    """Peak resident memory in GB, and GB/s, of a fresh process that reads one shuffled epoch of a store of this size."""
    rows = STUDY * 64
    x, folder = torch.randn(rows, d, generator=torch_rng(0, "bench", "memory")), Path(temporary) / "large"
    write_store(folder, x, [tokens(i, STUDY) for i in range(64)], max(1, round(gigabytes * 1e9 / x.nbytes)))
    size = sum(f.stat().st_size for f in folder.glob("shard*")) / 1e9
    done = subprocess.run([sys.executable, "-c", READER, str(folder), str(Path(__file__).parent)], check=True, capture_output=True, text=True)
    peak, took = map(float, done.stdout.split())
    for file in folder.iterdir(): file.unlink()
    return round(peak, 3), round(size / took, 2)


def measure(quick: bool) -> tuple[str, dict, dict, dict]:
    """The shape, our gigabytes a second, theirs, and ours over theirs; where there is time, memory at three sizes of a store."""
    rows, d, rounds, epochs = (1 << 15, 4096, 3, 4) if quick else (1 << 17, 4096, 5, 2)
    sizes = json.loads(os.environ.get("SAERAD_STORE_SIZES", "[]" if quick else "[2, 8, 24]"))
    x = torch.randn(rows, d, generator=torch_rng(0, "bench", "store"))
    tables = [tokens(i, min(STUDY, rows - begin)) for i, begin in enumerate(range(0, rows, STUDY))]
    with tempfile.TemporaryDirectory() as temporary:
        folder, plain = Path(temporary) / "activations", Path(temporary) / "plain"
        wrote = alternate(rounds, ours=lambda: write_store(folder, x, tables), plain=lambda: write_plain(plain, x))
        store, peer = Store.open(folder), peer_reader(x, Path(temporary) / "datasets", epochs)
        works = {"ours": lambda: read_shuffled(store, epochs), "plain": lambda: read_plain(plain, x.shape, epochs)}
        took = alternate(rounds, **works, **({"datasets": peer} if peer else {}))
        size = x.nbytes / 1e9
        del x, store, peer
        held = {f"memory_{gb}_gb": memory(gb, temporary) for gb in progress(sizes, "stores of several sizes")}
    read = {name: epochs * size / seconds for name, seconds in took.items()}
    ours = {"sequential_write": size / wrote["ours"], "sequential_read": read["ours"], "peer_reader": read["ours"]}
    peers = {"sequential_write": size / wrote["plain"], "sequential_read": read["plain"], "peer_reader": read.get("datasets")}
    ratios = {k: ours[k] / peers[k] if peers[k] else None for k in ours}
    return f"{rows} rows of {d} float32, batches of {BATCH}, GB/s", ours | held, peers, ratios


if __name__ == "__main__": report("store", measure)
