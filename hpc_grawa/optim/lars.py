"""LARS: SGD whose steps are as long as each layer's weights allow.

You, Gitman and Ginsburg, Large Batch Training of Convolutional Networks, arXiv 1708.03888.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import optim

from ..errors import below_one, require
from ..schedules import RunFacts
from ..vector import ParameterVector
from .timm_optimizers import OfTimm, adapted, of_timm


@dataclass(kw_only=True)
class LARS(OfTimm):
    """u ← μu + r(g + βw), r = trust·‖w‖/(‖g‖ + β‖w‖) of each tensor; w ← w - ηu. timm's, in extra ``[optim]``.

    r is 1 where a norm is 0. Biases and norms (of fewer than two dimensions) have neither r nor weight decay β.

    Limits: a model of biases and norms alone is trained by SGD.

    Not for: small batches, where SGD needs fewer settings.

    Attributes:
        lr: the larger, the smaller trust is: 1 and more.
        momentum: μ, in [0, 1).
        nesterov: look ahead along the momentum.
        trust: positive; .001 in the paper.
    """

    lr: float = 1.0
    weight_decay: float = 1e-4
    momentum: float = 0.9
    nesterov: bool = False
    trust: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        below_one("optimizer", self, "momentum")
        require(not self.nesterov or self.momentum > 0, "optimizer.nesterov", self.nesterov, "false without momentum")
        require(0 < self.trust < math.inf, "optimizer.trust", self.trust, "positive")

    def build(self, vector: ParameterVector, facts: RunFacts) -> optim.Optimizer:
        return of_timm(
            "Lars",
            adapted(self, vector),
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov,
            trust_coeff=self.trust,
            eps=0.0,
        )
