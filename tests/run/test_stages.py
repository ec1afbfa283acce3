"""Configs, keys, skipping and resuming: a real, tiny run."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml
from hub_server import HubServer
from nursery import nursery, ranks

from saerad.core import UserError, read_table
from saerad.interpretation.endpoint import Ledger, all_answered
from saerad.interpretation.interpret import replay_note
from saerad.run import stages as running
from saerad.run.checks import check, check_hookpoints
from saerad.run.cli import main
from saerad.run.config import Config, changed, load_config, validated, with_settings
from saerad.run.stages import is_finished, locked, plan, run_config
from saerad.run.summary import SUMMARY
from saerad.sae.training import train_sae
from saerad.show.atlas import NOTICES
from saerad.show.run_folder import Run

TINY = """
studies: {source: "phantom:0", train_patients: 20, validation_patients: 5, test_patients: 5}
subject: {model: mini}
extraction: {layer: 2, rows_per_shard: 512, more_layers: [0], more_image_tokens: "sample:8"}
sae: {expansion: 1, k: 8}
training: {steps: 40, batch_size: 128, checkpoint_every: 10, lr: null}      # at a higher rate feature 0 dies
evaluation: {loss_studies: 4, report_studies: 2, max_new_tokens: 12}
interpretation: {features: "sample:40"}
steering: {features: [0], alphas: [-10, 10], studies: 2, controls: 0, max_new_tokens: 12}
concept_sets: {size: 2, hookpoint: 0, steps: 4, test_studies: 2, absent: 1, least: 3}
"""
# Files whose bytes must not depend on whether the run was killed on the way.
SAME = ("activations/tokens.parquet", "activations/store.json", "sae/sae.safetensors", "sae/metrics.jsonl", "sae/evaluation.json",
        "exemplars/exemplars.parquet", "interpretations/interpretations.parquet", "steering/judgements.parquet", "report.html")


@pytest.fixture(scope="module")
def config():
    return validated(yaml.safe_load(TINY), "tiny.yaml")


@pytest.fixture(scope="module")
def done(config, tmp_path_factory):
    """A finished tiny run: its folder and its summary."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    return out, run_config(config, out)


# ---------------------------------------------------------------- configs

@pytest.mark.parametrize("text, words", [
    ("sae: {expantion: 4}", ["sae.expantion", "sae.expansion"]),
    ("steerin: {}", ["steerin", "steering"]),
    ("sae: {layer: 4}", ["sae.layer", "extraction.layer"]),
    ("sae: {k: many}", ["sae.k", "many"]),
    ("sae: {k: 0}", ["sae.k", "0"]),
    ("training: {lr: fast}", ["training.lr", "fast", "auto"]),
    ("sae: [1, 2]", ["sae"]),
    ("just words", ["bad.yaml"]),
    ("sae: {k: 1", ["bad.yaml", "line"]),
])
def test_bad_configs_are_named_in_one_sentence(tmp_path, text, words):
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as told: load_config(path)
    assert all(word in str(told.value) for word in words)
    assert "\n" not in str(told.value)


def test_a_missing_config_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere.yaml"): load_config(tmp_path / "nowhere.yaml")


def test_settings_lie_over_the_file(tmp_path):
    path = tmp_path / "night.yaml"
    path.write_text("sae: {k: 8, expansion: 2}\nseed: 3", encoding="utf-8")
    config = load_config(path, ["sae.k=16", "steering.alphas=[-5, 5]", "training.lr=1e-3"])
    assert (config.sae.k, config.sae.expansion, config.seed, config.training.lr) == (16, 2, 3, 1e-3)
    assert list(config.steering.alphas) == [-5, 5]
    assert config.out == "runs/night"


def test_an_empty_file_is_a_config(tmp_path):
    (tmp_path / "empty.yaml").write_text("", encoding="utf-8")
    assert load_config(tmp_path / "empty.yaml").sae == Config().sae


