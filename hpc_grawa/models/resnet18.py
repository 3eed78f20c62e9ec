"""ResNet-18 for 32x32 images: He et al., Deep Residual Learning for Image Recognition, 2016, with a 3x3 stem."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import require
from .starts import start_convolutions


class _Block(nn.Module):
    """Two 3x3 convolutions beside option B's shortcut: a 1x1 convolution where widths differ."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        return F.relu(y.add_(self.shortcut(x)), inplace=True)


class ResNet18(nn.Module):
    """ResNet-18, or its first stages: 11,173,962 parameters in 62 tensors for 10 classes of colour images.

    Of 3 stages 2,777,674, of 2 stages 676,682 and of 1 stage 150,474. Convolutions as He et al., 2015.

    Args:
        in_channels: of the images.
        num_classes: logits per image.
        stages: of two blocks each; each has twice the channels of the one before.
        width: channels of the first stage.
    """

    def __init__(self, in_channels: int = 3, num_classes: int = 10, stages: int = 4, width: int = 64) -> None:
        super().__init__()
        require(1 <= stages <= 4, "model.stages", stages, "1 to 4")
        require(width >= 1, "model.width", width, "at least 1")
        self.conv = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        widths = [width * 2 ** (n // 2) for n in range(2 * stages)]
        pairs = zip([width, *widths[:-1]], widths, strict=True)
        self.blocks = nn.Sequential(*(_Block(before, width) for before, width in pairs))
        self.head = nn.Linear(widths[-1], num_classes)
        start_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, num_classes]`` of images ``[B, in_channels, H, W]``."""
        x = F.relu(self.bn(self.conv(x)), inplace=True)
        logits: Tensor = self.head(self.blocks(x).mean((2, 3)))
        return logits
