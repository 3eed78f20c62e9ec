"""What methods share that share gradients before every step."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

from ..aggregation import Bucketed, Codec
from ..errors import require
from .base import Method, Probe
from .run import Run


@dataclass(kw_only=True)
class SharingMethod(Method):
    """A method that shares gradients before every step, in buckets of a codec's form; all ranks stay identical.

    Attributes:
        bucket_mb: largest size of a bucket in MiB, of the last one 1 at most; a larger tensor is a bucket of its own.
        on_nonfinite: a shared gradient that is not finite is an ``error`` on all ranks, or all ``skip`` the step.
    """

    bucket_mb: float = 25.0
    on_nonfinite: Literal["error", "skip"] = "error"

    def __post_init__(self) -> None:
        require(0 < self.bucket_mb < math.inf, "method.bucket_mb", self.bucket_mb, "a positive number of MiB")

    @property
    def steps_alike(self) -> bool:
        return True

    @abstractmethod
    def _codec(self, run: Run) -> Codec:
        """What a bucket is on the wire."""

    def aggregator(self, run: Run) -> Bucketed:
        """Shares this run's gradients; all ranks must call it."""
        return Bucketed(run.comm, run.vector, self._codec(run), int(self.bucket_mb * 2**20), self.on_nonfinite)

    def _assemble(self, run: Run, probe: Probe | None) -> None:
        run.aggregator = self.aggregator(run)
