"""Runs that share gradients first and average afterwards: post-local SGD and SWAP, of any method that averages."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Ranks
from table import METHODS, PERIOD, is_, kinds, plain
from torch import nn
from worlds import assert_follows, batch, nesterov, replay, run_method, starts, twin

from hpc_grawa import DataParallel, DistributedOptimizer, LocalSGD, ParameterVector, simulate
from hpc_grawa.aggregation import Bucketed
from hpc_grawa.cli.parsing import parse
from hpc_grawa.comm import Communicator
from hpc_grawa.errors import ConfigError, NonFinite
from hpc_grawa.methods import AveragingMethod, Method
from hpc_grawa.periods import QSR, SWAP, Period, PostLocal
from hpc_grawa.schedules import RunFacts
from hpc_grawa.training.loop import fit
from hpc_grawa.training.worker import Worker

STEPS, SWITCH = 14, 5
SHARING = DataParallel(bucket_mb=1e-4)


def ours(name: str, period: Period, **settings: Any) -> AveragingMethod:
    method = replace(METHODS[name].ours, period=period, sharing=SHARING, **settings)
    assert isinstance(method, AveragingMethod)
    return method


def decaying(step: int) -> float:
    return 0.2 if step < 8 else 0.05


# ---------------------------------------------------------------------------------------------------------
# The oracle and identities.
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in plain("averages") if not is_(name, "levels")])
def test_follows_the_oracle(on_ranks: Ranks, name: str) -> None:
    """Momenta go on; centers, scores and probes begin at the switch."""
    method, options = ours(name, PostLocal(SWITCH, steps=PERIOD)), {"optimizer": nesterov, "lr": decaying}
    traces = on_ranks(lambda comm: run_method(comm, method, steps=STEPS, **options))
    expected = replay(METHODS[name].oracle, on_ranks.size, STEPS, PERIOD, shared=SWITCH, **options)
    assert_follows(traces, expected, 1e-12)
    assert [r.step for r in traces[0].rounds] == [9, 13, 14]


@pytest.mark.parametrize("name", kinds("averages", "uniform"))
def test_swap_has_one_round_at_the_end(on_ranks: Ranks, name: str) -> None:
    traces = on_ranks(lambda comm: run_method(comm, ours(name, SWAP(SWITCH)), steps=STEPS, optimizer=nesterov))
    expected = replay(METHODS[name].oracle, on_ranks.size, STEPS, 1000, shared=SWITCH, optimizer=nesterov)
    assert_follows(traces, expected, 1e-12)
    assert [r.step for r in traces[0].rounds] == [STEPS]


def same(on_ranks: Ranks, one: Method, other: Method) -> None:
    def body(comm: Communicator) -> list[Any]:
        return [np.array(run_method(comm, m, steps=STEPS, optimizer=nesterov).parameters) for m in (one, other)]

    for first, second in on_ranks(body):
        assert np.array_equal(first, second)


@pytest.mark.parametrize("name", kinds("averages"))
def test_without_shared_steps_it_is_the_method_and_without_others_data_parallel_bit_for_bit(
    on_ranks: Ranks, name: str
) -> None:
    same(on_ranks, ours(name, PostLocal(0, steps=PERIOD)), METHODS[name].ours)
    same(on_ranks, ours(name, PostLocal(STEPS, steps=PERIOD)), SHARING)


@pytest.mark.parametrize("rounds", ["lockstep", "pooled"])
def test_while_gradients_are_shared_ranks_are_alike_and_the_center_is_what_they_are(
    on_ranks: Ranks, rounds: Any
) -> None:
    """Steps are counted one by one; a pool begins at the switch."""

    def body(comm: Communicator) -> list[Any]:
        model = twin(starts(comm.size)[comm.rank])
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        method = LocalSGD(period=PostLocal(3, steps=2), sharing=SHARING, rounds=rounds)
        run = method.build(comm, ParameterVector(model), optimizer)
        seen: list[Any] = []
        run.on_round = lambda r: seen.append((r.number, r.step, r.made))
        numbers = iter(range(100))
        closure = run.closure(lambda: loss_of(model, batch(comm.rank, next(numbers))))
        made: list[Any] = []
        while run.facts.step < 7:
            if run.before_step():
                made.append((run.aggregator.shares, run.pooled, run.facts.step))
                run.after_step(optimizer.step(closure))
                if run.aggregator.shares:
                    assert torch.equal(run.center, run.vector.data)
                    assert same_on_all(comm, run.center)
        run.finish()
        assert same_on_all(comm, run.center)
        return [made[:3], [entry[:2] for entry in seen[:2]], [entry[:2] for entry in made[3:]]]

    first = [(True, False, step) for step in range(3)]
    results, later = on_ranks(body), (False, rounds == "pooled")
    assert [result[:2] for result in results] == [[first, [(1, 5), (2, 7)]]] * on_ranks.size
    if rounds == "lockstep":
        assert all(steps == [later] * 4 for *_, steps in results)
    else:  # a rank may make none of a pool's steps, all together make them
        assert [step for *_, steps in results for step in steps] == [later] * 4 * on_ranks.size


def loss_of(model: nn.Module, batch: tuple[Any, ...]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(torch.as_tensor(batch[0])), torch.as_tensor(batch[1]))


def same_on_all(comm: Communicator, x: torch.Tensor) -> bool:
    rows = comm.allgather(x.clone(), "evaluate").wait()
    return bool((rows == rows[0]).all())


def test_nothing_of_sharing_remains_after_the_switch(on_ranks: Ranks) -> None:
    """No hooks, no messages, and gradients are again what the optimizer makes of them."""

    def body(comm: Communicator) -> None:
        model = twin(starts(comm.size)[comm.rank])
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        run = LocalSGD(period=PostLocal(1, steps=50), sharing=SHARING).build(comm, ParameterVector(model), optimizer)
        closure = run.closure(lambda: loss_of(model, batch(comm.rank, 0)))
        sharing = run.aggregator
        assert isinstance(sharing, Bucketed)
        run.after_step(optimizer.step(closure))
        sent = comm.meter.bytes_sent["gradient"]
        assert run.aggregator is not sharing and not sharing.shares
        for _ in range(3):
            run.after_step(optimizer.step(closure))
        assert comm.meter.bytes_sent["gradient"] == sent
        assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
        run.finish()

    on_ranks(body)


def test_a_switch_in_seconds_is_at_the_same_step_on_all_ranks(on_ranks: Ranks) -> None:
    """By rank 0's seconds, as of the last control word: it leaves at every second step and is read two steps later."""

    def body(comm: Communicator) -> None:
        vector = ParameterVector(twin(starts(comm.size)[comm.rank]))
        optimizer, facts = torch.optim.SGD(vector.parameters, 0.1), RunFacts()
        method = LocalSGD(period=PostLocal(4, "seconds", steps=2), sharing=SHARING)
        pace = 1 if comm.rank == 0 else 100  # another clock, by which it would have switched at once
        options: Any = {"clock": lambda: pace * facts.step, "facts": facts, "control_every": 2}
        run = method.build(comm, vector, optimizer, **options)
        rounds: list[int] = []
        run.on_round = lambda _: rounds.append(facts.step)
        closure = run.closure(lambda: loss_of(vector.model, batch(comm.rank, facts.step)))
        for _ in range(10):
            run.after_step(optimizer.step(closure))
        run.finish()
        assert rounds == [8, 10]

    on_ranks(body)


