"""Rounds of groups beside those of all ranks, of any method that averages."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Ranks
from table import METHODS, having, is_, kinds, plain
from torch import nn
from worlds import NET, batch, nesterov, run_method, starts

from hpc_grawa import LGRAWA, LSGD, MGRAWA, LocalSGD, ParameterVector, Parle, Run, simulate
from hpc_grawa.cli.parsing import parse
from hpc_grawa.comm import Communicator
from hpc_grawa.data.sharding import Sampler
from hpc_grawa.errors import ConfigError
from hpc_grawa.methods import AveragingMethod
from hpc_grawa.periods import QSR
from hpc_grawa.schedules import RunFacts
from hpc_grawa.training.loop import fit

STEPS = 10


def ours(name: str, **settings: Any) -> AveragingMethod:
    method = METHODS[name].ours
    assert isinstance(method, AveragingMethod)
    if hasattr(method, "group_pull"):  # groups have strengths of their own
        settings |= {"group_pull": method.pull, "group_prox": method.prox}
    return replace(method, **settings)


def trained(comm: Communicator, method: AveragingMethod, **options: Any) -> list[Any]:
    """The parameters after every step but the last, which ends with a round of all."""
    return run_method(comm, method, steps=STEPS, optimizer=nesterov, **options).parameters[:-1]


@pytest.mark.parametrize("name", [name for name in kinds("averages") if not is_(name, "outer")])
def test_a_group_of_all_is_the_method_bit_for_bit(on_ranks: Ranks, name: str) -> None:
    method = ours(name, period=3, group_period=None, ranks_per_group=None)
    groups = replace(method, period=math.inf, group_period=3, ranks_per_group=on_ranks.size)

    def body(comm: Communicator) -> list[Any]:
        # One batch for every probe: how many rounds of all there were says which, and these have none.
        return [trained(comm, m, probe_of=lambda rank, round_: batch(rank, 99)) for m in (method, groups)]

    for one, other in on_ranks(body):
        assert np.array_equal(one, other)


def test_a_rank_that_its_group_heals_at_the_first_round_of_all_takes_part_where_momenta_ride() -> None:
    """Healed, it has forgotten its momentum, and with it which tensors ride."""
    method = LocalSGD(period=4, group_period=2, ranks_per_group=2, local_momentum="average")
    options: dict[str, Any] = {"steps": 8, "optimizer": nesterov, "poison": lambda *at: at == (1, 3)}
    for trace in simulate(4, lambda comm: run_method(comm, method, **options)):
        assert [round_.healed for round_ in trace.rounds] == [(), ()]
        assert np.isfinite(trace.parameters[-1]).all()


def test_a_loss_that_is_no_number_is_forgotten_by_all_ranks_where_a_group_has_healed_it() -> None:
    """Each rank has one in a period of all ranks."""
    broken = ((0, 0), (2, 0), (1, 2), (3, 2))

    def spoilt(rank: int, step: int) -> tuple[Any, ...]:
        inputs, targets = batch(rank, step)
        return (inputs * math.nan if (rank, step) in broken else inputs), targets

    method = LSGD(period=4, group_period=2, ranks_per_group=2)
    for trace in simulate(4, lambda comm: run_method(comm, method, steps=8, batch=spoilt)):
        first, second = trace.rounds
        assert first.healed == second.healed == () and first.leader in (0, 2)
        assert np.isfinite(trace.parameters[-1]).all()


def after_eight_steps(comm: Communicator, method: AveragingMethod, broken: tuple[tuple[int, int], ...]) -> Run:
    """Rounds of pairs every 2 steps, of all ranks every 4; a rank breaks in a step of its own."""
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    vector, optimizer = ParameterVector(model), torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)

    def loss() -> torch.Tensor:
        return model(torch.ones(1, 2)).square().sum()

    method = replace(method, period=4, group_period=2, ranks_per_group=2)
    run = method.build(comm, vector, optimizer, loss, facts=RunFacts(steps_per_epoch=4))
    closure = run.closure(loss)
    for step in range(8):
        value = optimizer.step(closure)
        if (comm.rank, step) in broken:
            vector.data.fill_(math.nan)
        run.after_step(value)
    assert vector.data.isfinite().all()
    return run


def test_a_rank_that_its_group_heals_begins_its_momentum_of_scores_anew_among_all() -> None:
    def body(comm: Communicator) -> float:
        run = after_eight_steps(comm, MGRAWA(), broken=((1, 4),))
        return float(run.synchronizers[-1].score.state_dict()["momentum"]["count"])

    assert simulate(4, body) == [2, 1, 2, 2]


def test_rounds_of_a_group_that_has_diverged_as_a_whole_count_as_those_of_others() -> None:
    """By them Parle lowers γ and ρ, which are one of all ranks."""

    def body(comm: Communicator) -> list[int]:
        return [s.completed for s in after_eight_steps(comm, Parle(), broken=((0, 0), (1, 1))).synchronizers]

    assert simulate(4, body) == [[4, 2]] * 4


@pytest.mark.parametrize("name", [name for name in plain("averages") if not is_(name, "outer")])
def test_groups_are_worlds_of_their_own_between_rounds_of_all(name: str) -> None:
    """Four ranks in two groups: each does, bit for bit, what two ranks by themselves do with its data."""
    method = ours(name, period=3, group_period=None, ranks_per_group=None)
    groups = replace(method, period=math.inf, group_period=3, ranks_per_group=2)

    def part(comm: Communicator, first: int, method: AveragingMethod) -> list[Any]:
        return trained(
            comm,
            method,
            batch=lambda rank, step: batch(first + rank, step),
            probe_of=lambda rank, round_: batch(first + rank, 99),
        )

    four = simulate(4, lambda comm: part(comm, 0, groups))
    halves = [simulate(2, lambda comm, first=first: part(comm, first, method)) for first in (0, 2)]
    assert np.array_equal(four, [*halves[0], *halves[1]])
    assert not np.array_equal(four[0], four[2])


@pytest.mark.parametrize("name", having("outer"))
def test_an_outer_step_is_of_all_ranks_and_groups_take_plain_means(name: str) -> None:
    """Before a round of all they train as Local SGD in groups does, and after it they go on from the center."""
    method = ours(name, period=4, group_period=2, ranks_per_group=2)
    plainly = LocalSGD(period=4, group_period=2, ranks_per_group=2)
    four, beside = (np.array(simulate(4, lambda comm, m=m: trained(comm, m))) for m in (method, plainly))
    np.testing.assert_allclose(four[:, :3], beside[:, :3], rtol=1e-12, atol=1e-12)
    assert (four[:, 3] == four[0, 3]).all() and not np.allclose(four[0, 3], beside[0, 3])
    for first in (0, 2):  # after two more steps a group is one again, and another than the other one
        assert (four[first, 5] == four[first + 1, 5]).all()
    assert not np.allclose(four[0, 5], four[2, 5])
    moved, expected = four[:, 5] - four[:, 3], four[:, 4] - four[:, 3]
    assert np.linalg.norm(moved) < 4 * np.linalg.norm(expected)  # two steps, and no jump back to where the group was


def test_local_sgd_of_groups_by_hand(on_ranks: Ranks) -> None:
    """x_m <- the mean of its pair every 2 steps, that of all every 4."""
    method = LocalSGD(period=4, group_period=2, ranks_per_group=2)
    traces = on_ranks(lambda comm: run_method(comm, method, steps=STEPS))
    x = np.array([starts(on_ranks.size)[0]] * on_ranks.size)
    for step in range(STEPS):
        for m in range(len(x)):
            x[m] -= 0.1 * NET.loss_and_grad(x[m], *batch(m, step))[1]
        if step % 2 or step == STEPS - 1:
            for first in range(0, len(x), 2):
                x[first : first + 2] = x[first : first + 2].mean(axis=0)
        if step % 4 == 3 or step == STEPS - 1:
            x[:] = x.mean(axis=0)
        for m, trace in enumerate(traces):
            np.testing.assert_allclose(trace.parameters[step], x[m], rtol=1e-12, atol=1e-12)


def test_groups_go_with_a_period_that_changes(on_ranks: Ranks) -> None:
    """Rounds of groups keep their own pace, wherever those of all fall."""

    def body(comm: Communicator) -> list[tuple[int, int]]:
        vector = ParameterVector(nn.Linear(2, 1))
        optimizer = torch.optim.SGD(vector.parameters, 0.1)
        method = LocalSGD(period=QSR(3, 0.0), group_period=2, ranks_per_group=1)
        run = method.build(comm, vector, optimizer)
        seen: list[tuple[int, int]] = []
        run.on_round = lambda r: seen.append((r.step, len(r.ranks)))
        for _ in range(7):
            run.after_step(optimizer.step(run.closure(lambda: vector.model(torch.ones(1, 2)).sum())))
        run.finish()
        return seen

    all_ = on_ranks.size
    expected = [(2, 1), (3, all_), (4, 1), (6, 1), (6, all_), (7, 1), (7, all_)]
    assert on_ranks(body) == [expected] * on_ranks.size


def test_no_probe_of_a_run_draws_what_another_has_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of groups or of all, also by another world."""
    words = ("--config=digits", "--method=LGRAWA", "--method.period=4", "--method.group_period=2", "--eval.every=.inf")
    steps = ("--budget.seconds=null", "--budget.steps=8", "--save.unit=steps", "--save.every=4", "--save.keep=5")
    config = parse([*words, *steps, "--method.ranks_per_group=1", f"--run.dir={tmp_path}"])
    drawn: list[tuple[int, int]] = []
    draw = Sampler.probe_indices

    def noted(sampler: Sampler, round_: int, *rest: Any) -> Any:
        drawn.append((sampler.rank, round_))
        return draw(sampler, round_, *rest)

    monkeypatch.setattr(Sampler, "probe_indices", noted)

    def run(size: int) -> Any:
        def body(comm: Communicator) -> Any:
            return fit(config, comm, new_folder=None if comm.rank else lambda: tmp_path, speaks=False, any_world=True)

        return simulate(size, body)

    run(2)
    # Rounds of the groups at 2, 4, 6 and 8, of all at 4 and 8; batches are made ahead.
    assert [number for rank, number in drawn if rank == 1][:6] == [0, 1, 2, 3, 4, 5]
    (tmp_path / "summary.json").unlink()
    shutil.rmtree(tmp_path / "checkpoints/000000008", ignore_errors=True)
    (tmp_path / "checkpoints/latest").write_text("000000004\n")
    drawn.clear()
    run(1)
    assert [number for _, number in drawn][:3] == [3, 4, 5]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"period": 8, "group_period": 3},
            "method.group_period is 3: must be null, or divide method.period, which is 8",
        ),
        (
            {"period": 8, "group_period": 0},
            "method.group_period is 0: must be null, or divide method.period, which is 8",
        ),
        ({"ranks_per_group": 2}, "method.ranks_per_group is 2: must be null without method.group_period"),
        (
            {"period": 8, "group_period": 4, "ranks_per_group": 0},
            "method.ranks_per_group is 0: must be null .hosts., or",
        ),
        (
            {"period": 8, "group_period": 4, "rounds": "pooled"},
            "method.rounds is pooled: must be lockstep with method.g",
        ),
    ],
)
def test_impossible_groups_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LGRAWA(**settings)