@pytest.mark.parametrize("setting", ["sae.k", "sae.k.deep=1", "sae.expantion=4", "seed.x=1", "=3"])
def test_bad_settings_are_errors(setting):
    with pytest.raises(UserError): changed(Config(), [setting])


def test_settings_do_not_change_what_they_lie_over():
    values = {"sae": {"k": 8}}
    with_settings(values, ["sae.k=9"])
    assert values == {"sae": {"k": 8}}


@pytest.mark.parametrize("name", ["phantom", "openi", "paper", "corrected"])
def test_the_configs_that_come_with_saerad_are_valid(name):
    assert load_config(Path(__file__).parents[2] / "configs" / f"{name}.yaml").out == f"runs/{name}"


def test_paper_and_corrected_differ_in_the_group_order_alone():
    paper, corrected = (load_config(Path(__file__).parents[2] / "configs" / f"{n}.yaml", ["out=x"]) for n in ("paper", "corrected"))
    assert paper != corrected
    assert changed(paper, ["sae.group_order=ascending"]) == corrected


# ---------------------------------------------------------------- keys

@pytest.mark.parametrize("setting, again", [
    ("steering.alphas=[-5, 5]", ["steer", "figures", "atlas"]),
    ("evaluation.batch_size=3", ["evaluate", "steer", "figures", "atlas"]),
    ("exemplars.window=3", ["exemplars", "interpret", "steer", "figures", "atlas"]),
    ("sae.k=7", ["train", "evaluate", "exemplars", "interpret", "steer", "portray", "figures", "atlas"]),
    ("training.lr=null", ["train", "evaluate", "exemplars", "interpret", "steer", "portray", "figures", "atlas"]),
    ("portraits.tokens=3", ["portray", "atlas"]),
    ("out=elsewhere", []),
])
def test_a_change_redoes_what_depends_on_it(setting, again):
    before, after = (plan(c, "studies", "model") for c in (Config(), changed(Config(), [setting])))
    assert [name for name in before if before[name] != after[name]] == again


def test_seed_studies_and_model_redo_everything():
    base = plan(Config(), "studies", "model")
    for other in (plan(changed(Config(), ["seed=1"]), "studies", "model"), plan(Config(), "more", "model"), plan(Config(), "studies", "another")):
        assert not set(base.values()) & set(other.values())


def test_a_trained_subject_is_a_stage_of_its_own():
    config = changed(Config(), ["subject.model=trained"])
    assert list(plan(config, "studies", ""))[0] == "subject"
    longer = plan(changed(config, ["subject.decoder.epochs=9"]), "studies", "")
    assert not set(longer.values()) & set(plan(config, "studies", "").values())


def with_code(monkeypatch, part, digest="edited"):
    """As if a part of saerad were another one: every stage in which it works sees other code."""
    true = running.code_of
    monkeypatch.setattr(running, "code_of", lambda stage: {**true(stage), part: digest} if part in true(stage) else true(stage))


def test_the_code_counts(monkeypatch):
    base = plan(Config(), "studies", "model")
    with_code(monkeypatch, "steering.steer")
    edited = plan(Config(), "studies", "model")
    assert [name for name in base if base[name] != edited[name]] == ["steer", "figures", "atlas"]


# ---------------------------------------------------------------- a run

