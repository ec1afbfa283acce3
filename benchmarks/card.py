"""Everything that a card should make fast, measured on one card in at most eight minutes, as one table: `make bench-card`.

It needs no network and no environment of ours: it runs with any Python that has torch for the card. It says at once which packages are missing and
takes wheels of them from a folder (`--wheels`). Peers are measured where they are installed. With `--device cpu` all is done at tiny shapes, to see
that the script works. `--json FILE` keeps the result, with date and card; the chapter on the command line shows `benchmarks/card.json`.
"""
import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from configparser import ConfigParser
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODULES = {"pillow": "PIL", "PyYAML": "yaml", "scikit-learn": "sklearn", "pytest-timeout": "pytest_timeout"}      # where they are named otherwise
PEERS = ("dictionary_learning", "sae_lens")


def missing_packages() -> list[str]:
    """What settings.ini asks for, and pytest, that this Python does not have."""
    ini = ConfigParser()
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    names = [re.split("[<>=!~]", r)[0] for r in ini["DEFAULT"]["requirements"].split()] + ["pytest", "pytest-timeout"]
    return [name for name in names if importlib.util.find_spec(MODULES.get(name, name)) is None]


def take_wheels(wheels: Path, names: list[str], target: Path) -> None:
    """Install packages out of a folder of wheels, without a network, where only this process and its children see them."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--find-links", str(wheels), "--target", str(target)]
    subprocess.run([*pip, *names], check=True)
    sys.path.insert(0, str(target))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(target), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)


Row = tuple[str, float | None, str]     # what, how much, in which unit
PARTS: dict[str, tuple[Callable[[str, Path], list[Row]], int]] = {}      # by name, with the seconds that each may take on a card


def part(seconds: int) -> Callable[[Callable[[str, Path], list[Row]]], Callable[[str, Path], list[Row]]]:
    """Make a function a part of the table."""
    def take(work: Callable[[str, Path], list[Row]]) -> Callable[[str, Path], list[Row]]:
        PARTS[work.__name__] = work, seconds
        return work
    return take


def clock(work: Callable[[], Any], device: str, repeats: int = 5) -> float:
    """Median seconds of some work on a device, after one time that does not count."""
    import torch
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        work()
        if device != "cpu": torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return sorted(times[1:])[repeats // 2]


@part(20)
def limits(device: str, folder: Path) -> list[Row]:
    """What no program can beat: a matrix product, Adam over the weights of an SAE, and a copy to the device."""
    import torch
    side, (d, width) = (8192, (4096, 16384)) if device != "cpu" else (256, (64, 256))
    kind = torch.bfloat16 if device != "cpu" else torch.float32
    a = torch.randn(side, side, device=device, dtype=kind)
    weights = [torch.randn(shape, device=device, requires_grad=True) for shape in ((d, width), (width, d))]
    adam = torch.optim.Adam(weights, fused=device != "cpu")
    for w in weights: w.grad = torch.ones_like(w)
    host = torch.empty(side * side, dtype=torch.uint8, pin_memory=device != "cpu")
    return [("matrix product", 2 * side**3 / clock(lambda: a @ a, device) / 1e12, "TFLOP/s"),
            (f"Adam over 2 x {d} x {width}", clock(adam.step, device) * 1e3, "ms"),
            ("copy to the device", host.numel() / clock(lambda: host.to(device, non_blocking=True), device) / 1e9, "GB/s")]


@part(120)
def sae(device: str, folder: Path) -> list[Row]:
    """A training step at three shapes, ours and each peer's that is installed."""
    from sae import DICTIONARY_LEARNING, OURS, SAE_LENS, in_a_process

    from saerad.core import has_bfloat16
    shapes = [(4096, 16384, 256, 2048), (1024, 4096, 64, 4096), (4096, 65536, 256, 4096)] if device != "cpu" else [(64, 256, 8, 128)]
    there = [p for p in PEERS if importlib.util.find_spec(p)]
    contenders = {"saerad": OURS} | {name: code for name, code in zip(PEERS, (DICTIONARY_LEARNING, SAE_LENS), strict=True) if name in there}
    import torch
    rows: list[Row] = []
    for d, width, k, batch in shapes:
        shape = {"d": d, "width": width, "k": k, "batch": batch, "steps": 40 if device != "cpu" else 3, "device": device,
                 "half": has_bfloat16(torch.device(device))}
        for name, code in contenders.items():
            found = in_a_process(sys.executable, code, shape)
            rows += [(f"SAE {d} -> {width}, k {k}: {name}", found and found["tokens_per_second"], "tokens/s"),
                     (f"SAE {d} -> {width}, k {k}: {name}, memory", found and found["peak_mib"] / 1024, "GiB")]
    return rows + [(f"SAE: {name} is not installed", None, "") for name in PEERS if name not in there]


