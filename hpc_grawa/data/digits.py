"""scikit-learn's handwritten digits: 1,797 real grey images of 8x8 pixels, in its wheel."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import torch

from ..errors import ConfigError
from .arrays import ArraySplit, Augmentation, splits
from .base import ImageData, Splits

_TRAIN, _TEST = 1437, 360


@dataclass(kw_only=True)
class Digits(ImageData):
    """Handwritten digits, 8x8 grey: 1,437 to train on, 360 to test on, split by classes with seed 0.

    Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998, as scikit-learn ships it.

    Attributes:
        batch_size: examples per rank and step.
        augment: shift training images by up to one pixel.
    """

    batch_size: int = 32
    augment: bool = False

    def size(self) -> int:
        """1,437.

        Raises:
            ConfigError: scikit-learn is not installed.
        """
        if find_spec("sklearn") is None:
            raise ConfigError("data is Digits: needs scikit-learn, which `pip install 'hpc_grawa[demo]'` brings")
        return _TRAIN

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """One channel, 8x8 pixels."""
        return 1, 8, 8

    @property
    def classes(self) -> tuple[str, ...]:
        """The ten digits."""
        return tuple("0123456789")

    def load(self) -> Splits:
        """Read the images.

        Raises:
            ConfigError: scikit-learn is not installed.
        """
        self.size()
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        # 17 levels of grey, 0 to 16, spread over a byte.
        images = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
        labels = torch.from_numpy(digits.target).long()
        index = range(len(labels))
        train, test = train_test_split(index, train_size=_TRAIN, test_size=_TEST, stratify=labels, random_state=0)
        std, mean = torch.std_mean(images[train].double() / 255, correction=0)
        augmentation = Augmentation(padding=int(self.augment))

        def part(index: list[int]) -> ArraySplit:
            return ArraySplit(
                images[index], labels[index], [mean.item()], [std.item()], augmentation, self.channels_last
            )

        return splits(part(train), part(test), self.validation)
