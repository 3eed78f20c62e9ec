"""ImageNet, or any large set of labelled JPEGs, as ``data_prep/imagenet.py`` leaves it: packed into few files."""

from __future__ import annotations

import io
import json
import math
import os
import threading
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..comm import Communicator
from ..errors import ConfigError, Damaged, in_a_line, require, wrong
from ..launch import own_processors
from .base import CPU, ImageData, Splits
from .sharding import held_out
from .staging import staged

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Pixels = NDArray[np.uint8]
Box = tuple[int, int, int, int]

#: One row of ``train.npy`` and ``val.npy``: an image is ``length`` bytes of file number ``shard`` from ``offset`` on.
ROW = np.dtype([("shard", "<u4"), ("offset", "<u8"), ("length", "<u4"), ("label", "<u4"), ("crc32", "<u4")])

#: An image may have so many pixels (201 MB), and the form to which evaluation resizes it.
MOST_PIXELS = 2**26

_TRIES = 10  # to draw a window that fits into the image, as torchvision's RandomResizedCrop
_CHUNK = 4  # images that a worker takes at a time


@dataclass(frozen=True)
class View:
    """What a model sees of an image.

    In training a random window of ``area`` of the image (sides in a ratio of 3/4 to 4/3) is resized to ``crop`` by
    ``crop`` pixels, and every second one mirrored. In evaluation the shorter side is resized to ``resize`` pixels and
    the middle is cut out. Sizes change with antialiasing.

    Source: Szegedy et al., Going Deeper with Convolutions, 2015; torchvision's RandomResizedCrop, Resize, CenterCrop.

    Attributes:
        crop: side in pixels of what a model sees.
        resize: shorter side in evaluation, before the crop.
        area: smallest and largest share of the image in a random window.
    """

    crop: int = 224
    resize: int = 256
    area: tuple[float, float] = (0.08, 1.0)

    def draws(self, count: int, generator: torch.Generator) -> list[list[float]]:
        """What ``random`` needs for so many images, each in [0, 1)."""
        draws: list[list[float]] = torch.rand(count, 4 * _TRIES + 1, generator=generator, dtype=torch.float64).tolist()
        return draws

    def window(self, height: int, width: int, draws: Sequence[float]) -> Box:
        """Top, left, height and width of the random window that ``draws`` choose."""
        low, high = self.area
        ratio = 4 / 3
        for i in range(0, 4 * _TRIES, 4):
            share, shape, down, right = draws[i : i + 4]
            area, aspect = height * width * (low + (high - low) * share), ratio ** (2 * shape - 1)
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w
        w, h = min(width, round(height * ratio)), min(height, round(width * ratio))
        return (height - h) // 2, (width - w) // 2, h, w

    def random(self, image: Pixels, draws: Sequence[float]) -> Pixels:
        """The augmented view ``[crop, crop, 3]`` of an image ``[H, W, 3]``."""
        height, width, _ = image.shape
        top, left, h, w = self.window(height, width, draws)
        seen = _resized(image[top : top + h, left : left + w], self.crop, self.crop)
        if draws[-1] < 0.5:
            seen = np.ascontiguousarray(seen.view("V3")[:, ::-1]).view(np.uint8)
        return seen

    def center(self, image: Pixels) -> Pixels:
        """The un-augmented view ``[crop, crop, 3]`` of an image ``[H, W, 3]``."""
        shorter = min(image.shape[:2])
        longest = MOST_PIXELS * shorter // self.resize**2
        if longest < max(image.shape[:2]):  # so thin that only its middle is resized
            top, left = ((side - min(side, longest)) // 2 for side in image.shape[:2])
            image = image[top : top + longest, left : left + longest]
        height, width = (self.resize * side // shorter for side in image.shape[:2])
        image = _resized(image, height, width)
        top, left = (round((side - self.crop) / 2) for side in (height, width))
        return np.ascontiguousarray(image[top : top + self.crop, left : left + self.crop])


def _resized(image: Pixels, height: int, width: int) -> Pixels:
    image = np.ascontiguousarray(image)
    if image.shape[:2] == (height, width):
        return image
    # Bytes whose channels lie last have a fast way of their own, on one thread.
    planes = torch.from_numpy(image).permute(2, 0, 1)[None]
    scaled = F.interpolate(planes, (height, width), mode="bilinear", antialias=True)[0]
    pixels: Pixels = scaled.permute(1, 2, 0).contiguous().numpy()
    return pixels


class Files:
    """Files of which many threads read parts, each by one ``pread``.

    Args:
        paths: opened when they are first needed, and kept open.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        """Opens nothing."""
        self.paths = tuple(paths)
        self._descriptors: dict[int, int] = {}
        self._lock = threading.Lock()

    def read(self, number: int, offset: int, length: int) -> bytes:
        """So many bytes of file ``number``.

        Raises:
            Damaged: the file ends before them, or cannot be read.
        """
        try:
            descriptor = self._descriptors.get(number)
            if descriptor is None:
                with self._lock:
                    if number not in self._descriptors:
                        self._descriptors[number] = os.open(self.paths[number], os.O_RDONLY)
                    descriptor = self._descriptors[number]
            content = os.pread(descriptor, length, offset)
        except OSError as error:
            raise Damaged(f"{self.paths[number]}, the image at {offset}, cannot be read ({error.strerror})") from None
        if len(content) != length:
            raise Damaged(f"{self.paths[number]} ends within the image at {offset}: {_CHECK}")
        return content

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)


_CHECK = "check the folder with data_prep/verify.py"


class PackedImages:
    """Labelled JPEGs in few files, decoded by threads; what a batch is does not depend on their number.

    Threads leave bytes, and the whole batch is normalised where it is used. A GPU gets a quarter of the bytes, and the
    host needs 0.8 to 0.9 of the processor time; on a CPU as much (0.98 to 1.05) as if threads normalised each image.

    Args:
        files: which hold the images.
        rows: where they lie, and their labels, ``[N]`` of ``ROW``.
        view: what a model sees of them.
        pool: whose threads decode.
        channels_last: lay batches out as ``torch.channels_last``.
    """

    def __init__(
        self, files: Files, rows: NDArray[Any], view: View, pool: ThreadPoolExecutor, channels_last: bool = True
    ) -> None:
        """Reads nothing."""
        self.files, self.rows, self.view, self._pool, self._channels_last = files, rows, view, pool, channels_last
        self._constants: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        """Number of examples, N."""
        return len(self.rows)

    @property
    def labels(self) -> Tensor:
        """Classes ``[N]`` (int64)."""
        return torch.from_numpy(self.rows["label"].astype(np.int64))

    def subset(self, index: Tensor) -> PackedImages:
        """The examples ``index`` (int64, each in [0, N)) of these."""
        return PackedImages(self.files, self.rows[index.numpy()], self.view, self._pool, self._channels_last)

    def moved(self, paths: Sequence[Path], rows: NDArray[Any]) -> PackedImages:
        """The same images elsewhere: ``rows`` ``[N]`` count files from these on, then ``paths``."""
        files = Files((*self.files.paths, *paths))
        return PackedImages(files, rows, self.view, self._pool, self._channels_last)

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Normalised images ``[B, 3, crop, crop]`` (float32) and labels ``[B]`` (int64) of the examples ``index``."""
        return self.start(index, generator)()

    def start(
        self, index: Tensor, generator: torch.Generator | None = None, device: torch.device = CPU
    ) -> Callable[[], tuple[Tensor, Tensor]]:
        """Begin to decode a batch; what is returned waits for it and gives what ``batch`` would, images on ``device``.

        Raises:
            Damaged: from what is returned: an image is.
        """
        rows = self.rows[index.numpy()]
        draws = None if generator is None else self.view.draws(len(rows), generator)
        side = self.view.crop
        # From page-locked memory the copy does not stop the host.
        coded = torch.empty(len(rows), side, 3 * side, dtype=torch.uint8, pin_memory=device.type == "cuda")
        out = coded.numpy().reshape(-1, side, side, 3)

        def fill(first: int) -> None:
            for i in range(first, min(first + _CHUNK, len(rows))):
                shard, offset, length, _, crc32 = rows[i].item()
                image = self._decoded(shard, offset, length, crc32)
                out[i] = self.view.center(image) if draws is None else self.view.random(image, draws[i])

        parts = [self._pool.submit(fill, first) for first in range(0, len(rows), _CHUNK)]

        def finish() -> tuple[Tensor, Tensor]:
            for part in parts:
                part.result()
            images = self._normalised(coded.to(device, non_blocking=True))
            labels = torch.from_numpy(rows["label"].astype(np.int64))
            return images if self._channels_last else images.contiguous(), labels

        return finish

    def _normalised(self, coded: Tensor) -> Tensor:
        """Images ``[B, 3, crop, crop]`` of rows of pixels ``[B, crop, 3·crop]``, on the same device."""
        side = self.view.crop
        if coded.device not in self._constants:
            # (pixel / 255 - mean) / std as one product and one sum, for a row of pixels.
            each = 1 / torch.tensor(STD, dtype=torch.float64)
            both = each / 255, -each * torch.tensor(MEAN, dtype=torch.float64)
            scale, shift = (values.repeat(side).float().to(coded.device) for values in both)
            self._constants[coded.device] = scale, shift
        scale, shift = self._constants[coded.device]
        return torch.mul(coded, scale).add_(shift).view(-1, side, side, 3).permute(0, 3, 1, 2)

    def _decoded(self, shard: int, offset: int, length: int, crc32: int) -> Pixels:
        content = self.files.read(shard, offset, length)
        try:
            height, width = jpeg_size(content)
            if height * width > MOST_PIXELS:
                raise ValueError(f"{width} x {height} pixels are more than {MOST_PIXELS:,}")
            if zlib.crc32(content) != crc32:  # of most damage decoders make an image
                raise ValueError("its bytes are not those that were packed")
            return decoder()(content)
        except (RuntimeError, OSError, SyntaxError, ValueError) as error:
            where = f"{self.files.paths[shard]}, the image at {offset}"
            raise Damaged(f"{where}, cannot be decoded ({in_a_line(error)}): {_CHECK}") from None


def jpeg_size(content: bytes) -> tuple[int, int]:
    """Height and width by the header of a JPEG, before anything is decoded; 0 by 0 if it has none.

    Source: ITU-T T.81, 1992, B.2.2.
    """
    at = 2
    while (at := content.find(b"\xff", at)) >= 0:
        kind = content[at + 1 : at + 2]
        if b"\xc0" <= kind <= b"\xcf" and kind not in (b"\xc4", b"\xc8", b"\xcc"):  # a frame begins
            return int.from_bytes(content[at + 5 : at + 7], "big"), int.from_bytes(content[at + 7 : at + 9], "big")
        alone = kind <= b"\x01" or b"\xd0" <= kind <= b"\xd8" or kind == b"\xff"  # no length follows
        at += (1 if kind == b"\xff" else 2) if alone else 2 + max(2, int.from_bytes(content[at + 2 : at + 4], "big"))
    return 0, 0


def misplaced(rows: NDArray[Any], sizes: Sequence[int], classes: int) -> int | None:
    """The first image that lies outside of the files, is empty, or is of no class; None if there is none.

    Args:
        rows: ``[N]`` of ``ROW``.
        sizes: of the files in bytes.
        classes: how many there are.
    """
    size = np.array([*sizes, 0], np.uint64)[np.minimum(rows["shard"], len(sizes))]  # a file that is not there is empty
    length = rows["length"].astype(np.uint64)
    right = (length > 0) & (length <= size) & (rows["offset"] <= size - length) & (rows["label"] < classes)
    wrong = np.flatnonzero(~right)
    return int(wrong[0]) if len(wrong) else None


@cache
def decoder() -> Callable[[bytes], Pixels]:
    """JPEG → ``[H, W, 3]``: torchvision's decoder, or Pillow's, which gives the same pixels in 1.4 times the time.

    torchvision 0.29 announces that it will lose its decoder, therefore the other.
    """
    with suppress(ImportError, RuntimeError, OSError):  # absent, or made for another torch
        from torchvision.io import ImageReadMode, decode_jpeg

        def by_torchvision(content: bytes) -> Pixels:
            coded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            pixels: Pixels = decode_jpeg(coded, mode=ImageReadMode.RGB).permute(1, 2, 0).numpy()
            return pixels

        return by_torchvision
    from PIL import Image

    def by_pillow(content: bytes) -> Pixels:
        with Image.open(io.BytesIO(content), formats=("JPEG",)) as image:
            width, height = image.size
            return np.frombuffer(bytearray(image.convert("RGB").tobytes()), np.uint8).reshape(height, width, 3)

    return by_pillow


@dataclass(kw_only=True)
class ImageNet(ImageData):
    """ImageNet, or another set of labelled JPEGs of any sizes; random windows and flips in training.

    The test set is ImageNet's validation part; ``validation`` holds out some of the training images.

    Source: Russakovsky et al., ImageNet Large Scale Visual Recognition Challenge, 2015.

    Attributes:
        path: the folder that ``python data_prep/imagenet.py --train ... --val ... --out DIR`` made.
        crop: side in pixels of what a model sees.
        resize: shorter side in evaluation, before the middle is cut out.
        smallest: the smallest share of an image that a random window may have, in (0, 1].
        workers: threads per rank that decode; null: one per processor of the rank.
        stage: a folder on a disk of each node; what the node's ranks train on is copied there before the clock starts.
    """

    path: str
    crop: int = 224
    resize: int = 256
    smallest: float = 0.08
    workers: int | None = None
    stage: str | None = None

    def size(self) -> int:
        """Training examples.

        Raises:
            ConfigError: the folder is missing, foreign or incomplete.
        """
        return int(self._facts()["counts"]["train"])

    def check(self, world_size: int) -> None:
        """Find impossible values without loading or communicating anything.

        Raises:
            ConfigError: the message names key, value and what is allowed.
        """
        require(self.resize**2 <= MOST_PIXELS, "data.resize", self.resize, f"at most {math.isqrt(MOST_PIXELS)} pixels")
        require(1 <= self.crop <= self.resize, "data.crop", self.crop, f"1 to {self.resize}, which data.resize is")
        require(0 < self.smallest <= 1, "data.smallest", self.smallest, "in (0, 1]")
        most = len(os.sched_getaffinity(0))
        allowed = f"1 to {most}, the processors this rank may run on, or null"
        require(self.workers is None or 1 <= self.workers <= most, "data.workers", self.workers, allowed)
        super().check(world_size)
        try:
            decoder()
        except ImportError:
            raise ConfigError(
                "data is ImageNet: needs torchvision or Pillow to decode JPEGs; pip install 'hpc-grawa[vision]'"
            ) from None

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Three channels, ``crop`` by ``crop`` pixels."""
        return 3, self.crop, self.crop

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their labels."""
        return tuple(self._facts()["classes"])

    def load(self) -> Splits:
        """Read the index; images are read when they are needed.

        Raises:
            ConfigError: the folder is missing, foreign or damaged.
        """
        facts = self._facts()
        pool = ThreadPoolExecutor(self.workers or own_processors(), thread_name_prefix="decode")
        view = View(self.crop, self.resize, (self.smallest, 1.0))

        def part(name: str) -> PackedImages:
            folder, shards = Path(self.path), facts["shards"][name]
            names = [f"{name}-{shard:05}.tar" for shard in range(shards)]
            try:
                # Mapped first: a header may promise more than there is.
                mapped = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
                if mapped.dtype != ROW or mapped.shape != (facts["counts"][name],):
                    raise ValueError(f"{name}.npy is {mapped.dtype} {mapped.shape}")
                rows = np.array(mapped)
                sizes = [facts["bytes"][file] for file in names]
                if (wrong := misplaced(rows, sizes, len(facts["classes"]))) is not None:
                    shard, offset, length, label, _ = rows[wrong].item()
                    what = f"class {label}, {length} bytes at {offset} of file {shard}"
                    raise ValueError(f"{name}.npy says of image {wrong} what cannot be: {what}")
            except (OSError, EOFError, ValueError, AttributeError) as error:
                raise self._wrong(in_a_line(error)) from None
            return PackedImages(Files([folder / file for file in names]), rows, view, pool, self.channels_last)

        train, test = part("train"), part("val")
        if not self.validation:
            return Splits(train, None, test)
        kept, held = held_out(len(train), self.validation, seed=0, labels=train.labels)
        return Splits(train.subset(kept), train.subset(held), test)

    def near(self, splits: Splits, comm: Communicator, seed: int, say: Callable[[str], None]) -> Splits:
        """Copy what the ranks of this node train on to ``stage``, and read it from there. All ranks must call it.

        Raises:
            ConfigError: there is no room, or the copy fails; the same on all ranks.
        """
        if self.stage is None:
            return splits
        train = splits.train
        assert isinstance(train, PackedImages)
        paths, rows = staged(
            Path(self.stage),
            train.files.paths,
            train.rows,
            lambda rank: self.sampler(rank, comm.size, seed).shard,
            comm,
            say,
        )
        return Splits(train.moved(paths, rows), splits.validation, splits.test)

    def _facts(self) -> dict[str, Any]:
        """meta.json, once every file is seen to have the size that it states."""
        try:
            facts: dict[str, Any] = json.loads((Path(self.path) / "meta.json").read_bytes())
            sizes, classes = facts["bytes"], facts["classes"]
            if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
                raise ValueError("the classes in meta.json are no names")
            for part in ("train", "val"):
                for key in ("counts", "shards"):
                    if type(number := facts[key][part]) is not int or number < 1:
                        raise ValueError(f"the {key} of {part} in meta.json are {number!r}")
                if facts["shards"][part] > len(sizes):  # before a list of them is made
                    raise ValueError(f"meta.json has {len(sizes)} files, not {facts['shards'][part]} of {part}")
                _ = [sizes[f"{part}-{shard:05}.tar"] for shard in range(facts["shards"][part])]
            for name, size in sizes.items():
                if (found := (Path(self.path) / name).stat().st_size) != size:
                    raise ValueError(f"{name} has {found} bytes, not {size}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._wrong(f"no {error} in meta.json" if isinstance(error, KeyError) else in_a_line(error)) from None
        return facts

    def _wrong(self, reason: str) -> ConfigError:
        return wrong(
            "data.path",
            repr(self.path),
            f"must be a folder made by "
            f"`python data_prep/imagenet.py --train PATH --val PATH --devkit PATH --out DIR` ({reason})",
        )
