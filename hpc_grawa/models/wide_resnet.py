"""Wide ResNet for 32x32 images: Zagoruyko and Komodakis, Wide Residual Networks, BMVC 2016."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .starts import start_convolutions


class _Block(nn.Module):
    """BN, ReLU, 3x3 convolution, dropout, BN, ReLU, 3x3 convolution; where widths differ, beside a 1x1 convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x), inplace=True)
        if self.shortcut is not None:
            x = self.shortcut(y)
        y = F.relu(self.bn2(self.conv1(y)), inplace=True)
        y = F.dropout(y, self.dropout, self.training)
        added: Tensor = x + self.conv2(y)
        return added


class WRN28x10(nn.Module):
    """WRN-28-10, widths 160-320-640: 36,479,194 parameters in 80 tensors for 10 classes of colour images.

    Convolutions as He et al., 2015.

    Args:
        in_channels: of the images.
        num_classes: logits per image.
        widen: factor of the widths 16, 32 and 64.
        dropout: rate, between the two convolutions of a block.
    """

    def __init__(self, in_channels: int = 3, num_classes: int = 10, widen: int = 10, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        blocks, before = [], 16
        for width in (16 * widen, 32 * widen, 64 * widen):
            for n in range(4):
                blocks.append(_Block(before, width, 2 if n == 0 and width > 16 * widen else 1, dropout))
                before = width
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(before)
        self.head = nn.Linear(before, num_classes)
        start_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, num_classes]`` of images ``[B, in_channels, H, W]``."""
        x = F.relu(self.bn(self.blocks(self.conv(x))), inplace=True)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits
