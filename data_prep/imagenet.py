#!/usr/bin/env python3
"""Turn ImageNet (ILSVRC 2012), or any folders of images by class, into the few large files that hpc_grawa trains on.

    python data_prep/imagenet.py --train ILSVRC2012_img_train.tar --val ILSVRC2012_img_val.tar \
        --devkit ILSVRC2012_devkit_t12.tar.gz --out data/imagenet
    python data_prep/imagenet.py --train TRAIN --val VAL --out data/imagenet      (one folder per class in each)

The three archives are those of https://image-net.org, as they come: nothing is extracted, images are read where they
lie. Each image is decoded in full, made RGB, brought to a shorter side of --resize pixels if it is larger, and encoded
once as JPEG. The folder of --out then holds

    train-00000.tar ...   plain tar files (USTAR) of about 0.5 GB with CLASS/NAME.jpg     val-00000.tar ...
    train.npy, val.npy    where each image lies: (shard, offset, length, label, crc32), in the order of the archives
    meta.json             counts, classes, settings, size and SHA-256 of each file, images that were left out

meta.json comes last, after all has been read again and checked: without it the folder is not complete. Started again
after an interruption, even a kill, the same command goes on after the last complete file and ends with the same bytes.
Images of more than 67 million pixels count as corrupt. Needs Pillow, and for --devkit SciPy.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import io
import json
import os
import re
import secrets
import sys
import tarfile
import threading
import time
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
from verify import MOST_PIXELS, ROW, Refused, line_of, padded, problems_of

SOURCE = "https://image-net.org/download-images"
FORMATS = ("JPEG", "PNG")  # one image of ILSVRC 2012 is a PNG, whatever its name says
ENDINGS = (".jpeg", ".jpg", ".png")
MEGABYTE = 10**6
LARGEST = 64 * 2**20  # bytes of one image
MANY_PIXELS = 2**24  # of images with more, one at a time is in memory
_WNID = re.compile(r"n[0-9]{8}")
_CLASS_TAR = re.compile(r"(n\d{8})\.tar")
_TRAIN_IMAGE = re.compile(r"(n\d{8})_\d+\.JPEG")
_VAL_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")


@dataclass
class Origin:
    """Images of one class that lie in one file, or in one folder.

    Attributes:
        label: of the class.
        folder: the name of the class in the output.
        path: a tar archive, or a folder.
        images: name, offset and length in the archive; in a folder the offset is -1 and the length that of the file.
    """

    label: int
    folder: str
    path: Path
    images: list[tuple[str, int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class Devkit:
    """What the development kit says.

    Attributes:
        wnids: of the classes, sorted: a class's label is its place.
        words: what the classes are called.
        train_counts: training images of each class.
        truth: label of each validation image.
    """

    wnids: tuple[str, ...]
    words: tuple[str, ...]
    train_counts: tuple[int, ...]
    truth: tuple[int, ...]


class _Window(io.RawIOBase):
    """A part of a file as if it were a file; every read is one pread."""

    def __init__(self, descriptor: int, start: int, length: int) -> None:
        self._descriptor, self._start, self._length, self._at = descriptor, start, length, 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._length)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._at)
        content = os.pread(self._descriptor, left if size < 0 else min(size, left), self._start + self._at)
        self._at += len(content)
        return content


def members(path: Path, start: int = 0, length: int | None = None, what: str = "") -> Iterator[tuple[str, int, int]]:
    """Name, offset and length of the files of a tar archive, which may lie in another one; nothing is extracted.

    Raises:
        Refused: it is truncated, damaged or compressed, or holds anything but plain files of plain names.
    """
    where = f"{path}, {what}" if what else str(path)
    again = f"is the download complete? Get it again from {SOURCE}"
    descriptor = os.open(path, os.O_RDONLY)
    try:
        length = os.fstat(descriptor).st_size if length is None else length
        window = _Window(descriptor, start, length)
        seen: set[str] = set()
        try:
            with tarfile.open(fileobj=window, mode="r:") as tar:  # type: ignore[call-overload]  # it reads and seeks
                for member in tar:
                    tar.members = []  # else it keeps all of them
                    name = member.name
                    if member.isdir():
                        continue
                    if "/" in name and not name.startswith("/") and ".." not in name.split("/"):
                        raise Refused(
                            f"{where}: has folders inside ({name!r}), so it is not as image-net.org gives it: unpack "
                            f"it and give the folder of its class folders"
                        )
                    if "/" in name or name in ("..", ".", "") or "\0" in name:
                        raise Refused(f"{where}: has a member {name!r}, a path; do not use it, {again}")
                    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                        raise Refused(f"{where}: its member {name!r} is a link or the like; do not use it, {again}")
                    if name in seen:
                        raise Refused(f"{where}: has {name!r} twice; {again}")
                    if member.offset_data + padded(member.size) > length:
                        raise Refused(f"{where}: truncated within {name!r} ({length:,} bytes); {again}")
                    seen.add(name)
                    yield name, start + member.offset_data, member.size
                end = tar.offset  # type: ignore[attr-defined]
        except tarfile.TarError as error:
            kind = "truncated or damaged" if seen else f"not a plain tar archive ({length:,} bytes)"
            raise Refused(f"{where}: {kind} ({line_of(error)}); {again}") from None
        if os.pread(descriptor, 512, start + end) != bytes(512) or end + 512 > length:
            raise Refused(f"{where}: truncated after {len(seen):,} files, its end is missing; {again}")
    finally:
        os.close(descriptor)


def read_devkit(path: Path) -> Devkit:
    """Classes, counts and validation labels from ``ILSVRC2012_devkit_t12.tar.gz``, or the folder it was unpacked to."""
    wanted = {"meta.mat": b"", "ILSVRC2012_validation_ground_truth.txt": b""}
    get = f"get ILSVRC2012_devkit_t12.tar.gz from {SOURCE}"
    try:
        if path.is_dir():
            for file in path.rglob("*"):
                if file.name in wanted and file.is_file():
                    wanted[file.name] = file.read_bytes()
        else:
            with tarfile.open(path) as tar:
                for member in tar:
                    name = member.name.rpartition("/")[2]
                    if name in wanted and member.isreg() and member.size < LARGEST:
                        handle = tar.extractfile(member)
                        wanted[name] = handle.read() if handle else b""
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise Refused(f"{path}: cannot be read as the development kit ({line_of(error)}); {get}") from None
    if missing := [name for name, content in wanted.items() if not content]:
        raise Refused(f"{path}: is not the development kit, it has no {' and no '.join(missing)}; {get}")
    try:
        from scipy.io import loadmat
    except ImportError:
        raise Refused("SciPy is missing, and the development kit's meta.mat needs it: pip install scipy") from None
    try:
        table = loadmat(io.BytesIO(wanted["meta.mat"]), squeeze_me=True)["synsets"]
        leaves = [row for row in table if int(row["num_children"]) == 0]
        known = {int(r["ILSVRC2012_ID"]): (str(r["WNID"]), str(r["words"]), int(r["num_train_images"])) for r in leaves}
        ids = [int(line) for line in wanted["ILSVRC2012_validation_ground_truth.txt"].split()]
        order = sorted(known.values())
        labels = {identity: order.index(entry) for identity, entry in known.items()}
        truth = tuple(labels[identity] for identity in ids)
    except Exception as error:  # a damaged file can raise anything
        raise Refused(f"{path}: its meta.mat or ground truth is damaged ({line_of(error)}); {get}") from None
    wnids, words, counts = zip(*order, strict=True)
    if foreign := [wnid for wnid in wnids if _WNID.fullmatch(wnid) is None]:  # each names a folder
        raise Refused(f"{path}: its meta.mat has a class {foreign[0]!r}, must be n01440764 or the like; {get}")
    return Devkit(wnids, words, counts, truth)


def read_train_tar(path: Path, kit: Devkit) -> Iterator[Origin]:
    """The images of ``ILSVRC2012_img_train.tar``, a tar of one tar per class."""
    labels = {wnid: label for label, wnid in enumerate(kit.wnids)}
    found: dict[str, Origin] = {}
    for name, start, length in members(path):
        match = _CLASS_TAR.fullmatch(name)
        if match is None:
            mixed = (
                "; it is the validation archive: was --train meant to be --val?" if _VAL_IMAGE.fullmatch(name) else ""
            )
            raise Refused(f"{path}: holds {name!r}, the training archive holds n01440764.tar and the like{mixed}")
        if match[1] not in labels:
            raise Refused(f"{path}: holds {name!r}, a class that the development kit does not know; are both of 2012?")
        origin = Origin(labels[match[1]], match[1], path)
        for image, offset, size in members(path, start, length, name):
            if (inner := _TRAIN_IMAGE.fullmatch(image)) is None or inner[1] != match[1]:
                raise Refused(f"{path}, {name}: holds {image!r}, not an image of its class; get it again from {SOURCE}")
            origin.images.append((image, offset, size))
        found[match[1]] = origin
    if missing := [wnid for wnid in kit.wnids if wnid not in found]:
        raise Refused(f"{path}: has no {missing[0]}.tar ({len(missing)} classes missing); get it again from {SOURCE}")
    for wnid in kit.wnids:
        origin, expected = found[wnid], kit.train_counts[labels[wnid]]
        if len(origin.images) != expected:
            raise Refused(
                f"{path}, {wnid}.tar: holds {len(origin.images)} images, the development kit says {expected}; "
                f"get it again from {SOURCE}"
            )
        origin.images.sort()
        yield origin


def read_val_tar(path: Path, kit: Devkit) -> Iterator[Origin]:
    """The images of ``ILSVRC2012_img_val.tar``, flat; the development kit has their labels."""
    found: dict[int, tuple[str, int, int]] = {}
    for name, offset, size in members(path):
        match = _VAL_IMAGE.fullmatch(name)
        if match is None:
            mixed = "; it is the training archive: was --val meant to be --train?" if _CLASS_TAR.fullmatch(name) else ""
            raise Refused(f"{path}: holds {name!r}, the validation archive holds ILSVRC2012_val_00000001.JPEG{mixed}")
        found[int(match[1])] = (name, offset, size)
    if sorted(found) != list(range(1, len(kit.truth) + 1)):
        raise Refused(
            f"{path}: holds {len(found):,} images, the development kit has labels of {len(kit.truth):,}; "
            f"get it again from {SOURCE}"
        )
    for number, label in enumerate(kit.truth, 1):
        yield Origin(label, kit.wnids[label], path, [found[number]])


def read_folders(path: Path, classes: Sequence[str], counts: Sequence[int] | None) -> Iterator[Origin]:
    """The images of a folder with one folder per class; links are followed, as nothing is written there."""
    for label, name in enumerate(classes):
        origin = Origin(label, name, path / name)
        if not origin.path.is_dir():
            raise Refused(f"{path}: has no folder {name!r}; training and validation images must have the same classes")
        for entry in sorted(os.scandir(origin.path), key=lambda e: e.name):
            if not entry.is_file() or not entry.name.lower().endswith(ENDINGS):
                raise Refused(f"{entry.path}: is no image; a class's folder must hold {', '.join(ENDINGS)} files alone")
            origin.images.append((entry.name, -1, entry.stat().st_size))
        if not origin.images:
            raise Refused(f"{origin.path}: holds no images; remove the folder, or fill it")
        if counts is not None and len(origin.images) != counts[label]:
            raise Refused(f"{origin.path}: holds {len(origin.images)} images, the development kit says {counts[label]}")
        yield origin


def class_folders(path: Path) -> tuple[str, ...]:
    """The names of the folders in ``path``, sorted."""
    names = tuple(sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and entry.name[0] != "."))
    if not names:
        raise Refused(f"{path}: holds no folders, there must be one per class")
    return names


def read_sources(train: Path, val: Path, devkit: Path | None) -> tuple[Devkit, dict[str, list[Origin]]]:
    """All images of both parts, in the order in which they are packed, once their counts are seen to be right."""
    for path in filter(None, (train, val, devkit)):
        if not path.exists():
            raise Refused(f"{path}: no such file or folder; the archives are at {SOURCE}")
    if train.is_dir() and train.samefile(val):
        raise Refused(f"{val}: is --train and --val, so that a test would be on the training images")
    kit = None if devkit is None else read_devkit(devkit)
    if kit is None:
        if not (train.is_dir() and val.is_dir()):
            raise Refused("devkit is missing: with archives, --devkit ILSVRC2012_devkit_t12.tar.gz says the labels")
        names = class_folders(train)
        kit = Devkit(names, names, (), ())
    parts: dict[str, list[Origin]] = {}
    for part, path, read in (("train", train, read_train_tar), ("val", val, read_val_tar)):
        if path.is_dir():
            if more := set(class_folders(path)) - set(kit.wnids):
                raise Refused(f"{path}: has a folder {min(more)!r}, which is no class of the training images")
            counts: Sequence[int] | None = (
                kit.train_counts
                if part == "train"
                else np.bincount(kit.truth or [0], minlength=len(kit.wnids)).tolist()
            )
            parts[part] = list(read_folders(path, kit.wnids, counts if devkit else None))
        else:
            parts[part] = list(read(path, kit))
        stems: set[str] = set()
        for origin in parts[part]:
            for name, _, size in origin.images:
                member = member_name(origin.folder, name)
                if member in stems:
                    raise Refused(f"{origin.path}: has two images that would be {member}; rename one")
                if size > LARGEST:
                    raise Refused(f"{origin.path}, {name}: {size:,} bytes, an image has at most {LARGEST:,}")
                if len(os.fsencode(member)) > 100:  # else it fits whatever it is
                    try:
                        tarfile.TarInfo(member).tobuf(tarfile.USTAR_FORMAT)
                    except ValueError:
                        raise Refused(f"{origin.path}, {name}: too long a name for a tar file; rename it") from None
                stems.add(member)
    return kit, parts


def member_name(folder: str, name: str) -> str:
    """What an image is called in the output: ``CLASS/NAME.jpg``."""
    return f"{folder}/{name.rpartition('.')[0]}.jpg"


def fingerprint(parts: dict[str, list[Origin]], settings: dict[str, Any]) -> str:
    """The same for the same images, settings and encoder, so that a conversion is not continued by another."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for part, origins in parts.items():
        for origin in origins:
            digest.update(f"\n{part} {origin.label} {origin.folder}\n".encode(errors="surrogateescape"))
            digest.update("\n".join(f"{n} {size}" for n, _, size in origin.images).encode(errors="surrogateescape"))
    return digest.hexdigest()


