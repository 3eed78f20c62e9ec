"""Model, data, loss and metric that do not fit together are found before training; looking for them changes nothing."""

from __future__ import annotations

import random
import re
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import own
import pytest
import torch
from launcher import called
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


class Auxiliary(own.Line):
    """Has an output beside in training mode, as GoogLeNet has."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return (y, x) if self.training else y  # type: ignore[return-value]


class Normed(own.Line):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(super().forward(x))
        return y


class Beside(own.Line):
    """Has another parameter, of some kind; a line that is frozen, where it is to have none to train."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        if kind == "none":
            self.requires_grad_(False)
        else:
            self.other = nn.Parameter(torch.zeros(1, dtype=getattr(torch, kind)))
            self.linear.requires_grad_(kind != "complex64")


class Untold(own.R2):
    def value(self, sums: Tensor) -> float:
        return sums.sum()  # type: ignore[return-value]


class Nameless(own.R2):
    def values(self, sums: Tensor) -> dict[str, float]:
        return {"other": 1.0}


class Halfway(own.Line):
    """Says its extra state, but takes none."""

    def get_extra_state(self) -> object:
        return threading.Lock()


class Locked(Halfway):
    def set_extra_state(self, state: object) -> None:
        pass


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


class Summed(nn.Module):
    """A sum that does not say so."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - target).abs().sum()


class Uncertain(nn.MSELoss):
    """Would learn its scale."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


class Running(nn.MSELoss):
    """Divides by its running mean."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(()))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        loss = super().forward(output, target)
        self.mean = self.mean.lerp(loss.detach(), 0.1)
        return loss / self.mean


class Frozen(nn.MSELoss):
    """Compares what frozen weights make of both, and has a table that it makes anew for another number of examples."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, 4).requires_grad_(False)
        self.register_buffer("table", None)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        if self.table is None or len(self.table) != len(output):
            self.table = torch.eye(len(output), device=output.device)
        return super().forward(self.table @ self.net(output), self.net(target))


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
        (
            {"--loss": "test_preflight.Uncertain"},
            "loss is Uncertain: its parameter 'scale', which nothing would train, must be one of the model, or frozen",
        ),
        (
            {"--loss": "test_preflight.Running"},
            "loss is Running: its buffer 'mean', which changes from batch to batch, must be one of the model, or in "
            "eval mode",
        ),
        ({"--metric": "Accuracy"}, r"metric is Accuracy: must take outputs of Line .*; give another metric"),
        ({"--metric": "test_preflight.Untold"}, r"metric is .*; TypeError: its 'r2' is \[\] \(float64\): must be .*"),
        ({"--metric": "test_preflight.Nameless"}, r"metric is .*; ValueError: its values lack 'r2', which is its name"),
        (
            {"--model": "test_preflight.Auxiliary"},
            r"loss is MSELoss: must make one number of outputs of Auxiliary \(\[8, 1\] .*\) and targets of Numbers "
            r"\[8, 1\] \(float32\) in training mode; AttributeError: .*",
        ),
        (
            {"--model": "test_preflight.Normed", "--accumulate": "8"},
            r"model is Normed: must take inputs \[1, 1\] \(float32\) in training mode; ValueError: Expected more .*",
        ),
        (
            {"--model": "test_preflight.Beside", "--model.kind": "float64"},
            "model is Beside: all trainable parameters must have one dtype and device, found 'other' torch.float64 on "
            "cpu, 'linear.weight' torch.float32 on cpu",
        ),
        (
            {"--model": "test_preflight.Beside", "--model.kind": "complex64"},
            "model is Beside: trainable parameters must be floating point, 'other' is torch.complex64",
        ),
        (
            {"--model": "test_preflight.Beside", "--model.kind": "none"},
            "model is Beside: the model has no trainable parameter",
        ),
        (
            {"--model": "test_preflight.Halfway"},
            "model is Halfway: Halfway must have set_extra_state beside get_extra_state, or neither",
        ),
        (
            {"--model": "test_preflight.Locked"},
            "model is Locked: _extra_state is of type _thread.lock, which a checkpoint could not give back: must be .*",
        ),
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
    """Draws from every stream and keeps count in a buffer, in whatever mode it is; in training, of its teacher, too."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10))
        self.layers[1].eval()
        self.register_buffer("seen", torch.zeros(()))
        self.teacher, self.taught = nn.Parameter(torch.zeros(()), requires_grad=False), 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        if self.training:
            self.teacher += 1
            self.taught += 1
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
    model(torch.zeros(2, 1, 8, 8))  # which the streams, the buffer and the teacher show
    assert (model.seen, model.teacher, model.taught) == (2, 1, 1) and streams() != states


def test_it_is_one_line_and_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own.plain_process(monkeypatch)
    words = {**WORDS, "--model": "test_preflight.Beside", "--model.kind": "float64", "--run.dir": str(tmp_path / "a")}
    status, _, errors = called(capsys, "train", "--backend=single", *(f"{key}={value}" for key, value in words.items()))
    assert status == 2 and errors.startswith("hpc-grawa train: error: model is Beside: all trainable parameters must")
    assert errors.count("\n") == 1 and not list(tmp_path.glob("a/*"))


def test_frozen_weights_that_a_loss_draws_are_those_of_the_seed() -> None:
    def drawn(seed: int) -> Tensor:
        torch.rand(1)
        words = {**WORDS, "--loss": "test_preflight.Frozen", "--run.seed": seed}
        config = parse([f"{key}={value}" for key, value in words.items()])
        config.check(2)
        simulate(2, lambda comm: Worker(config, comm).step())
        return config.loss.net.weight  # type: ignore[no-any-return, union-attr]

    one, again, other = drawn(1), drawn(1), drawn(2)
    assert torch.equal(one, again) and not torch.equal(one, other)


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["--loss.reduction=sum", "--accumulate=2"], "accumulate is 2"),
        (["--loss=test_preflight.Summed", "--optimizer.accumulate=4"], "optimizer.accumulate is 4"),
        (["--loss=test_preflight.Summed", "--optimizer=LPFSGD"], "optimizer.parts is 8"),
    ],
)
def test_a_loss_that_is_a_sum_is_not_cut(words: list[str], key: str) -> None:
    """The gradient of a batch is the mean of its parts', which of a sum is a part of its own."""
    start = [f"{name}={value}" for name, value in WORDS.items() if name != "--optimizer.lr"]
    name = "MSELoss" if "--loss.reduction=sum" in words else "Summed"
    with pytest.raises(ConfigError) as error:
        simulate(2, lambda comm: Worker(parse([*start, *words]), comm))
    assert str(error.value) == f"{key}: must be 1, or {name} a mean: it adds up over a batch's examples"
    for others in (words[:1], words[1:]):  # whole, and a mean
        simulate(2, lambda comm, others=others: Worker(parse([*start, *others]), comm))  # type: ignore[misc]
