"""Signs of life: what every rank of a run does, in its folder for others to read; and the end of a wait without end."""

from __future__ import annotations

import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .comm import Communicator
from .log import write_atomically

#: Seconds between two signs of life.
BEAT = 5.0


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
    """

    rank: int
    host: str
    step: int
    activity: str
    seconds: float
    used: float
    training: float
    age: float

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
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hpc_grawa-watch", daemon=True)
        if self._folder is not None:
            with suppress(OSError):
                self._folder.mkdir(exist_ok=True)
        self._thread.start()

    def close(self, activity: str) -> None:
        """Leave a last word, and stop."""
        self._ended.set()
        self._thread.join()
        self._write(activity, 0.0)

    def _watch(self) -> None:
        pause = min(BEAT, self._timeout / 4)
        while not self._ended.wait(pause):
            waits = self._comm.meter.waits_for
            if waits is None:
                self._write("computes", 0.0)
                continue
            purpose, since = waits
            seconds = time.perf_counter() - since
            self._write(f"waits for {purpose}", seconds)
            if seconds > self._timeout:
                self._give_up(purpose, seconds)

    def _write(self, activity: str, seconds: float) -> None:
        if self._folder is None:
            return
        rank = self._comm.rank
        sign = {"rank": rank, "host": platform.node(), "pid": os.getpid(), "activity": activity, "seconds": seconds}
        with suppress(OSError):  # a full disk is no reason to end
            write_atomically(self._folder / f"{rank:04d}.json", json.dumps({**sign, **self._facts()}) + "\n")

    def _give_up(self, purpose: str, seconds: float) -> None:
        others = [] if self._folder is None else read_signs(self._folder.parent)
        late = [s for s in others if s.rank != self._comm.rank and not s.activity.startswith("waits")]
        whom = "; ".join(
            f"rank {s.rank} on {s.host} at step {s.step} {s.activity}, heard of {s.age:.0f} s ago" for s in late
        )
        print(
            f"rank {self._comm.rank} of {self._comm.size} on {platform.node()} has waited {seconds:.0f} s for "
            f"{purpose} (run.comm_timeout is {self._timeout:g}): ending the job on all ranks; "
            + (f"not waiting: {whom}" if whom else "no rank is known not to wait"),
            file=sys.stderr,
            flush=True,
        )
        self._comm.abort(1)


def read_signs(folder: Path) -> list[Sign]:
    """The last signs of life of all ranks of the run in ``folder``, in order of rank."""
    place = folder / "ranks"
    if not place.is_dir():
        return []
    now = clock_of(place)
    signs = []
    for file in sorted(place.glob("[0-9]*.json")):
        with suppress(OSError, ValueError):  # being replaced
            found = json.loads(file.read_text())
            known = {name: found[name] for name in ("rank", "host", "step", "activity", "seconds", "used", "training")}
            signs.append(Sign(**known, age=max(0.0, now - file.stat().st_mtime)))
    return signs


def clock_of(folder: Path) -> float:
    """The time by the file system's own clock, which hosts share; by this host's where nothing can be written."""
    probe = folder / f".clock.{platform.node()}.{os.getpid()}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        probe.unlink(missing_ok=True)