def written_store(folder: Path, device: str) -> Any:
    """A store of bfloat16 rows, of about 4 GB on a card, and an SAE for it; made once."""
    from exemplars import LENGTH, make
    studies, features, d, k = (4096, 16384, 1024, 64) if device != "cpu" else (24, 128, 32, 4)
    if "store" not in KEPT: KEPT["store"] = (*make(folder / "store", studies, features, d, k), studies * LENGTH)
    return KEPT["store"]


KEPT: dict[str, Any] = {}


@part(60)
def reading(device: str, folder: Path) -> list[Row]:
    """Rows from disk in shuffled batches, alone and into a trainer, and the share of its time that the trainer waits for them."""
    import torch

    from saerad.sae.model import MatryoshkaSAE, SAEConfig
    from saerad.sae.training import Trainer, TrainingConfig
    store, _, _ = written_store(folder, device)
    size, count = (4096, 60) if device != "cpu" else (64, 4)
    def read() -> float:
        batches = store.batches("train", size, seed=0, device=torch.device(device))
        next(batches)                                  # the first pool is filled
        begin = time.perf_counter()
        for _ in range(count): next(batches)
        if device != "cpu": torch.cuda.synchronize()
        return time.perf_counter() - begin
    alone = read()
    trainer = Trainer(MatryoshkaSAE.from_config(store.d, SAEConfig(expansion=4, k=min(64, store.d))).to(device),
                      TrainingConfig(steps=10_000, batch_size=size, device=device))
    batches, waited = store.batches("train", size, seed=0, device=torch.device(device)), 0.0
    for _ in range(3): trainer.train_step(next(batches)[2], measured=False)       # an engine is chosen, and a step recorded
    if device != "cpu": torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(count):
        asked = time.perf_counter()
        _, _, rows = next(batches)
        waited += time.perf_counter() - asked
        trainer.train_step(rows, measured=False)
    if device != "cpu": torch.cuda.synchronize()
    took = time.perf_counter() - begin
    return [("store, read alone", count * size * store.d * 2 / alone / 1e9, "GB/s"), ("store to trainer", count * size / took, "tokens/s"),
            ("the trainer waits", 100 * waited / took, "%")]


@part(90)
def exemplars(device: str, folder: Path) -> list[Row]:
    """Contexts of every feature, and what the paper's 34.7 million tokens of four times the width would take."""
    from saerad.interpretation.exemplars import ExemplarsConfig, collect_exemplars
    store, sae_, tokens = written_store(folder, device)
    begin = time.perf_counter()
    collect_exemplars(store, sae_.to(device), ExemplarsConfig(), 0, folder / "exemplars")
    rate = tokens / (time.perf_counter() - begin)
    return [("exemplars", rate, "tokens/s"), ("exemplars of 34.7 M tokens", 34.7e6 / rate / 60, "min")]


@part(60)
def maira2(device: str, folder: Path) -> list[Row]:
    """The pass up to the hookpoint, as a share of the measured matrix rate."""
    import maira2 as bench
    _, ours, _, ratios = bench.measure(True)
    return [("MAIRA-2, layer 15, kept tokens" if device != "cpu" else "small MAIRA-2, kept tokens", ours["kept_tokens_per_s"], "tokens/s"),
            ("MAIRA-2, share of the matrix rate", 100 * ratios["matrix_rate"], "%"),
            ("MAIRA-2, the paper's tokens", ours["hours_for_the_paper"], "h")]


@part(60)
def steering(device: str, folder: Path) -> list[Row]:
    """A step of writing at 7 B, with one row and with 64, beside the bare model's."""
    import maira2 as bench
    import torch

    from saerad.steering.interventions import _read_prompt, _read_token, adding, batches_of, sharing
    shape = bench.FULL if device != "cpu" else bench.Shape(2, 1, image_size=56, vision=(32, 1, 2), text=(64, 4, 2, 96), vocabulary=2000, images=1)
    subject = bench.subject_of(shape, device, torch.bfloat16 if device != "cpu" else torch.float32)
    prompt, rows = bench.prompt_of(shape, 0), []
    for n in (1, 64):
        batches = batches_of([{shape.layer: adding(torch.randn(1, subject.d_model))} for _ in range(n)], subject)
        logits, cache = _read_prompt(subject, prompt, batches, len(prompt) + 80)
        ids, changed = logits.argmax(-1), {shape.layer: torch.ones(n, dtype=torch.bool)}
        def bare(ids: Any = ids, cache: Any = cache) -> Any:
            with torch.no_grad(): return subject.model(input_ids=ids[:, None], past_key_values=cache, use_cache=True).logits
        def steered(ids: Any = ids, cache: Any = cache, batches: Any = batches, changed: Any = changed) -> Any:
            return _read_token(subject, ids, cache, batches, changed)
        with sharing(subject): alone, took = clock(bare, device, 15), clock(steered, device, 15)
        rows += [(f"steering, {n} rows, prompt of {len(prompt)}: a step", took * 1e3, "ms"), (f"the bare model, {n} rows", alone * 1e3, "ms"),
                 (f"steering, {n} rows", n / took, "tokens/s")]
        del cache, logits
    return rows


