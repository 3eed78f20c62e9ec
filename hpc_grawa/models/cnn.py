"""A small convolutional network for small images."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import require


class SmallCNN(nn.Module):
    """3x3 convolutions with BatchNorm, one pooling, a linear head; made for 8x8 digits, takes any size.

    Args:
        in_channels: of the images.
        num_classes: logits per image.
        width: channels of the first convolution; the next have twice as many.
        depth: convolutions; the pooling is after the second.
        dropout: rate, before the head.
    """

    def __init__(
        self, in_channels: int = 1, num_classes: int = 10, width: int = 16, depth: int = 3, dropout: float = 0.0
    ) -> None:
        """Initialised as PyTorch does by default."""
        super().__init__()
        require(depth >= 2, "model.depth", depth, "at least 2")
        require(0 <= dropout < 1, "model.dropout", dropout, "in [0, 1)")

        def stage(inputs: int, outputs: int) -> list[nn.Module]:
            return [
                nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(inplace=True),
            ]

        self.features = nn.Sequential(
            *stage(in_channels, width),
            *stage(width, 2 * width),
            nn.MaxPool2d(2),
            *(module for _ in range(depth - 2) for module in stage(2 * width, 2 * width)),
            nn.AdaptiveAvgPool2d(2),
        )
        self.dropout = dropout
        self.head = nn.Linear(8 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, num_classes]`` of images ``[B, in_channels, H, W]``."""
        features = F.dropout(self.features(x).flatten(1), self.dropout, self.training)
        logits: Tensor = self.head(features)
        return logits
