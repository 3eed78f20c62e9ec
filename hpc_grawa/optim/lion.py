"""Lion: steps of one length, by the sign of a momentum.

Chen et al., Symbolic Discovery of Optimization Algorithms, NeurIPS 2023.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import optim

from ..errors import below_one
from ..schedules import RunFacts
from ..vector import ParameterVector
from .timm_optimizers import OfTimm, of_timm


@dataclass(kw_only=True)
class Lion(OfTimm):
    """w ← w - η(sign(β₁m + (1-β₁)g) + λw); m ← β₂m + (1-β₂)g. timm's, in extra ``[optim]``.

    Limits: β₁ = β₂ = 0 is sign descent.

    Not for: the lr of AdamW; take a tenth to a third of it, and a weight decay larger by as much.

    Attributes:
        beta1: β₁, in [0, 1); .9 in the paper.
        beta2: β₂, in [0, 1); .99 in the paper.
    """

    lr: float = 1e-4
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        below_one("optimizer", self, "beta1", "beta2")

    def build(self, vector: ParameterVector, facts: RunFacts) -> optim.Optimizer:
        betas = self.beta1, self.beta2
        return of_timm("Lion", self.grouped(vector), lr=self.lr, betas=betas, weight_decay=self.weight_decay)
