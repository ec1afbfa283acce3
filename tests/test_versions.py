"""What `make test-floor` and `make test-newest` install."""
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).parents[1]


def said(which):
    return subprocess.run([sys.executable, str(ROOT / ".ci/versions.py"), which], check=True, capture_output=True, text=True).stdout.split()


def test_the_floor_is_pinned_and_the_newest_is_free():
    ini = ConfigParser()
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    allowed = {r for r in ini["DEFAULT"]["requirements"].split() if r.startswith(("torch>", "transformers>", "nnsight>"))}
    assert set(said("newest")) == allowed and len(allowed) == 3
    assert set(said("floor")) == {r.split(",")[0].replace(">=", "==") for r in allowed}


def test_other_packages_are_those_that_were_tested():
    """But for those whose versions the three decide."""
    others = said("others")
    tested = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if "==" in line]
    assert set(others) - {"#"} >= {line for line in tested if line.startswith(("numpy==", "pydantic==", "pyarrow=="))}
    assert not [line for line in others if line.startswith(("torch==", "transformers==", "nnsight==", "huggingface_hub==", "tokenizers==", "nvidia"))]
