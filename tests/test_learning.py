"""Every method of the table trains for real: handwritten digits, four ranks, at equal numbers of steps."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from table import METHODS, is_, plain
from torch import Tensor, nn

from hpc_grawa import LocalSGD, Method, ParameterVector, simulate
from hpc_grawa.comm import Communicator
from hpc_grawa.data import Digits
from hpc_grawa.evaluate import recalibrate
from hpc_grawa.models import SmallCNN
from hpc_grawa.schedules import RunFacts

WORLD, BATCH = 4, 32


@cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and classes to train on, and to test on."""
    data = Digits().load()
    x, y, x_test, y_test = (t for part in (data.train, data.test) for t in part.batch(torch.arange(len(part))))
    return x, y, x_test, y_test


def learn(method: Method, steps: int, lr: float, by_class: bool) -> tuple[float, float]:
    """Accuracy of the center, and the best of a rank before the last round, on test images of all classes."""
    x, y, x_test, y_test = digits()
    order = torch.argsort(y, stable=True) if by_class else torch.randperm(len(y), generator=torch.manual_seed(1))
    shards = order.chunk(WORLD)

    def body(comm: Communicator) -> tuple[float, float]:
        torch.manual_seed(0)
        model = SmallCNN()
        vector = ParameterVector(model)
        optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, nesterov=True)
        draw = torch.Generator().manual_seed(comm.rank)
        shard = shards[comm.rank]

        def some(of: Tensor) -> Tensor:
            return of[torch.randint(len(of), (BATCH,), generator=draw)]

        def loss(of: Tensor) -> Tensor:
            batch = some(of)
            return nn.functional.cross_entropy(model(x[batch]), y[batch])

        def accuracy(parameters: Tensor) -> float:
            with vector.swapped(parameters):
                recalibrate(model, [x[some(order)] for _ in range(8)], comm)
                model.eval()
                right = (model(x_test).argmax(1) == y_test).float().mean().item()
                model.train()
            return right

        facts = RunFacts(total_steps=steps, steps_per_epoch=len(y) // (WORLD * BATCH))
        run = method.build(comm, vector, optimizer, probe=lambda: loss(order), facts=facts)
        closure = run.closure(lambda: loss(shard))
        for _ in range(steps - 1):
            run.after_step(optimizer.step(closure))
        alone = max(comm.gather_bytes(str(accuracy(run.local)).encode()), key=float)
        run.after_step(optimizer.step(closure))
        run.finish()
        return accuracy(run.center), float(alone)

    found: list[tuple[float, float]] = simulate(WORLD, body)
    assert all(center == found[0] for center in found)
    return found[0]


@cache
def alone() -> float:
    """The best rank, where each has seen its own classes only."""
    return learn(LocalSGD(period=math.inf), 60, 0.05, by_class=True)[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in plain("averages") if not is_(name, "leader")])
def test_the_center_of_ranks_that_have_seen_other_classes_beats_each_of_them(name: str) -> None:
    """All but a leader's, which is one rank's model: losses of different data say nothing of models."""
    center, _ = learn(METHODS[name].ours, 60, 0.05, by_class=True)
    assert alone() < 0.4
    assert center > alone() + 0.2


@pytest.mark.slow
@pytest.mark.parametrize("name", plain())
def test_every_method_learns(name: str) -> None:
    center, _ = learn(METHODS[name].ours, 120, 0.05, by_class=False)
    assert center >= 0.95
