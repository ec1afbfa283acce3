"""The command line: exit codes, and one plain sentence for every kind of bad input."""
import errno
import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from saerad.core import UserError
from saerad.interpretation.endpoint import Ledger
from saerad.interpretation.interpret import InterpretationConfig, replay_note
from saerad.run import stages as running
from saerad.run.cli import explain_exception, main, print_error
from saerad.run.code import PACKAGE

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = ["studies.train_patients=6", "studies.validation_patients=2", "studies.test_patients=2"]


@pytest.fixture
def saerad(capsys):
    """Run the command; gives (exit code, what was printed, what was said on the error stream)."""
    def call(*arguments):
        with pytest.raises(SystemExit) as ended: main([str(a) for a in arguments])
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err
    return call


def is_one_sentence(err):
    lines = [line for line in err.splitlines() if line.startswith("saerad: ")]
    return len(lines) == 1 and "Traceback" not in err and lines[0].rstrip().endswith(".")


def test_help_names_every_command(saerad):
    code, out, _ = saerad("--help")
    assert code == 0
    commands = "run extract train evaluate exemplars interpret steer figures atlas studies doctor convert export review mini bench"
    for name in commands.split(): assert name in out


def test_studies_are_described(saerad):
    code, out, _ = saerad("studies", "phantom:0", *SMALL)
    assert code == 0 and "train" in out and "findings" in out


def test_check_does_nothing(saerad, tmp_path):
    code, out, _ = saerad("run", CONFIGS / "phantom.yaml", *SMALL, "--out", tmp_path / "run", "--check")
    assert code == 0 and "nothing stands in the way" in out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments, words", [
    (["sae.kk=3"], ["sae.kk", "sae.k"]),
    (["sae.k=100000"], ["sae.k", "100000"]),
    (["extraction.layer=99"], ["extraction.layer", "99"]),
    (["studies.source=openi:nowhere.tgz"], ["nowhere.tgz"]),
    (["studies.source=mimic-cxr:nowhere"], ["nowhere"]),
    (["studies.source=table:nowhere.csv"], ["nowhere.csv"]),
    (["studies.source=dicom:here"], ["dicom"]),
    (["subject.model=someone/a-model-that-is-not-there"], ["someone/a-model-that-is-not-there"]),
    (["interpretation.interpreter=openai", "interpretation.base_url=http://127.0.0.1:9/v1"], ["127.0.0.1:9"]),
    (["interpretation.interpreter=openai", "interpretation.base_url=https://api.example.org/v1", "interpretation.api_key_env=NOT_SET_HERE"],
     ["NOT_SET_HERE", "api.example.org"]),
    (["interpretation.descriptions=nowhere/theirs.csv"], ["nowhere/theirs.csv", "interpretation.descriptions"]),
    (["interpretation.features=[3, 99999]"], ["interpretation.features", "feature 99999", "0 to 1023"]),
    (["interpretation.features=level:9"], ["interpretation.features", "level:9", "levels 0 to 4"]),
    (["interpretation.budget=1"], ["interpretation.budget", "price_in"]),
    (["--from", "nothing"], ["nothing", "extract"]),
    (["--keep", "nothing"], ["--keep nothing", "extract"]),
    (["--keep", "extract"], ["--keep extract", "not been done"]),
])
@pytest.mark.parametrize("check", [False, True])
def test_bad_input_is_told_before_anything_is_written(saerad, tmp_path, monkeypatch, arguments, words, check):
    if check: monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)      # else the hub is asked, for as long as it takes
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    code, out, err = saerad("run", CONFIGS / "phantom.yaml", *SMALL, *arguments, "--out", tmp_path / "run", *(["--check"] if check else []))
    assert code == 2 and is_one_sentence(err), err
    assert all(word in err for word in words), err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("inside", ["", "runs/mine"])
@pytest.mark.parametrize("command", [["run", CONFIGS / "phantom.yaml"], ["sweep", CONFIGS / "phantom.yaml"], ["mini", "train", "phantom:0"]])
def test_a_folder_cannot_be_in_a_file(saerad, tmp_path, command, inside):
    (tmp_path / "taken").write_text("mine", encoding="utf-8")
    code, _, err = saerad(*command, "--out", tmp_path / "taken" / inside)
    assert code == 2 and is_one_sentence(err) and "taken is a file" in err and "--out" in err
    assert (tmp_path / "taken").read_text(encoding="utf-8") == "mine"