# ---------------------------------------------------------------------------------------------------------
# Resume, the one line of a Horovod script, the training program.
# ---------------------------------------------------------------------------------------------------------


def line(
    comm: Communicator, method: AveragingMethod, lr: Callable[[int], float], resume: tuple[int, ...] = ()
) -> list[Any]:
    """A Horovod script's loop, given up for a fresh one after some steps; its parameters after each step."""

    def begin() -> tuple[nn.Module, torch.optim.SGD, Any]:
        model = twin(starts(comm.size)[comm.rank])
        sgd = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=1e-2)
        return model, sgd, DistributedOptimizer(sgd, model, method, comm=comm)

    model, sgd, optimizer = begin()
    seen = []
    for step in range(STEPS):
        if step in resume:
            states = copy.deepcopy([part.state_dict() for part in (model, sgd, optimizer.run)])
            optimizer.run.close()
            model, sgd, optimizer = begin()
            for part, state in zip((model, sgd, optimizer.run), states, strict=True):
                part.load_state_dict(state)
        for group in sgd.param_groups:
            group["lr"] = lr(step)
        optimizer.zero_grad()
        loss_of(model, batch(comm.rank, step)).backward()
        optimizer.step()
        if step == STEPS - 1:
            optimizer.run.finish()
        seen.append(optimizer.run.vector.data.numpy().copy())
    return seen


