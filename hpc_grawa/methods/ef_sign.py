"""EF-signSGD: the scaled sign of a gradient, and what it leaves out is added to the next."""

from __future__ import annotations

from dataclasses import dataclass

from ..aggregation import Codec, ScaledSigns
from .run import Run
from .sharing import SharingMethod


@dataclass(kw_only=True)
class EFSign(SharingMethod):
    """p = g + e, p̂ = (‖p‖₁/d) sign(p) of each tensor of d entries, e ← p - p̂; g ← (1/W) Σ_m p̂_m.

    The sign of 0 is +. Each rank sends P/8 bytes and a number for each tensor, W - 1 times. Works with any optimizer.

    Limits: what was sent and what is left in e add up to all gradients; tensors of one entry are shared exactly.

    Not for: many ranks: bytes grow with W, and beyond 64 are more than those of ``DataParallel``. e is in units of the
    gradient, so where the learning rate falls the rest of earlier steps falls with it (the paper's e has it in it).

    Source: Karimireddy, Rebjock, Stich and Jaggi, Error Feedback Fixes SignSGD (ICML 2019), one worker; each rank's p̂
    is of its own.

    Attributes:
        bucket_mb: largest size of a bucket in MiB; a larger tensor is a bucket of its own.
        on_nonfinite: a shared gradient that is not finite is an ``error`` on all ranks, or all ``skip`` the step.
    """

    def _codec(self, run: Run) -> Codec:
        return ScaledSigns()
