"""Low-pass filtered SGD: the gradient of the loss smoothed by a Gaussian.

Bisla, Wang and Choromanska, Low-Pass Filtering SGD for Recovering Flat Optima in the Deep Learning Optimization
Landscape, AISTATS 2022.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, optim

from ..errors import not_negative, require
from ..schedules import RunFacts
from ..vector import ParameterVector
from .parts import Around, OnBase, copies, trained


@dataclass(kw_only=True)
class LPFSGD(OnBase):
    """g ← (1/M) Σ_i ∇f_i(w + ε_i), ε_i ~ N(0, (σ_t‖w_filter‖)²), by which ``base`` steps from w.

    f_i is the loss of the i-th of M parts of the batch. A filter is a row of a tensor of two dimensions or more; other
    parameters are one each. σ_t = σ(1 + growth·(1 - cos πs)/2), s the share of the run that is over
    (``facts.progress``). Each rank draws its own ε, from torch's random stream; the last part shares gradients.

    Limits: σ = 0 is gradient accumulation in M parts, with M = 1 it is ``base``.

    Not for: batches whose M-th part is too small for BatchNorm.

    Attributes:
        parts: M, 1 or more, which divides a rank's batch (and each of its ``accumulate`` parts); 8 in the paper.
        sigma: σ of the noise at the start, a share of the filter's norm, 0 or more; 5e-4 in the paper.
        growth: at the end of the run σ_t is (1 + growth)σ; 0 or more; 15 in the paper.
    """

    parts: int = 8
    sigma: float = 5e-4
    growth: float = 15.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.parts >= 1, "optimizer.parts", self.parts, "at least 1 part of the batch")
        not_negative("optimizer", self, "sigma", "growth")

    def build(self, vector: ParameterVector, facts: RunFacts) -> optim.Optimizer:
        return Smoothing(self.built_base(vector, facts), self, facts)


class Smoothing(Around):
    """Has ``base`` step by the mean of gradients at points nearby.

    Args:
        base: steps.
        settings: M, σ and its growth.
        facts: of the run.
    """

    label = "LPFSGD"

    def __init__(self, base: optim.Optimizer, settings: LPFSGD, facts: RunFacts) -> None:
        super().__init__(base)
        self._settings, self._facts = settings, facts

    @property
    def sigma(self) -> float:
        """σ at this step."""
        s = self._settings
        return s.sigma * (1 + s.growth * (1 - math.cos(math.pi * self._facts.progress)) / 2)

    @torch.no_grad()
    def step(self, closure: Any) -> Any:  # type: ignore[override]
        parameters, parts, sigma = trained(self), self._settings.parts, self.sigma
        kept, deviations = copies(parameters), [_filter_norms(p).mul_(sigma) for p in parameters]
        loss = 0.0
        for i in range(parts):
            if sigma:
                noise = [torch.randn_like(p) for p in parameters]
                torch._foreach_mul_(noise, deviations)
                torch._foreach_add_(parameters, noise)
            torch.clear_autocast_cache()  # of casts of where the parameters were
            try:
                loss = loss + closure(share=i == parts - 1, part=(i, parts))
            finally:
                torch._foreach_copy_(parameters, kept)
                torch.clear_autocast_cache()
        self.base.step()
        return loss


def _filter_norms(p: Tensor) -> Tensor:
    """As a tensor that multiplies one of the parameter's shape."""
    norms: Tensor = torch.linalg.vector_norm(p, dim=list(range(1, p.dim())) or None, keepdim=p.dim() > 0)
    return norms
