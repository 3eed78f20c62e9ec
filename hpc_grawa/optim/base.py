"""What a configuration says about the local optimizer."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn, optim

from ..errors import ConfigError


@dataclass(kw_only=True)
class LocalOptimizer(ABC):
    """Settings from which a ``torch.optim.Optimizer`` is built.

    Attributes:
        lr: peak learning rate; the schedule is a factor of it.
        weight_decay: on all parameters.
    """

    lr: float = 0.1
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        self.require("lr", 0 <= self.lr < math.inf, "a number of 0 or more")
        self.require("weight_decay", 0 <= self.weight_decay < math.inf, "a number of 0 or more")

    def require(self, name: str, condition: bool, allowed: str) -> None:
        """Raise a ``ConfigError`` that names the field unless the condition holds."""
        if not condition:
            raise ConfigError(f"optimizer.{name} is {getattr(self, name)}: must be {allowed}")

    @abstractmethod
    def build(self, parameters: Iterable[nn.Parameter]) -> optim.Optimizer:
        """The optimizer of these parameters."""