def test_a_distributed_optimizer_goes_over_the_switch_and_is_resumed_on_either_side(on_ranks: Ranks) -> None:
    method = ours("LocalLGRAWA", PostLocal(SWITCH, steps=PERIOD))

    def body(comm: Communicator) -> list[Any]:
        whole = line(comm, method, decaying)
        for resumes in ((2, 9), (SWITCH - 1,), (SWITCH,), (SWITCH + 1, 11)):
            assert np.array_equal(line(comm, method, decaying, resumes), whole)
        return whole

    expected = replay(
        METHODS["LocalLGRAWA"].oracle, on_ranks.size, STEPS, PERIOD, decaying, shared=SWITCH, optimizer=nesterov
    )
    for rank, seen in enumerate(on_ranks(body)):
        for step, parameters in zip(expected.steps, seen, strict=True):
            np.testing.assert_allclose(parameters, step.parameters[rank], rtol=1e-12, atol=1e-12)


WORDS = (
    *("--model=own.Line", "--data=own.Numbers", "--loss=MSELoss", "--metric=own.R2", "--optimizer.lr=0.05"),
    *("--budget.steps=16", "--method.period=PostLocal", "--method.sharing=DataParallel", "--eval.unit=steps"),
)


class Cut(Exception):
    pass


def cut_off(cut: int, run: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a run of the trainer fail before the first step from that number on."""
    step = Worker.step

    def failing(worker: Worker) -> Any:
        if worker.facts.step >= cut:
            raise Cut
        return step(worker)

    with monkeypatch.context() as patched, pytest.raises(Cut):
        patched.setattr(Worker, "step", failing)
        run()


@pytest.mark.parametrize("rounds", ["lockstep", "pooled"])
@pytest.mark.parametrize("cut", [3, 6, 7, 11])
def test_a_run_cut_off_on_either_side_of_the_switch_equals_one_that_was_not(
    cut: int, rounds: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--method=LGRAWA", "--method.period.switch=6", "--method.period.steps=4", f"--method.rounds={rounds}"]
    config = parse([*WORDS, *words, "--save.unit=steps", "--save.every=1", "--eval.every=5"])

    def run(folder: Path) -> Any:
        folder.mkdir(exist_ok=True)
        return simulate(
            3, lambda comm: fit(config, comm, new_folder=None if comm.rank else lambda: folder, speaks=False)
        )

    run(tmp_path / "whole")
    cut_off(cut, lambda: run(tmp_path / "cut"), monkeypatch)
    summary = run(tmp_path / "cut")[0]
    whole, other = (torch.load(tmp_path / name / "center.pt", weights_only=True) for name in ("whole", "cut"))
    assert all(torch.equal(whole[key], other[key]) for key in whole)
    records = [json.loads(entry) for entry in (tmp_path / "cut/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["event"] == "round"] == [10, 14, 16]
    assert [r["step"] for r in records if r["event"] == "evaluate"][:2] == [0, 5]
    assert (summary["steps"], summary["rounds"]) == (16, 3)


@pytest.mark.parametrize("cut", [4, 12])
def test_another_world_goes_on_from_either_side_of_the_switch(
    cut: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--method=EASGD", "--method.period.switch=6", "--method.period.steps=4", "--save.unit=steps"]
    config = parse([*WORDS, *words, "--save.every=1"])

    (tmp_path / "a").mkdir()

    def run(size: int) -> Any:
        def body(comm: Communicator) -> Any:
            return fit(
                config, comm, new_folder=None if comm.rank else lambda: tmp_path / "a", speaks=False, any_world=True
            )

        return simulate(size, body)

    cut_off(cut, lambda: run(3), monkeypatch)
    resumed = int((tmp_path / "a/checkpoints/latest").read_text())  # the newest may not be on the disk yet
    assert cut - 2 <= resumed <= cut
    summary = run(2)[0]
    records = [json.loads(entry) for entry in (tmp_path / "a/metrics.jsonl").read_text().splitlines()]
    seen = [(r["step"], len(r["ranks"])) for r in records if r["event"] == "round"]
    # The second world's first round begins where it goes on, or at the switch.
    assert seen == (
        [(10, 2), (14, 2), (16, 2)] if cut == 4 else [(10, 3), (resumed + 4, 2), (16, 2)][: 2 + (resumed < 12)]
    )
    assert summary["world_size"] == 2 and math.isfinite(summary["center_test_loss"])


# ---------------------------------------------------------------------------------------------------------
# In a configuration; and what cannot be is named.
# ---------------------------------------------------------------------------------------------------------

POST = ("--method=LocalSGD", *WORDS, "--method.period={class_path: PostLocal, init_args: {switch: 6}}")


@pytest.mark.parametrize(
    ("words", "sharing"),
    [
        ((), DataParallel()),
        (("--method.sharing.bucket_mb=3",), DataParallel(bucket_mb=3.0)),
        (("--method.sharing.on_nonfinite=skip", "--method.sharing=DataParallel"), DataParallel(on_nonfinite="skip")),
        (("--method.sharing={class_path: DataParallel, init_args: {bucket_mb: 3}}",), DataParallel(bucket_mb=3.0)),
        (("--method.sharing=null", "--method.period=7"), None),
    ],
)
def test_sharing_is_a_class_or_null(words: tuple[str, ...], sharing: Any, tmp_path: Path) -> None:
    config = parse([*POST, *words])
    assert isinstance(config.method, AveragingMethod) and config.method.sharing == sharing
    (tmp_path / "config.yaml").write_text(config.text)
    assert parse([f"--config={tmp_path / 'config.yaml'}"]).method == config.method


SHARING_METHODS = ", ".join(sorted(plain("shares")))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--method.sharing=DataParalel",
            f"method.sharing is DataParalel: must be {SHARING_METHODS} or the import path",
        ),
        ("--method.sharing=LGRAWA", f"method.sharing is LGRAWA: must be {SHARING_METHODS} or the import path"),
        ("--method.sharing.bucket_mb=-1", "method.sharing.bucket_mb is -1.0: must be a positive number of MiB"),
        ("--method.sharing.bucket_mb=x", "method.sharing.bucket_mb is x: must be a number"),
        (
            "--method.sharing.bucket=1",
            "method.sharing.bucket is no setting of DataParallel: did you mean method.sharing.bucket_mb?",
        ),
        (
            "--method.period=8",
            "method.sharing is DataParallel(bucket_mb=25.0, on_nonfinite='error', wire='exact'): must be null with",
        ),
        ("--method.group_period=3", "method.group_period is 3: must be null, or divide"),
    ],
)
def test_what_is_wrong_is_one_line(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--method.sharing=null", "--method.period=8"] if "group_period" in words else []
    with pytest.raises(SystemExit, match="2"):
        parse([*POST, *more, words])
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error, error


def build(comm: Communicator, method: Method, **options: Any) -> Any:
    vector = ParameterVector(nn.Linear(2, 1))
    return method.build(comm, vector, torch.optim.SGD(vector.parameters, 0.1), **options)


@pytest.mark.parametrize("period", [PostLocal(3), SWAP(3), SWAP(1, "epochs")], ids=str)
def test_periods_that_share_gradients_need_to_know_how(on_ranks: Ranks, period: Period) -> None:
    def body(comm: Communicator) -> None:
        with pytest.raises(ConfigError, match=r"method\.sharing is null: must say how .* switch .*\(DataParallel\)"):
            build(comm, LocalSGD(period=period), facts=RunFacts(steps_per_epoch=3))

    on_ranks(body)


@pytest.mark.parametrize("period", [8, QSR()], ids=str)
def test_sharing_without_a_switch_is_refused(period: Any) -> None:
    with pytest.raises(ConfigError, match=r"method\.sharing is DataParallel\(.*: must be null with method\.period"):
        LocalSGD(period=period, sharing=DataParallel())


def test_what_averaging_lacks_is_said_before_gradients_are_shared(on_ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        with pytest.raises(ValueError, match="LGRAWA scores ranks by the gradient of a fresh batch: pass probe=f"):
            build(comm, ours("LGRAWA", PostLocal(9)))
        with pytest.raises(ConfigError, match="every trainable tensor must be in one group"):
            build(comm, replace(ours("LocalLGRAWA", PostLocal(9)), layers=[["nothing"]]))

    on_ranks(body)


def test_a_gradient_that_is_not_finite_in_the_last_shared_step_is_an_error_at_the_switch(on_ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        vector = ParameterVector(nn.Linear(2, 1))
        optimizer = torch.optim.SGD(vector.parameters, 0.1)
        run = LocalSGD(period=PostLocal(1), sharing=SHARING).build(comm, vector, optimizer)
        closure = run.closure(lambda: vector.model(torch.full((1, 2), math.nan)).sum())
        with pytest.raises(NonFinite, match="mean gradient"):
            run.after_step(optimizer.step(closure))

    on_ranks(body)
