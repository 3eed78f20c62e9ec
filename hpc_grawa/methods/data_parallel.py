"""Data-parallel training: every step uses the mean gradient of all ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..aggregation import Bucketed, Mean
from ..errors import require
from .base import Method, Probe
from .run import Run


@dataclass(kw_only=True)
class DataParallel(Method):
    """g ← (1/W) Σ_m g_m before every step, allreduced in buckets while backward runs; all ranks stay identical.

    Attributes:
        bucket_mb: largest size of a bucket in MiB; a larger tensor is a bucket of its own.
        on_nonfinite: a mean gradient that is not finite is an ``error`` on all ranks, or all ``skip`` the step.
    """

    bucket_mb: float = 25.0
    on_nonfinite: Literal["error", "skip"] = "error"

    def __post_init__(self) -> None:
        require(0 < self.bucket_mb < float("inf"), "method.bucket_mb", self.bucket_mb, "a positive number of MiB")

    def _assemble(self, run: Run, probe: Probe | None) -> None:
        bucket_bytes = int(self.bucket_mb * 2**20)
        run.aggregator = Bucketed(run.comm, run.vector, Mean(), bucket_bytes, self.on_nonfinite)
