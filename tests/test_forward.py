"""Forward passes beside those of training leave nothing behind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hpc_grawa.forward import eval_mode, undisturbed


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2))


def test_eval_mode_and_kept_buffers_are_undone_even_after_an_error() -> None:
    model = network()
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyError), undisturbed(model), eval_mode(model):
        assert not any(m.training for m in model.modules())
        model[1].running_mean.fill_(3)
        raise KeyError
    assert [m.training for m in model] == [True, False] + [True] * 2
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
