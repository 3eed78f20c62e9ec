"""1-bit SGD: each entry of a gradient is sent as its sign, with two levels for each row.

Seide, Fu, Droppo, Li and Yu, 1-Bit Stochastic Gradient Descent and its Application to Data-Parallel Distributed
Training of Speech DNNs, Interspeech 2014.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..aggregation import Codec, OneBit
from .run import Run
from .sharing import SharingMethod


@dataclass(kw_only=True)
class OneBitSGD(SharingMethod):
    """p = g + e, p̂ = the mean of a row's p ≥ 0 where p ≥ 0, else that of its p < 0, e ← p - p̂; g ← (1/W) Σ_m p̂_m.

    A tensor is the matrix [out, rest] with a row for each output; vectors are shared exactly. What all ranks make of it
    is not quantised once more, so each sends about (P/8 + 8·rows)(W - 1) bytes. Works with any optimizer.

    Limits: what was sent and what is left in e add up to all gradients; rows of one entry are sent exactly.

    Not for: many ranks: bytes grow with W, and beyond about 64 are more than those of ``DataParallel``.
    """

    def _codec(self, run: Run) -> Codec:
        return OneBit()
