"""A Horovod script with one line changed: steps that follow the oracle, and that are those of `build` bit for bit."""

from __future__ import annotations

import copy
import gc
import json
import math
import re
import weakref
from contextlib import nullcontext
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Ranks
from launcher import launch
from table import METHODS, is_, kinds
from test_data_parallel import MIB, TENSOR, USES, branches, expected_run
from test_data_parallel import loss_of as branches_loss
from torch import Tensor, nn, optim
from torch.utils.checkpoint import checkpoint
from worlds import Trace, assert_follows, batch, nesterov, probe_batch, replay, run_method, starts, twin

from hpc_grawa import (
    LGRAWA,
    LSGD,
    DataParallel,
    DistributedOptimizer,
    LocalLGRAWA,
    LocalSGD,
    Method,
    ParameterVector,
    simulate,
)
from hpc_grawa.averaging.synchronizer import Round
from hpc_grawa.comm import Communicator
from hpc_grawa.comm.single import SingleCommunicator
from hpc_grawa.errors import ConfigError, RanksDisagree
from hpc_grawa.schedules import Cosine, RunFacts

STEPS = 14


def sgd(parameters: Any) -> optim.SGD:
    like = nesterov()
    return optim.SGD(parameters, 0.2, like.momentum, weight_decay=like.weight_decay, nesterov=True)


def decaying(step: int) -> float:
    return 0.2 if step < 6 else 0.05


def run_script(
    comm: Communicator,
    method: Method,
    *,
    steps: int = STEPS,
    parts: int = 1,
    closure: bool = False,
    none: bool = True,
    after: bool = False,
    early: bool = False,
) -> Trace:
    """Train on one rank as a Horovod script does, with Nesterov momentum, weight decay and a scheduler.

    `none` and `after`: how and when gradients are zeroed; `early`: the scheduler is made before our line.
    """
    model = twin(starts(comm.size)[comm.rank])
    trace = Trace()

    def loss_of(inputs: Any, targets: Any) -> Tensor:
        return nn.functional.cross_entropy(model(torch.as_tensor(inputs)), torch.as_tensor(targets))

    def probe() -> Tensor:
        return loss_of(*probe_batch(comm.rank, len(trace.rounds)))

    def on_round(round_: Round) -> None:
        trace.rounds.append(round_)

    plain = sgd(model.parameters())
    schedulers = [optim.lr_scheduler.MultiStepLR(plain, [6], gamma=0.25)] if early else []
    optimizer = DistributedOptimizer(plain, model, method, probe=probe, comm=comm, backward_passes_per_step=parts)
    assert optimizer is plain
    if not early:
        schedulers.append(optim.lr_scheduler.MultiStepLR(optimizer, [6], gamma=0.25))
    for synchronizer in optimizer.run.synchronizers[-1:]:  # of all ranks
        synchronizer.on_round = on_round
    for step in range(steps):
        inputs, targets = batch(comm.rank, step)

        def gradient(inputs: Any = inputs, targets: Any = targets) -> Tensor:
            if not after:
                optimizer.zero_grad(set_to_none=none)
            total = torch.zeros(())
            for x, y in zip(np.array_split(inputs, parts), np.array_split(targets, parts), strict=True):
                loss = loss_of(x, y) * (len(x) / len(inputs))
                loss.backward()
                total = total + loss.detach()
            return total

        if closure:
            optimizer.step(gradient)
        else:
            gradient()
            optimizer.step()
        if after:
            model.zero_grad(set_to_none=none)
        schedulers[0].step()
        if step == steps - 1:
            optimizer.run.finish()
        trace.parameters.append(nn.utils.parameters_to_vector(model.parameters()).detach().numpy().copy())
    trace.center = optimizer.run.center.double().numpy().copy()
    return trace


def test_a_step_without_a_batch_counts_whatever_the_optimizer_keeps(on_ranks: Ranks) -> None:
    """Zero gradients make no step only before the first: plain SGD never has a state that they could have made."""

    def body(comm: Communicator) -> int:
        model = nn.Linear(2, 1)
        optimizer = DistributedOptimizer(optim.SGD(model.parameters(), 0.1), model, LocalSGD(period=4), comm=comm)
        for step in range(10):
            optimizer.zero_grad(set_to_none=False)
            if (step, comm.rank) != (5, comm.size - 1):
                model(torch.ones(3, 2)).square().mean().backward()
            optimizer.step()
        optimizer.run.finish()
        return optimizer.run.facts.step

    assert on_ranks(body) == [10] * on_ranks.size


#: What a script can train by without a closure.
LINES = {name: METHODS[name].ours for name in kinds() if not is_(name, "loss")}


