"""What a model keeps in attributes: neither a probe nor an evaluation leaves a trace in it."""

from __future__ import annotations

import random
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hpc_grawa import ParameterVector
from hpc_grawa.averaging.probe import probe_gradient
from hpc_grawa.batchnorm import recalibrate
from hpc_grawa.comm import Communicator, simulate
from hpc_grawa.data import TensorExamples
from hpc_grawa.metrics import Accuracy
from hpc_grawa.training.evaluate import Evaluator


class Busy(nn.Module):
    """Draws from generators of its own, and keeps what it has seen in whatever a module may have."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.drawn: dict[str, Any] = {
            "torch": torch.Generator(),
            "numpy": np.random.default_rng(0),
            "old": np.random.RandomState(0),
        }
        self.python = random.Random(0)
        self.mean, self.array, self.calls = torch.zeros(3), np.zeros(2), 0
        self.losses: list[Any] = [torch.zeros(1)]
        self.cache: dict[int, list[float]] = {0: []}
        self.seen: set[float] = set()
        self.last: deque[float] = deque(maxlen=2)
        self.fixed = torch.ones(1).expand(4)

    def forward(self, x: Tensor) -> Tensor:
        noise = float(torch.rand(1, generator=self.drawn["torch"])) + self.python.random()
        noise += self.drawn["numpy"].random() + self.drawn["old"].rand()
        self.mean.mul_(0.9).add_(x.mean(0))
        self.array += noise
        self.calls += 1
        self.losses[0] += noise
        self.losses.append(x.square().mean())
        self.cache[0].append(noise)
        self.cache[self.calls] = [noise]
        self.seen.add(noise)
        self.last.append(noise)
        output: Tensor = self.norm(self.linear(x + noise))
        return output

    @property
    def state(self) -> str:
        drawn = self.drawn["torch"].get_state().tolist(), self.drawn["numpy"].bit_generator.state
        old, python = self.drawn["old"].get_state()[1].tolist(), self.python.getstate()
        kept = (self.mean.tolist(), self.array.tolist(), self.calls, self.losses, self.cache, self.seen, self.last)
        return repr((drawn, old, python, kept))


@pytest.mark.parametrize("what", ["probe", "recalibration", "evaluation"])
def test_attributes_and_what_is_in_them_are_as_they_were(what: str) -> None:
    x, model = torch.randn(6, 3), Busy()
    model(x).mean().backward()
    vector = ParameterVector(model)

    def do(comm: Communicator) -> None:
        if what == "probe":
            probe_gradient(vector, lambda: model(x).square().mean())
        elif what == "recalibration":
            recalibrate(model, [x, x], comm)
        else:
            examples = TensorExamples(x, torch.zeros(6, dtype=torch.int64))
            Evaluator(nn.CrossEntropyLoss(), Accuracy(), batch_size=2).evaluate(model, examples, comm)

    before = model.state
    simulate(1, do)
    assert model.state == before
    model(x)
    assert model.state != before
