"""Optimizers of users' own: what their state holds, and which parameters they train."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import Ranks
from own import plain_process
from test_distributed_optimizer import flat, gradient, linear
from torch import Tensor, nn, optim
from torch.distributed.optim import ZeroRedundancyOptimizer

from hpc_grawa import DataParallel, DistributedOptimizer, LocalSGD, ParameterVector, simulate
from hpc_grawa.cli.parsing import parse
from hpc_grawa.comm import Communicator
from hpc_grawa.comm.single import SingleCommunicator
from hpc_grawa.errors import ConfigError
from hpc_grawa.optim import SGD
from hpc_grawa.schedules import RunFacts
from hpc_grawa.training.worker import Worker


class Keeping(optim.SGD):
    """SGD that keeps a state of its own beside its momentum."""

    def __init__(self, parameters: Any, key: str, value: Tensor) -> None:
        super().__init__(parameters, 0.01, momentum=0.9)
        self._own = key, value

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            self.state[p].setdefault(self._own[0], self._own[1].expand(p.shape).clone())


@pytest.mark.parametrize(("key", "dtype"), [("codes", torch.uint8), ("mask", torch.bool), ("seen", torch.int64)])
def test_a_state_of_codes_is_not_averaged(on_ranks: Ranks, key: str, dtype: torch.dtype) -> None:
    def body(comm: Communicator, momentum: Any) -> None:
        model = linear()
        optimizer = Keeping(model.parameters(), key, torch.ones((), dtype=dtype))
        run = LocalSGD(period=2, local_momentum=momentum).build(comm, ParameterVector(model), optimizer)
        for step in range(2):
            gradient(model, comm.rank, step)
            optimizer.step()
            run.after_step()

    on_ranks(lambda comm: body(comm, "keep"))
    match = f"method.local_momentum is average: the optimizer's state '{key}' is of {dtype}.*must be keep or reset"
    with pytest.raises(ConfigError, match=match):
        simulate(2, lambda comm: body(comm, "average"))


def test_a_state_in_half_precision_is_averaged(on_ranks: Ranks) -> None:
    def body(comm: Communicator) -> Tensor:
        model = linear()
        value = torch.tensor(float(comm.rank), dtype=torch.bfloat16)
        optimizer = Keeping(model.parameters(), "mean", value)
        run = LocalSGD(period=1, local_momentum="average").build(comm, ParameterVector(model), optimizer)
        gradient(model, comm.rank, 0)
        optimizer.step()
        run.after_step()
        return optimizer.state[model.weight]["mean"]

    for mean in on_ranks(body):
        assert (mean == (on_ranks.size - 1) / 2).all() and mean.dtype == torch.bfloat16


class ScheduleFreeSGD(optim.Optimizer):
    """z ← z - η g(y), x ← x + (z - x)/t, y = .1 z + .9 x; the parameters are y in train mode and x in eval mode.

    Source: Defazio et al., The Road Less Scheduled, NeurIPS 2024, equations 1-3.
    """

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})
        self.states = [(p, p.detach().clone(), p.detach().clone()) for p in self.param_groups[0]["params"]]
        self.t = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.t += 1
        for p, z, x in self.states:
            z -= self.param_groups[0]["lr"] * p.grad
            x.lerp_(z, 1 / self.t)
        self.train()

    @torch.no_grad()
    def train(self) -> None:
        for p, z, x in self.states:
            p.copy_(0.1 * z + 0.9 * x)

    @torch.no_grad()
    def eval(self) -> None:
        for p, _, x in self.states:
            p.copy_(x)


def test_a_schedule_free_optimizer_shares_gradients(on_ranks: Ranks) -> None:
    """In eval mode every rank has the weights of one process that sees all batches."""

    def body(comm: Communicator) -> Tensor:
        model = linear()
        optimizer = DistributedOptimizer(ScheduleFreeSGD(model.parameters(), 0.02), model, DataParallel(), comm=comm)
        for step in range(5):
            optimizer.zero_grad()
            gradient(model, comm.rank, step)
            optimizer.step()
        optimizer.eval()
        return flat(model)

    model = linear()
    optimizer = ScheduleFreeSGD(model.parameters(), 0.02)
    for step in range(5):
        optimizer.zero_grad()
        for rank in range(on_ranks.size):
            gradient(model, rank, step)
        for p in model.parameters():
            assert p.grad is not None
            p.grad /= on_ranks.size
        optimizer.step()
    optimizer.eval()
    for ours in on_ranks(body):
        torch.testing.assert_close(ours, flat(model), rtol=1e-12, atol=1e-12)


def test_a_schedule_free_optimizer_is_refused_where_parameters_are_averaged() -> None:
    model = linear()
    optimizer = ScheduleFreeSGD(model.parameters(), 0.1)
    with pytest.raises(ConfigError, match=r"ScheduleFreeSGD, whose train\(\) and eval\(\) .*DataParallel\(\)"):
        LocalSGD().build(SingleCommunicator(), ParameterVector(model), optimizer)


class Part(SGD):
    def build(self, vector: ParameterVector, facts: RunFacts) -> optim.Optimizer:
        return optim.SGD(vector.parameters[1:], self.lr)


@pytest.mark.parametrize(
    ("optimizer", "error"),
    [
        ("Part", "the optimizer does not step parameter '.*weight' of the model"),
    ],
)
def test_what_the_training_program_cannot_use(monkeypatch: pytest.MonkeyPatch, optimizer: str, error: str) -> None:
    plain_process(monkeypatch)
    config = parse(["--config=digits", f"--optimizer={__name__}.{optimizer}", "--method=DataParallel"])
    with pytest.raises(ConfigError, match=error):
        Worker(config, SingleCommunicator())


def test_wrappers_of_pytorch_are_refused() -> None:
    model = linear()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        for whole in (wrapped, nn.Sequential(wrapped)):
            with pytest.raises(ConfigError, match=r"wrapped in PyTorch's DistributedDataParallel.*model\.module"):
                DistributedOptimizer(optim.SGD(whole.parameters(), 0.1), whole, LocalSGD(), comm=SingleCommunicator())
        zero = ZeroRedundancyOptimizer(model.parameters(), optim.SGD, lr=0.1)
        with pytest.raises(ConfigError, match=r"ZeroRedundancyOptimizer, which makes .* the same at every step"):
            DistributedOptimizer(zero, model, LocalSGD(), comm=SingleCommunicator())
        DistributedOptimizer(zero, model, DataParallel(), comm=SingleCommunicator())
    finally:
        dist.destroy_process_group()