@pytest.mark.parametrize("name", LINES)
def test_smoke_a_script_follows_the_oracle(on_ranks: Ranks, name: str) -> None:
    traces = on_ranks(lambda comm: run_script(comm, LINES[name]))
    expected = replay(METHODS[name].oracle, on_ranks.size, STEPS, lr=decaying, optimizer=nesterov)
    assert_follows(traces, expected, 1e-12)
    assert len(traces[0].rounds) == (4 if is_(name, "averages") else 0)


@pytest.mark.parametrize("options", [{"parts": 3}, {"parts": 3, "none": False}], ids=["to none", "to zero"])
@pytest.mark.parametrize("name", ["DataParallel", "LGRAWA"])
def test_gradients_of_several_passes_add_up(on_ranks: Ranks, name: str, options: Any) -> None:
    traces = on_ranks(lambda comm: run_script(comm, LINES[name], **options))
    expected = replay(METHODS[name].oracle, on_ranks.size, STEPS, lr=decaying, optimizer=nesterov)
    assert_follows(traces, expected, 1e-12)


def same_bits(traces: list[Trace], others: list[Trace]) -> None:
    for trace, other in zip(traces, others, strict=True):
        assert len(trace.parameters) == len(other.parameters)
        for ours, theirs in zip([*trace.parameters, trace.center], [*other.parameters, other.center], strict=True):
            assert ours is not None and theirs is not None and (ours == theirs).all()
        assert [r.step for r in trace.rounds] == [r.step for r in other.rounds]


@pytest.mark.parametrize("name", kinds())
def test_steps_are_those_of_build_bit_for_bit(on_ranks: Ranks, name: str) -> None:
    method = METHODS[name].ours

    def built(comm: Communicator) -> Trace:
        return run_method(comm, method, steps=STEPS, lr=decaying, optimizer=nesterov)

    expected = on_ranks(built)
    same_bits(on_ranks(lambda comm: run_script(comm, method, closure=True)), expected)
    if not method.needs_loss:
        same_bits(on_ranks(lambda comm: run_script(comm, method)), expected)


@pytest.mark.parametrize("name", LINES)
def test_how_a_script_is_written_makes_no_difference(on_ranks: Ranks, name: str) -> None:
    """Gradients to zero, zeroed after the step, or both; and a scheduler made before the optimizer is distributed."""
    expected = on_ranks(lambda comm: run_script(comm, LINES[name]))
    ways: list[dict[str, bool]] = [{"none": False}, {"after": True}, {"none": False, "after": True}, {"early": True}]
    for way in ways:
        same_bits(on_ranks(lambda comm, way=way: run_script(comm, LINES[name], **way)), expected)


def shared_branches(comm: Communicator, passes_per_step: int) -> tuple[nn.Module, Any]:
    """A model some of whose tensors need not be reached, and its optimizer, with two tensors in a bucket."""
    model = branches()
    trained = [p for p in model.parameters() if p.requires_grad]
    plain = optim.SGD(trained, 0.1, momentum=0.9, weight_decay=0.5)
    method = DataParallel(bucket_mb=2 * TENSOR / MIB)
    return model, DistributedOptimizer(plain, model, method, comm=comm, backward_passes_per_step=passes_per_step)


