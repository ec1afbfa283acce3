"""Times of the atlas in headless Chromium, opened from disk, for a made-up SAE of 16,384 features; and what building it takes.

Numbers of `ratios` are times: seconds until the first table is on the screen (median of fresh browsers),
milliseconds from a keystroke to the filtered
table, and milliseconds from a link to a feature's page, and to two features side by side, in chunks that were not read before (medians; the worst are
among `ours`). Without Chromium or Playwright they are null.
"""
import random
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from _bench import report

from saerad.core import write_table
from saerad.interpretation.exemplars import SCHEMA
from saerad.show.atlas import AtlasConfig, write_atlas
from saerad.show.invented import FINDINGS
from saerad.steering.judges import OUTCOMES
from saerad.studies.record import StudiesConfig
from saerad.studies.sources import open_source
from saerad.subjects.subject import TOKEN_SECTIONS

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
CHROMIUM = next((p for p in ("/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome") if Path(p).exists()), None)
WORDS = ("effusion pneumothorax cardiomegaly sternotomy unchanged left right catheter clear small tube lung opacity stable interval prior mild "
         "moderate basal apical line wires heart size normal silhouette mediastinum vascular congestion pacemaker").split()
READ, LENGTH = 48, 120        # studies that the portraits read, words of each
ACTIVE, STUDIES = 125, {"source": "phantom:0", "train_patients": 2, "validation_patients": 2, "test_patients": 40}


def make_up(folder: Path, n: int) -> None:
    """Tables of a run with `n` features, as large as a real one's: 250 contexts of 17 tokens each, views for every fifth feature."""
    draw = np.random.default_rng(0)
    (folder / "config.yaml").write_text(yaml.safe_dump({"studies": STUDIES, "subject": {"model": "made-up"}}), encoding="utf-8")
    shares = draw.dirichlet(np.full(len(TOKEN_SECTIONS), 0.3), n)
    features = pd.DataFrame({"feature": np.arange(n, dtype=np.int32), "level": np.sort(draw.integers(0, 5, n)).astype(np.int16),
                             "density": 10 ** draw.normal(-3, 0.7, n).clip(-6, 0),
                             "max": draw.gamma(4, 1, n), "mean_active": draw.gamma(2, 1, n), "status": "ok",
                             **{f"in_{p}": shares[:, i] for i, p in enumerate(TOKEN_SECTIONS)},
                             "histogram": list(draw.poisson(np.exp(-0.5 * ((np.arange(32) - 16) / 3) ** 2) * 500, (n, 32)))})
    write_table(folder / "exemplars/features.parquet", pa.Table.from_pandas(features, preserve_index=False))
    explanations = [f'fires on "{draw.choice(WORDS)}" and "{draw.choice(WORDS)}" after "{draw.choice(WORDS)}", '
                    f"mostly in the {draw.choice(TOKEN_SECTIONS)} (feature {i})" for i in range(n)]
    precision, recall = draw.beta(3, 2, n), draw.beta(4, 2, n)
    f1 = 2 * precision * recall / (precision + recall)
    write_table(folder / "interpretations/interpretations.parquet", pa.table({
        "feature": features.feature, "explanation": explanations, "interpreter": ["lexical"] * n, "f1": f1, "f1_low": f1 - 0.05, "f1_high": f1 + 0.05,
        "precision": precision,
        "recall": recall, "shuffled_f1": draw.beta(2, 4, n), "always_yes_f1": np.full(n, 2 / 3), "scored_contexts": np.full(n, 200),
        "negatives": ["random"] * n,
        "status": ["scored"] * n, "reason": [""] * n}))
    words = [[f" {w}" for w in draw.choice(WORDS, 10)] for _ in range(n)]
    write_table(folder / "portraits/portraits.parquet", pa.table({
        "feature": features.feature, "promoted": words, "promoted_by": list(draw.random((n, 10))), "suppressed": words[::-1],
        "suppressed_by": list(-draw.random((n, 10))),
        "neighbours": list(draw.integers(0, n, (n, 8))), "cosine": list(draw.random((n, 8))),
        "fires_at": [np.sort(draw.choice(READ * LENGTH, 40, replace=False)) for _ in range(n)]}))
    make_up_views(folder, n, draw)
    make_up_studies(folder, n, draw)
    make_up_exemplars(folder, n, draw)
    make_up_steering(folder, n, draw)


