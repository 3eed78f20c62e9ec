"""When ranks average: a round after every period of local steps, and the proximity pull between rounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn, optim

from .averaging import Averager, WeightRule, pull
from .control import Control
from .schedules import Period
from .scores import Score


@dataclass(frozen=True)
class Round:
    """What happened in one round; the same on every rank.

    Attributes:
        number: counted from 1.
        step: local steps made by each rank.
        period: H, the local steps of this round.
        lr: learning rate of its last step.
        weights: ``[W, K]``.
        healed: ranks whose parameters were not finite and became the center.
    """

    number: int
    step: int
    period: int
    lr: float
    weights: Tensor
    healed: tuple[int, ...]

    @property
    def leader(self) -> int:
        """The rank with the largest mean weight."""
        return int(self.weights.mean(1).argmax())


class Synchronizer:
    """Runs rounds in lockstep: scores → allgather → weights → center → pull, after each period of local steps.

    Between rounds each local step adds the proximity pull x ← x + (μ/H)(c - x) to the last round's center c.

    Args:
        averager: makes the center and pulls.
        score: what a rank says about itself.
        rule: scores ``[W, K]`` → weights ``[W, K]``.
        period: local steps until the next round.
        control: the control word, which rides on the round's allgather.
        optimizer: reset on a rank that is healed.
        prox: μ.
        reset_momentum: clear the optimizer's state at every round.
    """

    def __init__(
        self,
        averager: Averager,
        score: Score,
        rule: WeightRule,
        period: Period,
        control: Control,
        optimizer: optim.Optimizer,
        prox: float = 0.0,
        reset_momentum: bool = False,
    ) -> None:
        self.averager, self.score, self.rule = averager, score, rule
        self.control, self.optimizer, self.prox = control, optimizer, prox
        self._reset_momentum = reset_momentum
        self._period = period
        self._vector = averager.vector
        #: Local steps since the last round.
        self.position = 0
        self.rounds = 0
        self.healed = 0
        self.on_round: Callable[[Round], None] = lambda _: None
        control.columns = max(control.columns, score.size)
        self._begin()

    def after_step(self, loss: Tensor | None) -> None:
        """Observe a local step; pull to the center, and run a round if one is due."""
        self.score.observe(loss)
        self.position += 1
        if self.prox and self.averager.center is not None:
            pull(self._vector.data, self.averager.center, self.prox / self.period)
        if self.position >= self.period:
            self.round()

    def round(self) -> None:
        """Run a round now; all ranks must."""
        vector, x = self._vector, self._vector.data
        vector.check()
        # One pass, no allocation: a sum is finite only if every term is (overflow counts as diverged).
        finite = bool(x.sum(dtype=vector.exact_dtype).isfinite())
        scores, alive = self.control.exchange(self.position, finite, self.score.take())
        weights = self.rule(torch.where(alive[:, None], scores, torch.nan))
        self.averager.start(x, weights, alive)
        if not finite:
            self._forget()  # before the averages arrive, which it takes over like every rank
        self.averager.finish(x, healed=not finite)
        if self._reset_momentum:
            self.optimizer.state.clear()
        healed = tuple((~alive).nonzero().flatten().tolist())
        self.rounds += 1
        self.healed += len(healed)
        facts = self.control.facts
        self.on_round(Round(self.rounds, facts.step, self.position, facts.lr, weights, healed))
        self._begin()

    def finish(self) -> None:
        """End with a round: the last one, shortened to the steps made since the one before."""
        if self.position:
            self.round()

    def _begin(self) -> None:
        self.position = 0
        self.period = self._period(self.control.facts)

    def _forget(self) -> None:
        """Drop what a rank that is not finite remembers: it starts anew from the center."""
        self.optimizer.state.clear()
        self.score.reset()
        for module in self._vector.model.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase):
                module.reset_running_stats()