@pytest.mark.parametrize("zeroing", ["to none", "to zero, after"])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("use", USES)
def test_whatever_ranks_use_every_step_is_that_of_the_mean_gradient(
    on_ranks: Ranks, use: str, parts: int, zeroing: str
) -> None:
    """A rank that uses nothing makes no backward pass, and takes part all the same."""
    steps = 6

    def body(comm: Communicator) -> list[Tensor]:
        model, optimizer = shared_branches(comm, parts)
        states = []
        for step in range(steps):
            if "after" not in zeroing:
                optimizer.zero_grad(set_to_none="none" in zeroing)
            for part in range(parts):
                if order := USES[use](comm.rank, step, part):
                    branches_loss(model, comm.rank, step, part, order).backward()
            optimizer.step()
            if "after" in zeroing:
                optimizer.zero_grad(set_to_none="none" in zeroing)
            states.append(nn.utils.parameters_to_vector(optimizer.run.vector.parameters).detach().clone())
        return states

    expected = expected_run(on_ranks.size, USES[use], steps, parts)
    for states in on_ranks(body):
        for ours, theirs in zip(states, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------
# Clipping.
# ---------------------------------------------------------------------------------------------------------


def line(rank: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * rank + step)
    inputs = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    return inputs, inputs.sum(1, keepdim=True) * 10


def linear(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(3, 1, dtype=torch.float64)


def gradient(model: nn.Module, rank: int, step: int) -> None:
    inputs, targets = line(rank, step)
    (model(inputs) - targets).square().mean().backward()


def flat(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


@pytest.mark.parametrize("calls", ["synchronize, skip_synchronize", "synchronize", ""])
def test_after_backward_the_mean_gradient_can_be_clipped(on_ranks: Ranks, calls: str) -> None:
    """As in a script of one process; what Horovod's users call besides makes no difference."""

    def body(comm: Communicator) -> tuple[list[Tensor], int]:
        model = linear(comm.rank)
        optimizer = DistributedOptimizer(
            optim.SGD(model.parameters(), 0.01, momentum=0.9), model, DataParallel(), comm=comm
        )
        states = []
        for step in range(5):
            optimizer.zero_grad()
            gradient(model, comm.rank, step)
            if "synchronize" in calls:
                optimizer.synchronize()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            with optimizer.skip_synchronize() if "skip" in calls else nullcontext():
                optimizer.step()
            states.append(flat(model))
        return states, comm.meter.calls["gradient"]

    model = linear(0)
    optimizer = optim.SGD(model.parameters(), 0.01, momentum=0.9)
    expected, clipped = [], 0
    for step in range(5):
        optimizer.zero_grad()
        for rank in range(on_ranks.size):
            gradient(model, rank, step)
        for p in model.parameters():
            assert p.grad is not None
            p.grad /= on_ranks.size
        clipped += bool(nn.utils.clip_grad_norm_(model.parameters(), 5.0) > 5)
        optimizer.step()
        expected.append(flat(model))
    assert clipped
    for states, messages in on_ranks(body):
        assert messages == 5
        torch.testing.assert_close(states, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("what", ["the gradient", "its memory"])
def test_gradients_may_be_replaced_before_the_step(on_ranks: Ranks, what: str) -> None:
    """Halved after the backward pass, they are half the mean; whether they were zeroed or not, nothing of it stays."""

    def body(comm: Communicator) -> list[Tensor]:
        model = linear()
        optimizer = DistributedOptimizer(optim.SGD(model.parameters(), 0.02), model, DataParallel(), comm=comm)
        states = []
        for step in range(4):
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            gradient(model, comm.rank, step)
            for p in model.parameters():
                assert p.grad is not None
                if what == "its memory":
                    p.grad.data = p.grad.data / 2
                else:
                    p.grad = p.grad / 2
            optimizer.step()
            states.append(flat(model))
        return states

    results = on_ranks(body)
    model = linear()
    for step in range(4):
        model.zero_grad()
        for rank in range(on_ranks.size):
            gradient(model, rank, step)
        with torch.no_grad():
            for p in model.parameters():
                assert p.grad is not None
                p -= 0.01 * p.grad / on_ranks.size
        for states in results:
            torch.testing.assert_close(states[step], flat(model), rtol=1e-12, atol=1e-12)
            assert torch.equal(states[step], results[0][step])


@pytest.mark.parametrize("said", [1, 2])
@pytest.mark.parametrize(
    "use", ["all in order", "another order on each rank", "unused on some ranks", "used in the first part only"]
)
def test_every_further_backward_pass_of_a_step_is_shared(on_ranks: Ranks, use: str, said: int) -> None:
    """Three losses with a pass each, where one or two were said; what an earlier one alone has reached stays."""
    steps = 3

    def body(comm: Communicator) -> list[Tensor]:
        model, optimizer = shared_branches(comm, said)
        states = []
        for step in range(steps):
            optimizer.zero_grad()
            for part in range(3):
                branches_loss(model, comm.rank, step, part, USES[use](comm.rank, step, part)).backward()
            optimizer.step()
            states.append(nn.utils.parameters_to_vector(optimizer.run.vector.parameters).detach().clone())
        return states

    expected = expected_run(on_ranks.size, USES[use], steps, 3)
    for states in on_ranks(body):
        for ours, theirs in zip(states, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_step_with_a_pass_that_is_not_finite_is_skipped_as_a_whole(on_ranks: Ranks) -> None:
    """One rank's first of two losses is NaN in step 1: all ranks leave that step out, and make the next."""

    def body(comm: Communicator, steps: tuple[int, ...]) -> Tensor:
        model = linear()
        optimizer = DistributedOptimizer(
            optim.SGD(model.parameters(), 0.01, momentum=0.9), model, DataParallel(on_nonfinite="skip"), comm=comm
        )
        for step in steps:
            optimizer.zero_grad()
            for part in range(2):
                inputs, targets = line(comm.rank, 2 * step + part)
                poison = math.nan if (comm.rank, step, part) == (0, 1, 0) else 1.0
                (poison * (model(inputs) - targets).square().mean()).backward()
            optimizer.step()
        return flat(model)

    expected = on_ranks(lambda comm: body(comm, (0, 2)))
    for ours, theirs in zip(on_ranks(lambda comm: body(comm, (0, 1, 2))), expected, strict=True):
        assert torch.equal(ours, theirs) and ours.isfinite().all()


def test_ranks_with_different_backward_passes_are_told() -> None:
    """Where rank 1 makes two for the first step, its second would be added to rank 0's of the second step."""

    def body(comm: Communicator) -> None:
        model = linear()
        optimizer = DistributedOptimizer(optim.SGD(model.parameters(), 0.01), model, DataParallel(), comm=comm)
        for step in range(3):
            for _ in range(1 + (step == 0 and comm.rank == 1)):
                gradient(model, comm.rank, step)
            optimizer.step()

    with pytest.raises(RanksDisagree, match="different steps or backward passes"):
        simulate(2, body)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kept", ["middle", "all"])
def test_a_pass_within_a_pass_is_a_part_of_it(on_ranks: Ranks, kept: str, reentrant: bool) -> None:
    """As checkpointed activations make it: gradients are shared once, where the whole backward pass ends, or at the
    step where all of the model is checkpointed."""

    def body(comm: Communicator, kept: str) -> tuple[list[Tensor], int]:
        torch.manual_seed(0)
        first, middle, last = (nn.Linear(4, 4, dtype=torch.float64) for _ in range(3))
        model = nn.ModuleList([first, middle, last])
        optimizer = DistributedOptimizer(optim.SGD(model.parameters(), 0.1), model, DataParallel(), comm=comm)
        before = comm.meter.calls["gradient"]
        for step in range(3):
            x = line(comm.rank, step)[0].repeat(1, 2)[:, :4].requires_grad_()
            for layer in model:
                saves = kept == "all" or (kept == "middle" and layer is middle)
                x = checkpoint(layer, x.tanh(), use_reentrant=reentrant) if saves else layer(x.tanh())
            optimizer.zero_grad()
            x.square().mean().backward()
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()], comm.meter.calls["gradient"] - before

    for (ours, messages), (theirs, _) in zip(
        on_ranks(lambda c: body(c, kept)), on_ranks(lambda c: body(c, "none")), strict=True
    ):
        assert messages == 3
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", [name for name in LINES if is_(name, "averages")])
def test_methods_that_average_clip_each_rank_s_own_gradient(on_ranks: Ranks, name: str) -> None:
    def body(comm: Communicator, script: bool) -> list[Tensor]:
        model = linear()
        optimizer: Any = optim.SGD(model.parameters(), 0.01, momentum=0.9)

        def probe() -> Tensor:
            return model(line(comm.rank, 99)[0]).square().mean()

        if script:
            run = DistributedOptimizer(optimizer, model, LINES[name], probe=probe, comm=comm).run
        else:
            run = LINES[name].build(comm, ParameterVector(model), optimizer, probe)
        for step in range(9):
            optimizer.zero_grad()
            gradient(model, comm.rank, step)
            if script:
                optimizer.synchronize()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            if script:
                with optimizer.skip_synchronize():
                    optimizer.step()
            else:
                optimizer.step()
                run.after_step()
        run.finish()
        return [flat(model), run.center.clone()]

    for ours, theirs in zip(on_ranks(lambda c: body(c, True)), on_ranks(lambda c: body(c, False)), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# ---------------------------------------------------------------------------------------------------------
# State that is broadcast, saved or loaded.
# ---------------------------------------------------------------------------------------------------------


def create_state(optimizer: optim.Optimizer) -> None:
    """What `hvd.broadcast_optimizer_state` does on ranks whose optimizer has no state."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("name", ["DataParallel", "LocalSGD"])
def test_a_step_that_only_creates_state_is_no_step(on_ranks: Ranks, name: str, momentum: float) -> None:
    """Rank 0 has loaded its state and makes none, so that ranks which shared there would wait for ever."""

    def body(comm: Communicator, creates: bool) -> Tensor:
        model = linear()
        optimizer = DistributedOptimizer(
            optim.SGD(model.parameters(), 0.01, momentum=momentum), model, LINES[name], comm=comm
        )
        if creates:
            messages = sum(comm.meter.calls.values())
            create_state(optimizer)
            assert (sum(comm.meter.calls.values()), optimizer.run.facts.step) == (messages, 0)
        for step in range(5):
            optimizer.zero_grad()
            gradient(model, comm.rank, step)
            optimizer.step()
        assert optimizer.run.facts.step == 5
        return flat(model)

    expected = on_ranks(lambda comm: body(comm, False))
    for ours, theirs in zip(on_ranks(lambda c: body(c, c.rank > 0 or c.size == 1)), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", LINES)
def test_a_checkpoint_may_be_loaded_after_our_line(on_ranks: Ranks, name: str) -> None:
    def body(comm: Communicator, late: bool) -> list[Tensor]:
        model, saved = linear(), linear(7).state_dict()
        if not late:
            model.load_state_dict(saved)
        optimizer = DistributedOptimizer(
            optim.SGD(model.parameters(), 0.01),
            model,
            LINES[name],
            comm=comm,
            probe=lambda: model(line(comm.rank, 99)[0]).square().mean(),
        )
        if late:
            model.load_state_dict(saved)
        for step in range(9):
            optimizer.zero_grad()
            gradient(model, comm.rank, step)
            optimizer.step()
        return [flat(model), optimizer.run.center.clone()]

    for ours, theirs in zip(on_ranks(lambda c: body(c, True)), on_ranks(lambda c: body(c, False)), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_the_optimizer_s_state_is_saved_and_loaded(on_ranks: Ranks) -> None:
    def body(comm: Communicator, saves: bool) -> Tensor:
        model = linear()

        def begin() -> Any:
            return DistributedOptimizer(optim.Adam(model.parameters(), 0.1), model, DataParallel(), comm=comm)

        optimizer = begin()
        for step in range(6):
            if saves and step == 3:
                saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
                model = linear(1)
                optimizer = begin()
                for loads, state in zip((model, optimizer), saved, strict=True):
                    loads.load_state_dict(state)
            optimizer.zero_grad()
            gradient(model, comm.rank, step)
            optimizer.step()
        return flat(model)

    for ours, theirs in zip(on_ranks(lambda c: body(c, True)), on_ranks(lambda c: body(c, False)), strict=True):
        assert torch.equal(ours, theirs)


# ---------------------------------------------------------------------------------------------------------
# Closures and pooled rounds.
# ---------------------------------------------------------------------------------------------------------


def test_a_schedule_follows_the_steps_of_a_loop_of_ones_own() -> None:
    model, facts, schedule = linear(), RunFacts(total_steps=10), Cosine()
    optimizer = sgd(model.parameters())
    run = LocalSGD(period=3).build(SingleCommunicator(), ParameterVector(model), optimizer, facts=facts)
    for step in range(10):
        assert schedule(facts) == pytest.approx((1 + math.cos(math.pi * step / 10)) / 2)
        gradient(model, 0, step)
        optimizer.step()
        run.after_step()


@pytest.mark.parametrize("method", [DataParallel(), LocalLGRAWA(period=2), LocalSGD(period=2)])
@pytest.mark.parametrize("kind", ["DistributedOptimizer", "build"])
def test_what_was_not_finished_is_freed(method: Method, kind: str) -> None:
    """A trial that ended by an error, say: hooks on parameters keep nothing alive."""
    model = linear()
    optimizer = sgd(model.parameters())
    if kind == "build":
        held: Any = method.build(SingleCommunicator(), ParameterVector(model), optimizer)
        alive = weakref.ref(held)
    else:
        held = DistributedOptimizer(optimizer, model, method, comm=SingleCommunicator())
        alive = weakref.ref(held.run)
        gradient(model, 0, 0)
        held.step()
    del model, optimizer, held
    gc.collect()
    assert alive() is None


def test_a_state_made_with_the_optimizer_is_there_again_after_a_reset() -> None:
    """Adagrad makes its sums before its first step, and only then."""
    model = linear()
    adagrad = optim.Adagrad(model.parameters(), 0.1, initial_accumulator_value=0.5)
    optimizer = DistributedOptimizer(
        adagrad, model, LocalSGD(period=2, local_momentum="reset"), comm=SingleCommunicator()
    )
    for step in range(5):
        gradient(model, 0, step)
        optimizer.step()
        optimizer.zero_grad()
        for p in model.parameters():
            assert adagrad.state[p]["step"] == (0 if step % 2 else 1)
            assert bool((adagrad.state[p]["sum"] == 0.5).all()) == (step % 2 == 1)


def test_an_optimizer_may_evaluate_its_closure_several_times_where_ranks_average() -> None:
    """The loss of the step is that at the parameters before it."""

    def body(comm: Communicator) -> tuple[list[float], float]:
        model = linear()
        plain = optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
        optimizer = DistributedOptimizer(plain, model, LSGD(period=3), comm=comm)
        losses = []
        optimizer.run.synchronizers[0].score.observe = lambda loss: losses.append(loss.item())
        firsts = []
        for step in range(2):
            values: list[float] = []

            def closure(step: int = step, values: list[float] = values) -> Tensor:
                optimizer.zero_grad()
                inputs, targets = line(comm.rank, step)
                loss: Tensor = (model(inputs) - targets).square().mean()
                loss.backward()
                values.append(loss.item())
                return loss

            assert optimizer.step(closure=closure).item() == values[0]
            assert len(values) > 1
            firsts.append(values[0])
        assert losses == firsts
        return firsts, optimizer.run.facts.step

    assert [steps for _, steps in simulate(2, body)] == [2, 2]


def test_pooled_rounds_come_between_the_steps_of_the_loop(on_ranks: Ranks) -> None:
    """Each rank makes the steps of its own loop, and all of them count in rounds that all ranks make."""

    def body(comm: Communicator) -> tuple[int, list[tuple[int, ...]], Tensor]:
        model = linear()
        method = LocalSGD(period=4, rounds="pooled")
        optimizer = DistributedOptimizer(optim.SGD(model.parameters(), 0.01), model, method, comm=comm)
        made: list[tuple[int, ...]] = []
        optimizer.run.synchronizers[0].on_round = lambda round_: made.append(round_.made)
        steps = 6 + 5 * comm.rank
        for step in range(steps):
            optimizer.zero_grad()
            gradient(model, comm.rank, step)
            optimizer.step()
        optimizer.run.finish()
        return steps, made, optimizer.run.center.clone()

    results = on_ranks(body)
    # A rank that is late finds no ticket before its first step: it makes the first rounds before it has a list of them.
    rounds = max((made for _, made, _ in results), key=len)
    for _, made, center in results:
        assert made == rounds[len(rounds) - len(made) :] and torch.equal(center, results[0][2])
    assert np.sum(rounds, axis=0).tolist() == [steps for steps, _, _ in results]
    assert all(sum(made) <= 4 * on_ranks.size for made in rounds)


# ---------------------------------------------------------------------------------------------------------
# What cannot work is said, before it corrupts anything.
# ---------------------------------------------------------------------------------------------------------


def wrapped(method: Method | None = None, **options: Any) -> tuple[nn.Module, Any]:
    model = linear()
    method = method or DataParallel()
    optimizer = optim.SGD(model.parameters(), 0.1)
    return model, DistributedOptimizer(optimizer, model, method, comm=SingleCommunicator(), **options)


def test_a_closure_evaluated_twice_where_gradients_are_shared() -> None:
    model = linear()
    plain = optim.LBFGS(model.parameters(), max_iter=4)
    optimizer = DistributedOptimizer(plain, model, DataParallel(), comm=SingleCommunicator())

    def closure() -> float:
        optimizer.zero_grad()
        gradient(model, 0, 0)
        return 1.0

    with pytest.raises(RuntimeError, match="evaluates its closure several times"):
        optimizer.step(closure)


def test_skip_synchronize_without_synchronize() -> None:
    """The first of two passes does not share."""
    model, optimizer = wrapped(backward_passes_per_step=2)
    gradient(model, 0, 0)
    before = flat(model)
    with optimizer.skip_synchronize(), pytest.raises(RuntimeError, match=r"call optimizer\.synchronize\(\) before"):
        optimizer.step()
    assert torch.equal(flat(model), before)
    optimizer.step()
    assert not torch.equal(flat(model), before)


def test_gradients_that_no_backward_pass_has_made() -> None:
    model, optimizer = wrapped()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="no backward pass has made"):
        optimizer.step()


def test_gradients_made_by_hand_count_where_ranks_average() -> None:
    model, optimizer = wrapped(LocalSGD(period=2))
    for _ in range(4):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert (optimizer.run.facts.step, optimizer.run.synchronizers[0].completed) == (4, 2)


def test_gradients_that_are_zero_count() -> None:
    model, optimizer = wrapped(LocalSGD(period=2))
    for step in range(4):
        (0 * model(line(0, step)[0]).sum()).backward()
        optimizer.step()
    assert (optimizer.run.facts.step, optimizer.run.synchronizers[0].completed) == (4, 2)


def test_a_method_that_needs_the_loss_asks_for_a_closure() -> None:
    model, optimizer = wrapped(LSGD(period=2))
    gradient(model, 0, 0)
    with pytest.raises(ConfigError, match=r"LSGD .* optimizer\.step\(closure\)"):
        optimizer.step()


def test_a_method_that_needs_a_probe_asks_for_it() -> None:
    with pytest.raises(ValueError, match="pass probe="):
        wrapped(LGRAWA())


@pytest.mark.parametrize("unscales", [False, True])
def test_grad_scaler_is_refused(unscales: bool) -> None:
    model, optimizer = wrapped()
    before = flat(model)
    off = torch.amp.GradScaler("cpu", enabled=False)
    inputs, targets = line(0, 0)
    off.scale((model(inputs) - targets).square().mean()).backward()
    off.step(optimizer)
    off.update()
    after = flat(model)
    assert not torch.equal(after, before)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale((model(inputs) - targets).square().mean()).backward()
    if unscales:
        optimizer.synchronize()
        scaler.unscale_(optimizer)
    with pytest.raises(ConfigError, match=r"GradScaler .* bfloat16"):
        scaler.step(optimizer)
    assert torch.equal(flat(model), after)


def test_grad_scaler_is_refused_in_a_loop_of_ones_own_until_its_end() -> None:
    model = linear()
    optimizer = sgd(model.parameters())
    first = LocalSGD(period=2).build(SingleCommunicator(), ParameterVector(model), optimizer)
    run = LocalLGRAWA(period=2).build(SingleCommunicator(), ParameterVector(model), optimizer)
    del first  # without an end
    gc.collect()
    inputs, targets = line(0, 0)
    before = flat(model)
    for refused in (True, False):
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale((model(inputs) - targets).square().mean()).backward()
        with pytest.raises(ConfigError, match=r"GradScaler .* bfloat16") if refused else nullcontext():
            scaler.step(optimizer)
        assert torch.equal(flat(model), before) == refused
        if refused:
            optimizer.zero_grad()
            run.close()


def test_an_optimizer_distributed_twice() -> None:
    model, optimizer = wrapped()
    with pytest.raises(ConfigError, match="distributed already"):
        DistributedOptimizer(optimizer, model, DataParallel(), comm=SingleCommunicator())


@pytest.mark.parametrize("build", [False, True])
@pytest.mark.parametrize("name", LINES)
def test_an_optimizer_that_holds_other_parameters_than_the_model(name: str, build: bool) -> None:
    model, other = linear(), linear()
    method = LINES[name]

    def wrap(parameters: Any) -> None:
        optimizer = optim.SGD(parameters, 0.1)
        if build:
            method.build(SingleCommunicator(), ParameterVector(model), optimizer, lambda: torch.zeros(()))
        else:
            DistributedOptimizer(optimizer, model, method, comm=SingleCommunicator(), probe=lambda: torch.zeros(()))

    with pytest.raises(ConfigError, match=r"does not step parameter 'bias' of the model \(1 of 2"):
        wrap([model.weight])
    with pytest.raises(ConfigError, match="steps 2 tensors that are no parameters of the model"):
        wrap(chain(model.parameters(), other.parameters()))
    other.requires_grad_(False)
    wrap(chain(model.parameters(), other.parameters()))


@pytest.mark.parametrize("method", [DataParallel, LGRAWA, "LGRAWA", nn.Linear, None])
def test_what_is_no_method(method: Any) -> None:
    model = linear()
    name = method.__name__ if isinstance(method, type) else repr(method)
    example = f"{name}()" if method in (DataParallel, LGRAWA) else "LGRAWA(period=32)"
    message = re.escape(f"method is {name}: must be an instance of a method, such as hpc_grawa.{example}")
    with pytest.raises(ConfigError, match=message):
        DistributedOptimizer(optim.SGD(model.parameters(), 0.1), model, method, comm=SingleCommunicator())


@pytest.mark.parametrize(
    ("name", "instead"),
    {
        "named_parameters": "the model names its parameters",
        "compression": "gradients are sent as they are",
        "op": "gradients are averaged",
        "gradient_predivide_factor": "summed in fp32",
        "num_groups": r"DataParallel\(bucket_mb=",
        "groups": r"DataParallel\(bucket_mb=",
        "sparse_as_dense": "shared as dense",
        "process_set": r"comm=.*split\(colors\)",
    }.items(),
)
def test_horovod_s_own_arguments(name: str, instead: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} is an argument of Horovod's .*{instead}"):
        wrapped(**{name: object()})


def test_arguments_of_another_kind() -> None:
    model = linear()
    plain = optim.SGD(model.parameters(), 0.1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'foo'"):
        wrapped(foo=1)
    with pytest.raises(ConfigError, match=r"model is a generator: must be the torch\.nn\.Module"):
        DistributedOptimizer(plain, model.parameters(), DataParallel())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"must be a torch\.optim\.Optimizer"):
        DistributedOptimizer(model, plain, DataParallel())  # type: ignore[arg-type]


def test_passes_per_step() -> None:
    with pytest.raises(ConfigError, match="backward_passes_per_step is 0: must be at least 1"):
        wrapped(backward_passes_per_step=0)


# ---------------------------------------------------------------------------------------------------------
# One script, two lines.
# ---------------------------------------------------------------------------------------------------------

SCRIPT = """
import torch, horovod.torch as hvd, hpc_grawa
hvd.init()
torch.manual_seed(hvd.rank())
model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay={decay})
data = torch.Generator().manual_seed(hvd.rank())
if {early}:
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)

def loss():
    inputs = torch.randn(16, 6, generator=data)
    return torch.nn.functional.cross_entropy(model(inputs), inputs[:, :3].argmax(1))

{line}
if not {early}:
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=4, gamma=0.5)
for step in range(10):
    optimizer.zero_grad()
    value = loss()
    value.backward()
    optimizer.synchronize()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    with optimizer.skip_synchronize():
        optimizer.step()
    scheduler.step()
{end}
"""
#: One model, two optimizers of Horovod's (which then need no order), or of ours, with one backward pass.
TWO = """
import torch, horovod.torch as hvd, hpc_grawa
hvd.init()
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
parts = [p for p in model.parameters() if p.dim() == 2], [p for p in model.parameters() if p.dim() == 1]
optimizers = [torch.optim.SGD(parts[0], lr=0.1), torch.optim.Adam(parts[1], lr=0.01)]
{line}
data = torch.Generator().manual_seed(hvd.rank())
for step in range(10):
    for optimizer in optimizers:
        optimizer.zero_grad()
    inputs = torch.randn(16, 6, generator=data)
    value = torch.nn.functional.cross_entropy(model(inputs), inputs[:, :3].argmax(1))
    value.backward()
    for optimizer in optimizers:
        optimizer.step()
"""
THEIR_TWO = "optimizers = [hvd.DistributedOptimizer(o, [(str(i * 100 + j), p) for j, p in enumerate(part)]) " + (
    "for i, (o, part) in enumerate(zip(optimizers, parts))]"
)
OUR_TWO = "optimizers = [hpc_grawa.DistributedOptimizer(o, torch.nn.ParameterList(part), hpc_grawa.DataParallel()) " + (
    "for o, part in zip(optimizers, parts)]"
)
#: Runs one such script after the other, and writes the last loss and the parameters of each, or its error.
PROGRAM = """
import json, pathlib, sys
import horovod.torch as hvd
folder = pathlib.Path(sys.argv[1])
results = {}
for name, script in json.loads((folder / "scripts").read_text()).items():
    names = {}
    try:
        exec(script, names)
    except ValueError as error:
        results[name] = str(error)
    else:
        vector = names["torch"].nn.utils.parameters_to_vector(names["model"].parameters())
        results[name] = [names["value"].item(), *vector.tolist()]
(folder / f"results {hvd.rank()}").write_text(json.dumps(results))
"""
HOROVOD = "optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())"
OURS = "optimizer = hpc_grawa.DistributedOptimizer(optimizer, model, hpc_grawa.{})"
DATA_PARALLEL = OURS.format("DataParallel()")
AVERAGING = ("LocalLGRAWA(period=4)", "LGRAWA(period=4), probe=loss", "EASGD(period=4)")


def script(line: str, early: bool = False, end: str = "") -> str:
    # Horovod's line forgets what state there is, ours keeps it; without weight decay it is zero.
    return SCRIPT.format(line=line, early=early, end=end, decay=0 if early else 1e-3)


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """The results of two ranks, by the scripts' names."""
    pytest.importorskip("horovod.torch")
    takes_center = "optimizer.run.finish(); optimizer.run.vector.data.copy_(optimizer.run.center)"
    texts = {"twice": script(f"{HOROVOD}\n{DATA_PARALLEL}")}
    for early in (False, True):
        texts |= {f"Horovod {early}": script(HOROVOD, early), f"ours {early}": script(DATA_PARALLEL, early)}
    for method in AVERAGING:
        texts[method] = script(OURS.format(method), end=takes_center)
        texts[f"{method}, without rounds"] = script(OURS.format(method.replace("4", "1000")))
    texts |= {"Horovod's two": TWO.format(line=THEIR_TWO), "our two": TWO.format(line=OUR_TWO)}
    folder = tmp_path_factory.mktemp("scripts")
    (folder / "program.py").write_text(PROGRAM)
    (folder / "scripts").write_text(json.dumps(texts))
    done = launch(str(folder), program=(str(folder / "program.py"),), ranks=2)
    assert done.status == 0, done.said
    first, second = (json.loads((folder / f"results {rank}").read_text()) for rank in range(2))
    return {name: [first[name], second[name]] for name in texts}


@pytest.mark.parametrize("early", [False, True], ids=["broadcast after", "broadcast before"])
def test_data_parallel_computes_what_horovod_does(scripts: dict[str, list[Any]], early: bool) -> None:
    ours, theirs = scripts[f"ours {early}"], scripts[f"Horovod {early}"]
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)
    assert ours[0][0] != ours[1][0]  # the losses of their own batches
    assert ours[0][1:] == ours[1][1:]


def test_two_optimizers_in_a_horovod_script(scripts: dict[str, list[Any]]) -> None:
    ours, theirs = scripts["our two"], scripts["Horovod's two"]
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert ours[0][0] != ours[1][0] and ours[0][1:] == ours[1][1:]


@pytest.mark.parametrize("method", AVERAGING)
def test_averaging_methods_in_a_horovod_script(scripts: dict[str, list[Any]], method: str) -> None:
    first, second = scripts[method]
    assert first[1:] == second[1:] and np.isfinite(first).all()
    first, second = scripts[f"{method}, without rounds"]
    assert first[1:] != second[1:]


def test_an_optimizer_that_horovod_has_wrapped(scripts: dict[str, list[Any]]) -> None:
    for result in scripts["twice"]:
        assert result.startswith("the optimizer is distributed already")
