"""Torch optimizers made of others: one around another that steps, and several that step a part of a model each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor, optim

from ..errors import ConfigError, wrong
from ..schedules import RunFacts
from ..vector import ParameterVector
from .base import LocalOptimizer, build
from .builtin import SGD


class Around(optim.Optimizer):
    """Makes the gradient that another optimizer steps by: ``param_groups``, state and ``state_dict`` are that one's.

    ``step(closure)`` needs the closure of ``Run.closure``, which it asks for gradients elsewhere than here.

    Args:
        base: steps.
    """

    def __init__(self, base: optim.Optimizer) -> None:
        super().__init__(base.param_groups, base.defaults)
        self.base = base
        self._link()

    def _link(self) -> None:
        self.param_groups, self.state = self.base.param_groups, self.base.state

    def state_dict(self) -> dict[str, Any]:
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.base.load_state_dict(state_dict)
        self._link()


class Combined(optim.Optimizer):
    """Several optimizers, each of a part of the model, as one.

    Args:
        label: what messages call it.
        parts: in the order of their ``param_groups``.
        defaults: what a group may set, beside what each of them keeps.
    """

    def __init__(self, label: str, parts: Sequence[optim.Optimizer], **defaults: Any) -> None:
        self.label = label
        for part in parts:
            defaults |= part.defaults
        super().__init__([group for part in parts for group in part.param_groups], defaults)
        self._parts = parts
        self._link()

    def _link(self) -> None:
        groups = iter(self.param_groups)
        for part in self._parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._link()  # load_state_dict makes new groups and a new state

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss


@dataclass(kw_only=True)
class OnBase(LocalOptimizer):
    """Settings of an optimizer around another one.

    Attributes:
        base: the optimizer that steps; null for ``SGD``. lr, weight decay, momentum and groups are its own.
    """

    lr: float = field(init=False, repr=False)
    weight_decay: float = field(init=False, repr=False)
    groups: list[dict[str, Any]] | None = field(init=False, repr=False)
    base: LocalOptimizer | None = None

    def __post_init__(self) -> None:
        self.base = base = self.base or SGD()
        self.lr, self.weight_decay, self.groups = base.lr, base.weight_decay, base.groups
        super().__post_init__()

    def built_base(self, vector: ParameterVector, facts: RunFacts) -> optim.Optimizer:
        """The optimizer that steps.

        Raises:
            ConfigError: it is one that asks for several gradients itself, or that exchanges the parameters.
        """
        settings = self.base or SGD()
        try:
            base = build(settings, vector, facts)
        except ConfigError as error:
            if error.what is None:
                raise
            key = error.what.replace("optimizer", "optimizer.base", 1)
            raise wrong(key, error.value, error.fix) from None
        closure = signature(base.step).parameters.get("closure")
        if (closure is not None and closure.default is closure.empty) or hasattr(base, "eval"):
            fix = "must step by the gradient that is there, once, as SGD and AdamW do"
            raise wrong("optimizer.base", settings.label, fix)
        return base


def trained(optimizer: optim.Optimizer) -> list[Tensor]:
    """The parameters that it steps."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """New tensors of the same values."""
    return [t.detach().clone() for t in tensors]
