"""Tokens a second of a training step, beside `dictionary_learning` and SAELens on the same vectors.

A peer runs with the interpreter of `.venv-bench` (`make bench-env`); without it its numbers and ratios are null. Every contender
trains the same Matryoshka BatchTopK SAE in a process of its own, several times in turn, and the median counts. With `--device cuda` on a card. A peer
has its best precision on the machine at hand: bfloat16 where there are units for it, else float32.
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from _bench import machine, report

from saerad.core import has_bfloat16

ROOT = Path(__file__).resolve().parent.parent
QUICK = {"d": 256, "width": 1024, "k": 32, "batch": 2048, "steps": 15, "rounds": 1}
FULL = {"d": 4096, "width": 16384, "k": 256, "batch": 2048, "steps": 3, "rounds": 2}

COMMON = '''
import contextlib, json, resource, sys, time
import torch
shape = json.loads(sys.argv[1])
d, width, k, batch, steps, device, half = (shape[n] for n in ("d", "width", "k", "batch", "steps", "device", "half"))
cuda = device != "cpu"
if cuda: torch.backends.cuda.matmul.allow_tf32 = True
def best(): return torch.autocast(device.split(":")[0], dtype=torch.bfloat16) if half else contextlib.nullcontext()
def sync():
    if cuda: torch.cuda.synchronize()
def peak(): return torch.cuda.max_memory_allocated() / 2**20 if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
torch.manual_seed(0)
parts = torch.randn(4 * d, d)
def vectors():
    on = torch.randint(4 * d, (batch, 12))
    return ((parts[on] * torch.rand(batch, 12, 1)).sum(1) / d ** 0.5).to(device)
batches = [vectors() for _ in range(min(steps, 4))]
del parts
held = batches[0]
def report(step, rebuild):
    """Time `steps` steps after two to warm up; peak memory beside what was there before; FVU after all of them on one batch."""
    before = peak()
    for i in range(2): step(i, batches[i % len(batches)])
    sync()
    began, worked = time.perf_counter(), time.process_time()
    for i in range(steps): step(i + 2, batches[i % len(batches)])
    sync()
    seconds, cpu = time.perf_counter() - began, time.process_time() - worked
    after = peak()
    with torch.no_grad(): fvu = float((rebuild(held) - held).square().sum() / (held - held.mean(0)).square().sum())
    print(json.dumps({"tokens_per_second": steps * batch / seconds, "peak_mib": after, "growth_mib": after - before,
                      "tokens_per_cpu_second": steps * batch / cpu, "fvu": fvu}))
'''

OURS = COMMON + '''
from saerad.sae.model import MatryoshkaSAE, SAEConfig
from saerad.sae.training import Trainer, TrainingConfig
sae = MatryoshkaSAE.from_config(d, SAEConfig(expansion=width // d, k=k)).to(device)
sae.scale.fill_(float(batches[0].square().sum(1).mean().sqrt()))
trainer = Trainer(sae, TrainingConfig(steps=10_000, batch_size=batch, warmup=0, lr=2e-4, device=device))
def rebuild(x):
    selected = trainer.select(x / sae.scale, len(x))
    z = torch.zeros(len(x), width, device=device)
    z[selected.row, selected.col] = selected.value
    return sae.decode(z)
report(lambda i, x: trainer.train_step(x, measured=False), rebuild)
'''

DICTIONARY_LEARNING = COMMON + '''
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
trainer = MatryoshkaBatchTopKTrainer(steps=10_000, activation_dim=d, dict_size=width, k=k, layer=0, lm_name="none", device=device,
                                     group_fractions=[1/16, 1/16, 1/8, 1/4, 1/2], warmup_steps=0, lr=2e-4)
scale = batches[0].square().sum(1).mean().sqrt()
def rebuild(x): return trainer.ae.decode(trainer.ae.encode(x / scale, use_threshold=False)) * scale
def step(i, x):
    with best(): trainer.update(i, x / scale)
report(step, rebuild)
'''

SAE_LENS = COMMON + '''
import itertools
from sae_lens import MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput
sizes = [width // 16, width // 16, width // 8, width // 4, width // 2]
sae = MatryoshkaBatchTopKTrainingSAE(MatryoshkaBatchTopKTrainingSAEConfig(
    d_in=d, d_sae=width, k=k, matryoshka_widths=list(itertools.accumulate(sizes)), device=device, dtype="float32"))
optimizer = torch.optim.Adam(sae.parameters(), lr=2e-4)
scale = batches[0].square().sum(1).mean().sqrt()
dead = torch.zeros(width, dtype=torch.bool, device=device)
def step(i, x):
    with best():
        out = sae.training_forward_pass(TrainStepInput(sae_in=x / scale, coefficients={}, dead_neuron_mask=dead, n_training_steps=i,
                                                       is_logging_step=False))
    optimizer.zero_grad()
    out.loss.backward()
    torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
    optimizer.step()
def rebuild(x):
    return sae.training_forward_pass(TrainStepInput(sae_in=x / scale, coefficients={}, dead_neuron_mask=dead, n_training_steps=0,
                                                    is_logging_step=False)).sae_out * scale
report(step, rebuild)
'''


def peer_python() -> Path | None:
    path = ROOT / ".venv-bench" / "bin" / "python"
    return path if path.exists() else None


def in_a_process(python: Path | str, code: str, shape: dict[str, int]) -> dict[str, float] | None:
    """One contender in its own process; None when it does not run, with its last line of complaint on stderr."""
    with tempfile.TemporaryDirectory() as elsewhere:
        done = subprocess.run([str(python), "-c", code, json.dumps(shape)], capture_output=True, text=True, cwd=elsewhere,
                              env=os.environ | {"PYTHONPATH": str(ROOT) if str(python) == sys.executable else ""})
    if done.returncode:
        print("\n".join(done.stderr.strip().splitlines()[-1:]), file=sys.stderr)
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def _median(runs: list[dict[str, float] | None]) -> dict[str, float] | None:
    good = [r for r in runs if r is not None]
    return {key: statistics.median(r[key] for r in good) for key in good[0]} if good else None


def measure(quick: bool, device: str = "cpu") -> tuple[str, dict, dict, dict]:
    """The shape, our numbers, the peers' and the ratios, under the same keys; peak memory in MiB of a whole process.

    `SAERAD_BENCH_SHAPE` (JSON) changes the shape.
    """
    shape = (QUICK if quick else FULL) | json.loads(os.environ.get("SAERAD_BENCH_SHAPE", "{}"))
    shape |= {"device": device, "half": has_bfloat16(torch.device(device))}
    contenders = {"ours": (sys.executable, OURS)}
    if (peer := peer_python()) is not None:
        contenders |= {"dictionary_learning": (peer, DICTIONARY_LEARNING), "sae_lens": (peer, SAE_LENS)}
    runs: dict[str, list[dict[str, float] | None]] = {name: [] for name in contenders}
    for _ in range(shape["rounds"]):                          # in turn, so that a slow minute hits all
        for name, (python, code) in contenders.items(): runs[name].append(in_a_process(python, code, shape))
    found = {name: _median(of_one) for name, of_one in runs.items()}
    ours, there = found.pop("ours"), {name: speed for name, speed in found.items() if speed}
    if there: there["fastest_peer"] = max(there.values(), key=lambda peer: peer["tokens_per_second"])
    keys = ("dictionary_learning", "sae_lens", "fastest_peer")
    us = dict.fromkeys(keys, ours["tokens_per_second"])
    us |= {"peak_memory": ours["peak_mib"], "fvu": ours["fvu"], "fastest_peer_cpu": ours["tokens_per_cpu_second"]}
    them = {key: there[key]["tokens_per_second"] if key in there else None for key in keys}
    them |= {key: there["fastest_peer"][name] if there else None
             for key, name in (("peak_memory", "peak_mib"), ("fvu", "fvu"), ("fastest_peer_cpu", "tokens_per_cpu_second"))}
    return json.dumps(shape), us, them, {key: us[key] / them[key] if them[key] else None for key in us}


def bench(quick: bool = False) -> dict[str, Any]:
    """The same as one object."""
    shape, ours, peers, ratios = measure(quick)
    return {"name": "sae", "shape": shape, "machine": machine(), "ours": ours, "peers": peers, "ratios": ratios}


if __name__ == "__main__": report("sae", measure)
