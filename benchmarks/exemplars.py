"""Tokens a second of collecting exemplars. The peer, delphi, is not measured yet: its ratios are null."""
import tempfile
from pathlib import Path

from _bench import report, seconds

from saerad.exemplars import ExemplarsConfig, collect_exemplars
from saerad.extraction import ExtractionConfig, extract
from saerad.sae import MatryoshkaSAE, SAEConfig
from saerad.studies import StudiesConfig, open_source
from saerad.subjects import random_mini
from saerad.training import TrainingConfig, train_sae


def measure(quick):
    patients = 30 if quick else 200
    source = open_source(StudiesConfig(source="phantom:0", train_patients=patients, validation_patients=patients // 4, test_patients=patients // 4))
    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp)
        store = extract(source, random_mini(0), ExtractionConfig(layer=2), folder / "activations")
        train_sae(store, SAEConfig(expansion=2, k=16), TrainingConfig(steps=50, batch_size=512), 0, folder / "sae")
        sae = MatryoshkaSAE.load(folder / "sae")
        taken = seconds(lambda: collect_exemplars(store, sae, ExemplarsConfig(), 0, folder / "exemplars"), 1)
        disk = sum(f.stat().st_size for f in (folder / "exemplars").iterdir()) / 1e6
    return (f"{len(store)} tokens, {sae.width} features; tokens a second, MB", {"delphi_time": len(store) / taken, "delphi_disk": disk}, {},
            {"delphi_time": None, "delphi_disk": None})


report("exemplars", measure)
