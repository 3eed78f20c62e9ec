"""Model, data, loss and metric that do not fit together are found before training; looking for them changes nothing."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

import numpy as np
import own
import pytest
import torch
from torch import Tensor, nn

from hpc_grawa import simulate
from hpc_grawa.cli.parsing import parse
from hpc_grawa.data import Splits
from hpc_grawa.errors import ConfigError
from hpc_grawa.training.preflight import try_out
from hpc_grawa.training.worker import Worker

WORDS = {
    "--model": "own.Line",
    "--data": "own.Numbers",
    "--loss": "MSELoss",
    "--metric": "own.R2",
    "--optimizer.lr": "0.05",
    "--budget.steps": "4",
}


class Flat(own.Line):
    """Outputs `[B]`, which torch would compare with each of the targets `[B, 1]`."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).squeeze(1)


class Talkative(own.Line):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x), x  # type: ignore[return-value]


class Narrow(own.Line):
    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == 3, "three columns, please"
        return super().forward(x)


class Unfinished(own.R2):
    def value(self, sums: Tensor) -> float:
        raise NotImplementedError


@dataclass(kw_only=True)
class Boastful(own.Numbers):
    """Has fewer examples than it says."""

    def load(self) -> Splits:
        splits = super().load()
        splits.train.inputs = splits.train.inputs[:40]  # type: ignore[attr-defined]
        return splits


class Undivided(nn.MSELoss):
    """Its sums lack what they divide by."""

    def sums(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().sum()


@dataclass(kw_only=True)
class Unsplit(own.Numbers):
    """Holds no examples out."""

    def load(self) -> Splits:
        splits = super().load()
        return Splits(splits.train, None, splits.test)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"--model": "test_preflight.Narrow"},
            r"model is Narrow: must take inputs \[8, 1\] \(float32\); AssertionError: three columns, please.* "
            r"\(test_preflight.py, line \d+\)",
        ),
        (
            {"--model": "test_preflight.Flat"},
            r"loss is MSELoss: must make one number of outputs of Flat \[8\] \(float32\) and targets of Numbers "
            r"\[8, 1\] \(float32\); UserWarning: Using a target size .*",
        ),
        (
            {"--model": "test_preflight.Talkative"},
            r"loss is MSELoss: must make one number of outputs of Talkative \(\[8, 1\] .*\) and .*; AttributeError: .*",
        ),
        ({"--loss.reduction": "none"}, r"loss is MSELoss: must make one number .*; ValueError: it made \[8, 1\] .*"),
        ({"--loss": "test_preflight.Undivided"}, r"loss is Undivided: .*; ValueError: its sums are \[\] .*, not \[2\]"),
        ({"--metric": "Accuracy"}, r"metric is Accuracy: must take outputs of Line .*; give another metric"),
        (
            {"--metric": "test_preflight.Unfinished"},
            r"metric is Unfinished: .*; NotImplementedError \(test_preflight.py, line \d+\)",
        ),
        (
            {"--data": "test_preflight.Boastful"},
            "data is Boastful: must load as many examples as it says it has, 64 to train on and 0 for validation; "
            "found 40 and 0",
        ),
        (
            {"--data": "test_preflight.Unsplit", "--data.validation": "5"},
            "data is Unsplit: .* says it has, 59 to train on and 5 for validation; found 59 and 0",
        ),
    ],
)
def test_what_does_not_fit_is_named_with_the_shapes_and_the_place(changes: dict[str, str], message: str) -> None:
    config = parse([f"{key}={value}" for key, value in {**WORDS, **changes}.items()])
    config.check(2)
    with pytest.raises(ConfigError) as error:
        simulate(2, lambda comm: Worker(config, comm))
    assert re.fullmatch(message, str(error.value)), error.value


class Shaky(nn.Module):
    """Draws from every stream and keeps count in a buffer, in whatever mode it is."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10))
        self.layers[1].eval()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        noise: Tensor = torch.randn(10) + random.random() + np.random.rand()
        return self.layers(x) + noise


def test_nothing_of_it_remains() -> None:
    config = parse(["--config=digits", "--model=test_preflight.Shaky"])
    model, splits = config.build_model(), config.data.load()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    assert len(set(modes)) == 2

    def streams() -> tuple[object, ...]:
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[union-attr]

    states = streams()
    try_out(config, model, splits)
    assert streams() == states
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    model(torch.zeros(2, 1, 8, 8))  # which the streams and the buffer show
    assert model.seen == 2 and streams() != states
