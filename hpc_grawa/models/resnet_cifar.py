"""ResNets for 32x32 images: He et al., Deep Residual Learning for Image Recognition, 2016, section 4.2."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .starts import start_convolutions


class _Block(nn.Module):
    """Two 3x3 convolutions beside option A's shortcut: every second pixel, new channels zero, no parameters."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.grown = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.grown:
            x = F.pad(x, (0, 0, 0, 0, 0, self.grown))
        return F.relu(y.add_(x), inplace=True)


class _ResNet(nn.Module):
    def __init__(self, blocks: int, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        widths = [16] * blocks + [32] * blocks + [64] * blocks
        self.blocks = nn.Sequential(
            *(
                _Block(before, width, stride=width // before)
                for before, width in zip([16, *widths[:-1]], widths, strict=True)
            )
        )
        self.head = nn.Linear(64, num_classes)
        start_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, num_classes]`` of images ``[B, in_channels, H, W]``."""
        x = F.relu(self.bn(self.conv(x)), inplace=True)
        logits: Tensor = self.head(self.blocks(x).mean((2, 3)))
        return logits


class ResNet20(_ResNet):
    """ResNet-20, widths 16-32-64: 269,722 parameters in 59 tensors for 10 classes of colour images.

    Args:
        in_channels: of the images.
        num_classes: logits per image.
    """

    def __init__(self, in_channels: int = 3, num_classes: int = 10) -> None:
        """Convolutions as He et al., Delving Deep into Rectifiers, 2015."""
        super().__init__(3, in_channels, num_classes)


class ResNet56(_ResNet):
    """ResNet-56, widths 16-32-64: 853,018 parameters in 167 tensors for 10 classes of colour images.

    Args:
        in_channels: of the images.
        num_classes: logits per image.
    """

    def __init__(self, in_channels: int = 3, num_classes: int = 10) -> None:
        """Convolutions as He et al., Delving Deep into Rectifiers, 2015."""
        super().__init__(9, in_channels, num_classes)
