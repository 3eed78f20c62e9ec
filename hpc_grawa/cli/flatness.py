"""``hpc-grawa flatness``."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from ..comm import Communicator
from ..errors import require, wrong
from ..flatness.measure import MEASURES, Models, Settings, Subject, is_known, measure
from ..flatness.objective import Objective, Statistics
from ..launch import Slot
from ..runs.checkpoint import Checkpoints
from ..runs.log import Log, write_atomically
from ..runs.record import FLATNESS, group, read_flatness, read_run
from ..screen import counted, say, wrapped
from ..training.config import Config
from ..training.preflight import fail_together
from .compare import runs_of
from .finished import (
    CENTER,
    MEAN,
    FinishedRun,
    check_seen_alike,
    finished_config,
    is_finished,
    kept_models,
    not_kept,
)
from .gate import Parser
from .together import backend_line, set_threads, together

#: Beside a run: what Lanczos's method is to go on with.
FOLDER = "flatness"
#: Seconds between its checkpoints.
KEEP_EVERY = 60.0


def flatness(words: list[str], slot: Slot) -> None:
    """Say how flat the loss is around a run's models: spectrum of its Hessian, sharpness, width of the valley."""
    program, default = "hpc-grawa flatness", Settings(measures=("loss",))
    parser = Parser(prog=program, description=flatness.__doc__, allow_abbrev=False)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished runs, or folders of these")
    parser.add_argument(
        "--models", default=CENTER, help="some of center,mean,ranks: the ranks' own, their mean (center)"
    )
    parser.add_argument("--measures", default=",".join(MEASURES), help=f"some of {','.join(MEASURES)} (all)")
    parser.add_argument("--examples", type=int, default=2000, help="training examples, evenly spaced; 0: all (2000)")
    parser.add_argument(
        "--batch_size", type=int, default=500, help="examples per pass and rank (500; CPUs: 64 is faster)"
    )
    parser.add_argument("--double", action="store_true", help="compute in float64")
    parser.add_argument(
        "--statistics",
        choices=get_args(Statistics),
        default="model",
        help="BatchNorm's: the model's or a batch's (model; between models, for --landscape, always a batch's)",
    )
    texts = {
        "steps": "of Lanczos's method",
        "starts": "of it, for the spectral density",
        "samples": "of the trace's estimate",
        "rho": "of SAM's sharpness",
        "epsilon": "of Keskar's sharpness",
        "sigma": "of the low-pass filter",
        "lpf_samples": "of it",
        "kappa": "a valley ends where the loss is so many times the center's",
        "reach": "its end is looked for up to so many times a rank's distance",
        "seed": "of random vectors",
    }
    for name, text in texts.items():
        value = getattr(default, name)
        parser.add_argument(f"--{name}", type=type(value), default=value, help=f"{text} ({value:g})")
    parser.add_argument("--figure", type=Path, help="draw spectra and top eigenvalues to this file")
    parser.add_argument("--landscape", type=Path, help="draw the loss along lines and on a plane to this file")
    parser.add_argument("--points", type=int, default=21, help="of each line, and of each side of the plane (21)")
    parser.add_argument("--data.path", dest="data_path", help="where the data are now")
    parser.add_argument("--backend", default="auto", help="how ranks communicate")
    options = parser.parse_args(words)
    settings = Settings(measures=tuple(options.measures.split(",")), **{name: getattr(options, name) for name in texts})
    how = How(options.examples, options.batch_size, options.double, options.statistics)
    require(options.examples >= 0, "examples", options.examples, "at least 1, or 0 for all")
    require(0 <= settings.seed < 2**62, "seed", settings.seed, "a whole number of 0 or more")
    require(options.batch_size >= 1, "batch_size", options.batch_size, "at least 1")
    chosen = options.models.split(",")
    if set(chosen) - {CENTER, MEAN, "ranks"}:
        raise wrong("models", options.models, "must be some of center,mean,ranks")
    require(options.points >= 2, "points", options.points, "at least 2")
    for figure in (options.figure, options.landscape):
        if figure is not None:
            from ..report.figure import check_drawable

            check_drawable(figure)
    paths = runs_of(options.runs)
    named_here = {run.resolve() for run in options.runs}
    finished = [run for run in paths if run.resolve() in named_here or is_finished(run)]
    require(bool(finished), "runs", ", ".join(map(str, options.runs)), "folders of finished runs, or folders of these")
    configs = [finished_config(run, program, options.backend, options.data_path) for run in finished]
    for config in configs:
        config.data.check(1)
    for run in finished:  # before hours are spent on others
        kept, of = kept_models(run)
        if kept != of and (others := [what for what in chosen if what != CENTER]):
            raise not_kept(others[0], run, kept, of)
    if options.figure is not None and "spectrum" not in settings.measures:
        entries = [one for run in finished for several in read_flatness(run).values() for one in several]
        if not any(one.get("spectra") for one in entries):
            raise wrong("measures", options.measures, "must have spectrum, which --figure draws, and no run has yet")
    slot = dataclasses.replace(slot, tasks=1)  # one process is enough, however many the job is to have
    first_line = backend_line(configs[0], slot)
    set_threads(slot)
    with together(program, configs[0], slot, first_line) as comm:
        check_seen_alike(finished, comm)
        if comm.rank == 0 and len(finished) < len(paths):
            say(f"runs       {len(finished)} of {len(paths)}; the others are not finished")
        runs = dict(zip(finished, configs, strict=True))
        measure_runs(runs, settings, how, comm, slot, chosen, options.figure)
        if options.landscape is not None:
            from .landscape import landscape

            first, *others = runs
            begin = FinishedRun(first, runs[first], comm, slot, double=how.double)
            landscape(begin, others, how, comm, options.points, options.landscape)


