"""What methods share that average parameters now and then."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

from torch import optim

from ..averaging.averager import Averager, WeightRule
from ..averaging.control import Control
from ..averaging.probe import Counted
from ..averaging.riders import LocalMomentum, Rider, RunningStatistics, WeightBuffers
from ..averaging.scores import Score
from ..averaging.synchronizer import Pool, Synchronizer
from ..batchnorm import norms
from ..comm import Communicator
from ..errors import ConfigError, label, require
from ..periods import Constant, Period, is_length
from ..vector import ParameterVector
from .base import Method, Probe
from .run import Run
from .sharing import SharingMethod


class Level(NamedTuple):
    """How ranks of one communicator average.

    Attributes:
        averager: of these ranks.
        score: what each says about itself.
        rule: scores -> weights.
        prox: μ of the pull between rounds.
    """

    averager: Averager
    score: Score
    rule: WeightRule
    prox: float = 0.0


class CenteredAverager(Averager):
    """Has a center from the start, which it keeps: the common parameters, or the mean of the ranks' own."""

    def __init__(self, run: Run, comm: Communicator, pull: float = 1.0) -> None:
        super().__init__(comm, run.vector, pull)
        center = run.vector.data.to(run.vector.exact_dtype, copy=True)
        if not run.common_start:
            center.div_(comm.size)
            comm.allreduce(center, "setup").wait()
        self.center = self.kept["center"] = center


