#!/usr/bin/env python3
"""Check a folder that a script beside this one made: nothing missing, nothing changed, every image readable.

    python data_prep/verify.py data/imagenet

Every file must have the SHA-256 that meta.json states. Where images are packed (ImageNet), every entry of the index
must also name a member of its tar file, carry its checksum and decode to an RGB image. Exit status 0, or 2 with one
line.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import sys
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

#: One row of ``train.npy`` and ``val.npy``: the image's bytes are ``length`` bytes of tar file ``shard`` at ``offset``.
ROW = np.dtype([("shard", "<u4"), ("offset", "<u8"), ("length", "<u4"), ("label", "<u4"), ("crc32", "<u4")])
#: An image may have so many pixels.
MOST_PIXELS = 2**26
_CHUNK = 2**22


class Refused(Exception):
    """Input or output that cannot be right; one line that names file, value and fix."""


def line_of(error: BaseException) -> str:
    """An error's message in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def padded(size: int) -> int:
    """What a member of so many bytes takes in a tar file, which knows only blocks of 512."""
    return -(-size // 512) * 512


def problems_of(folder: Path, facts: Mapping[str, Any], workers: int) -> list[str]:
    """What is wrong with the files of ``folder``, of which ``facts`` is what meta.json says or will say."""
    with ThreadPoolExecutor(workers) as pool:
        names = list(facts["sha256"])
        found = [p for p in pool.map(partial(_file_problem, folder, facts), names) if p is not None]
        if found or "shards" not in facts:
            return found
        for part, shards in facts["shards"].items():
            # Mapped first: a header may promise more than there is.
            rows = np.load(folder / f"{part}.npy", mmap_mode="r", allow_pickle=False)
            if rows.dtype != ROW or rows.shape != (facts["counts"][part],):
                found.append(
                    f"{part}.npy: is {rows.dtype} {rows.shape} of images, meta.json says {facts['counts'][part]}"
                )
                continue
            if not 0 <= shards <= len(names):  # before a list of them is made
                found.append(f"meta.json: has {len(names)} files, not {shards} of {part}")
                continue
            sizes = [(folder / f"{part}-{shard:05}.tar").stat().st_size for shard in range(shards)]
            if (wrong := misplaced(rows, sizes, len(facts["classes"]))) is not None:
                shard, offset, length, label, _ = rows[wrong].item()
                what = f"class {label}, {length} bytes at {offset} of file {shard}"
                found.append(f"{part}.npy: says of image {wrong} what cannot be: {what}")
                continue
            bounds = np.searchsorted(rows["shard"], np.arange(shards + 1))
            pieces = (
                (part, shard, rows[start : min(start + 1000, bounds[shard + 1])])
                for shard in range(shards)
                for start in range(bounds[shard], bounds[shard + 1], 1000)
            )
            wrong = pool.map(lambda piece: _image_problems(folder, facts, *piece), pieces)
            found += [problem for problems in wrong for problem in problems]
    return found


def misplaced(rows: Any, sizes: Sequence[int], classes: int) -> int | None:
    """The first image that lies outside of its file or out of order, is empty, or is of no class; None without one."""
    size = np.array([*sizes, 0], np.uint64)[np.minimum(rows["shard"], len(sizes))]  # a file that is not there is empty
    length, offset = rows["length"].astype(np.uint64), rows["offset"]
    right = (length > 0) & (length <= size) & (offset >= 512) & (offset <= size - length) & (rows["label"] < classes)
    right[1:] &= rows["shard"][1:] >= rows["shard"][:-1]
    wrong = np.flatnonzero(~right)
    return int(wrong[0]) if len(wrong) else None


def _file_problem(folder: Path, facts: Mapping[str, Any], name: str) -> str | None:
    path = folder / name
    if not path.is_file():
        return f"{name}: is missing"
    size = path.stat().st_size
    if (stated := facts.get("bytes", {}).get(name, size)) != size:
        return f"{name}: has {size:,} bytes, meta.json says {stated:,}"
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return None if digest.hexdigest() == facts["sha256"][name] else f"{name}: its content is not what was written"


def _image_problems(folder: Path, facts: Mapping[str, Any], part: str, shard: int, rows: Any) -> list[str]:
    from PIL import Image

    found = []
    name = f"{part}-{shard:05}.tar"
    descriptor = os.open(folder / name, os.O_RDONLY)
    try:
        for _, offset, length, label, crc32 in rows.tolist():
            block = os.pread(descriptor, 512 + length, offset - 512)
            where = f"{name} at {offset:,}"
            try:
                member = tarfile.TarInfo.frombuf(block[:512], "utf-8", "surrogateescape")
            except tarfile.TarError as error:
                found.append(f"{where}: no member begins there ({line_of(error)})")
                continue
            folder_of, given = (  # bytes: one of two locales may have known its letters, the other not
                text.encode(errors="surrogateescape") for text in (member.name.partition("/")[0], facts["wnids"][label])
            )
            if member.size != length or folder_of != given:
                found.append(f"{where}: is {member.name} of {member.size} bytes, the index says otherwise")
            elif zlib.crc32(block[512:]) != crc32:
                found.append(f"{where}: {member.name} has another checksum than the index")
            else:
                try:
                    with Image.open(io.BytesIO(block[512:]), formats=("JPEG",)) as image:
                        if image.width * image.height > MOST_PIXELS:
                            found.append(f"{where}: {member.name} has more than {MOST_PIXELS:,} pixels")
                            continue
                        image.load()
                        if image.mode != "RGB":
                            found.append(f"{where}: {member.name} is {image.mode}, not RGB")
                except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                    found.append(f"{where}: {member.name} cannot be decoded ({line_of(error)})")
    finally:
        os.close(descriptor)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Entry point; exit status 0, or 2 after one line on stderr."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a screen may not know the letters of a folder's name
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="made by cifar.py, imagenet.py or text.py")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="threads")
    options = parser.parse_args(arguments)
    folder: Path = options.folder
    try:
        facts = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        found = problems_of(folder, facts, max(1, options.workers))
        if not found:
            counts = " + ".join(f"{count:,} {part}" for part, count in facts["counts"].items())
            unit, files = facts.get("unit", "images"), len(facts["sha256"])
            print(f"{folder}: complete and unchanged, {counts} {unit}, {files} files")
            return 0
        shown = "; ".join(found[:10]) + ("; ..." if len(found) > 10 else "")
        reason = f"{folder}: {len(found)} problem{'s' * (len(found) > 1)}: {shown}"
    except FileNotFoundError as error:
        reason = f"{error.filename}: is missing; the folder is not complete: start the script that makes it again"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{folder}: meta.json or the index is damaged ({line_of(error)}); make the folder again"
    except ImportError:
        reason = "Pillow is missing, which decodes the images: pip install pillow"
    print(f"verify.py: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
