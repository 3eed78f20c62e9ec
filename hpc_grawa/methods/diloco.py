"""DiLoCo: an outer optimizer steps the center by what rounds of an inner one have moved.

Douillard, Feng, Rusu, Chhaparia, Donchev, Kuncoro, Ranzato, Szlam and Shen, DiLoCo: Distributed Low-Communication
Training of Language Models, 2023 (arXiv 2311.08105).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, optim

from ..averaging.averager import inverse
from ..averaging.scores import Equal
from ..comm import Communicator
from ..errors import below_one, not_negative
from ..periods import Period
from .averaging import AveragingMethod, CenteredAverager, Level
from .base import Probe
from .run import Run


class OuterAverager(CenteredAverager):
    """c ← outer step of c with the gradient c - x̄; x_m ← c."""

    def __init__(self, run: Run, comm: Communicator, lr: float, momentum: float) -> None:
        super().__init__(run, comm)
        center = self.kept["center"]
        # Foreach: steps with no vector beside its own.
        self._outer = optim.SGD([center], lr, momentum, nesterov=momentum > 0, foreach=True)
        if momentum:
            # Torch steps the tensor that is kept, so it is saved and mended here; zeros are as good as none.
            buffer = self.kept["outer momentum"] = torch.zeros_like(center)
            self._outer.state[center]["momentum_buffer"] = buffer

    def _mix(self, x: Tensor, average: Tensor) -> None:
        center = self.kept["center"]
        center.grad = torch.sub(center, average, out=average)
        self._outer.step()
        center.grad = None
        x.copy_(center)


@dataclass(kw_only=True)
class DiLoCo(AveragingMethod):
    """u ← μu + Δ, c ← c - η_o(Δ + μu), with Δ = c - x̄, and all ranks go on from c: SGD with Nesterov's momentum.

    Any local optimizer is the inner one; AdamW in the paper, whose moments each rank keeps. Groups (``group_period``)
    take plain means.

    Limits: outer_lr 1 and outer_momentum 0 make it LocalSGD.

    Not for: runs of few rounds, as the outer momentum wants dozens; periods of hundreds of steps cost quality.

    Attributes:
        period: local steps between rounds, H; 500 in the paper, for images 50 to 100.
        outer_lr: η_o, 0 or more, of the unit 1 and not of the local learning rate; .7 in the paper.
        outer_momentum: μ, in [0, 1); .9 in the paper.
    """

    period: int | Period = 500
    outer_lr: float = 0.7
    outer_momentum: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        not_negative("method", self, "outer_lr")
        below_one("method", self, "outer_momentum")

    def _level(self, run: Run, comm: Communicator, probe: Probe | None) -> Level:
        return Level(OuterAverager(run, comm, self.outer_lr, self.outer_momentum), Equal(), inverse)

    @property
    def of_groups(self) -> DiLoCo:
        """Plain averaging: the momentum is of what all ranks have moved, which a group's center does not see."""
        return replace(self, outer_lr=1.0, outer_momentum=0.0)
