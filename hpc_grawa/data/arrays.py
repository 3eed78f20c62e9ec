"""Labelled images as one uint8 tensor, augmented a batch at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Splits
from .sharding import held_out


@dataclass(frozen=True)
class Augmentation:
    """Random flip and random crop of the padded image.

    Attributes:
        flip: mirror every second image left to right, at random.
        padding: black pixels added on each side before cropping.
        crop: side of the window in pixels, at most that of the image; None for the size of the image.
    """

    flip: bool = False
    padding: int = 0
    crop: int | None = None

    def random(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Augment ``[B, C, H, W]`` by 3·B draws: the flips, the top edges, the left edges of the windows."""
        batch, channels, *size = images.shape
        tall, wide = (self.crop or side for side in size)
        images = F.pad(images, (self.padding,) * 4) if self.padding else images
        height, width = images.shape[2:]
        flipped, top, left = (
            torch.randint(choices, (batch, 1), generator=generator)
            for choices in (1 + self.flip, height - tall + 1, width - wide + 1)
        )
        rows, columns = top + torch.arange(tall), left + torch.arange(wide)
        columns = torch.where(flipped == 1, width - 1 - columns, columns)
        pixels = (rows[:, :, None] * width + columns[:, None, :]).view(batch, 1, -1).expand(-1, channels, -1)
        return images.flatten(2).gather(2, pixels).view(batch, channels, tall, wide)

    def center(self, images: Tensor) -> Tensor:
        """The window ``[B, C, crop, crop]`` in the middle of ``[B, C, H, W]``: the un-augmented view."""
        if self.crop is None:
            return images
        top, left = ((side - self.crop) // 2 for side in images.shape[2:])
        return images[:, :, top : top + self.crop, left : left + self.crop]


class ArraySplit:
    """Labelled images in memory.

    Args:
        images: uint8 ``[N, C, H, W]``, contiguous.
        labels: int64 ``[N]``.
        mean: of each channel, in [0, 1], taken off.
        std: of each channel, in [0, 1], divided by.
        augmentation: of training batches; its crop is cut out of the middle of the others.
        channels_last: lay batches out as ``torch.channels_last``.
        index: the examples to see, int64; None for all. The images are shared, not copied.

    Raises:
        ValueError: images, labels and augmentation do not fit together.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        augmentation: Augmentation | None = None,
        channels_last: bool = False,
        index: Tensor | None = None,
    ) -> None:
        """Copies nothing."""
        self.images, self.all_labels, self.mean, self.std = images, labels, mean, std
        self.augmentation = augmentation or Augmentation()
        self.channels_last, self.index = channels_last, index
        crop = self.augmentation.crop
        if images.dtype != torch.uint8 or images.dim() != 4 or len(images) != len(labels):
            raise ValueError(f"{tuple(images.shape)} images ({images.dtype}), {len(labels)} labels: must be uint8 NCHW")
        if crop is not None and crop > min(images.shape[2:]):
            raise ValueError(f"crop is {crop}: must be at most the images' {tuple(images.shape[2:])} pixels")
        # (pixel / 255 - mean) / std as one product and one sum.
        scale = 1 / torch.tensor(std, dtype=torch.float64).view(-1, 1, 1)
        self._scale = (scale / 255).float()
        self._shift = (-scale * torch.tensor(mean, dtype=torch.float64).view(-1, 1, 1)).float()

    def __len__(self) -> int:
        """Number of examples, N."""
        return len(self.all_labels if self.index is None else self.index)

    @property
    def labels(self) -> Tensor:
        """Classes ``[N]`` (int64)."""
        return self.all_labels if self.index is None else self.all_labels[self.index]

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Normalised images ``[B, C, h, w]`` (float32) and labels ``[B]`` (int64) of the examples ``index`` ``[B]``.

        Args:
            index: int64, each in [0, N).
            generator: augments by its draws; None for the images as they are.
        """
        index = index if self.index is None else self.index[index]
        images = self.images.index_select(0, index)
        augment = self.augmentation
        images = augment.center(images) if generator is None else augment.random(images, generator)
        inputs = images.float().mul_(self._scale).add_(self._shift)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return inputs.contiguous(memory_format=layout), self.all_labels.index_select(0, index)

    def subset(self, index: Tensor) -> ArraySplit:
        """The examples ``index`` (int64, each in [0, N)) of these; shares the images."""
        index = index if self.index is None else self.index[index]
        return ArraySplit(
            self.images, self.all_labels, self.mean, self.std, self.augmentation, self.channels_last, index
        )


def splits(train: ArraySplit, test: ArraySplit, validation: int) -> Splits:
    """Hold ``validation`` examples of ``train`` out, by classes, the same ones in every run."""
    if not validation:
        return Splits(train, None, test)
    kept, held = held_out(len(train), validation, seed=0, labels=train.labels)
    return Splits(train.subset(kept), train.subset(held), test)