class How(NamedTuple):
    """By which examples and in which numbers models are measured.

    Attributes:
        examples: of the training set, evenly spaced; 0: all.
        batch_size: examples per pass and rank.
        double: whether in float64.
        statistics: BatchNorm's, of the model or of a batch.
    """

    examples: int = 2000
    batch_size: int = 500
    double: bool = False
    statistics: Statistics = "model"

    def objective(self, finished: FinishedRun, comm: Communicator) -> Objective:
        """The loss of a run's model on its training examples."""
        config, limit = finished.config, self.examples or None
        data = finished.splits.train
        return Objective(finished.model, config.loss, data, comm, limit, self.batch_size, self.statistics)

    def said(self, objective: Objective, finished: FinishedRun) -> dict[str, Any]:
        """How it was measured, as it stands beside what was found."""
        batches = {"batch_size": self.batch_size, "ranks": objective.comm.size}  # which make the statistics
        return {
            "examples": objective.examples,
            "of": len(finished.splits.train),
            "dtype": str(objective.vector.data.dtype).removeprefix("torch."),
            "statistics": self.statistics,
            **(batches if self.statistics == "batch" else {}),
        }


def named(runs: Iterable[Path]) -> dict[Path, str]:
    """What figures call runs: the names of their folders, or where two have one, their paths."""
    runs = list(runs)
    names = Counter(run.name for run in runs)
    return {run: run.name if run.name and names[run.name] == 1 else str(run) for run in runs}


def experiments(runs: Mapping[Path, str]) -> dict[Path, str]:
    """What the lines of figures are called: seeds of one experiment alike, any other run by its name."""
    records = [read_run(run) for run in runs]
    if len({record.metric for record in records}) > 1:
        return dict(runs)
    several = {label: members for label, members in group(records).items() if len(members) > 1}
    return {**runs, **{record.path: label for label, members in several.items() for record in members}}


