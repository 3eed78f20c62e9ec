"""Any optimizer of torch's, or of one's own, by its import path."""

from __future__ import annotations

from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import nn, optim

from ..errors import ConfigError, in_a_line, require, wrong
from ..schedules import RunFacts
from ..vector import ParameterVector
from .base import LocalOptimizer, is_number


@dataclass(kw_only=True, repr=False)
class Imported(LocalOptimizer):
    """A class of optimizers and its arguments, all but the parameters.

    An optimizer that evaluates its closure several times in a step (LBFGS) trains only where ranks average: where they
    share gradients, ``Run.closure`` refuses it. One of matrices only (torch's Muon, of which ``hpc_grawa.optim.Muon``
    leaves the rest to AdamW) trains models that have nothing else.

    Attributes:
        kind: the class.
        arguments: of its constructor, after the parameters.

    Raises:
        ConfigError: the constructor takes no lr, or refuses the arguments; or the class is one that cannot train here.
    """

    lr: float = field(init=False)
    weight_decay: float = field(init=False)
    kind: type[optim.Optimizer]
    arguments: dict[str, Any]

    def __post_init__(self) -> None:
        if issubclass(self.kind, optim.SparseAdam):
            raise wrong("optimizer", self.label, "must take dense gradients, as torch.optim.Adam does")
        if "lr" not in self.arguments:
            raise wrong("optimizer", self.label, "must take lr, of which the schedule is a factor")
        self.lr = self.arguments["lr"]
        self.weight_decay = self.arguments.get("weight_decay") or 0.0
        for name in ("lr", "weight_decay"):
            require(is_number(getattr(self, name)), f"optimizer.{name}", getattr(self, name), "a number of 0 or more")
        super().__post_init__()
        for name, parameter in signature(self.kind).parameters.items():
            # What has neither a type nor a default jsonargparse gives as null.
            untold = parameter.default is parameter.empty and parameter.annotation is parameter.empty
            if untold and self.arguments.get(name, parameter) is None:
                raise ConfigError(f"optimizer.{name} is missing: {self.label} needs it")
        self._made([nn.Parameter(torch.zeros(2, 2))])

    @property
    def label(self) -> str:
        return self.kind.__name__

    def __repr__(self) -> str:
        return f"{self.label}({', '.join(f'{key}={value!r}' for key, value in self.arguments.items())})"

    def build(self, vector: ParameterVector, facts: RunFacts) -> optim.Optimizer:
        if issubclass(self.kind, optim.LBFGS) and not all(p.is_contiguous() for p in vector.parameters):
            raise wrong("optimizer", self.label, "must train contiguous parameters, and these are channels_last")
        return self._made(self.grouped(vector))

    def _made(self, parameters: list[nn.Parameter] | list[dict[str, Any]]) -> optim.Optimizer:
        try:
            return self.kind(parameters, **self.arguments)
        except Exception as error:  # what a class raises for arguments that it does not like
            named = not isinstance(error, TypeError | ValueError)
            raise wrong("optimizer", self.label, in_a_line(error, named)) from None