def test_a_file_that_stands_where_a_folder_must_be_is_no_fault_of_ours(tmp_path):
    (tmp_path / "taken").touch()
    for wrong in ((tmp_path / "taken").mkdir, (tmp_path / "taken/inside").mkdir, lambda: tmp_path.write_text("", encoding="utf-8")):
        with pytest.raises(OSError) as e: wrong()
        sentence, code = explain_exception(e.value)
        assert code == 2 and "--out" in sentence


def test_a_key_that_stands_twice(saerad, tmp_path):
    (tmp_path / "night.yaml").write_text("sae:\n  k: 8\nseed: 1\nsae:\n  k: 16\n", encoding="utf-8")
    code, _, err = saerad("run", tmp_path / "night.yaml", "--check")
    assert code == 2 and is_one_sentence(err) and "night.yaml has the key 'sae' twice, at lines 1 and 4" in err
    code, _, err = saerad("run", CONFIGS / "phantom.yaml", "sae={k: 8, k: 16}", "--check")
    assert code == 2 and is_one_sentence(err) and "'k' twice" in err


def test_a_terminal_that_knows_few_letters_is_no_fault(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr("sys.stdout", terminal)
    with pytest.raises(SystemExit) as ended: main(["studies", "phantom:0", *SMALL, "findings_from=findings"])
    terminal.flush()
    assert ended.value.code == 0 and b"median words" in terminal.buffer.getvalue()
    print("–", flush=True)
    assert terminal.buffer.getvalue().endswith(b"?\n")


ASKED = ["interpretation.interpreter=openai", "interpretation.base_url=http://127.0.0.1:9/v1", "interpretation.protocol=paper"]


def test_a_run_that_has_asked_everything_needs_no_server_and_any_other_ledger_does_not_count(saerad, tmp_path):
    ledger = tmp_path / "interpretations/ledger.sqlite"
    Ledger(ledger).close()      # of a lexical run
    code, _, err = saerad("run", CONFIGS / "phantom.yaml", *SMALL, *ASKED, "--out", tmp_path, "--check")
    assert code == 2 and is_one_sentence(err) and "does not answer" in err
    cfg = InterpretationConfig(interpreter="openai", base_url="http://127.0.0.1:9/v1")
    told = Ledger(ledger)
    told.note(replay_note(cfg), "every question of a run was asked")
    told.settle()
    assert saerad("run", CONFIGS / "phantom.yaml", *SMALL, *ASKED, "--out", tmp_path, "--check")[0] == 0
    code, _, err = saerad("run", CONFIGS / "phantom.yaml", *SMALL, *ASKED, "interpretation.protocol=saerad", "--out", tmp_path, "--check")
    assert code == 2 and "does not answer" in err       # other questions


def test_nothing_is_deleted_by_trying(saerad, tmp_path):
    for name in ("interpretations/interpretations.parquet", "interpretations/ledger.sqlite", "report.html"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    code, _, err = saerad("run", CONFIGS / "phantom.yaml", *SMALL, *ASKED, "--out", tmp_path)
    assert code == 2 and "does not answer" in err and sorted(p.name for p in tmp_path.rglob("*")) == before


def test_the_judges_endpoint_is_looked_at_too(saerad, tmp_path):
    judge = ["steering.judges=[rules, openai]", "steering.endpoint.base_url=http://127.0.0.1:9/v1"]
    code, _, err = saerad("run", CONFIGS / "phantom.yaml", *SMALL, *judge, "--out", tmp_path / "run")
    assert code == 2 and is_one_sentence(err) and "steering.endpoint.base_url" in err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["paper", "corrected"])
def test_gated_configs_fail_with_one_sentence(saerad, tmp_path, name):
    code, _, err = saerad("run", CONFIGS / f"{name}.yaml", "studies.source=mimic-cxr:" + str(tmp_path / "mimic"), "--check")
    assert code == 2 and is_one_sentence(err) and "mimic" in err


@pytest.mark.parametrize("name", ["paper", "corrected"])
def test_gated_configs_name_the_model_where_the_data_is_there(saerad, tmp_path, monkeypatch, name):
    monkeypatch.setattr("saerad.run.checks.hf_hub_download", lambda *a, **k: (_ for _ in ()).throw(OSError("gated")))
    code, _, err = saerad("run", CONFIGS / f"{name}.yaml", "studies.source=phantom:0", *SMALL, "--check")
    assert code == 2 and is_one_sentence(err) and "microsoft/maira-2" in err


def openi(folder, xmls):
    """A tarball like OpenI's from names and texts."""
    with tarfile.open(folder / "reports.tgz", "w:gz") as tar:
        for name, text in xmls.items():
            info = tarfile.TarInfo(f"ecgen-radiology/{name}.xml")
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    return f"openi:{folder / 'reports.tgz'}"


def report(name, findings="The heart is normal in size."):
    return (f'<eCitation><IUXRId id="{name}"/><uId id="CXR{name}"/><MedlineCitation><Article><Abstract>'
            f'<AbstractText Label="FINDINGS">{findings}</AbstractText></Abstract></Article></MedlineCitation></eCitation>')


def test_an_xml_that_does_not_parse_is_named_skipped_and_counted(saerad, tmp_path):
    source = openi(tmp_path, {"1": report(1), "2": "<eCitation><broken", "3": report(3)})
    code, out, _ = saerad("studies", source)
    assert code == 0 and "2.xml" in out


def test_a_corrupt_tarball(saerad, tmp_path):
    (tmp_path / "reports.tgz").write_bytes(b"\x1f\x8b this is not a tarball")
    code, _, err = saerad("studies", f"openi:{tmp_path / 'reports.tgz'}")
    assert code == 2 and is_one_sentence(err) and "reports.tgz" in err


def table(folder, rows):
    """A CSV with one picture a row."""
    header = "study,patient,split,findings,frontal\n"
    (folder / "studies.csv").write_text(header + "".join(",".join(row) + "\n" for row in rows), encoding="utf-8")
    columns = "columns={study: study, patient: patient, split: split, findings: findings, image: frontal}"
    return [f"table:{folder / 'studies.csv'}", f"images={folder}", columns]


def test_pictures_and_reports_that_are_none_are_named(saerad, tmp_path):
    (tmp_path / "words.png").write_text("not a picture", encoding="utf-8")
    Image.new("L", (64, 64), 7).save(tmp_path / "constant.png")
    Image.linear_gradient("L").save(tmp_path / "good.png")
    rows = [("a", "p1", "train", "Clear lungs.", "good.png"), ("b", "p2", "train", "Clear.", "words.png"),
            ("c", "p3", "test", "Clear.", "constant.png"), ("d", "p4", "test", "", "good.png")]
    code, out, err = saerad("studies", *table(tmp_path, rows))
    assert code == 0, err
    for problem in ("not an image: 1 (b)", "constant image: 1 (c)", "empty report: 1 (d)"): assert problem in out


@pytest.mark.parametrize("rows, word", [
    ([("a", "", "train", "Clear.", "")], "patient"),
    ([("a", "p1", "train", "Clear.", ""), ("b", "p1", "test", "Clear.", "")], "p1"),
])
def test_structural_faults_of_a_table(saerad, tmp_path, rows, word):
    code, _, err = saerad("studies", *table(tmp_path, rows))
    assert code == 2 and is_one_sentence(err) and word in err


def test_a_checkpoint_with_a_missing_tensor(saerad, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file
    folder = tmp_path / "mini"
    shutil.copytree(PACKAGE / "assets/mini", folder)
    tensors = load_file(folder / "model.safetensors")
    gone = sorted(k for k in tensors if "layers.3" in k)[0]
    del tensors[gone]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    code, _, err = saerad("extract", CONFIGS / "phantom.yaml", *SMALL, f"subject.model={folder}", "--out", tmp_path / "run")
    assert code == 2 and is_one_sentence(err)
    assert gone.split("layers.3.")[1] in err
    assert not (tmp_path / "run/activations/store.json").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_in_one_sentence(saerad, tmp_path, monkeypatch, number):
    def full(*a, **k): raise OSError(number, "No space left on device", "shard-00000.safetensors")
    monkeypatch.setitem(running.STAGES, "extract", replace(running.STAGES["extract"], do=full))
    code, _, err = saerad("extract", CONFIGS / "phantom.yaml", *SMALL, "--out", tmp_path / "run")
    assert code == 2 and is_one_sentence(err) and "full" in err
    manifest = json.loads((tmp_path / "run/manifest.json").read_text(encoding="utf-8"))
    assert manifest["stages"]["extract"]["finished"] is False


def test_a_disk_that_is_too_small_is_told_before(saerad, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    code, _, err = saerad("run", CONFIGS / "phantom.yaml", *SMALL, "--out", tmp_path / "run")
    assert code == 2 and is_one_sentence(err) and "GB" in err
    assert not (tmp_path / "run").exists()


def test_a_fault_of_ours_is_exit_1_and_keeps_its_traceback(saerad, tmp_path, monkeypatch):
    def broken(*a, **k): raise ZeroDivisionError("by nought")
    monkeypatch.setitem(running.STAGES, "extract", replace(running.STAGES["extract"], do=broken))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    code, _, err = saerad("extract", CONFIGS / "phantom.yaml", *SMALL, "--out", tmp_path / "run")
    assert code == 1 and "by nought" in err and "Traceback" not in err
    assert "Traceback" in (tmp_path / "saerad-fault.txt").read_text(encoding="utf-8")


def test_wrong_usage_is_exit_2(saerad):
    for arguments in (["fly"], ["run"], ["run", CONFIGS / "phantom.yaml", "--outt", "x"], ["run", CONFIGS / "phantom.yaml", "words"]):
        code, _, err = saerad(*arguments)
        assert code == 2 and "Traceback" not in err and err.startswith("saerad: ")


def test_doctor_and_convert_refuse_what_is_no_sae(saerad, tmp_path):
    for arguments in (["doctor", tmp_path], ["convert", tmp_path, tmp_path / "out", "--to", "sae_lens"]):
        code, _, err = saerad(*arguments)
        assert code == 2 and is_one_sentence(err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments, word", [(["--to", "nothing"], "neuronpedia"), ([], "nowhere"), (["--to", "csv"], "nowhere")])
def test_export_refuses_what_is_no_run_or_no_format(saerad, tmp_path, arguments, word):
    code, _, err = saerad("export", tmp_path / "nowhere", tmp_path / "out", *arguments)
    assert code == 2 and is_one_sentence(err) and word in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["--publish"], ["atlas.exemplars=2"], ["--from", "figures"]])
def test_a_run_that_is_served_as_it_is_takes_no_other_edition(saerad, tmp_path, arguments):
    """A folder has no config to build from; whoever asks for a published edition must not be served the private one."""
    code, _, err = saerad("atlas", tmp_path, *arguments, "--serve", "--no-show")
    assert code == 2 and is_one_sentence(err) and "served as it is" in err


def test_bench_names_its_benchmarks(saerad):
    code, out, _ = saerad("bench", "--list")
    assert code == 0 and {"extraction", "store", "sae", "exemplars", "interpretation", "steering", "atlas"} <= set(out.split())
    code, _, err = saerad("bench", "nothing")
    assert code == 2 and "extraction" in err
    code, _, err = saerad("bench", "store", "--device", "cuda")
    assert code == 2 and "--device cuda" in err


def test_user_errors_are_not_faults():
    assert print_error("x.") == 2 and issubclass(UserError, Exception)


def test_an_estimate_needs_neither_data_nor_hub(saerad, tmp_path, monkeypatch):
    code, out, _ = saerad("interpret", CONFIGS / "paper.yaml", "--estimate", "--out", tmp_path / "run")
    assert code == 0 and "16,384 features" in out and "cost about" in out and not (tmp_path / "run").exists()
    code, ours, _ = saerad("interpret", CONFIGS / "paper.yaml", "interpretation.protocol=saerad", "--estimate")
    def number(text): return float(text.split("cost about ")[1].split()[0].replace(",", ""))
    assert code == 0 and number(ours) < number(out) / 2


def test_the_estimate_counts_what_was_chosen_before_there_is_anything(saerad, tmp_path):
    for choice, count in (("all", 1024), ("sample:20", 20), ("top:30 by max", 30), ("level:0", 64), ("level:4", 512), ("[3, 5]", 2)):
        code, out, _ = saerad("interpret", CONFIGS / "phantom.yaml", *ASKED, f"interpretation.features={choice}", "--estimate", "--out", tmp_path)
        assert code == 0 and f" {count:,} features" in out and ("all features counted" in out) == (choice == "all"), out
    code, _, err = saerad("interpret", CONFIGS / "phantom.yaml", *ASKED, "interpretation.features=level:9", "--estimate", "--out", tmp_path)
    assert code == 2 and "levels 0 to 4" in err


def test_an_unknown_protocol_is_named_before_anything_starts(saerad, tmp_path):
    code, _, err = saerad("run", CONFIGS / "phantom.yaml", "interpretation.protocol=papr", "--check", "--out", tmp_path / "run")
    assert code == 2 and "must be one of paper, saerad" in err