def make_up_views(folder: Path, n: int, draw: np.random.Generator) -> None:
    """Three views of 37 by 37 patches for every fifth feature, from the phantom's studies."""
    studies = [s.study for s in open_source(StudiesConfig(**STUDIES)) if s.split == "test"]
    rows = [{"feature": f, "study": str(draw.choice(studies)), "view": "frontal", "rows": 37, "columns": 37, "peak": 3.0,
             "patches": np.sort(draw.choice(1369, 150, replace=False)), "activations": draw.gamma(2, 1, 150)} for f in range(0, n, 5)
             for _ in range(3)]
    write_table(folder / "portraits/views.parquet", pa.Table.from_pylist(rows))


def make_up_studies(folder: Path, n: int, draw: np.random.Generator) -> None:
    """As many studies as the portraits read, five features on each word and twelve on each view."""
    studies = [s for s in open_source(StudiesConfig(**STUDIES)) if s.split != "train"][:READ]
    rows = [{"study": s.study, "patient": s.patient, "split": s.split, "tokens": [f" {w}" for w in draw.choice(WORDS, LENGTH)],
             "sections": ["findings"] * LENGTH, "features": draw.integers(0, n, (LENGTH, 5)).tolist(),
             "activations": draw.gamma(2, 1, (LENGTH, 5)).tolist()} for s in studies]
    write_table(folder / "portraits/studies.parquet", pa.Table.from_pylist(rows))
    seen = [{"feature": int(f), "study": s.study, "view": "frontal", "rows": 37, "columns": 37, "peak": 3.0,
             "patches": np.sort(draw.choice(1369, 150, replace=False)), "activations": draw.gamma(2, 1, 150)}
            for s in studies for f in draw.choice(n, 12, replace=False)]
    write_table(folder / "portraits/study_views.parquet", pa.Table.from_pylist(seen))


def make_up_exemplars(folder: Path, n: int, draw: np.random.Generator, group: int = 32, each: int = 2 * ACTIVE, width: int = 17) -> None:
    """A file as the exemplars' pass writes it, a row group for every 32 features; the same group of contexts again and again."""
    count = group * each
    role = np.tile(np.r_[np.full(25, 0), np.full(25, 1), np.full(100, 2), np.full(100, 3)], group)
    decile = np.where(role == 0, 10, np.where(role == 2, np.tile(np.arange(each) % 10 + 1, group), 0)).astype(np.int8)
    values = np.where((role % 2 == 0)[:, None], draw.gamma(1, 1, (count, width)) * (draw.random((count, width)) < 0.3), 0).astype(np.float32)
    values[:, 8] = np.where(role % 2 == 0, decile, 0)
    starts = pa.array(np.arange(0, (count + 1) * width, width, dtype=np.int32))
    tokens = pa.ListArray.from_arrays(starts, pa.array([f" {w}" for w in WORDS]).take(pa.array(draw.integers(0, len(WORDS), count * width))))
    study = pa.array([f"s{i:05d}" for i in range(2000)]).take(pa.array(draw.integers(0, 2000, count)))
    fixed = {"role": pa.array(("explain_active", "explain_silent", "score_active", "score_silent")).take(pa.array(role)), "study": study,
             "patient": study,
             "split": pa.array(["train"] * count), "section": pa.array(["findings"] * count), "view": pa.array([""] * count), "tokens": tokens,
             "activations": pa.ListArray.from_arrays(starts, pa.array(values.ravel())), "peak": np.full(count, 8, np.int16), "decile": decile,
             "row": np.arange(count, dtype=np.int64), "offset": np.zeros(count, np.int32)}
    schema = pa.schema([f for f in SCHEMA if f.name in fixed or f.name == "feature"])
    with pq.ParquetWriter(folder / "exemplars/exemplars.parquet", schema, compression="zstd") as writer:
        for first in range(0, n, group):
            columns = {"feature": np.repeat(np.arange(first, first + group, dtype=np.int32), each), **fixed}
            writer.write_table(pa.table([pa.array(columns[f.name]).cast(f.type) for f in schema], schema=schema))


