"""The handle on a run: what it reads, what it answers where nothing was written, and what it shares with a base."""
import pytest
import yaml

from saerad.activations.extraction import ExtractionConfig, folder_of
from saerad.activations.store import Store
from saerad.core import UserError, write_json
from saerad.run.config import Config
from saerad.sae.model import MatryoshkaSAE
from saerad.show.invented import invent_run
from saerad.show.run_folder import Run, as_run
from saerad.studies.record import StudiesConfig

SMALL = {"source": "phantom:0", "train_patients": 3, "validation_patients": 1, "test_patients": 1}


def configured(folder, **sections):
    "A folder with nothing but a `config.yaml`."
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(sections), encoding="utf-8")
    return Run(folder)


def test_absent_files_are_none_and_no_error(tmp_path):
    run = Run(tmp_path / "nothing")
    assert run.table("steering/judgements.parquet") is None and run.json("summary.json") is None and run.json("sae/metrics.jsonl") is None
    assert not run.has("config.yaml") and run.settings == {} and run.manifest == {"stages": {}}
    assert not run.folder.exists(), "looking at a run writes nothing"


def test_tables_come_whole_or_by_column_and_logs_as_lines(tmp_path):
    run = Run(invent_run(tmp_path))
    assert run.has("exemplars/features.parquet") and not run.has("exemplars"), "a folder is no file"
    assert list(run.table("exemplars/features.parquet", ["feature", "level"])) == ["feature", "level"]
    log = run.json("sae/metrics.jsonl")
    assert [line["step"] for line in log] == list(range(0, 2000, 50)) and run.json("summary.json")["sae"]["k"] == 32
    (tmp_path / "log.jsonl").write_text('{"a": 1}\n\n{"a": 2}\n', encoding="utf-8")
    assert run.json("log.jsonl") == [{"a": 1}, {"a": 2}] and run / "log.jsonl" == tmp_path / "log.jsonl"


def test_a_damaged_table_is_an_error_that_names_it(tmp_path):
    (tmp_path / "broken.parquet").write_text("no table", encoding="utf-8")
    with pytest.raises(UserError, match="broken.parquet"): Run(tmp_path).table("broken.parquet")


def test_settings_come_from_the_config_in_hand_or_else_from_the_file(tmp_path):
    read = configured(tmp_path, studies=SMALL, seed=3)
    assert read.settings == {"studies": SMALL, "seed": 3}
    given = Run(tmp_path, Config(seed=7))
    assert given.settings["seed"] == 7 and given.settings["sae"] == Config().sae.model_dump(mode="json")
    (tmp_path / "config.yaml").write_text("", encoding="utf-8")
    assert Run(tmp_path).settings == {}


def test_a_section_is_validated_and_leaves_out_keys_that_are_not_its_own(tmp_path):
    run = configured(tmp_path, studies=SMALL | {"added_by_a_later_version": 1})
    assert run.section("studies", StudiesConfig) == StudiesConfig(**SMALL)
    assert run.section("extraction", ExtractionConfig) == ExtractionConfig(), "a section that is not there is its defaults"
    with pytest.raises(ValueError): configured(tmp_path, studies={"train_patients": "many"}).section("studies", StudiesConfig)


def test_the_manifest_is_read_once(tmp_path):
    write_json(tmp_path / "manifest.json", {"stages": {"train": {"seconds": 2.0}}})
    run = Run(tmp_path)
    assert run.manifest["stages"]["train"] == {"seconds": 2.0}
    (tmp_path / "manifest.json").unlink()
    assert run.manifest["stages"]["train"] and Run(tmp_path).manifest == {"stages": {}}


def test_studies_are_opened_once_and_shared_with_what_stands_on_them(tmp_path):
    base = configured(tmp_path, studies=SMALL)
    assert len({s.patient for s in base.source}) == 5 and base.source is base.source
    assert Run(tmp_path / "variants/wide", base=base).source is base.source


def test_a_trained_subject_is_opened_from_the_runs_own_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("saerad.show.run_folder.open_subject", lambda cfg: cfg.model)
    assert configured(tmp_path / "own", subject={"model": "trained"}).subject == str(tmp_path / "own/subject")
    base = configured(tmp_path / "mini", subject={"model": "mini"})
    assert base.subject == "mini" and Run(tmp_path / "variant", base=base).subject == "mini"


def test_a_variant_shares_the_store_of_its_base_and_reads_another_layer_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(Store, "open", staticmethod(lambda folder: [folder]))      # a list, for which every opening is another one
    recorded = ExtractionConfig(layer=4, more_layers=(2,))
    base = configured(tmp_path, extraction=recorded.model_dump(mode="json"))
    same, other = (configured(tmp_path / f"variants/{layer}", extraction={"layer": layer}) for layer in (4, 2))
    same.base = other.base = base
    assert base.store == [tmp_path / "activations"] and same.store is base.store
    assert other.store == [folder_of(tmp_path / "activations", recorded, 2)] != base.store


def test_the_sae_is_the_runs_own_whatever_it_stands_on(tmp_path):
    base, variant = Run(tmp_path / "base"), Run(tmp_path / "variant", base=Run(tmp_path / "base"))
    for run, width in ((base, 4), (variant, 6)):
        sae = MatryoshkaSAE(4, [width], 2)
        sae.threshold.fill_(0.1)
        sae.save(run / "sae")
    assert (base.sae.width, variant.sae.width) == (4, 6)
    with pytest.raises(UserError): _ = Run(tmp_path / "none").sae


def test_a_run_is_given_as_such_or_as_its_folder(tmp_path):
    run = Run(tmp_path)
    assert as_run(run) is run and as_run(str(tmp_path)).folder == tmp_path
