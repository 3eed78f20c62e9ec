"""How a run ends before its budget is used: told to, or failing."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..averaging.control import Control
from ..comm import Communicator
from ..errors import LostContact
from ..launch import limit_near
from ..runs.log import Log, write_atomically
from ..schedules import RunFacts
from .worker import Worker

#: Seconds between looks for a file ``STOP``.
POLL_EVERY = 1.0

#: How a run ended that was told to end, by what told it: SLURM sends USR2 ahead of the time limit.
_STATES = {"SIGUSR2": "timed out", "SIGTERM": "preempted", "SIGINT": "interrupted", "STOP": "stopped"}


class Ending:
    """A run's early end: what is wished for on one rank, all do at the same step.

    Args:
        control: carries the wish to all ranks.
        log: says so.
        folder: of the run, on rank 0; a file ``STOP`` in it is a wish, for which a signal is to blame that it names.
    """

    def __init__(self, control: Control, log: Log, folder: Path | None) -> None:
        self._control, self._log, self._folder = control, log, folder
        self._polled = time.monotonic()
        #: What ends the run, on the rank that noticed it.
        self.cause: str | None = None
        self._state = ""
        self._told = False

    def heed(self, cause: str) -> None:
        """Have all ranks save and end once a control word has said so."""
        if self.cause is None:
            # SLURM sends TERM for the limit too, where nothing came ahead of it.
            self._state = "timed out" if cause == "SIGTERM" and limit_near() else _STATES[cause]
            self.cause = cause
        self._control.wants_stop = True

    def poll(self) -> None:
        """Look for the file now and then, and say once what is going to happen."""
        if self._folder is not None and time.monotonic() - self._polled > POLL_EVERY:
            self._polled = time.monotonic()
            if (held := _stop_file(self._folder)) is not None:
                self.heed(held if held in _STATES else "STOP")
        if self.cause is not None and not self._told:
            self._told = True
            again = ", Ctrl-C again: now" if self.cause == "SIGINT" else ""
            self._log.say(f"ending     {self.cause}: all ranks save within two control words, then end{again}")

    def summary(self, worker: Worker, saved: int | None) -> dict[str, Any]:
        """What there is to say of a run that is to go on later, written to ``summary.json``; all ranks must call it.

        Args:
            worker: this rank's.
            saved: step of the checkpoint to go on from; None if there is none.
        """
        own = f"{self.cause}:{self._state}" if self.cause else ""
        causes = [found.decode() for found in worker.comm.gather_bytes(own.encode(), "evaluate")]
        rank, (cause, _, state) = next((m, found.partition(":")) for m, found in enumerate(causes) if found)
        facts = worker.facts
        found = {
            "state": state,
            "cause": cause,
            "rank": rank,
            "name": self._folder.name if self._folder else None,
            "method": worker.config.method_name,
            "world_size": worker.comm.size,
            "steps": facts.step,
            "training_seconds": worker.clock.seconds,
        }
        if self._folder is not None:
            stop = self._folder / "STOP"
            with suppress(OSError):  # not there, or not ours to remove
                stop.rmdir() if stop.is_dir() else stop.unlink()
            try:
                write_atomically(self._folder / "summary.json", json.dumps(found, indent=1) + "\n")
            except OSError as error:
                self._log.say(f"ended      {self._folder / 'summary.json'} cannot be written ({error.strerror})")
        self._log.close()
        again = "the same command" if worker.config.run.resume == "auto" else "--run.resume auto"
        where = f"saved at step {facts.step}; {again} goes on"
        if saved != facts.step:
            start = "the start" if saved is None else f"step {saved}"
            where = f"not saved at step {facts.step}: {again} goes on from {start}"
        self._log.say(f"ended      {state} by {cause} (rank {rank}), {where}")
        return found


def _stop_file(folder: Path) -> str | None:
    """What a file ``STOP`` says; None where there is none, or a file system that does not answer now."""
    file = folder / "STOP"
    try:
        file.lstat()
    except OSError:
        return None
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:  # it may be another user's, or a folder
        return ""


@contextmanager
def failure_recorded(place: str, comm: Communicator, facts: RunFacts) -> Iterator[None]:
    """Within the block the first rank that fails leaves word of it in ``summary.json``; not one that lost another."""
    try:
        yield
    except LostContact:
        raise
    except BaseException as error:
        if place:
            state = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            found = {
                "state": state,
                "cause": f"{type(error).__name__}: {error}",
                "rank": comm.rank,
                "host": platform.node(),
                "world_size": comm.size,
                "steps": facts.step,
            }
            file = Path(place) / "summary.json"
            temporary = file.with_name(f".{file.name}.rank-{comm.rank}")
            with suppress(OSError):
                try:
                    temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
                    os.link(temporary, file)  # whole or not at all, and never over the word of the first
                finally:
                    temporary.unlink(missing_ok=True)
        raise
