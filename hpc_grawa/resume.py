"""A run is its folder: whether to make it or to go on with it, and that only one job at a time does."""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from jsonargparse import get_loader

from .config import Config
from .errors import ConfigError
from .launch import job_name
from .log import is_finished, new_folder, write_atomically
from .parsing import flatten
from .watch import clock_of

#: Seconds between signs of life of the job that holds a folder, and without one after which it counts as dead.
BEAT, DEAD = 5.0, 60.0
#: May differ when a run goes on.
_FREE = ("run.resume", "run.dir")


def check_unchanged(folder: Path, configuration: str, allowed: Sequence[str] = ()) -> None:
    """Raise ``ConfigError`` if the run in ``folder`` had another configuration.

    Args:
        folder: of a run.
        configuration: YAML, as it would be now.
        allowed: dotted keys that may differ; a section's name stands for all of its keys.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        return  # killed before it was written
    then, now = (flatten(get_loader("yaml")(text)) for text in (file.read_text(), configuration))
    for key in dict.fromkeys([*then, *now]):
        if then.get(key) != now.get(key) and not any(key == a or key.startswith(f"{a}.") for a in (*_FREE, *allowed)):
            raise ConfigError(
                f"{key} is {now.get(key)}: must be {then.get(key)}, as it was when {folder} began; give the run "
                f"another name, or allow this with --allow-change {key}"
            )


class RunPlace:
    """The folder that a configuration's run has, or is to have.

    Args:
        config: says its name, and whether a run may go on.
        allowed: keys of the configuration that may differ from those it began with.

    Raises:
        ConfigError: a run to be resumed has no name.
    """

    def __init__(self, config: Config, allowed: Sequence[str] = ()) -> None:
        run, method = config.run, type(config.method).__name__
        self._config, self._allowed = config, allowed
        self._resumes = run.resume == "auto"
        self._numbered = not self._resumes and run.name is None
        if self._resumes and run.name is None and job_name() is None:
            raise ConfigError("run.resume is auto: must be never without run.name, where SLURM gives the job no number")
        last = job_name() if self._resumes else time.strftime("%Y%m%d-%H%M%S")
        self._name = run.name or f"{method}-{last}"
        self._lock: Lock | None = None
        self.path = Path(run.dir) / self._name

    @property
    def finished(self) -> bool:
        """Whether a run to be resumed has come to its end."""
        return self._resumes and is_finished(self.path)

    def check(self) -> None:
        """Raise ``ConfigError`` if ``open`` could not work; makes nothing that stays."""
        if self._resumes and self.path.is_dir():
            check_unchanged(self.path, self._config.text, self._allowed)
        else:
            self._new().rmdir()

    def open(self) -> Path:
        """Make the folder, or find it, and hold it until ``close``."""
        resumed = self._resumes and self.path.is_dir()
        self.path = self.path if resumed else self._new()
        self._lock = Lock(self.path, f"job {job_name()}" if job_name() else "a process without a job")
        (self.path / "summary.json").unlink(missing_ok=True)  # of the attempt before
        return self.path

    def close(self) -> None:
        """Let others have it."""
        if self._lock is not None:
            self._lock.release()

    def _new(self) -> Path:
        return new_folder(self._config.run.dir, self._name, self._numbered)


class Lock:
    """A folder's lock: a file that the job which holds it touches every few seconds, from a thread of its own.

    Args:
        folder: of a run.
        job: names this job to others.

    Raises:
        ConfigError: another job is at work there.
    """

    def __init__(self, folder: Path, job: str) -> None:
        self._file = folder / "lock.json"
        self._ended = threading.Event()
        content = json.dumps({"job": job, "host": platform.node(), "pid": os.getpid()}) + "\n"
        try:
            with self._file.open("x") as file:
                file.write(content)
        except FileExistsError:
            age = self._age()
            if age < DEAD:
                holder = json.loads(self._file.read_text() or "{}")
                raise ConfigError(
                    f"run.name is {folder.name}: {holder.get('job', 'another job')} on {holder.get('host')} (process "
                    f"{holder.get('pid')}) is at work in {folder}, its last sign of life {age:.0f} s old; wait for its "
                    f"end, cancel it, or give another run.name"
                ) from None
            write_atomically(self._file, content)
        threading.Thread(target=self._beat, name="hpc_grawa-lock", daemon=True).start()

    def _age(self) -> float:
        return clock_of(self._file.parent) - self._file.stat().st_mtime

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            with suppress(OSError):
                os.utime(self._file)

    def release(self) -> None:
        """Let others go on."""
        self._ended.set()
        self._file.unlink(missing_ok=True)
