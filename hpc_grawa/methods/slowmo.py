"""SlowMo: a momentum step of the center, made of what the rounds of Local SGD move.

Wang, Tantia, Ballas and Rabbat, SlowMo: Improving Communication-Efficient Distributed SGD with Slow Momentum, ICLR
2020.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..averaging.averager import inverse
from ..averaging.scores import Equal
from ..comm import Communicator
from ..errors import below_one, not_negative
from ..periods import Period
from .averaging import AveragingMethod, CenteredAverager, Level
from .base import Probe
from .run import Run


class SlowAverager(CenteredAverager):
    """u ← βu + (c - x̄)/η; c ← c - αηu; x_m ← c, with η of the round's last step; where it is 0, c ← x̄."""

    def __init__(self, run: Run, comm: Communicator, lr: float, momentum: float) -> None:
        super().__init__(run, comm)
        self._facts, self._lr, self._momentum = run.facts, lr, momentum
        self.kept["slow momentum"] = torch.zeros_like(self.kept["center"])

    def _mix(self, x: Tensor, average: Tensor) -> None:
        center, u, lr = self.kept["center"], self.kept["slow momentum"], self._facts.lr
        if lr:
            moved = torch.sub(center, average, out=average)
            u.mul_(self._momentum).add_(moved, alpha=1 / lr)
            center.sub_(u, alpha=self._lr * lr)
        else:
            center.copy_(average)
        x.copy_(center)


@dataclass(kw_only=True)
class SlowMo(AveragingMethod):
    """u ← βu + (c - x̄)/η, c ← c - αηu, and all ranks go on from c: Local SGD whose rounds have a momentum.

    η is that of the round's last step; a round at η = 0 is one of LocalSGD. Groups (``group_period``) take plain means.

    Limits: slow_momentum 0 and slow_lr 1 make it LocalSGD.

    Not for: few rounds: after fewer than 1/(1-β) of them the momentum has hardly begun.

    Attributes:
        period: local steps between rounds, τ; 12 in the paper, 48 where communication is dear.
        slow_lr: α, 0 or more; 1 in the paper.
        slow_momentum: β, in [0, 1); .4 to .7 in the paper.
    """

    period: int | Period = 12
    slow_lr: float = 1.0
    slow_momentum: float = 0.6

    def __post_init__(self) -> None:
        super().__post_init__()
        not_negative("method", self, "slow_lr")
        below_one("method", self, "slow_momentum")

    def _level(self, run: Run, comm: Communicator, probe: Probe | None) -> Level:
        return Level(SlowAverager(run, comm, self.slow_lr, self.slow_momentum), Equal(), inverse)

    @property
    def of_groups(self) -> SlowMo:
        """Plain averaging: the momentum is of what all ranks have moved, which a group's center does not see."""
        return replace(self, slow_lr=1.0, slow_momentum=0.0)
