"""How weights begin: He et al., Delving Deep into Rectifiers, ICCV 2015."""

from __future__ import annotations

from typing import Literal

from torch import nn


def start_convolutions(model: nn.Module, mode: Literal["fan_in", "fan_out"] = "fan_out") -> None:
    """Draw all convolutions from N(0, 2/n), n their inputs (``fan_in``) or outputs; their biases are left alone.

    Args:
        model: whose convolutions.
        mode: what n counts.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
