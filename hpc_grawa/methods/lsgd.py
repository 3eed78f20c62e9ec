"""LSGD: ranks are pulled to the one with the smallest training loss.

Teng, Gao, Chalus, Choromanska, Goldfarb and Weller, Leader Stochastic Gradient Descent for Distributed Training of
Deep Learning Models, NeurIPS 2019.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..averaging.averager import Averager, argmin
from ..averaging.control import Control
from ..averaging.scores import TrainingLoss
from ..averaging.synchronizer import Synchronizer
from ..errors import require
from ..periods import Constant, Period
from .base import AveragingMethod, Probe, unit_interval
from .run import Run


@dataclass(kw_only=True)
class LSGD(AveragingMethod):
    """The leader is argmin_m of the mean training loss since the last round; its parameters are broadcast.

    x_m ← x_m + λ(x_leader - x_m), and x_m ← x_m + (μ/τ)(x_leader - x_m) after each local step. On two levels, each
    group has a leader of its own, and more often; where both are due, ranks are pulled to their group's leader first.

    Attributes:
        period: local steps between rounds of all ranks, τ.
        pull: λ to their leader, the paper's c.
        prox: μ to their leader, the paper's p.
        group_period: local steps between rounds within a group, which divide ``period``; null for one level.
        group_pull: λ to the group's leader.
        group_prox: μ to the group's leader.
        ranks_per_group: consecutive ranks that are a group (the last may be smaller); null for the ranks of a host.
    """

    needs_loss: ClassVar[bool] = True

    period: int | Period = 8
    pull: float = 0.1
    prox: float = 0.1
    group_period: int | None = None
    group_pull: float = 0.1
    group_prox: float = 0.1
    ranks_per_group: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        unit_interval(self, "pull", "prox", "group_pull", "group_prox")
        inner, ranks = self.group_period, self.ranks_per_group
        divides = inner is None or (inner >= 1 and not isinstance(self.period, Period) and self.period % inner == 0)
        divisor = f"null, or divide method.period, which is {self.period}"
        lockstep = inner is None or self.rounds == "lockstep"
        require(divides, "method.group_period", inner, divisor)
        require(ranks is None or ranks >= 1, "method.ranks_per_group", ranks, "null (hosts), or at least 1")
        require(ranks is None or inner is not None, "method.ranks_per_group", ranks, "null without method.group_period")
        require(lockstep, "method.rounds", self.rounds, "lockstep with method.group_period")

    def _assemble(self, run: Run, probe: Probe | None) -> None:
        if self.group_period is not None:
            self._group(run, self.group_period)
        self._synchronize(run, Averager(run.comm, run.vector, self.pull), TrainingLoss(), argmin, self.prox)

    def _group(self, run: Run, period: int) -> None:
        comm, ranks = run.comm, self.ranks_per_group
        group = comm.node() if ranks is None else comm.split([rank // ranks for rank in range(comm.size)])
        control = Control(group, run.facts, run.control.clock, decides=False)
        averager = Averager(group, run.vector, self.group_pull)
        run.synchronizers.append(
            Synchronizer(averager, TrainingLoss(), argmin, Constant(period), control, run.optimizer, self.group_prox)
        )
