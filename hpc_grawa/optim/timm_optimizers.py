"""Where optimizers come from that torch has not: timm (Apache 2.0), the image models' library of Hugging Face.

Of the libraries that are maintained its LARS and LAMB can be set to what the papers say: bias correction, no clamp of
norms, ratio 1 where a norm is 0, and groups without adaptation. It leaves the gradients as they are (LARS since
1.0.31). pytorch_optimizer clamps LAMB's norms at 10, has no bias correction of the second moment, and steps in the
gradients' place.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import nn, optim

from ..errors import wrong
from ..vector import ParameterVector
from .base import LocalOptimizer, split


class OfTimm(LocalOptimizer):
    """Settings of an optimizer of timm's.

    Raises:
        ConfigError: timm is not installed.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if find_spec("timm") is None:
            raise wrong("optimizer", self.label, "needs timm, which is not installed: pip install 'hpc-grawa[optim]'")


def of_timm(name: str, groups: Any, **settings: Any) -> optim.Optimizer:
    """An optimizer of timm's."""
    made: optim.Optimizer = getattr(import_module("timm.optim"), name)(groups, **settings)
    return made


def adapted(settings: LocalOptimizer, vector: ParameterVector) -> list[dict[str, Any]]:
    """Groups of the parameters whose steps are adapted to their norms, and of biases and norms, which are left out."""

    def wide(p: nn.Parameter, group: dict[str, Any]) -> bool:
        return p.dim() > 1

    weights, others = split(settings.grouped(vector), wide)
    return [{**group, "always_adapt": True} for group in weights] + [{"weight_decay": 0.0, **g} for g in others]
