"""What a model is judged by: sums over examples, exact however the examples are spread over ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor


class Metric(ABC):
    """A number computed from sums over examples.

    Attributes:
        name: under which it is reported.
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