def measure_runs(
    runs: Mapping[Path, Config],
    settings: Settings,
    how: How,
    comm: Communicator,
    slot: Slot,
    models: Sequence[str] = (CENTER,),
    figure: Path | None = None,
) -> None:
    """Measure runs one after the other, and say what was found; all ranks must call it."""
    log = Log(None, speaks=comm.rank == 0)
    found: list[tuple[str, dict[str, Any]]] = []
    titles = experiments(named(runs))
    for number, (run, config) in enumerate(runs.items()):
        writes = comm.rank > 0 or os.access(run, os.W_OK)
        fail_together(comm, "" if writes else f"{run} cannot be written, where results are to be kept")
        finished = FinishedRun(run, config, comm, slot, double=how.double)
        names = [name for name in (CENTER, MEAN) if name in models]
        names += [f"rank {m}" for m in range(finished.ranks)] if "ranks" in models else []
        if not names:
            raise wrong("models", ",".join(models), f"must be center: all ranks of {run} have one model")
        for n, name in enumerate(names, 1):
            left = len(names) * (len(runs) - 1 - number) + len(names) - n
            known = _measured(finished, name, settings, how, comm, log, left)
            found.append((f"{titles[run]} {name}" if len(names) > 1 else titles[run], known))
            log.say(f"\n{described(f'{name} of {run}', known)}")
    log.close()
    if comm.rank == 0 and figure is not None:
        from ..report.spectra import draw

        draw(found, figure)
        log.say(f"\nfigure     {figure}")


def _measured(
    finished: FinishedRun, name: str, settings: Settings, how: How, comm: Communicator, log: Log, left: int
) -> dict[str, Any]:
    """What is known of a model, all that was asked for; on rank 0 it is written beside the run.

    Args:
        finished: whose model it is.
        name: of the model.
        settings: which measures.
        how: on what.
        comm: ranks that share the work.
        log: where it is said how far this is.
        left: models that are still to be measured after this one.
    """
    finished.put(name)
    objective = how.objective(finished, comm)
    exactly = how.said(objective, finished)

    def there() -> list[dict[str, Any]]:
        """What else was measured of this model, what is known so far the last."""
        entries = read_flatness(finished.run).get(name, [])
        same = [one for one in entries if one.get("how") == exactly]
        return [*(one for one in entries if one.get("how") != exactly), *(same or [{"how": exactly}])]

    told = json.dumps(there()[-1]) if comm.rank == 0 else ""
    known: dict[str, Any] = json.loads(comm.gather_bytes(told.encode(), "evaluate")[0])
    before = dict(known)
    under_way = "spectrum" in settings.measures and not is_known("spectrum", settings, known)
    wanted = {**exactly, **settings.of("spectrum")}
    place = place_of_spectrum(finished.run, name, wanted)
    checkpoints = Checkpoints(place, comm, keep=1)
    spectra: list[dict[str, Any]] = []
    if under_way:
        restored = checkpoints.load()
        if restored is not None:
            if restored.world_size != comm.size:
                fix = (
                    f"must be {restored.world_size}, who began the spectrum of {name}; or remove {place} to begin anew"
                )
                raise wrong("ranks", comm.size, fix)
            spectra = restored.state["spectra"]
    kept_at = time.monotonic()

    def keep(state: Callable[[], list[dict[str, Any]]]) -> None:
        nonlocal kept_at
        due = torch.tensor([float(time.monotonic() - kept_at >= KEEP_EVERY)])
        if float(comm.broadcast(due, 0, "evaluate").wait()):
            states = state()
            steps = sum(len(one["alpha"]) for one in states)
            for problem in [*checkpoints.save(steps, {"spectra": states}, {"how": wanted}), *checkpoints.settle()]:
                log.say(problem)
            kept_at = time.monotonic()

    def write(now: dict[str, Any]) -> None:
        if comm.rank == 0:
            *others, newest = there()  # another job may have measured more of it meanwhile
            own = {key: value for key, value in now.items() if key not in before or before[key] != value}
            by, old = now.get("measures", {}), before.get("measures", {})
            measured = {**newest.get("measures", {}), **{name: by[name] for name in by if by[name] != old.get(name)}}
            file = {**read_flatness(finished.run), name: [*others, {**newest, **own, "measures": measured}]}
            write_atomically(finished.run / FLATNESS, json.dumps(file, indent=1) + "\n")

    began = time.monotonic()

    def watch(share: float, text: str) -> None:
        if log.due:
            others = (time.monotonic() - began) / share * left  # as if none of them were known
            more = f", then {counted(left, 'model')}: {others:.0f} s" if left else ""
            log.progress(share, f"{finished.run.name} {name}  {text}{more}")

    def read(rank: int) -> Tensor:
        finished.put(f"rank {rank}")
        found = objective.vector.data.clone()
        finished.put(CENTER)
        return found

    ranks = Models(finished.ranks, read) if name == CENTER else ()
    if name == CENTER and finished.kept != finished.of and "valley" in settings.measures:
        log.say(
            f"valley     not measured: {finished.run} has kept the models of {finished.kept} of {finished.of} ranks"
        )
        left_over = tuple(measure for measure in settings.measures if measure != "valley")
        if not left_over:
            return known
        settings = dataclasses.replace(settings, measures=left_over)
    known = measure(Subject(objective, ranks, spectra, keep), settings, known, watch, write)
    write(known)  # the last of the list, if nothing of it was to be measured
    if "spectrum" in settings.measures and comm.rank == 0:
        shutil.rmtree(place, ignore_errors=True)
        with suppress(OSError):  # others are there, or none ever was
            place.parent.rmdir()
    return known


