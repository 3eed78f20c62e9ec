"""Training batches of packed ImageNet beside torchvision.datasets.ImageFolder and a DataLoader, on the same JPEGs.

    python benchmarks/loader.py DIR [CORES]       DIR as data_prep/imagenet.py made it

Both get as many workers as CORES (all by default), to which the process is bound. The JPEGs of DIR are unpacked to a
temporary folder of classes for ImageFolder, which decodes, crops, flips and normalises one image after the other.
"""

from __future__ import annotations

import os
import sys
import tarfile
import tempfile
from pathlib import Path

import torch
from interleave import interleaved, table
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from hpc_grawa.data import ImageNet, in_advance
from hpc_grawa.data.imagenet import MEAN, STD

REPEATS, BATCH = 9, 32


def main() -> None:
    folder = sys.argv[1]
    cores = sorted(os.sched_getaffinity(0))[: int(sys.argv[2]) if len(sys.argv) > 2 else None]
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(1)
    data = ImageNet(path=folder, batch_size=BATCH, workers=len(cores))
    data.check(1)
    train, sampler = data.load().train, data.sampler(0, 1, seed=0)
    steps = min(len(train) // BATCH, 200)
    with tempfile.TemporaryDirectory() as unpacked:
        for shard in sorted(Path(folder).glob("train-*.tar")):
            with tarfile.open(shard) as archive:
                archive.extractall(unpacked, filter="data")
        views = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()]
        prepared = transforms.Compose([*views, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
        images = ImageFolder(unpacked, prepared)
        assert len(images) == len(train)
        loader = DataLoader(images, BATCH, shuffle=True, num_workers=len(cores), persistent_workers=True)

        def ours() -> None:
            for _ in in_advance(train, ((sampler.indices(n), sampler.generator(n)) for n in range(steps))):
                pass

        def theirs() -> None:
            for number, _ in enumerate(loader, 1):
                if number == steps:
                    break

        medians = interleaved(
            {"ImageFolder + DataLoader": theirs, "hpc_grawa.data.ImageNet": ours}, REPEATS, lambda: None
        )
    count = steps * BATCH
    plural = "s" * (len(cores) > 1)
    print(table(f"{count} training images, {len(cores)} worker{plural}", medians, "ImageFolder + DataLoader"))
    for name, seconds in medians.items():
        print(f"{name:26} {count / seconds / len(cores):8,.0f} images/s per core")


if __name__ == "__main__":
    main()
