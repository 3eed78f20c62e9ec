"""DenseNet for 32x32 images: Huang et al., Densely Connected Convolutional Networks, CVPR 2017."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .starts import start_convolutions


class _Layer(nn.Module):
    """BN, ReLU, 1x1 convolution to 4k channels, BN, ReLU, 3x3 convolution to k, which are put beside the input's."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.bn1(x), inplace=True))
        y = self.conv2(F.relu(self.bn2(y), inplace=True))
        return torch.cat((x, y), 1)


class _Transition(nn.Module):
    """BN, ReLU, 1x1 convolution to half of the channels, the mean of 2x2 pixels."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(inputs)
        self.conv = nn.Conv2d(inputs, inputs // 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.bn(x), inplace=True)), 2)


class DenseNet121(nn.Module):
    """DenseNet-121 with a 3x3 convolution first: 6,956,298 parameters in 362 tensors for 10 classes of colour images.

    Blocks of 6, 12, 24 and 16 layers, θ = .5. Convolutions as He et al., 2015.

    Args:
        in_channels: of the images.
        num_classes: logits per image.
        growth: k, channels that each layer adds.
    """

    def __init__(self, in_channels: int = 3, num_classes: int = 10, growth: int = 32) -> None:
        super().__init__()
        width = 2 * growth
        self.conv = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        layers: list[nn.Module] = []
        for block, count in enumerate((6, 12, 24, 16)):
            if block:
                layers.append(_Transition(width))
                width //= 2
            layers += [_Layer(width + n * growth, growth) for n in range(count)]
            width += count * growth
        self.layers = nn.Sequential(*layers)
        self.bn = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, num_classes)
        start_convolutions(self, "fan_in")

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, num_classes]`` of images ``[B, in_channels, H, W]``, H and W at least 8."""
        x = F.relu(self.bn(self.layers(self.conv(x))), inplace=True)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits
