"""What a model is judged by: sums over examples, exact however the examples are spread over ranks."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
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


#: In the place of a target that counts nowhere, neither in ``CrossEntropyLoss``.
IGNORED = -100


def _counted(target: Tensor) -> Tensor:
    return target != IGNORED


class Accuracy(Metric):
    """The fraction of targets ``[...]``, class numbers, that are the place of the largest output ``[..., classes]``.

    Targets of -100 are left out, as ``CrossEntropyLoss`` does; in the other metrics of classes, too.

    Example:
        >>> accuracy = Accuracy()
        >>> accuracy.value(accuracy.sums(torch.eye(2), torch.tensor([0, 0])))
        0.5
    """

    name = "accuracy"

    def sums(self, output: Tensor, target: Tensor) -> Tensor:
        if output.shape[:-1] != target.shape or target.is_floating_point():
            raise ValueError("accuracy is of class numbers [...] beside outputs [..., classes]; give another metric")
        correct = (output.argmax(-1) == target).sum().double()  # of none that is ignored, as there is no such class
        return torch.stack((correct, _counted(target).sum().double()))

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


class Perplexity(Metric):
    """exp of the mean surprise, in nats, of targets ``[B, ...]`` under logits ``[B, classes, ...]``; classes second.

    As unsure as among so many equally likely classes.

    Example:
        >>> perplexity = Perplexity()
        >>> perplexity.value(perplexity.sums(torch.zeros(2, 4, 3), torch.tensor([[0, 1, 2], [3, 0, 1]])))
        4.0
    """

    name = "perplexity"
    higher_is_better = False

    def sums(self, output: Tensor, target: Tensor) -> Tensor:
        if output.shape[:1] + output.shape[2:] != target.shape or target.is_floating_point():
            raise ValueError("surprise is of class numbers [B, ...] beside logits [B, classes, ...]")
        surprise = F.cross_entropy(output.double(), target, reduction="sum")
        return torch.stack((surprise, _counted(target).sum().double()))

    def value(self, sums: Tensor) -> float:
        return math.exp(min(float(sums[0] / sums[1]), 700.0))  # a float knows no more


class BitsPerByte(Perplexity):
    """Total surprise in bits over the bytes that the targets stand for, and beside it the perplexity of a token.

    It compares models of different tokens: the size to which a model compresses the text, as a share, is an eighth.

    Args:
        token_bytes: that each token stands for; None: one each. Settled by the data.

    Example:
        >>> bits = BitsPerByte(token_bytes=[1, 1, 1, 3])
        >>> bits.values(bits.sums(torch.zeros(1, 4, 2), torch.tensor([[0, 3]])))
        {'bits_per_byte': 1.0, 'perplexity': 4.0}
    """

    name = "bits_per_byte"

    def __init__(self, token_bytes: list[int] | None = None) -> None:
        self._token_bytes = None if token_bytes is None else torch.tensor(token_bytes, dtype=torch.float64)

    def sums(self, output: Tensor, target: Tensor) -> Tensor:
        both = super().sums(output, target)
        table = self._token_bytes
        counted = target[_counted(target)]
        return torch.cat((both, both[1:] if table is None else table.to(target.device)[counted].sum()[None]))

    def value(self, sums: Tensor) -> float:
        return float(sums[0] / (math.log(2) * sums[2]))

    def values(self, sums: Tensor) -> dict[str, float]:
        return {self.name: self.value(sums), Perplexity.name: super().value(sums)}