def place_of_spectrum(run: Path, name: str, how: dict[str, Any]) -> Path:
    """Where it is kept how far a spectrum is: one of this model by other settings may have been left on its way."""
    exact = hashlib.sha256(json.dumps(how, sort_keys=True).encode()).hexdigest()
    return run / FOLDER / f"{name.replace(' ', '-')}-{exact[:12]}"


def described(title: str, found: dict[str, Any]) -> str:
    """What was found, for people."""
    how = found["how"]
    whole = how["examples"] == how["of"]
    of = f"all {how['of']:,} training examples" if whole else f"{how['examples']:,} of {how['of']:,} training examples"
    batch = ", BatchNorm's statistics of each batch" if how["statistics"] == "batch" else ""
    lines = [f"{title}: {of}, {how['dtype']}{batch}"]
    for text, names in _ROWS:
        shown = [_number(found, name) for name in names]
        if any(value is not None for value in shown):
            lines.append(f"  {text:34} " + "   ".join(value or "-" for value in shown))
    if found.get("top_eigenvalues"):
        top = ", ".join(f"{value:.4g}" for value in found["top_eigenvalues"])
        lines.append(wrapped(f"  {'top eigenvalues':34} {top}", others=" " * 37))
    return "\n".join(lines)


#: What is shown, and by which names it is known.
_ROWS: Sequence[tuple[str, tuple[str, ...]]] = (
    ("loss", ("loss",)),
    ("gradient norm; sum over layers", ("gradient_norm", "sum_of_layer_norms")),
    ("largest, smallest eigenvalue", ("largest_eigenvalue", "smallest_eigenvalue")),
    ("trace", ("trace",)),
    ("Frobenius norm", ("frobenius_norm",)),
    ("sum of Ritz values", ("sum_of_ritz_values",)),
    ("root of their squares' sum", ("root_of_squared_ritz_values",)),
    ("SAM sharpness; adaptive", ("sam_sharpness", "adaptive_sam_sharpness")),
    ("epsilon-sharpness", ("epsilon_sharpness",)),
    ("loss, low-pass filtered", ("lpf",)),
    ("entropy of the outputs", ("entropy",)),
    ("width of the valley", ("valley_width",)),
    ("width of the valley, at least", ("valley_width_at_least",)),
)


def _number(found: dict[str, Any], name: str) -> str | None:
    if (value := found.get(name)) is None:
        return None
    error = found.get(f"{name}_error")
    return f"{value:.4g}" if error is None else f"{value:.4g} ± {error:.2g}"
