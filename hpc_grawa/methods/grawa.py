"""GRAWA, MGRAWA, LGRAWA: ranks in flat regions (small gradients) weigh more.

Dimlioglu and Choromanska, GRAWA: Gradient-based Weighted Averaging for Distributed Training of Deep Learning Models,
AISTATS 2024.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

from torch import optim

from ..averaging.averager import Averager, inverse
from ..averaging.scores import SCORE_MOMENTUM, GradientNorm, Reduction, RunningGradientNorm, Score
from ..comm import Communicator
from ..errors import below_one, not_negative, require, unit_interval
from ..vector import Layers, ParameterVector, Partition
from .averaging import AveragingMethod, Level
from .base import Probe
from .run import Run


@dataclass(kw_only=True)
class _GradientWeighted(AveragingMethod):
    """What all of them have.

    Attributes:
        period: local steps between rounds, τ; 16 or 32 in the paper.
        pull: λ of x ← x + λ(c - x) at a round, in [0, 1]; .3, .5 or .7 in the paper.
        prox: μ of x ← x + (μ/τ)(c - x) after each local step, in [0, 1]; .01 or .05 in the paper.
        power: q, 0 or more; 1 as in the experiments, 2 as in the proof for convex functions.
        score_momentum: b of the scores' bias-corrected momentum, in [0, 1).
    """

    reduction: ClassVar[Reduction]

    pull: float = 0.5
    prox: float = 0.01
    power: float = 1.0
    score_momentum: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        unit_interval("method", self, "pull", "prox")
        not_negative("method", self, "power")
        below_one("method", self, "score_momentum")

    @property
    def partition(self) -> Partition:
        """The layers whose norms are taken."""
        return "tensor"

    @abstractmethod
    def _score(self, run: Run, layers: Layers, probe: Probe | None) -> Score: ...

    def _check(self, optimizer: optim.Optimizer, vector: ParameterVector, probe: Probe | None) -> None:
        super()._check(optimizer, vector, probe)
        vector.layers(self.partition)

    def _level(self, run: Run, comm: Communicator, probe: Probe | None) -> Level:
        layers = run.vector.layers(self.partition)
        averager = Averager(comm, run.vector, self.pull, layers)
        return Level(averager, self._score(run, layers, probe), partial(inverse, power=self.power), self.prox)


@dataclass(kw_only=True)
class GRAWA(_GradientWeighted):
    """Weights inverse to the gradient norm of the whole model: β_m ∝ ‖g_m‖₂^{-q}, c = Σ_m β_m x_m.

    A round costs a forward and backward pass of a fresh batch, the probe, beside its messages.

    Limits: equal norms (or power 0) with pull 1 and prox 0 make it LocalSGD; one rank with prox 0, training alone.

    Not for: losses that cannot be asked for a fresh batch between steps (take LocalMGRAWA or LocalLGRAWA); rounds so
    frequent that the probe counts.

    Attributes:
        score_momentum: b of the scores' bias-corrected momentum over rounds, in [0, 1); .9⁸ in the paper.
        probe_batches: fresh batches, one after another, that a score's gradient is the mean of; calls of an own probe.
        probe_from: draw them from the whole training set (``all``) or the rank's own ``shard``; not for an own probe.
    """

    reduction: ClassVar[Reduction] = "vector"

    score_momentum: float = SCORE_MOMENTUM
    probe_batches: int = 1
    probe_from: Literal["all", "shard"] = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.probe_batches >= 1, "method.probe_batches", self.probe_batches, "at least 1")

    def _check(self, optimizer: optim.Optimizer, vector: ParameterVector, probe: Probe | None) -> None:
        super()._check(optimizer, vector, probe)
        if probe is None:
            name = type(self).__name__
            raise ValueError(
                f"{name} scores ranks by the gradient of a fresh batch: pass probe=f where f() returns the loss of "
                f"one, or take LocalMGRAWA or LocalLGRAWA, which score by the training gradients"
            )

    def _score(self, run: Run, layers: Layers, probe: Probe | None) -> Score:
        assert probe is not None
        return GradientNorm(
            run.vector, layers, probe, self.reduction, self.score_momentum, self.probe_batches, run.comm.rank
        )


@dataclass(kw_only=True)
class MGRAWA(GRAWA):
    """One weight per model from the sum of layer norms: β_m ∝ (Σ_l ‖g_{m,l}‖_F)^{-q}, c = Σ_m β_m x_m.

    A round costs a forward and backward pass of a fresh batch, the probe, beside its messages.

    Limits: with one layer it is GRAWA; equal norms (or power 0) with pull 1 and prox 0 make it LocalSGD.

    Not for: losses that cannot be asked for a fresh batch between steps (take LocalMGRAWA).

    Attributes:
        layers: ``tensor`` (each parameter tensor), ``module``, or a list of groups of name patterns.
    """

    reduction: ClassVar[Reduction] = "sum"

    layers: Literal["tensor", "module"] | list[list[str]] = "tensor"

    @property
    def partition(self) -> Partition:
        return self.layers


@dataclass(kw_only=True)
class LGRAWA(MGRAWA):
    """One weight per layer: β_m^l ∝ ‖g_{m,l}‖_F^{-q}, c^l = Σ_m β_m^l x_m^l.

    A rank that has no gradient for a layer (an expert its data never reach) has weight 0 there. All weigh alike where
    no rank has one, and where it is round-off on all (a bias before BatchNorm). A round costs a forward and backward
    pass of a fresh batch, the probe, beside its messages.

    Limits: with one layer it is GRAWA and MGRAWA; equal norms (or power 0) with pull 1 and prox 0 make it LocalSGD.

    Not for: losses that cannot be asked for a fresh batch between steps (take LocalLGRAWA).
    """

    reduction: ClassVar[Reduction] = "layers"


@dataclass(kw_only=True)
class LocalMGRAWA(_GradientWeighted):
    """MGRAWA without a probe: its norms are a running mean of those of the training gradients since the last round.

    The GRAWA paper's appendix G. A step costs the norms of its gradient.

    Limits: equal norms (or power 0) with pull 1 and prox 0 make it LocalSGD.

    Not for: ranks whose batches differ in size or difficulty by their shard, as norms are of the rank's own data.

    Attributes:
        score_momentum: b of the norms' bias-corrected running mean over the local steps of a round, in [0, 1).
        layers: ``tensor`` (each parameter tensor), ``module``, or a list of groups of name patterns.
    """

    reduction: ClassVar[Reduction] = "sum"

    score_momentum: float = 0.85
    layers: Literal["tensor", "module"] | list[list[str]] = "tensor"

    @property
    def partition(self) -> Partition:
        return self.layers

    def _score(self, run: Run, layers: Layers, probe: Probe | None) -> Score:
        return RunningGradientNorm(run.vector, layers, self.reduction, self.score_momentum)


@dataclass(kw_only=True)
class LocalLGRAWA(LocalMGRAWA):
    """LGRAWA without a probe: its norms are a running mean of those of the training gradients since the last round.

    The GRAWA paper's appendix G. A step costs the norms of its gradient.

    Limits: with one layer it is LocalMGRAWA; equal norms (or power 0) with pull 1 and prox 0 make it LocalSGD.

    Not for: ranks whose batches differ in size or difficulty by their shard, as norms are of the rank's own data.
    """

    reduction: ClassVar[Reduction] = "layers"
