"""Extraction: the right tokens, the right vectors, and the same bytes whatever happens on the way."""
import fcntl
import hashlib
import json
import multiprocessing
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
from pydantic import ValidationError
from transformers import LlamaConfig, LlamaForCausalLM

from saerad.activations.extraction import (
    ExtractionConfig,
    batches_by_length,
    extract,
    folder_of,
    hooked_rows,
    kept_tokens,
    parts_of,
    residuals,
    single_layer,
    token_table,
)
from saerad.activations.store import Store
from saerad.core import UserError, rng
from saerad.studies.record import Source, Study, View
from saerad.subjects.subject import Prompt, Subject, plain_subject, random_mini, train_tokenizer

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
                           {"frontal": View(f"film {i}", lambda i=i: film(i, pause))}, found[-1] if i % 2 else None, "AP"))
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
    ({"image_tokens": "sample:9"}, [1, 2, 3, 5, 6, 8, 9, 11, 12]),
    ({"boilerplate": True}, [0, 4, 6, 7, 8, 9, 10, 11, 12, 13]),
])
def test_token_filter(settings: dict, expected: list[int]) -> None:
    prompt = prompt_of(("boilerplate", "", 1), ("image", "frontal", 3), ("boilerplate", "", 1), ("image", "prior", 2),
                       ("boilerplate", "", 1), ("indication", "", 2), ("boilerplate", "", 1), ("findings", "", 2), ("boilerplate", "", 1))
    assert np.flatnonzero(kept_tokens(prompt, ExtractionConfig(**settings))).tolist() == expected


def test_sampled_image_tokens() -> None:
    """So many of each study, without repetition, the same ones every time, others for another study."""
    prompt = prompt_of(("boilerplate", "", 1), ("image", "frontal", 60), ("findings", "", 2))
    cfg = ExtractionConfig(image_tokens="sample:8")
    kept = np.flatnonzero(kept_tokens(prompt, cfg))
    assert len(kept) == 10 and set(kept[-2:]) == {61, 62} and kept[0] > 0
    assert np.array_equal(kept, np.flatnonzero(kept_tokens(prompt, cfg)))
    assert not np.array_equal(kept, np.flatnonzero(kept_tokens(replace(prompt, study="other"), cfg)))
    for wrong in ("sample:0", "sample:", "some"):
        with pytest.raises(ValidationError): ExtractionConfig(image_tokens=wrong)


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
    torch.testing.assert_close(whole.read(np.array(rows)), expected.cpu(), rtol=1e-4, atol=1e-5)


def test_longest_first() -> None:
    assert batches_by_length([3, 9, 4, 9, 1], 2) == [[1, 3], [2, 0], [4]]


