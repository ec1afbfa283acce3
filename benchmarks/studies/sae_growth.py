"""How the cost of a training step grows with k, width, batch and the width of the stream: one of them changed at a time.

    python benchmarks/studies/sae_growth.py [--rounds N]        some two minutes on 2 cores

Microseconds a token, the median of several processes, in turn; `share` is of the shape at the top. The vectors are those of `saerad bench sae`.
"""
import argparse
import sys
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sae import OURS, in_a_process  # noqa: E402

BASE = {"d": 1024, "width": 4096, "k": 64, "batch": 2048}
GROWN = {"k": (16, 32, 128, 256), "width": (1024, 2048, 8192, 16384), "batch": (512, 1024, 4096, 8192), "d": (256, 512, 2048, 4096)}


def shapes() -> list[dict[str, int]]:
    return [BASE] + [BASE | {name: value} for name, values in GROWN.items() for value in values]


def main(rounds: int) -> None:
    seen: dict[int, list[float]] = {}
    for _ in range(rounds):
        for number, shape in enumerate(shapes()):
            steps = max(3, 20_000 // shape["batch"])
            found = in_a_process(sys.executable, OURS, shape | {"steps": steps})
            if found: seen.setdefault(number, []).append(1e6 / found["tokens_per_second"])
    table = pd.DataFrame(shapes())
    table["microseconds"] = pd.Series({number: pd.Series(values).median() for number, values in seen.items()}).round(1)
    table["share"] = (table.microseconds / table.microseconds[0]).round(2)
    print(table.to_string(index=False))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    main(parser.parse_args().rounds)
