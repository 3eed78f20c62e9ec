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
from typing import Any

from .checkpoint import check_world, saved_world
from .config import Config
from .errors import ConfigError
from .launch import job_name, restarts
from .log import is_finished, new_folder, say, write_atomically
from .parsing import flatten
from .reading import parse_settings, read_object, read_text
from .watch import clock_of, ending_of, read_signs

#: Seconds between signs of life of the job that holds a folder, and without one after which it counts as dead.
BEAT, DEAD = 5.0, 60.0
#: May differ when a run goes on: what says where and how fast, but not what.
_FREE = ("run.resume", "run.dir", "comm_timeout", "data.stage", "data.workers", "data.start_method")
#: In a run's folder.
_FILES = (
    *("config.yaml", "environment.json", "summary.json", "metrics.jsonl", "center.pt", "trace.json", "lock.json"),
    *("STOP", "checkpoints/latest"),
)
_FOLDERS = (".", "checkpoints", "ranks")


def check_unchanged(folder: Path, configuration: str, allowed: Sequence[str] = ()) -> None:
    """Raise ``ConfigError`` if the run in ``folder`` had another configuration.

    Args:
        folder: of a run.
        configuration: YAML, as it would be now.
        allowed: dotted keys that may differ; a section's name stands for all of its keys.
    """
    file = folder / "config.yaml"
    text = read_text(file)
    if text is None:
        return  # killed before it was written
    then, now = (flatten(parse_settings(yaml, str(file))) for yaml in (text, configuration))
    for key in dict.fromkeys([*then, *now]):
        if then.get(key) != now.get(key) and not any(key == a or key.startswith(f"{a}.") for a in (*_FREE, *allowed)):
            was = then.get(key, f"left out (is {file} whole?)")
            raise ConfigError(
                f"{key} is {now.get(key)}: must be {was}, as it was when {folder} began; give the run "
                f"another name, or allow this with --allow-change {key}"
            )


def check_kinds(folder: Path) -> None:
    """Raise ``ConfigError`` if one of a run's files is a folder, or one of its folders a file."""
    for name in _FILES:
        if (folder / name).is_dir():
            raise ConfigError(f"{folder / name} is a folder: must be a file; remove it, or give another run.name")
    for name in _FOLDERS:
        if os.path.lexists(folder / name) and not (folder / name).is_dir():
            raise ConfigError(f"{folder / name} is no folder: must be one; remove it, or give another run.name")


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

    def check(self, world_size: int | None = None) -> None:
        """Find out whether ``open`` could work, and whether the run could go on; makes nothing that stays.

        Args:
            world_size: of the ranks that are to go on with it; None where they may be any number.

        Raises:
            ConfigError: it could not.
        """
        if not self._resumes:
            new_folder(self._config.run.dir, self._name, self._numbered).rmdir()
            return
        try:
            check_kinds(self.path)
            if self.path.is_dir():
                check_unchanged(self.path, self._config.text, self._allowed)
                saved = saved_world(self.path / "checkpoints")
                if world_size is not None and saved is not None:
                    check_world(world_size, saved, self.path)
            else:  # under another name: its own another job may be making at this moment
                new_folder(self._config.run.dir, f".{self._name}.{os.getpid()}", numbered=True).rmdir()
        except OSError as error:
            raise ConfigError(f"run.name is {self._name}: its folder cannot be used ({error})") from None

    def open(self) -> Path | None:
        """Make the folder, or find it, and hold it until ``close``; None where another job has finished the run.

        Raises:
            ConfigError: another job is at work there, or the folder cannot be used.
        """
        self.path = new_folder(self._config.run.dir, self._name, self._numbered, may_exist=self._resumes)
        try:
            self._lock = Lock(self.path, f"job {job_name()}" if job_name() else "a process without a job", restarts())
            if self.finished:  # by the job whose end was waited for
                say(f"finished   {self.path}, by another job meanwhile")
                return None
            self._say_how_it_ended()
        except OSError as error:
            raise ConfigError(f"run.name is {self._name}: its folder cannot be used ({error})") from None
        return self.path

    def _say_how_it_ended(self) -> None:
        try:
            summary = read_object(self.path / "summary.json")
        except ConfigError as error:
            say(f"before     {error}")
            return
        if ended := ending_of(summary, read_signs(self.path)):
            say(f"before     {ended}")

    def close(self) -> None:
        """Let others have it."""
        if self._lock is not None:
            self._lock.release()


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
        while not self._taken(job, restarts):
            pass
        threading.Thread(target=self._beat, name="hpc_grawa-lock", daemon=True).start()

    def _taken(self, job: str, restarts: int) -> bool:
        """Try to get it; of several that wait for one job's end, one does."""
        try:
            with self._file.open("x", encoding="utf-8") as file:
                file.write(self._content)
        except FileExistsError:
            if not self._await_death(job, restarts):
                return False
            write_atomically(self._file, self._content)
            time.sleep(0.5)  # in which the last of those who found the same job dead has written
            return self._is_ours()
        return True

    def _holder(self) -> dict[str, Any]:
        """What is known of who holds it: nothing while that is being written, or if it is damaged."""
        with suppress(OSError, ValueError, RecursionError):
            found = json.loads(self._file.read_bytes())
            return found if isinstance(found, dict) else {}
        return {}

    def _await_death(self, job: str, restarts: int) -> bool:
        """Wait until its holder is dead or was started again as this job; False if it was released meanwhile."""
        seen, first, said, began = None, 0.0, False, time.monotonic()
        with suppress(FileNotFoundError):
            while True:
                now, touched = clock_of(self._file.parent), self._touched()
                holder, age = self._holder(), now - touched
                # By this host's clock too, as a damaged time may lie in the future.
                if age >= DEAD or time.monotonic() - began >= DEAD:
                    return True
                whose = f"{holder.get('job', 'another job')} on {holder.get('host')} (process {holder.get('pid')})"
                if holder.get("job") == job and holder.get("restarts", 0) != restarts:
                    return True
                if holder != seen:  # the one before has released it, and another was quicker
                    seen, first, began = holder, self._touched(), time.monotonic()
                # One of whom nothing is known gives no signs: what is newer is the file of another, still empty too.
                if holder and touched > first:
                    name = self._file.parent.name
                    raise ConfigError(
                        f"run.name is {name}: {whose} is at work in {self._file.parent}, its last sign of life "
                        f"{max(age, 0):.0f} s old; wait for its end, cancel it, or give another run.name"
                    )
                if not said and age > 2 * BEAT:
                    say(f"waiting    up to {DEAD - age:.0f} s for {whose}, silent for {age:.0f} s")
                    said = True
                time.sleep(1)
        return False

    def _touched(self) -> float:
        return self._file.lstat().st_mtime

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            self._beat_once()

    def _beat_once(self) -> None:
        with suppress(OSError):
            if self._is_ours():
                os.utime(self._file)
            elif job := self._holder().get("job"):  # not while nobody claims it, as where it is damaged
                self._give_up(job)

    def _give_up(self, job: str) -> None:
        same = job == json.loads(self._content)["job"]
        print(f"{self._file} is {job}'s now: {'stopped' if same else 'ending'}", file=sys.stderr, flush=True)
        if not same:
            os._exit(2)
        # Started again elsewhere: if this rank ended, srun would have SLURM end the step of that number, there.
        os.kill(os.getpid(), signal.SIGSTOP)
        self._ended.set()

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
