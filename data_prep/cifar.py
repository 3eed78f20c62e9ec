#!/usr/bin/env python3
"""Turn the published CIFAR-10 or CIFAR-100 (python version) into the plain arrays that hpc_grawa trains on.

    python data_prep/cifar.py --archive cifar-10-python.tar.gz --out data/cifar10

--archive takes the .tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html as it comes, the same files packed again,
or the folder they were unpacked into. Every file is checked against its published MD5 before it is read. DIR then holds

    train_images.npy   uint8 [50000, 3, 32, 32]      train_labels.npy   uint8 [50000]
    test_images.npy    uint8 [10000, 3, 32, 32]      test_labels.npy    uint8 [10000]
    meta.json          name, counts, shape, classes, mean and std of the training pixels in [0, 1], SHA-256 per array

DIR appears complete or not at all, and is never overwritten. For CIFAR-10 you should see

    mean         0.4914 0.4822 0.4465
    std          0.2470 0.2435 0.2616
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import lzma
import math
import os
import pickle
import secrets
import shutil
import sys
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.uint8]

SOURCE = "https://www.cs.toronto.edu/~kriz/cifar.html"
LARGEST = 256 * 2**20  # bytes; the largest published file, CIFAR-100's train, has 148 MiB


@dataclass(frozen=True)
class Published:
    """A data set as its authors publish it.

    Attributes:
        name: of the data set.
        archive_md5: of the published .tar.gz.
        train: file name → MD5 of the pickles with the training images, in order.
        test: likewise for the test images.
        meta: likewise for the pickle with the class names.
        label_key: under which a pickle holds its labels.
        class_key: under which ``meta`` holds the class names.
    """

    name: str
    archive_md5: str
    train: Mapping[str, str]
    test: Mapping[str, str]
    meta: Mapping[str, str]
    label_key: bytes
    class_key: bytes

    @property
    def files(self) -> dict[str, str]:
        """File name → MD5 of everything that is read."""
        return {**self.train, **self.test, **self.meta}


PUBLISHED = (
    Published(
        name="CIFAR-10",
        archive_md5="c58f30108f718f92721af3b95e74349a",
        train={
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        },
        test={"test_batch": "40351d587109b95175f43aff81a1287e"},
        meta={"batches.meta": "5ff9c542aee3614f3951f8cda6e48888"},
        label_key=b"labels",
        class_key=b"label_names",
    ),
    Published(
        name="CIFAR-100",
        archive_md5="eb9058c3a382ffc7106e4002c42a8d85",
        train={"train": "16019d7e3df5f24257cddd939b257f8d"},
        test={"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
        meta={"meta": "7973b15100ade9c7d40fb424638fde48"},
        label_key=b"fine_labels",
        class_key=b"fine_label_names",
    ),
)


class Refused(Exception):
    """Input or output that cannot be right; one line that names file, value and fix."""


# What a pickle may name, and the inert stand-ins it gets: unpickling calls nothing but these.


class _DType:
    def __init__(self, *arguments: object) -> None:
        self.name = arguments[0] if arguments else None

    def __setstate__(self, state: object) -> None:
        """Byte order and alignment, which one byte does not have."""


class _Array:
    def __init__(self, *_: object) -> None:
        self.state: Any = None

    def __setstate__(self, state: object) -> None:
        self.state = state

    def images(self) -> Images:
        """The array ``[n, 3072]`` that was pickled; ValueError or TypeError for anything but plain bytes."""
        _, shape, dtype, fortran, raw = self.state
        if not isinstance(dtype, _DType) or dtype.name not in (b"u1", "u1") or fortran or not isinstance(raw, bytes):
            raise TypeError("the data are not a plain uint8 array")
        array: Images = np.frombuffer(raw, np.uint8).reshape(shape)
        if array.ndim != 2 or array.shape[1] != 3072:
            raise ValueError(f"the data have shape {array.shape}, an image has 3072 values")
        return array


_NAMED: dict[tuple[str, str], type] = {
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): _Array,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
}


class _Unpickler(pickle.Unpickler):
    """Builds numbers, strings, lists, dicts and byte arrays; the name of anything else is refused."""

    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in _NAMED:
            raise Refused(f"the pickle asks for {f'{module}.{name}'!r}, which no CIFAR file needs")
        return _NAMED[module, name]


def md5(content: bytes) -> str:
    """MD5 as published: it identifies, it does not secure."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def unpickle(content: bytes, where: str) -> dict[Any, Any]:
    """The dict that a CIFAR pickle holds, strings as bytes; Refused if it holds or names anything else."""
    try:
        found = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except Refused as refused:
        raise Refused(f"{where}: {refused}; do not use this file, get it from {SOURCE}") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise Refused(f"{where}: not a readable pickle ({_line(error)}); get it again from {SOURCE}") from None
    if not isinstance(found, dict):
        raise Refused(f"{where}: the pickle holds {type(found).__name__}, not a dict; get it again from {SOURCE}")
    return found


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _wanted() -> set[str]:
    return {name for published in PUBLISHED for name in published.files}


