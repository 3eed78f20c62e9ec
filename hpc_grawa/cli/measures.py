"""``hpc-grawa measures``."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from ..comm import Communicator
from ..errors import ConfigError, require, wrong
from ..launch import Slot
from ..runs.log import Log, write_atomically
from ..runs.reading import read_object
from ..runs.record import RunRecord, read_run, settings_of
from ..screen import wrapped
from .compare import runs_of
from .finished import CENTER, FinishedRun, check_seen_alike, finished_config
from .gate import Parser
from .together import backend_line, set_threads, together

if TYPE_CHECKING:
    from ..generalisation.ranking import Ranking

#: Beside a run.
FILE = "measures.json"
#: Of what measures are: another one with every change to them, so that no values of before stand beside those of now.
VERSION = 1
#: How settings begin that say by what a run was made and what was kept and seen of it.
_ASIDE = ("backend", "compile", "data.path", "device", "eval.", "log.", "save.")


def measures(words: list[str], slot: Slot) -> None:
    """Say what foretells the gap between training and test over a set of runs, by how well it ranks them."""
    program = "hpc-grawa measures"
    parser = Parser(prog=program, description=measures.__doc__, allow_abbrev=False)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished runs, or folders of these")
    parser.add_argument(
        "--axes", help="settings that span the grid, separated by commas (those of all runs in which they differ)"
    )
    parser.add_argument("--examples", type=int, default=2000, help="training examples, evenly spaced; 0: all (2000)")
    parser.add_argument("--batch_size", type=int, default=500, help="examples per pass and rank (500)")
    parser.add_argument("--bound", type=float, default=0.1, help="training error under disturbances, at most (.1)")
    parser.add_argument(
        "--trained_to", type=float, default=math.inf, help="leave out runs whose training loss at the end is above it"
    )
    parser.add_argument("--seed", type=int, default=0, help="of noise (0)")
    parser.add_argument("--csv", type=Path, help="write all measures of all runs to this file")
    parser.add_argument("--figure", type=Path, help="draw how well each measure ranks runs to this file")
    parser.add_argument("--data.path", dest="data_path", help="where the data are now")
    parser.add_argument("--backend", default="auto", help="how ranks communicate")
    options = parser.parse_args(words)
    require(options.examples >= 0, "examples", options.examples, "at least 1, or 0 for all")
    require(options.batch_size >= 1, "batch_size", options.batch_size, "at least 1")
    require(0 < options.bound < 1, "bound", options.bound, "in (0, 1)")
    require(0 <= options.seed < 2**63, "seed", options.seed, "a whole number of 0 or more")
    if options.csv is not None and not options.csv.parent.is_dir():
        raise wrong("csv", options.csv, f"must be in a folder that is there, {options.csv.parent} is not")
    if options.figure is not None:
        from ..report.figure import check_drawable

        check_drawable(options.figure)
    paths = runs_of(options.runs)
    records = [read_run(path) for path in paths]
    kept = [record for record in records if _is_trained(record, options.trained_to)]
    if len(kept) < 2:
        raise ConfigError(f"runs are {len(kept)} of {len(records)} that are finished and trained: must be 2 or more")
    if len(metrics := {record.metric for record in kept}) > 1:
        raise ConfigError(
            f"runs are judged by {' and '.join(sorted(metrics))}: must be one metric, whose gap is ranked"
        )
    grid = _grid(options.axes, kept)
    configs = [finished_config(record.path, program, options.backend, options.data_path) for record in kept]
    slot = dataclasses.replace(slot, tasks=1)  # one process is enough, however many the job is to have
    first_line = backend_line(configs[0], slot)
    set_threads(slot)
    with together(program, configs[0], slot, first_line) as comm:
        check_seen_alike((record.path for record in kept), comm)
        log = Log(None, speaks=comm.rank == 0)
        found, times = [], []
        for number, (record, config) in enumerate(zip(kept, configs, strict=True), 1):
            began = time.monotonic()
            found.append(_measured(FinishedRun(record.path, config, comm, slot), options, comm, log))
            times.append(time.monotonic() - began)
            if log.due:
                # Those that were measured before take no time.
                left = (len(kept) - number) * median(times[-9:])
                log.progress(number / len(kept), f"run {number} of {len(kept)}: {record.path.name}  ETA {left:.0f} s")
        log.close()
        if comm.rank == 0:
            # Those of two runs with the same counts of errors are one number, whatever they were computed from.
            gaps = [round(float(record.status["gap"]), 12) for record in kept]
            from ..generalisation.ranking import ranked

            rankings = ranked([one["values"] for one in found], gaps, grid.axes, grid.others, options.seed)
            print(_table(rankings, len(records), grid, found))
            if options.csv is not None:
                _write_csv(options.csv, kept, found, gaps, {**grid.axes, **grid.others})
                print(f"\ntable   {options.csv}")
            if options.figure is not None:
                from ..report.ranking import draw

                draw(rankings, options.figure, f"{len(kept)} runs; axes {', '.join(grid.axes)}")
                print(f"figure  {options.figure}")


def _is_trained(record: RunRecord, most: float) -> bool:
    status = record.status
    loss, gap = status.get("center_train_loss"), status.get("gap")
    if status["state"] != "finished" or not isinstance(gap, float | int) or not isinstance(loss, float | int):
        return False
    return math.isfinite(gap) and loss <= most


class _Grid(NamedTuple):
    """What runs differ in.

    Attributes:
        axes: the value of each axis, of each run.
        others: likewise of all other settings in which runs differ; None where a run does not have it.
        notes: of what is no axis.
    """

    axes: dict[str, list[str | None]]
    others: dict[str, list[str | None]]
    notes: list[str]


def _grid(given: str | None, records: Sequence[RunRecord]) -> _Grid:
    """The axes that were given, or all settings in which runs differ and that all of them have."""
    settings = [{k: v for k, v in settings_of(one).items() if not k.startswith(_ASIDE)} for one in records]
    keys = dict.fromkeys(key for one in settings for key in one)
    values = {key: [str(one[key]) if key in one else None for one in settings] for key in keys}
    differing = {key: column for key, column in values.items() if len(set(column)) > 1}
    if missing := [name for name in (given or "").split(",") if given is not None and name not in differing]:
        raise wrong("axes", missing[0], f"must be among the settings in which runs differ: {', '.join(differing)}")
    names = list(differing) if given is None else given.split(",")
    axes: dict[str, list[str | None]] = {}
    others: dict[str, list[str | None]] = {}
    merged: dict[str, list[str]] = {}
    lacking = []
    alike: dict[tuple[int, ...], str] = {}
    for key in sorted(differing, key=lambda key: (key not in names, None in differing[key])):
        column = differing[key]
        first = alike.setdefault(tuple(map(column.index, column)), key)
        if first != key:
            merged.setdefault(first, []).append(key)
        elif key not in names:
            others[key] = column
        elif None in column and given is None:
            # What not all runs have is a setting of their methods, which are an axis by themselves.
            others[key] = column
            lacking.append(key)
        else:
            axes[key] = column
    notes = [f"one with {first}, as they go together: {', '.join(keys)}" for first, keys in merged.items()]
    if lacking:
        notes.append(f"no axes, as not all runs have them: {', '.join(lacking)}")
    return _Grid(axes, others, notes)


def _measured(run: FinishedRun, options: Any, comm: Communicator, log: Log) -> dict[str, Any]:
    """A run's measures, written beside it where that can be."""
    from ..generalisation import measures as measure

    of = len(run.splits.train)
    how = {key: getattr(options, key) for key in ("examples", "bound", "seed")} | {"of": of, "version": VERSION}
    place = run.run / FILE
    there = (read_object(place) or {}) if comm.rank == 0 else {}
    whole = there.get("how") == how and isinstance(there.get("values"), dict)
    told = json.dumps(there if whole else {})
    known: dict[str, Any] = json.loads(comm.gather_bytes(told.encode(), "evaluate")[0])
    if known:
        return {**known, "values": {name: float(value) for name, value in known["values"].items()}}
    run.put(CENTER)
    limit, start = options.examples or None, run.initial()
    try:
        found = measure(
            run.model, start, run.splits.train, comm, limit, options.bound, options.batch_size, options.seed
        )
    except ConfigError as error:
        raise ConfigError(f"{run.run}: {error}") from error
    known = {"how": how, **dataclasses.asdict(found)}
    # JSON has no infinity, and what is not a number is one of its words elsewhere only.
    values = {name: value if math.isfinite(value) else str(value) for name, value in found.values.items()}
    if comm.rank == 0:
        try:
            write_atomically(place, json.dumps({**known, "values": values}, indent=1) + "\n")
        except OSError as error:  # others' runs can be ranked all the same
            log.say(f"measures of {run.run} are not kept: {place} cannot be written ({error.strerror})")
    return known


