"""Models that are completed by their first forward pass train as those that were complete when they were built."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import own
import pytest
import torch
from conftest import Ranks
from torch import Tensor, nn

from hpc_grawa import LocalSGD, ParameterVector, cli, lazy, simulate
from hpc_grawa.cli.parsing import parse
from hpc_grawa.comm import Communicator
from hpc_grawa.data import Splits, TensorExamples
from hpc_grawa.errors import ConfigError
from hpc_grawa.training.loop import fit
from hpc_grawa.training.worker import Worker


class Lazy(nn.Module):
    """Without shapes before its first pass; or, to compare, with them."""

    def __init__(self, lazy: bool = True, spare: bool = False) -> None:
        super().__init__()
        if lazy:
            self.net = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.Tanh(), nn.LazyLinear(1))
        else:
            self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
        self.spare = nn.LazyLinear(1) if spare else None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y


class Table(nn.Module):
    """Has a table that is made anew when a longer input comes, and a count that is made in the first pass."""

    def __init__(self, length: int = 1, persistent: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)
        self.register_buffer("table", torch.linspace(1, length, length), persistent=persistent)
        self.table: Tensor

    def forward(self, x: Tensor) -> Tensor:
        length = int((x != 0).sum(1).max())  # of the longest; the others are padded
        if len(self.table) < length:
            self.table = torch.linspace(1, length, length)
        y: Tensor = self.linear((x[:, :length] * self.table[:length]).mean(1, keepdim=True))
        return y


@dataclass(kw_only=True)
class Six(own.Numbers):
    """Six numbers, of which the first is wanted; those of example i end after `shortest` + i/16 ones."""

    shortest: int = 6

    def load(self) -> Splits:
        x = torch.randn(96, 6, generator=torch.Generator().manual_seed(0))
        for i, row in enumerate(x):
            row[self.shortest + i // 16 :] = 0
        return Splits(TensorExamples(x[:64], x[:64, :1]), None, TensorExamples(x[64:], x[64:, :1]))


def words(model: str, *more: str) -> list[str]:
    return [
        f"--model=test_lazy.{model}",
        *["--data=test_lazy.Six", "--loss=MSELoss", "--metric=own.R2", "--optimizer.lr=0.05", "--budget.steps=2"],
        *["--method=LGRAWA", "--method.period=2", "--log.tensorboard=false"],
        *more,
    ]


@pytest.mark.parametrize("start", ["common", "independent"])
def test_a_lazy_model_trains_as_the_complete_one_on_any_number_of_ranks(on_ranks: Ranks, start: str) -> None:
    """Its values are drawn from the stream from which a complete model's would be."""
    ours, theirs = (
        on_ranks(
            lambda comm, given=given: fit(parse(words("Lazy", f"--run.start={start}", given)), comm, speaks=False)  # type: ignore[misc]
        )
        for given in ("--model.lazy=true", "--model.lazy=false")
    )
    keys = ("center_test_loss", "mean_train_loss", "local_test_loss", "consensus_distance")
    for summary in ours:
        assert {key: summary[key] for key in keys} == {key: theirs[0][key] for key in keys}
    assert on_ranks.size == 1 or len(set(ours[0]["local_test_loss"])) > 1


def test_a_table_made_on_demand_has_one_shape_on_all_ranks_before_training(on_ranks: Ranks) -> None:
    def body(comm: Communicator) -> tuple[list[int], dict[str, Any]]:
        config = parse(words("Table"))
        worker = Worker(config, comm)
        table = worker.model.table
        assert isinstance(table, Tensor)
        return list(table.shape), fit(config, comm, speaks=False)

    complete = on_ranks(lambda comm: fit(parse(words("Table", "--model.length=6")), comm, speaks=False))
    for shape, summary in on_ranks(body):
        assert shape == [6] and summary["center_test_loss"] == complete[0]["center_test_loss"]


