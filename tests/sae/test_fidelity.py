"""Extraction from MAIRA-2: the stored vectors are those of a plain computation of the network, on a checkpoint in the published layout."""
import numpy as np
import pytest
import torch
from test_subject import maira, old_checkpoint, plain_maira2, study, weights_of  # noqa: F401

from saerad.activations.extraction import ExtractionConfig, extract, hooked_rows
from saerad.studies.record import Source
from saerad.subjects.subject import Subject

REPORTS = ("The heart is large.", "No effusion.", "No effusion. The heart is large. No effusion. The heart is large.")


def lens(w: dict, x: torch.Tensor) -> torch.Tensor:
    """A residual vector through the last norm and the head, so that it can be compared with `plain_maira2` cut off at its layer."""
    normed = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w["language_model.model.norm.weight"]
    return normed @ w["language_model.lm_head.weight"].T


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_every_hookpoint_equals_the_plain_computation(maira: Subject, old_checkpoint, layer: int) -> None:  # noqa: F811
    """In a batch with prompts of other lengths and other numbers of images, to 1e-4; every prefix of the prompt gives its own last token."""
    w = weights_of(old_checkpoint)
    shown = [study(5, prior=True, lateral=True), study(6), study(7, lateral=True)]
    prompts = [maira.prompt(s, r) for s, r in zip(shown, REPORTS, strict=True)]
    rows = hooked_rows(maira, prompts, [layer], [np.ones(len(p), dtype=bool) for p in prompts])[layer].split([len(p) for p in prompts])
    for prompt, own in zip(prompts, rows, strict=True):
        last_image = int(np.flatnonzero(prompt.section == "image")[-1])
        for end in {last_image + 1, last_image + 7, len(prompt)}:
            wanted = plain_maira2(w, prompt.ids[:end], prompt.pixels, n_layers=layer + 1)
            assert wanted.abs().max() > 1
            torch.testing.assert_close(lens(w, own[end - 1]), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("fault", ["positions not stretched", "images in another order"])
def test_the_comparison_notices_what_goes_wrong(maira: Subject, old_checkpoint, fault: str) -> None:  # noqa: F811
    w, prompt = weights_of(old_checkpoint), maira.prompt(study(5, prior=True, lateral=True), REPORTS[0])
    own = hooked_rows(maira, [prompt], [2], [np.ones(len(prompt), dtype=bool)])[2]
    wrong = {"factor": 1.0} if fault.startswith("positions") else {}
    pixels = prompt.pixels if fault.startswith("positions") else prompt.pixels[[1, 0, 2]]
    assert (lens(w, own[-1]) - plain_maira2(w, prompt.ids, pixels, **wrong)).abs().max() > 1e-2


def test_the_store_holds_the_same(maira: Subject, old_checkpoint, tmp_path) -> None:  # noqa: F811
    """From the study to the row on disk and back: the last kept token of each study."""
    w, shown = weights_of(old_checkpoint), [study(i, prior=i == 1, lateral=i == 2) for i in range(4)]
    store = extract(Source("made up", shown), maira, ExtractionConfig(layer=1, batch_size=2), tmp_path)
    assert not store.meta["problems"] and len(store.study_rows()) == len({s.study for s in shown})
    position = store.tokens["position"].to_numpy()
    for s in shown:
        prompt, row = maira.prompt(s, s.sections["findings"]), store.study_rows()[s.study][-1]
        wanted = plain_maira2(w, prompt.ids[:position[row] + 1], prompt.pixels, n_layers=2)
        torch.testing.assert_close(lens(w, store.read(np.array([row]))[0]), wanted, rtol=0, atol=1e-4)
