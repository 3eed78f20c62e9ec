"""How long a run may train, and the clock that counts it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction

import torch

from ..errors import ConfigError, require
from ..schedules import RunFacts, Unit


@dataclass
class Budget:
    """The first limit reached ends the run.

    Attributes:
        seconds: of training on rank 0's clock; evaluation does not count.
        epochs: passes of all ranks together over the training set.
        steps: local steps of each rank.
        train_loss: beside one of these: the run ends at the first evaluation at which the center's loss on
            ``eval.train_examples`` is no larger.
    """

    seconds: float | None = None
    epochs: float | None = None
    steps: int | None = None
    train_loss: float | None = None

    def __str__(self) -> str:
        """Every limit in words."""
        limits = {"s of training": self.seconds, "epochs": self.epochs, "steps": self.steps}
        given = [f"{limit:,g} {unit}" for unit, limit in limits.items() if limit is not None]
        given += [] if self.train_loss is None else [f"a training loss of {self.train_loss:g}"]
        return " or ".join(given) + (", whichever comes first" if len(given) > 1 else "")

    def check(self) -> None:
        """Raise ``ConfigError`` unless there is a limit and every limit is positive."""
        limits = {"seconds": self.seconds, "epochs": self.epochs, "steps": self.steps}
        if all(limit is None for limit in limits.values()):
            raise ConfigError("budget is empty: give budget.seconds, budget.epochs or budget.steps")
        for name, limit in {**limits, "train_loss": self.train_loss}.items():
            require(limit is None or 0 < limit < math.inf, f"budget.{name}", limit, "positive and finite")

    def total_steps(self, steps_per_epoch: int, base: tuple[int, Fraction] = (0, Fraction(0))) -> int | None:
        """Local steps until the limit in steps or epochs, or None where only the clock decides.

        Args:
            steps_per_epoch: from ``base`` on.
            base: as of ``RunFacts``.
        """
        limits = [] if self.steps is None else [self.steps]
        if self.epochs is not None:
            step, over = base
            limits.append(step + max(0, math.ceil((as_written(self.epochs) - over) * steps_per_epoch)))
        return min(limits, default=None)

    def share_at(self, base: tuple[int, Fraction]) -> float | None:
        """The share of the limits in steps and epochs that is used at ``base``; None where there is no such place."""
        step, over = base
        shares = [] if self.steps is None else [step / self.steps]
        if self.epochs is not None:
            shares.append(float(over / as_written(self.epochs)))
        return max(shares, default=None) if step else None

    def used(self, facts: RunFacts, total_steps: int | None) -> float:
        """The share used, 1 or more when the run is over; the same on all ranks."""
        shares = [0.0]
        if total_steps is not None:
            shares.append(facts.share(facts.step, total_steps))
        if self.seconds is not None:
            shares.append(facts.seconds / self.seconds)
        return max(shares)


def as_written(number: float) -> Fraction:
    """The decimal that was written, not the nearest binary fraction that stands for it.

    Example:
        >>> 0.28 * 25, as_written(0.28) * 25
        (7.000000000000001, Fraction(7, 1))
    """
    return Fraction(str(number))


class Cadence:
    """What recurs every so many steps, epochs or seconds of a run.

    Args:
        every: in units; infinite for never.
        unit: steps, epochs or seconds.
        facts: of the run.

    Example:
        >>> facts = RunFacts()
        >>> cadence = Cadence(10, "steps", facts)
        >>> due = []
        >>> for facts.step in range(1, 31):
        ...     if cadence.due():
        ...         due.append(facts.step)
        >>> due
        [10, 20, 30]
    """

    def __init__(self, every: float, unit: Unit, facts: RunFacts) -> None:
        self._every, self._unit, self._facts = every, unit, facts
        #: When it is due next.
        self.next = every

    def due(self) -> bool:
        """Whether it is due; asked after every step. What was missed meanwhile is left out."""
        elapsed = self._facts.elapsed(self._unit)
        if elapsed < self.next:
            return False
        # Steps over steps per epoch and a multiple are each rounded once, so where they are equal they stay so.
        every = as_written(self._every)
        self.next = float(every * (1 + as_written(elapsed) // every))
        return True


class Clock:
    """Training seconds: runs from its making, except while paused.

    Args:
        device: what is under way there ends before the clock is paused, and is waited for in ``settled``.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device if device is not None and device.type == "cuda" else None
        self.restart()

    def restart(self, seconds: float = 0.0) -> None:
        """Begin again from so many seconds."""
        self._began = time.perf_counter() - seconds
        #: What it shows while it is paused.
        self._stands: float | None = None

    @property
    def seconds(self) -> float:
        stands = self._stands  # another thread may ask
        return time.perf_counter() - self._began if stands is None else stands

    @property
    def settled(self) -> float:
        """``seconds`` when all work so far is done."""
        self.settle()
        return self.seconds

    def settle(self) -> None:
        """Return when all work so far is done."""
        if self._device is not None:
            torch.cuda.synchronize(self._device)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within the block no training time passes, and the clock shows when it began."""
        self._stands = before = self.settled
        try:
            yield
        finally:
            self.restart(before)