def test_a_run_leaves_what_the_plan_says(done):
    out, summary = done
    for name in ("config.yaml", "manifest.json", "summary.json", "report.html", "activations/store.json", "activations/tokens.parquet",
                 "sae/sae.safetensors", "sae/config.json", "sae/training.json", "sae/metrics.jsonl", "sae/evaluation.json",
                 "exemplars/features.parquet", "exemplars/exemplars.parquet", "interpretations/interpretations.parquet",
                 "steering/generations.parquet", "steering/judgements.parquet",
                 "steering/concepts.parquet", "sae/more/layer-00/sae.safetensors", "atlas/index.html"):
        assert (out / name).stat().st_size, name
    assert list((out / "figures").glob("*.svg")) and list((out / "figures").glob("*.csv"))
    assert not list(out.rglob("*.part"))
    assert set(summary) == {"studies", "sae", "interpretation", "steering", "truth", "seconds"}
    assert {k: set(v) for k, v in summary.items() if k != "seconds"} == {k: set(v) for k, v in SUMMARY.items()}
    assert all(seconds is not None for seconds in summary["seconds"].values())
    assert summary["sae"]["lr"] == json.loads((out / "sae/training.json").read_text(encoding="utf-8"))["lr"] > 0
    shares = [summary["steering"][name] for name in ("unchanged", "on_target_only", "mixed", "off_target_only", "degenerate")]
    assert sum(shares) == pytest.approx(1)
    steer, judged = summary["steering"], read_table(out / "steering/judgements.parquet").to_pandas()
    assert set(judged["image"]) == {"shown"} and steer["baselines"] == 2 and steer["unreadable_baselines"] in (0, 1, 2)
    share, low, high = steer["on_target"]["strict"]
    assert share == pytest.approx(steer["on_target_only"], abs=1e-4) and low <= share <= high
    assert set(steer["on_target"]) == {"reports", "strict", "paper", "clinical", "towards"} == set(steer["random"]["on_target"])
    shares = read_table(out / "steering/shares.parquet").to_pandas()
    zero = shares[(shares.method == "none") & (shares.feature == -1) & (shares.stated == "any")].set_index(["image", "what"])
    assert set(zero.alpha) == {0} and (zero.share.xs("unchanged", level="what") == 1).all() and len(zero.share.xs("unreadable", level="what")) == 1
    assert 0 <= summary["steering"]["concept_sets"]["on_target_only"] <= 1 and summary["steering"]["concept_sets"]["studies"] == 2
    said = summary["interpretation"]
    assert said["refusals"] == 0 and said["scored"] + sum(said["unscored"].values()) == said["features"]


def test_a_run_is_exported_for_delphi(done, tmp_path, capsys):
    out, _ = done
    command = ["export", str(out), str(tmp_path / "cache"), "--hookpoint", "layers.2", "--splits", "4"]
    for code, word in ((0, str(tmp_path / "cache/layers.2")), (2, "is not empty")):
        with pytest.raises(SystemExit) as ended: main(command)
        said = capsys.readouterr()
        assert ended.value.code == code and word in (said.err if code else said.out)
    files = sorted((tmp_path / "cache/layers.2").glob("*.safetensors"))
    assert files and sum(len(safetensors.torch.load_file(f)["activations"]) for f in files) > 0


def test_the_config_in_the_run_is_the_config(done, config):
    out, _ = done
    again = validated(yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8")), "config.yaml")
    assert again == config


def test_the_manifest_says_how_it_was_made(done, config):
    stages = json.loads((done[0] / "manifest.json").read_text(encoding="utf-8"))["stages"]
    keys = plan(config, Run(done[0], config).source.hash(), running.model_hash(config))
    assert {name: entry["key"] for name, entry in stages.items()} == keys
    assert all(e["finished"] and e["seed"] == 0 and e["versions"]["torch"] and e["files"] for e in stages.values())
    assert stages["train"]["inputs"] == {"extract": keys["extract"]}


HASHES = """
from saerad.run.config import Config, changed
from saerad.run.stages import model_hash
for settings in (["one/a"], ["two/b"], ["one/a"], ["two/b", "subject.revision=" + 40 * "a"]):
    print(model_hash(changed(Config(), ["subject.model=" + settings[0], *settings[1:]])))
"""


def test_two_models_of_one_shape_on_the_hub_are_two_models(tmp_path):
    with HubServer() as hub:
        for name in ("one/a", "two/b"): hub.repositories[name] = {"config.json": b'{"hidden_size": 64, "num_hidden_layers": 2}'}
        env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0",
                            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        done = subprocess.run([sys.executable, "-c", HASHES], env=env, capture_output=True, text=True, timeout=300)
    first, second, again, pinned = done.stdout.split()
    assert first == again and len({first, second, pinned}) == 3, done.stderr


def test_what_is_finished_is_skipped(done, config):
    out, _ = done
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p.name not in ("summary.json", ".lock")}
    lines = []
    run_config(config, out, say=lines.append)
    assert all("finished before" in line for line in lines)
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_a_lost_file_is_made_again(done, config):
    out, _ = done
    (out / "exemplars/features.parquet").unlink()
    key = json.loads((out / "manifest.json").read_text(encoding="utf-8"))["stages"]["exemplars"]["key"]
    assert not is_finished(Run(out, config), running.STAGES["exemplars"], key)
    lines = []
    run_config(config, out, last="exemplars", say=lines.append)
    assert [line.split()[0] for line in lines if "before" not in line] == ["exemplars"]