@part(120)
def tests(device: str, folder: Path) -> list[Row]:
    """The tests of what a card works in."""
    rooms = ["sae", "activations", "steering"] if device != "cpu" else ["sae/test_model.py"]
    left = PARTS["tests"][1]
    try: done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"tests/{room}" for room in rooms)], cwd=ROOT,
                               capture_output=True, text=True, timeout=left, env=os.environ | {"TQDM_DISABLE": "1"})
    except subprocess.TimeoutExpired: return [(f"tests did not end in {left} s", None, "")]
    counts = {name: int(m[1]) if (m := re.search(rf"(\d+) {name}", done.stdout)) else 0 for name in ("passed", "failed", "error")}
    names = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M)
    failed: list[Row] = [(f"failed: {name}", None, "") for name in names]
    return [("tests passed", counts["passed"], ""), ("tests failed", counts["failed"] + counts["error"], ""), *failed]


def card_name(device: str) -> str:
    """The card in words, or the processor."""
    import torch
    return torch.cuda.get_device_name(torch.device(device)) if device != "cpu" else "no card: tiny shapes on a processor"


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = [f"{result['card']}, {result['date']}; {', '.join(f'{k} {v}' for k, v in result['versions'].items())}"]
    for row in result["rows"]: lines.append(f"{row['what']:<58}{'' if row['value'] is None else format(row['value'], ',.4g'):>14} {row['unit']}")
    return "\n".join([*lines, f"{result['seconds']:.0f} s in all"])


def measure(device: str, only: list[str], seconds: float) -> dict[str, Any]:
    """All parts in turn, as long as there is time; a part that fails says why and stops no other."""
    import torch
    rows, begin = [], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for name, (work, needed) in PARTS.items():
            if only and name not in only: continue
            left = seconds - (time.perf_counter() - begin)
            if device != "cpu" and left < needed / 2: found: list[Row] = [(f"{name}: no time left", None, "")]
            else:
                try: found = work(device, Path(folder))
                except Exception as e:  # whatever a new machine has in store for us; the other parts are worth having
                    found = [(f"{name}: {type(e).__name__}: {' '.join(str(e).split())[:120]}", None, "")]
                if device != "cpu": torch.cuda.empty_cache()
            rows += [{"part": name, "what": what, "value": value, "unit": unit} for what, value, unit in found]
            for row in found: print(f"{row[0]:<58}{'' if row[1] is None else format(row[1], ',.4g'):>14} {row[2]}", file=sys.stderr, flush=True)
    from importlib.metadata import version
    return {"name": "card", "card": card_name(device), "date": date.today().isoformat(), "rows": rows, "seconds": time.perf_counter() - begin,
            "versions": {"python": sys.version.split()[0]} | {p: version(p) for p in ("torch", "transformers", "nnsight")}}


def stop(sentence: str) -> None:
    """End with one sentence about what the user can do."""
    print(f"card: {sentence}", file=sys.stderr)
    sys.exit(2)


def main() -> None:
    """Say what is missing, measure, print the table, and one JSON object on the last line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu for tiny shapes")
    parser.add_argument("--only", default="", help="some parts, with commas")
    parser.add_argument("--wheels", type=Path, help="folder of wheels for what is missing")
    parser.add_argument("--seconds", type=float, default=460, help="begin no part that would end later")
    parser.add_argument("--json", type=Path, help="keep the result in this file")
    parser.add_argument("--quick", action="store_true", help="the same as --device cpu: the script alone is tried")
    options = parser.parse_args()
    device, only = "cpu" if options.quick else options.device, [name for name in options.only.split(",") if name]
    if unknown := [name for name in only if name not in PARTS]: stop(f"{unknown[0]} is no part; the parts are {', '.join(PARTS)}.")
    with tempfile.TemporaryDirectory() as target:
        gone = missing_packages()
        if gone and options.wheels: take_wheels(options.wheels, gone, Path(target))
        elif gone: stop(f"this Python lacks {', '.join(gone)}; install them, or give a folder of their wheels with --wheels.")
        sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        os.environ["TQDM_DISABLE"] = "1"
        import torch
        if device != "cpu" and not torch.cuda.is_available():
            stop(f"torch {torch.__version__} sees no card; --device cpu tries the script.")
        result = measure(device, only, options.seconds)
    result["table"] = table(result)
    if options.json: options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(result["table"])
    print(json.dumps(result | {"shape": "everything", "machine": result["card"], "ours": {}, "peers": {}, "ratios": {}, "peak_memory": None}))


if __name__ == "__main__": main()
