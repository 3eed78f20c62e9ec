"""All-CNN-C: Springenberg et al., Striving for Simplicity: The All Convolutional Net, ICLR 2015 workshop."""

from __future__ import annotations

from torch import Tensor, nn

from .starts import start_convolutions


class AllCNN(nn.Module):
    """All-CNN-C, nine convolutions, no BatchNorm: 1,369,738 parameters in 18 tensors for 10 classes of colour images.

    The paper says nothing of the start; convolutions as He et al., 2015, biases 0.

    Args:
        in_channels: of the images.
        num_classes: logits per image.
        dropout: rates: of the image, and after each of the two convolutions of stride 2.
    """

    def __init__(
        self, in_channels: int = 3, num_classes: int = 10, dropout: tuple[float, float, float] = (0.2, 0.5, 0.5)
    ) -> None:
        super().__init__()

        def stage(inputs: int, width: int, rate: float) -> list[nn.Module]:
            layers: list[nn.Module] = [nn.Dropout(rate)]
            for before, stride in ((inputs, 1), (width, 1), (width, 2)):
                layers += [nn.Conv2d(before, width, 3, stride, padding=1), nn.ReLU(inplace=True)]
            return layers

        self.features = nn.Sequential(
            *stage(in_channels, 96, dropout[0]),
            *stage(96, 192, dropout[1]),
            nn.Dropout(dropout[2]),
            *(nn.Conv2d(192, 192, 3, padding=1), nn.ReLU(inplace=True)),
            *(nn.Conv2d(192, 192, 1), nn.ReLU(inplace=True)),
            *(nn.Conv2d(192, num_classes, 1), nn.ReLU(inplace=True)),
        )
        start_convolutions(self, "fan_in")
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]  # each has one

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, num_classes]`` of images ``[B, in_channels, H, W]``."""
        logits: Tensor = self.features(x).mean((2, 3))
        return logits
