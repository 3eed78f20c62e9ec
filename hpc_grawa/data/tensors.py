"""Examples of any kind that fit into memory."""

from __future__ import annotations

import torch
from torch import Tensor


class TensorExamples:
    """Inputs and targets in memory, given out as they are.

    Args:
        inputs: ``[N, ...]``.
        targets: ``[N, ...]``.

    Raises:
        ValueError: there are not as many of both.

    Example:
        >>> TensorExamples(torch.arange(6).view(3, 2), torch.arange(3)).batch(torch.tensor([2, 0]))
        (tensor([[4, 5],
                [0, 1]]), tensor([2, 0]))
    """

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        """Copies nothing."""
        if len(inputs) != len(targets):
            raise ValueError(f"{len(inputs)} inputs, {len(targets)} targets: must be as many")
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        """Number of examples, N."""
        return len(self.inputs)

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Inputs ``[B, ...]`` and targets ``[B, ...]`` of the examples ``index`` ``[B]``; nothing is augmented."""
        return self.inputs[index], self.targets[index]
