"""``hpc-grawa flatness``."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from ..comm import Communicator
from ..errors import require, wrong
from ..flatness.measure import MEASURES, Settings, Subject, measure, said
from ..flatness.objective import Objective, Statistics
from ..launch import Slot
from ..runs.checkpoint import Checkpoints
from ..runs.log import Log, write_atomically
from ..runs.reading import read_object
from ..screen import wrapped
from ..training.config import Config
from .finished import CENTER, FinishedRun, finished_config
from .gate import Parser
from .together import backend_line, set_threads, together

#: Beside a run: what was found, and what Lanczos's method is to go on with.
FILE, FOLDER = "flatness.json", "flatness"
#: Seconds between its checkpoints.
KEEP_EVERY = 60.0


def flatness(words: list[str], slot: Slot) -> None:
    """Say how flat the loss is around a run's models: spectrum of its Hessian, sharpness, width of the valley."""
    program, default = "hpc-grawa flatness", Settings()
    parser = Parser(prog=program, description=flatness.__doc__, allow_abbrev=False)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished runs")
    parser.add_argument(
        "--models", default=CENTER, help="center, ranks (each one's own), or both: center,ranks (center)"
    )
    parser.add_argument("--measures", default=",".join(MEASURES), help=f"some of {','.join(MEASURES)} (all)")
    parser.add_argument("--examples", type=int, default=2000, help="training examples, evenly spaced; 0: all (2000)")
    parser.add_argument("--batch_size", type=int, default=500, help="examples per pass and rank (500)")
    parser.add_argument("--double", action="store_true", help="compute in float64")
    parser.add_argument(
        "--statistics", choices=get_args(Statistics), default="model", help="BatchNorm's: the model's or a batch's"
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
    require(options.batch_size >= 1, "batch_size", options.batch_size, "at least 1")
    chosen = options.models.split(",")
    if not chosen or set(chosen) - {CENTER, "ranks"}:
        raise wrong("models", options.models, "must be center, ranks, or center,ranks")
    require(options.points >= 2, "points", options.points, "at least 2")
    for figure in (options.figure, options.landscape):
        if figure is not None:
            from ..report.figure import check_drawable

            check_drawable(figure)
    configs = [finished_config(run, program, options.backend, options.data_path) for run in options.runs]
    for config in configs:
        config.data.check(1)
    slot = dataclasses.replace(slot, tasks=1)  # one process is enough, however many the job is to have
    first_line = backend_line(configs[0], slot)
    set_threads(slot)
    with together(program, configs[0], slot, first_line) as comm:
        runs = dict(zip(options.runs, configs, strict=True))
        measure_runs(runs, settings, how, comm, slot, chosen, options.figure)
        if options.landscape is not None:
            from .landscape import landscape

            landscape(
                [FinishedRun(*run, comm, slot) for run in runs.items()], how, comm, options.points, options.landscape
            )


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
        return {
            "examples": objective.examples,
            "of": len(finished.splits.train),
            "dtype": str(objective.vector.data.dtype).removeprefix("torch."),
            "statistics": self.statistics,
        }


def weights(finished: FinishedRun, objective: Objective, name: str) -> Tensor:
    """The parameters ``[P]`` of one of a run's models, which is then in place."""
    finished.put(name)
    return objective.vector.data.clone()


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
    found: dict[str, dict[str, Any]] = {}
    for run, config in runs.items():
        finished = FinishedRun(run, config, comm, slot)
        if how.double:
            finished.model.double()
        names = [CENTER] if CENTER in models else []
        names += [f"rank {m}" for m in range(finished.ranks)] if "ranks" in models else []
        if not names:
            raise wrong("models", ",".join(models), f"must be center: {run} has kept no rank's own model")
        for name in names:
            known = _measured(finished, name, settings, how, comm, log)
            found[f"{run.name} {name}" if len(names) > 1 else run.name] = known
            log.say(f"\n{described(f'{name} of {run}', known)}")
    log.close()
    if comm.rank == 0 and figure is not None:
        from ..report.spectra import draw

        draw(found, figure)
        log.say(f"\nfigure     {figure}")


def _measured(
    finished: FinishedRun, name: str, settings: Settings, how: How, comm: Communicator, log: Log
) -> dict[str, Any]:
    """What is known of a model, all that was asked for; on rank 0 it is written beside the run."""
    objective = how.objective(finished, comm)
    ranks = []
    if name == CENTER and "valley" in settings.measures:
        ranks = [weights(finished, objective, f"rank {m}") for m in range(finished.ranks)]
    finished.put(name)
    exactly = {**how.said(objective, finished), **said(settings)}
    place = finished.run / FILE
    written = (read_object(place) or {}) if comm.rank == 0 else {}
    told = json.dumps(written.get(name)) if written.get(name, {}).get("how") == exactly else "{}"
    known: dict[str, Any] = json.loads(comm.gather_bytes(told.encode(), "evaluate")[0]) or {"how": exactly}
    checkpoints = Checkpoints(finished.run / FOLDER / name.replace(" ", "-"), comm, keep=1)
    restored = checkpoints.load()
    spectra: list[dict[str, Any]] = []
    if restored is not None and restored.world_size == comm.size and restored.manifest.get("how") == exactly:
        spectra = restored.state["spectra"]
    kept_at = time.monotonic()

    def keep(state: list[dict[str, Any]]) -> None:
        nonlocal kept_at
        due = torch.tensor([float(time.monotonic() - kept_at > KEEP_EVERY)])
        if float(comm.broadcast(due, 0, "evaluate").wait()):
            kept_at = time.monotonic()
            steps = sum(len(one["alpha"]) for one in state)
            for problem in [*checkpoints.save(steps, {"spectra": state}, {"how": exactly}), *checkpoints.settle()]:
                log.say(problem)

    def write(now: dict[str, Any]) -> None:
        if comm.rank == 0:
            written[name] = now
            write_atomically(place, json.dumps(written, indent=1) + "\n")

    def watch(share: float, text: str) -> None:
        if log.due:
            log.progress(share, f"{finished.run.name} {name}  {text}")

    return measure(Subject(objective, ranks, spectra, keep), settings, known, watch, write)


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
    if any(found.get("valley_cut", ())):
        lines.append("  (at least: towards some ranks the valley did not end within 10 times their distance)")
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
)


def _number(found: dict[str, Any], name: str) -> str | None:
    if (value := found.get(name)) is None:
        return None
    error = found.get(f"{name}_error")
    return f"{value:.4g}" if error is None else f"{value:.4g} ± {error:.2g}"
