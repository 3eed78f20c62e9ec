"""torchvision's models for ImageNet, untrained: a center that is saved loads into torchvision's own."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import in_a_line, wrong


class _Torchvision(nn.Module):
    """Made in its place: torchvision's model of the name ``architecture``, whose state bears no other names."""

    architecture: str

    def __new__(cls, num_classes: int = 1000) -> Any:
        try:
            from torchvision import models
        except (ImportError, RuntimeError, OSError) as error:  # absent, or made for another torch
            raise wrong(
                "model", cls.__name__, f"needs torchvision ({in_a_line(error)}); pip install 'hpc-grawa[vision]'"
            ) from None
        return getattr(models, cls.architecture)(num_classes=num_classes)

    def __init__(self, num_classes: int = 1000) -> None:
        """Never called, as no instance is made; it shows the arguments."""


class ResNet50(_Torchvision):
    """torchvision's ResNet-50: 25,557,032 parameters in 161 tensors for 1000 classes.

    Source: He et al., Deep Residual Learning for Image Recognition, 2016 (a block's stride is in its 3x3 convolution).

    Args:
        num_classes: logits per image.
    """

    architecture = "resnet50"


class ResNet152(_Torchvision):
    """torchvision's ResNet-152: 60,192,808 parameters in 467 tensors for 1000 classes.

    Source: He et al., Deep Residual Learning for Image Recognition, 2016 (a block's stride is in its 3x3 convolution).

    Args:
        num_classes: logits per image.
    """

    architecture = "resnet152"


class ViTB16(_Torchvision):
    """torchvision's ViT-B/16 for images of 224 by 224 pixels: 86,567,656 parameters in 152 tensors for 1000 classes.

    Source: Dosovitskiy et al., An Image is Worth 16x16 Words, 2021.

    Args:
        num_classes: logits per image.
    """

    architecture = "vit_b_16"
