"""The command line: ``hpc-grawa COMMAND``, which is one of these."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import math
import os
import re
import select
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from ..comm import Backend, Communicator
from ..errors import ConfigError, require, wrong
from ..launch import Slot, own_slot
from ..methods import Method
from ..runs.log import Log
from ..runs.record import read_run
from ..screen import drop, say, spell_unknown_characters, wrapped
from ..training.resume import RunPlace
from .classes import find_class, is_class
from .finished import CENTER, FinishedRun, finished_config
from .flatness import flatness
from .gate import Parser, named_errors
from .measures import measures
from .parsing import parse
from .settings import PAPERS, papers, read_settings, split_config
from .together import backend_line, set_threads, together

if TYPE_CHECKING:
    from ..flatness.measure import Settings
    from .compare import Comparison

#: Exit status of a run that was told to end before its time, and can go on (EX_TEMPFAIL of sysexits.h).
TRY_AGAIN = 75


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a subcommand; bad input is one line on rank 0 and exit status 2."""
    spell_unknown_characters()
    given = sys.argv[1:] if arguments is None else arguments
    others = ("--submit", "--launcher")  # whose value is another program's words
    words = [word if before in others else _underscored(word) for before, word in pairwise(["", *given])]
    slot = own_slot()
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # own classes may lie where the program is started
    if slot.rank and any(w in ("-h", "--help", "--version") or w.startswith("--print_") for w in words):
        raise SystemExit(0)
    name = words[0] if words and words[0] in COMMANDS else ""
    try:
        with named_errors(f"hpc-grawa {name}".rstrip()):
            if words[:1] in (["-h"], ["--help"]):
                print((__doc__ or "").splitlines()[0].replace("``", ""))
                print("\n".join(f"  {name:9} {(c.__doc__ or '').splitlines()[0]}" for name, c in COMMANDS.items()))
            elif words[:1] == ["--version"]:
                print(f"hpc-grawa {version('hpc-grawa')}")
            elif not name:
                found = " ".join(["no command", *words[:1]])
                raise ConfigError(f"{found}: must be one of {', '.join(COMMANDS)} (hpc-grawa --help)")
            else:
                COMMANDS[name](words[1:], slot)
            sys.stdout.flush()
            if not name:
                raise SystemExit(0)
    except BrokenPipeError:
        if slot.size > 1 or not _unread():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more
        raise SystemExit(128 + signal.SIGPIPE) from None
    except OSError as error:
        if error.filename is not None or slot.size > 1:
            raise
        try:
            print(flush=True)
        except OSError:  # so it was of the output
            drop(sys.stdout)
            say(f"hpc-grawa {name}: error: the output cannot be written: {error.strerror}", sys.stderr)
            raise SystemExit(1) from None
        raise


