"""A small world for method tests: the oracle's problem as a torch model, and a run of a method beside its replay."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import reference as ref
import torch
from torch import Tensor, nn, optim

from hpc_grawa import Method, ParameterVector
from hpc_grawa.averaging.synchronizer import Round
from hpc_grawa.comm import Communicator
from hpc_grawa.launch import local_device
from hpc_grawa.optim import LocalOptimizer
from hpc_grawa.optim import build as build_optimizer
from hpc_grawa.schedules import RunFacts

NET = ref.TwoLayer(d=3, h=4, o=3)  # 31 parameters: prime, so that no world divides it
NET.layers["layer 2, layer 1"] = NET.layers["module"][::-1]
BATCH = 5


def batch(rank: int, step: int) -> tuple[Any, ...]:
    return NET.random_batch(BATCH, 1, rank, step)


def probe_batch(rank: int, round_: int) -> tuple[Any, ...]:
    return NET.random_batch(BATCH, 2, rank, round_)


def starts(world: int) -> ref.Array:
    return np.array([NET.initial(seed) for seed in range(world)])


def plain() -> ref.SGD:
    return ref.SGD()


def nesterov() -> ref.SGD:
    return ref.SGD(momentum=0.9, nesterov=True, weight_decay=1e-2)


def twin(start: ref.Array, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """`NET` in torch, with these parameters."""
    model = nn.Sequential(nn.Linear(NET.d, NET.h), nn.Tanh(), nn.Linear(NET.h, NET.o)).to(dtype)
    nn.utils.vector_to_parameters(torch.from_numpy(start).to(dtype), model.parameters())
    return model


@dataclass
class Trace:
    """What one rank saw."""

    parameters: list[ref.Array] = field(default_factory=list)  # after each step and its round
    rounds: list[Round] = field(default_factory=list)
    center: ref.Array | None = None
    momenta: list[ref.Array] = field(default_factory=list)  # after the last step, where there are any


def run_method(
    comm: Communicator,
    method: Method,
    *,
    steps: int,
    lr: float | Callable[[int], float] = 0.1,
    optimizer: Callable[[], ref.SGD] = plain,
    settings: LocalOptimizer | None = None,
    dtype: torch.dtype = torch.float64,
    poison: Callable[[int, int], bool] = lambda rank, step: False,
    batch: Callable[[int, int], tuple[Any, ...]] = batch,
    probe_of: Callable[[int, int], tuple[Any, ...]] = probe_batch,
    independent: bool = False,
    parts: int = 1,
    device: str = "cpu",
    **build: Any,
) -> Trace:
    """Train on one rank as `ref.replay` does; ranks are given different starts, which a common start must undo.

    The optimizer is torch's SGD, set as `optimizer`'s, or the one that `settings` build.
    """
    model = twin(starts(comm.size)[comm.rank], dtype).to(local_device(wanted=device))  # type: ignore[arg-type]
    vector = ParameterVector(model)
    like = optimizer()
    facts = build.pop("facts", RunFacts())
    sgd = optim.SGD(
        model.parameters(), 1.0, momentum=like.momentum, nesterov=like.nesterov, weight_decay=like.weight_decay
    )
    if settings is not None:
        sgd = build_optimizer(settings, vector, facts)  # type: ignore[assignment]
    torch.manual_seed(comm.rank)  # what an optimizer draws from

    def loss_of(inputs: Any, targets: Any) -> Tensor:
        there = vector.data.device
        outputs = model(torch.as_tensor(inputs, dtype=dtype, device=there))
        return nn.functional.cross_entropy(outputs, torch.as_tensor(targets, device=there))

    def eta(step: int) -> float:
        return lr(step) if callable(lr) else lr

    def set_lr(step: int) -> None:
        for group in sgd.param_groups:
            group["lr"] = eta(step)

    set_lr(0)
    trace = Trace()
    rounds = 0

    def probe() -> Tensor:
        return loss_of(*probe_of(comm.rank, rounds))

    def on_round(round_: Round) -> None:
        nonlocal rounds
        rounds += 1
        trace.rounds.append(round_)

    run = method.build(comm, vector, sgd, probe, facts=facts, start="independent" if independent else "common", **build)
    run.on_round = on_round  # of synchronizers that there are not yet
    for synchronizer in run.synchronizers:
        synchronizer.on_round = lambda _: None
    for synchronizer in run.synchronizers[-1:]:  # of all ranks
        synchronizer.on_round = on_round
    taken: tuple[Any, ...] = ()

    def loss_of_part(part: tuple[int, int] = (0, 1)) -> Tensor:
        i, count = part
        pieces = [np.array_split(whole, count)[i] for whole in taken]
        return loss_of(*pieces) * (len(pieces[0]) * count / len(taken[0]))  # parts may be of different length

    closure = run.closure(loss_of_part, accumulate=parts)
    for step in range(steps):
        set_lr(step)
        taken = batch(comm.rank, step)
        facts.progress = step / steps
        loss = sgd.step(closure)
        if poison(comm.rank, step):
            vector.data[step % len(vector)] = math.nan  # one is enough
        run.after_step(loss)
        if step == steps - 1:
            run.finish()
        trace.parameters.append(vector.data.double().cpu().numpy().copy())
    trace.center = run.center.double().cpu().numpy().copy()
    momenta = [t for p in vector.parameters for t in sgd.state[p].values() if t is not None]
    trace.momenta = [t.double().cpu().numpy().copy() for t in momenta]
    return trace


def replay(method: ref.Method, world: int, steps: int, period: Any = 4, lr: Any = 0.1, **options: Any) -> ref.Replay:
    """The oracle's run of the same."""
    options = {"batch": batch, "probe": probe_batch, **options}
    return ref.replay(method, NET, starts(world), steps=steps, period=period, lr=lr, **options)


def assert_follows(traces: list[Trace], expected: ref.Replay, tolerance: float) -> None:
    """Every rank's parameters after every step, every round and the center are the oracle's."""

    def close(actual: Any, desired: Any) -> None:
        np.testing.assert_allclose(actual, desired, rtol=tolerance, atol=tolerance)

    for rank, trace in enumerate(traces):
        for step, parameters in zip(expected.steps, trace.parameters, strict=True):
            if np.isnan(step.parameters[rank]).all():
                assert np.isnan(parameters).any()  # broken, and not healed yet
            else:
                close(parameters, step.parameters[rank])
        for ours, theirs in zip(trace.rounds, expected.rounds, strict=True):
            assert (ours.step, ours.healed) == (theirs.step, theirs.healed)
            close(ours.weights, theirs.weights)
        close(trace.center, expected.parameters[rank] if expected.center is None else expected.center)
