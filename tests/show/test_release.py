"""A release: one SAE for everybody, numbers beside controls, nothing that may not leave, and a folder that is whole or not there."""
import hashlib
import json
import zipfile
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from saerad.activations.extraction import ExtractionConfig, extract
from saerad.core import UserError, read_json, write_json
from saerad.run.cli import main
from saerad.sae.convert import read_sae
from saerad.sae.model import MatryoshkaSAE
from saerad.show.atlas import write_atlas
from saerad.show.invented import invent_run
from saerad.show.release import LIBRARIES, number_rows, write_release
from saerad.studies.record import StudiesConfig
from saerad.studies.sources import open_source
from saerad.subjects.subject import open_subject

RELEASED = Path(__file__).parents[2] / "nbs/results/release"


def make(folder, groups=(64, 64, 128)):
    run = invent_run(folder)
    sae = MatryoshkaSAE(32, groups, 8)
    with torch.no_grad():
        sae.scale.fill_(22)
        sae.threshold.fill_(0.05)
    sae.save(run / "sae")
    write_atlas(run)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory): return make(tmp_path_factory.mktemp("run") / "run")


def files(folder): return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_every_library_finds_the_same_sae(run, tmp_path):
    out = write_release(run, tmp_path / "out", "ours")
    x = 22 * torch.randn(100, 32, generator=torch.Generator().manual_seed(1))
    own = MatryoshkaSAE.load(run / "sae")
    for library in LIBRARIES:
        read = read_sae(out / "sae" / library).sae()
        assert torch.equal(read.encode(x) > 0, own.encode(x) > 0)
        assert torch.allclose(read(x), own(x), rtol=1e-4, atol=1e-3)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlicense:") and "# ours" in card and all(f"| {library} | `" in card for library in LIBRARIES)


def test_half_the_size_is_the_same_sae_but_for_its_rounding_in_every_library(run, tmp_path):
    out, whole = write_release(run, tmp_path / "half", half=True), write_release(run, tmp_path / "whole")
    x = 22 * torch.randn(100, 32, generator=torch.Generator().manual_seed(1))
    own, read = MatryoshkaSAE.load(run / "sae"), {library: read_sae(out / "sae" / library) for library in LIBRARIES}
    saes = {library: checkpoint.sae() for library, checkpoint in read.items()}
    assert all(not checkpoint.notes and checkpoint.k == 8 and checkpoint.group_sizes == (64, 64, 128) for checkpoint in read.values())
    for sae in saes.values():
        assert torch.equal(sae.W_dec, own.W_dec.half().float()) and torch.equal(sae.W_enc, own.W_enc.half().float())
        assert torch.equal(sae.encode(x) > 0, saes["saerad"].encode(x) > 0)
        assert ((sae.encode(x) > 0) != (own.encode(x) > 0)).float().mean() < 0.001      # those at the threshold
        assert (sae(x) - own(x)).norm() < 0.01 * own(x).norm() and sae.threshold * sae.scale == own.threshold * own.scale
    sizes = [sum(p.stat().st_size for p in [*f.rglob("*.safetensors"), *f.rglob("*.pt")]) for f in (out, whole)]
    assert sizes[0] < 0.75 * sizes[1]
    cards = [(f / "README.md").read_text(encoding="utf-8") for f in (out, whole)]
    assert ["stored as float16" in card for card in cards] == [True, False]
    assert all(p.stat().st_mode & 0o044 == 0o044 for p in out.rglob("*.safetensors"))       # others may read them


def test_checksums_are_of_all_files_and_the_same_run_gives_the_same_bytes(run, tmp_path):
    one, two = (write_release(run, tmp_path / name, "ours") for name in ("one", "two"))
    sums = dict(reversed(line.split("  ")) for line in (one / "SHA256SUMS").read_text(encoding="utf-8").splitlines())
    assert set(sums) == files(one) - {"SHA256SUMS"} >= {"atlas.zip", "features.csv", "README.md"}
    assert all(hashlib.sha256((one / name).read_bytes()).hexdigest() == sums[name] for name in sums)
    differ = {name for name in files(one) if (one / name).read_bytes() != (two / name).read_bytes()}
    assert differ <= {"sae/dictionary_learning/ae.pt", "SHA256SUMS"}      # torch.save writes a folder's name into the archive
    with zipfile.ZipFile(one / "atlas.zip") as archive: assert "atlas/index.html" in archive.namelist()


