"""Several methods and seeds under one budget, one run after the other on the same ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .comm import Communicator
from .config import CLASS_SECTIONS, Config, parse, read_settings
from .errors import ConfigError
from .log import new_folder, open_run


@dataclass
class Comparison:
    """The runs of a comparison, in the order they are made: all methods of a seed, then the next seed.

    Attributes:
        folder: holds one run folder per method and seed.
        names: of the run folders.
        configs: of the runs.
        target: accuracy for the time to target, or None.
    """

    folder: Path
    names: list[str]
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
        speaks: bool,
    ) -> Comparison:
        """Read the command line; a recipe's ``compare`` section may hold methods (with settings of theirs), seeds, target.

        Raises:
            ConfigError: no methods, or a value that cannot be.
        """
        settings, options = read_settings(words)
        section = settings.get("compare", {})
        if not isinstance(section, dict) or set(section) - {"methods", "seeds", "target"}:
            raise ConfigError(f"compare is {section}: must have the keys methods, seeds, target")
        theirs = section.get("methods", {})
        theirs = theirs if isinstance(theirs, dict) else dict.fromkeys(theirs, {})
        chosen = methods.split(",") if methods else list(theirs)
        if not chosen:
            raise ConfigError("methods is missing: give --methods LGRAWA,EASGD or a recipe with a compare section")
        numbers = seeds.split(",") if seeds else section.get("seeds", [settings.get("run", {}).get("seed", 0)])
        if not all(str(n).strip().isdigit() for n in numbers):
            raise ConfigError(f"seeds is {seeds or numbers}: must be whole numbers of 0 or more, separated by commas")
        for what, values in (("methods", chosen), ("seeds", numbers)):
            if len(set(map(str, values))) < len(values):
                raise ConfigError(f"{what} is {','.join(map(str, values))}: must not name one twice")
        first = parse([*words, "--method", chosen[0]], program, speaks)
        folder = Path(first.run.dir) / (first.run.name or "comparison")
        names, configs = [], []
        for seed in map(int, numbers):
            for method in chosen:
                own = _as_options(theirs.get(method) or {})
                name = f"{method.rpartition('.')[2]}-{seed}"
                identity = [f"--run.seed={seed}", f"--run.name={name}", f"--run.dir={folder}"]
                names.append(name)
                configs.append(parse([*_first(words, options), f"--method={method}", *own, *options, *identity], program, speaks))
        return cls(folder, names, configs, section.get("target") if target is None else target)

    def check_folders(self) -> None:
        """See that finished runs of this comparison were made by the same configuration.

        Raises:
            ConfigError: one was not; the message names the first line that differs.
        """
        for name, config in zip(self.names, self.configs, strict=True):
            run = self._finished(name)
            if run is None:
                continue
            there, wanted = (run / "config.yaml").read_text().splitlines(), config.text.splitlines()
            if there != wanted:
                old, new = next((a, b) for a, b in zip(there + [""], wanted + [""], strict=False) if a != b)
                raise ConfigError(
                    f"run.name is {self.folder.name}: {run} was made with '{old.strip()}', now it is '{new.strip()}'; "
                    f"choose another --run.name, or remove that folder"
                )

    def train(self, comm: Communicator) -> list[Path]:
        """Make every run that is not there yet; rank 0 decides which and gets the folders."""
        from .train import fit

        folders: list[Path] = []
        done = [self._finished(name) for name in self.names] if comm.rank == 0 else []
        flags = comm.gather_bytes(bytes(run is not None for run in done))[0]
        for number, (name, config) in enumerate(zip(self.names, self.configs, strict=True)):
            title = f"{name} ({number + 1} of {len(self.names)})"
            if flags[number]:
                if comm.rank == 0:
                    print(f"\n{title} is in {done[number]} already", flush=True)
                    folders.append(done[number])  # type: ignore[arg-type]
                continue
            folder = None
            if comm.rank == 0:
                print(f"\n{title}", flush=True)
                folder = self._new(name)
                open_run(folder, config.text, comm.size, comm.backend)
                folders.append(folder)
            fit(config, comm, folder)
        return folders

    def _attempts(self, name: str) -> list[Path]:
        return [path for path in (self.folder / name, *sorted(self.folder.glob(f"{name}.*"))) if path.is_dir()]

    def _finished(self, name: str) -> Path | None:
        return next((path for path in self._attempts(name) if (path / "summary.json").is_file()), None)

    def _new(self, name: str) -> Path:
        # An attempt that was cut off keeps its folder; the next one gets a number.
        attempts = len(self._attempts(name))
        return new_folder(str(self.folder), f"{name}.{attempts + 1}" if attempts else name)


def _first(words: Sequence[str], options: Sequence[str]) -> list[str]:
    """The ``--config`` words of a command line."""
    rest, configs = list(options), []
    for word in words:
        if rest and word == rest[0]:
            rest.pop(0)
        else:
            configs.append(word)
    return configs


def _as_options(settings: dict[str, Any], prefix: str = "") -> list[str]:
    """Nested or dotted settings as command-line options."""
    options = []
    for key, value in settings.items():
        if isinstance(value, dict):
            options += _as_options(value, f"{prefix}{key}.")
        elif prefix == "" and key in CLASS_SECTIONS:
            options.append(f"--{key}={value}")
        else:
            options.append(f"--{prefix}{key}={value}")
    return options


def report(runs: Sequence[Path], target: float | None, csv: Path | None, figure: Path | None) -> None:
    """Print one table of the runs; write it as CSV and draw the figure where asked, and say where they are."""
    from .report import draw, markdown, read_run, rows, write_csv

    records = [read_run(path) for path in runs]
    lines = rows(records, target=target)
    print("\n" + markdown(lines))
    if csv is not None:
        write_csv(lines, csv)
        print(f"\ntable   {csv}")
    if figure is not None:
        draw(records, figure, target=target)
        print(f"figure  {figure}")