def test_from_does_a_stage_and_all_later_ones_again(done, config):
    lines = []
    run_config(config, done[0], first="figures", say=lines.append)
    assert [line.split()[0] for line in lines if "before" not in line] == ["figures", "atlas"]


def test_editing_a_protocol_or_its_prompt_interprets_again(done, config, tmp_path):
    out, own, prompt = tmp_path / "run", tmp_path / "mine.yaml", tmp_path / "mine-1.txt"
    shutil.copytree(done[0], out)
    prompt.write_text("Explain.", encoding="utf-8")
    def write(active): own.write_text(f"explain_prompt: mine-1\ndetect_prompt: detect-paper-1\nscore_active: {active}\n", encoding="utf-8")
    def again():
        lines = []
        run_config(changed(config, [f"interpretation.protocol={own}"]), out, last="interpret", say=lines.append)
        return [line.split()[0] for line in lines if "before" not in line]
    write(30)
    assert again() == ["interpret"]
    assert again() == []
    write(20)
    assert again() == ["interpret"]
    prompt.write_text("Explain briefly.", encoding="utf-8")
    assert again() == ["interpret"]
    prompt.touch()
    assert again() == []


def test_editing_a_file_that_a_setting_names_changes_the_key(tmp_path):
    protocol, prompt, table = tmp_path / "mine.yaml", tmp_path / "mine-1.txt", tmp_path / "released.csv"
    prompt.write_text("Explain.", encoding="utf-8")
    protocol.write_text("explain_prompt: mine-1\ndetect_prompt: detect-paper-1\n", encoding="utf-8")
    table.write_text("feature,label\n0,wires\n", encoding="utf-8")
    config = changed(Config(), [f"interpretation.protocol={protocol}", f"interpretation.descriptions={table}"])
    for path, more in ((protocol, "active: 5\n"), (prompt, " Briefly."), (table, "1,tubes\n")):
        before = plan(config, "studies", "model")
        assert plan(config, "studies", "model") == before
        path.write_text(path.read_text(encoding="utf-8") + more, encoding="utf-8")
        after = plan(config, "studies", "model")
        assert [name for name in before if before[name] != after[name]] == ["interpret", "steer", "figures", "atlas"]
    table.unlink()
    with pytest.raises(UserError, match="released.csv does not exist"): plan(config, "studies", "model")


def test_a_folder_that_held_another_run_changes_nothing(done, config, tmp_path):
    again, fresh = tmp_path / "again", tmp_path / "fresh"
    shutil.copytree(done[0], again)
    other = changed(config, ["sae.k=5", "training.steps=30"])
    summaries = [run_config(other, out, last="evaluate", say=lambda line: None) for out in (again, fresh)]
    assert summaries[0] | {"seconds": 0} == summaries[1] | {"seconds": 0}  # of the stages that were not done again nothing is left over
    assert (again / "sae/evaluation.json").read_bytes() == (fresh / "sae/evaluation.json").read_bytes()
    assert not (again / "interpretations/interpretations.parquet").exists()


