"""Models: one file per architecture, each an ordinary ``nn.Module``."""

from .cnn import SmallCNN
from .gpt import GPT
from .imagenet import ResNet50, ResNet152, ViTB16
from .resnet_cifar import ResNet20, ResNet56

__all__ = ["GPT", "ResNet20", "ResNet50", "ResNet56", "ResNet152", "SmallCNN", "ViTB16"]
