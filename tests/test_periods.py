"""Periods: against their closed forms, the oracle's rounds, and one another."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference as ref
import torch
from conftest import Ranks
from table import METHODS, kinds
from torch import nn
from worlds import assert_follows, batch, nesterov, replay, run_method, starts, twin

from hpc_grawa import LGRAWA, DistributedOptimizer, LocalSGD, ParameterVector, Run, simulate
from hpc_grawa.averaging.synchronizer import Round
from hpc_grawa.cli.parsing import parse
from hpc_grawa.comm import Communicator
from hpc_grawa.comm.single import SingleCommunicator
from hpc_grawa.errors import ConfigError, RanksDisagree
from hpc_grawa.methods import AveragingMethod
from hpc_grawa.periods import QSR, SWAP, Constant, Period, PostLocal, Sqrt
from hpc_grawa.schedules import Cosine, RunFacts
from hpc_grawa.training.dry_run import plan
from hpc_grawa.training.loop import fit

STEPS, WARMUP, PEAK = 40, 6, 0.4


def rises(step: int) -> float:
    return min(1.0, (step + 1) / WARMUP)


def cosine(step: int) -> float:
    return PEAK * rises(step) * (1 + math.cos(math.pi * step / STEPS)) / 2


def drops(step: int) -> float:
    return PEAK * rises(step) * (1.0 if step < 12 else 0.5 if step < 24 else 0.25)


def facts(steps: int = STEPS) -> RunFacts:
    return RunFacts(peak_lr=PEAK, warmup_steps=WARMUP, total_steps=steps)


# ---------------------------------------------------------------------------------------------------------
# Functions of facts.
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lr", "step", "left", "expected"),
    [
        (0.1, 20, None, 6),  # (.25 / .1)² = 6.25
        (0.2, 20, None, 4),
        (0.05, 20, None, 25),
        (0.001, 3, None, 6),  # warm-up: as at the peak
        (0.0, 20, 50, 50),
        (0.01, 20, 50, 50),
        (0.1, 20, 2, 4),  # the run cuts the base
        (0.0, 20, None, math.inf),
        (1e-200, 20, None, math.inf),
    ],
)
def test_qsr_by_hand(lr: float, step: int, left: int | None, expected: float) -> None:
    total = None if left is None else step + left
    given = RunFacts(step=step, lr=lr, peak_lr=0.1, warmup_steps=10, total_steps=total)
    assert QSR(4, 0.25)(given) == expected
    assert QSR(4, 0.0)(given) == 4


def test_other_powers_of_qsr() -> None:
    assert [QSR(1, 0.3, power)(RunFacts(lr=0.1)) for power in (1.0, 2.0, 3.0)] == [3, 9, 27]  # 0.3 / 0.1 < 3 in binary
    assert [QSR(1, alpha)(RunFacts(lr=0.1 * 0.1)) for alpha in (0.05, 0.2)] == [25, 400]  # 0.1 * 0.1 > 0.01
    assert QSR(1, 0.0499)(RunFacts(lr=0.01)) == 24
    assert [Sqrt(0.29)(RunFacts(step=t)) for t in (9_999, 10_000)] == [28, 29]


@pytest.mark.parametrize(("epoch", "published"), [(183, 30), (273, 8142)])
def test_qsr_on_the_cosine_of_its_paper(epoch: int, published: int) -> None:
    """Figure 5: AdamW at .008 after 10,000 steps of 300 epochs of 312, α .0175."""
    total, step = 300 * 312, epoch * 312
    facts = RunFacts(step=step, peak_lr=0.008, warmup_steps=10_000, total_steps=total, progress=step / total)
    facts.lr = facts.peak_lr * Cosine(warmup=10_000)(facts)
    assert QSR(4, 0.0175)(facts) == pytest.approx(published, rel=0.07)


def test_the_learning_rate_of_a_run_is_that_of_its_first_group_that_is_trained() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[1].parameters(), "lr": 0.1}]
    optimizer = torch.optim.SGD(groups)
    run = LocalSGD(period=QSR(base=2, alpha=0.2)).build(SingleCommunicator(), ParameterVector(model), optimizer)
    rounds: list[Round] = []
    run.synchronizers[0].on_round = rounds.append
    for _ in range(4):
        run.after_step(optimizer.step(run.closure(lambda: model(torch.ones(2)).sum())))  # type: ignore[arg-type]
    assert [(one.lr, one.period) for one in rounds] == [(0.1, 4)]


def test_sqrt_and_constant() -> None:
    assert [Sqrt(0.5)(RunFacts(step=t)) for t in (0, 3, 15, 16, 64, 400)] == [1, 1, 1, 2, 4, 10]
    assert [Constant(5)(RunFacts(step=t, lr=1 / (t + 1))) for t in range(9)] == [5] * 9


@pytest.mark.parametrize(("switch", "unit"), [(10, "steps"), (1.25, "epochs"), (5, "seconds")])
def test_what_switches(switch: float, unit: Any) -> None:
    def course(period: Period) -> list[tuple[bool, float]]:
        asked = [RunFacts(step=t, seconds=t / 2, steps_per_epoch=8) for t in (0, 9, 10, 11)]
        return [(period.shares(f), period(f)) for f in asked]

    assert [s for s, _ in course(PostLocal(switch, unit, 4))] == [True, True, False, False]
    assert [h for _, h in course(PostLocal(switch, unit, 4))][2:] == [4, 4]
    assert [s for s, _ in course(SWAP(switch, unit))] == [True, True, False, False]
    assert [h for _, h in course(SWAP(switch, unit))][2:] == [math.inf] * 2
    assert course(SWAP(switch, unit, steps=4)) == [(False, 4)] * 2 + [(False, math.inf)] * 2  # modified


@pytest.mark.parametrize(
    ("period", "message"),
    [
        (Constant(0), "method.period.steps is 0: must be at least 1 local step"),
        (Constant(2.5), "method.period.steps is 2.5: must be at least 1 local step, and whole or infinite"),
        (QSR(0), "method.period.base is 0: must be at least 1 local step"),
        (QSR(alpha=-1.0), "method.period.alpha is -1.0: must be a number of 0 or more"),
        (QSR(alpha=math.nan), "method.period.alpha is nan: must be"),
        (QSR(power=0.0), "method.period.power is 0.0: must be a positive number"),
        (Sqrt(math.inf), "method.period.c is inf: must be a number of 0 or more"),
        (PostLocal(-1), "method.period.switch is -1: must be a number of 0 or more"),
        (PostLocal(1, steps=0), "method.period.steps is 0: must be at least 1 local step"),
        (SWAP(1, steps=0), "method.period.steps is 0: must be null, or at least 1 local step"),
    ],
)
def test_impossible_values_are_named(period: Period, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LGRAWA(period=period)


NO_PERIODS = {"none": 0, "half": 2.5, "nan": math.nan, "class": QSR, "name": "QSR", "function": lambda facts: 4}


@pytest.mark.parametrize("period", NO_PERIODS.values(), ids=NO_PERIODS)
def test_what_is_no_period_is_named(period: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"method\.period is .*: must be at least 1 local step, and whole, or a Period"
    ):
        LocalSGD(period=period)
    assert [LocalSGD(period=p).period for p in (np.int64(3), 3.0, math.inf)] == [3, 3, math.inf]


def test_an_epoch_of_unknown_length_is_named() -> None:
    with pytest.raises(ValueError, match=r"in epochs need to know the steps per epoch: RunFacts\(steps_per_epoch="):
        PostLocal(1, "epochs").shares(RunFacts())


def test_a_warm_up_without_a_peak_is_named() -> None:
    given = RunFacts(step=2, lr=0.01, warmup_steps=10, total_steps=100)
    with pytest.raises(ValueError, match=r"peak of a warm-up: RunFacts\(warmup_steps=\.\.\., peak_lr="):
        QSR()(given)  # it would have no round before the last
    assert QSR()(replace(given, step=10, lr=0.1)) == 4


# ---------------------------------------------------------------------------------------------------------
# Rounds.
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lr", "expected"),
    [(drops, [4, 4, 4, 16, 12]), (cosine, [4, 4, 4, 6, 11, 11])],  # (.8 / .2)²; (.8 / .3176)² at 12, ...
)
@pytest.mark.parametrize("name", ["LGRAWA", "LSGD"])
def test_qsr_follows_the_oracle(on_ranks: Ranks, name: str, lr: Callable[[int], float], expected: list[int]) -> None:
    row = METHODS[name]
    ours = replace(row.ours, period=QSR(4, 0.8))
    traces = on_ranks(lambda comm: run_method(comm, ours, steps=STEPS, lr=lr, optimizer=nesterov, facts=facts()))
    theirs = replay(row.oracle, on_ranks.size, STEPS, ref.qsr(4, 0.8), lr, optimizer=nesterov, warmup_steps=WARMUP)
    assert_follows(traces, theirs, 1e-9)
    ends = [0, *(r.step for r in traces[0].rounds)]
    assert [b - a for a, b in pairwise(ends)] == [r.period for r in traces[0].rounds] == expected


@dataclass
class Noting(Period):
    """Notes what it is asked with."""

    steps: int = 3

    def __post_init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def __call__(self, facts: RunFacts) -> float:
        self.seen.append((facts.step, facts.lr, facts.peak_lr, facts.warmup_steps, facts.steps_left))
        return 2 if facts.step < 4 else self.steps


@pytest.mark.parametrize("rounds", ["lockstep", "pooled"])
def test_a_period_is_asked_with_the_facts_of_a_rounds_first_step(on_ranks: Ranks, rounds: Any) -> None:
    def body(comm: Communicator) -> list[tuple[Any, ...]]:
        period = Noting()
        loop(comm, LocalSGD(period=period, rounds=rounds), drops, steps=14)
        return period.seen

    starting = (0, 2, 4, 7, 10, 13)
    expected = [(t, drops(t), PEAK, WARMUP, 14 - t) for t in starting]
    for seen in on_ranks(body):
        assert seen[: len(expected)] == expected
        assert rounds == "pooled" or len(seen) == len(expected)  # a rank that leaves a pool asks what the others have


def begin(comm: Communicator, method: AveragingMethod, steps: int) -> tuple[Run, nn.Module, torch.optim.SGD]:
    model = twin(starts(comm.size)[comm.rank])
    optimizer = torch.optim.SGD(model.parameters(), PEAK, momentum=0.9)
    probe = iter_of(lambda n: loss_of(model, batch(comm.rank, 1000 + n)))
    return method.build(comm, ParameterVector(model), optimizer, probe, facts=facts(steps)), model, optimizer


def iter_of(make: Callable[[int], Any]) -> Callable[[], Any]:
    numbers = iter(range(10**6))
    return lambda: make(next(numbers))


def loss_of(model: nn.Module, batch: tuple[Any, ...]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(torch.as_tensor(batch[0])), torch.as_tensor(batch[1]))


def loop(
    comm: Communicator,
    method: AveragingMethod,
    lr: Callable[[int], float],
    steps: int = STEPS,
    resume: tuple[int, ...] = (),
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """A loop of one's own, given up for a fresh build after some steps; its parameters, and step and H of rounds."""
    run, model, optimizer = begin(comm, method, steps)
    seen: list[tuple[int, int]] = []
    run.synchronizers[-1].on_round = lambda r: seen.append((r.step, r.period))
    made = 0
    while run.facts.step < steps:
        for group in optimizer.param_groups:
            group["lr"] = lr(run.facts.step)
        stepped = run.before_step()
        if stepped:
            optimizer.zero_grad()
            loss = loss_of(model, batch(comm.rank, made))
            loss.backward()
            optimizer.step()
            run.after_step(loss.detach())
            made += 1
        if made in resume and (not run.pooled or not stepped):
            resume = tuple(step for step in resume if step != made)
            states = copy.deepcopy((model.state_dict(), optimizer.state_dict(), run.state_dict()))
            run.close()
            run, model, optimizer = begin(comm, method, steps)
            run.synchronizers[-1].on_round = lambda r: seen.append((r.step, r.period))
            for part, state in zip((model, optimizer, run), states, strict=True):
                part.load_state_dict(state)
    run.finish()
    return torch.cat([p.detach().flatten() for p in model.parameters()]).numpy().copy(), seen