def done_again(config, out, last="atlas", **how):
    """The stages that a run did, and everything else that it said."""
    lines = []
    run_config(config, out, last=last, say=lines.append, **how)
    return [line.split()[0] for line in lines if line.endswith(" s")], [line for line in lines if "finished before" not in line and line[-2:] != " s"]


@pytest.fixture
def copied(done, tmp_path):
    """A finished run in a folder of its own."""
    shutil.copytree(done[0], tmp_path / "run")
    return tmp_path / "run"


def bytes_of(out): return {name: (out / name).read_bytes() for name in SAME}


def test_other_code_is_told_and_a_stage_can_be_kept(copied, config, monkeypatch):
    """Where only code has changed the run says which; with --keep the stage and all behind it stay, until the code changes again."""
    before = bytes_of(copied)
    with_code(monkeypatch, "activations.store")
    users = [stage for stage in plan(config, "", "") if "activations.store" in running.code_of(stage)]
    line = next(line for line in running.news(Run(copied, config), running.wanted_inputs(Run(copied, config))))
    assert line.startswith("extract") and "(activations.store)" in line and "--keep extract" in line
    assert done_again(config, copied, keep=users) == ([], [])
    kept = json.loads((copied / "manifest.json").read_text(encoding="utf-8"))["stages"]["extract"]["kept"]
    assert kept["despite"] == ["activations.store"] and kept["code"]["activations.store"] == "edited"
    assert done_again(config, copied) == ([], []) and bytes_of(copied) == before      # what was decided holds
    with_code(monkeypatch, "activations.store", "edited again")
    assert "extract" in running.news(Run(copied, config), running.wanted_inputs(Run(copied, config)))[0]


def test_a_stage_whose_settings_changed_too_is_not_kept(copied, config, monkeypatch):
    with_code(monkeypatch, "activations.store")
    for setting in ("extraction.rows_per_shard=256", "seed=3"):
        with pytest.raises(UserError, match="--keep extract keeps nothing: its settings"):
            run_config(changed(config, [setting]), copied, keep=["extract"])
    with pytest.raises(UserError, match="--keep steer keeps nothing: its settings, or the stages that"): run_config(config, copied, keep=["steer"])
    with pytest.raises(UserError, match="leave one of them away"): run_config(config, copied, first="train", keep=["train"])
    with pytest.raises(UserError, match="--keep steer is not a stage of this command"): run_config(config, copied, last="train", keep=["steer"])


def test_nothing_finished_is_removed_before_its_successor_stands(copied, config, monkeypatch):
    """A stage that fails leaves the old result set aside; the old code finds it again, and --keep does too."""
    before, other = bytes_of(copied), changed(config, ["sae.k=5"])
    def broken(run): raise OSError("the power went")
    with monkeypatch.context() as m:
        m.setitem(running.STAGES, "train", replace(running.STAGES["train"], do=broken))
        with pytest.raises(OSError, match="power"): run_config(other, copied)
        assert not (copied / "sae/sae.safetensors").exists() and not (copied / "report.html").exists()
        assert next(copied.glob(".before/train-*/sae/sae.safetensors")).read_bytes() == before["sae/sae.safetensors"]
    assert done_again(config, copied)[0] == [] and bytes_of(copied) == before      # the settings of before: everything is put back
    with monkeypatch.context() as m:
        with_code(m, "sae.training")
        m.setitem(running.STAGES, "train", replace(running.STAGES["train"], do=broken))
        with pytest.raises(OSError, match="power"): run_config(config, copied)
        users = [stage for stage in plan(config, "", "") if "sae.training" in running.code_of(stage)]
        assert done_again(config, copied, keep=users)[0] == [] and bytes_of(copied) == before
        assert not (copied / ".before").exists()


