"""Heartbeats: what every rank of a run does, in its folder for others to read; and the end of a wait without end."""

from __future__ import annotations

import faulthandler
import json
import os
import platform
import re
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from ..launch import first_process, parent_of
from ..screen import say
from .log import write_atomically

#: Seconds between two heartbeats.
BEAT = 5.0
#: Seconds in which the processes of a job may start one after the other, however short the limit for messages is.
START = 30.0
#: How the last word of a rank begins that has waited too long for another.
_GAVE_UP = "gave up waiting: "
#: Of the watches of this process.
_numbers = count()
#: The last word of a rank whose process has ended.
_LEFT = "has left"


def not_begun() -> dict[str, Any]:
    """What a rank says of itself that has made no step."""
    return {"step": 0, "used": 0.0, "training": 0.0}


class Ranks(Protocol):
    """What a watch needs of a communicator: what it waits for, and a way to end all ranks."""

    meter: Any

    def abort(self, status: int = 1) -> None: ...


@dataclass(frozen=True)
class Heartbeat:
    """A rank's last heartbeat.

    Attributes:
        rank: of the world.
        host: where it runs or ran.
        step: local steps made.
        activity: what it was doing, in words.
        seconds: it had been doing it for.
        used: the share of the budget.
        training: seconds of training.
        age: of the beat in seconds, by the file system's clock; what a living rank's never exceeds is a few ``BEAT``.
        told: the signal that told it to end, or how it ended; empty for a rank that fell silent without a word.
        job: the same for all ranks of one start of a job; empty until they have found each other.
        process: its number on its host.
    """

    rank: int
    host: str
    step: int
    activity: str
    seconds: float
    used: float
    training: float
    age: float
    told: str = ""
    job: str = ""
    process: int = 0

    @property
    def alive(self) -> bool:
        """Whether it has been heard of lately."""
        return self.age < 6 * BEAT


class Watch:
    """Writes this rank's heartbeats from a thread of its own, and ends the job where a message never comes.

    It begins before the backend does, so that a rank that never comes is missed too. The beats lie in the temporary
    folder, where the ranks of a host see each other's, and in the folder of the run that is under way, where all do.

    Args:
        rank: of this process.
        size: of the world.
        timeout: longest wait for a message, in seconds; what this process itself was stopped for does not count.
        local_size: ranks on this host.
        job: names the folder that the ranks of this host share; None for none.
        launched: by a launcher that lives as long as its job, and whose end this process is not to outlive.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        timeout: float,
        local_size: int = 1,
        job: str | None = None,
        launched: bool = False,
    ) -> None:
        self.rank, self.size, self.timeout = rank, size, timeout
        self._local_size = local_size
        self._comm: Ranks | None = None
        self._host: Path | None = None
        self._run: Path | None = None
        self._holder = ""
        self._token = ""
        self._ended, self._told = False, ""
        self._process = os.getpid()
        self._first = self._launcher = 0
        self._began = time.perf_counter()
        self._leaving: float | None = None
        self._since, self._waited = 0.0, 0.0
        if launched:
            self._first = first_process()
            self._launcher = parent_of(self._first)
        if job is not None:
            mine, job = f"hpc_grawa-{os.getuid()}", re.sub(r"[^\w.@-]", "_", job)[:100]
            self._host = Path(tempfile.gettempdir()) / f"{mine}-{job}-{next(_numbers)}"
            with suppress(OSError):
                for folder in self._host.parent.glob(f"{mine}-*"):  # of jobs that were killed
                    if time.time() - (folder / "ranks").stat().st_mtime > 86_400:
                        shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):
                (self._host / "ranks").mkdir(parents=True, exist_ok=True, mode=0o700)
        self._writing = threading.Lock()
        self._heard, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        self._hears_signals = False
        self._write("starts", 0.0)
        self._thread = threading.Thread(target=self._watch, name="hpc_grawa-watch", daemon=True)
        self._thread.start()

    def attach(self, comm: Ranks) -> None:
        """From here on the waits of ``comm`` are watched."""
        self._comm = comm

    def greet(self, token: str, local_size: int) -> None:
        """All ranks have started; from here on beats count that bear the same token."""
        self._token, self._local_size = token, local_size
        self._write("computes", 0.0)

    def begin(self, folder: Path | None) -> None:
        """Write the beats into the folder of a run too, until ``end``, and tell there of signals as they come."""
        self._told = ""
        if threading.current_thread() is threading.main_thread():
            # Python's handlers wait while a rank waits in C for a message: only this tells of a signal at once.
            self._hears_signals = True
            signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        if folder is None:
            return
        with suppress(OSError):
            (folder / "ranks").mkdir(exist_ok=True)
            if self.rank == 0:
                for file in (folder / "ranks").glob("[0-9]*.json"):
                    if file.stem.isdecimal() and int(file.stem) >= self.size:  # of an attempt with more ranks
                        file.unlink(missing_ok=True)
        self._holder = _lock(folder)
        self._run = folder

    def end(self, activity: str) -> None:
        """Leave a last word in the folder of the run."""
        if self._hears_signals:
            signal.set_wakeup_fd(-1)
            self._hears_signals = False
        with self._writing:
            run, self._run, self._told = self._run, None, activity
            if run is not None:
                self._write_to(run, activity, 0.0)
            self._told = ""

    def leave(self) -> None:
        """Say that this process ends: whoever waits for it from now on waits in vain."""
        if os.getpid() != self._process:
            return
        self._leaving = time.perf_counter()
        self._told = self._told or _LEFT
        self._write(_LEFT, 0.0)
        if self._host is not None:
            beats = read_heartbeats(self._host)
            if len(beats) >= self._local_size and all(beat.told for beat in beats):
                shutil.rmtree(self._host, ignore_errors=True)

    def close(self) -> None:
        """Stop watching."""
        self._ended = True
        os.write(self._wake, b"\0")
        self._thread.join()
        os.close(self._wake)
        os.close(self._heard)

    @property
    def _pause(self) -> float:
        return min(BEAT, self.timeout / 4)

    def _watch(self) -> None:
        ear = select.poll()
        ear.register(self._heard, select.POLLIN)
        last = time.perf_counter()
        while True:
            heard = os.read(self._heard, 100).strip(b"\0") if ear.poll(1000 * self._pause) else b""
            if self._ended:
                return
            if heard:
                self._told = self._told or signal.Signals(heard[0]).name
            if self._first and parent_of(self._first) != self._launcher:
                self._end(f"rank {self.rank} of {self.size} on {platform.node()} has lost its launcher: ending")
            now = time.perf_counter()
            elapsed, last = now - last, now
            if elapsed > 3 * self._pause:
                continue  # stopped until now: launchers wake ranks to end them, whose silence others are to tell of
            waits = self._waits()
            if waits is None:
                self._write("computes" if self._comm is None else self._comm.meter.activity, 0.0)
                continue
            purpose, since, ranks = waits
            self._waited = self._waited + elapsed if since == self._since else min(now - since, 2 * self._pause)
            self._since = since
            self._write(_LEFT if self._leaving else f"waits for {purpose}", self._waited)
            self._check(purpose, ranks)

    def _waits(self) -> tuple[str, float, Sequence[int]] | None:
        """What this rank waits for, since when, and for which ranks."""
        if self._leaving is not None:
            return "the others to end", self._leaving, range(self.size)
        if self._comm is None:
            return ("the others to start", self._began, range(self.size)) if self.size > 1 else None
        waits_for: tuple[str, float, Sequence[int]] | None = self._comm.meter.waits_for
        return waits_for

    def _check(self, purpose: str, ranks: Sequence[int]) -> None:
        """End the job if this wait can have no end, or has lasted for too long."""
        if self._leaving is not None:
            # The others may have much to do yet.
            if self._waited > self.timeout and (silent := self._late(ranks).silent):
                self._give_up(purpose, _named("silent", silent))
            return
        if self._waited < 2 * self._pause:
            return
        limit = self.timeout if self._comm is not None else max(self.timeout, START)
        if self._waited <= limit:
            # Of this host only: in the folder of the run every rank would look at the beat of every other.
            left = self._late(ranks, everywhere=False).left
            if left and any(beat.age + beat.seconds > self._pause for beat in left):
                self._give_up(purpose, _named(_LEFT, left))
            return
        late = self._late(ranks)
        # Where ranks of a host see only each other, those speak first that know the rank in question.
        if late.known or self._waited > limit + 3 * self._pause:
            self._give_up(purpose, late.text)

    def _late(self, ranks: Sequence[int], everywhere: bool = True) -> _Late:
        beats: dict[int, Heartbeat] = {}
        for folder in (self._host, self._run if everywhere else None):
            for beat in [] if folder is None else read_heartbeats(folder):
                ours = beat.job in ("", self._token) and beat.age < time.perf_counter() - self._began + 60
                if ours and (beat.rank not in beats or beat.age < beats[beat.rank].age):
                    beats[beat.rank] = beat
        sees_all = self._run is not None or len(beats) < self._local_size or self._local_size == self.size
        return _Late([beats.get(m, m) for m in ranks if m != self.rank], 3 * self._pause, sees_all)

    def news(self) -> str:
        """Of whom it is known that they are gone, in words."""
        late = self._late(range(self.size))
        gone = [beat for beat in late.there if beat.host == platform.node() and not lives(beat.process)]
        return "; ".join(filter(None, (_named(_LEFT, late.left), _named("gone", gone), _named("silent", late.silent))))

    def _write(self, activity: str, seconds: float) -> None:
        with self._writing:  # the last word in a run's folder is to be the last
            for folder in (self._host, self._run):
                if folder is not None:
                    self._write_to(folder, activity, seconds)

    def _write_to(self, folder: Path, activity: str, seconds: float) -> None:
        if folder != self._host and _lock(folder) not in (self._holder, ""):
            return  # on a node that the scheduler has lost: another attempt speaks for this rank now
        beat: dict[str, Any] = {"rank": self.rank, "host": platform.node(), "pid": os.getpid(), "activity": activity}
        beat |= {"seconds": seconds, "told": self._told, "job": self._token}
        with suppress(OSError):  # a full disk is no reason to end
            text = json.dumps({**beat, **self._said()}) + "\n"
            write_atomically(folder / "ranks" / f"{self.rank:04d}.json", text, lasting=False)

    def _said(self) -> dict[str, Any]:
        return not_begun() if self._comm is None else self._comm.meter.said()

    def _give_up(self, purpose: str, whom: str) -> None:
        waits = self._waits()
        if waits is None or waits[1] != self._since:
            return  # the message came while beats were read
        self._told = _GAVE_UP + (whom.removeprefix("not waiting: ") or "a rank that nobody knows")
        self._write(f"waited for {purpose}", self._waited)
        self._end(
            f"rank {self.rank} of {self.size} on {platform.node()} has waited {self._waited:.0f} s for "
            f"{purpose} (comm_timeout is {self.timeout:g}): ending the job on all ranks; "
            + (whom or "no rank is known not to wait")
            + f"; itself at step {self._said()['step']}"
        )

    def _end(self, line: str) -> None:
        # Should the backend's abort hang: from no Python thread, which may have to wait for a call of C.
        faulthandler.dump_traceback_later(10, exit=True, file=os.open(os.devnull, os.O_WRONLY))
        say(line, sys.stderr)
        with suppress(Exception):
            if self._comm is not None:
                self._comm.abort(1)
        os._exit(1)


class _Late:
    """What may keep a message from coming, by the beats of those that it is waited for.

    Args:
        beats: of the others, or the number of a rank that has given none.
        old: seconds after which a beat says more by its age than by its words.
        sees_all: whether a rank without a beat has not begun; else it may be on another host.
    """

    def __init__(self, beats: Sequence[Heartbeat | int], old: float, sees_all: bool) -> None:
        given = [beat for beat in beats if isinstance(beat, Heartbeat)]
        self._absent = [beat for beat in beats if isinstance(beat, int)]
        self._sees_all = sees_all
        self.left = [beat for beat in given if beat.told == _LEFT]
        self.there = there = [beat for beat in given if beat not in self.left]
        self.silent = sorted((beat for beat in there if beat.age > old), key=lambda beat: -beat.age)
        heard = [beat for beat in there if beat.age <= old]
        waiting = [beat for beat in heard if beat.told.startswith(_GAVE_UP) or beat.activity.startswith("waits")]
        self._busy = [beat for beat in heard if beat not in waiting]
        self._waiting = waiting

    @property
    def known(self) -> bool:
        """Whether others could know no more."""
        return bool(self.left or self.silent or self._busy) or self._sees_all

    @property
    def text(self) -> str:
        """All that is known, in words."""
        absent = ", ".join(map(str, self._absent))
        if absent:
            absent = f"no sign of life of rank {absent}" if self._sees_all else f"unknown on this host: rank {absent}"
        told = [
            _named(_LEFT, self.left),
            absent,
            _named("silent", self.silent),
            _named("not waiting", self._busy),
        ]
        if not any(told):
            where = "; ".join(f"rank {s.rank} on {s.host} at step {s.step} {s.activity}" for s in self._waiting)
            told.append(f"all wait, so their steps or calls differ: {where}" if where else "")
        return "; ".join(filter(None, told))


def _named(what: str, beats: Sequence[Heartbeat]) -> str:
    whom = "; ".join(
        f"rank {s.rank} on {s.host} at step {s.step}"
        + (f" {s.activity}, heard of {s.age:.0f} s ago" if what in ("silent", "not waiting") else "")
        for s in beats
    )
    return f"{what}: {whom}" if whom else ""


def lives(process: int) -> bool:
    """Whether there is such a process on this host."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _lock(folder: Path) -> str:
    """Who holds a run's folder."""
    with suppress(OSError):
        return (folder / "lock.json").read_text(encoding="utf-8", errors="replace")
    return ""


