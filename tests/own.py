"""One class of a user's own for each section of a configuration, named there by import path: ``own.Line``."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn, optim

from hpc_grawa.data import Data, Splits, TensorExamples
from hpc_grawa.errors import ConfigError
from hpc_grawa.launch import _VARIABLES, own_slot
from hpc_grawa.methods import Method, Run
from hpc_grawa.methods.base import Probe
from hpc_grawa.metrics import Metric
from hpc_grawa.optim import LocalOptimizer
from hpc_grawa.schedules import RunFacts, Schedule
from hpc_grawa.vector import ParameterVector

ALL = {
    "method": "own.Alone",
    "optimizer": "own.Plain",
    "schedule": "own.Alternating",
    "model": "own.Line",
    "data": "own.Numbers",
    "loss": "own.Cubic",
    "metric": "own.R2",
}


def plain_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the program find one process on one thread, whatever started the tests."""
    for _, names in _VARIABLES:
        for name in names:
            monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("SLURM_NTASKS", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@contextmanager
def files_limited(size: int) -> Iterator[None]:
    """Within the block no file grows beyond so many bytes: what a full disk does, to large files."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def contents(run: Path) -> dict[str, bytes]:
    """Every file of a run's folder but the lock, which whoever looks in takes over from the dead."""
    files = [p for p in run.rglob("*") if p.is_file() and p.name != "lock.json"]
    return {str(p.relative_to(run)): p.read_bytes() for p in files}


@dataclass(kw_only=True)
class Alone(Method):
    """Every rank by itself."""

    patience: int = 3

    def _assemble(self, run: Run, probe: Probe | None) -> None:
        pass


class LGRAWA(Alone):
    """Bears the name of another, but has none of its settings."""


@dataclass(kw_only=True)
class Plain(LocalOptimizer):
    lr: float = 0.05
    note: str | None = "not null"

    def build(self, vector: ParameterVector, facts: RunFacts) -> optim.Optimizer:
        return optim.SGD(vector.parameters, self.lr)


class Mode(Enum):
    FAST = 1


class Marking(Plain):
    """Its optimizer keeps an enum, which a checkpoint could not give back."""

    def build(self, vector: ParameterVector, facts: RunFacts) -> optim.Optimizer:
        made = optim.SGD(vector.parameters, self.lr)
        made.param_groups[0]["mode"] = Mode.FAST
        return made


@dataclass
class NumpyCosine(Schedule):
    """Gives numbers of NumPy's."""

    def factor(self, facts: RunFacts) -> float:
        return 0.5 * (1 + np.cos(np.pi * facts.progress))  # type: ignore[no-any-return]


@dataclass
class Alternating(Schedule):
    low: float = 0.5

    def factor(self, facts: RunFacts) -> float:
        return self.low if facts.step % 2 else 1.0


class Line(nn.Module):
    """y = ax + b."""

    def __init__(self, slope: float = 0.0) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)
        nn.init.constant_(self.linear.weight, slope)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y


