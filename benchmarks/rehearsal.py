"""A rehearsal of `configs/paper.yaml`: MAIRA-2 with random weights in its published layout, a folder laid out like MIMIC-CXR with made-up
reports and films of real size, and an endpoint on this machine; then the real command, from the extraction to the atlas.

For every stage: seconds, rate, bytes and memory, and what they come to at the paper's 34.7 million tokens. At full size where there is a GPU, where
the hours are those of the machine; small otherwise, where they are those of the small network and show no more than that the way is clear.
"""
import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import maira2
import numpy as np
import torch
from _bench import machine
from PIL import Image
from safetensors.torch import save_file
from tokenizers.processors import TemplateProcessing

from saerad.core import read_json, read_table, rng
from saerad.interpretation.interpret import estimate_cost, planned_exemplars
from saerad.run.config import Config, load_config
from saerad.run.stages import STAGES
from saerad.studies.phantom import drawing_of
from saerad.studies.record import StudiesConfig, Study
from saerad.studies.sources import open_source
from saerad.subjects.maira2 import OLD_PARTS, OLD_PREFIXES, new_name
from saerad.subjects.subject import MEAN, STD, prepare_image, train_tokenizer

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from word_server import WordServer  # noqa: E402

PAPER_TOKENS, PAPER_WIDTH = 34.7e6, 4096


@dataclass(frozen=True)
class Size:
    """How much is rehearsed."""
    network: maira2.Shape
    patients: tuple[int, int, int]      # for training, validation, test
    films: int = 8                      # different ones; studies share them, and each is decoded every time it is read
    side: int = 2500                    # pixels of a film's shorter edge
    settings: tuple[str, ...] = ()      # over those of paper.yaml


LITTLE = ("subject.dtype=float32", "sae.expansion=1", "sae.k=16", "training.batch_size=256", "training.steps=60", "evaluation.loss_studies=4",
          "evaluation.report_studies=0", "exemplars.explain_active=5", "exemplars.explain_silent=5", "exemplars.score_active=10",
          "exemplars.score_silent=10", "exemplars.min_explain=2", "exemplars.min_score=4", "interpretation.protocol=saerad",
          "steering.features=top:1", "steering.studies=1", "steering.controls=1", "steering.max_new_tokens=24", "portraits.view_studies=2",
          "figures.dpi=50")
SMALL = Size(maira2.SMALL, (12, 2, 3), settings=("extraction.layer=3", *LITTLE))
TINY = Size(replace(maira2.SMALL, layer=1, vision=(32, 2, 2), text=(32, 2, 2, 48), image_size=56), (6, 2, 2), films=2, side=300,
            settings=("extraction.layer=1", *LITTLE, "sae.k=4", "training.steps=15", "steering.max_new_tokens=8"))
FULL = Size(maira2.FULL, (1200, 60, 60), settings=("training.steps=400", "interpretation.protocol=saerad", "steering.features=top:4"))

PROCESSOR = '''
import numpy as np
from PIL import Image
from transformers import LlavaProcessor

class Maira2Processor(LlavaProcessor):
    """Asks for findings as MAIRA-2's published processor does: the same order of films and sections."""
    def format_reporting_input(self, current_frontal, current_lateral, prior_frontal, indication, technique, comparison, prior_report,
                               get_grounding=False, assistant_text=None):
        shown = [image for image in (current_frontal, current_lateral, prior_frontal) if image is not None]
        text = ("A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers "
                "to the user's questions. USER: Given the current frontal image <image>")
        if current_lateral: text += " the current lateral image <image>"
        if prior_frontal: text += f" and the prior frontal image <image> PRIOR_REPORT: {prior_report or 'N/A'}"
        text += (" Provide a description of the findings in the radiology study in comparison to the prior frontal image."
                 f" INDICATION: {indication or 'N/A'} TECHNIQUE: {technique or 'N/A'} COMPARISON: {comparison or 'N/A'} ASSISTANT:")
        if assistant_text is not None: text += f" {assistant_text}</s>"
        return text, [Image.fromarray(self.stretch(np.asarray(image, dtype=float))) for image in shown]

    @staticmethod
    def stretch(image):
        return ((image - image.min()) / (image.max() - image.min()) * 255).astype(np.uint8)
'''


