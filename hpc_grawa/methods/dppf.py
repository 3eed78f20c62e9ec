"""DPPF: ranks are pulled to their mean, and pushed off it, so that they stay a distance apart in a wide valley.

Dimlioglu and Choromanska, Communication-Efficient Distributed Training for Collaborative Flat Optima Recovery in Deep
Learning, 2025 (arXiv 2507.20424).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..averaging.averager import Averager, inverse
from ..averaging.scores import Equal
from ..comm import Communicator
from ..errors import not_negative, unit_interval
from ..periods import Period
from .averaging import AveragingMethod, Level
from .base import Probe
from .run import Run


class PushingAverager(Averager):
    """x_m ← x_m + (x̄ - x_m)(α - λ/‖x_m - x̄‖); no push where the norm is 0 but for round-off."""

    def __init__(self, run: Run, comm: Communicator, pull: float, push: float) -> None:
        super().__init__(comm, run.vector, pull)
        self._push = push

    def _mix(self, x: Tensor, average: Tensor) -> None:
        self.center = average
        apart = x.sub_(average) if x.dtype == average.dtype else x.to(average.dtype).sub_(average)
        norm = torch.linalg.vector_norm(apart)
        alike = 4 * torch.finfo(average.dtype).eps * torch.linalg.vector_norm(average)  # a mean of equals is rounded
        # On the device: 1 - α + λ/norm.
        apart.mul_(torch.where(norm > alike, self._push / norm, 0.0).add_(1 - self.pull)).add_(average)
        if apart is not x:
            x.copy_(apart)


@dataclass(kw_only=True)
class DPPF(AveragingMethod):
    """x_m ← x_m + (x̄ - x_m)(α - λ/‖x_m - x̄‖): a pull to the mean, and a push off it of constant length.

    The distance of each rank to the mean settles at λ/α, which is the width of valley that it looks for.

    Limits: push 0 and pull 1 make it LocalSGD; one rank, training alone.

    Not for: whoever uses the model of a single rank, which stays off the center on purpose.

    Attributes:
        period: local steps between rounds, τ.
        pull: α, in [0, 1].
        push: λ, 0 or more, of the unit of the parameters' norm.
    """

    period: int | Period = 8
    pull: float
    push: float

    def __post_init__(self) -> None:
        super().__post_init__()
        unit_interval("method", self, "pull")
        not_negative("method", self, "push")

    def _level(self, run: Run, comm: Communicator, probe: Probe | None) -> Level:
        return Level(PushingAverager(run, comm, self.pull, self.push), Equal(), inverse)
