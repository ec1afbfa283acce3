"""Bytes a second of the store: written, and read in shuffled batches, beside the same bytes in one plain file in order."""
import os
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from _bench import alternate, report

from saerad.core import torch_rng
from saerad.store import TOKEN_SCHEMA, Store, StoreWriter

CHUNK, BATCH, STUDY = 1 << 24, 4096, 150


def tokens(number: int, n: int) -> pa.Table:
    """The table of a study of `n` tokens."""
    same = {"study": f"study{number}", "patient": f"patient{number}", "split": "train", "section": "findings", "view": "",
            "row": -1, "col": -1, "start": 0, "end": 4, "token_id": 1, "text": " lung"}
    return pa.table({k: [v] * n for k, v in same.items()} | {"position": range(n)}, schema=TOKEN_SCHEMA)


def write_store(folder: Path, x: torch.Tensor, tables: list[pa.Table]) -> None:
    """Write `x` study by study, as extraction does; a new key each time, so that nothing is taken over."""
    with StoreWriter(folder, os.urandom(8).hex(), x.shape[1], rows_per_shard=(1 << 25) // x.shape[1]) as writer:
        for i, table in enumerate(tables): writer.add(x[i * STUDY:(i + 1) * STUDY], table)
        writer.finish()


def write_plain(path: Path, x: torch.Tensor) -> None:
    """The same bytes into one file, chunk after chunk."""
    data = memoryview(x.numpy()).cast("B")
    with open(path, "wb") as f:
        for i in range(0, len(data), CHUNK): f.write(data[i:i + CHUNK])


def read_plain(path: Path, shape: torch.Size) -> None:
    """The same bytes out of one file, batch after batch, in order."""
    with open(path, "rb") as f:
        for _ in range(shape[0] // BATCH): torch.from_numpy(np.fromfile(f, np.float32, BATCH * shape[1]))


def read_shuffled(store: Store) -> None:
    """One epoch in shuffled batches."""
    batches: Iterator = store.batches("train", BATCH, seed=0)
    for _ in range(len(store) // BATCH): next(batches)


def peer_reader(x: torch.Tensor, folder: Path) -> Callable[[], None] | None:
    """One shuffled epoch of the same rows with Hugging Face datasets, from disk, where it is installed."""
    if not find_spec("datasets"): return None
    import datasets
    rows = pa.FixedSizeListArray.from_arrays(pa.array(x.numpy().reshape(-1)), x.shape[1])
    datasets.Dataset(pa.table({"x": rows})).save_to_disk(folder)
    data = datasets.load_from_disk(folder).with_format("torch")

    def read() -> None:
        shuffled = data.shuffle(seed=0)
        for i in range(0, len(data) - BATCH, BATCH): shuffled[i:i + BATCH]
    return read


def measure(quick: bool) -> tuple[str, dict, dict, dict]:
    """The shape, our gigabytes a second, theirs, and ours over theirs."""
    rows, d, rounds = (1 << 16, 512, 3) if quick else (1 << 17, 4096, 5)
    x = torch.randn(rows, d, generator=torch_rng(0, "bench", "store"))
    tables = [tokens(i, min(STUDY, rows - begin)) for i, begin in enumerate(range(0, rows, STUDY))]
    with tempfile.TemporaryDirectory() as temporary:
        folder, plain = Path(temporary) / "activations", Path(temporary) / "plain"
        wrote = alternate(rounds, ours=lambda: write_store(folder, x, tables), plain=lambda: write_plain(plain, x))
        store, peer = Store.open(folder), peer_reader(x, Path(temporary) / "datasets")
        works = {"ours": lambda: read_shuffled(store), "plain": lambda: read_plain(plain, x.shape)}
        took = alternate(rounds, **works, **({"datasets": peer} if peer else {}))
    size = x.nbytes / 1e9
    ours = {"sequential_write": size / wrote["ours"], "sequential_read": size / took["ours"], "peer_reader": size / took["ours"]}
    peers = {"sequential_write": size / wrote["plain"], "sequential_read": size / took["plain"],
             "peer_reader": size / took["datasets"] if peer else None}
    ratios = {k: ours[k] / peers[k] if peers[k] else None for k in ours}
    return f"{rows} rows of {d} float32, batches of {BATCH}, GB/s", ours, peers, ratios


if __name__ == "__main__": report("store", measure)