@pytest.mark.parametrize("rounds", ["lockstep", "pooled"])
@pytest.mark.parametrize("name", kinds("pools"))
def test_qsr_that_does_not_grow_is_a_constant_period_bit_for_bit(on_ranks: Ranks, name: str, rounds: Any) -> None:
    def body(comm: Communicator) -> list[Any]:
        return [
            loop(comm, replace(METHODS[name].ours, period=period, rounds=rounds), cosine, steps=14)
            for period in (4, Constant(4), QSR(4, 0.0))
        ]

    if rounds == "pooled" and on_ranks.backend != "simulated":
        pytest.skip("who makes which step is decided by speed")
    for number, *others in on_ranks(body):
        assert all((x == number[0]).all() and seen == number[1] for x, seen in others)
        assert [step for step, _ in number[1]] == [4, 8, 12, 14]


@pytest.mark.parametrize("rounds", ["lockstep", "pooled"])
@pytest.mark.parametrize("name", ["LGRAWA", "LSGD"])
def test_a_run_that_is_resumed_has_the_rounds_of_one_that_is_not(name: str, rounds: Any) -> None:
    """In the middle of a round, where one has just ended, and where the learning rate has just dropped."""
    method = replace(METHODS[name].ours, period=QSR(4, 0.8), rounds=rounds, local_momentum="average")

    def body(comm: Communicator) -> list[Any]:
        within = (4, 6, 12, 20) if rounds == "lockstep" else (4, 12, 28)
        return [loop(comm, method, drops), loop(comm, method, drops, resume=within)]

    for (x, seen), (y, again) in simulate(3, body):
        if name == "LSGD" or rounds == "lockstep":
            assert seen == again == [(4, 4), (8, 4), (12, 4), (28, 16), (40, 12)]
        assert name == "LGRAWA" or (x == y).all()


