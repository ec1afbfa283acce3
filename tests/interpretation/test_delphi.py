"""The cache for delphi: every activation once, and readable by delphi itself where it is installed."""
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from word_world import MIXED, SIZES, WORDS, make_sae, make_store

from saerad.core import UserError
from saerad.interpretation.delphi import export_delphi, rectangle


@pytest.fixture(scope="module")
def store(tmp_path_factory): return make_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def dense(store): return make_sae().encode(store.read(np.arange(len(store)))).numpy()


def test_a_cache_for_delphi_holds_every_activation_once(store, dense, tmp_path):
    made = export_delphi(store, make_sae(), tmp_path, splits=7, length=8, block=300)
    study = np.array(store.tokens["study"].to_pylist())
    cells = rectangle(np.unique(study, return_inverse=True)[1], 8)
    back, edges = np.zeros_like(dense), []
    for path in made.glob("*.safetensors"):
        file, (first, last) = load_file(path), map(int, path.stem.split("_"))
        batch, position, feature = file["locations"].T.astype(int)
        assert len(batch) and file["locations"].dtype == np.uint16 and (position < 8).all() and (first + feature <= last).all()
        back[np.searchsorted(cells, batch * 8 + position), first + feature] = file["activations"]
        assert np.array_equal(file["tokens"].ravel()[cells], store.tokens["token_id"].to_numpy())
        edges.append((first, last))
    assert np.allclose(back, dense, rtol=1e-3) and sorted(edges)[0][0] == 0 and sorted(edges)[-1][1] == dense.shape[1] - 1
    assert all(a[1] + 1 == b[0] for a, b in zip(sorted(edges), sorted(edges)[1:], strict=False)) and not list(made.glob("*.part"))
    with pytest.raises(UserError, match="is not empty"): export_delphi(store, make_sae(), tmp_path)
    with pytest.raises(UserError, match="5000 files cannot share"): export_delphi(store, make_sae(), tmp_path / "many", splits=5000)


DELPHI = """
import json, sys
from pathlib import Path
import torch
from exemplars import import_delphi
from word_world import WORDS
latents, constructor, sampler = import_delphi()
class Words:
    def batch_decode(self, ids): return [WORDS[int(i)] for i in torch.as_tensor(ids).flatten()]
folder, chosen = Path(sys.argv[1]), torch.tensor([int(f) for f in sys.argv[2:]])
read = latents.LatentDataset(folder.parent, sampler(n_examples_train=5, n_examples_test=5, n_quantiles=5),
                             constructor(example_ctx_len=16, n_non_activating=5, min_examples=5), Words(), [folder.name], {folder.name: chosen})
for r in read: print(json.dumps([e.str_tokens[int(e.activations.argmax())] for e in [*r.train, *r.test]]))
"""


def test_delphi_itself_reads_the_cache(store, tmp_path):
    root = Path(__file__).parents[2]
    python = root / ".venv-bench/bin/python"
    if not python.exists(): pytest.skip("delphi is not installed; `make bench-env` does that")
    made = export_delphi(store, make_sae(), tmp_path, splits=5, length=32)
    known = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (root, root / "tests", root / "benchmarks")))}
    done = subprocess.run([python, "-c", DELPHI, made, str(WORDS.index("effusion")), str(MIXED)], env=known, capture_output=True, text=True)
    found = [set(json.loads(line)) for line in done.stdout.splitlines() if line.startswith("[")]
    assert done.returncode == 0 and len(found) == 2 and found[0] == {"effusion"} and found[1] <= set(SIZES), done.stderr
