"""LAMB: Adam whose steps are as long as each layer's weights.

You et al., Large Batch Optimization for Deep Learning: Training BERT in 76 Minutes, ICLR 2020.
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
class LAMB(OfTimm):
    """w ← w - η(‖w‖/‖u‖)u, u = m̂/(√v̂ + ε) + βw of each tensor, with Adam's m̂ and v̂. timm's, in extra ``[optim]``.

    Both moments are corrected for bias and no norm is clamped; the ratio is 1 where a norm is 0. Biases and norms (of
    fewer than two dimensions) have neither ratio nor weight decay β.

    Limits: a model of biases and norms alone is trained by Adam.

    Not for: small batches, where AdamW needs fewer settings.

    Attributes:
        beta1: decay of the first moment, in [0, 1); .9 in the paper.
        beta2: decay of the second moment, in [0, 1); .999 in the paper.
        eps: ε, added to the root of the second moment, positive; 1e-6 in the paper.
    """

    lr: float = 1e-3
    weight_decay: float = 1e-2
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        below_one("optimizer", self, "beta1", "beta2")
        require(0 < self.eps < math.inf, "optimizer.eps", self.eps, "positive")

    def build(self, vector: ParameterVector, facts: RunFacts) -> optim.Optimizer:
        return of_timm(
            "Lamb",
            adapted(self, vector),
            lr=self.lr,
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            weight_decay=self.weight_decay,
            max_grad_norm=None,
        )