class Random(nn.Module):
    """A classifier of small images that draws from every stream of random numbers at each step."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 10))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x * (1 + 0.1 * random.random()) + 0.1 * float(np.random.rand())
        y: Tensor = self.layers(x)
        return y


class Remembering(nn.Module):
    """A classifier of small images whose buffers belong to its weights, or grow with its steps."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.spectral_norm
        self.layers = nn.Sequential(nn.Flatten(), norm(nn.Linear(64, 16)), nn.BatchNorm1d(16), nn.ReLU())
        self.head = norm(nn.Linear(16, 10))
        self.register_buffer("mean", torch.zeros(64, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("table", torch.zeros(1))
        self.register_buffer("last", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.lerp_(x.detach().double().flatten(1).mean(0), 0.1)
            self.seen += len(x)
            self.table = torch.cat((self.table, x.detach().mean()[None]))
            self.last = x.detach().mean()
        y: Tensor = self.head(self.layers(x - self.mean.view_as(x[0]).float())) + 1e-3 * self.table.mean()
        return y


class Counting(nn.Module):
    """A classifier of small images that keeps its steps as extra state, and has them in its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.steps = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps += self.training
        y: Tensor = self.layers(x) * (1 + 0.01 * self.steps)
        return y

    def get_extra_state(self) -> dict[str, Any]:
        return {"steps": self.steps, "as tensors": [torch.tensor(self.steps)]}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


class Telling(Line):
    """Leaves word of its rank's environment."""

    def __init__(self) -> None:
        super().__init__()
        name = f"environment.{os.environ['PMIX_RANK']}"
        Path(name).write_text(json.dumps(dict(os.environ)))


class Slow(Line):
    """Takes 50 ms."""

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.05)
        return super().forward(x)


class Failing(Line):
    """Raises on one rank of mpirun or srun (`rank` -1: on all) after n passes of training: in training or evaluation.

    What it counts in evaluations and probes is forgotten with them.
    """

    def __init__(self, rank: int = 1, calls: int = 5, evaluation: bool = False) -> None:
        super().__init__()
        self.rank, self.calls, self.evaluation = rank, calls, evaluation

    def forward(self, x: Tensor) -> Tensor:
        due = self.calls <= 0 and self.training is not self.evaluation
        self.calls -= self.training
        rank = os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ.get("PMIX_RANK", "0")
        if due and self.rank in (-1, int(rank)):
            raise ZeroDivisionError("this model has failed on purpose")
        return super().forward(x)


class Hanging(Failing):
    """Stands still where `Failing` raises."""

    def forward(self, x: Tensor) -> Tensor:
        try:
            return super().forward(x)
        except ZeroDivisionError:
            time.sleep(1000)
            raise


FAULTS = {
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "exits": lambda: sys.exit(0),
    "closes": lambda: throw(GeneratorExit()),
}


def throw(error: BaseException) -> None:
    raise error


class Lost(Line):
    """Is lost on a rank (the last) in a step or in the first evaluation, before which it is tried out by one pass."""

    def __init__(self, fault: str = "stopped", evaluation: bool = False, calls: int = 5, rank: int = -1) -> None:
        super().__init__()
        self.fault, self.evaluation, self.calls, self.evaluations, self.rank = fault, evaluation, calls, -1, rank

    def forward(self, x: Tensor) -> Tensor:
        slot = own_slot()
        self.calls -= self.training
        self.evaluations += not self.training
        if slot.rank == self.rank % slot.size and (self.evaluations > 0 if self.evaluation else self.calls < 0):
            FAULTS[self.fault]()
        return super().forward(x)


@dataclass(kw_only=True)
class Numbers(Data):
    """y = 2x + 1 and noise."""

    batch_size: int = 8
    examples: int = 64
    tests: int = 21
    noise: float = 0.1

    def size(self) -> int:
        return self.examples

    def load(self) -> Splits:
        generator = torch.Generator().manual_seed(0)

        def table(count: int) -> TensorExamples:
            x = torch.rand(count, 1, generator=generator)
            return TensorExamples(x, 2 * x + 1 + self.noise * torch.randn(count, 1, generator=generator))

        return Splits(table(self.train_size()), table(self.validation) if self.validation else None, table(self.tests))


class LateExamples(TensorExamples):
    """Each batch takes 20 ms."""

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        time.sleep(0.02)
        return super().batch(index, generator)


@dataclass(kw_only=True)
class LateNumbers(Numbers):
    """Takes long to load."""

    def load(self) -> Splits:
        found = super().load()
        assert isinstance(found.train, TensorExamples)
        return Splits(LateExamples(found.train.inputs, found.train.targets), found.validation, found.test)


@dataclass(kw_only=True)
class BrokenNumbers(Numbers):
    """Cannot be read on rank 1 of mpirun."""

    def load(self) -> Splits:
        if os.environ.get("OMPI_COMM_WORLD_RANK") == "1":
            raise OSError("these data have failed on purpose")
        return super().load()


@dataclass(kw_only=True)
class LostNumbers(Numbers):
    """Loses its last rank while it loads."""

    fault: str = "stopped"

    def load(self) -> Splits:
        slot = own_slot()
        if slot.rank == slot.size - 1:
            FAULTS[self.fault]()
        return super().load()


@dataclass(kw_only=True)
class ElsewhereMissing(Numbers):
    """Lies on the host of rank 0 only."""

    def size(self) -> int:
        if os.environ.get("OMPI_COMM_WORLD_RANK") == "1":
            raise ConfigError("data.path is /there: must be a folder")
        return super().size()


class Cubic(nn.Module):
    """Mean |y - ŷ|³."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return self.scale * (output - target).abs().pow(3).mean()


class R2(Metric):
    """The share of the targets' variance that the outputs explain: 1 - Σ(y - ŷ)² / Σ(y - ȳ)²."""

    name = "r2"

    def sums(self, output: Tensor, target: Tensor) -> Tensor:
        y, error = target.double(), (target - output).double()
        return torch.stack((y.new_tensor(y.numel()), y.sum(), y.square().sum(), error.square().sum()))

    def value(self, sums: Tensor) -> float:
        count, total, squares, errors = sums.tolist()
        return 1 - errors / (squares - total**2 / count)


def network() -> nn.Sequential:
    """With BatchNorm of images and of vectors, and dropout."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(27, 8),
        nn.BatchNorm1d(8),
        nn.Linear(8, 4),
    ).double()
