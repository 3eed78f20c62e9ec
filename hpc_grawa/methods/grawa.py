"""GRAWA, MGRAWA, LGRAWA: ranks in flat regions (small gradients) weigh more.

Dimlioglu and Choromanska, GRAWA: Gradient-based Weighted Averaging for Distributed Training of Deep Learning Models,
AISTATS 2024.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

from ..averaging import Averager, inverse
from ..scores import SCORE_MOMENTUM, GradientNorm
from ..vector import Partition
from .base import AveragingMethod, Probe, Run, not_negative, unit_interval


@dataclass(kw_only=True)
class GRAWA(AveragingMethod):
    """Weights inverse to the gradient norm of the whole model: β_m ∝ ‖g_m‖₂^{-q}, c = Σ_m β_m x_m.

    Attributes:
        period: local steps between rounds, τ.
        pull: λ of x ← x + λ(c - x) at a round.
        prox: μ of x ← x + (μ/τ)(c - x) after each local step.
        power: q; 1 as in the experiments, 2 as in the proof for convex functions.
        score_momentum: b of the scores' bias-corrected momentum over rounds.
        probe_batches: fresh batches, of the training batch size, that a score's gradient is the mean of.
        probe_from: draw them from the whole training set (``all``) or the rank's own ``shard``.
    """

    reduction: ClassVar[Literal["vector", "sum", "layers"]] = "vector"

    pull: float = 0.5
    prox: float = 0.01
    power: float = 1.0
    score_momentum: float = SCORE_MOMENTUM
    probe_batches: int = 1
    probe_from: Literal["all", "shard"] = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        unit_interval(self, "pull", "prox")
        not_negative(self, "power")
        self._require("score_momentum", 0 <= self.score_momentum < 1, "in [0, 1)")
        self._require("probe_batches", self.probe_batches >= 1, "at least 1")

    @property
    def partition(self) -> Partition:
        """The layers whose norms are taken."""
        return "tensor"

    def _assemble(self, run: Run, probe: Probe | None) -> None:
        if probe is None:
            name = type(self).__name__
            raise ValueError(
                f"{name} scores ranks by the gradient of a fresh batch: pass build(..., probe=f) where f() returns "
                f"the loss of one"
            )
        layers = run.vector.layers(self.partition)
        score = GradientNorm(run.vector, layers, probe, self.reduction, self.score_momentum)
        averager = Averager(run.comm, run.vector, self.pull, layers)
        self._synchronize(run, averager, score, partial(inverse, power=self.power), self.prox)


@dataclass(kw_only=True)
class MGRAWA(GRAWA):
    """One weight per model from the sum of layer norms: β_m ∝ (Σ_l ‖g_{m,l}‖_F)^{-q}, c = Σ_m β_m x_m.

    Attributes:
        layers: ``tensor`` (each parameter tensor), ``module``, or a list of groups of name patterns.
    """

    reduction: ClassVar[Literal["vector", "sum", "layers"]] = "sum"

    layers: Literal["tensor", "module"] | list[list[str]] = "tensor"

    @property
    def partition(self) -> Partition:
        return self.layers


@dataclass(kw_only=True)
class LGRAWA(MGRAWA):
    """One weight per layer: β_m^l ∝ ‖g_{m,l}‖_F^{-q}, c^l = Σ_m β_m^l x_m^l."""

    reduction: ClassVar[Literal["vector", "sum", "layers"]] = "layers"
