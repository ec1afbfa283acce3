"""FVU of `training.lr: auto` beside what the peers do by default: same rows, batches, width, k and number of steps, seed by seed.

    python benchmarks/rates.py [--minutes 10] [--batch 256] [--only CONTENDER,...] [NAME=STORE ...]

Three stores (phantom's layer 4, phantom's layer 0 with image tokens, and OpenI read by stories260K), 500, 2,000 and 10,000 steps, seeds 0 to 2.
What is finished is kept in `benchmarks/rates.json` and not done again; `--minutes` ends a sitting. A store that is not named is extracted into
`runs/rates`. All train a Matryoshka BatchTopK SAE and are examined in the same way: in batches of 4,096 held-out tokens the strongest k × 4,096
activations are kept, so that L0 is k for everybody.

`dictionary_learning` (0.1.0): 2e-4 / sqrt(width / 2^14) after 1,000 steps of warm-up, no decay, AuxK after 10 M tokens, which no run here reaches.
A run of 500 steps it refuses; there its warm-up is a twentieth of the run. Its step is this engine's (tests/sae/test_training.py), so it is run here.
`sae_lens` (6.54.12): 3e-4 from the first step to the last, rows as they are, decoder rows that start at a tenth and are not held at any length.
`sae_lens_field`: the same step on rows of length 1, with dictionary_learning's rate and this project's rise and fall, which serves it better.
SAELens's step is written down below with sparse products. `--only "sae_lens (own)"` and `--only "dictionary_learning (own)"` train with the
peers' own classes (`make bench-env`), to see that this is no other thing.
"""
import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from _bench import machine
from sae import ROOT, in_a_process, peer_python
from torch import Tensor

from saerad.activations.store import Store
from saerad.core import write_json
from saerad.run.config import load_config
from saerad.run.stages import run_config
from saerad.sae.kinds import Selected, batch_topk
from saerad.sae.model import MatryoshkaSAE, SAEConfig
from saerad.sae.training import Trainer, TrainingConfig, initial_sae, sparse_loss

STOPS, SEEDS, K = (500, 2000, 10_000), (0, 1, 2), {"phantom": 32, "patches": 32, "openi": 16}
STORES = {"phantom": ("phantom", []),
          "patches": ("phantom", ["extraction.layer=0", "extraction.image_tokens=sample:16"]),
          "openi": ("openi", ["subject.model=shared/data/stories260k/hf", "extraction.layer=2"])}
RATES = 1, 2, 4, 8, 16, 32      # of 2e-4 / sqrt(width / 2^14): where the rule was looked for, on phantom and openi, seed 0, validation patients
BUT = {"encoder at 1": {"encoder_start": 1.0}, "AuxK 1/32": {"aux_alpha": 1 / 32}, "no AuxK": {"aux_alpha": 0.0}}      # one default less, seed 0


class Rows:
    """A store's rows in memory, dealt in an order that depends on the seed alone."""
    def __init__(self, name: str, store: Store, batch: int):
        self.name, self.d, self.batch, self.meta = name, store.d, batch, store.meta
        self.rows = {split: store.read(store.where(split)) for split in ("train", "validation", "test")}

    def order(self, seed: int) -> Tensor:
        return torch.randint(len(self.rows["train"]), (max(STOPS), self.batch), generator=torch.Generator().manual_seed(seed))

    def batches(self, split: str, batch_size: int, seed: int, start: int = 0) -> Iterator[tuple[int, Tensor, Tensor]]:
        for step, rows in enumerate(self.order(seed)[start:], start): yield step, rows, self.rows["train"][rows]


