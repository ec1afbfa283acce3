"""The findings at full size: every chapter of nbs/results, or those that are named, side by side on the cores. Run by `make results`.

Each chapter keeps what it has done in runs/results/full, so that a run that was stopped goes on where it was.
"""
import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "runs/results/logs"
LONGEST = ("10", "01", "06", "08", "07")      # first, so that no core waits for one at the end; 01 makes the run that others read


def minutes(seconds: float) -> str:
    """Seconds as hours and minutes."""
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def execute(chapter: Path, threads: int, began: float) -> int:
    """Execute a chapter in processes of its own; what it says goes to a file."""
    log, at = LOGS / f"{chapter.stem}.log", time.monotonic()
    print(f"{minutes(at - began):>12}  {chapter.stem} begins", flush=True)
    with log.open("w", encoding="utf-8") as out:
        failed = subprocess.run([sys.executable, ROOT / ".ci/notebooks.py", "execute", chapter.relative_to(ROOT)], cwd=ROOT, stdout=out,
                                stderr=subprocess.STDOUT, env={**os.environ, "SAERAD_FULL": "1", "OMP_NUM_THREADS": str(threads)}).returncode
    now, how = time.monotonic(), f"FAILED, see {log.relative_to(ROOT)}," if failed else "done"
    print(f"{minutes(now - began):>12}  {chapter.stem} {how} after {minutes(now - at)}", flush=True)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chapters", nargs="*", help="how their file names begin, for instance 03; all when none is given")
    parser.add_argument("--at-once", type=int, default=os.cpu_count() or 1, help="chapters side by side (default: one on each core)")
    args = parser.parse_args()
    LOGS.mkdir(parents=True, exist_ok=True)
    found = sorted(p for p in (ROOT / "nbs/results").glob("*.ipynb") if not args.chapters or p.name.startswith(tuple(args.chapters)))
    found.sort(key=lambda p: LONGEST.index(p.name[:2]) if p.name[:2] in LONGEST else len(LONGEST))
    threads, began = max(1, (os.cpu_count() or 1) // args.at_once), time.monotonic()
    with ThreadPoolExecutor(args.at_once) as pool: failed = list(pool.map(lambda p: execute(p, threads, began), found))
    print(f"{len(found)} chapters, {sum(map(bool, failed))} failed, {minutes(time.monotonic() - began)}")
    return int(any(failed) or not found)


if __name__ == "__main__": sys.exit(main())
