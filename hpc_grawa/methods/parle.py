"""Parle: Entropy-SGD on every rank, whose slow variables are drawn together.

Chaudhari, Baldassi, Zecchina, Soatto, Talwalkar and Oberman, Parle: parallelizing stochastic gradient descent, SysML
2018 (arXiv 1707.00424). With one rank it is Entropy-SGD (Chaudhari et al., ICLR 2017) without noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, optim

from ..aggregation import Aggregator
from ..averaging.averager import Averager, inverse
from ..averaging.scores import Equal
from ..comm import Communicator
from ..errors import below_one, not_negative, require
from ..optim.parts import Around
from ..periods import Period
from .averaging import AveragingMethod, Level
from .base import Probe
from .run import Run


class _Replica(Aggregator):
    """What a rank trains: y, the model, is drawn to x; z ← d·z + (1-d)·y follows it.

    They begin alike where the parameters are at the first step.

    Args:
        run: whose model is y.
        decay: d.
        gamma: γ of the present step.
    """

    def __init__(self, run: Run, decay: float, gamma: Callable[[], float]) -> None:
        self._vector, self._decay, self._gamma = run.vector, decay, gamma
        start = run.vector.data.to(run.vector.exact_dtype)
        self.x, self.z, self._apart = start.clone(), start.clone(), torch.empty_like(start)
        self._views = run.vector.views(self._apart)
        self._begun = self._stepping = self._drawn = False
        self._handles = [run.optimizer.register_step_pre_hook(self._before)]
        #: Whether the optimizer asks for gradients elsewhere than at y, to which it then has another one step.
        self._around = isinstance(run.optimizer, Around)
        if isinstance(run.optimizer, Around):
            self._handles.append(run.optimizer.base.register_step_pre_hook(lambda *_: self._draw()))

    def _before(self, optimizer: optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin before the optimizer asks for gradients elsewhere; draw where it has no closure to ask."""
        self._begin()
        self._stepping = True
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # behind the optimizer itself
        if closure is None:
            self.finish()
            self.complete()

    def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            self.x.copy_(self._vector.data)
            self.z.copy_(self._vector.data)

    def finish(self) -> None:
        """Make every gradient dense, as all of y is drawn."""
        for p in self._vector.parameters:
            if p.grad is not None and p.grad.is_sparse:
                p.grad = p.grad.to_dense()

    def complete(self) -> None:
        if self._stepping and not self._around:  # one that is made before the step may still be clipped
            self._draw()

    def _draw(self) -> None:
        """∇f(y) + (y - x)/γ; a parameter without a gradient, which is not stepped, is not drawn either."""
        torch.sub(self._vector.data, self.x, out=self._apart)
        pairs = zip(self._vector.parameters, self._views, strict=True)
        given = [(p.grad, view) for p, view in pairs if p.grad is not None]
        if given:
            torch._foreach_add_([grad for grad, _ in given], [view for _, view in given], alpha=1 / self._gamma())
        self._drawn = True

    def stepped(self) -> None:
        if self._stepping and not self._drawn:
            raise RuntimeError(
                "this step's gradient lacked Parle's pull to x: a closure of optimizer.step(closure) must be made by "
                "run.closure(loss), where loss() returns the loss of the batch"
            )
        self._stepping = self._drawn = False
        self.z.mul_(self._decay).add_(self._vector.data, alpha=1 - self._decay)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._begun = True  # x and z are the averager's to load

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


class ReplicaAverager(Averager):
    """x_m ← (1-t)z_m + t·z̄, or t times the mean of the x_m that were."""

    def __init__(
        self, run: Run, comm: Communicator, replica: _Replica, previous: bool, share: Callable[[], float]
    ) -> None:
        super().__init__(comm, run.vector, 1.0)
        self._replica, self._previous, self._share = replica, previous, share
        self.own = {"x": replica.x, "z": replica.z}

    @property
    def source(self) -> Tensor:
        return self._replica.x if self._previous else self._replica.z

    @property
    def local(self) -> Tensor:
        return self._replica.x

    def _mix(self, x: Tensor, average: Tensor) -> None:
        self.center = average
        torch.lerp(self._replica.z, average, self._share(), out=self._replica.x)


@dataclass(kw_only=True)
class Parle(AveragingMethod):
    """y ← y - η(∇f(y) + (y - x)/γ), z ← d·z + (1-d)·y; at a round x ← (1-t)z + t·z̄ with t = γ/(ρ + γ).

    y is the model that the local optimizer steps (SGD with Nesterov's momentum of .9 in the paper), x the one that the
    rank stands for, z̄ the center. γ and ρ fall at every round, by ``scoping``, to their floors.

    Limits: one rank is EntropySGD without noise, at its γ_E = 1/γ.

    Not for: a lack of memory; own loops without ``run.closure(loss)`` whose ``step`` is given a closure.

    Attributes:
        period: local steps between rounds, L; 25 in the paper.
        gamma: γ at the start, ``gamma_floor`` or more; smaller holds y closer to x; 100 in the paper.
        rho: ρ at the start, ``rho_floor`` or more; smaller holds ranks closer to each other; 1 in the paper.
        gamma_floor: the smallest γ, positive; 1 in the paper.
        rho_floor: the smallest ρ, 0 or more; .1 in the paper.
        scoping: factor of both at each round, in (0, 1]; null: 1 - 1/(2B), B the steps of an epoch, as in the paper.
        decay: d of z, in [0, 1); .75 in the paper.
        reference: what x is drawn to: the ``mean`` of all z, the fixed point of the paper's; or, as printed there, the
            mean of the ``previous`` x of all ranks, which as a center is a round behind.
    """

    period: int | Period = 25
    gamma: float = 100.0
    rho: float = 1.0
    gamma_floor: float = 1.0
    rho_floor: float = 0.1
    scoping: float | None = None
    decay: float = 0.75
    reference: Literal["mean", "previous"] = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        not_negative("method", self, "rho", "rho_floor")
        for name in ("gamma", "gamma_floor"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"method.{name}", value, "a positive number")
        for name in ("gamma", "rho"):
            value, floor = getattr(self, name), getattr(self, f"{name}_floor")
            require(value >= floor, f"method.{name}", value, f"at least method.{name}_floor, which is {floor}")
        allowed = self.scoping is None or 0 < self.scoping <= 1
        require(allowed, "method.scoping", self.scoping, "null (by the steps of an epoch), or in (0, 1]")
        below_one("method", self, "decay")

    def _level(self, run: Run, comm: Communicator, probe: Probe | None) -> Level:
        steps = run.facts.steps_per_epoch
        if self.scoping is None and steps is None:
            raise ValueError(
                "Parle lowers γ and ρ by the steps of an epoch: say them by facts=RunFacts(steps_per_epoch=...), or "
                "give scoping, their factor at each round (1 leaves them as they are)"
            )
        scoping = self.scoping if self.scoping is not None else 1 - 1 / (2 * (steps or 1))

        def scoped(start: float, floor: float) -> float:
            return max(start * scoping ** run.synchronizers[0].completed, floor)  # of groups, where there are any

        def gamma() -> float:
            return scoped(self.gamma, self.gamma_floor)

        def share() -> float:
            return gamma() / (scoped(self.rho, self.rho_floor) + gamma())

        # Groups and all ranks move the same x.
        replica = run.aggregator if isinstance(run.aggregator, _Replica) else _Replica(run, self.decay, gamma)
        run.aggregator = replica
        return Level(ReplicaAverager(run, comm, replica, self.reference == "previous", share), Equal(), inverse)