def test_the_card_has_the_run_s_numbers_beside_their_controls(run, tmp_path):
    summary = read_json(run / "summary.json")
    card = (write_release(run, tmp_path / "out") / "README.md").read_text(encoding="utf-8")
    assert f"| {summary['interpretation']['median_f1']:.3g} | {summary['interpretation']['shuffled_median_f1']:.3g} (another" in card
    assert number_rows({"sae": {"fvu": None}, "steering": None}) == []
    assert number_rows({"sae": {"dead": 0.0}}) == [("share of features that never fire", "0", "")]
    assert len(pd.read_csv(tmp_path / "out/features.csv")) == summary["interpretation"]["features"]


def test_what_may_not_leave_stays(run, tmp_path):
    """The atlas holds text and films of studies; of a credentialed source it is left out, and nothing else says that it was there."""
    folder = make(tmp_path / "run")
    table = tmp_path / "reports.csv"
    numbers = [str(i) for i in range(30)]
    pd.DataFrame({"study": numbers, "patient": numbers, "findings": "No effusion."}).to_csv(table, index=False)
    config = {"studies": {"source": f"table:{table}"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    out = write_release(folder, tmp_path / "out")
    assert "atlas.zip" not in files(out) and "atlas" not in (out / "README.md").read_text(encoding="utf-8")
    config["studies"]["text_may_leave"] = True
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert "atlas.zip" in files(write_release(folder, tmp_path / "allowed"))


def test_a_kind_without_a_form_is_named_and_not_written(run, tmp_path):
    folder = make(tmp_path / "run")
    config = json.loads((folder / "sae/config.json").read_text(encoding="utf-8"))
    write_json(folder / "sae/config.json", config | {"kind": "topk", "rule": "topk"})
    card = (write_release(folder, tmp_path / "out") / "README.md").read_text(encoding="utf-8")
    assert "| dictionary_learning | not included: RUN/sae cannot become dictionary_learning unchanged" in card
    assert not (tmp_path / "out/sae/dictionary_learning").exists()


@pytest.mark.parametrize(("options", "said"), [([], "is not empty; name a new folder"), (["--most-mb", "0.1"], "more than --most-mb 0.1")])
def test_refusals_write_nothing(run, tmp_path, capsys, options, said):
    out = tmp_path / "out"
    if not options:
        out.mkdir()
        (out / "mine").write_text("mine", encoding="utf-8")
    before = files(tmp_path)
    with pytest.raises(SystemExit) as stopped: main(["release", str(run), str(out), *options])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err and files(tmp_path) == before and len(list(tmp_path.iterdir())) <= 1


def test_a_run_without_an_sae_or_atlas(tmp_path):
    run = invent_run(tmp_path / "run")
    with pytest.raises(UserError, match="no trained SAE"): write_release(run, tmp_path / "out")
    sae = MatryoshkaSAE(32, (64,), 8)
    with torch.no_grad(): sae.threshold.fill_(0.05)
    sae.save(run / "sae")
    with pytest.raises(UserError, match="no atlas; make it with saerad atlas, or release without"): write_release(run, tmp_path / "out")
    assert "atlas.zip" not in files(write_release(run, tmp_path / "out", atlas=False))


def test_what_this_project_released_is_whole_and_within_its_size():
    sums = dict(reversed(line.split("  ")) for line in (RELEASED / "SHA256SUMS").read_text(encoding="utf-8").splitlines())
    assert set(sums) == files(RELEASED) - {"SHA256SUMS"} and sum(p.stat().st_size for p in RELEASED.rglob("*") if p.is_file()) < 10e6
    assert all(hashlib.sha256((RELEASED / name).read_bytes()).hexdigest() == wanted for name, wanted in sums.items())
    features = pd.read_csv(RELEASED / "features.csv")
    assert len(features) == 1024 and features.explanation.notna().sum() > 700
    with zipfile.ZipFile(RELEASED / "atlas.zip") as archive: assert archive.testzip() is None


def test_the_released_sae_reconstructs_what_the_bundled_model_does_in_a_new_world(tmp_path):
    """Patients of another phantom than it was trained on; the numbers are those of its card, with room for the few studies."""
    source = open_source(StudiesConfig(source="phantom:7", train_patients=1, validation_patients=1, test_patients=8))
    store = extract(source, open_subject(), ExtractionConfig(layer=4), tmp_path / "activations")
    x = store.read(store.where("test"))
    saes = [read_sae(RELEASED / "sae" / library).sae() for library in LIBRARIES]
    on = [sae.encode(x) > 0 for sae in saes]
    assert torch.equal(on[0], on[1]) and torch.equal(on[0], on[2])
    assert ((saes[0](x) - x) ** 2).sum() / ((x - x.mean(0)) ** 2).sum() < 0.09
    assert 14 < on[0].sum(1).float().mean() < 18