@pytest.mark.parametrize("persistent", ["true", "false"])
def test_a_table_that_has_grown_in_training_is_resumed_as_it_was(persistent: str) -> None:
    """Ranks see other lengths, so tables differ among them; steps after a resume are those without one, bit for bit."""
    config = parse(words("Table", "--data.shortest=1", "--data.batch_size=2", f"--model.persistent={persistent}"))

    def body(comm: Communicator, stop: int) -> tuple[list[int], list[float]]:
        worker = Worker(config, comm)
        worker.model.table = torch.ones(1)  # as if the pass before training had seen the shortest only
        losses = []
        for step in range(6):
            if step == stop:
                state = copy.deepcopy(worker.state_dict())
                worker = Worker(config, comm)
                worker.model.table = torch.ones(1)
                worker.load_state_dict(state)
            shape = list(worker.model.table.shape)
            loss = worker.step()
            losses.append(0.0 if loss is None else float(loss))
        return shape, losses

    straight, resumed = (simulate(3, lambda comm, stop=stop: body(comm, stop)) for stop in (9, 5))  # type: ignore[misc]
    assert straight == resumed
    assert max(shape for shape, _ in straight) > [1]


@pytest.mark.parametrize("model", ["Lazy", "Table"])
def test_the_center_of_such_a_model_is_evaluated(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own.plain_process(monkeypatch)
    monkeypatch.chdir(tmp_path)
    cli.main(["train", *words(model, "--run.name=x", "--data.shortest=1", "--data.batch_size=2")])
    if model == "Table":  # the last batches were longer than all before
        center = torch.load("runs/x/center.pt", weights_only=True)
        torch.save({**center, "table": torch.linspace(1, 9, 9)}, "runs/x/center.pt")
    capsys.readouterr()
    cli.main(["evaluate", "runs/x"])
    said = json.loads(Path("runs/x/summary.json").read_text())["center_test_r2"]
    assert f"test r2 {said:.4f}" in capsys.readouterr().out


def test_a_pass_completes_a_model_and_leaves_nothing_else() -> None:
    model = nn.Sequential(Lazy(), Table(3), nn.BatchNorm1d(1))
    assert lazy.unfinished(model) == "0.net.0.weight"
    stream, statistics = torch.get_rng_state(), [model[2].running_mean.clone(), model[1].table]
    model[1].linear = nn.Identity()
    with lazy.completing(model):
        model[1].table.mul_(2)
        model[2](torch.randn(4, 1))
        model[0].eval()(torch.randn(4, 6))
    assert lazy.unfinished(model) is None and model[0].net[0].weight.shape == (8, 6)
    assert torch.equal(model[0].net[1].running_mean, torch.zeros(8))
    assert torch.equal(torch.get_rng_state(), stream) and torch.equal(model[2].running_mean, statistics[0])
    assert model[1].table is statistics[1] and model[1].table.tolist() == [1, 2, 3]


def test_a_module_that_no_pass_reaches_is_named() -> None:
    config = parse(words("Lazy", "--model.spare=true"))
    message = "model is Lazy: 'spare.weight' must get its shape in the first forward pass, and has none after one .*"
    with pytest.raises(ConfigError, match=message):
        simulate(2, lambda comm: Worker(config, comm))


def test_in_an_own_loop_a_pass_comes_before_the_vector() -> None:
    model = Lazy()
    message = r"'net\.0\.weight' has no shape yet \(a lazy module\): pass a batch through the model before Param.*"
    with pytest.raises(ValueError, match=message):
        ParameterVector(model)
    model(torch.randn(2, 6))
    vector = ParameterVector(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    simulate(1, lambda comm: LocalSGD(period=1).build(comm, vector, optimizer).after_step())


@dataclass(kw_only=True)
class BrokenOnTheSecond(Six):
    """Loads what cannot be used when it is loaded again: on the second simulated rank."""

    def __post_init__(self) -> None:
        self.loads = 0

    def load(self) -> Splits:
        self.loads += 1
        found = super().load()
        return (
            found
            if self.loads != 2
            else Splits(TensorExamples([torch.zeros(64, 5)], torch.zeros(64)), None, found.test)
        )


def test_what_one_rank_cannot_use_ends_all_of_them_with_one_message() -> None:
    config = parse([*words("Lazy"), "--data=test_lazy.BrokenOnTheSecond"])

    def body(comm: Communicator) -> str:
        with pytest.raises(ConfigError) as error:
            Worker(config, comm)
        return str(error.value)

    for found in simulate(3, body):
        assert re.fullmatch(r"model is Lazy: must take inputs \[\[8, 5\] \(float32\)\]; .* \(on rank 1\)", found), found