def published_name(name: str) -> str:
    """A tensor's name in the published checkpoint, from its name in the network."""
    name = new_name(name)
    for old, new in OLD_PARTS.items(): name = name.replace(new, old)
    return next((old + name.removeprefix(new) for old, new in OLD_PREFIXES.items() if name.startswith(new)), name)


def write_checkpoint(shape: maira2.Shape, texts: Sequence[str], folder: Path, device: str, dtype: torch.dtype, shards: int = 6) -> None:
    """MAIRA-2's published layout with random weights: names of then, shards with an index, and a processor that is code."""
    folder.mkdir(parents=True)
    tokenizer = train_tokenizer(texts, min(2000, shape.vocabulary - 1))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save_pretrained(folder)
    model = maira2.subject_of(shape, device, dtype).model
    weights, names = model.state_dict(), sorted(model.state_dict())
    parts = {f"model-{i + 1:05}-of-{shards:05}.safetensors": names[i::shards] for i in range(shards)}
    for file, own in parts.items(): save_file({published_name(n): weights[n].cpu().contiguous() for n in own}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {published_name(n): file for file, own in parts.items() for n in own}}
    config = maira2.config(shape).to_dict() | {"architectures": ["Maira2ForConditionalGeneration"], "torch_dtype": str(dtype).removeprefix("torch.")}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    config |= ids | {"text_config": config["text_config"] | ids}
    (folder / "processing_maira2.py").write_text(PROCESSOR, encoding="utf-8")
    code = {"processor_class": "Maira2Processor", "auto_map": {"AutoProcessor": "processing_maira2.Maira2Processor"}}
    size = {"size": {"shortest_edge": shape.image_size}, "crop_size": {"height": shape.image_size, "width": shape.image_size}}
    own = {"processor_config.json": code | {"image_token": "<image>", "patch_size": 14, "vision_feature_select_strategy": "default"},
           "preprocessor_config.json": code | size | {"image_processor_type": "BitImageProcessor", "image_mean": [MEAN] * 3, "image_std": [STD] * 3,
                                                      "resample": 3, "do_convert_rgb": True},
           "generation_config.json": ids, "config.json": config, "model.safetensors.index.json": index}
    for name, values in own.items(): (folder / name).write_text(json.dumps(values, default=str), encoding="utf-8")


