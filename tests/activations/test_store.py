"""The store: what is written is what is read, whatever happens in between."""
import errno
import gc
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pretend_device import Pretend
from safetensors import safe_open
from xxhash import xxh3_128

from saerad.activations.store import TOKEN_SCHEMA, Store, StoreWriter, unpack_rows
from saerad.core import UserError, rng

D, STUDIES = 8, 30


def study(number: int, d: int = D) -> tuple[torch.Tensor, pa.Table]:
    """Rows and tokens of a study; one of them has no rows, one is longer than two shards."""
    n = 0 if number == 4 else 230 if number == 7 else 5 + number * 7 % 23
    x = torch.from_numpy(rng(0, "rows", number).normal(size=(n, d))).float()
    same = {"study": f"s{number}", "patient": f"p{number // 2}", "split": "train" if number < 20 else "test",
            "section": "findings" if number % 2 else "indication", "view": "", "row": -1, "col": -1, "start": -1, "end": -1}
    own = {"token_id": range(n), "text": [f"w{i}" for i in range(n)], "position": range(n)}
    return x, pa.table({k: [v] * n for k, v in same.items()} | own, schema=TOKEN_SCHEMA)


def write(folder: Path, upto: int = STUDIES, key: str = "k", finish: bool = True, dtype: str = "float32") -> StoreWriter:
    with StoreWriter(folder, key, D, dtype, rows_per_shard=100, made_from={"layer": 3}) as writer:
        for i in range(writer.next_study, upto):
            if i == 5: writer.skip("s5", "no picture")
            else: writer.add(*study(i))
        if finish: writer.finish()
    return writer


def contents(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store") / "activations"
    write(folder)
    return folder


def expected() -> tuple[torch.Tensor, pa.Table]:
    parts = [study(i) for i in range(STUDIES) if i != 5]
    return torch.cat([x for x, _ in parts]), pa.concat_tables([t for _, t in parts])


def test_reads_what_was_written(whole: Path) -> None:
    store, (x, tokens) = Store.open(whole), expected()
    assert len(store) == len(x) and store.d == D
    assert torch.equal(store.read(np.arange(len(x))), x)
    assert store.tokens.cast(TOKEN_SCHEMA).equals(tokens)
    rows = rng(1).integers(len(x), size=500)
    assert torch.equal(store.read(rows), x[rows])
    assert store.read(np.array([], dtype=int)).shape == (0, D)
    for wrong in (-1, len(x)):
        with pytest.raises(IndexError): store.read(np.array([wrong]))


def test_files_are_plain(whole: Path) -> None:
    """Anybody can read a store with safetensors and Parquet alone, as the format's page says."""
    meta, (x, tokens) = json.loads((whole / "store.json").read_text(encoding="utf-8")), expected()
    assert meta["format"] == 2 and meta["parts"] == [STUDIES]
    assert sorted(p.name for p in whole.iterdir()) == sorted(["store.json", "tokens.parquet", *(s["file"] for s in meta["shards"])])
    seen = []
    for shard in meta["shards"]:
        assert xxh3_128((whole / shard["file"]).read_bytes()).hexdigest() == shard["xxh3"]
        with safe_open(whole / shard["file"], "pt") as f: rows, order = f.get_tensor("activations"), f.get_tensor("order")
        assert sorted(order) == list(range(shard["rows"])) != order.tolist()
        seen.append(rows[order.argsort()])
    assert [len(s) for s in seen[:-1]] == [100] * (len(seen) - 1) and torch.equal(torch.cat(seen), x)
    table = pq.ParquetFile(whole / "tokens.parquet")
    assert [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)] == [len(s) for s in seen]
    assert meta["splits"]["train"] == {"rows": tokens["split"].to_pylist().count("train"), "studies": 18}
    assert meta["problems"] == [{"number": 5, "study": "s5", "problem": "no picture"}] and meta["made_from"] == {"layer": 3}


def test_bfloat16(tmp_path: Path) -> None:
    write(tmp_path, dtype="bfloat16")
    x = expected()[0]
    assert torch.equal(Store.open(tmp_path).read(np.arange(len(x))), x.bfloat16().float())


def test_int8(tmp_path: Path) -> None:
    """Every number is within half a step of what it was, and a step is a 127th of the largest of its run."""
    write(tmp_path, dtype="int8")
    store, x = Store.open(tmp_path), expected()[0]
    y = store.read(np.arange(len(x)))
    assert 0 < (y - x).abs().max() and ((y - x).abs() <= x.abs().amax(1, keepdim=True) / 127 * 0.501).all()
    _, rows, dealt = next(store.batches("train", 50, 0))
    assert torch.equal(dealt, y[rows])


