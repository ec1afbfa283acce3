"""Which versions of torch, transformers and nnsight to install for a check at an end of what settings.ini allows.

    python .ci/versions.py floor      each at its floor, for instance torch==2.11
    python .ci/versions.py newest     the whole range, from which pip takes the newest that the index has by now
    python .ci/versions.py others     constraints.txt without what these three decide, to go with either
"""
import re
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTED = ("torch", "transformers", "nnsight")
DECIDED = (*TESTED, "triton", "tokenizers", "huggingface_hub", "hf-xet", "safetensors", "accelerate", "typer", "setuptools")   # or by prefix:
PREFIXES = ("nvidia-", "cuda-")


def requirements() -> dict[str, str]:
    """The range of each of the three, as settings.ini has it."""
    ini = ConfigParser()
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    return {name: r for r in ini["DEFAULT"]["requirements"].split() if (name := re.split("[<>=!~]", r)[0]) in TESTED}


def floor(requirement: str) -> str:
    """The floor of a range as a pin: "transformers>=5.0,<6" gives "transformers==5.0"."""
    return re.sub(",.*", "", requirement).replace(">=", "==")


def others() -> list[str]:
    """The lines of constraints.txt that the three do not decide."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if not (line.split("==")[0] in DECIDED or line.startswith(PREFIXES))]


if __name__ == "__main__":
    ranges = requirements().values()
    print("\n".join({"floor": map(floor, ranges), "newest": ranges, "others": others()}[sys.argv[1]]))
