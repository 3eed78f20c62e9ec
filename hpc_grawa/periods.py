"""How many local steps until the next round: a number, or a function of a few facts about the run."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from numbers import Real

from .errors import ConfigError, require
from .schedules import RunFacts, Unit

#: What a round's length must be.
LENGTH = "at least 1 local step, and whole or infinite"


def is_length(steps: object) -> bool:
    """Whether a round can be so long."""
    number = float(steps) if isinstance(steps, Real) else math.nan
    return number >= 1 and (number == math.inf or number.is_integer())


@dataclass
class Period(ABC):
    """Asked at the first step of every round, with that step's learning rate, on all ranks alike."""

    @abstractmethod
    def __call__(self, facts: RunFacts) -> float:
        """Local steps of the round that begins, at least 1; ``math.inf``: no further round but the run's last."""

    def shares(self, facts: RunFacts) -> bool:
        """Whether gradients are shared in the coming step, which then belongs to no round."""
        return False

    def check(self) -> None:  # noqa: B027 - there may be nothing to check
        """Raise ``ConfigError`` for impossible values; a method does so where it is made."""


def length(period: Period, facts: RunFacts) -> float:
    """What a period answers.

    Raises:
        ConfigError: it is no length of a round.
    """
    steps = period(facts)
    if not is_length(steps):
        raise ConfigError(f"method.period is {period}, which gave {steps} at step {facts.step}: must be {LENGTH}")
    return steps


@dataclass
class Constant(Period):
    """H steps, as is ``period: H``.

    Attributes:
        steps: H; ``.inf`` for one round at the end.
    """

    steps: int | float = 32

    def check(self) -> None:
        require(is_length(self.steps), "method.period.steps", self.steps, LENGTH)

    def __call__(self, facts: RunFacts) -> float:
        return self.steps


@dataclass
class QSR(Period):
    """Quadratic synchronization rule: H = max(base, ⌊(α/η)^power⌋), with the peak η during warm-up.

    Growth ends at the steps that are left. A run needs to know its warm-up and its peak η; loops of one's own say them
    by ``facts=RunFacts(warmup_steps=..., peak_lr=..., total_steps=...)`` to ``build`` or ``DistributedOptimizer``.

    Attributes:
        base: the smallest H.
        alpha: α, of the unit of the learning rate; about .2 for SGD, .0175 for AdamW.
        power: of the growth; 2 in the paper.

    Source: Gu et al., A Quadratic Synchronization Rule for Distributed Deep Learning, ICLR 2024.
    """

    base: int = 4
    alpha: float = 0.2
    power: float = 2.0

    def check(self) -> None:
        require(self.base >= 1, "method.period.base", self.base, "at least 1 local step")
        require(0 <= self.alpha < math.inf, "method.period.alpha", self.alpha, "a number of 0 or more")
        require(0 < self.power < math.inf, "method.period.power", self.power, "a positive number")

    def __call__(self, facts: RunFacts) -> float:
        warming = facts.step < facts.warmup_steps
        if warming and not facts.peak_lr:
            raise ValueError("QSR needs to know the peak of a warm-up: RunFacts(warmup_steps=..., peak_lr=...)")
        lr = facts.peak_lr if warming else facts.lr
        left = math.inf if facts.steps_left is None else facts.steps_left
        return max(self.base, _floor(min(self._grown(lr), left)))

    def _grown(self, lr: float) -> float:
        if self.alpha == 0:
            return 0
        try:
            return float((self.alpha / lr) ** self.power)
        except (ZeroDivisionError, OverflowError):
            return math.inf


@dataclass
class Sqrt(Period):
    """H = max(1, ⌊c√t⌋), t the step at which the round begins.

    Attributes:
        c: the factor.
    """

    c: float = 0.1

    def check(self) -> None:
        require(0 <= self.c < math.inf, "method.period.c", self.c, "a number of 0 or more")

    def __call__(self, facts: RunFacts) -> float:
        return max(1, _floor(self.c * math.sqrt(facts.step)))


@dataclass
class _Switching(Period):
    """What changes once in a run.

    Attributes:
        switch: when, in ``unit``.
        unit: ``steps``, ``epochs`` or ``seconds`` of training, those of rank 0 that all have last heard of.
    """

    switch: float
    unit: Unit = "steps"

    def check(self) -> None:
        require(0 <= self.switch < math.inf, "method.period.switch", self.switch, "a number of 0 or more")

    def _before(self, facts: RunFacts) -> bool:
        return facts.elapsed(self.unit) < self.switch


@dataclass
class PostLocal(_Switching):
    """Gradients are shared before the switch; after it there is a round every H steps.

    Attributes:
        steps: H.

    Source: Lin et al., Don't Use Large Mini-Batches, Use Local SGD, ICLR 2020.
    """

    steps: int = 16

    def check(self) -> None:
        super().check()
        require(self.steps >= 1, "method.period.steps", self.steps, "at least 1 local step")

    def shares(self, facts: RunFacts) -> bool:
        return self._before(facts)

    def __call__(self, facts: RunFacts) -> float:
        return self.steps


@dataclass
class SWAP(_Switching):
    """Gradients are shared before the switch; after it ranks train alone, and are averaged once, at the end.

    Attributes:
        steps: H of rounds before the switch, in the modified form, which has them there instead of shared gradients.

    Source: Gupta, Serrano and DeCoste, Stochastic Weight Averaging in Parallel, ICLR 2020.
    """

    steps: int | None = None

    def check(self) -> None:
        super().check()
        allowed = self.steps is None or self.steps >= 1
        require(allowed, "method.period.steps", self.steps, "null, or at least 1 local step")

    def shares(self, facts: RunFacts) -> bool:
        return self.steps is None and self._before(facts)

    def __call__(self, facts: RunFacts) -> float:
        return self.steps if self.steps is not None and self._before(facts) else math.inf


def _floor(steps: float) -> float:
    """⌊steps⌋ of what was computed from decimal fractions: .3/.1 is 3, not the 2.9999999999999996 of binary ones."""
    return steps if steps == math.inf else math.floor(steps * (1 + 1e-9))
