"""Signs of life: what every rank of a run does, in its folder for others to read; and the end of a wait without end."""

from __future__ import annotations

import json
import os
import platform
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .comm import Communicator
from .log import write_atomically

#: Seconds between two signs of life.
BEAT = 5.0


#: How the last word of a rank begins that has waited too long for another.
_GAVE_UP = "gave up waiting: "


@dataclass(frozen=True)
class Sign:
    """A rank's last sign of life.

    Attributes:
        rank: of the world.
        host: where it runs or ran.
        step: local steps made.
        activity: what it was doing, in words.
        seconds: it had been doing it for.
        used: the share of the budget.
        training: seconds of training.
        age: of the sign in seconds, by the file system's clock; what a living rank's never exceeds is a few ``BEAT``.
        told: the signal that told it to end, or how it ended; empty for a rank that fell silent without a word.
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

    @property
    def alive(self) -> bool:
        """Whether it has been heard of lately."""
        return self.age < 6 * BEAT


class Watch:
    """Writes this rank's signs of life from a thread of its own, and ends the job where a message never comes.

    Args:
        folder: of the run, which all ranks see; None writes nothing.
        comm: whose waits are watched.
        facts: what there is to say: step, share of the budget, seconds of training.
        timeout: longest wait for a message, in seconds.
    """

    def __init__(
        self, folder: Path | None, comm: Communicator, facts: Callable[[], dict[str, Any]], timeout: float
    ) -> None:
        self._folder = None if folder is None else folder / "ranks"
        self._comm, self._facts, self._timeout = comm, facts, timeout
        self._ended, self._told = False, ""
        self._heard, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        self._in_main = threading.current_thread() is threading.main_thread()
        if self._in_main:
            # Python's handlers wait while a rank waits in C for a message: only this tells of a signal at once.
            signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="hpc_grawa-watch", daemon=True)
        if self._folder is not None:
            with suppress(OSError):
                self._folder.mkdir(exist_ok=True)
                if comm.rank == 0:
                    for file in self._folder.glob("[0-9]*.json"):
                        if file.stem.isdecimal() and int(file.stem) >= comm.size:  # of an attempt with more ranks
                            file.unlink(missing_ok=True)
        self._holder = self._lock()
        self._thread.start()

    def close(self, activity: str) -> None:
        """Leave a last word, and stop."""
        self._ended = True
        os.write(self._wake, b"\0")
        self._thread.join()
        if self._in_main:
            signal.set_wakeup_fd(-1)
        os.close(self._wake)
        os.close(self._heard)
        self._told = activity
        self._write(activity, 0.0)

    def _watch(self) -> None:
        pause = min(BEAT, self._timeout / 4)
        ear = select.poll()
        ear.register(self._heard, select.POLLIN)
        while True:
            heard = os.read(self._heard, 100) if ear.poll(1000 * pause) else b""
            if self._ended:
                return
            if heard:
                self._told = self._told or signal.Signals(heard[0]).name
            waits = self._comm.meter.waits_for
            if waits is None:
                self._write(self._comm.meter.activity, 0.0)
                continue
            purpose, since = waits
            seconds = time.perf_counter() - since
            self._write(f"waits for {purpose}", seconds)
            if seconds > self._timeout:
                self._give_up(purpose, seconds)

    def _write(self, activity: str, seconds: float) -> None:
        if self._folder is None or self._lock() not in (self._holder, ""):
            return  # on a node that the scheduler has lost: another attempt speaks for this rank now
        rank = self._comm.rank
        sign = {"rank": rank, "host": platform.node(), "pid": os.getpid(), "activity": activity, "seconds": seconds}
        sign["told"] = self._told
        with suppress(OSError):  # a full disk is no reason to end
            write_atomically(self._folder / f"{rank:04d}.json", json.dumps({**sign, **self._facts()}) + "\n")

    def _lock(self) -> str:
        """Who holds the run's folder."""
        with suppress(OSError):
            return "" if self._folder is None else (self._folder.parent / "lock.json").read_text(errors="replace")
        return ""

    def _give_up(self, purpose: str, seconds: float) -> None:
        others = [] if self._folder is None else read_signs(self._folder.parent)
        late = [s for s in others if s.rank != self._comm.rank and not s.activity.startswith("waits")]
        whom = "; ".join(
            f"rank {s.rank} on {s.host} at step {s.step} {s.activity}, heard of {s.age:.0f} s ago" for s in late
        )
        self._told = _GAVE_UP + (whom or "a rank that nobody knows")
        self._write(f"waited for {purpose}", seconds)
        print(
            f"rank {self._comm.rank} of {self._comm.size} on {platform.node()} has waited {seconds:.0f} s for "
            f"{purpose} (comm_timeout is {self._timeout:g}): ending the job on all ranks; "
            + (f"not waiting: {whom}" if whom else "no rank is known not to wait"),
            file=sys.stderr,
            flush=True,
        )
        self._comm.abort(1)


def read_signs(folder: Path) -> list[Sign]:
    """The last signs of life of all ranks of the run in ``folder``, in order of rank; damaged ones are left out."""
    place = folder / "ranks"
    if not place.is_dir():
        return []
    now = clock_of(place)
    signs = []
    for file in sorted(place.glob("[0-9]*.json")):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError):
            found = json.loads(file.read_text())
            sign = Sign(
                rank=int(found["rank"]),
                host=str(found["host"]),
                step=int(found["step"]),
                activity=str(found["activity"]),
                seconds=float(found["seconds"]),
                used=float(found["used"]),
                training=float(found["training"]),
                age=max(0.0, now - file.stat().st_mtime),
                told=str(found.get("told", "")),
            )
            signs.append(sign)
    return signs


def ending_of(summary: dict[str, Any] | None, signs: Sequence[Sign]) -> str:
    """How a run that nobody works on any more came to its end, or to its interruption.

    Args:
        summary: what ``summary.json`` holds, if there is one.
        signs: of its ranks.
    """
    if summary is not None:
        cause = f" by {summary['cause']}" if "cause" in summary else ""
        host = f" on {summary['host']}" if "host" in summary else ""
        where = f" (rank {summary['rank']}{host})" if cause and "rank" in summary else ""
        return f"{summary.get('state', 'ended')}{cause}{where}"
    for sign in signs:
        if sign.told.startswith(_GAVE_UP):
            return f"ended by rank {sign.rank} on {sign.host}, which {sign.told}"
    silent = [sign for sign in signs if not sign.told]
    if signs and not silent:
        told = sorted({sign.told for sign in signs})
        return f"ended by {', '.join(told)} before its ranks had saved, the first of them at step {signs[0].step}"
    # Where others had time for a last word, all who left none; else the one that was silent for longest.
    first = silent if len(silent) < len(signs) else sorted(silent, key=lambda sign: -sign.age)[:1]
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
