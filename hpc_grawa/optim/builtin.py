"""PyTorch's own optimizers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import optim

from ..errors import below_one, require
from ..schedules import RunFacts
from ..vector import ParameterVector
from .base import LocalOptimizer


@dataclass(kw_only=True)
class SGD(LocalOptimizer):
    """Stochastic gradient descent with momentum, as ``torch.optim.SGD``.

    Attributes:
        momentum: in [0, 1).
        nesterov: look ahead along the momentum.
    """

    lr: float = 0.1
    weight_decay: float = 1e-4
    momentum: float = 0.9
    nesterov: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        below_one("optimizer", self, "momentum")
        require(not self.nesterov or self.momentum > 0, "optimizer.nesterov", self.nesterov, "false without momentum")

    def build(self, vector: ParameterVector, facts: RunFacts) -> optim.Optimizer:
        parameters = self.grouped(vector)
        return optim.SGD(parameters, self.lr, self.momentum, weight_decay=self.weight_decay, nesterov=self.nesterov)


@dataclass(kw_only=True)
class AdamW(LocalOptimizer):
    """Adam with decoupled weight decay, as ``torch.optim.AdamW``.

    Attributes:
        beta1: decay of the first moment, in [0, 1).
        beta2: decay of the second moment, in [0, 1).
        eps: added to the root of the second moment, positive.
    """

    lr: float = 1e-3
    weight_decay: float = 1e-2
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        below_one("optimizer", self, "beta1", "beta2")
        require(0 < self.eps < math.inf, "optimizer.eps", self.eps, "positive")

    def build(self, vector: ParameterVector, facts: RunFacts) -> optim.Optimizer:
        return optim.AdamW(self.grouped(vector), self.lr, (self.beta1, self.beta2), self.eps, self.weight_decay)
