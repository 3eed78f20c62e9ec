"""Local SGD: ranks replace their parameters by the uniform mean after every period.

Stich, Local SGD Converges Fast and Communicates Little, ICLR 2019.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..averaging.averager import Averager, inverse
from ..averaging.scores import Equal
from ..comm import Communicator
from ..periods import Period
from .averaging import AveragingMethod, Level
from .base import Probe
from .run import Run


@dataclass(kw_only=True)
class LocalSGD(AveragingMethod):
    """x_m ← x̄ = (1/W) Σ_j x_j after every period of local steps.

    With ``PostLocal`` it is post-local SGD (Lin et al., ICLR 2020), with ``SWAP`` stochastic weight averaging in
    parallel, with ``QSR`` the quadratic synchronization rule, each by the period and ``sharing``.

    Limits: period 1 is DataParallel, for SGD with momentum and weight decay, without clipping.

    Not for: periods of hundreds of steps at a large learning rate, where ranks part too far for their mean to be good.

    Attributes:
        period: local steps between rounds, H; 8 is EASGD's in GRAWA's paper.
    """

    period: int | Period = 8

    def _level(self, run: Run, comm: Communicator, probe: Probe | None) -> Level:
        return Level(Averager(comm, run.vector, 1.0), Equal(), inverse)