def read_heartbeats(folder: Path) -> list[Heartbeat]:
    """The last heartbeats of all ranks of the run in ``folder``, in order of rank; damaged ones are left out."""
    place = folder / "ranks"
    if not place.is_dir():
        return []
    now = clock_of(place)
    beats = []
    for file in sorted(place.glob("[0-9]*.json")):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError):
            found = json.loads(file.read_bytes())
            beat = Heartbeat(
                rank=int(found["rank"]),
                host=str(found["host"]),
                step=int(found["step"]),
                activity=str(found["activity"]),
                seconds=float(found["seconds"]),
                used=float(found["used"]),
                training=float(found["training"]),
                age=max(0.0, now - file.stat().st_mtime),
                told=str(found.get("told", "")),
                job=str(found.get("job", "")),
                process=int(found.get("pid", 0)),
            )
            beats.append(beat)
    return beats


def ending_of(summary: dict[str, Any] | None, beats: Sequence[Heartbeat]) -> str:
    """How a run that nobody works on any more came to its end, or to its interruption.

    Args:
        summary: what ``summary.json`` holds, if there is one.
        beats: of its ranks.
    """
    if summary is not None:
        cause = f" by {summary['cause']}" if "cause" in summary else ""
        host = f" on {summary['host']}" if "host" in summary else ""
        where = f" (rank {summary['rank']}{host})" if cause and "rank" in summary else ""
        return f"{summary.get('state', 'ended')}{cause}{where}"
    for beat in beats:
        if beat.told.startswith(_GAVE_UP):
            return f"ended by rank {beat.rank} on {beat.host}, which {beat.told}"
    silent = [beat for beat in beats if not beat.told]
    if beats and not silent:
        told = sorted({beat.told for beat in beats})
        return f"ended by {', '.join(told)} before its ranks had saved, the first of them at step {beats[0].step}"
    # Where others had time for a last word, all who left none; else the one that was silent for longest.
    first = silent if len(silent) < len(beats) else sorted(silent, key=lambda beat: -beat.age)[:1]
    whom = ", ".join(f"rank {s.rank} on {s.host} at step {s.step}" for s in first)
    return f"died without a word, killed or lost with its host: first {whom}" if first else ""


def clock_of(folder: Path) -> float:
    """The time by the file system's own clock, which hosts share; by this host's where nothing can be written."""
    probe = folder / f".clock.{platform.node()}.{os.getpid()}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        with suppress(OSError):  # not made
            probe.unlink()
