"""A run's folder and its screen: written and printed by rank 0 only."""

from __future__ import annotations

import io
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ..errors import ConfigError, Damaged, in_a_line, wrong
from ..screen import is_terminal, say
from .reading import read_object

#: Seconds between plain lines where the screen is not a terminal.
LINE_EVERY = 5.0


def new_folder(directory: str, name: str, numbered: bool = False, may_exist: bool = False) -> Path:
    """Make ``directory/name``, which must not exist: mkdir is atomic, so of two runs one gets it.

    Args:
        directory: made if need be.
        name: of the folder.
        numbered: where there is one already, make ``name.2``, ``name.3``, ... instead.
        may_exist: where there is one already, give it.

    Raises:
        ConfigError: it exists, or cannot be made.
    """
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        for number in count(1):
            folder = Path(directory) / (name if number == 1 else f"{name}.{number}")
            try:
                folder.mkdir()
                break
            except FileExistsError:
                if may_exist and folder.is_dir():
                    break
                if not numbered:
                    raise wrong(
                        "run.name",
                        name,
                        f"{folder} exists and is never overwritten; must be a new one, or give another run.dir",
                    ) from None
    except OSError as error:
        raise wrong("run.dir", directory, f"no folder can be made there ({error.strerror})") from None
    return folder


def open_run(folder: Path, configuration: str, world_size: int, backend: str, network: str | None = None) -> None:
    """Write what a run is into its new folder: ``config.yaml`` and ``environment.json``."""
    write_atomically(folder / "config.yaml", configuration)
    found = environment(world_size, backend, network)
    write_atomically(folder / "environment.json", json.dumps(found, indent=1) + "\n")


def is_finished(folder: Path) -> bool:
    """Whether the run in ``folder`` has come to its end."""
    return _state(folder) == "finished"


def is_over(folder: Path) -> bool:
    """Whether it has, or has diverged, which it would do again."""
    return _state(folder) in ("finished", "diverged")


def _state(folder: Path) -> object:
    try:
        summary = read_object(folder / "summary.json")
    except Damaged:
        return None  # what was saved before it is still there
    return None if summary is None else summary.get("state")


