"""LSGD: ranks are pulled to the one with the smallest training loss.

Teng, Gao, Chalus, Choromanska, Goldfarb and Weller, Leader Stochastic Gradient Descent for Distributed Training of
Deep Learning Models, NeurIPS 2019.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from ..averaging.averager import Averager, argmin
from ..averaging.scores import TrainingLoss
from ..comm import Communicator
from ..periods import Period
from .averaging import AveragingMethod, Level, unit_interval
from .base import Probe
from .run import Run


@dataclass(kw_only=True)
class LSGD(AveragingMethod):
    """The leader is argmin_m of the mean training loss since the last round; its parameters are broadcast.

    x_m ← x_m + λ(x_leader - x_m), and x_m ← x_m + (μ/τ)(x_leader - x_m) after each local step. On two levels
    (``group_period``), each group has a leader of its own, and more often; where both are due, ranks are pulled to
    their group's leader first.

    Attributes:
        period: local steps between rounds of all ranks, τ.
        pull: λ to their leader, the paper's c.
        prox: μ to their leader, the paper's p.
        group_pull: λ to the group's leader.
        group_prox: μ to the group's leader.
    """

    needs_loss: ClassVar[bool] = True

    period: int | Period = 8
    pull: float = 0.1
    prox: float = 0.1
    group_pull: float = 0.1
    group_prox: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        unit_interval(self, "pull", "prox", "group_pull", "group_prox")

    def _level(self, run: Run, comm: Communicator, probe: Probe | None) -> Level:
        return Level(Averager(comm, run.vector, self.pull), TrainingLoss(), argmin, self.prox)

    @property
    def of_groups(self) -> LSGD:
        return replace(self, pull=self.group_pull, prox=self.group_prox)
