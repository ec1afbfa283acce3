"""What 8-bit rows do to a dictionary: FVU on the float32 rows of test patients, trained on one store or on the other, seed by seed.

    python benchmarks/studies/eight_bits.py [CONFIG] [KEY=VALUE ...]        about ten minutes on 2 cores with configs/phantom.yaml
"""
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from saerad.activations.store import TOKEN_SCHEMA, Store, StoreWriter
from saerad.run.config import load_config
from saerad.run.stages import run_config
from saerad.sae.evaluation import fvu
from saerad.sae.training import train_sae
from saerad.show.run_folder import Run

SEEDS = range(3)


def in_eight_bits(store: Store, folder: Path) -> Store:
    """The same rows, study by study, as int8; row order within shards as in the other store."""
    tokens, rows = store.tokens.cast(TOKEN_SCHEMA), store.tokens["study"].combine_chunks().indices.to_numpy()
    with StoreWriter(folder, store.meta["key"] + "-int8", store.d, "int8", store.rows_per_shard) as writer:
        ends = np.flatnonzero(np.diff(rows)) + 1
        for begin, end in list(pairwise([0, *ends.tolist(), len(rows)]))[writer.next_study:]:
            writer.add(store.read(np.arange(begin, end)), tokens.slice(begin, end - begin))
        return writer.finish()


def main(path: str = "configs/phantom.yaml", *settings: str) -> None:
    config, out = load_config(Path(path), settings), Path("runs/eight_bits")
    run_config(config, out / "float32", last="extract")
    stores = {"float32": Run(out / "float32", config).store}
    stores["int8"] = in_eight_bits(stores["float32"], out / "int8")
    x = stores["float32"].read(stores["float32"].where("test"))
    print(f"share of variance lost by rounding: {fvu(x, stores['int8'].read(stores['int8'].where('test'))):.1e}")
    found = {}
    for seed in SEEDS:
        for name, store in stores.items():
            sae = train_sae(store, config.sae, config.training, seed, out / f"{name}-sae-{seed}")
            with torch.no_grad(): found[seed, name] = fvu(x, sae.decode(sae.encode(x)))
    table = pd.Series(found).unstack()
    print(table.assign(change=lambda t: t.int8 / t.float32 - 1).round(4).to_string())


if __name__ == "__main__": main(*sys.argv[1:])