def test_where_and_study_rows(whole: Path) -> None:
    store, tokens = Store.open(whole), expected()[1].to_pandas()
    assert store.where().tolist() == list(range(len(store)))
    both = (tokens.split == "test") & (tokens.section == "findings")
    assert store.where("test", "findings").tolist() == np.flatnonzero(both).tolist()
    assert store.where(section="findings").dtype == np.int64 and not len(store.where("validation"))
    ranges = store.study_rows()
    assert list(ranges) == list(dict.fromkeys(tokens.study))
    for name, rows in ranges.items(): assert set(tokens.study[rows.start:rows.stop]) == {name}
    assert sum(map(len, ranges.values())) == len(store)


def test_batches_are_permutations_and_resume_anywhere(whole: Path) -> None:
    store = Store.open(whole)
    train, size = store.where("train"), 37
    stream = store.batches("train", size, seed=3)
    steps = [next(stream) for _ in range(4 * len(train) // size)]
    assert [s for s, _, _ in steps] == list(range(len(steps)))
    read = np.concatenate([rows for _, rows, _ in steps])
    for epoch in range(3):
        order = read[epoch * len(train):(epoch + 1) * len(train)]
        assert sorted(order) == train.tolist() and order.tolist() != train.tolist()
    assert read[:len(train)].tolist() != read[len(train):2 * len(train)].tolist()
    for start in (1, len(train) // size, len(steps) - 1):
        step, rows, x = next(store.batches("train", size, seed=3, start=start))
        assert step == start and np.array_equal(rows, steps[start][1]) and torch.equal(x, steps[start][2])
        assert torch.equal(x, store.read(rows))
    assert not np.array_equal(next(store.batches("train", size, seed=4))[1], steps[0][1])
    assert len(next(store.batches("test", 5 * len(store), seed=0))[1]) == 5 * len(store)
    with pytest.raises(UserError, match="validation"): store.batches("validation", 8, seed=0)


@pytest.mark.parametrize("copying", [1, 5])
def test_pools_are_the_same_however_many_threads_fill_them(whole: Path, copying: int) -> None:
    store = Store.open(whole)
    def pools(threads: int) -> list[dict[str, np.ndarray]]:
        filled = store._filled_pools(store._shard_slices("train"), 0, 3, "train", 37, copying=threads)
        return [{name: values.copy() for name, values in next(filled)[1].items()} for _ in range(12)]
    for one, other in zip(pools(copying), pools(0), strict=True):
        assert all(np.array_equal(one[name], other[name]) for name in one)
        assert torch.equal(unpack_rows(one), store.read(one["order"]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_rows_are_unpacked_where_they_go(dtype: str, tmp_path: Path) -> None:
    write(tmp_path, dtype=dtype)
    store = Store.open(tmp_path)
    expected = [next(store.batches("train", 32, 1, start=i)) for i in range(3)]
    with Pretend() as device:
        stream = store.batches("train", 32, 1, device=device)
        for step, rows, x in expected:
            at, order, there = next(stream)
            assert at == step and np.array_equal(order, rows) and there.device == device and torch.equal(there.cpu(), x)


def test_neighbours_are_not_related(tmp_path: Path) -> None:
    """Studies of consecutive rows correlate no more than chance allows at the 1 % level."""
    write(tmp_path)
    store = Store.open(tmp_path)
    number = np.array([int(s[1:]) for s in store.tokens["study"].to_pylist()])
    read = np.concatenate([rows for _, (_, rows, _) in zip(range(40), store.batches("train", 50, 0), strict=False)])
    assert abs(np.corrcoef(number[read][:-1], number[read][1:])[0, 1]) < 2.58 / np.sqrt(len(read))


@pytest.mark.parametrize("upto", [0, 1, 6, 8, 15, STUDIES])
def test_resumes_with_the_same_bytes(whole: Path, tmp_path: Path, upto: int) -> None:
    begun = write(tmp_path, upto, finish=False)
    again = write(tmp_path, upto, finish=False)
    assert again.shards == begun.shards and again.next_study == upto
    write(tmp_path)
    assert contents(tmp_path) == contents(whole)


KILLED = """
    import sys
    sys.path[:0] = [{tests!r}, {tests!r} + "/.."]
    from pathlib import Path
    from test_store import STUDIES, study
    from saerad.activations.store import StoreWriter
    print("ready", flush=True)
    with StoreWriter(Path({folder!r}), "k", 8, "float32", rows_per_shard=100, made_from=dict(layer=3)) as writer:
        for i in range(writer.next_study, STUDIES):
            if i == 5: writer.skip("s5", "no picture")
            else: writer.add(*study(i))
        writer.finish()
"""


def test_killed_at_any_moment(whole: Path, tmp_path: Path) -> None:
    """A real process, killed for good in the middle of its writing, some while after another one."""
    code = textwrap.dedent(KILLED.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    for delay in (0.004, 0.012, 0.02, 0.03):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        try: process.wait(delay)
        except subprocess.TimeoutExpired: process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    write(tmp_path)
    assert contents(tmp_path) == contents(whole)


def test_killed_between_any_two_writes(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process ends just before each rename in turn: whatever is on disk then, the next start makes it good."""
    rename, count = os.replace, 0
    for stop in range(40):
        folder, count = tmp_path / str(stop), 0

        def counted(a: str, b: str, stop: int = stop) -> None:
            nonlocal count
            count += 1
            if count > stop: raise KeyboardInterrupt
            rename(a, b)
        monkeypatch.setattr(os, "replace", counted)
        try: write(folder)
        except KeyboardInterrupt: pass
        else: break
        finally: monkeypatch.setattr(os, "replace", rename)
        with pytest.raises(UserError, match="no finished store"): Store.open(folder)
        write(folder)
        assert contents(folder) == contents(whole)
    assert stop > 10


def test_killed_after_the_record(whole: Path, tmp_path: Path) -> None:
    """`store.json` stands but what was only needed while writing has not been removed yet."""
    write(tmp_path, finish=False)
    left = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    write(tmp_path)
    for name, data in left.items(): (tmp_path / name).write_bytes(data)
    (tmp_path / ".shard-00001.safetensors.1.part").write_bytes(b"half")
    write(tmp_path)
    assert contents(tmp_path) == contents(whole)


@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
@pytest.mark.parametrize("name", ["shard-00002.safetensors", "tokens.parquet"])
def test_damage_is_named_and_mended(whole: Path, tmp_path: Path, harm: str, name: str) -> None:
    write(tmp_path)
    path = tmp_path / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    if harm == "remove": path.unlink()
    else: path.write_bytes(data if harm == "flip" else data[:-9])
    with pytest.raises(UserError, match=name): Store.open(tmp_path).verify()
    if harm != "flip" and name.startswith("shard"):
        with pytest.raises(UserError, match=name): Store.open(tmp_path)
    with StoreWriter(tmp_path, "k", D, rows_per_shard=100) as writer:
        assert len(writer.shards) == (2 if name.startswith("shard") else 0)
    write(tmp_path)
    Store.open(tmp_path).verify()
    assert contents(tmp_path) == contents(whole)


def test_damage_while_unfinished(whole: Path, tmp_path: Path) -> None:
    """Good shards before the damaged one are kept; the rest is written again."""
    write(tmp_path, finish=False)
    path = tmp_path / "shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with StoreWriter(tmp_path, "k", D, rows_per_shard=100) as writer: assert len(writer.shards) == 1
    write(tmp_path)
    assert contents(tmp_path) == contents(whole)


def test_another_key_empties_the_folder(whole: Path, tmp_path: Path) -> None:
    write(tmp_path, key="other")
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    write(tmp_path)
    assert (tmp_path / "notes.txt").read_text(encoding="utf-8") == "mine"
    (tmp_path / "notes.txt").unlink()
    assert contents(tmp_path) == contents(whole)


def test_record_that_is_no_json(whole: Path, tmp_path: Path) -> None:
    write(tmp_path, 15, finish=False)
    (tmp_path / "part-00000.json").write_text("{", encoding="utf-8")
    write(tmp_path)
    assert contents(tmp_path) == contents(whole)


def test_second_writer_is_refused(tmp_path: Path) -> None:
    with StoreWriter(tmp_path, "k", D), pytest.raises(UserError, match="Another process"): StoreWriter(tmp_path, "k", D)
    StoreWriter(tmp_path, "k", D).__exit__()


def test_full_disk(whole: Path, tmp_path: Path) -> None:
    """Files may not grow beyond 2 kB, which is less than a shard: one sentence, nothing half-written, and it goes on after."""
    write(tmp_path, 8, finish=False)
    before = contents(tmp_path)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limit[1]))
    try:
        with pytest.raises(UserError, match="No space is left to write .*shard"): write(tmp_path)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert contents(tmp_path) == before
    write(tmp_path)
    assert contents(tmp_path) == contents(whole)


def test_full_tmpfs(tmp_path: Path) -> None:
    """The same on a real file system without space, where the tests may mount one."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24k", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(UserError, match="No space is left"): write(small / "activations")
        assert not list((small / "activations").glob("*.part")) and not (small / "activations" / "store.json").exists()
    finally:
        gc.collect()        # Arrow's handle on the file that failed
        subprocess.run(["umount", str(small)], check=True)


def test_other_faults_of_the_disk_are_not_called_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(a: str, b: str) -> None: raise OSError(errno.EIO, "Input/output error")
    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="Input/output"): write(tmp_path)


def test_nothing_kept(tmp_path: Path) -> None:
    with StoreWriter(tmp_path, "k", D) as writer:
        writer.add(*study(4))
        with pytest.raises(UserError, match="No token was kept"): writer.finish()


def test_rows_and_tokens_must_agree(tmp_path: Path) -> None:
    x, tokens = study(1)
    with StoreWriter(tmp_path, "k", D) as writer, pytest.raises(ValueError): writer.add(x[1:], tokens)