class Corrupt(Exception):
    """An image that cannot be decoded."""


def rgb(opened: Any) -> Any:
    """The image in RGB of 8 bits: of grey of 16 bits the upper 8, where Pillow would make white of all above 255."""
    if opened.mode.startswith("I"):  # PNGs of 16 bits, by older Pillows as if they had 32
        from PIL import Image

        opened = Image.fromarray((np.asarray(opened) >> 8).astype(np.uint8))
    return opened.convert("RGB")


class Encoder:
    """Reads images and encodes them; called from several threads at once.

    Args:
        resize: shorter side in pixels, of images that are larger; 0 leaves sizes alone.
        quality: of the JPEG.
    """

    def __init__(self, resize: int, quality: int) -> None:
        self._resize, self._quality = resize, quality
        self._open: dict[Path, int] = {}
        self._lock, self._turn = threading.Lock(), threading.Lock()

    def _content(self, path: Path, name: str, offset: int, size: int) -> bytes:
        if offset < 0:
            return (path / name).read_bytes()
        with self._lock:
            if path not in self._open:
                self._open[path] = os.open(path, os.O_RDONLY)
        return os.pread(self._open[path], size, offset)

    def __call__(self, path: Path, name: str, offset: int, size: int) -> bytes | Corrupt:
        from PIL import Image

        content = self._content(path, name, offset, size)
        if len(content) != size:
            raise Refused(f"{path}, {name}: has changed while it was read; start again")
        try:
            with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
                width, height = opened.size
                if width * height > MOST_PIXELS:
                    return Corrupt(f"{width} x {height} pixels are more than {MOST_PIXELS:,}")
                with self._turn if width * height > MANY_PIXELS else nullcontext():
                    return self._encoded(opened)
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
            return Corrupt(line_of(error))

    def _encoded(self, opened: Any) -> bytes:
        from PIL import Image

        image = rgb(opened)
        shorter = min(image.size)
        if self._resize and shorter > self._resize:
            to = [max(self._resize, round(side * self._resize / shorter)) for side in image.size]
            image = image.resize((to[0], to[1]), Image.Resampling.BICUBIC, reducing_gap=None)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=self._quality)
        return buffer.getvalue()

    def close(self) -> None:
        """Close the archives."""
        for descriptor in self._open.values():
            os.close(descriptor)


