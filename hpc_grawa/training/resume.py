"""A run is its folder: whether to make it or to go on with it, and that only one job at a time does."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError, Damaged, wrong
from ..launch import job_name, restarts
from ..runs.checkpoint import check_world, saved_world
from ..runs.heartbeat import ending_of, read_heartbeats
from ..runs.lock import Lock
from ..runs.log import is_finished, new_folder
from ..runs.reading import parse_settings, read_object, read_text
from ..runs.record import PLACE, flatten
from ..screen import say
from .config import Config, renamed

#: May differ when a run goes on.
FREE = (*PLACE, "network")
#: In place of a setting that a run's configuration does not have.
_LEFT_OUT = "left out"
#: In a run's folder.
_FILES = (
    *("config.yaml", "environment.json", "summary.json", "metrics.jsonl", "center.pt", "trace.json", "lock.json"),
    *("STOP", "checkpoints/latest"),
)
_FOLDERS = (".", "checkpoints", "ranks")


def changed(folder: Path, configuration: str) -> dict[str, list[Any]]:
    """By dotted key what a setting was when the run in ``folder`` began, and what it is now; what may differ left out.

    Args:
        folder: of a run.
        configuration: YAML, as it is now.
    """
    file = folder / "config.yaml"
    text = read_text(file)
    if text is None:
        return {}  # killed before it was written
    then, now = (renamed(flatten(parse_settings(yaml, str(file)))) for yaml in (text, configuration))
    keys = [key for key in dict.fromkeys([*then, *now]) if then.get(key) != now.get(key) and not _within(key, FREE)]
    return {key: [then.get(key, _LEFT_OUT), now.get(key)] for key in keys}


def check_unchanged(folder: Path, configuration: str, allowed: Sequence[str] = ()) -> None:
    """Raise ``ConfigError`` if the run in ``folder`` had another configuration.

    Args:
        folder: of a run.
        configuration: YAML, as it would be now.
        allowed: dotted keys that may differ; a section's name stands for all of its keys.
    """
    allowed = [*allowed, *renamed(dict.fromkeys(allowed))]
    for key, (was, now) in changed(folder, configuration).items():
        if not _within(key, allowed):
            doubt = f" (is {folder / 'config.yaml'} whole?)" if was == _LEFT_OUT else ""
            raise wrong(
                key,
                now,
                f"must be {was}{doubt}, as it was when {folder} began; give the run "
                f"another name, or allow this with --allow-change {key}",
            )


def _within(key: str, names: Sequence[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


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
        run, method = config.run, config.method_name
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
            Damaged: what the run has written there cannot be read.
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
            raise wrong("run.name", self._name, f"its folder cannot be used ({error})") from None

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
            raise wrong("run.name", self._name, f"its folder cannot be used ({error})") from None
        return self.path

    def _say_how_it_ended(self) -> None:
        try:
            summary = read_object(self.path / "summary.json")
        except Damaged as error:
            say(f"before     {error}")
            return
        if ended := ending_of(summary, read_heartbeats(self.path)):
            say(f"before     {ended}")

    def close(self) -> None:
        """Let others have it."""
        if self._lock is not None:
            self._lock.release()