def _table(rankings: Sequence[Ranking], runs: int, grid: _Grid, found: Sequence[dict[str, Any]]) -> str:
    from ..generalisation import NUMBERS
    from ..generalisation.ranking import LECTURE, ORACLE_DRAWS, ORACLE_NOISE
    from ..report.table import aligned

    axes = grid.axes
    head = [
        "measure",
        "number",
        "runs",
        "tau",
        "pairs",
        "ties",
        "Psi",
        "worst axis",
        "information",
        "lecture: tau",
        "Psi",
    ]
    rows = [head]
    for one in rankings:
        known = {axis: value for axis, value in one.along.items() if not math.isnan(value)}
        worst = min(known, key=lambda axis: known[axis], default=None)
        lecture = LECTURE.get(one.name)
        rows.append(
            [
                one.name.replace("_", " "),
                NUMBERS.get(one.name, "-"),
                f"{len(found) - one.left_out}",
                _signed(one.tau),
                f"{one.pairs:,}",
                f"{one.ties:,}",
                _signed(one.psi),
                "-" if worst is None else f"{worst} {_signed(known[worst])}",
                "-" if math.isnan(one.information) else f"{one.information:.3f}",
                *(("-", "-") if lecture is None else map(_signed, lecture)),
            ]
        )
    how = found[0]["how"]
    of = sorted({min(one["how"]["examples"] or one["how"]["of"], one["how"]["of"]) for one in found})
    losses = [one["values"]["cross_entropy"] for one in found]
    notes = [
        f"{len(found)} of {runs} runs; axes {', '.join(axes)}",
        f"on {' and '.join(f'{n:,}' for n in of)} training examples, to a cross-entropy of {min(losses):.3g} to "
        f"{max(losses):.3g} there; under noise an error of {how['bound']:g} at most",
        f"oracle: the gap with noise of {ORACLE_NOISE:g}, mean of {ORACLE_DRAWS} draws",
        *grid.notes,
    ]
    if empty := [axis for axis in axes if all(math.isnan(one.along[axis]) for one in rankings)]:
        notes.append(f"no two runs differ in one of these alone: {', '.join(empty)}")
    notes += [f"{one.name.replace('_', ' ')}: not defined for {one.left_out} runs" for one in rankings if one.left_out]
    notes += [
        f"{name.replace('_', ' ')}: {text} ({count} runs)"
        for name in dict.fromkeys(name for one in found for name in one["values"] if name.endswith("_size"))
        for limit, text in ((0.0, "0, as the error is larger under the least noise"), (math.inf, "without end"))
        if (count := sum(one["values"].get(name) == limit for one in found))
    ]
    for kind in ("notes", "left_out"):
        texts = dict.fromkeys(text for run in found for text in _texts(run[kind]))
        notes += [f"{text} ({sum(text in _texts(run[kind]) for run in found)} runs)" for text in texts]
    along = [["tau along", *axes]]
    along += [
        [one.name.replace("_", " "), *(_signed(one.along.get(axis, math.nan)) for axis in axes)] for one in rankings
    ]
    told = (wrapped(f"- {note}", 120, "", "  ") for note in notes)
    return "\n".join(["", *aligned(rows), "", *aligned(along), "", *told])


def _texts(told: Any) -> list[str]:
    return [f"{name}: {why}" for name, why in told.items()] if isinstance(told, dict) else list(told)


def _signed(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:+.3f}"


def _write_csv(
    path: Path,
    records: Sequence[RunRecord],
    found: Sequence[dict[str, Any]],
    gaps: Sequence[float],
    settings: Mapping[str, Sequence[str | None]],
) -> None:
    names = list(dict.fromkeys(name for one in found for name in one["values"]))
    try:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["run", *settings, "gap", *names, "notes"])
            for number, (record, one) in enumerate(zip(records, found, strict=True)):
                places = [column[number] for column in settings.values()]
                values = [one["values"].get(name, "") for name in names]
                notes = "; ".join([*_texts(one["notes"]), *_texts(one["left_out"])])
                writer.writerow([record.path, *places, gaps[number], *values, notes])
    except OSError as error:
        raise ConfigError(f"the table {path} cannot be written: {error.strerror}") from error
