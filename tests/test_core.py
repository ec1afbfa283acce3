"""House-keeping: the rank correlation against SciPy's, and where there is none; who may read what is written."""
import math
import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.stats import spearmanr

from saerad import core
from saerad.core import spearman, write_beside


@pytest.mark.parametrize("seed", range(5))
def test_the_rank_correlation_is_scipys_with_ties(seed):
    a, b = np.random.default_rng(seed).integers(0, 6, (2, 30))
    assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)


def test_pairs_without_a_value_are_left_out():
    assert spearman([1, 2, 3, math.nan], [10, 20, 15, 0]) == pytest.approx(spearmanr([1, 2, 3], [10, 20, 15]).statistic)


@pytest.mark.parametrize("sides", [([], []), ([1, 2], [2, 1]), ([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [4, 4, 4]), ([1, 2, math.nan], [1, 2, 3])])
def test_few_or_constant_values_rank_nothing(sides): assert math.isnan(spearman(*sides))


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660), (0o077, 0o600)])
def test_who_may_read_new_files_may_read_what_a_library_writes(umask, mode, monkeypatch, tmp_path):
    """Left to itself, safetensors writes for the owner alone."""
    monkeypatch.setattr(core, "_UMASK", umask)
    with write_beside(tmp_path / "x.safetensors") as part: save_file({"x": torch.zeros(1)}, part)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == mode


def test_asking_for_the_umask_leaves_it_as_it_was():
    now = os.umask(0o022)
    os.umask(now)
    assert now == core._UMASK


@pytest.mark.parametrize(("cards", "processes", "backend"), [(0, 2, "gloo"), (1, 1, "cpu:gloo,cuda:nccl"), (4, 4, "cpu:gloo,cuda:nccl"),
                                                             (1, 2, "gloo")])
def test_processes_that_share_a_card_do_not_meet_on_it(cards, processes, backend, monkeypatch):
    """NCCL refuses two processes on one card, or waits for ever."""
    joined = []
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr(core.torch.cuda, "device_count", lambda: cards)
    monkeypatch.setattr(core.torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(core.dist, "init_process_group", lambda backend, timeout: joined.append(backend))
    monkeypatch.setattr(core.atexit, "register", lambda work: None)
    core.join_processes()
    assert joined == [backend]