class Progress:
    """One line every few seconds, in place on a terminal."""

    def __init__(self, part: str, total: int, done: int) -> None:
        self._part, self._total, self._first = part, total, done
        self._start = self._shown = time.monotonic()
        self._live = sys.stdout.isatty()

    def __call__(self, done: int, size: int) -> None:
        now = time.monotonic()
        if now - self._shown < (0.5 if self._live else 5):
            return
        self._shown = now
        rate = (done - self._first) / (now - self._start)
        left = int((self._total - done) / rate) if rate else 0
        clock = f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
        text = f"{self._part:<12} {done:,} of {self._total:,} images, {size / 1e9:.2f} GB, {rate:,.0f}/s, ETA {clock}"
        print(f"\r{text}   " if self._live else text, end="" if self._live else "\n", flush=True)

    def end(self) -> None:
        """Leave the line."""
        if self._live:
            print("\r" + " " * 100 + "\r", end="", flush=True)


def in_order(tasks: Iterable[Callable[[], Any]], workers: int) -> Iterator[Any]:
    """The results of ``tasks`` in their order, from so many threads; few are held at a time."""
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[Future[Any]] = deque()
        tasks = iter(tasks)
        try:
            for task in islice(tasks, 4 * workers):
                pending.append(pool.submit(task))
            while pending:
                result = pending.popleft().result()
                for task in islice(tasks, 1):
                    pending.append(pool.submit(task))
                yield result
        finally:
            for future in pending:
                future.cancel()


