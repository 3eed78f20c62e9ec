"""VGG for 32x32 images: Simonyan and Zisserman, Very Deep Convolutional Networks, ICLR 2015, with BatchNorm."""

from __future__ import annotations

from torch import Tensor, nn

#: Convolutions of configuration D by their channels; 0 is a pooling.
_D = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)


class VGG16(nn.Module):
    """VGG-16 with BatchNorm, head Dropout-512-Dropout-512: 15,253,578 parameters in 58 tensors for 10 classes.

    Initialised as Glorot and Bengio, 2010, which section 3.1 of the paper recommends; biases 0.

    Args:
        in_channels: of the images, of any size; made for 32 by 32 pixels.
        num_classes: logits per image.
        dropout: rate, before each of the two hidden layers of the head.
    """

    def __init__(self, in_channels: int = 3, num_classes: int = 10, dropout: float = 0.5) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = in_channels
        for width in _D:
            if width:
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                before = width
            else:
                layers += [nn.MaxPool2d(2, ceil_mode=True)]  # for 32 pixels the same; crops of 28 end at 1, too
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        hidden = [m for _ in range(2) for m in (nn.Dropout(dropout), nn.Linear(512, 512), nn.ReLU(inplace=True))]
        self.head = nn.Sequential(*hidden, nn.Linear(512, num_classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]  # each has one

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, num_classes]`` of images ``[B, in_channels, H, W]``."""
        logits: Tensor = self.head(self.features(x))
        return logits