def test_what_has_a_successor_goes(copied, config):
    again, said = done_again(changed(config, ["portraits.tokens=3"]), copied, last="portray")
    assert again == ["portray"] and [p.name[:5] for p in copied.glob(".before/*")] == ["atlas"]       # the atlas has none yet
    assert len(said) == 1 and said[0].startswith("portray") and "settings" in said[0]
    assert done_again(config, copied, last="portray")[0] == ["portray"]
    assert done_again(config, copied) == ([], []) and not (copied / ".before").exists()


ASKING = ["interpretation.interpreter=openai", "interpretation.base_url=http://127.0.0.1:9/v1"]


def test_answers_to_other_questions_need_the_server(copied, config):
    """The ledger has all answers of this interpreter, but with another SAE, or in other settings of steering, other questions would be asked."""
    asking = changed(config, [*ASKING, "steering.judges=[parser, openai]", "steering.endpoint.base_url=http://127.0.0.1:9/v1"])
    def look(config): check(run := Run(copied, config), replaced=running.stages_replaced(run, running.wanted_inputs(run)))
    for name, note in (("interpretations", replay_note(asking.interpretation)), ("steering", all_answered(asking.steering.endpoint, "verdicts"))):
        ledger = Ledger(copied / name / "ledger.sqlite")
        ledger.note(note, "all")
        ledger.settle()
    before, entries = bytes_of(copied), (copied / "manifest.json").read_bytes()
    for another, words in ((["sae.k=5"], "interpretation.base_url"), (["steering.alphas=[5]"], "steering.endpoint.base_url")):
        with pytest.raises(UserError, match=f"{words} .* does not answer"): run_config(changed(asking, another), copied)
    check(Run(copied, changed(asking, ["interpretation.protocol=saerad"])), stages=["figures", "atlas"])       # those ask nobody
    assert bytes_of(copied) == before and (copied / "manifest.json").read_bytes() == entries
    with pytest.raises(UserError, match="does not answer"): look(changed(asking, ["interpretation.protocol=saerad"]))
    look(changed(config, ASKING))


def test_a_column_that_no_table_has_is_named_before_anything_is_moved(copied, config):
    before = bytes_of(copied)
    wrong = changed(config, ["interpretation.features=top:5 by f1"])
    with pytest.raises(UserError, match="features.parquet has no numbers f1"): run_config(wrong, copied)
    assert bytes_of(copied) == before


def test_what_was_forced_is_not_put_back(copied, config):
    """Who does training again does not want the evaluation of before, although its key is the same."""
    assert done_again(config, copied, last="train", first="train")[0] == ["train"]
    assert not (copied / "sae/evaluation.json").exists() and list(copied.glob(".before/evaluate-*/entry.json"))
    assert "evaluate" in done_again(config, copied, last="evaluate")[0]


def test_a_ledger_that_has_grown_is_not_put_back(copied, config):
    stage, key = running.STAGES["steer"], plan_of(config, copied)["steer"]
    (copied / "steering/ledger.sqlite").write_bytes(b"answers")
    run = Run(copied, config)
    run.manifest["stages"]["steer"]["files"] = running.files_of(run, stage)
    running.set_aside(run, stage)
    (copied / "steering/ledger.sqlite").write_bytes(b"answers and more")
    running.put_back(run, stage, key)
    assert (copied / "steering/ledger.sqlite").read_bytes() == b"answers and more" and is_finished(Run(copied, config), stage, key)


def plan_of(config, out): return plan(config, Run(out, config).source.hash(), running.model_hash(config))


def test_room_for_two_stores_is_asked_for(copied, config, monkeypatch):
    free = sum(f.stat().st_size for f in (copied / "activations").iterdir()) // 100
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": free})())
    run_config(config, copied, last="extract")
    with pytest.raises(UserError, match="the older one stays until then.*--keep extract"): run_config(config, copied, last="extract", first="extract")
    assert (copied / "activations/store.json").exists()