def write_whole(path: Path, content: bytes) -> None:
    """Write under another name, to the disk, and rename: the file is there whole or not at all."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Bring renames to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system that cannot do this
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def record_path(out: Path, part: str, shard: int) -> Path:
    """Where the facts of a complete shard are kept until the end: it is complete once this file is there."""
    return out / f".{part}-{shard:05}.json"


def shard_path(out: Path, part: str, shard: int) -> Path:
    """The file of a shard."""
    return out / f"{part}-{shard:05}.tar"


def read_object(path: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing if it is damaged."""
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def completed(out: Path, part: str, skip_corrupt: bool) -> list[dict[str, Any]]:
    """The records of the shards that are complete, without gaps."""
    records: list[dict[str, Any]] = []
    while (path := record_path(out, part, len(records))).exists():
        record, shard = read_object(path), shard_path(out, part, len(records))
        if not {"next", "bytes", "sha256", "corrupt", "rows"} <= record.keys() or not shard.exists():
            break
        if shard.stat().st_size != record["bytes"] or (record["corrupt"] and not skip_corrupt):
            break
        record["rows"] = compact(record["rows"])
        records.append(record)
    for later in (*out.glob(f".{part}-*.json"), *out.glob(f"{part}-*.tar")):
        if int(later.stem.rpartition("-")[2]) >= len(records):
            later.unlink()
    return records


