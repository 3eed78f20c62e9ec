"""Small archives in the layout of ILSVRC 2012, made of real images where they are at hand."""

from __future__ import annotations

import importlib.util
import io
import os
import random
import re
import sys
import tarfile
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
#: 1,000 training and 500 validation JPEGs of ten classes, in the folders of imagenette.
_REAL = Path(os.environ.get("IMAGES") or ROOT.parent / "shared/data/imagenette2-224-100x50.tar").absolute()
WORDS = {"n01440764": "tench, Tinca tinca", "n02102040": "English springer", "n02979186": "cassette player"}

Images = dict[str, dict[str, bytes]]


def script(name: str) -> Any:
    """A script of data_prep as a module."""
    folder = ROOT / "data_prep"
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    if (known := sys.modules.get(f"{name}_prep")) is not None:
        return known
    spec = importlib.util.spec_from_file_location(f"{name}_prep", folder / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def real_archive() -> Path:
    """The tar of real JPEGs; without it the test is skipped."""
    if not _REAL.is_file():
        pytest.skip(f"no real images: {_REAL} is not there")
    return _REAL


@cache
def _real() -> dict[str, Images]:
    found: dict[str, Images] = {"train": {}, "val": {}}
    with tarfile.open(real_archive()) as archive:
        for member in archive:
            if member.isreg() and (handle := archive.extractfile(member)) is not None:
                part, wnid, name = member.name.split("/")[-3:]
                found[part].setdefault(wnid, {})[name] = handle.read()
    return found


def real(part: str, per_class: int, classes: int = 10) -> Images:
    """Class → name → content of real JPEGs; without them the test is skipped."""
    chosen = sorted(_real()[part].items())[:classes]
    return {wnid: dict(sorted(images.items())[:per_class]) for wnid, images in chosen}


def jpeg(width: int, height: int, mode: str = "RGB", kind: str = "JPEG", seed: int = 0) -> bytes:
    """A smooth random image of any kind."""
    from PIL import Image

    channels = {"RGB": 3, "L": 1, "CMYK": 4, "RGBA": 4}[mode]
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, channels), np.uint8)
    image = Image.fromarray(coarse.squeeze(), mode).resize((width, height), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return buffer.getvalue()


def promising(index: bytes, count: int) -> bytes:
    """An array of one axis as NumPy saves it, whose header promises another length."""
    found = re.search(rb"\(\d+,\), } *", index)
    assert found is not None
    return index.replace(found[0], f"({count},), }}".encode().ljust(len(found[0])), 1)


def tar(files: Iterable[tuple[str, bytes]], path: Path | None = None, mode: str = "w") -> bytes:
    """A tar archive of ``files``."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]  # one of its literals
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    if path is not None:
        path.write_bytes(buffer.getvalue())
    return buffer.getvalue()


def train_tar(images: Images, path: Path | None = None) -> bytes:
    """As ILSVRC2012_img_train.tar: one tar per class, in no order, of images named after it."""
    classes = list(images)
    random.Random(0).shuffle(classes)
    return tar(
        [
            (f"{wnid}.tar", tar([(f"{wnid}_{n}.JPEG", content) for n, content in enumerate(images[wnid].values(), 7)]))
            for wnid in classes
        ],
        path,
    )


def val_tar(images: Images, path: Path) -> list[str]:
    """As ILSVRC2012_img_val.tar, flat; the class of each image in the order of their numbers."""
    flat = [(wnid, content) for wnid, of_class in images.items() for content in of_class.values()]
    random.Random(1).shuffle(flat)
    members = [(f"ILSVRC2012_val_{number:08}.JPEG", content) for number, (_, content) in enumerate(flat, 1)]
    random.Random(2).shuffle(members)
    tar(members, path)
    return [wnid for wnid, _ in flat]


def devkit(train: Images, truth: list[str], path: Path) -> None:
    """As ILSVRC2012_devkit_t12.tar.gz: identities of classes in another order than their names, and inner nodes."""
    savemat = pytest.importorskip("scipy.io", reason="SciPy reads and writes meta.mat").savemat
    fields = [("ILSVRC2012_ID", float), ("WNID", object), ("words", object), ("gloss", object)]
    fields += [("num_children", float), ("children", object), ("wordnet_height", float), ("num_train_images", float)]
    order = sorted(train)
    random.Random(3).shuffle(order)
    rows = [
        (i, wnid, WORDS.get(wnid, wnid), "a gloss", 0, np.zeros(0), 0, len(train[wnid]))
        for i, wnid in enumerate(order, 1)
    ]
    rows.append((len(order) + 1, "n00001740", "entity", "", 2, np.array([1.0, 2.0]), 5, 0))
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": np.array(rows, dtype=fields).reshape(-1, 1)})
    lines = "".join(f"{order.index(wnid) + 1}\n" for wnid in truth)
    base = "ILSVRC2012_devkit_t12"
    files = [
        (f"{base}/readme.txt", b"words"),
        (f"{base}/data/meta.mat", buffer.getvalue()),
        (f"{base}/data/ILSVRC2012_validation_ground_truth.txt", lines.encode()),
    ]
    tar(files, path, "w:gz")


def archives(folder: Path, train: Images, val: Images) -> list[str]:
    """The three archives, and the options that name them."""
    folder.mkdir(parents=True, exist_ok=True)
    train_tar(train, folder / "train.tar")
    truth = val_tar(val, folder / "val.tar")
    devkit(train, truth, folder / "devkit.tar.gz")
    named = {"train": "train.tar", "val": "val.tar", "devkit": "devkit.tar.gz"}
    return [word for option, name in named.items() for word in (f"--{option}", str(folder / name))]


def folders(folder: Path, parts: Mapping[str, Images]) -> list[str]:
    """Class folders, and the options that name them."""
    for part, images in parts.items():
        for wnid, of_class in images.items():
            (folder / part / wnid).mkdir(parents=True)
            for name, content in of_class.items():
                (folder / part / wnid / name).write_bytes(content)
    return [word for part in parts for word in (f"--{part}", str(folder / part))]