def test_training_without_a_store_of_its_rows(config, tmp_path):
    online = changed(config, ["training.online=true", "training.online_bytes=2000000", "training.start_rows=600", "extraction.train_studies=6"])
    summary = run_config(online, tmp_path / "online", last="evaluate")
    assert 6 < summary["studies"]["studies"] < 30 and summary["sae"]["fvu"] < 1
    assert isinstance(running.training_rows(Run(tmp_path / "online", online)), running.Online)
    with pytest.raises(UserError, match="training.online"): check(Run(tmp_path / "none", changed(online, ["extraction.reports=generated"])))


COMMAND = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/.."]
import left_threads
import torch._dynamo        # each fork would: optimizers ask for it
from saerad.run.cli import main
"""
FORKED = """
from saerad.run.stages import STAGES, code_of
for stage in STAGES: code_of(stage)        # each fork would
def do(*arguments): main(list(arguments))
"""
PLAIN = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "TQDM_DISABLE": "1",
                      "OMP_NUM_THREADS": str(torch.get_num_threads())}    # as here: the last bits depend on it


@pytest.fixture(scope="module")
def forks():
    """`saerad` as often as is wanted, each in a process of its own."""
    with nursery(COMMAND + FORKED, str(Path(__file__).parent), env=PLAIN) as forks: yield forks


def test_several_ranks_share_one_command(forks, tmp_path):
    """`saerad train` on two ranks leaves the store of one process and its dictionary but for rounding; the command once more does nothing."""
    (tmp_path / "tiny.yaml").write_text(TINY, encoding="utf-8")
    (tmp_path / "command.py").write_text(COMMAND + "main(sys.argv[2:])", encoding="utf-8")
    def command(out): return ["train", str(tmp_path / "tiny.yaml"), "extraction.studies_per_part=8", "--out", str(tmp_path / out)]
    forks.start(*command("one"))
    assert forks.end() == [0]
    together = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "command.py"), str(Path(__file__).parent)]
    ended = subprocess.run([sys.executable, *together, *command("two")], env=PLAIN, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-2000:]
    forks.start(*command("two"), out=tmp_path / "again", environments=ranks(2))
    assert forks.end() == [0, 0]
    files = [p.relative_to(tmp_path / "one/activations").as_posix() for p in sorted((tmp_path / "one/activations").rglob("*"))
             if p.is_file() and p.suffix != ".lock"]
    assert sum(n.startswith("shard") for n in files) >= 4
    for name in files: assert (tmp_path / "two/activations" / name).read_bytes() == (tmp_path / "one/activations" / name).read_bytes(), name
    again = (tmp_path / "again").read_text(encoding="utf-8").splitlines()
    assert [line.split() for line in again[:2]] == [["extract", "finished", "before"], ["train", "finished", "before"]]
    one, two = (safetensors.torch.load_file(tmp_path / out / "sae/sae.safetensors")["W_dec"] for out in ("one", "two"))
    assert torch.cosine_similarity(one, two).min() > 0.99     # another engine rounds elsewhere


def test_two_processes_do_not_write_one_run(done, config):
    with locked(done[0]), pytest.raises(UserError, match="another saerad process"): run_config(config, done[0])


def test_a_run_can_wait_for_another_process(done, config, tmp_path):
    """Another process holds the folder until a file is there; what it has done in the meantime is seen."""
    shutil.copytree(done[0], tmp_path / "run")
    hold = "import sys, time\nfrom pathlib import Path\nfrom saerad.run.stages import locked\nfolder = Path(sys.argv[1])\n" \
           "with locked(folder):\n    (folder / 'held').touch()\n    while not (folder / 'enough').exists(): time.sleep(.01)\n" \
           "    (folder / 'sae/sae.safetensors').unlink()"
    other = subprocess.Popen([sys.executable, "-c", hold, tmp_path / "run"])
    while not (tmp_path / "run/held").exists(): time.sleep(.01)
    said = []
    waiting = threading.Thread(target=run_config, args=(config, tmp_path / "run"), kwargs={"last": "train", "say": said.append, "wait": True})
    waiting.start()
    waiting.join(timeout=1)
    assert waiting.is_alive() and not said
    (tmp_path / "run/enough").touch()
    waiting.join()
    assert other.wait() == 0 and (tmp_path / "run/sae/sae.safetensors").exists() and any(line.startswith("extract    finished") for line in said)


@pytest.mark.timeout(900)
def test_a_run_that_was_killed_twice_ends_with_the_same_bytes(forks, done, config, tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY, encoding="utf-8")
    out = tmp_path / "run"
    command = ["run", str(tmp_path / "tiny.yaml"), "--out", str(out)]
    for when in ("activations/shard-00001.safetensors", "sae/checkpoint/state.safetensors"):
        [child], until = forks.start(*command), time.monotonic() + 300
        while not (out / when).exists() and time.monotonic() < until: time.sleep(.005)
        os.kill(child, signal.SIGKILL)
        assert forks.end() == [-signal.SIGKILL], "the run ended before it could be killed"
        assert not (out / "report.html").exists()
    plain = PLAIN | {"LC_ALL": "C", "PYTHONUTF8": "0"}     # where text is not UTF-8 unless it is said
    script = "import sys; from saerad.run.cli import main; main(sys.argv[1:])"
    ended = subprocess.run([sys.executable, "-c", script, *command], env=plain, capture_output=True, timeout=600)
    assert ended.returncode == 0, ended.stderr[-2000:]
    for name in SAME: assert (out / name).read_bytes() == (done[0] / name).read_bytes(), name


def test_the_published_atlas_of_a_run_holds_none_of_its_texts(config, done, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(done[0], folder)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json") | {"out": str(folder)}), encoding="utf-8")
    def atlas(*flags):
        with pytest.raises(SystemExit) as ended: main(["atlas", str(tmp_path / "config.yaml"), *flags])
        assert ended.value.code == 0
        scripts = "".join(p.read_text(encoding="utf-8") for p in (folder / "atlas").rglob("*.js"))
        return scripts, (folder / "atlas/index.html").read_text(encoding="utf-8")
    whole, page = atlas()
    assert '"tokens":' in whole and NOTICES[True] not in page
    published, page = atlas("--publish")
    assert NOTICES[True] in page and '"published":true' in published.replace(" ", "") and not (folder / "atlas/views").exists()


# ---------------------------------------------------------------- further hookpoints

@pytest.mark.parametrize("settings, words", [
    (["extraction.more_layers=[]"], "concept_sets.hookpoint is 0"),
    (["concept_sets.hookpoint=null"], "set extraction.image_tokens"),
    (["extraction.more_image_tokens=null"], "set extraction.more_image_tokens")])
def test_sets_need_a_hookpoint_with_image_tokens(config, settings, words):
    with pytest.raises(UserError, match=re.escape(words)): check_hookpoints(changed(config, settings))
    check_hookpoints(config)
    check_hookpoints(changed(config, [*settings, "concept_sets.size=0"]))


def test_the_sae_of_another_hookpoint_is_that_of_its_own_store(done, config):
    run = Run(done[0], config)
    sae, store = run.sae_at(0), run.store_at(0)
    assert run.sae_at(2) is run.sae and run.store_at(2) is run.store and store.meta["made_from"]["layer"] == 0
    assert not torch.equal(sae.W_dec, run.sae.W_dec) and (store.tokens["section"].to_numpy() == "image").sum() > len(store.tokens["study"].unique())
    training = config.training.model_copy(update={"steps": config.concept_sets.steps})
    with tempfile.TemporaryDirectory() as folder: again = train_sae(store, config.sae, training, config.seed, folder)
    assert torch.equal(again.W_dec, sae.W_dec)