def _sized(size: int, where: str) -> None:
    if size > LARGEST:
        raise Refused(f"{where}: {size} bytes, no CIFAR file has more than {LARGEST}; get it again from {SOURCE}")


def read_tar(path: Path) -> dict[str, dict[str, bytes]]:
    """Folder → file name → content of the members that bear a CIFAR name; nothing is extracted, no path is followed."""
    folders: dict[str, dict[str, bytes]] = {}
    wanted = _wanted()
    again = f"is the download complete? Get it again from {SOURCE}"
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                if name.name not in wanted or not member.isreg():
                    continue
                _sized(member.size, f"{path}, {name.name}")
                folder = folders.setdefault(str(name.parent), {})
                if name.name in folder:
                    raise Refused(f"{path}: has {member.name!r} twice; get it again from {SOURCE}")
                handle = tar.extractfile(member)
                folder[name.name] = handle.read() if handle else b""
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError, ValueError) as error:
        if isinstance(error, tarfile.ReadError) and not folders:
            raise Refused(f"{path}: not a tar archive ({path.stat().st_size} bytes); {again}") from None
        raise Refused(f"{path}: truncated or damaged ({_line(error)}); {again}") from None
    return folders


def read_folder(path: Path) -> dict[str, dict[str, bytes]]:
    """Folder → file name → content of the CIFAR files in ``path`` and its subfolders."""
    folders: dict[str, dict[str, bytes]] = {}
    wanted = _wanted()
    for folder in (path, *sorted(p for p in path.iterdir() if p.is_dir())):
        for file in sorted(folder.iterdir()):
            if file.name in wanted and file.is_file():
                _sized(file.stat().st_size, str(file))
                folders.setdefault(str(folder), {})[file.name] = file.read_bytes()
    return folders


def recognise(folders: Mapping[str, Mapping[str, bytes]], path: Path) -> tuple[Published, Mapping[str, bytes]]:
    """The one data set that ``folders`` hold, its files whole and as published; else Refused."""
    candidates = [
        (len(published.files.keys() & files.keys()) / len(published.files), published, files)
        for files in folders.values()
        for published in PUBLISHED
    ]
    share, published, files = max(candidates, key=lambda c: c[0], default=(0.0, PUBLISHED[0], {}))
    names = sorted(p.name for s, p, _ in candidates if s == 1)
    if share == 0:
        raise Refused(f"{path}: holds no CIFAR files (data_batch_1, ... or train, test, meta); get them from {SOURCE}")
    if missing := [name for name in published.files if name not in files]:
        raise Refused(f"{path}: {published.name} without {', '.join(missing)}; get the whole set from {SOURCE}")
    if len(names) > 1:
        raise Refused(f"{path}: holds {' and '.join(names)}; name the folder or archive of one of them")
    for name, expected in published.files.items():
        if (found := md5(files[name])) != expected:
            raise Refused(f"{path}, {name}: MD5 is {found}, published is {expected}; get it again from {SOURCE}")
    return published, files


def _split(published: Published, files: Mapping[str, bytes], names: Mapping[str, str], classes: int) -> list[Images]:
    images, labels = [], []
    for name in names:
        batch = unpickle(files[name], name)
        try:
            images.append(batch[b"data"].images())
            labels.append(np.array(batch[published.label_key], np.uint8))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise Refused(f"{name}: not a {published.name} batch ({_line(error)}); get it from {SOURCE}") from None
        if labels[-1].shape != images[-1].shape[:1] or labels[-1].max(initial=0) >= classes:
            raise Refused(f"{name}: its labels fit neither its images nor {classes} classes; get it from {SOURCE}")
    return [np.concatenate(images).reshape(-1, 3, 32, 32), np.concatenate(labels)]


