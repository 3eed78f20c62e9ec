"""Deep gradient compression: one entry in a thousand is sent, when its momentum has added up to something.

Lin, Han, Mao, Wang and Dally, Deep Gradient Compression: Reducing the Communication Bandwidth for Distributed Training,
ICLR 2018.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..aggregation import Codec, TakenOver, TopK
from ..errors import ConfigError, require
from ..schedules import RunFacts
from .run import Run
from .sharing import SharingMethod


@dataclass(kw_only=True)
class DeepGradientCompression(SharingMethod):
    """u ← μu + g, v ← v + u; g ← (1/W) Σ_m of the largest |v_m|, where then v_m = u_m = 0.

    μ, Nesterov's v ← v + g + μu, and weight decay, which is added to g before, are those of the optimizer, which must
    be ``SGD`` (``SAM`` and the like may be around it) and steps without them as long as gradients are shared. Of each
    matrix the ⌈ratio · entries⌉ largest are sent with their index, in one allgather a bucket: 8 bytes each, W - 1
    times. Vectors are shared exactly, with their momentum.

    Limits: at ratio 1 matrices are trained by SGD without momentum (at 1 + μ times its lr, where it is Nesterov's), or,
    without ``masking``, with it, as by ``DataParallel`` (but for weight decay of a parameter that some ranks have no
    gradient of, which is added by the others). Without ``momentum_correction`` what was sent and what is left
    in v add up to all gradients.

    Not for: gradients that are shared more than once a step, and not where ratio · W comes near 1.

    Attributes:
        ratio: the share of a matrix's entries that is sent, in (0, 1]; .001 in the paper.
        warmup_epochs: epochs E in which the share falls to it, in epoch t (from 1) to ratio^(t/E): .25, .063, .016,
            .004, .001. Where a loop of one's own knows no epochs, each is a hundredth of its budget. 0: none.
        clip_norm: each rank's own gradient is clipped to this norm over √W before it is added to anything; buckets then
            leave after backward. Null: not clipped.
        masking: whether u becomes 0 where v is sent (momentum factor masking).
        momentum_correction: whether momentum is added up before entries are chosen; else v ← v + g, and any optimizer
            does what it does with what is shared.
    """

    ratio: float = 0.001
    warmup_epochs: int = 5
    clip_norm: float | None = None
    masking: bool = True
    momentum_correction: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.ratio <= 1, "method.ratio", self.ratio, "in (0, 1]")
        require(self.warmup_epochs >= 0, "method.warmup_epochs", self.warmup_epochs, "0 (no warm-up), or more epochs")
        clips = self.clip_norm is None or 0 < self.clip_norm < math.inf
        require(clips, "method.clip_norm", self.clip_norm, "positive, or null")

    def ratio_at(self, facts: RunFacts) -> float:
        """The share of entries that is sent in the coming step."""
        if not self.warmup_epochs:
            return self.ratio
        if facts.steps_per_epoch is not None:
            epoch = int(facts.elapsed("epochs"))
        else:
            epoch = 100 * facts.step // max(1, facts.total_steps or 0)
        return math.pow(self.ratio, min(1.0, (epoch + 1) / self.warmup_epochs))

    def _codec(self, run: Run) -> Codec:
        facts, vector = run.facts, run.vector
        if self.warmup_epochs and facts.steps_per_epoch is None and facts.total_steps is None:
            raise ConfigError(
                f"method.warmup_epochs is {self.warmup_epochs}: must be 0, or the run must know how long an epoch, or "
                f"it, is (facts=RunFacts(steps_per_epoch=...), or total_steps=...)"
            )
        taken = TakenOver(run.optimizer, vector.parameters) if self.momentum_correction else None
        clip_norm = None if self.clip_norm is None else self.clip_norm / math.sqrt(run.comm.size)
        return TopK(vector, lambda: self.ratio_at(facts), taken, self.masking, clip_norm)
