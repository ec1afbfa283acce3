"""What the benchmarks share: the machine, the clock, and the one JSON object that each prints on its last line."""
import argparse
import inspect
import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from saerad.core import progress


def machine() -> str:
    """Cores, threads in use and torch, in words."""
    return f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}"


def seconds(work: Callable[[], Any], repeats: int = 3) -> float:
    """Best wall time of a few repeats, after one that does not count."""
    work()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)


def alternate(rounds: int, **works: Callable[[], Any]) -> dict[str, float]:
    """Median seconds of each piece of work, all done in turn, so that each meets the same weather on the machine."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in progress(range(rounds), "measuring"):
        for name, work in works.items():
            begin = time.perf_counter()
            work()
            taken[name].append(time.perf_counter() - begin)
    return {name: statistics.median(times) for name, times in taken.items()}


def report(name: str, measure: Callable[..., tuple[str, dict, dict, dict]]) -> None:
    """Parse `--quick` and, for a `measure` that takes one, `--device`; measure and print shape, our numbers, the peers' numbers and the ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    if "device" in inspect.signature(measure).parameters: parser.add_argument("--device", default="cpu")
    shape, ours, peers, ratios = measure(**vars(parser.parse_args()))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(json.dumps({"name": name, "shape": shape, "machine": machine(), "ours": ours, "peers": peers, "ratios": ratios,
                      "peak_memory": round(peak, 2)}))
