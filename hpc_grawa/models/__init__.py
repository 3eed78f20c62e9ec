"""Models: one file per architecture, each an ordinary ``nn.Module``."""

from .cnn import SmallCNN
from .resnet_cifar import ResNet20, ResNet56

__all__ = ["ResNet20", "ResNet56", "SmallCNN"]
