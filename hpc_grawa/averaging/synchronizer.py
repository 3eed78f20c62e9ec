"""When ranks average: a round after every period of local steps, and the proximity pull between rounds."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, optim

from ..batchnorm import reset as reset_statistics
from ..comm import SharedCounter
from ..errors import NonFinite
from ..periods import Period, length
from .averager import Averager, WeightRule
from .control import Control, Table
from .scores import Score


@dataclass(frozen=True)
class Round:
    """What happened in one round; the same on every rank.

    Attributes:
        number: counted from 1.
        step: local steps made, as ``RunFacts`` counts them.
        period: H, the local steps of this round; of all ranks on average, where only the end of the run ended it.
        lr: learning rate of its last step.
        ranks: those that took part.
        weights: of these ranks, ``[W, K]``.
        made: local steps of each of them in this round.
        healed: those whose parameters were not finite and became the center.
        slowest: the one that computed longest per local step.
    """

    number: int
    step: int
    period: int
    lr: float
    ranks: tuple[int, ...]
    weights: Tensor
    made: tuple[int, ...]
    healed: tuple[int, ...]
    slowest: int

    @property
    def leader(self) -> int:
        """The rank with the largest mean weight."""
        return self.ranks[int(self.weights.mean(1).argmax())]

    @property
    def effective_workers(self) -> float:
        """1/Σβ², the mean over the K columns: W where all weigh the same, 1 where one rank has all the weight."""
        return float((1 / self.weights.square().sum(0)).mean())


class Pool:
    """W·H tickets of a counter that all ranks share; a local step takes one, whoever makes it.

    Each rank draws until it gets a ticket past the end, so a round takes one ticket more from every rank that enters it
    so, and the next round's follow after these.

    Args:
        counter: of all ranks.
        world_size: W.
    """

    def __init__(self, counter: SharedCounter, world_size: int) -> None:
        self._counter, self._world_size = counter, world_size
        self._start: float = 0
        self._end: float = 0

    def open(self, period: float) -> None:
        """Have W·H tickets, whatever there were of this round; without end if H is infinite."""
        self._end = self._start + (period if period == math.inf else round(period)) * self._world_size

    def close(self, overdrawn: int) -> None:
        """Let the next round's follow, after ``overdrawn`` ones were drawn past the end."""
        self._start = self._end + overdrawn

    def draw(self) -> bool:
        """Whether there was a ticket left."""
        return self._counter.add(1) <= self._end


@dataclass(frozen=True)
class _Opened:
    """A round between its two halves."""

    table: Table
    weights: Tensor
    staying: int


