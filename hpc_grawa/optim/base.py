"""What a configuration says about the local optimizer."""

from __future__ import annotations

import math
import operator
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn, optim

from ..errors import ConfigError, in_a_line, not_negative, require, wrong
from ..schedules import RunFacts
from ..vector import ParameterVector

#: Marks, among an optimizer's ``param_groups``, parameters that the settings have in no group, wherever they stand.
UNGROUPED = "ungrouped"
_COMPARE = {"<": operator.lt, "<=": operator.le, "==": operator.eq, ">=": operator.ge, ">": operator.gt}


@dataclass(kw_only=True)
class LocalOptimizer(ABC):
    """Settings from which a ``torch.optim.Optimizer`` is built.

    Attributes:
        lr: peak learning rate; the schedule is a factor of it.
        weight_decay: on all parameters.
        groups: parameters with settings of their own, ``[{match: "*.bias|ndim<2", lr_factor: 0.5, weight_decay: 0}]``.
            ``match`` holds patterns of names, or ``ndim`` compared with a number of dimensions, with | between them; a
            parameter belongs to the first group that it matches, or to none. ``lr_factor`` is of ``lr``; what else a
            group may set is what the torch optimizer keeps for each of its ``param_groups``.
    """

    #: Equal parts of the batch that a step asks the closure for; optimizers that ask for several make it a field.
    parts = 1
    lr: float = 0.1
    weight_decay: float = 0.0
    groups: list[dict[str, Any]] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        not_negative("optimizer", self, "lr", "weight_decay")
        for group in self.groups or []:
            if not isinstance(group.get("match"), str):
                raise wrong("optimizer.groups", group, "must have match, patterns of parameters' names")
            for name in ("lr_factor", "weight_decay"):
                value = group.get(name, 0.0)
                allowed = is_number(value) and value >= 0
                require(allowed, f"optimizer.groups.{name}", value, "a number of 0 or more")

    @property
    def label(self) -> str:
        """What messages call it."""
        return type(self).__name__

    @abstractmethod
    def build(self, vector: ParameterVector, facts: RunFacts) -> optim.Optimizer:
        """The optimizer of a model's parameters.

        Args:
            vector: the parameters; ``self.grouped(vector)`` is what a torch optimizer takes.
            facts: of the run, as they will be at each step (``facts.progress``).
        """

    def grouped(self, vector: ParameterVector) -> list[nn.Parameter] | list[dict[str, Any]]:
        """The parameters as a torch optimizer takes them: those of no group first, then group by group.

        Raises:
            ConfigError: a pattern matches no parameter, or a group none that is not in one before it.
        """
        if not self.groups:
            return vector.parameters
        named = list(zip(vector.names, vector.parameters, strict=True))
        left = dict(named)
        made = []
        for group in self.groups:
            matched: set[str] = set()
            for pattern in group["match"].split("|"):
                found = {name for name, p in named if _matches(pattern.strip(), name, p)}
                if not found:
                    raise wrong(
                        "optimizer.groups.match",
                        group["match"],
                        f"'{pattern.strip()}' must match a parameter of "
                        f"the model, which has {', '.join(vector.names[:4])}{', ...' if len(named) > 4 else ''}",
                    )
                matched |= found
            own = [left.pop(name) for name in vector.names if name in matched and name in left]
            if not own:
                raise wrong(
                    "optimizer.groups.match",
                    group["match"],
                    "must match a parameter that is in no group before it (the first that matches wins)",
                )
            settings = {key: value for key, value in group.items() if key not in ("match", "lr_factor")}
            made.append({"params": own, "lr": self.lr * group.get("lr_factor", 1.0), **settings})
        return [{"params": list(left.values()), UNGROUPED: True}, *made] if left else made


def build(settings: LocalOptimizer, vector: ParameterVector, facts: RunFacts) -> optim.Optimizer:
    """The optimizer that the settings make, as a run can step it.

    Raises:
        ConfigError: it has no learning rate, or not the groups that it was given.
    """
    optimizer = settings.build(vector, facts)
    if any("lr" not in group for group in optimizer.param_groups):
        raise wrong("optimizer", settings.label, "must have lr in its param_groups, which the schedule sets")
    if settings.groups and len(optimizer.param_groups) < len(settings.groups):
        raise wrong(
            "optimizer.groups",
            settings.groups,
            f"must be null, as {settings.label}.build does not give its optimizer self.grouped(vector)",
        )
    allowed = ["match", "lr_factor", *(key for key in optimizer.defaults if key != "lr")]
    for group in settings.groups or []:
        for key, value in group.items():
            if key not in allowed:
                raise ConfigError(f"optimizer.groups.{key} is no setting: must be one of {', '.join(allowed)}")
            what, default = f"optimizer.groups.{key}", optimizer.defaults.get(key)
            require(is_number(value) or not is_number(default), what, value, "a number")
            require(isinstance(value, bool) or not isinstance(default, bool), what, value, "true or false")
            if is_number(default) or isinstance(default, tuple):
                _check_value(type(optimizer), key, value)
    return optimizer


def _check_value(kind: type[optim.Optimizer], key: str, value: Any) -> None:
    """Raise ``ConfigError`` for a group's value that torch, which looks at defaults only, would not have as one."""
    if kind.__module__.startswith("torch.optim.") and key in signature(kind).parameters:
        try:
            kind([nn.Parameter(torch.zeros(2, 2))], **{key: value})
        except Exception as error:
            raise wrong(f"optimizer.groups.{key}", value, in_a_line(error)) from None


Grouped = Sequence[nn.Parameter] | Sequence[dict[str, Any]]


def split(
    grouped: Grouped, first: Callable[[nn.Parameter, dict[str, Any]], bool]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Groups of the parameters for which ``first(parameter, its group)`` holds, and groups of the others.

    Args:
        grouped: what ``LocalOptimizer.grouped`` gave.
        first: says which.
    """
    groups: Any = grouped if grouped and isinstance(grouped[0], dict) else [{"params": grouped}]
    halves: tuple[list[dict[str, Any]], list[dict[str, Any]]] = [], []
    for group in groups:
        for half, wanted in zip(halves, (True, False), strict=True):
            own = [p for p in group["params"] if first(p, group) is wanted]
            half.extend([{**group, "params": own}] if own else [])
    return halves


def _matches(pattern: str, name: str, p: Tensor) -> bool:
    if compared := re.fullmatch(r"ndim\s*(<=|>=|==|<|>)\s*(\d+)", pattern):
        return bool(_COMPARE[compared[1]](p.dim(), int(compared[2])))
    return fnmatchcase(name, pattern)


def is_number(value: object) -> bool:
    """Whether it is finite and a number, which true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
