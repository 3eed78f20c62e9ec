"""Pooled rounds: all ranks together make W·τ local steps, each as many as it can, and wait for one at most."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import reference as ref
import torch
from conftest import Ranks
from table import kinds, paced
from torch import nn
from worlds import batch, probe_batch, starts, twin

from hpc_grawa import LGRAWA, LSGD, LocalLGRAWA, LocalSGD, Method, ParameterVector, Run, simulate
from hpc_grawa.averaging.synchronizer import Round
from hpc_grawa.comm import Communicator, Meter
from hpc_grawa.comm.simulated import SimulatedCommunicator
from hpc_grawa.periods import QSR, Period
from hpc_grawa.schedules import RunFacts


class Trainer:
    """One rank: its run, and what it saw."""

    def __init__(
        self,
        comm: Communicator,
        method: Method,
        steps: int | None = None,
        probe_takes: float = 0.0,
        clock: Callable[[], float] | None = None,
    ) -> None:
        model = twin(starts(comm.size)[comm.rank])
        self.comm, self.vector = comm, ParameterVector(model)
        self.optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        self.made = 0
        self.rounds: list[Round] = []
        self.probes = 0

        def loss_of(inputs: Any, targets: Any) -> torch.Tensor:
            return nn.functional.cross_entropy(model(torch.as_tensor(inputs)), torch.as_tensor(targets))

        def probe() -> torch.Tensor:
            self.probes += 1
            if isinstance(comm, SimulatedCommunicator):
                comm.elapse(probe_takes)
            return loss_of(*probe_batch(comm.rank, self.probes))

        self._loss_of = loss_of
        facts = RunFacts(total_steps=steps)
        self.run: Run = method.build(comm, self.vector, self.optimizer, probe, facts=facts, clock=clock)
        self.run.synchronizers[-1].on_round = self.rounds.append

    def step(self, takes: float = 0.0) -> None:
        self.optimizer.zero_grad()
        loss = self._loss_of(*batch(self.comm.rank, self.made))
        loss.backward()
        self.optimizer.step()
        self.made += 1
        if isinstance(self.comm, SimulatedCommunicator):
            self.comm.elapse(takes)
        self.run.after_step(loss.detach())

    def train(self, takes: float = 0.0) -> None:
        """To the end that the facts say, the same on all ranks; a step takes so long on average, give or take 20 %."""
        facts, draw = self.run.facts, random.Random(self.comm.rank)
        while facts.total_steps is None or facts.step < facts.total_steps:
            if self.run.before_step():
                self.step(takes * draw.uniform(0.8, 1.2))
        self.run.finish()


@pytest.mark.parametrize("name", kinds("pools"))
def test_ranks_of_equal_speed_train_as_in_lockstep(name: str) -> None:
    """Simulated ranks take turns, so each makes τ steps a round: bit for bit the lockstep run, its last round too."""

    def body(comm: Communicator) -> list[Any]:
        results = []
        for rounds in ("pooled", "lockstep"):
            trainer = Trainer(comm, paced(name, 4, rounds=rounds), steps=14)
            trainer.train()
            results.append((trainer.vector.data.numpy().copy(), trainer.run.center.numpy().copy(), trainer.rounds))
        return results

    for (pooled, center, rounds), (lockstep, expected, _) in simulate(3, body):
        assert (pooled == lockstep).all() and (center == expected).all()
        assert [(r.step, r.period, r.made) for r in rounds] == [
            *((step, 4, (4, 4, 4)) for step in (4, 8, 12)),
            (14, 2, (2, 2, 2)),
        ]


@pytest.mark.parametrize("name", kinds("pools"))
def test_every_round_has_as_many_steps_as_specified(on_ranks: Ranks, name: str) -> None:
    """W·τ of all ranks together, the last round as many as are left; all ranks agree and end."""
    world, steps = on_ranks.size, 30

    def body(comm: Communicator) -> Trainer | tuple[Any, ...]:
        trainer = Trainer(comm, paced(name, 4, rounds="pooled"), steps)
        trainer.train()
        run, rounds = trainer.run, trainer.rounds
        seen = [(r.number, r.step, r.period, r.made, r.weights.tolist(), r.slowest) for r in rounds]
        assert trainer.made == sum(r.made[comm.rank] for r in rounds)
        assert torch.isfinite(trainer.vector.data).all()
        return seen, run.facts.step, run.center.tolist()

    results = on_ranks(body)
    for seen, step, center in results:
        assert (seen, step, center) == results[0]
        assert step == steps
        assert [(step, period) for _, step, period, *_ in seen] == [(4 * r, 4) for r in range(1, 8)] + [(30, 2)]
        assert [sum(made) for _, _, _, made, *_ in seen] == [4 * world] * 7 + [2 * world]


def test_a_rank_that_has_made_no_step_yet_takes_part_where_momenta_ride() -> None:
    """It has no momentum and sees no names of any, so ranks tell it."""

    def body(comm: Communicator) -> tuple[list[tuple[int, ...]], list[float]]:
        trainer = Trainer(comm, LocalSGD(period=2, rounds="pooled", local_momentum="average"), steps=8)
        if comm.rank == 1 and isinstance(comm, SimulatedCommunicator):
            comm.elapse(100.0)
        trainer.train(takes=1.0)
        return [r.made for r in trainer.rounds], trainer.vector.data.tolist()

    (made, parameters), other = simulate(2, body)
    assert made[0] == (4, 0) and sum(map(sum, made)) == 16
    assert (made, parameters) == other


def test_steps_are_about_proportional_to_speed() -> None:
    """Speeds 1:2:3:4 and τ 4: about 2, 3, 5, 6 steps a round."""

    def body(comm: Communicator) -> list[tuple[int, ...]]:
        trainer = Trainer(comm, LocalSGD(period=4, rounds="pooled"), steps=80)
        trainer.train(takes=1 / (comm.rank + 1))
        return [r.made for r in trainer.rounds]

    made = np.array(simulate(4, body)[0])
    assert (made.sum(1) == 16).all()
    np.testing.assert_allclose(made.mean(0), [2, 3, 5, 6], atol=0.5)


@pytest.mark.parametrize(
    ("method", "probe", "period", "low", "high"),
    [
        (LocalLGRAWA, 0.0, 4, 0.65, 0.77),
        pytest.param(LocalLGRAWA, 0.0, 8, 0.78, 0.91, marks=pytest.mark.slow),
        pytest.param(LocalLGRAWA, 0.0, 16, 0.90, 0.98, marks=pytest.mark.slow),
        pytest.param(LocalLGRAWA, 0.0, 32, 0.93, 0.98, marks=pytest.mark.slow),
        pytest.param(LGRAWA, 1.0, 4, 0.42, 0.52, marks=pytest.mark.slow),
        pytest.param(LGRAWA, 1.0, 8, 0.57, 0.72, marks=pytest.mark.slow),
        pytest.param(LGRAWA, 1.0, 16, 0.74, 0.84, marks=pytest.mark.slow),
        (LGRAWA, 1.0, 32, 0.84, 0.92),
    ],
)
def test_fast_ranks_keep_most_of_their_speed(
    method: Callable[..., Method], probe: float, period: int, low: float, high: float
) -> None:
    """One rank of four is four times slower, its probes too; in lockstep the others would keep a quarter."""

    def speed(rounds: str) -> float:
        def body(comm: Communicator) -> float:
            assert isinstance(comm, SimulatedCommunicator)
            slower = 4.0 if comm.rank == 0 else 1.0
            trainer = Trainer(comm, method(period=period, rounds=rounds), 1280 // period * period // 4, probe * slower)
            trainer.train(takes=slower)
            return trainer.made / comm.clock

        return float(np.mean(simulate(4, body)[1:]))

    assert low <= speed("pooled") <= high
    assert speed("lockstep") <= 0.25


@pytest.mark.parametrize(("period", "third"), [(4, 4), (QSR(4, 0.1), 9)], ids=["4", "QSR"])
def test_a_rank_that_has_left_need_not_follow_the_learning_rate(period: int | Period, third: int) -> None:
    """Others go on, with rates and periods that follow from rounds which it has no steps in."""

    def body(comm: Communicator) -> list[tuple[Any, ...]]:
        model = twin(starts(comm.size)[comm.rank])
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        run = LocalSGD(period=period, rounds="pooled").build(comm, ParameterVector(model), optimizer)
        seen: list[tuple[Any, ...]] = []
        run.synchronizers[0].on_round = lambda r: seen.append((r.step, r.period, r.lr, r.made))
        made = 0
        while made < (8, 8, 60)[comm.rank]:
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + run.facts.step // 4)
            if run.before_step():
                optimizer.step()
                run.after_step()
                made += 1
        run.finish()
        return seen

    first, *others = simulate(3, body)
    assert others == [first] * 2
    made = (4, 4, 4), (4, 4, 4), (0, 0, 3 * third)
    assert first[:3] == list(zip((4, 8, 8 + third), (4, 4, third), (0.1, 0.05, 0.1 / 3), made, strict=True))


def test_a_loop_that_goes_on_after_its_last_step_has_rounds_of_one() -> None:
    """Of none a rank would be told for ever that there was a round."""

    def body(comm: Communicator) -> list[tuple[int, int]]:
        vector = ParameterVector(nn.Linear(2, 1))
        optimizer = torch.optim.SGD(vector.parameters, 0.1)
        method = LocalSGD(period=4, rounds="pooled")
        run = method.build(comm, vector, optimizer, facts=RunFacts(total_steps=6))
        seen: list[tuple[int, int]] = []
        run.synchronizers[0].on_round = lambda r: seen.append((r.step, r.period))
        for _ in range(20):
            if run.facts.step < 8 and run.before_step():
                run.after_step()
        run.finish()
        return seen

    assert simulate(2, body) == [[(4, 4), (6, 2), (7, 1), (8, 1)]] * 2


def test_ranks_may_leave_at_different_times(on_ranks: Ranks) -> None:
    """Each after as many steps of its own as it likes; those that have left go on taking part in rounds."""
    world = on_ranks.size

    def body(comm: Communicator) -> tuple[int, list[tuple[int, ...]], bool]:
        trainer = Trainer(comm, LocalSGD(period=4, rounds="pooled"))
        for _ in range(3 + 5 * comm.rank):
            while not trainer.run.before_step():
                pass
            trainer.step()
        trainer.run.finish()
        x = trainer.vector.data
        same = comm.allgather(x, "evaluate").wait()
        return trainer.made, [r.made for r in trainer.rounds], bool((same == x).all())

    for rank, (made, rounds, same) in enumerate(on_ranks(body)):
        assert made == 3 + 5 * rank == sum(counts[rank] for counts in rounds)
        assert all(sum(counts) == 4 * world for counts in rounds[:-1])
        assert 0 < sum(rounds[-1]) <= 4 * world
        assert same  # LocalSGD's last round leaves all ranks alike


def test_a_rank_without_steps_keeps_its_score() -> None:
    """Rank 1 makes its first step and stands still: its score stays, and nothing else of it changes."""

    def body(comm: Communicator) -> tuple[list[int], list[tuple[int, ...]]]:
        assert isinstance(comm, SimulatedCommunicator)
        trainer = Trainer(comm, LSGD(period=4, rounds="pooled"), steps=12)
        trainer.train(takes=1000.0 if comm.rank == 1 else 1.0)
        return [r.weights.flatten().tolist() for r in trainer.rounds] + [
            [float(made) for made in r.made] for r in trainer.rounds
        ]

    results = simulate(2, body)
    assert results[0] == results[1]
    made = results[0][3:]
    assert made[0] == [7.0, 1.0] and all(sum(counts) == 8 for counts in made)
    assert all(sorted(weights) == [0.0, 1.0] for weights in results[0][:3])


def test_a_step_without_a_ticket_is_a_named_error(on_ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        trainer = Trainer(comm, LocalSGD(period=4, rounds="pooled"))
        with pytest.raises(RuntimeError, match=r"only if before_step\(\) returns True"):
            trainer.step()

    on_ranks(body)


def test_a_rank_that_is_not_finite_is_healed(on_several_ranks: Ranks) -> None:
    def body(comm: Communicator) -> tuple[list[tuple[int, ...]], bool]:
        trainer = Trainer(comm, LocalLGRAWA(period=4, rounds="pooled"), steps=12)
        if comm.rank == 1:
            trainer.vector.data.fill_(math.nan)
        trainer.train()
        return [r.healed for r in trainer.rounds], bool(trainer.vector.data.isfinite().all())

    for healed, finite in on_several_ranks(body):
        assert finite and healed[0] == (1,) and not any(healed[1:])


def test_tickets_are_counted_with_all_other_messages(on_ranks: Ranks) -> None:
    """One for every local step, and one past the end for every round; each is 8 bytes there and 8 back."""

    def body(comm: Communicator) -> tuple[int, int, int, Meter]:
        trainer = Trainer(comm, LocalSGD(period=4, rounds="pooled"), steps=14)
        facts, past_the_end = trainer.run.facts, 0
        while facts.step < 14:
            if trainer.run.before_step():
                trainer.step()
            else:
                past_the_end += 1
        trainer.run.finish()
        return trainer.made, past_the_end, len(trainer.rounds), comm.meter

    for made, past_the_end, rounds, meter in on_ranks(body):
        tickets = made + past_the_end
        assert past_the_end == rounds == 4
        assert meter.calls["ticket"] == tickets and meter.payload_bytes["ticket"] == 8 * tickets
        assert meter.bytes_sent["ticket"] == pytest.approx(tickets * ref.bytes_sent("counter", 8, on_ranks.size))
        assert 0 < meter.seconds["ticket"] < meter.communication_seconds and meter.waits_for is None
        others = sum(meter.bytes_sent[purpose] for purpose in ("control", "center", "gradient"))
        assert meter.training_bytes_sent == round(others + meter.bytes_sent["ticket"])


def test_rounds_say_who_is_slowest(on_several_ranks: Ranks) -> None:
    """By seconds of computing per local step, whether ranks make as many steps or not; waiting does not count.

    The clock shows what a step is to take and what was waited, not what a busy machine adds.
    """
    if on_several_ranks.backend == "simulated":
        pytest.skip("simulated ranks share one clock")
    last = on_several_ranks.size - 1

    def clock(comm: Communicator, made: list[int], takes: float) -> float:
        return made[0] * takes + comm.meter.waiting_seconds + comm.meter.communication_seconds

    def body(comm: Communicator) -> list[int]:
        found = []
        for rounds in ("lockstep", "pooled"):
            made, takes = [0], 0.1 if comm.rank == last else 0.005
            trainer = Trainer(comm, LocalSGD(period=4, rounds=rounds), steps=8, clock=partial(clock, comm, made, takes))
            facts = trainer.run.facts
            while facts.step < 8:
                if trainer.run.before_step():
                    time.sleep(takes)
                    made[0] += 1
                    trainer.step()
            trainer.run.finish()
            found += [r.slowest for r in trainer.rounds]
        return found

    assert on_several_ranks(body) == [[last] * 4] * on_several_ranks.size


@pytest.mark.parametrize(
    ("weights", "workers"),
    [
        ([[0.25]] * 4, 4.0),
        ([[0.0], [1.0], [0.0], [0.0]], 1.0),
        ([[0.5, 1.0], [0.5, 0.0]], 1.5),  # the mean over layers
    ],
)
def test_the_effective_number_of_workers(weights: list[list[float]], workers: float) -> None:
    table = torch.tensor(weights, dtype=torch.float64)
    ranks = tuple(range(len(weights)))
    round_ = Round(1, 4, 4, 0.1, ranks, table, made=(4,) * len(ranks), healed=(), slowest=0)
    assert round_.effective_workers == pytest.approx(workers)