@dataclass(kw_only=True)
class AveragingMethod(Method):
    """A method that averages parameters now and then.

    Attributes:
        period: local steps between rounds, τ: a number, or a class of ``hpc_grawa.periods`` (``Constant``, ``QSR``,
            ``Sqrt``, ``PostLocal``, ``SWAP``) or of one's own, that is asked at each round's first step.
        local_momentum: the optimizer's state at a round of all ranks: ``keep``, ``reset`` or ``average`` (it rides in
            the message; a rank that is healed by all takes it over, too, one that its group heals begins anew).
        buffers: BatchNorm statistics of evaluated models: ``recalibrate`` on training batches, ``average`` (they ride
            in the message), or as they are on one rank (``local``). Other buffers of ``state_dict`` belong to the
            weights (spectral norm's vectors, codebooks, moving averages): at a round of all they take over those of the
            rank that weighs most, since a mean of such sets need not be one; constants, which need not travel, are
            registered with ``persistent=False``. So do frozen parameters that the model changes itself (momentum
            encoders, mean teachers): once ranks are found to differ in one, looked at in rounds 1, 2, 4, 8, ..., it
            rides too. Those that nobody changes cost nothing else.
        rounds: ``lockstep``: each rank makes τ steps; ``pooled``: all ranks together make W·τ, each as many as it can,
            so that a round waits for at most one step of the slowest rank. Steps are counted at rounds: learning
            rate, evaluations, checkpoints and a word to end wait for one, so that long periods are for lockstep.
        sharing: a method that shares gradients (``DataParallel``), for periods with a switch (``PostLocal``, ``SWAP``):
            before it the run is that method's, and what averages begins where it ends, but for what compression has
            kept back: gradients still to be sent, and DeepGradientCompression's momentum. Null for other periods.
        group_period: local steps between rounds within each group of ranks, which average more often than all do, in
            the same way; they divide a ``period`` that is a number. Null: all average, and no groups.
        ranks_per_group: consecutive ranks that are a group (the last may be smaller); null for the ranks of a host.
    """

    period: int | Period = 32
    local_momentum: Literal["keep", "reset", "average"] = "keep"
    buffers: Literal["recalibrate", "average", "local"] = "recalibrate"
    rounds: Literal["lockstep", "pooled"] = "lockstep"
    sharing: SharingMethod | None = None
    group_period: int | None = None
    ranks_per_group: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.period, Period):
            self.period.check()
        else:
            allowed = "at least 1 local step, and whole, or a Period"
            require(is_length(self.period), "method.period", self.period, allowed)
        switches = isinstance(self.period, Period) and type(self.period).shares is not Period.shares
        never = f"null with method.period {self.period}, which never shares gradients (PostLocal, SWAP)"
        require(self.sharing is None or switches, "method.sharing", self.sharing, never)
        inner, ranks = self.group_period, self.ranks_per_group
        steps = 0 if isinstance(self.period, Period) or self.period == math.inf else self.period
        divides = inner is None or (inner >= 1 and steps % inner == 0)
        divisor = f"null, or divide method.period, which is {self.period}"
        lockstep = inner is None or self.rounds == "lockstep"
        require(divides, "method.group_period", inner, divisor)
        require(ranks is None or ranks >= 1, "method.ranks_per_group", ranks, "null (hosts), or at least 1")
        require(ranks is None or inner is not None, "method.ranks_per_group", ranks, "null without method.group_period")
        require(lockstep, "method.rounds", self.rounds, "lockstep with method.group_period")

    def _check(self, optimizer: optim.Optimizer, vector: ParameterVector, probe: Probe | None) -> None:
        super()._check(optimizer, vector, probe)
        name, kinds = label(optimizer), [kind.__name__ for kind in type(optimizer).__mro__]
        if "ZeroRedundancyOptimizer" in kinds:
            raise ConfigError(
                f"the optimizer is a {name}, which makes all ranks' parameters the same at every step, so that there "
                f"is nothing to average: pass the plain optimizer, or take hpc_grawa.DataParallel()"
            )
        if is_schedule_free(optimizer):
            other = (
                "take one with a schedule, or hpc_grawa.DataParallel() with optimizer.eval() before evaluating and "
                "saving"
            )
            raise ConfigError(
                f"the optimizer is a {name}, whose train() and eval() exchange the parameters for others (schedule-"
                f"free): a round would average the ones and leave the others apart; "
                f"{getattr(optimizer, 'where_averaged', other)}"
            )

    def _riders(self, run: Run) -> list[Rider]:
        riders: list[Rider] = []
        if self.local_momentum == "average":
            riders.append(LocalMomentum(run.vector, run.optimizer))
        if self.buffers == "average" and norms(run.vector.model):
            riders.append(RunningStatistics(run.vector.model))
        others = WeightBuffers(run.vector)
        return [*riders, others] if len(others) else riders

    @property
    def steps_alike(self) -> bool:
        return self.sharing is not None

    @abstractmethod
    def _level(self, run: Run, comm: Communicator, probe: Probe | None) -> Level:
        """How the ranks of ``comm`` average: all of the run, or a group of them."""

    @property
    def of_groups(self) -> AveragingMethod:
        """The method by which groups average."""
        return self

    def _assemble(self, run: Run, probe: Probe | None) -> None:
        period = self.period if isinstance(self.period, Period) else Constant(self.period)
        average = partial(self._average, run, period, probe)
        if self.sharing is not None:
            run.share_first(self.sharing.aggregator(run), period.shares, average)
        elif period.shares(run.facts):
            raise ConfigError(
                f"method.sharing is null: must say how gradients are shared before the switch of method.period, "
                f"{period} (DataParallel)"
            )
        else:
            average()

    def _average(self, run: Run, period: Period, probe: Probe | None) -> None:
        """Set up the synchronizers: of groups, if there are any, then of all ranks."""
        probe = None if probe is None else Counted(probe)
        if self.group_period is not None:
            comm, ranks = run.comm, self.ranks_per_group
            group = comm.node() if ranks is None else comm.split([rank // ranks for rank in range(comm.size)])
            control = Control(group, run.facts, run.control.clock, decides=False)
            level = self.of_groups._level(run, group, probe)
            self._synchronize(run, level, Constant(self.group_period), control)
        level = self._level(run, run.comm, probe)
        level.averager.riders = self._riders(run)
        pool = Pool(run.comm.counter(), run.comm.size) if self.rounds == "pooled" else None
        self._synchronize(run, level, period, run.control, self.local_momentum == "reset", pool)

    def _synchronize(
        self,
        run: Run,
        level: Level,
        period: Period,
        control: Control,
        reset_momentum: bool = False,
        pool: Pool | None = None,
    ) -> None:
        averager, score, rule, prox = level
        synchronizer = Synchronizer(averager, score, rule, period, control, run.optimizer, prox, reset_momentum, pool)
        synchronizer.on_round = lambda event: run.on_round(event)
        run.synchronizers.append(synchronizer)
        synchronizer.levels = run.synchronizers


def is_schedule_free(optimizer: optim.Optimizer) -> bool:
    """Whether the optimizer keeps two sets of parameters: those it trains (``train()``) and those to use (``eval()``).

    Source: Defazio et al., The Road Less Scheduled, NeurIPS 2024.
    """
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))
