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
from ..errors import unit_interval
from ..periods import Period
from .averaging import AveragingMethod, Level
from .base import Probe
from .run import Run


@dataclass(kw_only=True)
class LSGD(AveragingMethod):
    """x_m ← x_m + λ(x_leader - x_m): the leader has the smallest mean training loss since the last round.

    Its parameters are broadcast, and pull after each local step too: x_m ← x_m + (μ/τ)(x_leader - x_m). On two levels
    (``group_period``), each group has a leader of its own, and more often; where both are due, ranks are pulled to
    their group's leader first.

    Limits: pull 0 and prox 0 are training alone, but for buffers that belong to the weights (see ``buffers``); without
    pulls of groups two levels are one.

    Not for: shards that differ (sorted by class, say): losses of different data say nothing of models.

    Attributes:
        period: local steps between rounds of all ranks, τ; 4, 8 or 16 in GRAWA's paper.
        pull: λ to their leader, the paper's c, in [0, 1]; .01 or .1.
        prox: μ to their leader, the paper's p, in [0, 1]; .01 or .1.
        group_pull: λ to the group's leader, in [0, 1].
        group_prox: μ to the group's leader, in [0, 1].
    """

    needs_loss: ClassVar[bool] = True

    period: int | Period = 8
    pull: float = 0.1
    prox: float = 0.1
    group_pull: float = 0.1
    group_prox: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        unit_interval("method", self, "pull", "prox", "group_pull", "group_prox")

    def _level(self, run: Run, comm: Communicator, probe: Probe | None) -> Level:
        return Level(Averager(comm, run.vector, self.pull), TrainingLoss(), argmin, self.prox)

    @property
    def of_groups(self) -> LSGD:
        return replace(self, pull=self.group_pull, prox=self.group_prox)
