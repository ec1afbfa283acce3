"""House-keeping: the rank correlation against SciPy's, and where there is none."""
import math

import numpy as np
import pytest
from scipy.stats import spearmanr

from saerad import core
from saerad.core import spearman


@pytest.mark.parametrize("seed", range(5))
def test_the_rank_correlation_is_scipys_with_ties(seed):
    a, b = np.random.default_rng(seed).integers(0, 6, (2, 30))
    assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)


def test_pairs_without_a_value_are_left_out():
    assert spearman([1, 2, 3, math.nan], [10, 20, 15, 0]) == pytest.approx(spearmanr([1, 2, 3], [10, 20, 15]).statistic)


@pytest.mark.parametrize("sides", [([], []), ([1, 2], [2, 1]), ([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [4, 4, 4]), ([1, 2, math.nan], [1, 2, 3])])
def test_few_or_constant_values_rank_nothing(sides): assert math.isnan(spearman(*sides))


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