@pytest.mark.parametrize("rounds", ["lockstep", "pooled"])
@pytest.mark.parametrize("method", [LocalSGD(period=math.inf), LGRAWA(period=Constant(math.inf), prox=0.5)], ids=str)
def test_without_end_there_is_one_round_at_the_last_step(on_ranks: Ranks, method: AveragingMethod, rounds: Any) -> None:
    def body(comm: Communicator) -> Any:
        return loop(comm, replace(method, rounds=rounds), cosine, steps=STEPS)[1]

    assert on_ranks(body) == [[(STEPS, STEPS)]] * on_ranks.size


def test_a_pool_without_end_ends_when_all_ranks_have_left(on_ranks: Ranks) -> None:
    def body(comm: Communicator) -> list[tuple[int, ...]]:
        vector = ParameterVector(nn.Linear(2, 1))
        optimizer = torch.optim.SGD(vector.parameters, 0.1)
        run = LocalSGD(period=math.inf, rounds="pooled").build(comm, vector, optimizer)
        made: list[tuple[int, ...]] = []
        run.synchronizers[0].on_round = lambda r: made.append((r.period, *r.made))
        for _ in range(5 + comm.rank):
            assert run.before_step()
            run.after_step()
        run.finish()
        return made

    counts = tuple(5 + rank for rank in range(on_ranks.size))
    assert on_ranks(body) == [[(sum(counts) // len(counts), *counts)]] * on_ranks.size


def test_a_scheduler_between_the_steps_of_a_distributed_optimizer(on_ranks: Ranks) -> None:
    """A script sets the rate after ``step()`` has returned: the round still has that of its own first step."""

    def body(comm: Communicator) -> list[int]:
        model = twin(starts(comm.size)[comm.rank])
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda t: (0.25, 0.5, 1.0)[min(t // 2, 2)] / (1 + (t >= 8))
        )
        given = RunFacts(warmup_steps=4, peak_lr=0.1, total_steps=22)
        optimizer = DistributedOptimizer(optimizer, model, LocalSGD(period=QSR(4, 0.2)), comm=comm, facts=given)
        seen: list[int] = []
        optimizer.run.synchronizers[0].on_round = lambda r: seen.append(r.period)
        for step in range(22):
            optimizer.zero_grad()
            loss_of(model, batch(comm.rank, step)).backward()
            optimizer.step()
            scheduler.step()
        optimizer.run.finish()
        return seen

    assert on_ranks(body) == [[4, 4, 14]] * on_ranks.size


@dataclass
class Wrong(Period):
    steps: float = 0

    def __call__(self, facts: RunFacts) -> float:
        return self.steps


@pytest.mark.parametrize("steps", [0, 2.5, math.nan])
def test_an_own_period_that_gives_none_is_named(on_ranks: Ranks, steps: float) -> None:
    def body(comm: Communicator) -> None:
        with pytest.raises(
            ConfigError, match=rf"period is Wrong\(.*\), which gave {steps} at step 0: must be at least 1"
        ):
            loop(comm, LocalSGD(period=Wrong(steps)), cosine)

    on_ranks(body)


def test_of_learning_rates_that_differ_it_is_these_that_are_named_and_not_the_period(on_several_ranks: Ranks) -> None:
    """By QSR they make periods differ."""

    def body(comm: Communicator) -> None:
        with pytest.raises(RanksDisagree, match="has learning rate 0"):
            loop(comm, LocalSGD(period=QSR(4, 0.2), rounds="pooled"), lambda step: 0.1 / (1 + comm.rank))

    on_several_ranks(body)


def test_an_own_period_that_gives_none_is_named_by_a_dry_run() -> None:
    config = parse([*LINE, "--method=LocalSGD"])
    config.method = LocalSGD(period=Wrong())
    with pytest.raises(ConfigError, match=r"which gave 0 at step 0: must be at least 1"):
        plan(config, 2, 2)


# ---------------------------------------------------------------------------------------------------------
# In a configuration.
# ---------------------------------------------------------------------------------------------------------

LINE = ("--model=own.Line", "--data=own.Numbers", "--loss=MSELoss", "--metric=own.R2", "--budget.steps=40")


@pytest.mark.parametrize(
    ("words", "period"),
    [
        (["--method.period", "QSR", "--method.period.alpha", ".3"], QSR(4, 0.3)),
        (["--method.period=hpc_grawa.periods.QSR", "--method.period.base=2"], QSR(2)),
        (["--method.period={class_path: Sqrt, init_args: {c: 0.5}}"], Sqrt(0.5)),
        (["--method.period=Constant", "--method.period.steps=.inf"], Constant(math.inf)),
        (["--method.period=SWAP", "--method.period.switch=2", "--method.period.unit=epochs"], SWAP(2.0, "epochs")),
        (["--method.period=QSR", "--method.period=7"], 7),
        (["--method.period=QSR", "--method.period=Sqrt"], Sqrt()),
        (["--method=EASGD", "--method.period=QSR"], QSR()),
        (["--method.period.alpha=.3", "--method.period", "QSR"], QSR(4, 0.3)),
        (["--method.period=7", "--method.period.class_path=QSR"], QSR()),
        (["--method.period=PostLocal", "--method.period=SWAP", "--method.period.switch=2"], SWAP(2.0)),
    ],
)
def test_a_period_is_a_number_or_a_class(words: list[str], period: Any, tmp_path: Path) -> None:
    config = parse([*LINE, *words])
    assert isinstance(config.method, AveragingMethod) and config.method.period == period
    (tmp_path / "config.yaml").write_text(config.text)
    again = parse([f"--config={tmp_path / 'config.yaml'}"])
    assert isinstance(again.method, AveragingMethod) and again.method.period == period


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--method.period=two"], ("method.period is two", "whole number", "QSR", "import path of a class")),
        (
            ["--method.period=torch.nn.Linear"],
            ("period is torch.nn.Linear", "whole number", "derived from Period"),
        ),
        (
            ["--method.period=QSR", "--method.period.alhpa=1"],
            ("alhpa is no", "did you mean method.period.alpha?"),
        ),
        (["--method.period=QSR", "--method.period.alpha=x"], ("method.period.alpha is x: must be a number",)),
        (["--method.period=QSR", "--method.period.base=0"], ("method.period.base is 0: must be at least 1",)),
        (["--method.period=null"], ("method.period is null: must be a whole number or a Period",)),
        (
            ["--method.period={class_path: QSR, init_args: {alpha: null}}"],
            ("alpha is null: must be a number",),
        ),
        (["--method.period={alpha: 1}"], ("method.period is", "must be a whole number or a class (class_path: CLASS")),
        (["--method.period=SWAP"], ("method.period.switch is missing: SWAP needs it",)),
        (["--method.period.alpha=1"], ("method.period.alpha is", "must come with a class, --method.period")),
        (["--method=LSGD", "--method.period=9", "--method.group_period=2"], ("method.group_period is 2", "divide")),
        (["--method.period=hpc_grawa.periods.Period"], ("method.period is hpc_grawa.periods.Period: must be a whole",)),
        (["--method.period=[]"], ("method.period is []: must be a whole number or a class derived from Period\n",)),
        (["--method.period="], ("method.period: must be a whole number or", "import path of a class (package.module.")),
        (["--method.period=Constant", "--method.period.steps=null"], ("method.period.steps is null: must be a whole",)),
        (["--method.period.class_path=NoSuch"], ("method.period is NoSuch: must be Constant, PostLocal, QSR",)),
        (["--method.period={class_path: QSR, init_args: 3}"], ("method.period.init_args is 3: must hold settings",)),
        (
            ["--method=DataParallel", "--method.period=QSR"],
            ("method.period is no setting of DataParallel: must be one of bucket_mb",),
        ),
    ],
)
def test_what_is_wrong_is_one_line(
    words: list[str], parts: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse([*LINE, *words])
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(part in error for part in parts), error


def test_another_class_for_a_period_forgets_the_settings_of_the_one_before(tmp_path: Path) -> None:
    """A number of steps after the switch would be one before it, which is another method."""

    def files(*periods: str) -> list[str]:
        for number, period in enumerate(periods):
            said = f"method: {{class_path: EASGD, init_args: {{period: {period}}}}}"
            (tmp_path / f"{number}.yaml").write_text(said)
        return [f"--config={tmp_path / f'{number}.yaml'}" for number in range(len(periods))]

    def period(*words: str) -> Any:
        method = parse([*LINE, *words]).method
        assert isinstance(method, AveragingMethod)
        return method.period

    post = "{class_path: PostLocal, init_args: {switch: 1, unit: epochs, steps: 9}}"
    again = files(post, "{class_path: hpc_grawa.periods.PostLocal, init_args: {steps: 3}}")
    assert period(*again) == PostLocal(1.0, "epochs", steps=3)
    assert period(*files(post), "--method.period=PostLocal", "--method.period.switch=2") == PostLocal(2.0, "epochs", 9)
    assert period(*files(post), "--method.period=SWAP", "--method.period.switch=2") == SWAP(2.0)
    assert period(*files(post, "{class_path: SWAP, init_args: {switch: 2}}")) == SWAP(2.0)
    assert period(*files(post, "QSR")) == period(*files(post), "--method.period", "{class_path: QSR}") == QSR()
    assert period(*files(post, "5")) == period(*files(post), "--method.period=5") == 5
    (tmp_path / "lines.yaml").write_text("methods: {EASGD: {method.period.alpha: .3, method.period: QSR}}")
    lines = f"--config={tmp_path / 'lines.yaml'}"
    assert period(*files(post), lines) == QSR(alpha=0.3)
    (tmp_path / "lines.yaml").write_text("methods: {EASGD: {method.period.steps: 4}}")
    assert period(*files(post), lines) == PostLocal(1.0, "epochs", 4)


def test_pooled_rounds_that_the_clock_may_end_have_a_number() -> None:
    words = [*LINE, "--budget.seconds=5", "--method.period=QSR"]
    for steps in ("null", "1000000"):
        parse([*words, f"--budget.steps={steps}"]).check(2)
        with pytest.raises(ConfigError, match=r"method\.period is QSR.*must be a number under pooled rounds"):
            parse([*words, f"--budget.steps={steps}", "--method.rounds=pooled"]).check(2)
    parse([*LINE, "--method.period=QSR", "--method.rounds=pooled"]).check(2)


@pytest.mark.parametrize("rounds", ["lockstep", "pooled"])
def test_a_run_and_its_dry_run_have_the_rounds_of_the_schedule(rounds: str) -> None:
    words = ["--schedule=Step", "--schedule.milestones=[12, 24]", "--schedule.gamma=0.5", "--schedule.unit=steps"]
    words += ["--schedule.warmup=6", "--optimizer.lr=0.04", "--method=LocalSGD", f"--method.rounds={rounds}"]
    config = parse([*LINE, *words, "--method.period=QSR", "--method.period.alpha=0.08", "--method.period.base=4"])
    summary = simulate(4, lambda comm: fit(config, comm, speaks=False))[0]
    assert (summary["steps"], summary["rounds"]) == (40, 5)  # 4, 4, 4, 16, 12
    halves = ["--optimizer.lr=0.08", "--optimizer.groups=[{match: '*', lr_factor: 0.5}]"]  # η is the first group's
    told = plan(parse([*LINE, *words, *halves, "--method.period=QSR", "--method.period.alpha=0.08"]), 4, 4)
    assert plan(config, 4, 4).splitlines()[3:7] == told.splitlines()[3:7]
    epoch = round(40 / summary["epochs"])
    assert f"{epoch / 8:.4g} per epoch, every 4 (at 0%), 4 (at 25%), 16 (at 50%), 12 (at 75%), 12 (at 100%)" in told
