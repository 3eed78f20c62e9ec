"""A run's folder is one job's at a time."""

from __future__ import annotations

import json
import os
import platform
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import wrong
from ..screen import say
from .heartbeat import clock_of
from .log import write_atomically

#: Seconds between heartbeats of the job that holds a folder, without one after which it counts as dead, and after which
#: it does by the age of its last one alone: clocks of hosts, by which some file systems date, may be minutes apart.
BEAT, DEAD, LONG_DEAD = 5.0, 60.0, 600.0


class Lock:
    """A folder's lock: a file that the job which holds it touches every few seconds, from a thread of its own.

    A job that gives no heartbeat is waited for until it counts as dead; one that SLURM has started again takes over
    from itself, as what is left of it may sit on a node that SLURM cannot reach. Whoever finds that it lost its lock
    does nothing more.

    Args:
        folder: of a run.
        job: names this job to others.
        restarts: how often it was started again.

    Raises:
        ConfigError: another job is at work there.
    """

    def __init__(self, folder: Path, job: str, restarts: int = 0) -> None:
        self._file = folder / "lock.json"
        self._ended = threading.Event()
        own = {"job": job, "restarts": restarts, "host": platform.node(), "pid": os.getpid()}
        self._content = json.dumps(own) + "\n"
        while not self._taken(job, restarts):
            pass
        threading.Thread(target=self._beat, name="hpc_grawa-lock", daemon=True).start()

    def _taken(self, job: str, restarts: int) -> bool:
        """Try to get it; of several that wait for one job's end, one does."""
        try:
            with self._file.open("x", encoding="utf-8") as file:
                try:
                    file.write(self._content)
                    file.flush()
                except OSError:  # no room: an empty one would be taken for another's
                    self._file.unlink()
                    raise
        except FileExistsError:
            heeds = self._await_death(job, restarts)
            if heeds is None:
                return False
            write_atomically(self._file, self._content)
            time.sleep(heeds)
            return self._is_ours()
        return True

    def _holder(self) -> dict[str, Any]:
        """What is known of who holds it: nothing while that is being written, or if it is damaged."""
        with suppress(OSError, ValueError, RecursionError):
            found = json.loads(self._file.read_bytes())
            return found if isinstance(found, dict) else {}
        return {}

    def _await_death(self, job: str, restarts: int) -> float | None:
        """Wait until its holder is dead or was started again as this job.

        Returns:
            Seconds in which whoever else wants to write there has done so, or has seen who holds it now; None if it was
            released meanwhile.
        """
        seen, first, said, began = None, 0.0, False, time.monotonic()
        with suppress(FileNotFoundError):
            while True:
                now, touched = clock_of(self._file.parent), self._touched()
                holder, age = self._holder(), now - touched
                if holder != seen:  # the one before has released or lost it, and another was quicker
                    seen, first, began = holder, self._touched(), time.monotonic()
                waited = time.monotonic() - began
                # By this host's clock alone, too, as a damaged time may lie in the future.
                if age >= LONG_DEAD or (age >= DEAD and waited > 2 * BEAT) or waited >= DEAD:
                    return 0.5
                whose = f"{holder.get('job', 'another job')} on {holder.get('host')} (process {holder.get('pid')})"
                if holder.get("job") == job and holder.get("restarts", 0) != restarts:
                    return BEAT + 1
                # One of whom nothing is known gives no beats: what is newer is the file of another, still empty too.
                if holder and touched != first:
                    name = self._file.parent.name
                    raise wrong(
                        "run.name",
                        name,
                        f"{whose} is at work in {self._file.parent}, its last sign of life "
                        f"{max(age, 0):.0f} s old; wait for its end, cancel it, or give another run.name",
                    )
                if not said and age > 2 * BEAT:
                    say(f"waiting    up to {max(DEAD - age, 2 * BEAT):.0f} s for {whose}, silent for {age:.0f} s")
                    said = True
                time.sleep(1)
        return None

    def _touched(self) -> float:
        return self._file.lstat().st_mtime

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            self._beat_once()

    def _beat_once(self) -> None:
        with suppress(OSError):
            if self._is_ours():
                os.utime(self._file)
            elif (holder := self._holder()).get("job"):  # not while nobody claims it, as where it is damaged
                self._give_up(holder)

    def _give_up(self, holder: dict[str, Any]) -> None:
        own = json.loads(self._content)
        elsewhere = holder["job"] == own["job"] and holder.get("restarts", 0) != own["restarts"]
        say(f"{self._file} is {holder['job']}'s now: {'stopped' if elsewhere else 'ending'}", sys.stderr)
        if elsewhere:  # if this rank ended, srun would have SLURM end the step of that number, where the job is now
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(0.5)  # another thread may be the one that is told, and this one goes on until all are stopped
        os._exit(2)  # woken, as by whoever ends what is left

    def _is_ours(self) -> bool:
        with suppress(FileNotFoundError):
            return self._file.read_bytes() == self._content.encode()
        return False

    def release(self) -> None:
        """Let others go on."""
        self._ended.set()
        with suppress(OSError):
            if self._is_ours():
                self._file.unlink()
