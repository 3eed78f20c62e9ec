"""PyramidNet for 32x32 images: Han, Kim and Kim, Deep Pyramidal Residual Networks, CVPR 2017."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .starts import start_convolutions


class _Block(nn.Module):
    """BN, 3x3 convolution, BN, ReLU, 3x3 convolution, BN; beside it the mean of 2x2 pixels, new channels zero."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.stride, self.grown = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.bn1(x))
        y = self.bn3(self.conv2(F.relu(self.bn2(y), inplace=True)))
        if self.stride > 1:
            x = F.avg_pool2d(x, self.stride, ceil_mode=True)
        added: Tensor = y + F.pad(x, (0, 0, 0, 0, 0, self.grown))
        return added


class PyramidNet110(nn.Module):
    """PyramidNet-110, α = 270: 28,485,477 parameters in 439 tensors for 10 classes of colour images.

    Of 54 basic blocks each has α/54 channels more than the one before. Convolutions as He et al., 2015.

    Args:
        in_channels: of the images.
        num_classes: logits per image.
        alpha: α, by how many channels the last block is wider than the first convolution, which has 16.
    """

    def __init__(self, in_channels: int = 3, num_classes: int = 10, alpha: int = 270) -> None:
        super().__init__()
        widths = [16 + round(alpha * n / 54) for n in range(55)]
        self.conv = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(
            *(_Block(widths[n], widths[n + 1], stride=2 if n in (18, 36) else 1) for n in range(54))
        )
        self.bn2 = nn.BatchNorm2d(widths[-1])
        self.head = nn.Linear(widths[-1], num_classes)
        start_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, num_classes]`` of images ``[B, in_channels, H, W]``."""
        x = F.relu(self.bn2(self.blocks(self.bn1(self.conv(x)))), inplace=True)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits
