"""Copies of a node's share of the data on a disk of the node, made before the clock starts."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import secrets
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..comm import Communicator
from ..errors import ConfigError, in_a_line
from ..runs.heartbeat import lives

_SPARE = 64 * 2**20  # bytes that are to stay free
_THREADS = 8
_LINE_EVERY = 5.0  # seconds
_WORD_EVERY = 5.0  # seconds


def staged(
    stage: Path,
    paths: Sequence[Path],
    rows: NDArray[Any],
    shard_of: Callable[[int], Tensor],
    comm: Communicator,
    say: Callable[[str], None],
) -> tuple[list[Path], NDArray[Any]]:
    """Copy what the ranks of this node train on to ``stage``, once per node; all ranks must call it.

    Every image's checksum is compared while it is copied. A copy that is there already is read, and used as far as its
    checksums are right; one that was interrupted is continued at the file that was being written.

    Args:
        stage: a folder on a disk of each node; made if need be.
        paths: the files that hold the images.
        rows: where each image lies, ``[N]``: its file, offset, length, label and checksum.
        shard_of: the examples that a rank sees.
        comm: the ranks.
        say: prints a line.

    Returns:
        The files of the copy, and ``rows`` of which those that were copied count files from ``paths`` on, then these.

    Raises:
        ConfigError: there is no room, or the copy fails; the same on all ranks.
    """
    node = comm.node()
    ranks = node.allgather(torch.tensor([comm.rank]), "setup").wait().flatten().tolist()
    wanted = np.unique(torch.cat([shard_of(rank) for rank in ranks]).numpy())
    copies = _Copies(stage, paths, rows, wanted)

    def copy() -> str:
        """Why it failed, if it did."""
        try:
            size = copies.check(say)
            images = f"{len(wanted):,} images of this node's ranks"
            say(f"stage      {images} to {copies.folder}, {size / 1e9:.2f} GB to copy")
            copies.make(size, say)
        except (OSError, ValueError) as error:
            return f"data.stage is {stage}: {in_a_line(error)} (on {platform.node()})"
        return ""

    # One that fails on another node must be known to all; it is also what the other ranks of this node wait for.
    told = _told_by_all(comm, copy if node.rank == 0 else str)
    if problems := [problem for problem in told if problem]:
        raise ConfigError(problems[0])
    return copies.paths, copies.rows()


def _told_by_all(comm: Communicator, work: Callable[[], str]) -> list[str]:
    """What ``work()`` returns on each rank; however long it takes, no message keeps a rank waiting for it.

    Ranks that are not done yet say so every few seconds. Deadlock argument: all see the same words, and go on until
    none of them says so.
    """
    found: list[str | BaseException] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:  # raised in the main thread
            found.append(error)

    thread = threading.Thread(target=run, name="hpc_grawa-stage", daemon=True)
    thread.start()
    busy = b"\0"
    words = [busy]
    while busy in words:
        thread.join(_WORD_EVERY)
        own = found[0] if found else busy.decode()
        if isinstance(own, BaseException):
            raise own
        words = comm.gather_bytes(own.encode(errors="backslashreplace"))
    return [word.decode() for word in words]


class _Copies:
    """The copied images, file by file: each file of the copy holds those of one original, in order of their offset."""

    def __init__(self, stage: Path, paths: Sequence[Path], rows: NDArray[Any], wanted: NDArray[np.int64]) -> None:
        self._stage, self._originals, self._rows = stage, paths, rows
        order = np.lexsort((rows["offset"][wanted], rows["shard"][wanted]))
        self._wanted = wanted[order]
        self._chosen = rows[self._wanted]
        content = hashlib.sha256(json.dumps([str(path.resolve()) for path in paths]).encode())
        content.update(self._chosen.tobytes())
        # Of each user its own: nobody goes on with what another one's job has left unfinished.
        self.folder = stage / f"hpc-grawa-{os.getuid()}-{content.hexdigest()[:16]}"
        #: How files end that a process of this host is writing, behind its number.
        self._part = f".{platform.node()}.part"
        self._used, first = np.unique(self._chosen["shard"], return_index=True)
        self._bounds = [*first.tolist(), len(self._chosen)]
        self.paths = [self.folder / f"{paths[number].stem}.images" for number in self._used]
        lengths = self._chosen["length"].astype(np.uint64)
        ends = np.cumsum(lengths, dtype=np.uint64)
        starts = ends - lengths
        #: Offsets in the files of the copy.
        self._offsets = starts.copy()
        self._sizes = []
        for i in range(len(self._used)):
            a, b = self._bounds[i], self._bounds[i + 1]
            self._offsets[a:b] -= starts[a]
            self._sizes.append(int(ends[b - 1] - starts[a]))

    def check(self, say: Callable[[str], None]) -> int:
        """Read the copy as far as it is there; bytes that are still to be copied, or to be copied again."""
        there = sum(size for path, size in zip(self.paths, self._sizes, strict=True) if path.is_file())
        if there:
            say(f"stage      checking {there / 1e9:.2f} GB that {self.folder} already holds")
        with ThreadPoolExecutor(_THREADS) as pool:
            intact = list(pool.map(self._intact, range(len(self.paths))))
        self._absent = [i for i, good in enumerate(intact) if not good]
        return sum(self._sizes[i] for i in self._absent)

    def _intact(self, i: int) -> bool:
        """Whether file number ``i`` of the copy is there and as it was written."""
        path, chosen = self.paths[i], self._chosen[self._bounds[i] : self._bounds[i + 1]]
        if not path.is_file() or path.stat().st_size != self._sizes[i]:
            return False
        with path.open("rb") as file:
            return all(zlib.crc32(file.read(int(row["length"]))) == row["crc32"] for row in chosen)

    def make(self, size: int, say: Callable[[str], None]) -> None:
        """Copy what ``check`` found absent, ``size`` bytes; OSError or ValueError where that fails."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for half in self.folder.glob(f"*{self._part}"):
            writer = half.name.removesuffix(self._part).rpartition(".")[2]
            if writer == str(os.getpid()) or not (writer.isdecimal() and lives(int(writer))):
                half.unlink(missing_ok=True)  # not what another job on this host is writing
        free = shutil.disk_usage(self.folder).free
        if size and size + _SPARE > free:
            raise ValueError(f"must have {(size + _SPARE) / 1e9:.2f} GB free, has {free / 1e9:.2f}")
        copied, start = 0, time.monotonic()
        shown = start
        with ThreadPoolExecutor(_THREADS) as pool:  # they wait for the file system, not for processors
            for length in pool.map(self._copy, self._absent):
                copied, now = copied + length, time.monotonic()
                if now - shown >= _LINE_EVERY:
                    rate, shown = copied / (now - start), now
                    left = (size - copied) / rate
                    say(
                        f"stage      {copied / 1e9:.2f} of {size / 1e9:.2f} GB, {rate / 1e6:.0f} MB/s, ETA {left:.0f} s"
                    )

    def _copy(self, i: int) -> int:
        """Write file number ``i``; its bytes."""
        original = self._originals[self._used[i]]
        half = self.paths[i].with_name(f"{self.paths[i].name}.{secrets.token_hex(4)}.{os.getpid()}{self._part}")
        descriptor = os.open(original, os.O_RDONLY)
        try:
            with half.open("wb") as file:
                for row in self._chosen[self._bounds[i] : self._bounds[i + 1]]:
                    _, offset, length, _, crc32 = row.item()
                    content = os.pread(descriptor, length, offset)
                    if zlib.crc32(content) != crc32:
                        raise ValueError(f"{original} is damaged at {offset}, check it with data_prep/verify.py")
                    file.write(content)
                file.flush()
                os.fsync(file.fileno())
        finally:
            os.close(descriptor)
        half.rename(self.paths[i])
        return self._sizes[i]

    def rows(self) -> NDArray[Any]:
        """Where each image of the whole set lies now."""
        rows = self._rows.copy()
        moved = self._chosen.copy()
        moved["shard"] = len(self._originals) + np.searchsorted(self._used, self._chosen["shard"])
        moved["offset"] = self._offsets
        rows[self._wanted] = moved
        return rows
