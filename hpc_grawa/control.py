"""The control word: what ranks must agree on, carried by every round's small allgather."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields

import torch
from torch import Tensor

from .comm import Communicator, Work
from .errors import RanksDisagree
from .schedules import RunFacts

#: Where rounds are rarer than this many steps (or absent), the control word travels by itself.
CONTROL_EVERY = 100


@dataclass(frozen=True)
class ControlWord:
    """One rank's entry.

    Attributes:
        stop: this rank wants the run to end.
        save: this rank wants a checkpoint.
        seconds: training seconds; rank 0's count.
        lr: learning rate of the last step.
        period: local steps of this round.
        step: local steps made.
        finite: whether all parameters of this rank are finite.
    """

    stop: float
    save: float
    seconds: float
    lr: float
    period: float
    step: float
    finite: float


WIDTH = len(fields(ControlWord))
_NO_SCORES = torch.empty(0, dtype=torch.float64)
_MUST_AGREE = {"step": "local step", "period": "period", "lr": "learning rate"}


class Control:
    """Takes every decision from data that all ranks hold alike.

    Deadlock argument: ``exchange`` is called by all ranks at the same steps, because rounds, ``every`` and the
    period are the same on all of them, which each word asserts; a decision takes effect where the word is read, which
    is again the same step everywhere.

    Args:
        comm: all ranks.
        clock: this rank's training seconds.
        every: steps between control words where rounds are rarer.
    """

    def __init__(
        self, comm: Communicator, facts: RunFacts, clock: Callable[[], float] = lambda: 0.0, every: int = CONTROL_EVERY
    ) -> None:
        self.comm, self.facts, self.every = comm, facts, every
        self.clock = clock
        #: Scores that a round sends. A word that travels alone is as long: whatever steps two ranks are at, their words
        #: can meet, and the difference is an error instead of a standstill.
        self.columns = 0
        self.wants_stop = False
        self.wants_save = False
        #: Agreed by all ranks.
        self.stop = False
        self.save = False
        self._last_sent = 0
        self._pending: Work | None = None

    def exchange(self, period: float, finite: bool, scores: Tensor) -> tuple[Tensor, Tensor]:
        """One small allgather of control words and scores; waits.

        Args:
            period: local steps of this round.
            finite: whether this rank's parameters are finite.
            scores: ``[K]``, float64.

        Returns:
            All ranks' scores ``[W, K]`` and finite flags ``[W]``.

        Raises:
            RanksDisagree: on all ranks, naming the first rank that differs.
        """
        self._read_pending()
        table = self._send(period, finite, scores).wait()
        self._read(table)
        return table[:, WIDTH : WIDTH + len(scores)], table[:, WIDTH - 1] == 1

    def after_step(self, period: float) -> None:
        """Keep the control word travelling where rounds are rare: started here, read at the next multiple."""
        if self.facts.step % self.every:
            return
        self._read_pending()
        if period > self.every:
            self._pending = self._send(period, True, _NO_SCORES)

    def finish(self) -> None:
        """Read what is still under way, and agree once more if steps were made since the last word; all ranks must."""
        self._read_pending()
        if self.facts.step > self._last_sent:
            self.exchange(math.inf, True, _NO_SCORES)

    def _read_pending(self) -> None:
        if self._pending is not None:
            self._read(self._pending.wait())
            self._pending = None

    def _send(self, period: float, finite: bool, scores: Tensor) -> Work:
        facts = self.facts
        self._last_sent = facts.step
        word = ControlWord(self.wants_stop, self.wants_save, self.clock(), facts.lr, period, facts.step, finite)
        row = torch.zeros(WIDTH + self.columns, dtype=torch.float64)
        row[:WIDTH] = torch.tensor(astuple(word), dtype=torch.float64)
        row[WIDTH : WIDTH + len(scores)] = scores
        return self.comm.allgather(row, "control")

    def _read(self, table: Tensor) -> None:
        words = [ControlWord(*row) for row in table[:, :WIDTH].tolist()]
        for name, title in _MUST_AGREE.items():
            for rank, word in enumerate(words):
                ours, theirs = getattr(words[0], name), getattr(word, name)
                if ours != theirs:
                    raise RanksDisagree(
                        f"rank {rank} has {title} {theirs:.10g}, rank 0 has {ours:.10g}: every rank must use the same; "
                        f"derive it from what all ranks share (the step, the control word), not from a rank's own data"
                    )
        self.facts.seconds = max(self.facts.seconds, words[0].seconds)
        self.stop = self.stop or any(word.stop for word in words)
        self.save = self.save or any(word.save for word in words)