KILLED = """
    import sys
    sys.path[:0] = [{tests!r}, {tests!r} + "/.."]
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
    while not record.exists() or len(json.loads(record.read_text(encoding="utf-8"))["shards"]) < shards:
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
    bad = replace(source.studies[4], views={"frontal": View.from_file(broken)})
    some = Source("some", [*source.studies[:4], bad, *source.studies[6:8]])
    store = extract(some, subject, SMALL, tmp_path / "activations")
    assert [p["study"] for p in store.meta["problems"]] == ["s4"] and "film.png" in store.meta["problems"][0]["problem"]
    assert set(store.study_rows()) == {"s0", "s1", "s2", "s3", "s6", "s7"}


def test_activations_that_are_not_finite(source: Source, tmp_path: Path) -> None:
    sick = random_mini(0)
    word = sick.prompt(source.studies[1], source.studies[1].sections["findings"]).ids[-2]
    with torch.no_grad(): sick.model.get_input_embeddings().weight[word] = torch.nan
    with pytest.raises(UserError, match="Study s.* at the output of layer 1 .*not finite"): extract(source, sick, SMALL, tmp_path)
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


# --- several hookpoints

def test_several_hookpoints_are_what_each_would_have_been_alone(subject: Subject, source: Source, tmp_path: Path) -> None:
    """One pass, three stores; each has the bytes of a run that recorded it alone, and deals the same tokens in the same order."""
    cfg = SMALL.model_copy(update={"more_layers": (3, 0)})
    extract(source, subject, cfg, tmp_path / "together")
    for layer in (1, 3, 0):
        extract(source, subject, single_layer(cfg, layer), tmp_path / str(layer))
        found = {n: h for n, h in contents_of_files(folder_of(tmp_path / "together", cfg, layer)).items()}
        assert found == contents(tmp_path / str(layer))
    dealt = [next(Store.open(folder_of(tmp_path / "together", cfg, layer)).batches("train", 64, seed=5))[1] for layer in (1, 3, 0)]
    assert np.array_equal(dealt[0], dealt[1]) and np.array_equal(dealt[0], dealt[2])


def contents_of_files(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir()) if p.is_file()}


def test_the_pass_ends_at_the_deepest_hookpoint(subject: Subject, source: Source) -> None:
    prompts, ran = teacher_forced(subject, source)[:2], []
    layers = next(m for name, m in subject.model.named_modules() if name.endswith("language_model.layers"))
    hooks = [m.register_forward_hook(lambda m, i, o, n=n: ran.append(n)) for n, m in enumerate(layers)]
    found = hooked_rows(subject, prompts, [4, 1], [np.ones(len(p), dtype=bool) for p in prompts])
    for hook in hooks: hook.remove()
    assert set(ran) <= {0, 1, 2, 3, 4} and sorted(found) == [1, 4]
    for layer, rows in found.items(): assert torch.equal(rows, torch.cat(residuals(subject, prompts, layer)))


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_shorter_rows(dtype: str, whole: Store, subject: Subject, source: Source, tmp_path: Path) -> None:
    """Rounding takes far less than a thousandth of the variance of real activations."""
    store = extract(source, subject, SMALL.model_copy(update={"dtype": dtype}), tmp_path)
    x, y = (s.read(s.where()) for s in (whole, store))
    assert 0 < (x - y).square().sum() / (x - x.mean(0)).square().sum() < 5e-4
    assert store.tokens.equals(whole.tokens)


# --- several processes

def in_parts(**more: object) -> ExtractionConfig: return SMALL.model_copy(update={"studies_per_part": 4} | more)


def rank_of(n: int, of: int, folder: Path, monkeypatch: pytest.MonkeyPatch, subject: Subject, source: Source) -> Store | None:
    """What rank `n` of `of` does and gives, in this process."""
    monkeypatch.setenv("RANK", str(n))
    monkeypatch.setenv("WORLD_SIZE", str(of))
    try: return extract(source, subject, in_parts(), folder)
    finally:
        monkeypatch.delenv("RANK")
        monkeypatch.delenv("WORLD_SIZE")


def test_ranks_share_every_study() -> None:
    for ranks in (1, 2, 3, 7):
        parts = [p for r in range(ranks) for p in parts_of(22, in_parts(), r, ranks)]
        assert sorted(parts) == parts_of(22, in_parts()) and sorted(i for _, a, b in parts for i in range(a, b)) == list(range(22))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_ranks_make_the_store_of_a_single_process(order: tuple[int, ...], whole: Store, subject: Subject, source: Source, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    extract(source, subject, in_parts(), tmp_path / "single")
    found = [rank_of(n, 3, tmp_path / "shared", monkeypatch, subject, source) for n in order]
    assert found[:2] == [None, None] and found[2] is not None
    assert contents(tmp_path / "shared") == contents(tmp_path / "single")
    every = np.arange(len(whole))
    assert found[2].tokens.equals(whole.tokens) and torch.allclose(found[2].read(every), whole.read(every), rtol=1e-4, atol=1e-5)


def test_a_lost_rank_is_made_up_by_the_next_start(subject: Subject, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 of 3 never came; a start with one process, or with two, ends with the same bytes and leaves finished parts alone."""
    extract(source, subject, in_parts(), tmp_path / "single")
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        for n in (0, 2): assert rank_of(n, 3, folder, monkeypatch, subject, source) is None
        before = (folder / "shard-00000.safetensors").stat().st_mtime_ns
        for n in range(ranks): rank_of(n, ranks, folder, monkeypatch, subject, source)
        assert contents(folder) == contents(tmp_path / "single")
        assert (folder / "shard-00000.safetensors").stat().st_mtime_ns == before


def test_only_the_damaged_part_is_made_again(subject: Subject, source: Source, tmp_path: Path) -> None:
    extract(source, subject, in_parts(), tmp_path)
    before, shard = contents(tmp_path), tmp_path / "shard-02001.safetensors"
    stamps = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("shard*")}
    shard.write_bytes(shard.read_bytes()[:-1])
    extract(source, subject, in_parts(), tmp_path)
    assert contents(tmp_path) == before
    again = {name for name, stamp in stamps.items() if (tmp_path / name).stat().st_mtime_ns != stamp}
    assert "shard-02001.safetensors" in again and {n[6:8] for n in again} == {"02"}


# --- twenty kills