def _unread() -> bool:
    """Whether whoever read the standard output is gone, as ``head`` is when it has its lines."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _underscored(word: str) -> str:
    """An option by the name it has here, however its words were joined: ``--dry-run`` is ``--dry_run``."""
    name, equals, value = word.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if re.fullmatch(r"--[\w.+-]+", name) else word


def train(words: list[str], slot: Slot) -> None:
    """Train with one method (--dry_run only says what would happen)."""
    program = "hpc-grawa train"
    own = Parser(prog=program, add_help=False, allow_abbrev=False)
    own.add_argument("--dry_run", action="store_true")
    own.add_argument("--world_size", type=int)
    own.add_argument("--ranks_per_host", type=int)
    own.add_argument("--trace", action="store_true")
    own.add_argument("--resume_world", choices=("same", "any"), default="same")
    own.add_argument("--allow_change", action="append", default=[])
    options, words = own.parse_known_args(words)
    config = parse(words, program)
    # Ranks that only a dry run speaks of are on one host unless it says otherwise.
    size, here = (slot.size, slot.local_size) if options.world_size is None else (options.world_size,) * 2
    for name, given in (("world_size", options.world_size), ("ranks_per_host", options.ranks_per_host)):
        if given is not None and not options.dry_run:
            raise wrong(name, given, "must come with --dry_run; in training the launcher decides")
        require(given is None or given >= 1, name, given, "at least 1 rank")
    config.check(size)
    first_line = "" if options.dry_run else backend_line(config, slot)
    place = RunPlace(config, options.allow_change)
    if place.finished and not options.dry_run:
        if slot.rank == 0:
            say(f"{program}: {place.path} is finished")
        return
    if not options.dry_run and slot.rank == 0:
        place.check(None if options.resume_world == "any" else size)
    set_threads(slot)
    if options.dry_run:
        from ..training.dry_run import plan

        if slot.rank == 0:
            for line in plan(config, size, min(size, options.ranks_per_host or here)).splitlines():
                print(wrapped(line, others=" " * 18))
        return
    with together(program, config, slot, first_line) as comm:
        from ..training.loop import fit

        try:
            found = fit(
                config,
                comm,
                new_folder=None if comm.rank else place.open,
                trace=options.trace,
                any_world=options.resume_world == "any",
            )
        finally:
            place.close()
        if found["state"] != "finished":
            comm.barrier()  # whoever leaves first with a status has srun end the others: rank 0 must have written
    _leave_early(found)


def _leave_early(ended: dict[str, Any]) -> None:
    """Leave with the status that says so, where a run was told to end."""
    if ended["state"] != "finished":
        raise SystemExit(130 if ended["cause"] == "SIGINT" else TRY_AGAIN)


def evaluate(words: list[str], slot: Slot) -> None:
    """Evaluate a run's center on the test set."""
    program = "hpc-grawa evaluate"
    slot = dataclasses.replace(slot, tasks=1)  # one process is enough, however many the job is to have
    parser = Parser(prog=program, description=evaluate.__doc__)
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--data.path", dest="data_path", help="where the data are now")
    parser.add_argument("--backend", default="auto", help="how ranks communicate")
    options = parser.parse_args(words)
    config = finished_config(options.run, program, options.backend, options.data_path)
    config.data.check(1)
    first_line = backend_line(config, slot)
    set_threads(slot)
    with together(program, config, slot, first_line) as comm:
        from ..training.evaluate import Evaluator

        evaluator = Evaluator(config.loss, config.metric, config.precision, config.eval.batch_size)
        finished = FinishedRun(options.run, config, comm, slot)
        finished.put(CENTER)
        scores = evaluator.evaluate(finished.model, finished.splits.test, comm)
        if slot.rank == 0:
            print(f"center of {options.run}: " + ", ".join(f"test {key} {value:.4f}" for key, value in scores.items()))


