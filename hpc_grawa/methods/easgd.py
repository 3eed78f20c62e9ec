"""EASGD: an elastic force between each rank and a center that moves slowly.

Zhang, Choromanska and LeCun, Deep learning with Elastic Averaging SGD, NeurIPS 2015. With Nesterov momentum in the
local optimizer this is EAMSGD.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..averaging.averager import inverse, pull
from ..averaging.scores import Equal
from ..comm import Communicator
from ..errors import unit_interval
from ..periods import Period
from .averaging import AveragingMethod, CenteredAverager, Level
from .base import Probe
from .run import Run


class ElasticAverager(CenteredAverager):
    """x_m ← x_m - α(x_m - c); c ← (1-β)c + β·x̄, both from the old values, with α = β/W."""

    def __init__(self, run: Run, comm: Communicator, beta: float) -> None:
        super().__init__(run, comm, beta / comm.size)
        self._beta = beta

    def _mix(self, x: Tensor, average: Tensor) -> None:
        center = self.kept["center"]
        pull(x, center, self.pull)
        center.lerp_(average, self._beta)


@dataclass(kw_only=True)
class EASGD(AveragingMethod):
    """x_m ← x_m - (β/W)(x_m - c), c ← (1-β)c + β·x̄: ranks and a center attract each other, an elastic force.

    The center is state, replicated on all ranks, and moves slowly.

    Limits: pull 0 is training alone, at the start's center, but for buffers that belong to the weights (see
    ``buffers``); where ranks and center agree it rests.

    Not for: many ranks and few rounds: each moves by β/W only, so that they drift apart.

    Attributes:
        period: local steps between rounds, τ; 4, 8 or 16 in the papers.
        pull: β, the center's step to the mean, in [0, 1]; each rank moves by β/W; .1, .3 or .43 in GRAWA's paper.
    """

    period: int | Period = 8
    pull: float = 0.43

    def __post_init__(self) -> None:
        super().__post_init__()
        unit_interval("method", self, "pull")

    def _level(self, run: Run, comm: Communicator, probe: Probe | None) -> Level:
        return Level(ElasticAverager(run, comm, self.pull), Equal(), inverse)
