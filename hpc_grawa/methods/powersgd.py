"""PowerSGD: gradients as products of thin matrices, by a step of power iteration at every step of training.

Vogels, Karimireddy and Jaggi, PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization, NeurIPS
2019; the warm-up is that of PyTorch's hook.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..aggregation import Codec, LowRank
from ..errors import require
from .run import Run
from .sharing import SharingMethod


@dataclass(kw_only=True)
class PowerSGD(SharingMethod):
    """M = G + e, P ← orth((1/W) Σ_m M_m Q), Q_m ← M_mᵀ P, e_m ← M_m - P Q_mᵀ, Q ← (1/W) Σ_m Q_m; G ← P Qᵀ.

    A tensor is the matrix [shape[0], rest]; vectors, and matrices of which little would be saved, are shared exactly.
    Sends r(n + m) numbers for a matrix n × m by two allreduces, the second of which waits for the end of backward.
    Works with any optimizer.

    Limits: at full rank with ``min_compression`` 0 it is ``DataParallel``; as long as it warms up, too. What all have
    sent and what is left in e add up to all gradients.

    Not for: networks that send a gradient within a backward pass anyway, models of vectors and small matrices, or ranks
    on processors of different kinds, whose P may differ in the last place.

    Attributes:
        rank: r, at least 1 (1, 2 and 4 in the paper); of a matrix n × m at most min(n, m).
        min_compression: a matrix is compressed where this many times r(n + m) is less than nm; 0: every one is.
        warmup_steps: steps that share the plain mean first (none in the paper; PyTorch's hook takes 1000).
    """

    rank: int = 2
    min_compression: float = 2.0
    warmup_steps: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.rank >= 1, "method.rank", self.rank, "at least 1")
        allowed = 0 <= self.min_compression < math.inf
        require(allowed, "method.min_compression", self.min_compression, "0 (every matrix is compressed), or more")
        require(self.warmup_steps >= 0, "method.warmup_steps", self.warmup_steps, "0 or more steps")

    def _codec(self, run: Run) -> Codec:
        return LowRank(self.rank, self.min_compression, lambda: run.facts.step < self.warmup_steps)
