"""The first limit reached ends a run, and the clock counts training only."""

from __future__ import annotations

import math
import time
from fractions import Fraction

import pytest
import torch

from hpc_grawa.schedules import RunFacts
from hpc_grawa.training.budget import Budget, Cadence, Clock


def last_step(budget: Budget, steps_per_epoch: int, seconds_per_step: float = 0.5) -> int:
    """The step after which the run is over."""
    total = budget.total_steps(steps_per_epoch)
    facts = RunFacts(steps_per_epoch=steps_per_epoch)
    while budget.used(facts, total) < 1:
        facts.step += 1
        facts.seconds = facts.step * seconds_per_step
    return facts.step


@pytest.mark.parametrize(
    ("budget", "step"),
    [
        (Budget(steps=7), 7),
        (Budget(epochs=3), 30),
        (Budget(epochs=0.25), 3),  # 2.5 steps: the third begins within the budget
        (Budget(seconds=6), 12),
        (Budget(seconds=6.1), 13),
        (Budget(steps=7, epochs=3, seconds=6), 7),
        (Budget(steps=70, epochs=3, seconds=6), 12),
        (Budget(steps=70, epochs=3, seconds=60), 30),
    ],
)
def test_the_first_limit_reached_ends(budget: Budget, step: int) -> None:
    assert last_step(budget, steps_per_epoch=10) == step


def test_the_share_used_is_that_of_the_limit_that_is_nearest() -> None:
    budget = Budget(seconds=10, steps=100)
    assert budget.used(RunFacts(step=20, seconds=3), 100) == pytest.approx(0.3)
    assert budget.used(RunFacts(step=50, seconds=3), 100) == pytest.approx(0.5)
    assert budget.used(RunFacts(), 100) == 0


def test_only_the_clock_decides_where_there_are_no_steps() -> None:
    assert Budget(seconds=1).total_steps(10) is None
    assert Budget(epochs=1.01).total_steps(10) == 11


@pytest.mark.parametrize("steps_per_epoch", [1, 3, 25, 49, 391])
def test_epochs_become_steps_without_round_off(steps_per_epoch: int) -> None:
    """Of hundredths of an epoch: .28 of 25 steps are 7, though .28 * 25 is more in binary."""
    for hundredths in range(1, 300):
        steps = Fraction(hundredths * steps_per_epoch, 100)
        assert Budget(epochs=hundredths / 100).total_steps(steps_per_epoch) == math.ceil(steps)


@pytest.mark.parametrize("every", ["0.1", "0.28", "0.04", "1.2", "3"])
@pytest.mark.parametrize("steps_per_epoch", [25, 50, 390])
def test_what_recurs_by_epochs_falls_on_the_first_step_at_each_multiple(every: str, steps_per_epoch: int) -> None:
    facts = RunFacts(steps_per_epoch=steps_per_epoch)
    cadence, due = Cadence(float(every), "epochs", facts), []
    for facts.step in range(1, 10 * steps_per_epoch + 1):
        if cadence.due():
            due.append(facts.step)
    multiples = [math.ceil(Fraction(every) * k * steps_per_epoch) for k in range(1, 1000)]
    assert due == [step for step in multiples if step <= 10 * steps_per_epoch]


def test_what_never_recurs_is_never_due() -> None:
    assert not Cadence(math.inf, "epochs", RunFacts(step=10**9, steps_per_epoch=1)).due()


def test_the_clock_pauses() -> None:
    began = time.perf_counter()
    clock = Clock()
    with clock.paused():
        time.sleep(0.2)
    assert clock.seconds <= time.perf_counter() - began - 0.2
    time.sleep(0.05)
    with pytest.raises(KeyError), clock.paused():
        time.sleep(0.2)
        raise KeyError
    assert 0.05 <= clock.seconds <= time.perf_counter() - began - 0.4
    clock.restart()
    assert clock.seconds < 0.05


def test_the_clock_stands_still_while_it_is_paused() -> None:
    clock = Clock()
    with clock.paused():
        before = clock.seconds
        time.sleep(0.2)
        assert clock.seconds == clock.settled == before
    assert before <= clock.seconds < before + 0.2


def test_what_is_under_way_when_the_clock_is_paused_is_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, whose work the host waits for then."""
    monkeypatch.setattr("torch.cuda.synchronize", lambda device: time.sleep(0.1))
    clock = Clock(torch.device("cuda"))
    with clock.paused():
        assert clock.seconds >= 0.1
    assert clock.seconds >= 0.1
