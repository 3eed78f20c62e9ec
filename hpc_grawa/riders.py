"""What may ride in a round's flat message beside the parameters: momenta and running statistics."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn, optim

from .errors import ConfigError
from .vector import ParameterVector


class Rider(ABC):
    """Tensors averaged with the parameters; each rank takes over the average."""

    @abstractmethod
    def pack(self) -> list[Tensor]:
        """This rank's tensors, of the same number and shapes on every rank and in every round."""

    @abstractmethod
    def unpack(self, averages: list[Tensor]) -> None:
        """Take over the averages, in the order of ``pack``."""


class LocalMomentum(Rider):
    """The optimizer's state tensors of a parameter's shape (SGD's momentum; Adam's two moments).

    Raises:
        ConfigError: by ``pack``, where the state holds what is no number to average (8-bit codes).
    """

    def __init__(self, vector: ParameterVector, optimizer: optim.Optimizer) -> None:
        self._vector, self._optimizer = vector, optimizer
        self._keys: tuple[str, ...] = ()

    def _state(self) -> list[tuple[nn.Parameter, Tensor | None]]:
        state = self._optimizer.state
        if not self._keys:  # at the first round every rank has stepped
            p = next((p for p in self._vector.parameters if state.get(p)), self._vector.parameters[0])
            named = state.get(p, {}).items()
            for key, value in named:
                _refuse_codes(key, value)
            self._keys = tuple(k for k, v in named if k != "step" and isinstance(v, Tensor) and v.shape == p.shape)
        return [(p, state.get(p, {}).get(key)) for key in self._keys for p in self._vector.parameters]

    def pack(self) -> list[Tensor]:
        return [torch.zeros_like(p) if own is None else own for p, own in self._state()]

    def unpack(self, averages: list[Tensor]) -> None:
        pairs = [(own, new) for (_, own), new in zip(self._state(), averages, strict=True) if own is not None]
        if pairs:
            torch._foreach_copy_([own for own, _ in pairs], [new for _, new in pairs])


def _refuse_codes(key: str, value: object) -> None:
    if not isinstance(value, Tensor) or value.numel() <= 1:
        return
    kind = type(value).__name__ if type(value) not in (Tensor, nn.Parameter) else str(value.dtype)
    if kind != str(value.dtype) or not value.is_floating_point():
        raise ConfigError(
            f"method.local_momentum is average: the optimizer's state '{key}' is of {kind}, codes and no numbers to "
            f"average; must be keep or reset, or the optimizer one that keeps its state in floating point"
        )


class RunningStatistics(Rider):
    """BatchNorm's running mean and variance, pooled: mean of means, mean(var + mean²) - mean²."""

    def __init__(self, model: nn.Module) -> None:
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
        self._pairs = [
            (m.running_mean, m.running_var) for m in norms if m.running_mean is not None and m.running_var is not None
        ]

    def pack(self) -> list[Tensor]:
        return [t for mean, var in self._pairs for t in (mean, var + mean.square())]

    def unpack(self, averages: list[Tensor]) -> None:
        for (mean, var), first, second in zip(self._pairs, averages[::2], averages[1::2], strict=True):
            mean.copy_(first)
            var.copy_((second - first.square()).clamp_(min=0))
