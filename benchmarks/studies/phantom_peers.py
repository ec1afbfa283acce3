"""FVU on phantom's activations beside `dictionary_learning` and SAELens: same rows, same batches, same steps, same L0, seed by seed.

    python benchmarks/studies/phantom_peers.py [CONFIG] [KEY=VALUE ...]        needs `make bench-env`; half an hour on 2 cores

Every library trains with its own loss, start and revival of dead features, and the same rise and fall of its rate. All are examined in the same way:
in batches of 4,096 test tokens the strongest k × 4,096 activations are kept, so that L0 is k for everybody.

One rate is not the same thing to all of them: SAELens starts its decoder rows at a tenth of the length at which the others hold theirs, and
Adam, whose steps do not know how long a row is, turns them ten times as far. So each library is tried at several multiples of the usual rate.
"""
import json
import sys
from itertools import product
from pathlib import Path

import pandas as pd
import safetensors.torch as st

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sae import in_a_process, peer_python  # noqa: E402

from saerad.run.config import load_config  # noqa: E402
from saerad.run.stages import run_config
from saerad.show.run_folder import Run

SEEDS = range(2)
RATES = 1, 2, 4          # times 2e-4 / sqrt(width / 2^14)

COMMON = '''
import json, sys
import safetensors.torch as st
import torch
s = json.loads(sys.argv[1])
d, width, k, batch, steps, seed = (s[n] for n in ("d", "width", "k", "batch", "steps", "seed"))
lr = s["rate"] * 2e-4 / (width / 2**14) ** 0.5
rows = st.load_file(s["rows"])
train, test = rows["train"], rows["test"]
order = torch.randint(len(train), (steps, batch), generator=torch.Generator().manual_seed(seed))
torch.manual_seed(seed)
scale = train[:16384].square().sum(1).mean().sqrt()
def report(rebuild):
    """FVU of the test rows, whole batches of them, around their mean."""
    whole = test[:len(test) // 4096 * 4096]
    with torch.no_grad(): rebuilt = torch.cat([rebuild(x) for x in whole.split(4096)])
    print(json.dumps({"fvu": float((rebuilt - whole).square().sum() / (whole - whole.mean(0)).square().sum())}))
'''

OURS = COMMON + '''
import tempfile
from saerad.sae.kinds import batch_topk
from saerad.sae.model import SAEConfig
from saerad.sae.training import TrainingConfig, train_sae
class Rows:
    meta = {"rows": s["rows"]}
    d = train.shape[1]
    def batches(self, split, batch_size, seed, start=0):
        for step in range(start, 10**9): yield step, order[step % steps].numpy(), train[order[step % steps]]
with tempfile.TemporaryDirectory() as folder:
    sae = train_sae(Rows(), SAEConfig(expansion=width // d, k=k), TrainingConfig(steps=steps, batch_size=batch, lr=lr), seed, folder)
def rebuild(x):
    kept = batch_topk((x / sae.scale - sae.b_dec) @ sae.W_enc + sae.b_enc, k)
    z = torch.zeros(len(x), width)
    z[kept.row, kept.col] = kept.value
    return sae.decode(z)
report(rebuild)
'''

DICTIONARY_LEARNING = COMMON + '''
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
trainer = MatryoshkaBatchTopKTrainer(steps=steps, activation_dim=d, dict_size=width, k=k, layer=0, lm_name="none", device="cpu", seed=seed, lr=lr,
                                     group_fractions=[1/16, 1/16, 1/8, 1/4, 1/2], warmup_steps=steps // 20, decay_start=steps * 4 // 5)
for step in range(steps): trainer.update(step, train[order[step]] / scale)
report(lambda x: trainer.ae.decode(trainer.ae.encode(x / scale, use_threshold=False)) * scale)
'''

SAE_LENS = COMMON + '''
import itertools
from sae_lens import MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput
sizes = [width // 16, width // 16, width // 8, width // 4, width // 2]
sae = MatryoshkaBatchTopKTrainingSAE(MatryoshkaBatchTopKTrainingSAEConfig(
    d_in=d, d_sae=width, k=k, matryoshka_widths=list(itertools.accumulate(sizes)), device="cpu", dtype="float32"))
optimizer = torch.optim.Adam(sae.parameters(), lr=lr)
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1, (i + 1) / (steps / 20), (steps - i) / (steps / 5)))
silent = torch.zeros(width)
def forward(x, step): return sae.training_forward_pass(TrainStepInput(sae_in=x / scale, coefficients={}, dead_neuron_mask=silent > 1000,
                                                                      n_training_steps=step, is_logging_step=False))
for step in range(steps):
    out = forward(train[order[step]], step)
    optimizer.zero_grad()
    out.loss.backward()
    torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    silent = torch.where((out.feature_acts > 0).any(0), 0, silent + 1)
report(lambda x: forward(x, steps).sae_out * scale)
'''


def main(path: str = "configs/phantom.yaml", *settings: str) -> None:
    config, out = load_config(Path(path), settings), Path("runs/phantom_peers")
    run_config(config, out / "base", last="extract")
    store, rows = Run(out / "base", config).store, (out / "rows.safetensors").resolve()
    st.save_file({split: store.read(store.where(split)) for split in ("train", "test")}, rows)
    contenders = {"saerad": (sys.executable, OURS)}
    if peer := peer_python(): contenders |= {"dictionary_learning": (peer, DICTIONARY_LEARNING), "sae_lens": (peer, SAE_LENS)}
    shape = {"d": store.d, "width": store.d * config.sae.expansion, "k": config.sae.k, "batch": config.training.batch_size,
             "steps": config.training.steps, "rows": str(rows)}
    found = []
    for seed, rate in product(SEEDS, RATES):
        for name, (python, code) in contenders.items():
            result = in_a_process(python, code, shape | {"seed": seed, "rate": rate})
            found.append({"seed": seed, "rate": rate, "library": name, "fvu": result and result["fvu"]})
            print(found[-1], flush=True)
    print(json.dumps({k: v for k, v in shape.items() if k != "rows"}))
    print(pd.DataFrame(found).pivot(index=["seed", "rate"], columns="library", values="fvu").round(4).to_string())


if __name__ == "__main__": main(*sys.argv[1:])
