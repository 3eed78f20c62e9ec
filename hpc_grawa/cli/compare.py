"""Several methods and seeds under one budget, one run after the other on the same ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..comm import Communicator
from ..errors import ConfigError, wrong
from ..runs.log import is_finished, new_folder
from ..runs.reading import parse_settings, read_object, read_text
from ..runs.record import flatten
from ..screen import columns
from ..training.config import Config, renamed
from .classes import short
from .parsing import parse
from .settings import read_settings, split_config

#: What a comparison sets itself, run by run.
_SINGLE = ("method", "method.class_path", "run.seed")


@dataclass
class Comparison:
    """The runs of a comparison, in their order: all methods of a seed, then the next seed; then over other networks.

    Attributes:
        folder: holds one run folder per method and seed.
        configs: of the runs; ``run.name`` is the name of the run's folder.
        target: value of the metric for the time to target, or None.
    """

    folder: Path
    configs: list[Config]
    target: float | None

    @classmethod
    def read(
        cls,
        methods: str | None,
        seeds: str | None,
        target: float | None,
        words: Sequence[str],
        program: str,
    ) -> Comparison:
        """Read the command line.

        A recipe's ``compare`` section may hold ``methods`` (names, or for each name what stands in the recipe's
        ``methods`` else), ``seeds`` and ``target``; the command line wins. It may also hold ``networks``, such as
        ``{"1gbit,100us": [LGRAWA, DataParallel]}``: which of the methods run once more over an emulated one.

        Raises:
            ConfigError: no methods, or a value that cannot be.
        """
        files, options = split_config(words)
        settings = read_settings(files)
        section = settings.get("compare", {})
        if not isinstance(section, dict) or set(section) - {"methods", "seeds", "target", "networks"}:
            raise wrong("compare", section, "must have the keys methods, seeds, target, networks")
        if single := [f"--{key}={value}" for key, value in options if key in _SINGLE]:
            raise ConfigError(f"{single[0]} is for a single run: must be --methods or --seeds in a comparison")
        names = methods.split(",") if methods else section.get("methods")
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise wrong("compare.methods", names, "must be a list of names ([LGRAWA, EASGD])")
        if not names:
            raise ConfigError("methods is missing: give --methods LGRAWA,EASGD or a recipe with a compare section")
        given = section.get("seeds", [settings.get("run", {}).get("seed", 0)])
        if not isinstance(given, list):
            raise wrong("compare.seeds", given, "must be a list of numbers ([1, 2])")
        if not isinstance(section.get("target", 0.0), int | float | None):
            raise wrong("compare.target", section["target"], "must be a number")
        numbers = seeds.split(",") if seeds else [str(n) for n in given]
        if not all(number.isdigit() for number in numbers):
            raise wrong("seeds", ",".join(numbers), "must be whole numbers of 0 or more, separated by commas")
        networks = section.get("networks") or {}
        known = section.get("methods") or names
        if not isinstance(networks, dict) or not all(
            isinstance(again, list) and all(name in known for name in again) for again in networks.values()
        ):
            raise wrong("compare.networks", networks, "must hold those of the methods ({'1gbit,100us': [LGRAWA]})")
        for what, values in (("methods", [short(name) for name in names]), ("seeds", numbers)):
            if len(set(values)) < len(values):
                raise wrong(what, ",".join(values), "must not name one twice")

        def run(name: str, *identity: str) -> Config:
            return parse([*words, f"--method={name}", *identity], program)

        first = run(names[0]).run
        folder = Path(first.dir) / (first.name or "comparison")
        configs = [
            run(name, f"--run.seed={seed}", f"--run.name={short(name)}-{seed}", f"--run.dir={folder}")
            for seed in map(int, numbers)
            for name in names
        ]
        for network, again in networks.items():
            configs += [
                run(
                    name,
                    f"--run.seed={seed}",
                    f"--run.name={short(name)}-{seed}-{network}",
                    f"--run.dir={folder}",
                    f"--network={network}",
                )
                for seed in map(int, numbers)
                for name in names
                if name in again
            ]
        return cls(folder, configs, section.get("target") if target is None else target)

    def check_folders(self, world_size: int) -> None:
        """See that finished runs of this comparison were made by the same configuration and ranks.

        Raises:
            ConfigError: one was not (the message names the first line that differs), or no folder can be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise wrong("run.dir", self.folder.parent, f"cannot be used ({error.strerror})") from None
        for config in self.configs:
            run = self._finished(config)
            if run is None:
                continue
            ranks = (read_object(run / "environment.json") or {}).get("world_size")
            texts = (read_text(run / "config.yaml") or "", ranks), (config.text, world_size)
            there, now = (
                renamed(flatten(parse_settings(text, str(run / "config.yaml")))) | {"ranks": size}
                for text, size in texts
            )
            # Resumed by itself, it may have gone on over another.
            there["network"] = (read_object(run / "summary.json") or {}).get("network")
            for key in dict.fromkeys([*now, *there]):
                if there.get(key) != now.get(key):
                    short = key.rpartition(".")[2]
                    old, new = (
                        f"{n.get(key)} ranks" if key == "ranks" else f"{short}: {n.get(key)}" for n in (there, now)
                    )
                    raise wrong(
                        "run.name",
                        self.folder.name,
                        f"{run} was made with '{old}', now it is '{new}'; must be "
                        f"another --run.name, or remove that folder",
                    )

    def train(self, comm: Communicator) -> list[Path]:
        """Make every run that is not there yet; rank 0 decides which and gets the folders of all."""
        from ..training.loop import fit

        done = [self._finished(config) for config in self.configs] if comm.rank == 0 else []
        there = comm.gather_bytes(bytes(run is not None for run in done))[0]
        for number, config in enumerate(self.configs):
            title = f"{config.run.name} ({number + 1} of {len(self.configs)})"
            if comm.rank == 0:
                link = f" over an emulated network of {config.network}" if config.network else ""
                print(f"\n{title}{link}" + (f" is in {done[number]} already" if there[number] else ""), flush=True)
            if not there[number]:
                # A run that was cut off keeps its folder; the next attempt gets a numbered one.
                folder = partial(new_folder, str(self.folder), str(config.run.name), numbered=True)
                if fit(config, comm, new_folder=None if comm.rank else folder)["state"] != "finished":
                    break
        return [path for config in self.configs if (path := self._finished(config))] if comm.rank == 0 else []

    def _finished(self, config: Config) -> Path | None:
        name = str(config.run.name)
        attempts = [self.folder / name, *sorted(self.folder.glob(f"{name}.*"))]
        return next((path for path in attempts if is_finished(path)), None)


def report(runs: Sequence[Path], target: float | None, csv: Path | None, figure: Path | None) -> None:
    """Print one table of the runs; write it as CSV and draw the figure where asked, and say where they are.

    Args:
        runs: run folders, or folders of run folders.
        target: value of the metric for the time to target, or None.
        csv: where to write the numbers.
        figure: where to draw.
    """
    from ..report import draw, markdown, read_run, rows, write_csv

    records = [read_run(run) for path in runs for run in _runs_in(path)]
    lines = rows(records, target=target)
    print("\n" + markdown(lines, columns()))
    if csv is not None:
        write_csv(lines, csv)
        print(f"\ntable   {csv}")
    if figure is not None:
        draw(records, figure, target=target)
        print(f"figure  {figure}")


def _runs_in(path: Path) -> list[Path]:
    """The runs in a folder of runs; the folder itself otherwise."""
    inner = sorted(log.parent for log in path.glob("*/metrics.jsonl"))
    return inner if inner and not (path / "metrics.jsonl").is_file() else [path]
