"""A run is its folder: whether to make it or to go on with it, and that only one job at a time does."""

from __future__ import annotations

import json
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from jsonargparse import get_loader

from .config import Config
from .errors import ConfigError
from .launch import job_name, restarts
from .log import is_finished, new_folder, say, write_atomically
from .parsing import flatten
from .watch import clock_of, ending_of, read_signs

#: Seconds between signs of life of the job that holds a folder, and without one after which it counts as dead.
BEAT, DEAD = 5.0, 60.0
#: May differ when a run goes on: what says where and how fast, but not what.
_FREE = ("run.resume", "run.dir", "comm_timeout", "data.stage", "data.workers", "data.start_method")


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
    then, now = (flatten(get_loader("yaml")(text)) for text in (file.read_text(encoding="utf-8"), configuration))
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
        self._lock = Lock(self.path, f"job {job_name()}" if job_name() else "a process without a job", restarts())
        summary = self.path / "summary.json"
        if ended := ending_of(json.loads(summary.read_text()) if summary.is_file() else None, read_signs(self.path)):
            say(f"before     {ended}")
        summary.unlink(missing_ok=True)
        return self.path

    def close(self) -> None:
        """Let others have it."""
        if self._lock is not None:
            self._lock.release()

    def _new(self) -> Path:
        return new_folder(self._config.run.dir, self._name, self._numbered)


class Lock:
    """A folder's lock: a file that the job which holds it touches every few seconds, from a thread of its own.

    A job that gives no sign of life is waited for until it counts as dead; one that SLURM has started again takes over
    from itself at once, as what is left of it may sit on a node that SLURM cannot reach. Whoever finds that it
    lost its lock does nothing more.

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
        try:
            with self._file.open("x") as file:
                file.write(self._content)
        except FileExistsError:
            self._await_end(job, restarts)
            write_atomically(self._file, self._content)
        threading.Thread(target=self._beat, name="hpc_grawa-lock", daemon=True).start()

    def _await_end(self, job: str, restarts: int) -> None:
        first, said = 0.0, False
        with suppress(FileNotFoundError):  # released meanwhile
            while (age := clock_of(self._file.parent) - self._file.stat().st_mtime) < DEAD:
                holder = json.loads(self._file.read_text() or "{}")
                whose = f"{holder.get('job', 'another job')} on {holder.get('host')} (process {holder.get('pid')})"
                if holder.get("job") == job and holder.get("restarts", 0) != restarts:
                    return
                first, latest = first or self._file.stat().st_mtime, self._file.stat().st_mtime
                if latest > first:
                    name = self._file.parent.name
                    raise ConfigError(
                        f"run.name is {name}: {whose} is at work in {self._file.parent}, its last sign of life "
                        f"{age:.0f} s old; wait for its end, cancel it, or give another run.name"
                    )
                if not said and age > 2 * BEAT:
                    say(f"waiting    up to {DEAD - age:.0f} s for {whose}, silent for {age:.0f} s")
                    said = True
                time.sleep(1)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            with suppress(OSError):
                if not self._is_ours():
                    self._give_up(json.loads(self._file.read_text())["job"])
                os.utime(self._file)

    def _give_up(self, job: str) -> None:
        same = job == json.loads(self._content)["job"]
        print(f"{self._file} is {job}'s now: {'stopped' if same else 'ending'}", file=sys.stderr, flush=True)
        if not same:
            os._exit(2)
        # Started again elsewhere: if this rank ended, srun would have SLURM end the step of that number, there.
        os.kill(os.getpid(), signal.SIGSTOP)
        self._ended.set()

    def _is_ours(self) -> bool:
        return self._file.read_text() == self._content

    def release(self) -> None:
        """Let others go on."""
        self._ended.set()
        with suppress(OSError):
            if self._is_ours():
                self._file.unlink()