class _Shard:
    """A tar file that is being written.

    Attributes:
        size: bytes so far.
        digest: SHA-256 of them.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.size, self.digest = file, 0, hashlib.sha256()

    def _put(self, content: bytes) -> None:
        self._file.write(content)
        self.digest.update(content)
        self.size += len(content)

    def add(self, name: str, content: bytes) -> int:
        """Add a member; the offset of its content."""
        info = tarfile.TarInfo(name)
        info.size = len(content)
        self._put(info.tobuf(tarfile.USTAR_FORMAT))
        at = self.size
        self._put(content + bytes(padded(len(content)) - len(content)))
        return at

    def end(self) -> None:
        """Write the end of the archive, and everything to the disk."""
        self._put(bytes(1024))
        self._file.flush()
        os.fsync(self._file.fileno())


def pack(
    part: str,
    origins: Sequence[Origin],
    out: Path,
    encoder: Encoder,
    workers: int,
    shard_bytes: int,
    skip_corrupt: bool,
) -> list[dict[str, Any]]:
    """Write the shards of one part that are not complete yet; the records of all."""
    records = completed(out, part, skip_corrupt)
    total = sum(len(origin.images) for origin in origins)
    done = records[-1]["next"] if records else 0
    if records:
        print(f"{part:<12} goes on after {done:,} of {total:,} images in {len(records)} complete files", flush=True)
    images = ((origin, *image) for origin in origins for image in origin.images)
    waiting, behind = islice(images, done, None), deque[tuple[Origin, str]]()

    def tasks() -> Iterator[Callable[[], bytes | Corrupt]]:
        for origin, name, offset, size in waiting:
            behind.append((origin, name))
            yield lambda p=origin.path, n=name, o=offset, s=size: encoder(p, n, o, s)  # type: ignore[misc]

    progress = Progress(part, total, done)
    written = sum(record["bytes"] for record in records)
    results = in_order(tasks(), workers)
    while done < total:
        final = shard_path(out, part, len(records))
        temporary = final.with_name(f".{final.name}.part")
        rows: list[tuple[int, int, int, int]] = []
        corrupt: list[str] = []
        with temporary.open("wb") as file:
            shard = _Shard(file)
            while done < total and shard.size < shard_bytes:
                result = next(results)
                origin, name = behind.popleft()
                done += 1
                member = member_name(origin.folder, name)
                if isinstance(result, Corrupt):
                    progress.end()
                    print(f"corrupt      {origin.path}, {name}: {result}", flush=True)
                    corrupt.append(f"{part}/{member}")
                    continue
                rows.append((shard.add(member, result), len(result), origin.label, zlib.crc32(result)))
                progress(done, written + shard.size)
            shard.end()
        temporary.rename(final)
        sync_folder(out)
        record = {
            "next": done,
            "bytes": shard.size,
            "sha256": shard.digest.hexdigest(),
            "corrupt": corrupt,
            "rows": rows,
        }
        write_whole(record_path(out, part, len(records)), json.dumps(record).encode())
        records.append({**record, "rows": compact(rows)})
        written += shard.size
    progress.end()
    return records


def compact(rows: Sequence[Sequence[int]]) -> Any:
    """Offset, length, label and checksum of images as they stand in the index, their file still 0."""
    return np.array([(0, *row) for row in rows], ROW)


def index(records: Sequence[dict[str, Any]]) -> bytes:
    """``train.npy`` or ``val.npy``."""
    rows = np.concatenate([record["rows"] for record in records])
    rows["shard"] = np.repeat(np.arange(len(records)), [len(record["rows"]) for record in records])
    buffer = io.BytesIO()
    np.save(buffer, rows)
    return buffer.getvalue()


def begin(out: Path, plan: str) -> None:
    """Mark ``out`` as the beginning of this conversion, or see that it is; remove what was left half-written."""
    marker = out / ".plan"
    if marker.exists():
        if marker.read_bytes() != plan.encode():
            raise Refused(
                f"{out}: holds the beginning of a conversion of other images or with other settings; "
                "name another folder with --out, or remove it"
            )
    else:
        write_whole(marker, plan.encode())
    for half in out.glob("*.part"):  # names that begin with a point are among them
        half.unlink()


def prepare(options: argparse.Namespace) -> None:
    """Read the sources, pack them into ``options.out``, check the result and say what was done."""
    try:
        import PIL
        import PIL.Image
        from PIL import features
    except ImportError:
        raise Refused("Pillow is missing, which decodes the images: pip install pillow") from None
    out: Path = options.out
    for name, least, most in (("resize", 0, 4096), ("quality", 1, 100), ("workers", 1, 1024), ("shard_mb", 1, 10**6)):
        if not least <= getattr(options, name) <= most:
            raise Refused(f"{name} is {getattr(options, name)}: must be {least} to {most}")
    print(f"reading      {options.train} and {options.val}: what they hold, and whether it is complete", flush=True)
    kit, parts = read_sources(options.train, options.val, options.devkit)
    counts = {part: sum(len(origin.images) for origin in origins) for part, origins in parts.items()}
    checked = "as the development kit says" if options.devkit else "without a development kit to count by"
    print(f"found        {counts['train']:,} + {counts['val']:,} images of {len(kit.wnids)} classes, {checked}")
    settings = {
        "resize": options.resize,
        "quality": options.quality,
        "shard_mb": options.shard_mb,
        # Another release may encode other bytes: one folder comes from one encoder.
        "encoder": f"Pillow {PIL.__version__}, libjpeg {features.version('libjpeg_turbo') or features.version('jpg')}",
    }
    plan = fingerprint(parts, settings)
    warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)  # they are refused in one line
    if (out / "meta.json").exists():
        if read_object(out / "meta.json").get("plan") != plan:
            raise Refused(f"{out}: holds other data; name another folder with --out, or remove it")
        tidy(out)
        print(f"unchanged    {out} already holds exactly this; check it with data_prep/verify.py {out}")
        return
    if out.exists() and not out.is_dir():
        raise Refused(f"{out}: is a file; name a folder with --out")
    foreign = [path for path in out.iterdir() if not path.name.startswith((".lock", ".plan"))] if out.exists() else []
    if foreign and not (out / ".plan").exists():
        raise Refused(f"{out}: is not empty and holds something else; name another folder with --out, or remove it")
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        begin(out, plan)
        encoder = Encoder(options.resize, options.quality)
        records: dict[str, list[dict[str, Any]]] = {}
        try:
            for part, origins in parts.items():
                records[part] = pack(
                    part, origins, out, encoder, options.workers, options.shard_mb * MEGABYTE, options.skip_corrupt
                )
        finally:
            encoder.close()
        left_out = [name for of_part in records.values() for record in of_part for name in record["corrupt"]]
        if left_out and not options.skip_corrupt:
            shown = ", ".join(left_out[:10]) + (", ..." if len(left_out) > 10 else "")
            raise Refused(
                f"{len(left_out)} corrupt image{'s' * (len(left_out) > 1)} ({shown}): get the archive again, or leave "
                "them out with --skip_corrupt; the same command goes on from here"
            )
        files: dict[str, tuple[int, str]] = {}
        for part, of_part in records.items():
            for shard, record in enumerate(of_part):
                files[shard_path(out, part, shard).name] = record["bytes"], record["sha256"]
            content = index(of_part)
            write_whole(out / f"{part}.npy", content)
            files[f"{part}.npy"] = len(content), hashlib.sha256(content).hexdigest()
        facts = {
            "name": "ImageNet" if options.devkit else "class folders",
            "counts": {part: sum(len(record["rows"]) for record in of_part) for part, of_part in records.items()},
            "shards": {part: len(of_part) for part, of_part in records.items()},
            **settings,
            "left_out": left_out,
            "plan": plan,
            "wnids": kit.wnids,
            "classes": kit.words,
            "bytes": {name: size for name, (size, _) in files.items()},
            "sha256": {name: digest for name, (_, digest) in files.items()},
        }
        print(f"checking     {len(files)} files: sums, index, and every image decoded", flush=True)
        if found := problems_of(out, facts, options.workers):
            raise Refused(f"{out}: {found[0]} ({len(found)} in all); is the disk sound? Remove the folder, start again")
        lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in facts.items())
        write_whole(out / "meta.json", f"{{\n{lines}\n}}\n".encode())
        tidy(out)
    for part, count in facts["counts"].items():
        size = sum(record["bytes"] for record in records[part])
        print(f"{part:<12} {count:,} images in {len(records[part])} files, {size / 1e9:.2f} GB")
    if left_out:
        print(f"left out     {len(left_out)} corrupt images, which meta.json names")
    print(f"use it with  --data ImageNet --data.path {out}")


class locked:
    """Within the block no other process converts into this folder."""

    def __init__(self, out: Path) -> None:
        self._out = out

    def __enter__(self) -> None:
        self._file = (self._out / ".lock").open("w", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise Refused(f"{self._out}: another process is writing it; wait for it, or end it") from None
        except OSError:  # a file system without locks
            pass

    def __exit__(self, *_: object) -> None:
        self._file.close()


def tidy(out: Path) -> None:
    """Remove what only an unfinished conversion needs; the marker last."""
    for path in (*out.glob(".train-*.json"), *out.glob(".val-*.json"), out / ".lock", out / ".plan"):
        path.unlink(missing_ok=True)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; exit status 0, or 2 after one line on stderr."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a screen may not know the letters of a folder's name
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, metavar="PATH", help="archive, or folder of class folders")
    parser.add_argument("--val", type=Path, required=True, metavar="PATH", help="archive, or folder of class folders")
    parser.add_argument("--devkit", type=Path, metavar="PATH", help="the development kit; needed with archives")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to be made")
    parser.add_argument("--resize", type=int, default=256, help="shorter side of larger images; 0: leave sizes (256)")
    parser.add_argument("--quality", type=int, default=90, help="of the JPEGs (90)")
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="threads (one per processor it may run on)"
    )
    parser.add_argument("--shard_mb", type=int, default=500, help="size of an output file in megabytes (500)")
    parser.add_argument("--skip_corrupt", action="store_true", help="leave out images that cannot be decoded")
    options = parser.parse_args(arguments)
    options.out = options.out.resolve()
    try:
        prepare(options)
    except Refused as refused:
        reason = line_of(refused)
    except OSError as error:
        where = error.filename2 or error.filename or options.out
        reason = f"{where}: {error.strerror or line_of(error)}; check the path, its permissions and the free space"
    except KeyboardInterrupt:
        print("\nimagenet.py: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    else:
        return 0
    print(f"imagenet.py: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
