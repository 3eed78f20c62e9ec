"""The control word: what ranks must agree on, carried by every round's small allgather."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields

import torch
from torch import Tensor

from ..comm import Communicator, Work
from ..errors import RanksDisagree
from ..schedules import RunFacts

#: Where rounds are rarer than this many steps, the control word travels by itself, and is read where the next leaves.
CONTROL_EVERY = 100
#: The same while ranks share gradients, beside which a word is little: slow steps must not keep a run from its end.
CONTROL_EVERY_SHARED = 10


@dataclass(frozen=True)
class ControlWord:
    """One rank's entry.

    Attributes:
        stop: this rank wants the run to end.
        written: step of the newest checkpoint that this rank has written, or -1.
        seconds: training seconds; rank 0's count.
        lr: learning rate of the last step.
        period: local steps of this round.
        step: local steps made, the same on all ranks.
        finite: 1 if this rank is finite, 0 if not, -1 if what all ranks hold alike is not, and has to be sent to it.
        made: local steps that this rank made in this round.
        busy: seconds that it computed in it.
        leaving: whether this rank makes no further steps.
    """

    stop: float
    written: float
    seconds: float
    lr: float
    period: float
    step: float
    finite: float
    made: float
    busy: float
    leaving: float

    @property
    def gone(self) -> bool:
        """Whether this rank made no step of the round either, so that it need not know with which rate others did."""
        return bool(self.leaving and not self.made)


@dataclass(frozen=True)
class Table:
    """What a round's gather brought, the same on all ranks.

    Attributes:
        scores: ``[W, K]``, float64.
        words: of all ranks.
    """

    scores: Tensor
    words: list[ControlWord]

    @property
    def alive(self) -> Tensor:
        """``[W]``: whether each rank is finite."""
        return torch.tensor([word.finite == 1 for word in self.words])

    @property
    def period(self) -> float:
        """Local steps of this round, as those ranks say that made them."""
        return next((word for word in self.words if not word.gone), self.words[0]).period

    @property
    def made(self) -> tuple[int, ...]:
        """Local steps of each rank in this round."""
        return tuple(int(word.made) for word in self.words)

    @property
    def slowest(self) -> int:
        """The rank that computed longest per local step."""
        seconds = [word.busy / max(word.made, 1) for word in self.words]
        return seconds.index(max(seconds))


WIDTH = len(fields(ControlWord))
_NO_SCORES = torch.empty(0, dtype=torch.float64)
#: Causes before what follows from them.
_MUST_AGREE = {"step": "local step", "lr": "learning rate", "period": "period"}


class Control:
    """Takes every decision from data that all ranks hold alike.

    Deadlock argument: ``exchange`` is called by all ranks at the same steps, because rounds, words and the
    period are the same on all of them, which each word asserts; a decision takes effect where the word is read, which
    is again the same step everywhere.

    Args:
        comm: the ranks.
        clock: this rank's training seconds.
        every: steps between control words where rounds are rarer; None: ``CONTROL_EVERY``, or ``CONTROL_EVERY_SHARED``.
        decides: whether these are all ranks of the run; among a part of them, words only assert that they agree.
    """

    def __init__(
        self,
        comm: Communicator,
        facts: RunFacts,
        clock: Callable[[], float] | None = None,
        every: int | None = None,
        decides: bool = True,
    ) -> None:
        began = time.perf_counter()
        self.comm, self.facts, self.decides = comm, facts, decides
        self._every = every
        self.clock = clock or (lambda: time.perf_counter() - began)
        #: Scores that a round sends. A word that travels alone is as long: whatever steps two ranks are at, their words
        #: can meet, and the difference is an error instead of a standstill.
        self.columns = 0
        self.wants_stop = False
        #: Asked for this rank's part of ``all_written``.
        self.written: Callable[[], float] = lambda: -1
        #: Agreed by all ranks.
        self.stop = False
        self.all_written: float = -1
        self._number = comm.numbers("control").start
        self._last_sent = 0
        self._busy_since = 0.0
        self._pending: Work | None = None

    def exchange(self, period: float, finite: float, scores: Tensor, made: int = 0, leaving: bool = False) -> Table:
        """One small allgather of control words and scores; waits.

        Args:
            period: local steps of this round, the same on all ranks.
            finite: as of ``ControlWord``.
            scores: ``[K]``, float64.
            made: local steps of this rank.
            leaving: whether this rank makes no further steps.

        Raises:
            RanksDisagree: on all ranks, naming the first rank that differs.
        """
        self._read_pending()
        busy = self._computed()
        rows = self._send(period, finite, scores, made, busy - self._busy_since, leaving).wait()
        self._busy_since = busy
        return Table(rows[:, WIDTH : WIDTH + len(scores)], self._read(rows))

    def _computed(self) -> float:
        """Training seconds in which this rank stood still for no message."""
        meter = self.comm.meter
        return self.clock() - meter.waiting_seconds - meter.communication_seconds

    def after_step(self, period: float, shares: bool) -> None:
        """Keep the control word travelling where rounds are rare: started here, read at the next multiple.

        Args:
            period: local steps of this round.
            shares: whether the step's gradient was shared; the same on all ranks, as is all that decides here.
        """
        every = self._every or (CONTROL_EVERY_SHARED if shares else CONTROL_EVERY)
        if self.facts.step % every:
            return
        self._read_pending()
        if period > every:
            self._pending = self._send(period, True, _NO_SCORES)

    def settle(self) -> None:
        """Read what is still under way; all ranks must."""
        self._read_pending()

    def resume(self) -> None:
        """The run goes on where ``facts`` and the clock say: no word has to be sent for what was before."""
        self._last_sent, self._busy_since = self.facts.step, self._computed()

    def finish(self) -> None:
        """Read what is still under way, and agree once more if steps were made since the last word; all ranks must."""
        self._read_pending()
        if self.facts.step > self._last_sent:
            self.exchange(math.inf, True, _NO_SCORES)

    def _read_pending(self) -> None:
        if self._pending is not None:
            self._read(self._pending.wait())
            self._pending = None

    def _send(
        self, period: float, finite: float, scores: Tensor, made: int = 0, busy: float = 0.0, leaving: bool = False
    ) -> Work:
        facts = self.facts
        self._last_sent = facts.step
        word = ControlWord(
            self.wants_stop, self.written(), self.clock(), facts.lr, period, facts.step, finite, made, busy, leaving
        )
        row = torch.zeros(WIDTH + self.columns, dtype=torch.float64)
        row[:WIDTH] = torch.tensor(astuple(word), dtype=torch.float64)
        row[WIDTH : WIDTH + len(scores)] = scores
        return self.comm.allgather(row, "control", self._number)

    def _read(self, rows: Tensor) -> list[ControlWord]:
        words, ranks = [ControlWord(*row) for row in rows[:, :WIDTH].tolist()], self.comm.ranks
        for name, title in _MUST_AGREE.items():
            present = [(r, word) for r, word in zip(ranks, words, strict=True) if name == "step" or not word.gone]
            for rank, word in present:
                first, ours, theirs = present[0][0], getattr(present[0][1], name), getattr(word, name)
                if ours != theirs:
                    raise RanksDisagree(
                        f"rank {rank} has {title} {theirs:.10g}, rank {first} has {ours:.10g}: every rank must use "
                        f"the same; derive it from what all ranks share (the step, the control word), not from a "
                        f"rank's own data or steps"
                    )
        if words[self.comm.rank].gone:
            self.facts.lr = next((word.lr for word in words if not word.gone), self.facts.lr)
        if self.decides:
            self.facts.seconds = max(self.facts.seconds, words[0].seconds)
            self.stop = self.stop or any(word.stop for word in words)
            self.all_written = min(word.written for word in words)
        return words
