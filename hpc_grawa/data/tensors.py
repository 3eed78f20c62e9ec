"""Examples of any kind that fit into memory."""

from __future__ import annotations

import torch
from torch import Tensor

from ..nests import Nest, leaves, mapped


class TensorExamples:
    """Inputs and targets in memory, given out as they are.

    Args:
        inputs: ``[N, ...]``, or a nest (dict, tuple, ...) of such tensors.
        targets: the same.

    Raises:
        ValueError: there are not as many of both.

    Example:
        >>> TensorExamples(torch.arange(6).view(3, 2), torch.arange(3)).batch(torch.tensor([2, 0]))
        (tensor([[4, 5],
                [0, 1]]), tensor([2, 0]))
    """

    def __init__(self, inputs: Nest, targets: Nest) -> None:
        """Copies nothing."""
        counts = [len(tensor) for nest in (inputs, targets) for tensor in leaves(nest)]
        if len(set(counts)) != 1:
            raise ValueError(f"{' and '.join(map(str, counts))} examples in inputs and targets: must be as many")
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        """Number of examples, N."""
        count: int = len(leaves(self.inputs)[0])
        return count

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> tuple[Nest, Nest]:
        """Inputs ``[B, ...]`` and targets ``[B, ...]`` of the examples ``index`` ``[B]``; nothing is augmented."""
        inputs, targets = (mapped(lambda tensor: tensor[index], nest) for nest in (self.inputs, self.targets))
        return inputs, targets
