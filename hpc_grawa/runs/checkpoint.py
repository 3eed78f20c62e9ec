"""Checkpoints: one file per rank and a manifest, of which a reader sees all or nothing, whenever the job is killed."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..comm import Communicator
from ..errors import ConfigError, Damaged, in_a_line, wrong
from .log import human_bytes, write_atomically
from .reading import parse_object

#: What a checkpoint may hold beside tensors and the collections of ``copied``: what torch reads back without running
#: code. Not what is derived from these: a number of NumPy's is a float, and an enum an int.
_HELD = {bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout}
_TENSORS = {Tensor, nn.Parameter}
_PARTIAL, _REPLACED = ".partial", ".replaced"
#: Folders of checkpoints: whole ones, and what becomes of them. Others are the user's.
_OURS = re.compile(rf"\d{{9,}}({_PARTIAL}|{_REPLACED})?", re.ASCII)


@dataclass(frozen=True)
class Restored:
    """What a checkpoint held.

    Attributes:
        step: at which it was saved.
        world_size: of the ranks that saved it.
        state: of this rank; of rank 0 where there were others.
        manifest: what it says of itself, the same for all ranks.
        skipped: newer checkpoints that could not be read, and why.
    """

    step: int
    world_size: int
    state: dict[str, Any]
    manifest: dict[str, Any]
    skipped: tuple[str, ...]


@dataclass(frozen=True)
class _UnderWay:
    """A checkpoint that is being written."""

    step: int
    noted: dict[str, Any]
    unfinished: Path
    #: Of this rank: its file's length and SHA-256.
    entry: Future[str]


class Checkpoints:
    """The checkpoints in a folder that all ranks see; all ranks call every method together.

    ``<step>/rank-<m>.pt`` holds rank m's state, ``<step>/manifest.json`` each file's length and SHA-256; ``latest``
    names the newest. They are written under another name, flushed to the disk, and renamed once every rank is done; a
    failure on one rank (a full disk) leaves the ones before as they are.

    ``save`` copies the state and returns; a thread writes it while training goes on, and ``settle`` ends it. Whether
    all ranks have written theirs travels in the control word (``written``), so that ``settle`` need not wait.

    Args:
        folder: made if need be.
        comm: all ranks.
        keep: how many to keep.
    """

    def __init__(self, folder: Path, comm: Communicator, keep: int = 2) -> None:
        self.folder, self._comm, self._keep = folder, comm, keep
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._under_way: _UnderWay | None = None
        #: Step of the checkpoint to go on from, the same on all ranks; None if there is none.
        self.saved: int | None = None

    def save(self, step: int, state: dict[str, Any], noted: dict[str, Any]) -> list[str]:
        """Begin to save every rank's state, and end what is still under way.

        Args:
            step: names the checkpoint; one of the same step is replaced.
            state: of this rank: tensors, numbers, strings, and lists, tuples and dictionaries of these; copied.
            noted: what the manifest is to hold beside, the same on all ranks; JSON.

        Returns:
            What went wrong with this one or the one before, the same on all ranks.

        Raises:
            ConfigError: on all ranks: ``state`` holds on one of them what could not be read back.
        """
        told = self.settle()
        unfinished = self.folder / f"{step:09d}{_PARTIAL}"
        held = self._copied(state)

        def begin() -> None:
            for left in _partial(self.folder):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            unfinished.mkdir(parents=True)

        wrong = self._errors_of(begin if self._comm.rank == 0 else None)
        if wrong:
            return [*told, _not_saved(step, wrong)]
        entry = self._thread.submit(_write, unfinished / _file(self._comm.rank), held)
        self._under_way = _UnderWay(step, copied(noted), unfinished, entry)
        return told

    def check(self, state: dict[str, Any]) -> None:
        """Find out before training whether ``state`` can be saved, as far as it is known by then.

        Raises:
            ConfigError: on all ranks: it cannot, on one of them.
        """
        self._copied(state, tensors=False)

    def _copied(self, state: dict[str, Any], tensors: bool = True) -> Any:
        """``copied``, whose error is raised on all ranks."""
        held: Any = None

        def copy() -> None:
            nonlocal held
            held = copied(state, tensors=tensors)

        if wrong := self._errors_of(copy):
            raise ConfigError(f"nothing can be saved: {wrong[0]}")
        return held

    @property
    def step(self) -> float:
        """Of the checkpoint under way; infinite if there is none."""
        return math.inf if self._under_way is None else self._under_way.step

    def written(self) -> float:
        """Step of the newest checkpoint that this rank has nothing left to write of; -1 for none."""
        under_way = self._under_way
        return under_way.step if under_way is not None and under_way.entry.done() else -1

    def settle(self) -> list[str]:
        """Wait until all ranks have written what is under way, and publish it.

        Returns:
            What went wrong with it, the same on all ranks.
        """
        under_way, self._under_way = self._under_way, None
        if under_way is None:
            return []
        entry = ""
        unfinished, first = under_way.unfinished, self._comm.rank == 0

        def await_file() -> None:
            nonlocal entry
            entry = under_way.entry.result()

        def publish() -> None:
            self._publish(unfinished, {"step": under_way.step, "files": files, **under_way.noted})

        wrong = self._errors_of(await_file)
        if not wrong:
            told = self._comm.gather_bytes(entry.encode(), "evaluate")
            files = {_file(m): found.decode() for m, found in enumerate(told)}
            wrong = self._errors_of(publish if first else None)
        if wrong and first:
            shutil.rmtree(unfinished, ignore_errors=True)
        if wrong:
            return [_not_saved(under_way.step, wrong)]
        self.saved = under_way.step
        return []

    def keep_model(self, state: dict[str, Tensor]) -> list[str]:
        """Keep this rank's own model beside the run; returns what went wrong, the same on all ranks."""
        file = model_file(self.folder.parent, self._comm.rank)
        wrong = self._errors_of((lambda: file.parent.mkdir(exist_ok=True)) if self._comm.rank == 0 else None)

        def write() -> None:
            temporary = file.with_name(f".{file.name}.{os.getpid()}")
            try:
                _write(temporary, state)
                temporary.rename(file)
            finally:
                temporary.unlink(missing_ok=True)  # half a file would hold what room there is

        wrong = wrong or self._errors_of(write)
        if wrong:  # a mean of some would pass for that of all
            with suppress(OSError):
                file.unlink(missing_ok=True)
        return [f"the ranks' models are not kept: {'; '.join(wrong)}"] if wrong else []

    def check_space(self, bytes_per_rank: int, model_bytes: int = 0) -> None:
        """Find out on rank 0 whether as many checkpoints as are to be kept, and the next one, have room.

        Those that are there already count as much as they take, and what a save that was cut off has left.

        Args:
            bytes_per_rank: of a checkpoint.
            model_bytes: of the model that each rank keeps beside them.

        Raises:
            ConfigError: they have not.
        """
        if self._comm.rank:
            return
        place = next(p for p in (self.folder, *self.folder.parents) if p.is_dir())
        free, copies = shutil.disk_usage(place).free, self._keep + 1
        needed = (bytes_per_rank * copies + model_bytes) * self._comm.size
        known = [*(self.folder / name for name in _names(self.folder)), *_partial(self.folder)]
        there = sum(file.lstat().st_size for place in known for file in place.glob("*"))
        if free + there < needed:
            raise wrong(
                "save.keep",
                self._keep,
                f"{copies} checkpoints of {self._comm.size} ranks{' and their models' if model_bytes else ''} need "
                f"{human_bytes(needed)}, {place} has {human_bytes(free + there)} for them; must be fewer, "
                f"or another run.dir, or save.every .inf",
            )

    def load(self) -> Restored | None:
        """The newest checkpoint that is whole on every rank; None if there is none.

        Raises:
            ConfigError: on all ranks: there are checkpoints, and none is whole.
        """
        own = [list(_names(self.folder)), self._lost()] if self._comm.rank == 0 else []
        names, skipped = json.loads(self._comm.gather_bytes(json.dumps(own).encode(), "evaluate")[0])
        damaged: list[str] = []
        for name in names:
            found: list[Restored] = []
            wrong = self._errors_of(partial(self._read, name, skipped + damaged, found))
            if not wrong:
                self.saved = found[0].step
                return found[0]
            damaged += wrong
        if damaged:
            raise ConfigError(
                f"no checkpoint in {self.folder} is whole on every rank: start anew under another run.name, or remove "
                f"that folder to start from the first step ({'; '.join(damaged)})"
            )
        return None

    def _read(self, name: str, skipped: list[str], found: list[Restored]) -> None:
        place = self.folder / name
        manifest = read_manifest(place)
        files = manifest["files"]
        file = _file(self._comm.rank if len(files) == self._comm.size else 0)
        state = _read(place / file, *files[file].split())
        found.append(Restored(manifest["step"], len(files), state, manifest, tuple(skipped)))

    def _lost(self) -> list[str]:
        """What is wrong with ``latest``."""
        # The checkpoint that it names has another name while it is being replaced.
        named, there = _latest(self.folder), list(_names(self.folder))
        if named is None or named in there or f"{named}{_REPLACED}" in there:
            return []
        return [f"{self.folder / 'latest'} names no checkpoint"]

    def _publish(self, unfinished: Path, manifest: dict[str, Any]) -> None:
        place = unfinished.with_name(unfinished.name.removesuffix(_PARTIAL))
        with (unfinished / "manifest.json").open("w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=1)
            _flush(file)
        _flush_folder(unfinished)
        replaced = place.with_name(place.name + _REPLACED)
        if place.exists():  # perhaps the only one that is whole: not removed before there is another
            shutil.rmtree(replaced, ignore_errors=True)
            place.rename(replaced)
        unfinished.rename(place)
        try:
            _flush_folder(self.folder)
            write_atomically(self.folder / "latest", place.name + "\n")
        except OSError:  # as on a full disk, whose room is that of the next one
            place.rename(unfinished)
            with suppress(FileNotFoundError):
                replaced.rename(place)
            raise
        others = [p for p in _names(self.folder) if p != place.name and p.isdigit() and (self.folder / p).is_dir()]
        # Newer ones were passed over when the run went on from an older one: it is whole, they need not be.
        others.sort(key=lambda name: name > place.name)
        kept = [place.name, *others][: self._keep]
        for old in self.folder.iterdir():
            if _OURS.fullmatch(old.name) and old.is_dir() and old.name not in kept:
                shutil.rmtree(old, ignore_errors=True)

    def _errors_of(self, action: Callable[[], None] | None) -> list[str]:
        """Do something on this rank, or nothing; what went wrong on any rank, on all of them."""
        error = ""
        try:
            if action is not None:
                action()
        except (OSError, ConfigError, Damaged) as wrong:
            error = f"rank {self._comm.rank}: {wrong}"
        return [
            told.decode()
            for told in self._comm.gather_bytes(error.encode(errors="backslashreplace"), "evaluate")
            if told
        ]


def read_manifest(place: Path) -> dict[str, Any]:
    """What a checkpoint says about itself.

    Raises:
        Damaged: it is no JSON object, or what it says of step or files cannot be.
    """
    file = place / "manifest.json"
    found = parse_object(file.read_text(encoding="utf-8", errors="replace"), str(file))
    step, files = found.get("step"), found.get("files")
    if type(step) is not int or step < 0:
        raise Damaged(f"{file} is damaged: its step is {step!r}")
    files = files if isinstance(files, dict) else {}
    entries = [isinstance(entry, str) and re.fullmatch(r"\d+ [0-9a-f]{64}", entry) for entry in files.values()]
    if not entries or not all(entries) or list(files) != [_file(m) for m in range(len(files))]:
        raise Damaged(f"{file} is damaged: its files are not a length and a SHA-256 for each rank")
    return found


def model_file(run: Path, rank: int) -> Path:
    """Where a finished run keeps a rank's own model, a plain ``state_dict``."""
    return run / "models" / _file(rank)


def saved_models(run: Path) -> int:
    """Of how many ranks a run has kept the models."""
    return next(m for m in count() if not model_file(run, m).is_file())


def saved_world(folder: Path) -> int | None:
    """How many ranks saved the newest of the checkpoints in ``folder`` that says so; None if there is none."""
    for name in _names(folder):
        with suppress(OSError, Damaged):
            return len(read_manifest(folder / name)["files"])
    return None


def check_world(size: int, saved: int, run: Path | str) -> None:
    """Raise ``ConfigError`` unless ``size`` ranks are as many as saved the run in the folder ``run``."""
    if size != saved:
        raise ConfigError(
            f"world size is {size}: must be {saved}, as when {run} was saved; or go on from its center with "
            f"--resume-world any"
        )


def _names(folder: Path) -> Iterator[str]:
    """Checkpoints, newest first; what ``latest`` names before all, as a newer one may have been left unfinished."""
    if not folder.is_dir():
        return
    names = [p.name for p in folder.iterdir() if _OURS.fullmatch(p.name) and p.suffix != _PARTIAL]
    whole = sorted(names, key=lambda name: (name.removesuffix(_REPLACED), name.isdigit()), reverse=True)
    named = _latest(folder)
    if named in whole:
        yield named
    yield from (name for name in whole if name != named)


def _partial(folder: Path) -> list[Path]:
    """Checkpoints that were not, or are not yet, written to their end."""
    return [place for place in folder.glob(f"*{_PARTIAL}") if _OURS.fullmatch(place.name)]


def _latest(folder: Path) -> str | None:
    """What ``latest`` says; None if there is none."""
    try:
        return (folder / "latest").read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return None
    except OSError:
        return ""


def copied(state: Any, path: str = "", tensors: bool = True) -> Any:
    """The same nested lists, tuples, sets and dictionaries with copies of their tensors, on the host.

    NumPy's numbers become Python's; dictionaries of any kind become plain ones.

    Args:
        state: to copy.
        path: names it in errors: ``worker.optimizer.param_groups[0].lr``.
        tensors: whether to copy tensors, too, or only to look at them.

    Raises:
        ConfigError: it holds what a checkpoint could not give back; names where, and the type.
    """
    kind = type(state)
    if kind in _HELD:
        return state
    if kind in _TENSORS:
        return _on_host(state) if tensors else state
    if isinstance(state, np.generic) and type(state.item()) in _HELD:
        return state.item()
    if isinstance(state, dict):
        return {
            copied(key, f"a key of {path}"): copied(value, f"{path}.{key}" if path else str(key), tensors)
            for key, value in state.items()
        }
    if kind in (list, tuple, set, torch.Size):
        return kind([copied(value, f"{path}[{i}]", tensors) for i, value in enumerate(state)])
    raise ConfigError(
        f"{path} is of type {kind.__module__}.{kind.__qualname__}, which a checkpoint could not give back: must be a "
        f"tensor, number or string, or lists, tuples, sets and dictionaries of these"
    )


def model_state(model: nn.Module) -> dict[str, Any]:
    """What ``model.state_dict()`` gives, on the host."""
    return {
        key: value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else copied(value, key)
        for key, value in model.state_dict().items()
    }


def bytes_of(state: Any) -> int:
    """Of all tensors in nested lists, tuples, sets and dictionaries."""
    if isinstance(state, Tensor):
        return state.nbytes
    if isinstance(state, dict):
        return sum(map(bytes_of, state.values()))
    return sum(map(bytes_of, state)) if isinstance(state, list | tuple | set) else 0


def _on_host(tensor: Tensor) -> Tensor:
    host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return host.copy_(tensor)


def _not_saved(step: int, wrong: list[str]) -> str:
    return f"step {step}: not saved, the checkpoints before stay: {'; '.join(wrong)}"


def _file(rank: int) -> str:
    return f"rank-{rank:04d}.pt"


class _Hashing(io.RawIOBase):
    """A file to write to that knows the SHA-256 of what was written.

    What cannot be written is dropped: torch.save would hide the error behind one of its own.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.sha, self.length = file, hashlib.sha256(), 0
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self.error = error
        self.sha.update(data)
        self.length += len(data)
        return len(data)


def _write(path: Path, state: dict[str, Any]) -> str:
    """Write and flush; returns length and SHA-256."""
    with path.open("wb") as file:
        hashing = _Hashing(file)
        torch.save(state, hashing)  # type: ignore[arg-type]
        if hashing.error is not None:
            raise hashing.error
        _flush(file)
    return f"{hashing.length} {hashing.sha.hexdigest()}"


def _read(path: Path, length: str, sha: str) -> dict[str, Any]:
    if (size := path.stat().st_size) != int(length):
        raise Damaged(f"{path} has {size} bytes, its manifest says {length}")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != sha:
        raise Damaged(f"{path} is not what was written: its SHA-256 differs from its manifest's")
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except Exception as error:  # what was written is not what this torch reads; it can raise anything
        raise Damaged(f"{path} cannot be read: {in_a_line(error)[:200]}") from None
    return state


def _flush(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
