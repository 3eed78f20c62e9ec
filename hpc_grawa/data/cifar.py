"""CIFAR-10 and CIFAR-100 as ``data_prep/cifar.py`` leaves them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from ..errors import in_a_line, require, wrong
from .arrays import ArraySplit, Augmentation, splits
from .base import ImageData, Splits

Crop = Literal[28, 32]
Normalisation = Literal["published", "computed"]

#: Mean and standard deviation that the published experiments took off and divided by. CIFAR-10's is the mean of the
#: standard deviations of single images; that of all pixels is .2470, .2435, .2616.
PUBLISHED = {
    "CIFAR-10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "CIFAR-100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}


@dataclass(kw_only=True)
class CIFAR(ImageData):
    """CIFAR-10 or CIFAR-100, whichever the folder holds; random flip and crop in training.

    Source: Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.

    Attributes:
        path: the folder that ``python data_prep/cifar.py --archive ARCHIVE --out DIR`` made.
        crop: 32 (random windows of the image padded by 4) or 28 (of the image itself; the middle in evaluation).
        normalisation: published (mean and std of the published experiments) or computed (of meta.json).
        augment: whether training images are cropped at random and flipped; else they are the middle.
        examples: only so many training images, the first; null for all.
    """

    path: str
    crop: Crop = 32
    normalisation: Normalisation = "published"
    augment: bool = True
    examples: int | None = None

    def size(self) -> int:
        """Training examples.

        Raises:
            ConfigError: the folder is missing, foreign or damaged.
        """
        count = int(self._facts()["counts"]["train"])
        return count if self.examples is None else min(count, self.examples)

    def check(self, world_size: int) -> None:
        """Find impossible values without loading or communicating anything.

        Raises:
            ConfigError: the message names key, value and what is allowed.
        """
        for key, value, allowed in (
            ("crop", self.crop, get_args(Crop)),
            ("normalisation", self.normalisation, get_args(Normalisation)),
        ):
            require(value in allowed, f"data.{key}", repr(value), f"one of {', '.join(map(str, allowed))}")
        require(self.examples is None or self.examples >= 1, "data.examples", self.examples, "null, or at least 1")
        super().check(world_size)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Three channels, ``crop`` by ``crop`` pixels."""
        return 3, self.crop, self.crop

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their labels."""
        return tuple(self._facts()["classes"])

    def load(self) -> Splits:
        """Read the arrays.

        Raises:
            ConfigError: the folder is missing, foreign or damaged.
        """
        facts = self._facts()
        mean, std = facts["mean"], facts["std"]
        if self.normalisation == "published":
            mean, std = PUBLISHED[facts["name"]]
        augmentation = Augmentation(flip=True, padding=4 if self.crop == 32 else 0, crop=self.crop)
        middle = Augmentation(crop=self.crop).center

        def part(name: str) -> ArraySplit:
            images, labels = (torch.from_numpy(np.load(self._file(name, kind))) for kind in ("images", "labels"))
            if name == "train":
                images, labels = images[: self.size()], labels[: self.size()]
            if not self.augment:
                return ArraySplit(middle(images).contiguous(), labels.long(), mean, std, None, self.channels_last)
            return ArraySplit(images, labels.long(), mean, std, augmentation, self.channels_last)

        return splits(part("train"), part("test"), self.validation)

    def _file(self, part: str, kind: str) -> Path:
        return Path(self.path) / f"{part}_{kind}.npy"

    def _facts(self) -> dict[str, Any]:
        """meta.json, once every array is seen to have the size that it states."""
        try:
            facts: dict[str, Any] = json.loads((Path(self.path) / "meta.json").read_bytes())
            if facts["name"] not in PUBLISHED:
                raise ValueError(f"it holds {facts['name']}")
            for part in ("train", "test"):
                count = facts["counts"][part]
                for kind, shape in (("images", (count, 3, 32, 32)), ("labels", (count,))):
                    file = self._file(part, kind)
                    # Maps the file without reading it: the header, and whether the file is long enough.
                    array = np.load(file, mmap_mode="r")
                    if array.shape != shape or array.dtype != np.uint8:
                        raise ValueError(f"{file.name} is {array.dtype} {array.shape}, not uint8 {shape}")
        except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"no {error} in meta.json" if isinstance(error, KeyError) else in_a_line(error)
            raise wrong(
                "data.path",
                repr(self.path),
                f"must be a folder made by "
                f"`python data_prep/cifar.py --archive cifar-10-python.tar.gz --out DIR` ({reason})",
            ) from None
        return facts