class Synchronizer:
    """Runs rounds: scores → allgather → weights → center → pull, after each period of local steps.

    Between rounds each local step adds the proximity pull x ← x + (μ/H)(c - x) to the last round's center c. In
    lockstep each rank makes H steps; with a pool all ranks together make W·H, each as many as it can, and a round waits
    for at most one step of the slowest. A round has two halves, ``open`` and ``close``, here one right after the other.

    Args:
        averager: makes the center and pulls.
        score: what a rank says about itself.
        rule: scores ``[W, K]`` → weights ``[W, K]``.
        period: local steps of a round, asked at its first step.
        control: the control word, which rides on the round's allgather.
        optimizer: reset on a rank that is healed.
        prox: μ.
        reset_momentum: clear the optimizer's state at every round.
        pool: of tickets for local steps; None for lockstep.
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
        pool: Pool | None = None,
    ) -> None:
        self.averager, self.score, self.rule = averager, score, rule
        self.control, self.optimizer, self.prox, self.pool = control, optimizer, prox, pool
        self._reset_momentum = reset_momentum
        self._vector = averager.vector
        #: What of the optimizer's state is made with it (Adagrad's), if it has made no step since.
        self._began: dict[Tensor, dict[str, Any]] = {}
        if all(isinstance(one, dict) and one.get("step", 1) == 0 for one in optimizer.state.values()):
            self._began = _copied(optimizer.state)
        #: Asked at the first step of each round.
        self.ask = period
        #: H of the present round; before its first step, of the one before.
        self.period: float = math.inf
        #: This rank's local steps since the last round.
        self.position = 0
        #: Rounds, and ranks that were healed in them.
        self.completed = 0
        self.healed = 0
        #: All of the run, this one among them: a rank that one of them heals begins anew for every one.
        self.levels = [self]
        self.on_round: Callable[[Round], None] = lambda _: None
        control.columns = max(control.columns, score.size)
        self._ticket = False
        #: The ends of local steps that may still be under way.
        self._computing: deque[torch.cuda.Event] = deque()
        self._over = False
        averager.keeps_center |= prox > 0
        self._opened: _Opened | None = None
        #: Steps per rank in the pool, the period or what is left of the run; 0 where it is not open.
        self._pooled: float = 0

    def before_step(self) -> bool:
        """Whether this rank is to make a local step; if the pool is used up, run the round instead."""
        if self.pool is None or self._ticket:
            return True
        if not self._pooled:
            self._begin()
        while len(self._computing) > 1:  # tickets are for steps that a device makes, which the host runs ahead of
            self._computing.popleft().synchronize()
        self._ticket = self.pool.draw()
        if not self._ticket:
            self.round()
        return self._ticket

    def observe(self, loss: Tensor | None) -> None:
        """See a local step, and pull to the center."""
        if self.pool is not None and not self._ticket:
            raise RuntimeError("under pooled rounds make a local step only if before_step() returns True")
        self._ticket = False
        if self.pool is not None and self._vector.data.is_cuda:
            ends = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ends.record(torch.cuda.current_stream(self._vector.data.device))
            self._computing.append(ends)
        if self.pool is None and not self.position:
            self._begin()
        self.score.observe(loss)
        self.position += 1
        self.averager.after_step(self.prox / self.period)

    def round_if_due(self) -> None:
        """Run a round if this rank has made its steps; a pool's end is seen by ``before_step``."""
        if self.pool is None and self.position >= self.period:
            self.round()

    def round(self, leaving: bool = False) -> None:
        """Run a round now, both halves in a row; all ranks must."""
        self.open(leaving)
        self.close()

    def open(self, leaving: bool = False) -> None:
        """The first half: score, exchange, weights, start.

        Args:
            leaving: this rank makes no further steps. (Deadlock argument: a rank that has left goes on taking part in
                rounds until every rank has, which all see in the same gather.)
        """
        vector, averager, control = self._vector, self.averager, self.control
        vector.check()
        finite, intact = averager.finite, averager.intact
        with averager.comm.meter.span("compute", "score"):
            scores = self.score.take()
        if self.pool is not None and not self._pooled:
            self._begin()
        period = self.position if self.pool is None else self._pooled
        table = control.exchange(period, float(finite) if intact else -1.0, scores, self.position, leaving)
        staying = sum(not word.leaving for word in table.words)
        self._over = not staying
        if self._over and not sum(table.made):
            return
        if self.pool is not None:
            control.facts.advance(sum(table.made) // len(table.made))
        alive = table.alive
        try:
            weights = torch.zeros_like(table.scores)
            weights[alive] = self.rule(table.scores[alive]).to(weights)
        except NonFinite:
            if control.decides:
                raise
            self.completed += 1  # as of the parts beside it
            self._end(staying)  # a part that has diverged as a whole is healed by the next round of all ranks
            return
        if any(word.finite < 0 for word in table.words):
            averager.mend(int(alive.int().argmax()))
        averager.agree(self.completed + 1)
        averager.start(averager.source, weights, alive)
        self._opened = _Opened(table, weights, staying)

    def close(self) -> None:
        """The second half, if the first has sent something: finish, pull, report."""
        if self._opened is None:
            return
        opened, self._opened = self._opened, None
        averager, control, table = self.averager, self.control, opened.table
        ranks, alive = averager.comm.ranks, table.alive
        healed = tuple(ranks[m] for m in (~alive).nonzero().flatten().tolist())
        here = bool(alive[averager.comm.rank])
        if not here:
            self._forget()  # before the averages arrive, which it takes over like every rank
        averager.finish(averager.source, healed=not here)
        if self._reset_momentum:
            self._reset_optimizer()
        self.completed += 1
        self.healed += len(healed)
        self.on_round(
            Round(
                number=self.completed,
                step=control.facts.step,
                period=int(table.period) if table.period < math.inf else sum(table.made) // len(table.made),
                lr=control.facts.lr,
                ranks=ranks,
                weights=opened.weights,
                made=table.made,
                healed=healed,
                slowest=ranks[table.slowest],
            )
        )
        self._end(opened.staying)

    def finish(self) -> None:
        """End with a round: the last one, shortened to the steps made since the one before."""
        if self.pool is None and self.position:
            self.round()
        while self.pool is not None and not self._over:
            self.round(leaving=True)

    def state_dict(self) -> dict[str, Any]:
        """What it keeps between steps; under pooled rounds to be asked for where no ticket is held, after a round."""
        return {
            "position": self.position,
            "period": self.period,
            "pooled": self._pooled,
            "rounds": self.completed,
            "healed": self.healed,
            "averager": self.averager.state_dict(),
            "score": self.score.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave, right after it was built."""
        self.position, self.period = state["position"], state["period"]
        self.completed, self.healed = state["rounds"], state["healed"]
        self.averager.load_state_dict(state["averager"])
        self.score.load_state_dict(state["score"])
        if state["pooled"] and self.pool is not None:
            self._pooled = state["pooled"]
            self.pool.open(self._pooled)
        elif self._pooled:
            self._begin()

    def restart(self, completed: int, healed: int) -> None:
        """Begin a round anew where the facts are now, right after it was built.

        Args:
            completed: rounds that there were before.
            healed: ranks that were healed in them.
        """
        self.completed, self.healed = completed, healed
        self.score.begin_after(completed)
        if self._pooled:
            self._begin()

    def _begin(self) -> None:
        """Decide how long the round is that begins, by the facts of its first step.

        (Deadlock argument: step and learning rate are the same on all ranks, as every control word asserts.)
        """
        facts = self.control.facts
        self.period = length(self.ask, facts)
        if self.pool is not None:
            left = facts.steps_left
            self._pooled = self.period if left is None else min(self.period, max(left, 1))
            self.pool.open(self._pooled)

    def _end(self, overdrawn: int) -> None:
        self.position = 0
        if self.pool is not None:
            self._pooled = 0
            self.pool.close(overdrawn)

    def _forget(self) -> None:
        """Drop what a rank that is not finite remembers: it starts anew from the center."""
        if not any([rider.heal() for rider in self.averager.riders]):
            self._reset_optimizer()
        for level in self.levels:
            level.score.reset()
        reset_statistics(self._vector.model)

    def _reset_optimizer(self) -> None:
        self.optimizer.state.clear()
        self.optimizer.state.update(_copied(self._began))
        for group in self.optimizer.param_groups:
            group.pop("step", None)  # by which timm's LAMB corrects moments that are zero again


def _copied(state: Mapping[Tensor, dict[str, Any]]) -> dict[Tensor, dict[str, Any]]:
    return {p: {key: t.clone() if isinstance(t, Tensor) else t for key, t in one.items()} for p, one in state.items()}