def fvu(sae: MatryoshkaSAE, rows: Tensor, most: int = 20_480) -> float:
    """Of whole batches of 4,096 rows, around their mean; decoder rows may have any length."""
    rows = rows[:min(most, len(rows) // 4096 * 4096)]
    return sum(float((rebuilt(sae, x) - x).square().sum()) for x in rows.split(4096)) / float((rows - rows.mean(0)).square().sum())


@torch.no_grad()
def kept(sae: MatryoshkaSAE, x: Tensor) -> Selected:
    """The strongest activations of normalised rows, told by the length of what they add, as SAELens does."""
    length = sae.W_dec.norm(dim=1)
    on = batch_topk(((x - sae.b_dec) @ sae.W_enc + sae.b_enc) * length, sae.k)
    return Selected(on.row, on.col, on.value / length[on.col], on.cut)


@torch.no_grad()
def rebuilt(sae: MatryoshkaSAE, x: Tensor) -> Tensor:
    on = kept(sae, x / sae.scale)
    z = torch.zeros(len(x), sae.width)
    z[on.row, on.col] = on.value
    return sae.decode(z)


def ours(rows: Rows, seed: int, stops: tuple[int, ...], **settings: object) -> Iterator[MatryoshkaSAE]:
    """The SAE after each of some steps; settings as in a config."""
    cfg = TrainingConfig(**({"steps": stops[-1], "batch_size": rows.batch} | settings))
    trainer = Trainer(initial_sae(rows, SAEConfig(k=K[rows.name]), cfg, seed), cfg)
    for step, _, x in rows.batches("train", rows.batch, seed):
        trainer.train_step(x, measured=False)
        if step + 1 in stops: yield trainer.sae
        if step + 1 == stops[-1]: return


def field_rate(width: int) -> float: return 2e-4 / (width / 2**14) ** 0.5


def dictionary_learning(rows: Rows, seed: int, stops: tuple[int, ...]) -> Iterator[MatryoshkaSAE]:
    steps = stops[-1]
    yield from ours(rows, seed, stops, lr=field_rate(4 * rows.d), warmup=1000 / steps if steps > 1000 else 0.05, decay=0, aux_alpha=0)


def sae_lens(rows: Rows, seed: int, stops: tuple[int, ...], field: bool = False) -> Iterator[MatryoshkaSAE]:
    """SAELens's step: the sum of the levels' errors, AuxK for what was silent for 1,000 steps, clipping at 1 and Adam."""
    sae = MatryoshkaSAE.from_config(rows.d, SAEConfig(k=K[rows.name]), seed)
    with torch.no_grad(): sae.W_dec.mul_(0.1), sae.W_enc.mul_(0.1)
    if field: sae.scale.copy_(rows.rows["train"][rows.order(seed)[:16]].square().sum(-1).mean().sqrt())
    adam, silent = torch.optim.Adam(sae.parameters(), lr=3e-4), torch.zeros(sae.width)
    rate = TrainingConfig(steps=stops[-1], lr=field_rate(sae.width))
    for step, _, x in rows.batches("train", rows.batch, seed):
        if field: adam.param_groups[0]["lr"] = rate.rate(step, sae.width)
        lens_step(sae, adam, silent, x / sae.scale)
        if step + 1 in stops: yield sae
        if step + 1 == stops[-1]: return


def lens_step(sae: MatryoshkaSAE, adam: torch.optim.Optimizer, silent: Tensor, x: Tensor) -> None:
    on = kept(sae, x)
    loss = sparse_loss(sae, x, on)
    named = dict(sae.named_parameters())
    for name, p in named.items(): p.grad = len(sae.group_sizes) * loss.gradients[name]
    if (dead := silent > 1000).any():
        pre, k = (x - sae.b_dec) @ sae.W_enc[:, dead] + sae.b_enc[dead], min(sae.d // 2, int(dead.sum()))
        best = (pre * sae.W_dec[dead].norm(dim=1)).topk(k, sorted=False).indices
        aux = (torch.zeros_like(pre).scatter(1, best, pre.gather(1, best)) @ sae.W_dec[dead] - loss.residual).square().sum(1).mean()
        (aux * min(int(dead.sum()) / (sae.d // 2), 1)).backward()
    silent.add_(1)[on.col] = 0
    torch.nn.utils.clip_grad_norm_(list(named.values()), 1.0)
    adam.step()


CONTENDERS: dict[str, Callable[..., Iterator[MatryoshkaSAE]]] = {
    "saerad": ours, "dictionary_learning": dictionary_learning, "sae_lens": sae_lens, "sae_lens_field": lambda *a: sae_lens(*a, field=True)}
CONTENDERS |= {f"saerad x {r}": lambda rows, seed, stops, r=r: ours(rows, seed, stops, lr=r * field_rate(4 * rows.d)) for r in RATES}
CONTENDERS |= {f"saerad but {name}": lambda rows, seed, stops, how=how: ours(rows, seed, stops, **how) for name, how in BUT.items()}
ONE_RUN = {"sae_lens": (STOPS,), "dictionary_learning": (STOPS[:1], STOPS[1:])}      # what depends on no end of the run is trained once

OWN = '''
import json, sys
import safetensors.torch as st
import torch
s = json.loads(sys.argv[1])
d, width, k, steps, batch, seed, lr, warmup = (s[n] for n in ("d", "width", "k", "steps", "batch", "seed", "lr", "warmup"))
rows = st.load_file(s["rows"])
torch.manual_seed(seed)
order = torch.randint(len(rows["train"]), (s["most"], batch), generator=torch.Generator().manual_seed(seed))[:steps]
groups = [width // 16, width // 16, width // 8, width // 4, width // 2]
def fvu(name, rebuild):
    whole = rows[name][:min(20480, len(rows[name]) // 4096 * 4096)]
    with torch.no_grad(): rebuilt = torch.cat([rebuild(x) for x in whole.split(4096)])
    return float((rebuilt - whole).square().sum() / (whole - whole.mean(0)).square().sum())
def report(rebuild): print(json.dumps({name: fvu(name, rebuild) for name in ("validation", "test")}))
'''
OWN_DICTIONARY_LEARNING = OWN + '''
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
trainer = MatryoshkaBatchTopKTrainer(steps=steps, activation_dim=d, dict_size=width, k=k, layer=0, lm_name="none", device="cpu", seed=seed,
                                     group_fractions=[1/16, 1/16, 1/8, 1/4, 1/2], warmup_steps=warmup)
scale = rows["train"][order[:16]].square().sum(-1).mean().sqrt()
for step in range(steps): trainer.update(step, rows["train"][order[step]] / scale)
report(lambda x: trainer.ae.decode(trainer.ae.encode(x / scale, use_threshold=False)) * scale)
'''
OWN_SAE_LENS = OWN + '''
import itertools
from sae_lens import MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput
sae = MatryoshkaBatchTopKTrainingSAE(MatryoshkaBatchTopKTrainingSAEConfig(
    d_in=d, d_sae=width, k=k, matryoshka_widths=list(itertools.accumulate(groups)), device="cpu", dtype="float32"))
optimizer, silent = torch.optim.Adam(sae.parameters(), lr=lr), torch.zeros(width)
def forward(x): return sae.training_forward_pass(TrainStepInput(sae_in=x, coefficients={}, dead_neuron_mask=silent > 1000,
                                                                n_training_steps=0, is_logging_step=False))
for step in range(steps):
    out = forward(rows["train"][order[step]])
    silent = torch.where((out.feature_acts > 0).any(0), 0, silent + 1)
    optimizer.zero_grad()
    out.loss.backward()
    torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
    optimizer.step()
report(lambda x: forward(x).sae_out)
'''


def own(rows: Rows, peer: str, seed: int, steps: int) -> dict[str, float] | None:
    """The same by a peer's own class, in its own environment."""
    import safetensors.torch as st
    path = (ROOT / "runs" / "rates" / f"{rows.name}.safetensors").resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists(): st.save_file(rows.rows, path)
    shape = {"d": rows.d, "width": 4 * rows.d, "k": K[rows.name], "steps": steps, "batch": rows.batch, "seed": seed, "rows": str(path), "lr": 3e-4,
             "warmup": 1000 if steps > 1000 else steps // 20, "most": max(STOPS)}
    code = {"dictionary_learning": OWN_DICTIONARY_LEARNING, "sae_lens": OWN_SAE_LENS}[peer]
    return in_a_process(peer_python(), code, shape) if peer_python() else None


def store(name: str, folder: str | None) -> Store:
    if folder: return Store.open(folder)
    config, settings = STORES[name]
    out = ROOT / "runs" / "rates" / name
    run_config(load_config(ROOT / "configs" / f"{config}.yaml", settings), out, last="extract")
    return Store.open(out / "activations")


def work(rows: Rows, name: str, seed: int, stops: tuple[int, ...]) -> Iterator[dict[str, object]]:
    """One contender's run: a row of the table for each number of steps at which it is looked at."""
    began, common = time.process_time(), {"store": rows.name, "batch": rows.batch, "contender": name, "seed": seed}
    if name.endswith("(own)"):
        if found := own(rows, name.split()[0], seed, stops[-1]): yield common | {"steps": stops[-1]} | found
        return
    for steps, sae in zip(stops, CONTENDERS[name](rows, seed, stops), strict=True):
        found = {split: fvu(sae, rows.rows[split]) for split in ("validation", "test")}
        yield common | {"steps": steps, "seconds": round(time.process_time() - began, 1)} | found


PEERS = ("dictionary_learning", "sae_lens", "sae_lens_field")


def compared(found: list[dict[str, object]], batch: int = 256) -> dict[str, dict[str, float]]:
    """Mean test FVU by store and steps of this engine and of its best peer, over the seeds that both have, and their ratio."""
    def mean(store: str, steps: int, contender: str, seeds: set[int]) -> float:
        wanted = store, steps, contender, batch
        values = [r["test"] for r in found if (r["store"], r["steps"], r["contender"], r["batch"]) == wanted and r["seed"] in seeds]
        return sum(values) / len(values)
    seeds: dict[tuple, set[int]] = {}
    for r in found:
        if r["batch"] == batch: seeds.setdefault((r["store"], r["steps"], r["contender"]), set()).add(r["seed"])
    ours, peers = {}, {}
    for store, steps in [(store, steps) for store in STORES for steps in STOPS]:
        mine = seeds.get((store, steps, "saerad"), set())
        each = [(mean(store, steps, peer, both), mean(store, steps, "saerad", both))
                for peer in PEERS if (both := mine & seeds.get((store, steps, peer), set()))]
        if each: peers[f"{store} {steps}"], ours[f"{store} {steps}"] = min(each, key=lambda pair: pair[0] / pair[1])
    return {"ours": ours, "peers": peers, "ratios": {key: ours[key] / peers[key] for key in ours}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--only", default="saerad,dictionary_learning,sae_lens,sae_lens_field")
    for name, values in (("steps", STOPS), ("seeds", SEEDS)): parser.add_argument(f"--{name}", default=",".join(map(str, values)))
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "rates.json")
    parser.add_argument("--quick", action="store_true", help="train nothing: what benchmarks/rates.json holds")
    parser.add_argument("stores", nargs="*", metavar="NAME[=STORE]")
    args = parser.parse_args()
    ends = time.monotonic() + (0 if args.quick else 60 * args.minutes)
    found = json.loads(args.json.read_text(encoding="utf-8"))["runs"] if args.json.exists() else []
    wanted, folders = [int(s) for s in args.steps.split(",")], dict((s.split("=") + [""])[:2] for s in args.stores or STORES)
    for row in trained(args, found, wanted, folders, ends):
        print(row, flush=True)
        found.append(row)
        write_json(args.json, {"name": "rates", "machine": machine(), "runs": found})
    print(json.dumps({"name": "rates", "shape": "mean FVU of test tokens, batch 256; the peer is the better of each store and number of steps",
                      "machine": machine(), **compared(found)}))


def trained(args: argparse.Namespace, found: list[dict], wanted: list[int], folders: dict[str, str], ends: float) -> Iterator[dict[str, object]]:
    """What is asked for and not yet found, row by row, until the time is up."""
    held: dict[str, Rows] = {}
    for seed in map(int, args.seeds.split(",")):
        for name, contender in ((name, c) for name in folders for c in args.only.split(",")):
            done = {r["steps"] for r in found if (r["store"], r["batch"], r["contender"], r["seed"]) == (name, args.batch, contender, seed)}
            for stops in ONE_RUN.get(contender, [(s,) for s in STOPS]):
                stops = tuple(s for s in stops if s in wanted and s not in done)
                if not stops: continue
                if time.monotonic() > ends: return
                if name not in held: held = {name: Rows(name, store(name, folders[name]), args.batch)}
                yield from work(held[name], contender, seed, stops)


if __name__ == "__main__": main()