def write_atomically(path: Path, content: str | dict[str, Tensor], lasting: bool = True) -> None:
    """Write text, or tensors as torch does, under another name and rename it: readers see all of it or nothing.

    Args:
        path: of the file.
        content: of it.
        lasting: whether that is to hold after a crash of the host, too, which waits for the disk.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    held = io.BytesIO()  # torch hides what is wrong with a file behind an error of its own
    if isinstance(content, str):
        held.write(content.encode())
    else:
        torch.save(content, held)
    try:
        with temporary.open("wb") as file:
            file.write(held.getbuffer())
            if lasting:
                file.flush()
                os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        with suppress(OSError):  # half a file would hold what room there is
            temporary.unlink()
        raise


@cache
def versions() -> dict[str, str]:
    """Releases of what a result depends on."""
    found = {"python": platform.python_version()}
    for name in ("hpc-grawa", "torch", "torchvision", "numpy", "mpi4py", "horovod"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@cache  # of what this process runs, whatever becomes of the checkout meanwhile
def commit() -> str | None:
    """The commit of the package's checkout, with ``+`` if it was changed; None outside one."""
    here = Path(__file__).parents[1]
    try:
        head, changed = (
            subprocess.run(
                ["git", "-C", str(here), *words], capture_output=True, text=True, errors="replace", check=True
            ).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no", "--", "."])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed else "")


def environment(world_size: int, backend: str, network: str | None) -> dict[str, Any]:
    """Where a run took place."""
    return {
        "command": sys.argv,
        "host": platform.node(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "world_size": world_size,
        "backend": backend,
        "network": network,
        "versions": versions(),
        "commit": commit(),
        "launcher": {
            key: value
            for key, value in sorted(os.environ.items())
            if key.startswith(("SLURM_JOB_", "SLURM_NNODES", "SLURM_NTASKS", "OMP_NUM_", "HOROVOD_", "NCCL_"))
        },
    }


class Log:
    """``metrics.jsonl``, TensorBoard's events and the screen. On ranks other than 0, and without a folder, nothing.

    A full disk, which it says, ends no training: lines are kept until there is room, TensorBoard gets no more events.

    Args:
        folder: the run's folder, or None.
        speaks: whether this rank prints.
        tensorboard: whether to write events for TensorBoard.
    """

    def __init__(self, folder: Path | None, speaks: bool, tensorboard: bool = False) -> None:
        self.folder, self.speaks = folder, speaks
        self._file: IO[bytes] | None = None if folder is None else _appended(folder / "metrics.jsonl")
        #: What could not be written yet.
        self._kept, self._full = b"", False
        self._last_line = time.monotonic()
        self._live = is_terminal()
        self._bar: Any = None
        self._events: Any = None
        self._wants_events = False
        if folder is not None and tensorboard:
            if find_spec("tensorboard") is None:
                self.say("log        no events for TensorBoard, which is not installed: pip install 'hpc-grawa[log]'")
            elif not is_text(str(folder)):
                self.say(
                    f"log        no events for TensorBoard, which cannot write to {folder}: its bytes are no text here"
                )
            else:
                self._wants_events = True

    def record(self, event: str, **values: Any) -> None:
        """Add a line to ``metrics.jsonl``, and its numbers to TensorBoard's curves over steps."""
        if self._file is not None:
            self._add(self._file, json.dumps({"event": event, **values}).encode() + b"\n")
        if self._events is not None and "step" in values:
            part = f"{values['part']}_" if "part" in values else ""
            with self._events_dropped():
                for key, value in values.items():
                    if isinstance(value, int | float) and key not in ("step", "epoch", "round"):
                        self._events.add_scalar(f"{event}/{part}{key}", value, values["step"])

    def _add(self, file: IO[bytes], lines: bytes) -> None:
        """Write what was kept and these lines; what cannot be written is kept until the next ones come."""
        self._kept += lines
        try:
            while self._kept:
                self._kept = self._kept[file.write(self._kept) :]
            self._full = False
        except OSError as error:
            if not self._full:
                self.say(f"log        {file.name} cannot be written ({error.strerror}): lines are kept until it can")
            self._full = True

    @contextmanager
    def _events_dropped(self) -> Iterator[None]:
        """Where the block cannot write TensorBoard's events, as on a full disk, it gets no more of them."""
        try:
            yield
        except Exception as error:  # TensorFlow's, where it is installed, is no OSError
            self.say(f"log        no more events for TensorBoard ({in_a_line(error)})")
            self._events = None

    @property
    def written(self) -> int:
        """Bytes in ``metrics.jsonl``, with those that are to come there."""
        return self._file.tell() + len(self._kept) if self._file is not None else 0

    def go_on(self, written: int, step: int) -> None:
        """Begin to write: forget what was recorded after a checkpoint of that step, which is recorded once more."""
        again = self.written != written
        if self._file is not None and again:
            if self.written < written:
                self.say(
                    f"log        {self._file.name} is damaged: {self.written} bytes, not {written}; the rest is lost"
                )
                written = Path(self._file.name).read_bytes().rfind(b"\n") + 1
            self._file.truncate(written)
            self._file.seek(0, os.SEEK_END)
        if self._wants_events:
            from torch.utils.tensorboard import SummaryWriter

            with self._events_dropped():
                self._events = SummaryWriter(self.folder, flush_secs=10, purge_step=step + 1 if again else None)

    def say(self, text: str) -> None:
        """Print a line."""
        if self.speaks:
            self._last_line = time.monotonic()
            if self._bar is not None:
                self._bar.clear()
            say(text)

    @property
    def due(self) -> bool:
        """Whether the screen wants a progress line now."""
        return self.speaks and time.monotonic() - self._last_line >= (0.2 if self._live else LINE_EVERY)

    def progress(self, share: float, text: str) -> None:
        """Show progress: a bar on a terminal, a plain line elsewhere.

        Args:
            share: of the budget used, in [0, 1].
            text: loss and the like.
        """
        if not self._live:
            self.say(text)
            return
        if self._bar is None:
            try:
                from tqdm import tqdm
            except ImportError:
                self.say(text)
                return
            self._bar = tqdm(total=100, bar_format="{percentage:3.0f}% |{bar:24}| {desc}", file=sys.stdout, leave=False)
        self._last_line = time.monotonic()
        self._bar.n = min(100, 100 * share)
        self._bar.set_description_str(text)

    def close(self) -> None:
        """Close the bar and the file."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if self._file is not None:
            self._add(self._file, b"")
            if self._kept:
                self.say(f"log        {self._file.name} lacks its last {len(self._kept)} bytes: they are lost")
            self._file.close()
            self._file = None
        if self._events is not None:
            with self._events_dropped():
                self._events.close()
            self._events = None


def is_text(name: str) -> bool:
    """Whether a file's name holds no bytes that this locale cannot read."""
    return not any("\udc80" <= character <= "\udcff" for character in name)


def _appended(file: Path) -> IO[bytes]:
    try:
        return file.open("ab", buffering=0)
    except OSError as error:
        raise ConfigError(f"{file} cannot be written ({error.strerror})") from None


def human_bytes(count: float) -> str:
    """``12.3 MB``.

    Example:
        >>> human_bytes(12_345_678)
        '12.3 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
