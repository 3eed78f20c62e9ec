"""Several methods and seeds under one budget, one run after the other on the same ranks."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from ..comm import Communicator, Meter
from ..data import Data
from ..errors import ConfigError, Damaged, NonFinite, wrong
from ..runs.checkpoint import saved_world
from ..runs.log import is_finished, is_over, new_folder, write_atomically
from ..runs.reading import parse_settings, read_object
from ..runs.record import PLACE, flatten, read_run
from ..screen import columns, counted, say
from ..training.config import Config, renamed
from ..training.resume import RunPlace
from .classes import find_class, short
from .parsing import parse
from .settings import class_section, read_settings, split_config

#: What a comparison sets itself, run by run.
_SINGLE = ("method", "method.class_path", "run.seed", "run.resume")
_SECTION = ("methods", "seeds", "target", "grid", "grids", "networks")


class Planned(NamedTuple):
    """A run of a comparison.

    Attributes:
        words: of ``hpc-grawa train``.
        config: what they say; ``run.name`` is the name of the run's folder.
    """

    words: list[str]
    config: Config


@dataclass
class Comparison:
    """The runs of a comparison, in their order: of a seed all methods and settings, then the next seed, then networks.

    Attributes:
        folder: holds one run folder per method, setting and seed.
        plan: the runs.
        target: value of the metric for the time to target, or None.
    """

    folder: Path
    plan: list[Planned]
    target: float | None

    @classmethod
    def read(
        cls,
        methods: str | None,
        seeds: str | None,
        target: float | None,
        grid: str | None,
        words: Sequence[str],
        program: str,
    ) -> Comparison:
        """Read the command line.

        A recipe's ``compare`` section may hold ``methods`` (names, of variants too, or for each name what stands in the
        recipe's ``methods`` else), ``seeds``, ``target`` and ``grid`` (lists of values by key); the command line wins.
        A setting in the grid that a method does not have is left out for this method. It may also hold ``networks``,
        such as ``{"1gbit,100us": [LGRAWA, DataParallel]}``: which of the methods run once more over an emulated one;
        and ``grids``, a grid for each of some methods; where there is a ``grid``, too, it stands in the place of what
        has several values in them.

        Raises:
            ConfigError: no methods, or a value that cannot be.
        """
        files, options = split_config(words)
        settings = read_settings(files)
        section = settings.get("compare", {})
        if not isinstance(section, dict) or set(section) - set(_SECTION):
            raise wrong("compare", section, f"must have the keys {', '.join(_SECTION)}")
        if single := [f"--{key}={value}" for key, value in options if key in _SINGLE]:
            raise ConfigError(
                f"{single[0]} is for a single run: must be left out of a comparison, which has --methods and --seeds, "
                f"and goes on by itself"
            )
        names = section.get("methods") if methods is None else methods.split(",")
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise wrong("compare.methods", names, "must be a list of names ([LGRAWA, EASGD])")
        if not names:
            raise ConfigError("methods is missing: give --methods LGRAWA,EASGD or a recipe with a compare section")
        given = section.get("seeds", [settings.get("run", {}).get("seed", 0)])
        if not isinstance(given, list) or not given:
            raise wrong("compare.seeds", given, "must be a list of numbers ([1, 2])")
        if not isinstance(section.get("target", 0.0), int | float | None):
            raise wrong("compare.target", section["target"], "must be a number")
        numbers = [str(n) for n in given] if seeds is None else seeds.split(",")
        if not all(re.fullmatch("[0-9]{1,19}", number) for number in numbers):
            raise wrong("seeds", ",".join(numbers), "must be whole numbers of 0 or more, separated by commas")
        numbers = [str(int(number)) for number in numbers]
        networks = section.get("networks") or {}
        known = section.get("methods") or names
        if not isinstance(networks, dict) or not all(
            isinstance(network, str) and isinstance(again, list) and all(name in known for name in again)
            for network, again in networks.items()
        ):
            raise wrong("compare.networks", networks, "must hold those of the methods ({'1gbit,100us': [LGRAWA]})")
        for what, values in (("methods", [short(name) for name in names]), ("seeds", numbers)):
            if len(set(values)) < len(values):
                raise wrong(what, ",".join(values), "must not name one twice")

        axes = _axes(section.get("grid", {}) if grid is None else grid)
        kinds = {name: _class(files, name) for name in names}
        points = {name: list(product(*_of_method(axes, kinds[name], kinds.values()).values())) for name in names}
        grids = section.get("grids", {})
        if not isinstance(grids, dict):
            raise wrong("compare.grids", grids, "must hold grids of methods ({LGRAWA: {method.period: [16, 32]}})")
        asked, fixed = dict(axes), dict[str, set[str]]()
        for name in grids:
            _class(files, name)  # else a misspelt one would have no grid in silence
            if name not in names:
                continue
            of_this = _axes(grids[name])
            fixed[name] = {key for key, values in of_this.items() if len(values) == 1}
            if grid is not None:  # it takes the place of what varies; what has one value makes a method what it is
                of_this = {key: of_this[key] for key in of_this if key in fixed[name]}
                if both := next((key for key in of_this if key in asked), None):
                    raise wrong(
                        "grid", grid, f"must not hold {both}, which makes {name} what it is: {of_this[both][0]}"
                    )
                of_this |= {key: asked[key] for key in _of_method(asked, kinds[name], kinds.values())}
            axes |= of_this
            points[name] = list(product(*([(key, value) for value in of_this[key]] for key in of_this)))

        def run(name: str, *identity: str) -> Planned:
            own = [*words, f"--method={name}", *identity]
            return Planned(own, parse(own, program))

        first = parse([*words, f"--method={names[0]}"], program).run
        folder = Path(first.dir) / (first.name or "comparison")
        plan = []
        for network, some in {None: names, **networks}.items():
            for seed in map(int, numbers):
                for name in (name for name in names if name in some):
                    for point in points[name]:
                        shown = [pair for pair in point if pair[0] not in fixed.get(name, ())]
                        told = (_title(key, value, axes) for key, value in shown)
                        title = "-".join([short(name), *told, str(seed), *([] if network is None else [network])])
                        own = [f"--{key}={value}" for key, value in point]
                        own += [] if network is None else [f"--network={network}"]
                        plan.append(run(name, *own, f"--run.seed={seed}", f"--run.name={title}", f"--run.dir={folder}"))
        made: dict[str, Data] = {}
        for _, config in plan:  # one of each, where a class holds its examples
            settings_of_data = json.dumps(parse_settings(config.text, "config")["data"], sort_keys=True)
            config.data = made.setdefault(settings_of_data, config.data)
        folders = [str(config.run.name) for _, config in plan]
        if twice := [name for name in folders if folders.count(name) > 1]:
            fix = f"gives two runs the name {twice[0]}: must have one of them in a comparison of its own"
            raise wrong("grid", section.get("grid") if grid is None else grid, fix)
        return cls(folder, plan, section.get("target") if target is None else target)

    def check_folders(self, world_size: int | None) -> None:
        """See that runs of this comparison that are there were made by the same configuration and ranks.

        Args:
            world_size: of the ranks; None where they are not known here, but started elsewhere: a run that was cut off
                then goes on in its folder, and must do so over the network that it began over.

        Raises:
            ConfigError: one was not (the message names the first line that differs), or no folder can be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise wrong("run.dir", self.folder.parent, f"cannot be used ({error.strerror})") from None
        for _, config in self.plan:
            run = self.folder_of(config)
            if run is None:
                begun = self.folder / str(config.run.name)
                known = read_object(begun / "environment.json") if world_size is None else None
                if known is not None and (network := known.get("network")) != config.network:
                    raise self._mixed(begun, f"network: {network}", f"network: {config.network}")
                continue
            record = read_run(run)
            # Resumed by itself, it may have gone on on other ranks, or over another network.
            there = renamed(record.config) | {"ranks": (ranks := record.ranks), "network": record.network}
            now = renamed(flatten(parse_settings(config.text, "config")))
            now |= {"ranks": ranks if world_size is None else str(world_size)}
            for key in dict.fromkeys([*now, *there]):
                if key in ("backend", *PLACE):
                    continue
                if there.get(key) != now.get(key):
                    short = key.rpartition(".")[2]
                    old, new = (
                        f"{n.get(key)} ranks" if key == "ranks" else f"{short}: {n.get(key)}" for n in (there, now)
                    )
                    raise self._mixed(run, old, new)

    def _mixed(self, run: Path, old: str, new: str) -> ConfigError:
        fix = f"{run} was made with '{old}', now it is '{new}'; must be another --run.name, or remove that folder"
        return wrong("run.name", self.folder.name, fix)

    def train(self, comm: Communicator) -> dict[str, Any]:
        """Make every run that is not over, until one is told to end; rank 0 decides which.

        Returns:
            The summary of the one that was told to end, on all ranks; else the state ``finished``.
        """
        done = [self.folder_of(config) for _, config in self.plan] if comm.rank == 0 else []
        there = comm.gather_bytes(bytes(run is not None for run in done))[0]
        for number, (_, config) in enumerate(self.plan):
            if comm.rank == 0:
                self._announce(number, done[number])
            if there[number]:
                continue
            try:
                ended = self._fit(_resumed(config, str(config.run.name)), comm)
            except NonFinite as error:
                if comm.rank == 0:
                    say(f"{config.run.name} has diverged: {error}", sys.stderr)
                continue
            if ended["state"] != "finished":
                return ended
        return {"state": "finished"}

    def _fit(self, config: Config, comm: Communicator) -> dict[str, Any]:
        from ..training.loop import fit

        place: RunPlace | None = None

        def folder() -> Path | None:
            nonlocal place
            place = self._place(config, comm.size)
            return place.open()

        try:
            return fit(config, comm, new_folder=None if comm.rank else folder)
        finally:
            if place is not None:
                place.close()
            # The meter knows the run, whose models, hooks and closures hold each other: their memory is the next one's.
            comm.meter = Meter()
            gc.collect()

    def _place(self, config: Config, ranks: int) -> RunPlace:
        """Where a run goes on that was cut off with a checkpoint, by these settings and ranks; else a new folder.

        What is there otherwise stays as it is: the new folder gets a number.
        """
        for path in self._attempts(config):
            place = RunPlace(_resumed(config, path.name))
            with suppress(ConfigError, Damaged, OSError):
                network = (read_object(path / "environment.json") or {}).get("network")
                if network == config.network and saved_world(path / "checkpoints") is not None:
                    place.check(ranks)
                    return place
        return RunPlace(_resumed(config, new_folder(str(self.folder), str(config.run.name), numbered=True).name))

    def launch(self, launcher: Sequence[str]) -> int:
        """Start every run that is not there yet as a job step of its own; one that was cut off goes on.

        Signals to end are passed on.

        Args:
            launcher: words before the program, such as ``srun --mpi=pmix``.

        Returns:
            The exit status: 0, that of the last run that failed, or of the one that was told to end.
        """
        if not launcher or shutil.which(launcher[0]) is None:
            raise wrong("launcher", " ".join(launcher), "must begin with a program, which cannot be found")
        failed = 0
        for number, (words, config) in enumerate(self.plan):
            done = self.folder_of(config)
            self._announce(number, done)
            if done is not None:
                continue
            status = _started([*launcher, sys.executable, "-m", "hpc_grawa", "train", *words, "--run.resume=auto"])
            ended = (read_object(self.folder / str(config.run.name) / "summary.json") or {}).get("state")
            if status and (status in (75, 130) or ended in ("timed out", "preempted", "stopped")):
                return status
            if status:
                say(f"{config.run.name} has ended with status {status}", sys.stderr)
                failed = status
        return failed

    def submit(self, arguments: Sequence[str]) -> str:
        """Submit one job array over the runs that are not there yet, with the options of all in a file ``plan-*.txt``.

        Tasks read their line when they start, days later perhaps: each plan has a file of its own, named by content.

        Args:
            arguments: of ``sbatch``: its options, then the script, which is given the plan; the task's line in it
                (from 0) are a recipe and options of ``hpc-grawa train``.

        Returns:
            What was submitted, in words.

        Raises:
            ConfigError: the first options are not ``--config`` and a recipe, there is no room for the plan, or sbatch
                is not there or has refused.
        """
        text = "".join(f"{_line(_recipe_first(words))}\n" for words, _ in self.plan)
        left = [number for number, (_, config) in enumerate(self.plan) if self.folder_of(config) is None]
        if not left:
            return f"nothing to submit: all {len(self.plan)} runs are in {self.folder}"
        if not arguments:
            raise wrong("submit", "", "must be options of sbatch, if any, and the script, slurm/compare.sh")
        if shutil.which("sbatch") is None:
            raise ConfigError("sbatch cannot be found: submit where SLURM is")
        file = self.folder / f"plan-{hashlib.sha256(text.encode()).hexdigest()[:8]}.txt"
        try:
            write_atomically(file, text)
        except OSError as error:
            fix = f"must be a folder where {file} can be written ({error.strerror})"
            raise wrong("run.dir", self.folder.parent, fix) from None
        command = ["sbatch", f"--array={','.join(map(str, left))}", *arguments, str(file)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise ConfigError(f"sbatch cannot be started: {error.strerror}") from None
        if done.returncode:
            refused = " ".join(done.stderr.split())
            raise wrong("submit", shlex.join(arguments), f"must be what sbatch takes ({refused})")
        return f"{done.stdout.strip()}: {len(left)} of {len(self.plan)} runs; hpc-grawa table {self.folder} shows them"

    def listed(self) -> str:
        """All runs and how far each is, and how long the rest will train at most, where that is limited in seconds."""
        lines, left = [], []
        for _, config in self.plan:
            path = self.folder_of(config)
            begun = [path] if path else [path for path in self._attempts(config) if path.is_dir()]
            lines.append(f"  {config.run.name}  {_how_far(max(begun, key=os.path.getmtime)) if begun else 'not begun'}")
            left += [] if path else [config.budget.seconds]
        limits = [seconds for seconds in left if seconds is not None]
        total = sum(limits)
        time = f"{total / 3600:.1f} hours" if total >= 3600 else f"{total:.0f} s"
        most = f", at most {time} of training" if limits and len(limits) == len(left) else ""
        return "\n".join([f"{self.folder}: {counted(len(self.plan), 'run')}, {len(left)} to go{most}", *lines])

    @property
    def over(self) -> list[Path]:
        """The folders of the runs that are: finished, or diverged."""
        return [path for _, config in self.plan if (path := self.folder_of(config))]

    @property
    def diverged(self) -> bool:
        """Whether a run has."""
        return any(not is_finished(path) for path in self.over)

    @property
    def missing(self) -> int:
        """Runs that are not."""
        return len(self.plan) - len(self.over)

    def report(self) -> None:
        """Print one table of the runs that are over; beside them write ``table.csv`` and, if it can, ``figure.png``."""
        from ..report.figure import check_drawable

        figure, missing = self.folder / "figure.png", ""
        try:
            check_drawable(figure)
        except ConfigError as error:
            missing = str(error)
        report(self.over, self.target, self.folder / "table.csv", None if missing else figure)
        if missing:
            print(f"figure  none: {missing}")

    def _announce(self, number: int, done: Path | None) -> None:
        config = self.plan[number].config
        link = f" over an emulated network of {config.network}" if config.network else ""
        title = f"{config.run.name} ({number + 1} of {len(self.plan)}){link}"
        print(f"\n{title}" + (f" is in {done} already" if done is not None else ""), flush=True)

    def folder_of(self, config: Config) -> Path | None:
        """The folder of a run, if it is over: of its first attempt that is."""
        return next((path for path in self._attempts(config) if is_over(path)), None)

    def _attempts(self, config: Config) -> list[Path]:
        name = str(config.run.name)
        return [self.folder / name, *sorted(self.folder.glob(f"{name}.*"))]


def _how_far(run: Path) -> str:
    """``finished``, or in what state a run is and how many steps it has made."""
    try:
        status = read_run(run).status
    except (ConfigError, Damaged):
        return "begun, and damaged"
    steps = status.get("steps")
    return str(status["state"]) + (f" after {steps:,} steps" if steps and status["state"] != "finished" else "")


def _resumed(config: Config, name: str) -> Config:
    """A run of a comparison, which goes on where it was cut off, in the folder of that name."""
    return replace(config, run=replace(config.run, name=name, resume="auto"))


def _axes(grid: object) -> dict[str, list[str]]:
    """The values of each key of a grid: ``method.period=8,16;method.pull=.3,.5``, or lists by key.

    Raises:
        ConfigError: it is neither.
    """
    must = "must be KEY=VALUE,VALUE;KEY=VALUE,VALUE, or in a file {KEY: [VALUE, VALUE]}"
    if isinstance(grid, str):
        pairs = [part.partition("=") for part in grid.split(";") if part.strip()]
        found = {key.strip().removeprefix("--"): [v.strip() for v in values.split(",")] for key, _, values in pairs}
        if len(found) < len(pairs):
            raise wrong("grid", grid, "must not name a key twice")
    elif isinstance(grid, dict) and all(isinstance(values, list) for values in grid.values()):
        found = {str(key): [json.dumps(v) if not isinstance(v, str) else v for v in grid[key]] for key in grid}
    else:
        raise wrong("compare.grid", grid, must)
    for key, values in found.items():
        if not key or not all(values) or not values or len(set(map(_meant, values))) < len(values):
            raise wrong("grid", grid, f"{must}, with different values")
        if key in _SINGLE or key.startswith("run."):
            raise wrong("grid", grid, f"{key} is what a comparison sets itself")
    return found


def _meant(value: str) -> str | float:
    """The number that a value is: .1 and .10 are one."""
    try:
        return float(value)
    except ValueError:
        return value


def _class(files: Sequence[str], name: str) -> type:
    """The class of a method, or of a variant that the files name."""
    path = read_settings(files, class_section("method", name))["method"]["class_path"]
    return find_class("method", path)


def _of_method(axes: dict[str, list[str]], method: type, methods: Iterable[type]) -> dict[str, list[tuple[str, str]]]:
    """Pairs of key and value for each axis that a method has; a key that no method has stays, and is told as wrong."""

    def has(kind: type, key: str) -> bool:
        section, _, setting = key.partition(".")
        return section != "method" or setting.partition(".")[0] in {field.name for field in fields(kind)}

    return {
        key: [(key, value) for value in values]
        for key, values in axes.items()
        if has(method, key) or not any(has(kind, key) for kind in methods)
    }


def _recipe_first(words: Sequence[str]) -> list[str]:
    """The first ``--config``, without that word, then the others."""
    for at, word in enumerate(words):
        if word == "--config" or word.startswith("--config="):
            after = at + 1 + (word == "--config")
            recipe = words[after - 1].removeprefix("--config=")
            return [recipe, *words[:at], *words[after:]]
    raise ConfigError("submit needs a recipe, which a job's script is given first: --config RECIPE")


def _line(words: Sequence[str]) -> str:
    """Words for a shell on one line, in ASCII: all else, as the bytes that they were given in."""
    # What shlex.join leaves outside of single quotes is ASCII and can be printed.
    return "".join(chr(b) if 32 <= b < 127 else f"'$'\\{b:03o}''" for b in os.fsencode(shlex.join(words)))


def _title(key: str, value: str, axes: dict[str, list[str]]) -> str:
    """What a folder's name says of a setting."""
    last = short(key)
    name = key if sum(short(other) == last for other in axes) > 1 else last
    return f"{name}{re.sub(r'[^A-Za-z0-9.+_]+', '_', value)}"


def _started(command: Sequence[str]) -> int:
    """Run a command, which gets the signals to end that this process gets; returns its exit status."""
    process = subprocess.Popen(command)
    signals = (signal.SIGTERM, signal.SIGUSR2)
    before = [signal.signal(number, lambda number, _: process.send_signal(number)) for number in signals]
    try:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:  # which a terminal has given to the command too
                process.wait()
                return 130
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def report(runs: Sequence[Path], target: float | None, csv: Path | None, figure: Path | None) -> None:
    """Print one table of the runs; write it as CSV and draw the figure where asked, and say where they are.

    Args:
        runs: run folders, or folders of run folders.
        target: value of the metric for the time to target, or None.
        csv: where to write the numbers.
        figure: where to draw.
    """
    from ..report import draw, markdown, rows, write_csv

    records = [read_run(run) for run in runs_of(runs)]
    lines = rows(records, target=target)
    print("\n" + markdown(lines, columns()))
    if csv is not None:
        write_csv(lines, csv)
        print(f"\ntable   {csv}")
    if figure is not None:
        draw(records, figure, target=target)
        print(f"figure  {figure}")


def runs_of(paths: Iterable[Path]) -> list[Path]:
    """The runs in several folders, each once."""
    found: dict[Path, Path] = {}
    for path in paths:
        for run in runs_in(path):
            found.setdefault(run.resolve(), run)
    return list(found.values())


def runs_in(path: Path) -> list[Path]:
    """The runs in a folder of runs; the folder itself otherwise."""
    inner = sorted(log.parent for log in path.glob("*/metrics.jsonl"))
    return inner if inner and not (path / "metrics.jsonl").is_file() else [path]