def table(words: list[str], slot: Slot) -> None:
    """Put any runs into one table (Markdown, CSV) and figure."""
    program = "hpc-grawa table"
    parser = Parser(prog=program, description=table.__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders, or folders of runs")
    parser.add_argument("--csv", type=Path, help="write the numbers to this file")
    parser.add_argument("--figure", type=Path, help="draw the metric over training time, and weights, to this file")
    parser.add_argument(
        "--target", type=float, help="metric to reach in the column time to target (accuracy: a fraction)"
    )
    options = parser.parse_args(words)
    check_target(options.target)
    if slot.rank:
        return
    if options.figure is not None:
        from ..report.figure import check_drawable

        check_drawable(options.figure)
    from .compare import report

    report(options.runs, options.target, options.csv, options.figure)


def status(words: list[str], slot: Slot) -> None:
    """Say what runs are doing, from any host: state, ETA, last metrics, and what every rank does."""
    program = "hpc-grawa status"
    parser = Parser(prog=program, description=status.__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders, or folders of runs")
    options = parser.parse_args(words)
    if slot.rank:
        return
    from ..report.status import describe
    from .compare import runs_of

    print("\n\n".join(describe(run) for run in runs_of(options.runs)))


def compare(words: list[str], slot: Slot) -> None:
    """Train with several methods, settings and seeds, one after the other or as a job array, and compare them."""
    from .compare import Comparison

    program = "hpc-grawa compare"
    own = Parser(prog=program, add_help=False, allow_abbrev=False)
    own.add_argument("--methods", help="names, separated by commas")
    own.add_argument("--seeds", help="numbers, separated by commas")
    own.add_argument("--grid", help="settings to combine: 'method.period=8,16;method.pull=.3,.5'")
    own.add_argument("--target", type=float, help="metric to reach in the column time to target (accuracy: a fraction)")
    text = "a paper's methods, seeds and grids, and its table (grawa)"
    own.add_argument("--paper", nargs="?", const="grawa", choices=papers(), help=text)
    ways = own.add_mutually_exclusive_group()
    ways.add_argument("--launcher", help="start each run by these words: 'srun --mpi=pmix', 'mpirun -np 4'")
    ways.add_argument("--submit", help="submit the runs as one job array: options of sbatch, and slurm/compare.sh")
    ways.add_argument("--dry_run", action="store_true", help="only list the runs, and how far they are")
    if any(word in ("-h", "--help") for word in words):
        print(own.format_help() + "\nBeside these, the options of hpc-grawa train.")
        raise SystemExit(0)
    options, words = own.parse_known_args(words)
    check_target(options.target)
    if options.paper is not None:
        if own_rows := read_settings(split_config(words)[0]).get("compare"):
            fix = "must not be in a file beside --paper, which has its own: narrow it by --methods, --seeds, --grid"
            raise wrong("compare", own_rows, fix)
        words = [f"--config={PAPERS / options.paper}.yaml", *words]
        _measured_in_a_paper()  # refuses, before any run, what is missing
    comparison = Comparison.read(options.methods, options.seeds, options.target, options.grid, words, program)
    way = "launcher" if options.submit is None else "submit"
    elsewhere = getattr(options, way)
    known = elsewhere is None and (slot.size > 1 or not options.dry_run)
    ranks = slot.size if known else None
    for _, config in comparison.plan:
        config.check(ranks)
    if options.dry_run:
        if slot.rank == 0:
            if comparison.folder.is_dir():
                comparison.check_folders(ranks)
            print(comparison.listed())
        return
    if elsewhere is None:
        _compare_here(comparison, program, slot, options.paper)
        return
    if slot.size > 1:
        raise wrong(way, elsewhere, f"must not be given to {slot.size} ranks: start hpc-grawa compare by itself")
    try:
        told = shlex.split(elsewhere)
    except ValueError as error:
        raise wrong(way, elsewhere, f"must be words as a shell reads them ({error})") from None
    comparison.check_folders(None)
    if way == "submit":
        print(comparison.submit(told))
        return
    status = comparison.launch(told)
    if options.paper is not None and comparison.missing:
        print(f"\nno table of the paper: {comparison.missing} of {len(comparison.plan)} runs are not there yet")
    elif options.paper is not None:
        alone, config = (
            dataclasses.replace(slot, tasks=1),
            dataclasses.replace(comparison.plan[0].config, backend="auto"),
        )
        with together(program, config, alone, backend_line(config, alone)) as comm:
            _as_in_a_paper(options.paper, comparison, comm, alone)
    if comparison.over:
        comparison.report()
    raise SystemExit(status or int(comparison.diverged))


def _compare_here(comparison: Comparison, program: str, slot: Slot, paper: str | None) -> None:
    first = comparison.plan[0].config
    first_line = backend_line(first, slot)
    if slot.rank == 0:
        comparison.check_folders(slot.size)
    set_threads(slot)
    with together(program, first, slot, first_line) as comm:
        ended = comparison.train(comm)
        finished = ended["state"] == "finished"
        if paper is not None and finished:
            _as_in_a_paper(paper, comparison, comm, slot)
        if slot.rank == 0 and comparison.over:
            comparison.report()
        diverged = comm.gather_bytes(b"1" if slot.rank == 0 and comparison.diverged else b"")[0] == b"1"
        if diverged or not finished:
            comm.barrier()
    _leave_early(ended)
    if diverged:
        raise SystemExit(1)


def _measured_in_a_paper() -> Settings:
    from ..flatness.measure import Settings

    return Settings(measures=("loss", "trace", "spectrum"))


def _as_in_a_paper(paper: str, comparison: Comparison, comm: Communicator, slot: Slot) -> None:
    """Measure how flat the chosen runs of a comparison are, and print the paper's table."""
    from ..report.paper import chosen_runs, paper_table
    from .flatness import How, measure_runs

    told = ""
    if comm.rank == 0:  # as it sees the folders: others may see what was written later
        chosen = {record.path for record in chosen_runs([read_run(path) for path in comparison.over])}
        places = {n: comparison.folder_of(config) for n, (_, config) in enumerate(comparison.plan)}
        told = json.dumps({str(path): n for n, path in places.items() if path in chosen})
    chosen_here = json.loads(comm.gather_bytes(told.encode())[0])
    if not chosen_here:  # all have diverged
        return
    how = How()
    measure_runs(
        {Path(path): comparison.plan[n].config for path, n in chosen_here.items()},
        _measured_in_a_paper(),
        # Products with the Hessian take several times the memory of a step; what they give is the same.
        how._replace(batch_size=min(how.batch_size, max(1, comparison.plan[0].config.data.batch_size // 4))),
        comm,
        slot,
    )
    if comm.rank == 0:
        print("\n" + paper_table([read_run(path) for path in comparison.over], paper))


#: Of all methods.
KNOW = (
    "The learning rate is that of one rank and its batch; scaling it with the number of ranks belongs to DataParallel.",
    "Evaluate and save the center (center.pt, run.center), not the model that a rank is left with.",
    "A loop of your own ends with run.finish(), the last round; its checkpoints need run.state_dict() too.",
)


def methods(words: list[str], slot: Slot) -> None:
    """Say what each method does; of one that is named, all: equation, settings, messages, memory, limits, source."""
    from .. import methods as package
    from .card import card

    program = "hpc-grawa methods"
    parser = Parser(prog=program, description=methods.__doc__, allow_abbrev=False)
    parser.add_argument("method", nargs="?", help="a name or import path; none: all, in a line each")
    parser.add_argument("--world_size", type=int, default=4, help="ranks for which messages are counted (4)")
    parser.add_argument("--combinations", action="store_true", help="say what goes together: each pair is tried")
    parser.epilog = "With --config FILE_OR_RECIPE and other options of train, the numbers are those of its model."
    options, others = parser.parse_known_args(words)
    require(1 <= options.world_size <= 65_536, "world_size", options.world_size, "1 to 65,536 ranks")
    if others and (options.method is None or words.index(options.method) > words.index(others[0])):
        raise wrong("method", None, "must name one, before the options of a configuration")
    alone = options.method is None or not options.combinations
    require(alone, "method", options.method, "left out with --combinations, which are those of all")
    if slot.rank:
        return
    if options.combinations:
        from .combinations import combinations

        print(combinations())
        return
    if options.method is not None:
        print(card(options.method, others, options.world_size, program))
        return
    for name in sorted(package.__all__):
        method = getattr(package, name)
        if not is_class(method, package.Method) or inspect.isabstract(method):
            continue
        text = inspect.cleandoc(method.__doc__ or "").splitlines()[0]
        print(name, wrapped(text, 120, "    ", "    "), "", sep="\n")
    print(*(wrapped(line, 120, "- ", "  ") for line in KNOW), sep="\n")


def toy(words: list[str], slot: Slot) -> None:
    """Let methods go down a function of flat and sharp valleys, on 4 simulated ranks, and draw their ways."""
    program = "hpc-grawa toy"
    parser = Parser(
        prog=program,
        description=toy.__doc__,
        epilog="A setting goes to the methods that have it; whatever else they have keeps its default.",
        allow_abbrev=False,
    )
    show = "GRAWA,MGRAWA,LGRAWA,EASGD,LSGD"
    parser.add_argument("--methods", default=show, help=f"names or import paths, separated by commas ({show})")
    parser.add_argument("--figure", type=Path, default=Path("toy.png"), help="draw to this file (toy.png)")
    parser.add_argument("--steps", type=int, default=4000, help="local steps of each rank (4000)")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate (0.001)")
    parser.add_argument(
        "--view",
        choices=("map", "surface", "weights"),
        default="map",
        help="ways on a map, on a surface, or what weights do in a round (map)",
    )
    parser.add_argument("--starts", type=int, help="from so many random starts instead, and say where descents end")
    parser.add_argument("--seed", type=int, default=0, help="of random starts (0)")
    settings = parser.add_argument_group("settings of methods")
    settings.add_argument("--period", type=int, default=4, help="local steps between rounds (4)")
    settings.add_argument("--pull", type=float, default=0.5, help="of ranks to the center; EASGD: of the center (0.5)")
    settings.add_argument("--push", type=float, default=0.1, help="DPPF's, off the mean (0.1)")
    settings.add_argument("--prox", type=float, default=0.0, help="pull between rounds (0)")
    settings.add_argument("--power", type=float, default=1.0, help="weights are inverse to this power of scores (1)")
    settings.add_argument("--score_momentum", type=float, default=0.0, help="of scores over rounds (0)")
    options = parser.parse_args(words)
    if slot.rank:
        return
    from ..report.figure import check_drawable
    from ..toy import descend, draw, draw_surfaces, draw_weights, first_round, table

    require(options.starts is None or options.starts >= 1, "starts", options.starts, "at least 1")
    log = Log(None, speaks=True)
    try:
        chosen = _toy_methods(options)
        if options.starts is not None:
            _toy_starts(chosen, options, log)
            return
        check_drawable(options.figure)
        shared = f"Gradient descent, lr {options.lr:g}, {options.steps:,} steps;\na round every {options.period}."
        if options.view == "weights":
            rounds = {name: first_round(method, options.steps, options.lr) for name, method in chosen.items()}
            draw_weights(rounds, options.figure, f"The first round, after {options.period} steps.")
            print(f"figure  {options.figure}")
            return
        descents = {}
        for number, (name, method) in enumerate(chosen.items()):

            def watch(step: int, number: int = number, name: str = name) -> None:
                if log.due:
                    share = (number + step / options.steps) / len(chosen)
                    log.progress(share, f"{name}  step {step} of {options.steps}")

            descents[name] = descend(method, options.steps, options.lr, watch=watch)
        log.close()
        print(table(descents))
        (draw if options.view == "map" else draw_surfaces)(descents, options.figure, shared)
        print(f"\nfigure  {options.figure}")
    except KeyboardInterrupt:
        log.close()
        say(f"\n{program}: interrupted", sys.stderr)
        raise SystemExit(130) from None


def _toy_starts(methods: dict[str, Method], options: argparse.Namespace, log: Log) -> None:
    """Say where descents from many starts end."""
    from ..toy.starts import ends, table

    total = options.starts * len(methods)

    def watch(done: int) -> None:
        if log.due:
            log.progress(done / total, f"{done:,} of {total:,} descents")

    found = ends(methods, options.starts, options.seed, options.steps, options.lr, watch)
    log.close()
    print(table(found))


def doctor(words: list[str], slot: Slot) -> None:
    """Say whether ranks can train here, and what is missing, alone or under a launcher; status 1 if they cannot."""
    program = "hpc-grawa doctor"
    parser = Parser(prog=program, description=doctor.__doc__, allow_abbrev=False)
    parser.add_argument("--backend", choices=get_args(Backend), default="auto", help="the one to try (auto)")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where runs are to be written (runs)")
    parser.add_argument("--patience", type=float, default=90, help="seconds to wait for a silent rank (90)")
    options = parser.parse_args(words)
    from ..doctor.examine import doctor as examine

    try:
        status = examine(options.backend, options.folder, options.patience, slot)
    except KeyboardInterrupt:
        status = 130
    raise SystemExit(status)


def _toy_methods(options: argparse.Namespace) -> dict[str, Method]:
    """The methods that the command line names, each with those of its settings that it has."""
    methods: dict[str, Method] = {}
    for path in options.methods.split(","):
        found = find_class("method", path)
        if found.__name__ in methods:
            raise wrong("methods", options.methods, "must not name one twice")
        settings = {key: value for key, value in vars(options).items() if key in inspect.signature(found).parameters}
        try:
            methods[found.__name__] = found(**settings)
        except ConfigError as error:
            if error.what is None:
                raise
            raise wrong(error.what.removeprefix("method."), error.value, error.fix) from None
        except TypeError as error:
            raise wrong("method", path, str(error)) from None
    return methods


COMMANDS: dict[str, Callable[[list[str], Slot], None]] = {
    "train": train,
    "evaluate": evaluate,
    "flatness": flatness,
    "measures": measures,
    "table": table,
    "status": status,
    "compare": compare,
    "methods": methods,
    "toy": toy,
    "doctor": doctor,
}


def check_target(target: float | None) -> None:
    """Raise ``ConfigError`` for one that no run can reach."""
    require(target is None or math.isfinite(target), "target", target, "a finite number")