def tiny() -> Subject:
    """A text-only decoder that is as small as they come."""
    tokenizer = train_tokenizer([" ".join(WORDS)] * 5, 300)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": len(tokenizer)}
    return plain_subject(LlamaForCausalLM(LlamaConfig(**shape)), tokenizer, "tiny")


MANY = ExtractionConfig(layer=0, batch_size=2, rows_per_shard=150, studies_per_part=20)


def extract_tiny(folder: str, begun: object) -> None:
    """What the process does that will be killed."""
    torch.set_num_threads(1)
    subject, source = tiny(), studies(40)
    begun.set()
    extract(source, subject, MANY, folder)


def test_killed_at_twenty_random_moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time a process of its own, each time another moment; going on ends with the bytes of an undisturbed run."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]))    # for the server of processes
    context, threads = multiprocessing.get_context("forkserver"), torch.get_num_threads()
    context.set_forkserver_preload(["test_extraction"])
    torch.set_num_threads(1)
    subject, source = tiny(), studies(40)
    began = time.monotonic()
    extract(source, subject, MANY, tmp_path / "whole")
    lasts, expected, moments, killed = time.monotonic() - began, contents(tmp_path / "whole"), rng(0, "kills").uniform(size=20), set()
    for i, moment in enumerate(moments):
        begun = context.Event()
        process = context.Process(target=extract_tiny, args=(str(tmp_path / str(i)), begun))
        process.start()
        assert begun.wait(120)
        process.join(moment * lasts)
        process.kill()
        process.join()
        killed.add(process.exitcode)
        assert process.exitcode in (0, -signal.SIGKILL)
        extract(source, subject, MANY, tmp_path / str(i))
        assert contents(tmp_path / str(i)) == expected, moment
    torch.set_num_threads(threads)
    assert -signal.SIGKILL in killed


def test_killed_just_before_it_swept(tmp_path: Path) -> None:
    """Whoever finds the store whole sweeps in the place of the killed one, but leaves the lock of a living process; then nothing is written."""
    subject, source, folder = tiny(), studies(12), tmp_path / "store"
    extract(source, subject, MANY, folder)
    expected = contents(folder)
    for name in (".part-00000.lock", ".part-00001.lock", ".join.lock", "tokens-00000.parquet", "part-00000.json", ".shard-00009.safetensors.77.part"):
        (folder / name).write_bytes(b"")
    with open(folder / ".part-00001.lock", "w", encoding="utf-8") as living:
        fcntl.flock(living, fcntl.LOCK_EX)
        extract(source, subject, MANY, folder)
        assert set(contents(folder)) - set(expected) == {".part-00001.lock"}
    extract(source, subject, MANY, folder)
    assert contents(folder) == expected
    before = os.stat(folder).st_mtime_ns
    extract(source, subject, MANY, folder)
    assert os.stat(folder).st_mtime_ns == before


TORCHRUN = """
import sys
sys.path[:0] = [{tests!r}, {tests!r} + "/.."]
import left_threads
import torch
torch.set_num_threads(1)
from test_extraction import MANY, extract, studies, tiny
assert len(extract(studies(40), tiny(), MANY, {folder!r})) > 500
"""


def test_torchrun(tmp_path: Path) -> None:
    """Two real ranks under torchrun make the bytes of a single process, and both see the finished store."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    extract(studies(40), tiny(), MANY, tmp_path / "single")
    torch.set_num_threads(threads)
    (tmp_path / "rank.py").write_text(TORCHRUN.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "shared")), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "rank.py")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    done = run_group(command, env, 300)
    assert not done.returncode, done.stderr[-2000:]
    assert contents(tmp_path / "shared") == contents(tmp_path / "single")


def run_group(command: list[str], env: dict[str, str], seconds: float) -> subprocess.CompletedProcess:
    """Run a command; when its time is over its children end with it, which would otherwise hold its output open for good."""
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try: out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def test_further_hookpoints_can_keep_other_image_tokens(subject: Subject, source: Source, tmp_path: Path) -> None:
    """Each store still has the bytes of a run that recorded it alone, with its own choice of image tokens."""
    cfg = SMALL.model_copy(update={"more_layers": (0,), "more_image_tokens": "sample:8"})
    extract(source, subject, cfg, tmp_path / "together")
    for layer, tokens in ((1, "last"), (0, "sample:8")):
        alone = ExtractionConfig.model_validate(single_layer(cfg, layer).model_dump())
        assert alone.image_tokens == tokens and alone.more_image_tokens is None
        extract(source, subject, alone, tmp_path / str(layer))
        assert contents_of_files(folder_of(tmp_path / "together", cfg, layer)) == contents(tmp_path / str(layer))
