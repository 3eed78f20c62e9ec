"""LSGD: ranks are pulled to the one with the smallest training loss.

Teng, Gao, Chalus, Choromanska, Goldfarb and Weller, Leader Stochastic Gradient Descent for Distributed Training of
Deep Learning Models, NeurIPS 2019.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..averaging import Averager, argmin
from ..scores import TrainingLoss
from .base import AveragingMethod, Probe, Run, unit_interval


@dataclass(kw_only=True)
class LSGD(AveragingMethod):
    """The leader is argmin_m of the mean training loss since the last round; its parameters are broadcast.

    x_m ← x_m + λ(x_leader - x_m), and x_m ← x_m + (μ/τ)(x_leader - x_m) after each local step.

    Attributes:
        period: local steps between rounds, τ.
        pull: λ, the paper's c.
        prox: μ, the paper's p.
    """

    period: int = 8
    pull: float = 0.1
    prox: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        unit_interval(self, "pull", "prox")

    def _assemble(self, run: Run, probe: Probe | None) -> None:
        self._synchronize(run, Averager(run.comm, run.vector, self.pull), TrainingLoss(), argmin, self.prox)
