"""One round on the Vincent function: what a method's weights make of where its ranks are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, optim

from ..averaging.synchronizer import Round
from ..comm import Communicator, simulate
from ..errors import ConfigError, label
from ..methods import Method
from ..schedules import RunFacts
from ..vector import ParameterVector
from .vincent import Vincent, check_inside, check_numbers

#: A rank where f is flat in the first coordinate, one where it is flat in the second, one where it is in none.
SCATTERED = ((7.2, 1.05), (2.7, 7.3), (1.05, 1.35))


@dataclass(frozen=True)
class Pulled:
    """A round.

    Attributes:
        before: where ranks were, ``[W, D]``.
        weights: of each rank, on each coordinate ``[W, D]``: the same on all of them where the method has one a rank.
        center: what they made, ``[D]``.
        after: where ranks are then, ``[W, D]``.
    """

    before: Tensor
    weights: Tensor
    center: Tensor
    after: Tensor


def first_round(
    method: Method, steps: int = 100, lr: float = 1e-3, starts: Sequence[Sequence[float]] = SCATTERED
) -> Pulled:
    """The first round of a descent (see ``descend``).

    Args:
        method: any that averages.
        steps: of each rank, at most.
        lr: η.
        starts: ``[W, D]``, one per rank.

    Raises:
        ConfigError: a number that cannot be, a local step that left the domain of f, or no round of all ranks.
    """
    check_numbers(steps, lr)

    def live(comm: Communicator) -> Pulled | None:
        model = Vincent(starts[comm.rank])
        vector = ParameterVector(model)
        optimizer = optim.SGD(model.parameters(), lr=lr)
        facts = RunFacts(total_steps=steps, steps_per_epoch=1)
        run = method.build(comm, vector, optimizer, probe=model, facts=facts, start="independent")
        rounds: list[Round] = []
        run.on_round = rounds.append
        closure = run.closure(model)
        for step in range(1, steps + 1):
            loss = closure()
            optimizer.step()
            check_inside(vector.data, method, lr, comm.rank, step)
            before = vector.data.clone()
            run.after_step(loss)
            if rounds and len(rounds[-1].ranks) == comm.size:
                weights = rounds[-1].weights[comm.rank].expand(len(vector)).clone()
                return Pulled(before, weights, run.center.clone(), vector.data.clone())
        return None

    alone = simulate(len(starts), live)
    if any(one is None for one in alone):
        raise ConfigError(f"{label(method)} makes no round in {steps} steps, so there are no weights to draw")
    found = [one for one in alone if one is not None]
    parts = (torch.stack([getattr(one, name) for one in found]) for name in ("before", "weights", "after"))
    before, weights, after = parts
    return Pulled(before, weights, found[0].center, after)