def _moments(images: Images) -> Iterator[tuple[float, float]]:
    """Mean and standard deviation of each channel in [0, 1], from whole numbers: the same on every machine."""
    for channel in images.transpose(1, 0, 2, 3):
        values = sum(np.bincount(part.ravel(), minlength=256) for part in np.array_split(channel, 64))
        counts = [int(n) for n in np.asarray(values)]
        n = sum(counts)
        first = sum(v * count for v, count in enumerate(counts))
        second = sum(v * v * count for v, count in enumerate(counts))
        yield first / (255 * n), math.sqrt(n * second - first * first) / (255 * n)


def convert(published: Published, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """File name → content of the folder to be written."""
    (meta,) = published.meta
    try:
        classes = [name.decode("ascii") for name in unpickle(files[meta], meta)[published.class_key]]
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise Refused(f"{meta}: no class names ({_line(error)}); get it from {SOURCE}") from None
    train_images, train_labels = _split(published, files, published.train, len(classes))
    test_images, test_labels = _split(published, files, published.test, len(classes))
    arrays = {
        "train_images.npy": train_images,
        "train_labels.npy": train_labels,
        "test_images.npy": test_images,
        "test_labels.npy": test_labels,
    }
    written: dict[str, bytes] = {}
    for name, array in arrays.items():
        buffer = io.BytesIO()
        np.save(buffer, array)
        written[name] = buffer.getvalue()
    mean, std = zip(*_moments(train_images), strict=True)
    facts = {
        "name": published.name,
        "counts": {"train": len(train_labels), "test": len(test_labels)},
        "shape": list(train_images.shape[1:]),
        "classes": classes,
        "mean": mean,
        "std": std,
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in written.items()},
    }
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in facts.items())
    written["meta.json"] = f"{{\n{lines}\n}}\n".encode()
    return written


def publish(written: Mapping[str, bytes], out: Path) -> bool:
    """Make ``out`` hold exactly ``written``, whole or not at all; False if it did so before. Never overwrites."""
    if out.is_dir() and any(out.iterdir()):
        there = {path.name: path for path in out.iterdir()}
        if there.keys() == written.keys() and all(there[n].read_bytes() == content for n, content in written.items()):
            return False
        raise Refused(f"{out}: is not empty and holds something else; name another folder with --out, or remove it")
    if out.exists() and not out.is_dir():
        raise Refused(f"{out}: is a file; name a folder with --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    hidden = out.parent / f".{out.name}.{secrets.token_hex(4)}"
    hidden.mkdir()
    try:
        for name, content in written.items():
            (hidden / name).write_bytes(content)
        os.rename(hidden, out)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    return True


def prepare(archive: Path, out: Path) -> None:
    """Read ``archive``, check it, write ``out`` and say what was done."""
    if archive.is_dir():
        print(f"reading      {archive}", flush=True)
        folders = read_folder(archive)
    elif archive.is_file():
        print(f"reading      {archive}", flush=True)
        folders = read_tar(archive)
    else:
        raise Refused(f"{archive}: no such file or folder; get cifar-10-python.tar.gz from {SOURCE}")
    published, files = recognise(folders, archive)
    if archive.is_file():
        found = md5(archive.read_bytes())
        known = "as published" if found == published.archive_md5 else "not the published archive; its files decide"
        print(f"archive      MD5 {found}, {known}")
    print(f"files        {len(published.files)} of {published.name}, every MD5 as published")
    written = convert(published, files)
    facts = json.loads(written["meta.json"])
    size = "x".join(map(str, facts["shape"]))
    print(f"train        {facts['counts']['train']:,} images {size} uint8, {len(facts['classes'])} classes")
    print(f"test         {facts['counts']['test']:,} images")
    print("mean         " + " ".join(f"{value:.4f}" for value in facts["mean"]))
    print("std          " + " ".join(f"{value:.4f}" for value in facts["std"]))
    if publish(written, out):
        print(f"wrote        {out} ({sum(map(len, written.values())) / 1e6:.0f} MB)")
    else:
        print(f"unchanged    {out} already holds exactly this")
    print(f"use it with  --data CIFAR --data.path {out}")


def main(arguments: list[str] | None = None) -> int:
    """Entry point; exit status 0, or 2 after one line on stderr."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a screen may not know the letters of a folder's name
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archive", type=Path, required=True, metavar="PATH", help="archive, or unpacked folder")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to be made")
    options = parser.parse_args(arguments)
    try:
        prepare(options.archive, options.out.resolve())
    except Refused as refused:
        reason = _line(refused)
    except OSError as error:
        where = error.filename2 or error.filename or options.out
        reason = f"{where}: {error.strerror or _line(error)}; check the path, its permissions and the free space"
    else:
        return 0
    print(f"cifar.py: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
