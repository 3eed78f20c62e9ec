"""Data-parallel training: every step uses the mean gradient of all ranks.

Li et al., PyTorch Distributed: Experiences on Accelerating Data Parallel Training, VLDB 2020.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ..aggregation import Codec, Mean, ReducedWire
from .run import Run
from .sharing import SharingMethod


@dataclass(kw_only=True)
class DataParallel(SharingMethod):
    """g ← (1/W) Σ_m g_m before every step, allreduced in buckets while backward runs; all ranks stay identical.

    Limits: it is SGD with the batches of all ranks; LocalSGD of period 1, for SGD without clipping.

    Not for: a network between nodes that takes longer for a message of P than backward does.

    Attributes:
        wire: how numbers travel: ``exact``, or rounded to ``bf16`` or ``fp16`` (twice: what each rank sends, and their
            mean; summed in fp32), which halves the bytes. In fp16 what is above 65,504 is an overflow, and what is
            below 6e-8 is lost.
    """

    wire: Literal["exact", "bf16", "fp16"] = "exact"

    def _codec(self, run: Run) -> Codec:
        if self.wire == "exact":
            return Mean()
        return ReducedWire({"bf16": torch.bfloat16, "fp16": torch.float16}[self.wire])
