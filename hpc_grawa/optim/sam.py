"""Sharpness-aware minimization: the gradient at the worst point nearby.

SAM: Foret, Kleiner, Mobahi and Neyshabur, Sharpness-Aware Minimization for Efficiently Improving Generalization, ICLR
2021. ASAM: Kwon, Kim, Park and Choi, ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep
Neural Networks, ICML 2021.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, optim

from ..errors import not_negative
from ..random_streams import set_streams, streams
from ..schedules import RunFacts
from ..vector import ParameterVector
from .parts import Around, OnBase, copies, trained


@dataclass(kw_only=True)
class SAM(OnBase):
    """g ← ∇f(w + ρ∇f(w)/‖∇f(w)‖), by which ``base`` steps from w.

    Two backward passes a step, both with the same dropout; BatchNorm statistics are those of the first, the loss is the
    one at w. Where gradients are shared each rank ascends by its own, and the second one is shared, then clipped. A
    gradient of zero makes no ascent.

    Limits: ρ = 0 is ``base``.

    Not for: short budgets of time, as a step costs two.

    Attributes:
        rho: distance of the ascent, ρ, 0 or more; .05 in the paper.
    """

    rho: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        not_negative("optimizer", self, "rho")

    def build(self, vector: ParameterVector, facts: RunFacts) -> optim.Optimizer:
        return Ascending(self.built_base(vector, facts), self.rho)


@dataclass(kw_only=True)
class ASAM(OnBase):
    """g ← ∇f(w + ρT²∇f(w)/‖T∇f(w)‖), T = |w| + η, by which ``base`` steps from w: SAM whatever the scale of a layer.

    T is 1 for biases and norms (parameters of fewer than two dimensions). Else as ``SAM``.

    Limits: ρ = 0 is ``base``.

    Not for: short budgets of time, as a step costs two.

    Attributes:
        rho: distance of the ascent, ρ, 0 or more; 1 in the paper on CIFAR-100 and ImageNet, .5 on CIFAR-10.
        eta: added to |w|, 0 or more; .01 in the paper.
    """

    rho: float = 1.0
    eta: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        not_negative("optimizer", self, "rho", "eta")

    def build(self, vector: ParameterVector, facts: RunFacts) -> optim.Optimizer:
        return Ascending(self.built_base(vector, facts), self.rho, self.eta)


class Ascending(Around):
    """Has ``base`` step by the gradient at the end of an ascent.

    Args:
        base: steps.
        rho: distance of the ascent.
        eta: of ASAM's T; None: T is 1.
    """

    def __init__(self, base: optim.Optimizer, rho: float, eta: float | None = None) -> None:
        super().__init__(base)
        self.label = "SAM" if eta is None else "ASAM"
        self._rho, self._eta = rho, eta

    @torch.no_grad()
    def step(self, closure: Any) -> Any:  # type: ignore[override]
        begun = streams()
        loss = closure(share=False)
        set_streams(begun)
        ascending = [p for p in trained(self) if p.grad is not None]
        kept = copies(ascending)
        if ascending:
            self._ascend(ascending)
        torch.clear_autocast_cache()  # of casts of where the parameters were
        try:
            closure(track=False)
        finally:
            torch._foreach_copy_(ascending, kept)  # subtraction would round, on each rank otherwise
            torch.clear_autocast_cache()
        self.base.step()
        return loss

    def _ascend(self, parameters: list[Tensor]) -> None:
        once = [p.grad for p in parameters if p.grad is not None]
        twice = once
        if self._eta is not None:
            weights = [p for p in parameters if p.dim() >= 2]
            scales = iter(torch._foreach_add(torch._foreach_abs(weights), self._eta) if weights else ())
            t = [next(scales) if p.dim() >= 2 else torch.ones_like(p) for p in parameters]
            once = list(torch._foreach_mul(once, t))
            twice = list(torch._foreach_mul(once, t))
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(once)))
        distance = torch.where(norm > 0, self._rho / norm, 0.0)  # on the device: nothing waits for it
        torch._foreach_add_(parameters, torch._foreach_mul(twice, distance))
