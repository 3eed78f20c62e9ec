"""Models: one file per architecture, each an ordinary ``nn.Module``."""

from .all_cnn import AllCNN
from .cnn import SmallCNN
from .densenet import DenseNet121
from .gpt import GPT
from .imagenet import ResNet50, ResNet152, ViTB16
from .pyramidnet import PyramidNet110
from .resnet18 import ResNet18
from .resnet_cifar import ResNet20, ResNet56
from .vgg import VGG16
from .wide_resnet import WRN28x10

__all__ = [
    "GPT",
    "VGG16",
    "AllCNN",
    "DenseNet121",
    "PyramidNet110",
    "ResNet18",
    "ResNet20",
    "ResNet50",
    "ResNet56",
    "ResNet152",
    "SmallCNN",
    "ViTB16",
    "WRN28x10",
]
