"""Data-parallel training: every step uses the mean gradient of all ranks.

Li et al., PyTorch Distributed: Experiences on Accelerating Data Parallel Training, VLDB 2020.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..aggregation import Codec, Mean
from .run import Run
from .sharing import SharingMethod


@dataclass(kw_only=True)
class DataParallel(SharingMethod):
    """g ← (1/W) Σ_m g_m before every step, allreduced in buckets while backward runs; all ranks stay identical.

    Limits: it is SGD with the batches of all ranks; LocalSGD of period 1, for SGD without clipping.

    Not for: a network between nodes that takes longer for a message of P than backward does.

    Attributes:
        bucket_mb: largest size of a bucket in MiB; a larger tensor is a bucket of its own.
        on_nonfinite: a mean gradient that is not finite is an ``error`` on all ranks, or all ``skip`` the step.
    """

    def _codec(self, run: Run) -> Codec:
        return Mean()
