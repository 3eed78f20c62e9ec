"""Ranks that must agree and do not; and decisions that every rank takes at the same step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Ranks
from launcher import launch
from torch import nn

from hpc_grawa import LGRAWA, DataParallel, LocalSGD, Method, ParameterVector, Run
from hpc_grawa.comm import Communicator
from hpc_grawa.errors import RanksDisagree
from hpc_grawa.periods import Constant, PostLocal
from hpc_grawa.schedules import RunFacts


def build(comm: Communicator, model: nn.Module, method: Method, lr: float = 0.1, **more: Any) -> Run:
    vector = ParameterVector(model)
    optimizer = torch.optim.SGD(vector.parameters, lr)
    return method.build(comm, vector, optimizer, lambda: sum(p.sum() for p in model.parameters()), **more)


# ---------------------------------------------------------------------------------------------------------
# Before training.
# ---------------------------------------------------------------------------------------------------------


def step_of(run: Run) -> None:
    """A local step without a gradient, shared where the method shares."""
    run.aggregator.zero_grad(run.optimizer)
    run.aggregator.start()
    run.aggregator.finish()
    run.after_step()


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    return model


class Pair(nn.Module):
    def __init__(self, order: str) -> None:
        super().__init__()
        for name in order:
            self.register_parameter(name, nn.Parameter(torch.zeros(2)))


def net(**kinds: Any) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 3, **kinds), nn.BatchNorm2d(3, **kinds))


def with_buffer(size: int) -> nn.Module:
    model = net()
    model.register_buffer("extra", torch.zeros(size))
    return model


Odd = tuple[Callable[[], nn.Module], Callable[[], nn.Module], str]
#: The model of rank 0, that of the odd rank, and the difference as the odd rank has it | as rank 0 has it.
MODELS: dict[str, Odd] = {
    "order": (lambda: Pair("ab"), lambda: Pair("ba"), r"has parameter 'b' .*, rank 0 has parameter 'a'"),
    "names": (lambda: Pair("ab"), lambda: Pair("ac"), r"has parameter 'c' .*, rank 0 has parameter 'b'"),
    "number": (lambda: Pair("ab"), lambda: Pair("abc"), r"has parameter 'c' .*, rank 0 has nothing"),
    "shapes": (lambda: nn.Linear(2, 3), lambda: nn.Linear(2, 4), r"'weight' \(4, 2\).*rank 0.*'weight' \(3, 2\)"),
    "dtype": (net, lambda: net(dtype=torch.float64), r"torch\.float64.*rank 0.*torch\.float32"),
    "kind of device": (net, lambda: net(device="meta"), r"has a model on meta, rank 0 has a model on cpu"),
    "memory format": (
        net,
        lambda: net().to(memory_format=torch.channels_last),
        r"strides \(18, 1, 6, 2\), rank 0 .* strides \(18, 9, 3, 1\)",
    ),
    "frozen": (
        lambda: frozen().requires_grad_(True),
        frozen,
        r"has parameter '1\.weight'.*rank 0 has parameter '0\.weight'",
    ),
    "buffers": (lambda: with_buffer(3), lambda: with_buffer(4), r"'extra' \(4,\).*rank 0 has buffer 'extra' \(3,\)"),
}


@pytest.mark.parametrize("difference", MODELS)
def test_models_that_differ_are_an_error_on_all_ranks(on_several_ranks: Ranks, difference: str) -> None:
    one, other, message = MODELS[difference]
    strange = on_several_ranks.size - 1

    def body(comm: Communicator) -> str:
        make = other if comm.rank == strange else one
        with pytest.raises(RanksDisagree, match=message) as error:
            build(comm, make(), LocalSGD())
        return str(error.value)

    messages = on_several_ranks(body)
    assert set(messages) == {messages[0]} and f"rank {strange} differs from rank 0 before training" in messages[0]


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        (LGRAWA(period=32), LGRAWA(period=16), r"LGRAWA\(.*period=16.*rank 0 has method LGRAWA\(.*period=32"),
        (LGRAWA(layers="module"), LGRAWA(), r"layers='tensor'.*rank 0 .*layers='module'"),
        (LocalSGD(), DataParallel(), r"method DataParallel\(.*rank 0 has method LocalSGD\("),
    ],
)
def test_methods_that_differ_are_an_error_on_all_ranks(
    on_several_ranks: Ranks, ours: Method, theirs: Method, message: str
) -> None:
    def body(comm: Communicator) -> str:
        with pytest.raises(RanksDisagree, match=message) as error:
            build(comm, nn.Linear(2, 3), theirs if comm.rank == 1 else ours)
        return str(error.value)

    messages = on_several_ranks(body)
    assert set(messages) == {messages[0]} and "rank 1 differs" in messages[0]


@pytest.mark.parametrize(
    ("named", "other"), [("peak_lr", 0.3), ("warmup_steps", 4), ("total_steps", 11), ("steps_per_epoch", 11)]
)
def test_facts_that_differ_are_an_error_on_all_ranks(on_several_ranks: Ranks, named: str, other: Any) -> None:
    """By them ranks would share gradients of, or average, different steps: shards of a batch more make such epochs."""
    alike: dict[str, Any] = {"peak_lr": 0.1, "warmup_steps": 2, "total_steps": 10, "steps_per_epoch": 10}

    def body(comm: Communicator) -> str:
        facts = RunFacts(**(alike | {named: other} if comm.rank == 1 else alike))
        method = LocalSGD(period=PostLocal(1, "epochs"), sharing=DataParallel())
        with pytest.raises(RanksDisagree) as error:
            build(comm, nn.Linear(2, 3), method, facts=facts)
        return str(error.value)

    messages = on_several_ranks(body)
    assert set(messages) == {messages[0]}
    assert f"rank 1 has facts.{named} {other} (all ranks need the same: " in messages[0]
    assert f"rank 0 has facts.{named} {alike[named]} " in messages[0]


def test_smoke_ranks_that_agree_may_start(on_ranks: Ranks) -> None:
    assert on_ranks(lambda comm: build(comm, net(), LGRAWA()).comm.size) == [on_ranks.size] * on_ranks.size


# ---------------------------------------------------------------------------------------------------------
# While training.
# ---------------------------------------------------------------------------------------------------------


def unequal_lr(run: Run) -> None:
    run.optimizer.param_groups[0]["lr"] = 0.3


def unequal_period(run: Run) -> None:
    run.synchronizers[0].ask = Constant(7)  # the other ranks' word of control_every = 5 meets its round


def longer_period(run: Run) -> None:
    run.synchronizers[0].ask = Constant(1000)


def unequal_step(run: Run) -> None:
    run.facts.step += 1


@pytest.mark.parametrize(
    ("make_odd", "method", "message"),
    [
        (unequal_lr, LGRAWA(period=4), "rank 1 has learning rate 0.3, rank 0 has 0.1"),
        (unequal_lr, LocalSGD(period=100), "rank 1 has learning rate 0.3, rank 0 has 0.1"),
        (unequal_lr, DataParallel(), "rank 1 has learning rate 0.3, rank 0 has 0.1"),
        (unequal_period, LGRAWA(period=4), "rank 1 has local step 5, rank 0 has 4"),
        (unequal_period, LGRAWA(period=12), "rank 1 has period 7, rank 0 has 12"),
        (longer_period, LGRAWA(period=4), "rank 1 has local step 5, rank 0 has 4"),
        (unequal_step, LGRAWA(period=4), "rank 1 has local step 5, rank 0 has 4"),
        (unequal_step, LocalSGD(period=100), "rank 1 has local step 17, rank 0 has 16"),
    ],
)
def test_ranks_that_part_are_an_error_on_all_ranks(
    on_several_ranks: Ranks, make_odd: Callable[[Run], None], method: Method, message: str
) -> None:
    """With `control_every` 5, whether the odd rank's word meets a round's, a word alone, or the last one."""

    def body(comm: Communicator) -> str:
        run = build(comm, nn.Linear(2, 3), method, control_every=5)
        if comm.rank == 1:
            make_odd(run)
        with pytest.raises(RanksDisagree, match=message) as error:
            for _ in range(16):
                step_of(run)
            run.finish()
        return str(error.value)

    messages = on_several_ranks(body)
    assert set(messages) == {messages[0]}


def test_a_short_run_agrees_at_its_end(on_several_ranks: Ranks) -> None:
    """Data-parallel ranks that never exchange a word while they train do so in finish()."""

    def body(comm: Communicator) -> None:
        run = build(comm, nn.Linear(2, 3), DataParallel(), lr=0.1 * (comm.rank + 1))
        step_of(run)
        with pytest.raises(RanksDisagree, match=r"rank 1 has learning rate 0\.2"):
            run.finish()

    on_several_ranks(body)


class Recorded:
    """What a rank knows after each step."""

    def __init__(self) -> None:
        self.stop: list[int] = []
        self.written: list[float] = []
        self.seconds: list[float] = []


def watch(comm: Communicator, method: Method, steps: int, act: Callable[[Run, int], None]) -> Recorded:
    seen = Recorded()
    run = build(comm, nn.Linear(2, 3), method, control_every=5, clock=lambda: 100 * comm.rank + run.facts.step)
    for step in range(1, steps + 1):
        act(run, step)
        step_of(run)
        seen.seconds.append(run.facts.seconds)
        if run.control.stop:
            seen.stop.append(step)
        seen.written.append(run.control.all_written)
    return seen


@pytest.mark.parametrize(
    ("method", "read", "words"),
    [
        (LocalSGD(period=4), 4, [4, 8, 12, 16, 20]),  # with the next round, and no words between
        (LocalSGD(period=5), 5, [5, 10, 15, 20]),
        (LocalSGD(period=13), 10, [5, 10, 13, 15, 20]),  # sent at 5, read at 10
        (LocalSGD(period=1000), 10, [5, 10, 15, 20]),
        (DataParallel(), 10, [5, 10, 15, 20]),
    ],
    ids=str,
)
def test_what_a_rank_says_reaches_all_at_the_same_step(
    on_ranks: Ranks, method: Method, read: int, words: list[int]
) -> None:
    """The wish of one to stop, and of what they have written what all have."""
    last = on_ranks.size - 1

    def act(run: Run, step: int) -> None:
        if step == 3:
            run.control.wants_stop = run.comm.rank == last
            run.control.written = lambda: 3 + run.comm.rank

    def body(comm: Communicator) -> tuple[list[int], list[float], int]:
        seen = watch(comm, method, 20, act)
        return seen.stop, seen.written, comm.meter.calls["control"]

    expected = (list(range(read, 21)), [-1] * (read - 1) + [3] * (21 - read), len(words))
    assert on_ranks(body) == [expected] * on_ranks.size


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (LocalSGD(period=4), [0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12]),
        (DataParallel(), [0, 0, 0, 0, 0, 0, 0, 0, 0, 5, 5, 5]),
    ],
)
def test_the_clock_is_rank_0s_on_all_ranks(on_ranks: Ranks, method: Method, expected: list[float]) -> None:
    assert on_ranks(lambda comm: watch(comm, method, 12, lambda run, step: None).seconds) == [expected] * on_ranks.size


@pytest.mark.parametrize(
    ("method", "read"),
    [
        (DataParallel(), 20),  # sent at 10
        (LocalSGD(period=PostLocal(switch=1000, steps=200), sharing=DataParallel()), 20),
        (LocalSGD(period=PostLocal(switch=5, steps=1000), sharing=DataParallel()), 200),
        (LocalSGD(period=200), 200),
        (LocalSGD(period=1000), 200),  # sent at 100
    ],
    ids=str,
)
def test_without_a_word_of_how_often_words_travel_often_where_gradients_are_shared(
    on_several_ranks: Ranks, method: Method, read: int
) -> None:
    """So that a signal or a limit in seconds ends a run of slow steps within the time that SLURM leaves it."""

    def body(comm: Communicator) -> int:
        run = build(comm, nn.Linear(2, 3), method, facts=RunFacts(total_steps=2000))
        run.control.wants_stop = comm.rank == 1
        while not run.control.stop:
            step_of(run)
        return run.facts.step

    assert on_several_ranks(body) == [read] * on_several_ranks.size


LOOP = """
import torch, hpc_grawa
from hpc_grawa.comm import connect
comm = connect("{backend}")
vector = hpc_grawa.ParameterVector(torch.nn.Linear(2, 3))
optimizer = torch.optim.SGD(vector.parameters, 0.1 * (1 + comm.rank))
run = hpc_grawa.LocalSGD(period=4).build(comm, vector, optimizer)
for _ in range(100):
    run.after_step()
print("reached the end")
"""


@pytest.mark.parametrize("backend", ["mpi", pytest.param("horovod", marks=pytest.mark.slow)])
def test_a_job_of_ranks_that_disagree_ends_with_the_named_error(backend: str) -> None:
    if backend == "horovod":
        pytest.importorskip("horovod.torch")
    done = launch(program=("-c", LOOP.format(backend=backend)), ranks=2)
    assert done.status != 0
    assert "RanksDisagree: rank 1 has learning rate 0.2, rank 0 has 0.1" in done.said, done.said
    assert "reached the end" not in done.said