def draw_films(studies: Sequence[Study], number: int, side: int, folder: Path) -> list[Path]:
    """Some of phantom's films at a real film's size, with its grain, as JPEG."""
    folder.mkdir(parents=True)
    out = []
    for i, study in enumerate(studies[:number]):
        small = Image.fromarray(study.views["frontal"].array()).convert("L")
        film = np.asarray(small.resize((side, side * 6 // 5), Image.Resampling.BICUBIC), dtype=np.float32)
        film = film + rng(0, "grain", i).normal(0, 6, film.shape).astype(np.float32)
        out.append(folder / f"{i}.jpg")
        Image.fromarray(film.clip(0, 255).astype(np.uint8)).save(out[-1], quality=95)
    drawing_of.cache_clear()
    return out


def report_of(study: Study) -> str:
    """A report as MIMIC-CXR's files have it."""
    sections = "\n\n".join(f" {name.upper()}:  {study.sections[name]}" for name in ("indication", "technique", "comparison", "findings")
                           if study.sections.get(name))
    return f"                                 FINAL REPORT\n EXAMINATION:  CHEST (PA AND LAT)\n\n{sections}\n\n IMPRESSION:  See above.\n"


def write_mimic(size: Size, root: Path) -> list[Study]:
    """A folder in MIMIC-CXR's official layout, filled with studies of the phantom; returns these."""
    counts = dict(zip(("train_patients", "validation_patients", "test_patients"), size.patients, strict=True))
    studies = list(open_source(StudiesConfig(source="phantom:0", **counts)).studies)
    films = draw_films(studies, size.films, size.side, root / "drawn")
    patients = {p: 10_000_000 + i for i, p in enumerate(dict.fromkeys(s.patient for s in studies))}
    metadata, split = [], []
    for i, study in enumerate(studies):
        patient, number = patients[study.patient], 50_000_000 + i
        folder = root / f"files/p{str(patient)[:2]}/p{patient}/s{number}"
        folder.mkdir(parents=True)
        folder.with_suffix(".txt").write_text(report_of(study), encoding="utf-8")
        for j, position in enumerate(("PA", "LATERAL")):
            image = f"{i:08x}-{j}"
            os.link(films[(2 * i + j) % len(films)], folder / f"{image}.jpg")
            metadata.append([image, patient, number, position, 21800101 + i, "093000.000"])
            split.append([image, number, patient, {"validation": "validate"}.get(study.split, study.split)])
    tables = {"metadata": (["dicom_id", "subject_id", "study_id", "ViewPosition", "StudyDate", "StudyTime"], metadata),
              "split": (["dicom_id", "study_id", "subject_id", "split"], split)}
    for name, (header, rows) in tables.items():
        with open(root / f"mimic-cxr-2.0.0-{name}.csv", "w", newline="", encoding="utf-8") as f: csv.writer(f).writerows([header, *rows])
    return studies


def films_a_second(root: Path, size: int, number: int = 4) -> float:
    """Films decoded, stretched and brought to the network's size in a second, by one thread."""
    files = sorted((root / "drawn").glob("*.jpg"))[:number]
    begin = time.perf_counter()
    for file in files: prepare_image(np.asarray(Image.open(file)), size)
    return len(files) / (time.perf_counter() - begin)


def in_a_process(arguments: Sequence[str]) -> None:
    """The command line with these arguments, as a user would start it."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)}
    subprocess.run([sys.executable, "-c", "from saerad.run.cli import main; main()", *arguments], check=True, env=env, stdout=sys.stderr)


def rehearse(size: Size, folder: Path, call: Callable[[Sequence[str]], None] = in_a_process, device: str = "cpu") -> list[dict[str, Any]]:
    """Make everything in `folder`, do the run, and measure: one row a stage."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    studies = write_mimic(size, folder / "mimic")
    write_checkpoint(size.network, [t for s in studies for t in s.sections.values()], folder / "maira2", device, dtype)
    settings = [f"studies.source=mimic-cxr:{folder / 'mimic'}", f"subject.model={folder / 'maira2'}", *size.settings]
    with WordServer() as server:
        settings.append(f"interpretation.base_url={server.url}")
        with no_key(): call(["run", str(ROOT / "configs/paper.yaml"), *settings, "--out", str(folder / "run")])
        calls = len(server.bodies)
    return table_of(folder, load_config(ROOT / "configs/paper.yaml", settings), size, calls)


class no_key:  # noqa: N801 - reads as a clause
    """The endpoint's key, which the server on this machine does not ask for, while the block lasts."""
    def __enter__(self) -> None: self.was = os.environ.setdefault("OPENAI_API_KEY", "none")
    def __exit__(self, *error: object) -> None:
        if self.was == "none": os.environ.pop("OPENAI_API_KEY", None)


def table_of(folder: Path, config: Config, size: Size, calls: int) -> list[dict[str, Any]]:
    """For each stage what was done, how fast, how much it left, and what that comes to for the paper's own config; a push brings its controls."""
    run, paper = folder / "run", load_config(ROOT / "configs/paper.yaml")
    stages, store = read_json(run / "manifest.json")["stages"], read_json(run / "activations/store.json")
    kept = sum(split["rows"] for split in store["splits"].values())
    features, width = read_json(run / "sae/config.json")["width"], PAPER_WIDTH * paper.sae.expansion
    methods = read_table(run / "steering/generations.parquet", ["method"])["method"].to_pylist()
    planned = planned_exemplars(width, paper.exemplars)
    whole = estimate_cost(planned[0], paper.interpretation, planned[1])
    units = {"extract": ("tokens", kept, PAPER_TOKENS), "train": ("tokens", config.training.steps * config.training.batch_size,
                                                                  paper.training.steps * paper.training.batch_size),
             "exemplars": ("tokens", kept, PAPER_TOKENS), "interpret": ("calls", calls, whole["calls"]),
             "steer": ("pushes", methods.count(config.steering.method), 50 * len(paper.steering.alphas) * paper.steering.studies),
             "portray": ("features", features, width), "atlas": ("features", features, width)}
    rows = []
    for name, entry in ((name, stages[name]) for name in STAGES if name in stages):
        unit, done, there = units.get(name, ("run", 1, 1))
        written, seconds = sum(entry["files"].values()), max(entry["seconds"], 0.05)
        vectors = sum(bytes_ for file, bytes_ in entry["files"].items() if file.startswith("activations/shard"))
        theirs = written + vectors * (PAPER_WIDTH / size.network.text[0] - 1)       # a token's numbers go with the width of the network
        rows.append({"stage": name, "seconds": entry["seconds"], "unit": unit, "done": done, "a_second": done / seconds, "mb": written / 1e6,
                     "memory_gb": entry["peak_memory_gb"], "paper_units": there, "paper_hours": seconds * there / done / 3600,
                     "paper_gb": theirs * there / done / 1e9})
    return rows


def written(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table for people."""
    head = f"{'stage':<10}{'seconds':>9}  {'a second':<18}{'MB':>9}{'GB memory':>11}  {'so for the paper':<22}{'hours':>9}{'GB':>9}"
    lines = [f"{r['stage']:<10}{r['seconds']:>9.1f}  {r['a_second']:>9,.1f} {r['unit']:<8}{r['mb']:>9.1f}{r['memory_gb']:>11.2f}  "
             f"{r['paper_units']:>13,.0f} {r['unit']:<8}{r['paper_hours']:>9.2f}{r['paper_gb']:>9.1f}" for r in rows]
    hours = sum(r["paper_hours"] for r in rows if r["stage"] != "interpret")
    disk = sum(r["paper_gb"] for r in rows)
    return "\n".join([head, *lines, f"all but the endpoint: {hours:.1f} hours, with a network and a machine like these; disk {disk:.0f} GB"])


def main() -> None:
    """Choose the size by the machine, rehearse, and print one JSON object on the last line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    quick, cuda = parser.parse_args().quick, torch.cuda.is_available()
    size, name = (TINY, "tiny") if quick else (FULL, "full size") if cuda else (SMALL, "small")
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        rows = rehearse(size, Path(folder), device="cuda" if cuda else "cpu")
        taken, films = time.perf_counter() - begin, films_a_second(Path(folder) / "mimic", size.network.image_size)
    shape = (f"{name} random MAIRA-2 ({size.network.text[0]} wide, {size.network.text[1]} layers), {sum(size.patients)} patients, "
             f"films of {size.side} px; {films:.1f} films a second and thread, {taken:.0f} s in all")
    ours = {"films_a_second": films, "hours_but_endpoint": sum(r["paper_hours"] for r in rows if r["stage"] != "interpret"),
            "calls": next(r["paper_units"] for r in rows if r["stage"] == "interpret"), "disk_gb": sum(r["paper_gb"] for r in rows)}
    print(json.dumps({"name": "rehearsal", "shape": shape, "machine": machine(), "ours": ours, "peers": {}, "ratios": {}, "rows": rows,
                      "table": written(rows), "peak_memory": max(r["memory_gb"] for r in rows)}))


if __name__ == "__main__": main()
