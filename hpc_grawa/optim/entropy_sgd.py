"""Entropy-SGD: a walk around x that draws x to where the valley is wide.

Chaudhari, Choromanska, Soatto, LeCun, Baldassi, Borgs, Chayes, Sagun and Zecchina, Entropy-SGD: Biasing Gradient
Descent Into Wide Valleys, ICLR 2017.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn, optim

from ..errors import below_one, not_negative, require
from ..schedules import RunFacts
from ..vector import ParameterVector
from .base import LocalOptimizer
from .parts import copies


@dataclass(kw_only=True)
class EntropySGD(LocalOptimizer):
    """y ← y - η(∇f(y) + γ(y - x)) + noise, z ← .75z + .25y; every L steps x ← z, which is the model that is meant.

    What η multiplies has Nesterov's momentum; noise is thermal·√(2η)·N(0, 1), the same on all ranks; γ = scope·(1 +
    growth)^rounds. y is trained, x evaluated and saved; y and z are not reset.

    Limits: without noise it is the method ``Parle`` of one rank, whose 1/γ is this γ; γ = 0 without noise is SGD in y.

    Not for: methods that average; they have ``Parle``.

    Attributes:
        momentum: in [0, 1); .9 in the paper.
        period: L, steps of y for one of x, 1 or more; 20 in the paper.
        scope: γ of the first round, 0 or more; .03 in the paper.
        growth: of γ in each round, 0 or more; 1e-3 in the paper.
        thermal: size of the noise, 0 or more; 1e-4 in the paper.
        seed: of the noise, 0 or more.
    """

    momentum: float = 0.9
    period: int = 20
    scope: float = 0.03
    growth: float = 1e-3
    thermal: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        below_one("optimizer", self, "momentum")
        require(self.period >= 1, "optimizer.period", self.period, "at least 1 step")
        not_negative("optimizer", self, "scope", "growth", "thermal")
        require(self.seed >= 0, "optimizer.seed", self.seed, "0 or more")

    def build(self, vector: ParameterVector, facts: RunFacts) -> optim.Optimizer:
        return Walking(self.grouped(vector), self)


class Walking(optim.Optimizer):
    """Its parameters are y in train mode, in which it steps, and x in eval mode.

    Args:
        parameters: or groups of them.
        settings: all but groups.
    """

    label = "EntropySGD"
    #: What to train by where ranks average (read by ``AveragingMethod``).
    where_averaged = "take the method Parle, which is EntropySGD on every rank where ranks average"

    def __init__(self, parameters: list[nn.Parameter] | list[dict[str, Any]], settings: EntropySGD) -> None:
        own = {"lr": settings.lr, "weight_decay": settings.weight_decay, "momentum": settings.momentum}
        super().__init__(parameters, own)
        self._settings = settings
        for group in self.param_groups:
            group["step"] = 0

    @torch.no_grad()
    def train(self) -> None:
        """Put y in the parameters, where x was."""
        for p, state in self.state.items():
            if "y" in state:
                p.copy_(state.pop("y"))

    @torch.no_grad()
    def eval(self) -> None:
        """Put x in the parameters, where y was."""
        for p, state in self.state.items():
            if "x" in state and "y" not in state:
                state["y"] = p.detach().clone()
                p.copy_(state["x"])

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if any("y" in state for state in self.state.values()):
            raise RuntimeError("step() with x in the parameters: call optimizer.train() after optimizer.eval()")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, group in enumerate(self.param_groups):
            y: list[Tensor] = [p for p in group["params"] if p.grad is not None]
            if y:
                self._walk(y, group, number)
            self._follow(group)
        return loss

    def _walk(self, y: list[Tensor], group: dict[str, Any], number: int) -> None:
        settings, lr = self._settings, group["lr"]
        for p in y:
            if not self.state[p]:
                self.state[p] = dict(zip(("x", "z"), copies([p, p]), strict=True))
        x = [self.state[p]["x"] for p in y]
        rounds = group["step"] // settings.period
        g = torch._foreach_sub(y, x)
        torch._foreach_mul_(g, settings.scope * (1 + settings.growth) ** rounds)
        torch._foreach_add_(g, [p.grad for p in y if p.grad is not None])
        torch._foreach_add_(g, y, alpha=group["weight_decay"])
        if group["momentum"]:
            for p in y:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            u = [self.state[p]["momentum_buffer"] for p in y]
            torch._foreach_mul_(u, group["momentum"])
            torch._foreach_add_(u, g)
            torch._foreach_add_(g, u, alpha=group["momentum"])
        torch._foreach_add_(y, g, alpha=-lr)
        if settings.thermal:
            noise = self._noise(y, group["step"], number)
            torch._foreach_add_(y, noise, alpha=settings.thermal * math.sqrt(2 * lr))

    def _follow(self, group: dict[str, Any]) -> None:
        """Let z follow y, and x be z at a round, also where y was not stepped."""
        y = [p for p in group["params"] if p in self.state]
        x, z = ([self.state[p][key] for p in y] for key in ("x", "z"))
        group["step"] += 1
        if not y:
            return
        torch._foreach_lerp_(z, y, 0.25)
        if group["step"] % self._settings.period == 0:
            torch._foreach_copy_(x, z)

    def _noise(self, like: list[Tensor], step: int, number: int) -> list[Tensor]:
        """N(0, 1) by seed, step and group: ranks that share gradients stay alike, and so does a resumed run."""
        words = np.random.SeedSequence(self._settings.seed, spawn_key=(step, number)).generate_state(1, np.uint64)
        p = like[0]
        generator = torch.Generator(p.device).manual_seed(int(words[0] >> np.uint64(1)))
        sizes = [q.numel() for q in like]
        drawn = torch.randn(sum(sizes), generator=generator, device=p.device, dtype=p.dtype)
        return [part.view(q.shape) for part, q in zip(torch.split(drawn, sizes), like, strict=True)]
