"""Extraction: the right tokens, the right vectors, and the same bytes whatever happens on the way."""
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from saerad.core import UserError, rng
from saerad.extraction import (
    ExtractionConfig,
    batches_by_length,
    extract,
    kept_tokens,
    residuals,
    token_table,
)
from saerad.store import Store
from saerad.studies import Picture, Source, Study
from saerad.subjects import Prompt, Subject, random_mini

WORDS = "the lungs are clear no small left right pleural effusion with mild cardiomegaly tube in place".split()
SMALL = ExtractionConfig(layer=1, batch_size=2, rows_per_shard=150)


def film(number: int, pause: float) -> np.ndarray:
    """A picture; it takes a while to load, so that there is time to be killed."""
    time.sleep(pause)
    return rng(1, number).integers(0, 255, (112, 112)).astype(np.uint8)


def studies(n: int, pause: float = 0.) -> Source:
    """Studies of patients with two exams each, every other patient a test patient, reports of very different lengths."""
    found: list[Study] = []
    for i in range(n):
        draw = rng(0, i)
        sections = {"indication": " ".join(draw.choice(WORDS, 4)), "findings": " ".join(draw.choice(WORDS, draw.integers(3, 40)))}
        found.append(Study(f"s{i}", f"p{i // 2}", ("train", "test")[i // 2 % 2], sections,
                           {"frontal": Picture(f"film {i}", lambda i=i: film(i, pause))}, found[-1] if i % 2 else None, "AP"))
    return Source("made up", found)


def contents(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def teacher_forced(subject: Subject, source: Source) -> list[Prompt]:
    return [subject.prompt(s, s.sections["findings"]) for s in source.studies]


@pytest.fixture(scope="module")
def subject() -> Subject: return random_mini(0)


@pytest.fixture(scope="module")
def source() -> Source: return studies(22)


@pytest.fixture(scope="module")
def whole(subject: Subject, source: Source, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store that nothing disturbed."""
    return extract(source, subject, SMALL, tmp_path_factory.mktemp("extraction") / "activations")


def prompt_of(*runs: tuple[str, str, int]) -> Prompt:
    """A prompt of runs (section, view, number of tokens)."""
    section, view = (np.concatenate([[r[k]] * r[2] for r in runs]) for k in (0, 1))
    none = np.full(len(section), -1)
    return Prompt("s", torch.arange(len(section)), None, tuple(dict.fromkeys(v for v in view if v)), section, view, none, none, none, none)


@pytest.mark.parametrize(("settings", "expected"), [
    ({}, [6, 8, 9, 11, 12]),
    ({"image_tokens": "none"}, [8, 9, 11, 12]),
    ({"image_tokens": "last_of_view"}, [3, 6, 8, 9, 11, 12]),
    ({"image_tokens": "all"}, [1, 2, 3, 5, 6, 8, 9, 11, 12]),
    ({"boilerplate": True}, [0, 4, 6, 7, 8, 9, 10, 11, 12, 13]),
])
def test_token_filter(settings: dict, expected: list[int]) -> None:
    prompt = prompt_of(("boilerplate", "", 1), ("image", "frontal", 3), ("boilerplate", "", 1), ("image", "prior", 2),
                       ("boilerplate", "", 1), ("indication", "", 2), ("boilerplate", "", 1), ("findings", "", 2), ("boilerplate", "", 1))
    assert np.flatnonzero(kept_tokens(prompt, ExtractionConfig(**settings))).tolist() == expected


def test_token_filter_of_views_side_by_side_and_of_text_alone() -> None:
    prompt = prompt_of(("image", "frontal", 3), ("image", "lateral", 3), ("findings", "", 1))
    assert np.flatnonzero(kept_tokens(prompt, ExtractionConfig(image_tokens="last_of_view"))).tolist() == [2, 5, 6]
    for how in ("last", "last_of_view", "none", "all"):
        assert kept_tokens(prompt_of(("findings", "", 3)), ExtractionConfig(image_tokens=how)).all()


def test_tokens_know_where_they_come_from(subject: Subject, source: Source) -> None:
    study = source.studies[3]
    prompt = subject.prompt(study, study.sections["findings"])
    tokens = token_table(study, prompt, subject.texts(prompt), kept_tokens(prompt, SMALL)).to_pylist()
    image = [t for t in tokens if t["section"] == "image"]
    assert [(t["view"], t["row"], t["col"]) for t in image] == [("prior", 7, 7)]
    for section in ("indication", "findings"):
        spans = [(t["start"], t["end"]) for t in tokens if t["section"] == section]
        covered = {i for a, b in spans for i in range(a, b)}
        assert {i for i, c in enumerate(study.sections[section]) if c != " "} <= covered
    text = "".join(t["text"] for t in tokens if t["section"] == "findings")
    assert text.split() == study.sections["findings"].split()
    for t in tokens: assert prompt.ids[t["position"]] == t["token_id"] and t["patient"] == "p1"


def test_vectors_are_those_of_a_plain_pass(subject: Subject, source: Source) -> None:
    """An independent forward hook on the whole, unpadded model sees the same; the layers above the hookpoint never run."""
    prompts, seen, above = teacher_forced(subject, source)[:3], [], []
    layers = next(m for name, m in subject.model.named_modules() if name.endswith("language_model.layers"))
    hooks = [layers[2].register_forward_hook(lambda m, i, o: seen.append(o[0] if o.ndim == 3 else o)),
             layers[3].register_forward_hook(lambda m, i, o: above.append(1))]
    traced = residuals(subject, prompts, layer=2)
    assert not above
    seen.clear()
    with torch.no_grad():
        for p in prompts: subject.model(**subject.collate([p]))
    for hook in hooks: hook.remove()
    for a, b, p in zip(traced, seen, prompts, strict=True):
        assert a.shape == (len(p), subject.d_model)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_vectors_do_not_depend_on_padding(subject: Subject, source: Source) -> None:
    prompts = teacher_forced(subject, source)[:16]
    assert len({len(p) for p in prompts}) > 5
    for prompt, crowd in zip(prompts, residuals(subject, prompts, layer=3), strict=True):
        torch.testing.assert_close(residuals(subject, [prompt], layer=3)[0], crowd, rtol=1e-4, atol=1e-5)


def test_rows_are_in_the_order_of_the_studies(whole: Store, subject: Subject, source: Source, tmp_path: Path) -> None:
    order = [s.study for s in source.split("train")] + [s.study for s in source.split("test")]
    assert list(whole.study_rows()) == order and not whole.meta["problems"]
    other = extract(source, subject, SMALL.model_copy(update={"batch_size": 5, "rows_per_shard": 1000}), tmp_path)
    assert other.tokens.equals(whole.tokens) and other.meta["key"] != whole.meta["key"]
    every = np.arange(len(whole))
    torch.testing.assert_close(whole.read(every), other.read(every), rtol=1e-4, atol=1e-5)
    name, rows = list(whole.study_rows().items())[5]
    prompt = subject.prompt(source[name], source[name].sections["findings"])
    expected = residuals(subject, [prompt], 1)[0][torch.from_numpy(kept_tokens(prompt, SMALL))]
    torch.testing.assert_close(whole.read(np.array(rows)), expected, rtol=1e-4, atol=1e-5)


def test_longest_first() -> None:
    assert batches_by_length([3, 9, 4, 9, 1], 2) == [[1, 3], [2, 0], [4]]


KILLED = """
    import sys
    sys.path.insert(0, {tests!r})
    import torch
    torch.set_num_threads({threads})
    from test_extraction import SMALL, extract, random_mini, studies
    extract(studies(22, pause=.02), random_mini(0), SMALL, {folder!r})
"""


def test_killed_and_gone_on(whole: Store, subject: Subject, source: Source, tmp_path: Path, shards: int = 4) -> None:
    """A real process is killed for good while it extracts; the next start ends with the bytes of an undisturbed one."""
    code = KILLED.format(tests=str(Path(__file__).parent), folder=str(tmp_path), threads=torch.get_num_threads())
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], env={**os.environ, "TQDM_DISABLE": "1"})
    record, until = tmp_path / "part-00000.json", time.monotonic() + 120
    while not record.exists() or len(json.loads(record.read_text())["shards"]) < shards:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    with pytest.raises(UserError, match="no finished store"): Store.open(tmp_path)
    begun = (tmp_path / "shard-00000.safetensors").stat()
    extract(source, subject, SMALL, tmp_path)
    assert (tmp_path / "shard-00000.safetensors").stat().st_mtime_ns == begun.st_mtime_ns
    assert contents(tmp_path) == contents(whole.folder)


def test_finished_store_is_left_alone(whole: Store, subject: Subject, source: Source) -> None:
    def stamps() -> dict[str, int]: return {p.name: p.stat().st_mtime_ns for p in whole.folder.iterdir()}
    before = stamps()
    assert extract(source, subject, SMALL, whole.folder).meta == whole.meta and stamps() == before


def test_another_store_is_replaced(whole: Store, subject: Subject, source: Source, tmp_path: Path) -> None:
    for other in (SMALL.model_copy(update={"layer": 0}), SMALL.model_copy(update={"dtype": "bfloat16"})):
        assert extract(studies(4), subject, other, tmp_path).meta["key"] != whole.meta["key"]
    extract(source, subject, SMALL, tmp_path)
    assert contents(tmp_path) == contents(whole.folder)


def test_damaged_shard_is_named_and_made_again(whole: Store, subject: Subject, source: Source, tmp_path: Path,
                                               capsys: pytest.CaptureFixture) -> None:
    extract(source, subject, SMALL, tmp_path)
    shard = tmp_path / "shard-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    extract(source, subject, SMALL, tmp_path)
    assert "shard-00002.safetensors is damaged" in capsys.readouterr().err
    assert contents(tmp_path) == contents(whole.folder)


def test_full_disk(whole: Store, subject: Subject, source: Source, tmp_path: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(UserError, match="No space is left"): extract(source, subject, SMALL, tmp_path)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not list(tmp_path.iterdir())
    extract(source, subject, SMALL, tmp_path)
    assert contents(tmp_path) == contents(whole.folder)


def test_broken_picture_is_named_and_skipped(subject: Subject, source: Source, tmp_path: Path) -> None:
    """The study goes, and so does nothing else; a study that has it as its prior names it too."""
    broken = tmp_path / "film.png"
    broken.write_bytes(b"not a picture")
    bad = replace(source.studies[4], views={"frontal": Picture.from_file(broken)})
    some = Source("some", [*source.studies[:4], bad, *source.studies[6:8]])
    store = extract(some, subject, SMALL, tmp_path / "activations")
    assert [p["study"] for p in store.meta["problems"]] == ["s4"] and "film.png" in store.meta["problems"][0]["problem"]
    assert set(store.study_rows()) == {"s0", "s1", "s2", "s3", "s6", "s7"}


def test_activations_that_are_not_finite(source: Source, tmp_path: Path) -> None:
    sick = random_mini(0)
    word = sick.prompt(source.studies[1], source.studies[1].sections["findings"]).ids[-2]
    with torch.no_grad(): sick.model.get_input_embeddings().weight[word] = torch.nan
    with pytest.raises(UserError, match="Study s.* after layer 1 .*not finite"): extract(source, sick, SMALL, tmp_path)
    assert not (tmp_path / "store.json").exists()


def test_layer_that_is_not_there(subject: Subject, source: Source, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="40"): extract(source, subject, ExtractionConfig(layer=40), tmp_path / "activations")
    assert not (tmp_path / "activations").exists()


def test_generated_reports(subject: Subject, source: Source, tmp_path: Path) -> None:
    """The report is the model's own; what it says of itself and what lies in the store agree, letter by letter."""
    brief, some = replace(subject, max_report_tokens=12), Source("some", source.studies[:4])
    store = extract(some, brief, SMALL.model_copy(update={"reports": "generated"}), tmp_path)
    written = brief.generate([brief.prompt(s, None) for s in some.split("train")])
    def letters(text: str) -> str: return "".join(c for c in text if c.isascii() and c.isalnum())
    tokens = store.tokens.to_pylist()
    for study, report in zip(some.split("train"), written, strict=True):
        text = "".join(t["text"] for t in tokens if t["study"] == study.study and t["section"] == "findings")
        assert letters(text) == letters(report) != letters(study.sections["findings"])
