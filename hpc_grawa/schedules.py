"""Learning rates: functions of a few facts about the run."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from typing import Any, Literal

from .errors import require

Unit = Literal["steps", "epochs", "seconds"]


@dataclass
class RunFacts:
    """What a schedule or a period may know; the same on every rank.

    Attributes:
        step: local steps made by each rank; under pooled rounds by all ranks together, divided by their number.
        seconds: rank 0's training seconds, as of the last control word.
        lr: the learning rate of the coming step; at a round that of the step before it.
        peak_lr: the learning rate that the schedule is a factor of.
        warmup_steps: steps of linear warm-up.
        total_steps: of the run, or None where a clock decides.
        steps_per_epoch: or None where there are no epochs.
        progress: share of the budget used, in [0, 1]; 0 where there is no budget.
        base: where an epoch came to have another number of steps, as the run went on with other ranks or batches: the
            step, and the epochs that were over.
        base_share: the share of the budget in steps or epochs that was used there; None where there is no such place.
    """

    step: int = 0
    seconds: float = 0.0
    lr: float = 0.0
    peak_lr: float = 0.0
    warmup_steps: int = 0
    total_steps: int | None = None
    steps_per_epoch: int | None = None
    progress: float = 0.0
    base: tuple[int, Fraction] = (0, Fraction(0))
    base_share: float | None = None

    @property
    def steps_left(self) -> int | None:
        """To the end of the run, or None where a clock decides."""
        return None if self.total_steps is None else self.total_steps - self.step

    def state_dict(self) -> dict[str, Any]:
        """What a run goes on from."""
        step, epochs = self.base
        own = {name: getattr(self, name) for name in ("step", "seconds", "lr", "progress", "steps_per_epoch")}
        return own | {"base": [step, epochs.numerator, epochs.denominator]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken: after as many epochs, of whatever number of steps they are here."""
        for name in ("step", "seconds", "lr", "progress"):
            setattr(self, name, state[name])
        step, *epochs = state.get("base", (0, 0, 1))  # older states have neither
        self.base = step, Fraction(*epochs)
        then = state.get("steps_per_epoch")
        if self.step and then and self.steps_per_epoch and then != self.steps_per_epoch:
            self.base = self.step, self.base[1] + (self.step - step) / Fraction(then)

    def advance(self, steps: int = 1) -> None:
        """Count local steps, and what of a budget in steps is used by them."""
        self.step += steps
        if self.total_steps:
            self.progress = min(1.0, self.share(self.step, self.total_steps))

    def share(self, step: int, total_steps: int) -> float:
        """Of ``total_steps``, what is over at a step; from ``base`` on the share grows from what it was there."""
        if self.base_share is None or step >= total_steps:
            return step / total_steps
        begun = self.base[0]
        if step < begun:
            return self.base_share * step / begun
        return self.base_share + (1 - self.base_share) * (step - begun) / (total_steps - begun)

    def elapsed(self, unit: Unit) -> float:
        """Steps, epochs or seconds since the start."""
        if unit == "seconds":
            return self.seconds
        if unit == "steps":
            return self.step
        if self.steps_per_epoch is None:
            raise ValueError(
                "schedules and periods in epochs need to know the steps per epoch: RunFacts(steps_per_epoch=...)"
            )
        step, epochs = self.base
        if not step:
            return self.step / self.steps_per_epoch
        return float(epochs + (self.step - step) / Fraction(self.steps_per_epoch))


@dataclass
class Schedule(ABC):
    """A learning rate as a factor of the optimizer's: lr(t) = lr · warm-up(t) · factor(t).

    Attributes:
        warmup: steps in which the learning rate rises linearly to its peak: (t + 1) / warmup.
        scaling: by what the optimizer's learning rate is multiplied where W ranks train together: ``none``: 1;
            ``linear``: W (Goyal et al., 2017; with a warm-up); ``sqrt``: √W.
    """

    warmup: int = 0
    scaling: Literal["none", "linear", "sqrt"] = field(default="none", repr=False, kw_only=True)

    def __post_init__(self) -> None:
        require(self.warmup >= 0, "schedule.warmup", self.warmup, "0 or more steps")
        scalings = ("none", "linear", "sqrt")
        require(self.scaling in scalings, "schedule.scaling", self.scaling, f"one of {', '.join(scalings)}")

    def scale(self, world_size: int) -> float:
        """What ``scaling`` multiplies the optimizer's learning rate by."""
        return {"none": 1.0, "linear": float(world_size), "sqrt": math.sqrt(world_size)}[self.scaling]

    def told(self, peak_lr: float, world_size: int) -> str:
        """What programs say of scaling; nothing where there is none."""
        if self.scaling == "none":
            return ""
        by = f"{world_size} ranks" if self.scaling == "linear" else f"sqrt({world_size} ranks)"
        return f"; peak lr {peak_lr:.4g} = {peak_lr / self.scale(world_size):.4g} x {by}"

    def __call__(self, facts: RunFacts) -> float:
        """The factor at ``facts``."""
        rise = min(1.0, (facts.step + 1) / self.warmup) if self.warmup else 1.0
        return rise * self.factor(facts)

    @abstractmethod
    def factor(self, facts: RunFacts) -> float:
        """The factor without warm-up."""

    def after_warmup(self, facts: RunFacts) -> float:
        """The share that is used of what the budget leaves after the warm-up; of one in seconds, of all of it."""
        share = min(1.0, facts.share(self.warmup, facts.total_steps)) if facts.total_steps else 0.0
        return max(0.0, facts.progress - share) / (1 - share) if share < 1 else 0.0


@dataclass
class Constant(Schedule):
    """The optimizer's learning rate throughout."""

    def factor(self, facts: RunFacts) -> float:
        return 1.0


@dataclass
class Step(Schedule):
    """The learning rate times ``gamma`` at each milestone.

    Attributes:
        milestones: increasing, in ``unit``.
        gamma: factor at each milestone.
        unit: ``steps``, ``epochs`` or ``seconds`` of training.
    """

    milestones: list[float] = field(default_factory=list)
    gamma: float = 0.1
    unit: Unit = "epochs"

    def __post_init__(self) -> None:
        super().__post_init__()
        ordered = all(a < b for a, b in pairwise([0, *self.milestones, math.inf]))  # NaN is not
        allowed = bool(self.milestones) and ordered
        require(allowed, "schedule.milestones", self.milestones, "positive and increasing")
        require(0 < self.gamma < math.inf, "schedule.gamma", self.gamma, "positive and finite")

    def factor(self, facts: RunFacts) -> float:
        now = facts.elapsed(self.unit)
        return math.prod(self.gamma for milestone in self.milestones if now >= milestone)


@dataclass
class Cosine(Schedule):
    """Half a cosine from 1 to ``final`` over what the budget leaves after the warm-up.

    Attributes:
        final: factor at the end.
    """

    final: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.final <= 1, "schedule.final", self.final, "in [0, 1]")

    def factor(self, facts: RunFacts) -> float:
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * self.after_warmup(facts))) / 2


@dataclass
class Linear(Schedule):
    """A straight line from 1 to ``final`` over what the budget leaves after the warm-up.

    Attributes:
        final: factor at the end.
    """

    final: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.final <= 1, "schedule.final", self.final, "in [0, 1]")

    def factor(self, facts: RunFacts) -> float:
        return 1 - (1 - self.final) * self.after_warmup(facts)