def make_up_steering(folder: Path, n: int, draw: np.random.Generator) -> None:
    """Fifty steered features."""
    text = "There is a small left pleural effusion. The heart is enlarged. " * 3
    rows = [{"feature": f, "alpha": a, "study": f"s{i}", "patient": f"p{i}"} for f in range(0, n, max(1, n // 50)) for a in (-10.0, -5.0, 5.0, 10.0)
            for i in range(12)]
    write_table(folder / "steering/generations.parquet",
                pa.Table.from_pylist([r | {"baseline": text, "steered": text.replace("small", "large")} for r in rows]))
    write_table(folder / "steering/judgements.parquet", pa.Table.from_pylist([
        r | {"control": False, "outcome": str(draw.choice(OUTCOMES[:4])), "degenerate": False, "target": FINDINGS[0]} for r in rows]))


FIRST = """new MutationObserver((_, me) => { if (window.first == null && document.querySelector('#table .tabulator-row a')) {
  window.first = 0; me.disconnect(); requestAnimationFrame(() => requestAnimationFrame(() => { window.first = performance.now(); })); } })
  .observe(document, { childList: true, subtree: true });"""
PAINTED = "const painted = () => new Promise(done => requestAnimationFrame(() => setTimeout(done, 0)));"
SEARCH = f"""async text => {{ {PAINTED} const field = document.getElementById('search'), times = [];
  for (let i = 0; i <= text.length; i++) {{ const begin = performance.now();
    field.value = text.slice(0, i || 0); field.dispatchEvent(new Event('input', {{ bubbles: true }}));
    await painted(); times.push(performance.now() - begin); }} return times; }}"""
OPEN = f"""async feature => {{ {PAINTED} const begin = performance.now(); location.hash = `#feature=${{feature}}`;
  while (document.querySelector('#feature h1')?.textContent !== `Feature ${{feature}}`) await painted();
  await painted(); return performance.now() - begin; }}"""
COMPARE = f"""async ([a, b]) => {{ {PAINTED} const begin = performance.now(); location.hash = `#page=compare&a=${{a}}&b=${{b}}`;
  while (document.querySelector('#page h1')?.textContent !== `Features ${{a}} and ${{b}}`) await painted();
  await painted(); return performance.now() - begin; }}"""


def browse(index: Path, n: int, trials: int) -> tuple[dict[str, float], dict[str, float]]:
    """Medians and worst times in fresh browsers."""
    from playwright.sync_api import sync_playwright
    first, search, opened, compared = [], [], [], []
    pick = random.Random(0)
    with sync_playwright() as p:
        for _ in range(trials):
            with tempfile.TemporaryDirectory() as profile:
                context = p.chromium.launch_persistent_context(profile, executable_path=CHROMIUM, args=FLAGS, viewport={"width": 1400, "height": 900})
                page = context.new_page()
                page.add_init_script(FIRST)
                page.goto(index.as_uri())
                page.wait_for_function("window.first > 0")
                first.append(page.evaluate("window.first") / 1000)
                for text in ("effusion", "tube left", "feature 12"): search += page.evaluate(SEARCH, text)
                page.evaluate(SEARCH, "")
                chunks = pick.sample(range(n // 32), 22)
                opened += [page.evaluate(OPEN, chunk * 32 + pick.randrange(32)) for chunk in chunks[:10]]
                pairs = zip(chunks[10:16], chunks[16:], strict=True)
                compared += [page.evaluate(COMPARE, [chunk * 32 + pick.randrange(32) for chunk in pair]) for pair in pairs]
                context.close()
    times = {"first_table_s": first, "search_ms": search, "feature_page_ms": opened, "compare_ms": compared}
    return {k: statistics.median(v) for k, v in times.items()}, {f"{k}_worst": max(v) for k, v in times.items()}


def measure(quick: bool):
    n, trials = (2048, 2) if quick else (16384, 5)
    folder = Path(tempfile.mkdtemp(prefix="saerad-atlas-"))
    try:
        make_up(folder, n)
        begin = time.perf_counter()
        index = write_atlas(folder, AtlasConfig())
        ours = {"build_s": round(time.perf_counter() - begin, 1),
                "disk_mb": round(sum(f.stat().st_size for f in index.parent.rglob("*") if f.is_file()) / 1e6, 1)}
        try:
            if CHROMIUM is None: raise ImportError
            median, worst = browse(index, n, trials)
        except ImportError: median, worst = dict.fromkeys(("first_table_s", "search_ms", "feature_page_ms", "compare_ms")), {}
        shape = f"{n} features, {2 * ACTIVE} contexts each; built in {ours['build_s']} s, {ours['disk_mb']} MB; headless Chromium, from disk"
        rounded = {k: None if v is None else round(v, 3) for k, v in (median | worst).items()}
        return shape, ours | rounded, {}, {k: rounded[k] for k in median}
    finally: shutil.rmtree(folder)


report("atlas", measure)
