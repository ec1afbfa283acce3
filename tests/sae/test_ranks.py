"""Two and four real processes against one: selection, weights, threshold, metrics and checkpoints."""
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch as st
import torch
from nursery import nursery, ranks
from word_world import make_store

from saerad.core import UserError
from saerad.sae.model import SAEConfig
from saerad.sae.ranks import Ranks
from saerad.sae.training import TrainingConfig, train_sae

sys.path.insert(0, str(Path(__file__).parent))
from test_training import Vectors  # noqa: E402

SETTINGS = TrainingConfig(steps=24, batch_size=128, lr=3e-3, dead_after=0.05, aux_k=2, start_rows=256, checkpoint_every=10, log_every=1,
                          engine="sparse")
SHAPE = SAEConfig(k=2, expansion=4, group_fractions=(1/4, 1/4, 1/2))
KINDS = {"batch_topk": (SHAPE, SETTINGS),
         "topk": (SHAPE.model_copy(update={"kind": "topk"}), SETTINGS.model_copy(update={"lr": "auto"})),     # a rate that depends on the whole width
         "jumprelu": (SHAPE.model_copy(update={"kind": "jumprelu"}), SETTINGS.model_copy(update={"engine": "auto"}))}

RUN = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/.."]
import left_threads
import torch
import torch._dynamo        # each fork would: optimizers ask for it
torch.set_num_threads(1)
from test_ranks import KINDS
from test_training import Vectors
from saerad.sae.training import train_sae

def do(out, stop, kind):
    class Stops(Vectors):
        def batches(self, *args, **kwargs):
            for step, rows, x in super().batches(*args, **kwargs):
                if step == int(stop): raise KeyboardInterrupt
                yield step, rows, x
    shape, settings = KINDS[kind]
    for shard in (False, True):
        try: train_sae(Stops(), shape, settings.model_copy(update=dict(shard=shard)), 0, out + ("/shard" if shard else "/batch"))
        except KeyboardInterrupt: pass
"""


@pytest.fixture(scope="module")
def forks():
    """The training of several processes, as often as is wanted."""
    env = os.environ | {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with nursery(RUN, str(Path(__file__).parent), env=env) as forks: yield forks


def launch(forks, size: int, out: Path, stop: int = 10**6, kind: str = "batch_topk") -> None:
    forks.start(out, stop, kind, errors=out / "errors", environments=ranks(size))
    assert forks.end() == [0] * size, (out / "errors").read_text(encoding="utf-8")[-3000:]


@pytest.mark.parametrize("size", [2, 4])
def test_several_processes_train_what_one_trains(size, forks, tmp_path):
    train_sae(Vectors(), SHAPE, SETTINGS, 0, tmp_path / "one")
    if size == 2: launch(forks, size, tmp_path, stop=13)               # killed between two checkpoints, then taken up again
    launch(forks, size, tmp_path)
    expected = st.load_file(tmp_path / "one/sae.safetensors")
    log = [json.loads(line) for line in (tmp_path / "one/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert max(m["aux"] for m in log) > 0 and max(m["dead"] for m in log) > 0
    for way in ("batch", "shard"):
        found = st.load_file(tmp_path / way / "sae.safetensors")
        for name, t in expected.items(): assert torch.allclose(found[name], t, atol=2e-4), (way, name)
        ours = [json.loads(line) for line in (tmp_path / way / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        assert len(ours) == len(log)
        for a, b in zip(ours, log, strict=True): assert a == pytest.approx(b, rel=1e-3, abs=1e-4), way
        config = json.loads((tmp_path / way / "config.json").read_text(encoding="utf-8"))
        assert config["group_sizes"] == [12, 12, 24] and config["k"] == 2
    assert len(list((tmp_path / "shard/checkpoint").iterdir())) == size


@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
def test_other_kinds_are_shared_out_and_put_together(kind, forks, tmp_path):
    """TopK keeps the k strongest of a token among all processes' features; thresholds of features come back with them."""
    train_sae(Vectors(), *KINDS[kind], 0, tmp_path / "one")
    launch(forks, 2, tmp_path, kind=kind)
    expected, l0 = st.load_file(tmp_path / "one/sae.safetensors"), {}
    for way in ("one", "batch", "shard"):
        found = st.load_file(tmp_path / way / "sae.safetensors")
        assert (tmp_path / way / "training.json").read_bytes() == (tmp_path / "one/training.json").read_bytes()
        assert found.keys() == expected.keys() and (kind == "topk" or found["log_threshold"].std() > 0)
        for name, t in expected.items(): assert torch.allclose(found[name], t, atol=1e-3), (way, name)
        l0[way] = [json.loads(line)["l0"] for line in (tmp_path / way / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert l0["batch"] == pytest.approx(l0["one"], rel=0.02) == l0["shard"] and (kind == "jumprelu" or max(l0["shard"]) <= 2)


@pytest.mark.parametrize("k", [1, 7, 500, 999, 100_000])
def test_kth_largest_is_exact(k):
    values = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    values[100:200] = values[50]
    positive = values[values > 0].sort(descending=True).values
    assert Ranks().kth_largest(values, k) == (positive[k - 1] if k <= len(positive) else 0)
    assert Ranks().kth_largest(torch.zeros(3), 1) == 0


def test_the_strongest_of_a_token():
    z = torch.rand(5, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Ranks().strongest(z, 3)[:, 0], z.sort(descending=True).values[:, 2])
    assert Ranks().strongest(z, 9).count_nonzero() == 0


def test_slices_of_a_store_on_disk_are_the_batch(tmp_path):
    """The processes' slices, put together, are the batch of one process, in its order."""
    store = make_store(tmp_path, studies=40)
    _, rows, x = next(store.batches("train", 64, 0))
    slices = [next(Ranks(rank, 4).reader(store).batches("train", 64, 0)) for rank in range(4)]
    assert [len(s[1]) for s in slices] == [16] * 4
    assert np.concatenate([s[1] for s in slices]).tolist() == rows.tolist() and torch.equal(torch.cat([s[2] for s in slices]), x)


def test_what_cannot_be_shared_is_said():
    with pytest.raises(UserError, match="batch_size is 10.*3 processes"): Ranks(0, 3).check(10, [])
    with pytest.raises(UserError, match="group of 5"): Ranks(0, 2, shard=True).check(10, [[4, 5]])
    Ranks(0, 2, shard=True).check(7, [[4, 6]])
