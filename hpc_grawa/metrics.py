"""What a model is judged by: sums over examples, exact however the examples are spread over ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from .errors import require


class Metric(ABC):
    """A number computed from sums over examples, and others beside it.

    Attributes:
        name: under which it is reported, and choices are made.
        higher_is_better: whether larger values are better.
    """

    name: ClassVar[str]
    higher_is_better: ClassVar[bool] = True

    @abstractmethod
    def sums(self, output: Tensor, target: Tensor) -> Tensor:
        """Sums over a batch, ``[S]``; those of several batches are added."""

    @abstractmethod
    def value(self, sums: Tensor) -> float:
        """The metric from the sums ``[S]`` (float64) of all examples."""

    def values(self, sums: Tensor) -> dict[str, float]:
        """All that is reported of the sums ``[S]``, by name; the metric comes first."""
        return {self.name: self.value(sums)}


class Accuracy(Metric):
    """The fraction of targets ``[...]``, class numbers, that are the place of the largest output ``[..., classes]``.

    Example:
        >>> accuracy = Accuracy()
        >>> accuracy.value(accuracy.sums(torch.eye(2), torch.tensor([0, 0])))
        0.5
    """

    name = "accuracy"

    def sums(self, output: Tensor, target: Tensor) -> Tensor:
        if output.shape[:-1] != target.shape or target.is_floating_point():
            raise ValueError("accuracy is of class numbers [...] beside outputs [..., classes]; give another metric")
        correct = (output.argmax(-1) == target).double()
        return torch.stack((correct.sum(), correct.new_tensor(correct.numel())))

    def value(self, sums: Tensor) -> float:
        return float(sums[0] / sums[1])


class TopAccuracy(Accuracy):
    """The accuracy, and beside it the fraction of targets that are among the k largest outputs, as ``top5_accuracy``.

    Args:
        k: guesses that count; with fewer classes, all of them.

    Example:
        >>> accuracy = TopAccuracy(k=2)
        >>> accuracy.values(accuracy.sums(torch.eye(3), torch.tensor([0, 0, 2])))
        {'accuracy': 0.6666666666666666, 'top2_accuracy': 1.0}
    """

    def __init__(self, k: int = 5) -> None:
        require(k >= 1, "metric.k", k, "at least 1")
        self.k = k

    def sums(self, output: Tensor, target: Tensor) -> Tensor:
        first = super().sums(output, target)
        best = output.topk(min(self.k, output.shape[-1]), -1).indices
        return torch.cat((first, (best == target[..., None]).sum().double()[None]))

    def values(self, sums: Tensor) -> dict[str, float]:
        return {self.name: self.value(sums), f"top{self.k}_accuracy": float(sums[2] / sums[1])}
