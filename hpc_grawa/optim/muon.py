"""Muon: steps of matrices by orthogonalised momentum, and AdamW for all else.

Jordan et al., Muon: An Optimizer for Hidden Layers in Neural Networks, 2024; Liu et al., Muon is Scalable for LLM
Training, arXiv 2502.16982, has the lr that AdamW shares.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import optim

from ..errors import below_one, require, wrong
from ..schedules import RunFacts
from ..vector import ParameterVector
from .base import LocalOptimizer, split
from .parts import Combined


@dataclass(kw_only=True)
class Muon(LocalOptimizer):
    """M ← μM + (1-μ)G, W ← (1-ηλ)W - η·orthogonal((1-μ)G + μM) for matrices, as ``torch.optim.Muon``; AdamW else.

    The rest is what has not two dimensions (biases, norms, convolutions), and groups that say ``adamw: true``; give it
    embeddings and the last layer, ``--optimizer.groups '[{match: "embed*|head*", adamw: true}]'``.

    Limits: a model without matrices is trained by AdamW.

    Not for: convolutional networks, of which it steps the last layer alone.

    Attributes:
        lr: of both, where ``adjust_lr`` is match_rms_adamw.
        momentum: μ, in [0, 1); .95 in the papers.
        nesterov: look ahead along the momentum; else M alone.
        adjust_lr: what lr is multiplied by for a matrix [a, b]: ``match_rms_adamw``: .2·√max(a, b), for which lr and
            weight decay of AdamW do; ``original``: √max(1, a/b).
        beta1: AdamW's decay of the first moment, in [0, 1).
        beta2: AdamW's decay of the second moment, in [0, 1).
        eps: AdamW's, added to the root of the second moment, positive.
    """

    lr: float = 1e-3
    weight_decay: float = 0.1
    momentum: float = 0.95
    nesterov: bool = True
    adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        below_one("optimizer", self, "momentum", "beta1", "beta2")
        require(0 < self.eps < float("inf"), "optimizer.eps", self.eps, "positive")
        if not hasattr(optim, "Muon"):
            raise wrong("optimizer", "Muon", f"needs torch 2.9 or later, and this is {torch.__version__}")

    def build(self, vector: ParameterVector, facts: RunFacts) -> optim.Optimizer:
        matrices, others = split(self.grouped(vector), lambda p, group: p.dim() == 2 and not group.get("adamw"))
        parts: list[optim.Optimizer] = []
        if matrices:
            own = self.lr, self.weight_decay, self.momentum, self.nesterov
            parts.append(optim.Muon(matrices, *own, adjust_lr_fn=self.adjust_lr))
        if others:
            parts.append(optim.AdamW(others, self.lr, (self.beta1, self.beta2), self.eps, self.weight_decay))
        return Combined("Muon", parts, adamw=False)
