"""The Vincent function, whose valleys are all as deep but the flatter the larger x, and a method's way down it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn, optim

from ..comm import Communicator, simulate
from ..errors import require, wrong
from ..methods import Method, Run
from ..schedules import RunFacts
from ..vector import ParameterVector

#: Of each coordinate.
DOMAIN = (0.25, 10.0)
CORNERS = tuple(product(DOMAIN, repeat=2))


def vincent(x: Tensor) -> Tensor:
    """f(x) = -(1/D) Σ_d sin(10 ln x_d).

    All minima have f = -1, at x_d = exp((π/2 + 2πk)/10) for whole k, with second derivatives 100/(D x_d²).

    Args:
        x: ``[..., D]``, positive.

    Returns:
        f ``[...]``.

    Source: Vincent's function as in Shir and Bäck, Niche Radius Adaptation in the CMA-ES Niching Algorithm (PPSN 2006).

    Example:
        >>> vincent(torch.tensor([1.0, 1.0])).item()
        -0.0
    """
    return -torch.sin(10 * torch.log(x)).mean(-1)


def valley(x: Tensor) -> Tensor:
    """The minimum ``[..., D]`` of the Vincent function in whose basin x ``[..., D]`` lies."""
    k = ((10 * x.log() - math.pi / 2) / (2 * math.pi)).round()
    return ((math.pi / 2 + 2 * math.pi * k) / 10).exp()


class Vincent(nn.Module):
    """A model whose loss is the Vincent function of its parameters, each a tensor and so a layer of its own.

    Args:
        start: x ``[D]``.
    """

    def __init__(self, start: Sequence[float]) -> None:
        super().__init__()
        self.x = nn.ParameterList(torch.tensor(value, dtype=torch.float64) for value in start)

    def forward(self) -> Tensor:
        return vincent(torch.stack(list(self.x)))


@dataclass(frozen=True)
class Descent:
    """Where every rank was after each local step and the round that followed it, if one did.

    Attributes:
        ranks: ``[W, steps + 1, D]``.
        center: ``[steps + 1, D]``; NaN where there was none: before the first round, or without averaging.
    """

    ranks: Tensor
    center: Tensor


def descend(
    method: Method,
    steps: int = 4000,
    lr: float = 1e-3,
    starts: Sequence[Sequence[float]] = CORNERS,
    watch: Callable[[int], None] = lambda step: None,
) -> Descent:
    """Let simulated ranks go down the Vincent function by plain gradient descent with exact gradients.

    x_m ← x_m - η∇f(x_m), and what ``method`` adds to it, as in training. Under gradient sharing all ranks make the same
    steps, so they stay as far apart as they began.

    Args:
        method: any; its probe is f itself.
        steps: of each rank.
        lr: η.
        starts: ``[W, D]``, one per rank.
        watch: called with the number of steps made, on rank 0.

    Raises:
        ConfigError: a number that cannot be, or a local step that left the domain of f, x > 0.

    Source: the comparison on this function in Dimlioglu and Choromanska, GRAWA (AISTATS 2024).
    """
    check_numbers(steps, lr)

    def live(comm: Communicator) -> tuple[Tensor, Tensor]:
        model = Vincent(starts[comm.rank])
        vector = ParameterVector(model)
        optimizer = optim.SGD(model.parameters(), lr=lr)
        facts = RunFacts(total_steps=steps, steps_per_epoch=1)
        run = method.build(comm, vector, optimizer, probe=model, facts=facts, start="independent")
        own, center = vector.data.repeat(2, steps + 1, 1)
        closure = run.closure(model)
        center[0] = _center(run)
        for step in range(1, steps + 1):
            loss = closure()
            optimizer.step()
            check_inside(vector.data, method, lr, comm.rank, step)
            run.after_step(loss)
            if step == steps:
                run.finish()
            own[step], center[step] = vector.data, _center(run)
            if comm.rank == 0:
                watch(step)
        return own, center

    ranks, centers = map(torch.stack, zip(*simulate(len(starts), live), strict=True))
    common = (centers == centers[0]).all(-1).all(0)
    return Descent(ranks, torch.where(common[:, None], centers[0], torch.nan))


def check_numbers(steps: int, lr: float) -> None:
    """Raise ``ConfigError`` for numbers that no descent can have."""
    require(steps >= 1, "steps", steps, "at least 1")
    require(0 < lr < math.inf, "lr", lr, "positive and finite")


def check_inside(x: Tensor, method: Method, lr: float, rank: int, step: int) -> None:
    """Raise ``ConfigError`` where a local step has left the domain of f."""
    if not bool(x.log().isfinite().all()):
        raise wrong(
            "lr",
            lr,
            f"must be smaller for {type(method).__name__}, under which rank {rank} left the "
            f"function's domain (x > 0) at step {step}, to {[round(each, 4) for each in x.tolist()]}",
        )


def _center(run: Run) -> Tensor:
    """The center, or the rank's own parameters, which differ, where there is none."""
    rounds = run.synchronizers
    return run.vector.data if rounds and rounds[-1].averager.center is None else run.center
