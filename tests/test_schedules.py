"""Learning rates, against their closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import pytest

from hpc_grawa.errors import ConfigError
from hpc_grawa.schedules import Constant, Cosine, Linear, RunFacts, Schedule, Step
from hpc_grawa.training.budget import Budget

TOTAL = 40
SHARES = [step / TOTAL for step in range(TOTAL)]


def course(schedule: Schedule, steps: int = TOTAL) -> list[float]:
    """The factor at each of so many steps."""
    return [schedule(RunFacts(step=t, progress=t / TOTAL, steps_per_epoch=8, seconds=t / 2)) for t in range(steps)]


def test_constant() -> None:
    assert course(Constant()) == [1.0] * TOTAL


@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_cosine_and_linear_go_from_1_to_their_final_factor_over_the_budget(final: float) -> None:
    cosine = [final + (1 - final) * (1 + math.cos(math.pi * p)) / 2 for p in SHARES]
    assert course(Cosine(final=final)) == pytest.approx(cosine, rel=1e-15)
    assert course(Linear(final=final)) == pytest.approx([1 - (1 - final) * p for p in SHARES], rel=1e-15)
    for schedule in (Cosine(final=final), Linear(final=final)):
        assert schedule(RunFacts(progress=0.0)) == 1
        assert schedule(RunFacts(progress=0.5)) == pytest.approx((1 + final) / 2)
        assert schedule(RunFacts(progress=1.0)) == pytest.approx(final, abs=1e-15)


@pytest.mark.parametrize("schedule", [Cosine, Linear])
def test_what_falls_does_so_from_the_end_of_the_warm_up(schedule: Callable[..., Schedule]) -> None:
    """Of a budget in steps: the middle is that of the steps after it. In seconds nobody knows how long it takes."""
    falling = schedule(warmup=20)
    at = {t: falling(RunFacts(step=t, total_steps=100, progress=t / 100)) for t in (0, 19, 20, 60, 100)}
    assert at == pytest.approx({0: 1 / 20, 19: 1, 20: 1, 60: 0.5, 100: 0}, abs=1e-15)
    assert falling(RunFacts(step=60, progress=0.5)) == pytest.approx(0.5)
    assert schedule(warmup=200)(RunFacts(step=100, total_steps=100, progress=1.0)) == pytest.approx(101 / 200)


@pytest.mark.parametrize(
    ("schedule", "drops"),
    [
        (Step(milestones=[10, 25], unit="steps"), (10, 25)),
        (Step(milestones=[1, 2.5], unit="epochs"), (8, 20)),  # 8 steps each
        (Step(milestones=[5, 12.25], unit="seconds"), (10, 25)),  # half a second a step; 12.5 is the first after 12.25
        (Step(milestones=[500], unit="seconds"), ()),
    ],
)
def test_step_multiplies_by_gamma_from_each_milestone_on(schedule: Step, drops: tuple[int, ...]) -> None:
    schedule.gamma = 0.2
    assert course(schedule) == pytest.approx([0.2 ** sum(t >= drop for drop in drops) for t in range(TOTAL)])


def test_milestones_in_epochs_fall_on_their_steps_without_round_off() -> None:
    for hundredths in range(4, 300, 4):  # whole steps, of 25 an epoch
        step, schedule = hundredths // 4, Step(milestones=[hundredths / 100])
        facts = [RunFacts(step=t, steps_per_epoch=25) for t in (step - 1, step)]
        assert [schedule(fact) for fact in facts] == [1, schedule.gamma], hundredths


@pytest.mark.parametrize("warmup", [1, 5, 2 * TOTAL])
@pytest.mark.parametrize("schedule", [Constant, Cosine, Linear, lambda: Step(milestones=[3], unit="steps")])
def test_warm_up_rises_linearly_to_the_peak_that_the_schedule_has_there(
    schedule: Callable[[], Schedule], warmup: int
) -> None:
    plain, warm = schedule(), schedule()
    warm.warmup = warmup
    expected = [min(1.0, (t + 1) / warmup) * factor for t, factor in enumerate(course(plain))]
    assert course(warm) == pytest.approx(expected, rel=1e-15)
    assert course(warm)[0] == pytest.approx(1 / warmup)  # never 0: the first step counts


@pytest.mark.parametrize("step", [0, 7, 1000])
def test_facts_know_steps_epochs_and_seconds(step: int) -> None:
    facts = RunFacts(step=step, seconds=2.5, steps_per_epoch=4)
    assert [facts.elapsed(unit) for unit in ("steps", "epochs", "seconds")] == [step, step / 4, 2.5]


def test_epochs_need_their_length() -> None:
    with pytest.raises(ValueError, match="steps per epoch"):
        Step(milestones=[1])(RunFacts())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constant(warmup=-1), "schedule.warmup is -1: must be 0 or more"),
        (lambda: Step(), r"schedule.milestones is \[\]: must be positive and increasing"),
        (lambda: Step(milestones=[2, 2]), r"schedule.milestones is \[2, 2\]: must be"),
        (lambda: Step(milestones=[3, 1]), r"schedule.milestones is \[3, 1\]: must be"),
        (lambda: Step(milestones=[0, 1]), r"schedule.milestones is \[0, 1\]: must be"),
        (lambda: Step(milestones=[1, math.nan]), r"schedule.milestones is \[1, nan\]: must be"),
        (lambda: Step(milestones=[1], gamma=0), "schedule.gamma is 0: must be positive"),
        (lambda: Step(milestones=[1], gamma=math.nan), "schedule.gamma is nan: must be positive"),
        (lambda: Step(milestones=[1], gamma=math.inf), "schedule.gamma is inf: must be positive"),
        (lambda: Cosine(final=-0.1), r"schedule.final is -0.1: must be in \[0, 1\]"),
        (lambda: Cosine(final=math.nan), r"schedule.final is nan: must be in \[0, 1\]"),
        (lambda: Linear(final=1.1), r"schedule.final is 1.1: must be in \[0, 1\]"),
    ],
)
def test_impossible_values_are_named(make: Callable[[], Schedule], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_epochs_go_on_where_they_have_other_steps() -> None:
    """As many examples as before, whatever steps they take; to the end of the budget exactly."""
    budget, facts = Budget(epochs=10), RunFacts(step=600, steps_per_epoch=98)
    for per_epoch, total in ((49, 790), (98, 880), (98, 880)):
        state, over = facts.state_dict(), facts.elapsed("epochs")
        facts = RunFacts(steps_per_epoch=per_epoch)
        facts.load_state_dict(state)
        assert (facts.step, facts.elapsed("epochs")) == (state["step"], over)
        assert budget.total_steps(per_epoch, facts.base) == total
        assert replace(facts, step=total).elapsed("epochs") == 10 > replace(facts, step=total - 1).elapsed("epochs")
        facts.step += 100
    again = RunFacts(steps_per_epoch=49)
    again.load_state_dict({"step": 600, "seconds": 0.0, "lr": 0.1, "progress": 0.5})  # of a run that did not say
    assert again.elapsed("epochs") == 600 / 49
    assert Budget(epochs=1).total_steps(98, (600, Fraction(600, 49))) == 600  # more than there were to be: over


@pytest.mark.parametrize("budget", [Budget(epochs=10), Budget(steps=1000), Budget(epochs=90, steps=1000)])
def test_the_share_used_goes_on_where_epochs_have_other_steps(budget: Budget) -> None:
    """Evenly from there to the end, and so does what falls after the warm-up."""
    before = RunFacts(step=600, steps_per_epoch=98, total_steps=budget.total_steps(98))
    used = budget.used(before, before.total_steps)
    facts = RunFacts(steps_per_epoch=49)
    facts.load_state_dict(before.state_dict())
    facts.total_steps = total = budget.total_steps(49, facts.base)
    facts.base_share = budget.share_at(facts.base)
    assert total is not None
    shares = {step: budget.used(replace(facts, step=step), total) for step in (600, (600 + total) // 2, total)}
    assert list(shares.values()) == pytest.approx([used, (1 + used) / 2, 1.0]) and shares[total] == 1
    warm = Linear(warmup=100)
    before.progress = facts.progress = used
    assert warm(facts) == pytest.approx(warm(before))
