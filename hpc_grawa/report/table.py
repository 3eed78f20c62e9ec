"""Runs as a table: one row per experiment, mean ± standard deviation over its seeds."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

from ..errors import ConfigError
from ..runs.log import human_bytes
from ..runs.record import RunRecord, evaluated_part, group, is_number, judged, setting
from ..screen import ENDLESS, as_shown, counted


@dataclass(frozen=True)
class Row:
    """One experiment: its runs differ in their seeds only.

    Attributes:
        label: the method, and what tells it from other experiments of that method.
        experiment: all that its runs have in common, as of ``RunRecord.experiment``.
        method: its name alone.
        network: the network that was emulated, if any.
        runs: how many there are.
        seeds: theirs, in the order of the runs.
        state: ``finished``, or what else became of the runs.
        shares: whether the ranks shared gradients, at least for a while.
        best_part: the data on which their best centers were chosen, or empty where they do not say.
        mean: over the runs, of every number in ``summary.json`` that all of them have, under its key; also
            ``seconds_to_target``, over the runs that reach it.
        std: standard deviation over the runs (n - 1 in the denominator); empty for a single run.
        reached: how many runs reach the target.
        by_seed: the center's test metric of each seed, of finished runs.
        last: mean over the runs of the center's last evaluation on the data that were evaluated on the way.
        flatness_of: by what the flatness of each center that has any was measured, as ``RunRecord`` says it.
    """

    label: str
    experiment: str
    method: str
    network: str | None
    runs: int
    seeds: tuple[int, ...]
    state: str
    shares: bool
    best_part: str
    mean: dict[str, float]
    std: dict[str, float]
    reached: int
    by_seed: dict[int, float]
    last: float | None
    flatness_of: tuple[dict[str, str], ...]


@dataclass(frozen=True)
class Table:
    """Rows, and what they have in common.

    Attributes:
        rows: in the order in which the experiments were given.
        setting: model, data, ranks and budget in words, as far as they are the same for all.
        metric: what the model is judged by.
        part: the data on which the time to target was measured.
        target: value of the metric to which the time is taken, or None where none was given or found.
        target_given: whether the caller chose the target.
    """

    rows: tuple[Row, ...]
    setting: str
    metric: str
    part: str
    target: float | None
    target_given: bool
    higher_is_better: bool

    @property
    def best(self) -> Row | None:
        """The finished row whose center is best, on the mean over its runs; a ``whole`` one if any is.

        On test data, or by the last evaluation on the way where that was on other data.
        """
        rows = [row for row in self.rows if row.state == "finished"]
        whole = [row for row in rows if not self._lost(row)] or rows
        on_test = self.part == "test"
        return _best_of(
            whole,
            self.higher_is_better,
            lambda row: row.mean.get(f"center_test_{self.metric}") if on_test else row.last,
        )

    @property
    def whole(self) -> list[Row]:
        """Rows of which every seed has finished, as those that are left would flatter one of which some diverged.

        Of a method, over one network, that has none: those of which most seeds are left.
        """
        by_method: dict[tuple[str, str | None], list[Row]] = {}
        for row in self.rows:
            if row.state == "finished":
                by_method.setdefault((row.method, row.network), []).append(row)
        found: list[Row] = []
        for rows in by_method.values():
            most = max(row.runs for row in rows)
            found += [row for row in rows if not self._lost(row)] or [row for row in rows if row.runs == most]
        return found

    @property
    def incomplete(self) -> list[Row]:
        """Rows of runs that have not finished, and whose seeds have not in another try."""
        finished = {(row.experiment, seed) for row in self.rows if row.state == "finished" for seed in row.seeds}
        others = [row for row in self.rows if row.state != "finished"]
        return [row for row in others if not all((row.experiment, seed) in finished for seed in row.seeds)]

    def _lost(self, row: Row) -> bool:
        return any(other.experiment == row.experiment for other in self.incomplete)

    @property
    def chosen(self) -> list[tuple[Row, int]]:
        """Of each method with several settings the one whose last evaluation on the way was best; and of how many.

        A network is no setting: one is chosen over each.
        """
        by_method: dict[tuple[str, str | None], list[Row]] = {}
        for row in self.whole:
            by_method.setdefault((row.method, row.network), []).append(row)
        tried = {(row.method, row.network, row.experiment) for row in self.rows}
        counts = Counter((method, network) for method, network, _ in tried)
        found = [
            (_best_of(rows, self.higher_is_better, lambda row: row.last), counts[key])
            for key, rows in by_method.items()
            if counts[key] > 1
        ]
        return [(row, count) for row, count in found if row is not None]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]


def _best_of(rows: Sequence[Row], higher_is_better: bool, value: Callable[[Row], float | None]) -> Row | None:
    sign = 1 if higher_is_better else -1
    known = [(sign * v, row) for row in rows if (v := value(row)) is not None and math.isfinite(v)]
    return max(known, key=lambda pair: pair[0])[1] if known else None


#: Measures of ``hpc-grawa flatness`` that are shown, where there are some.
FLATNESS = {
    "largest eigenvalue": "flatness_largest_eigenvalue",
    "trace": "flatness_trace",
    "Frobenius norm": "flatness_frobenius_norm",
    "sum of Ritz values": "flatness_sum_of_ritz_values",
    "root of their squares' sum": "flatness_root_of_squared_ritz_values",
    "SAM sharpness": "flatness_sam_sharpness",
    "epsilon-sharpness": "flatness_epsilon_sharpness",
    "low-pass loss": "flatness_lpf",
    "entropy": "flatness_entropy",
    "gradient norm": "flatness_gradient_norm",
    "valley width": "flatness_valley_width",
    "valley width, at least": "flatness_valley_width_at_least",
}

#: What its column says.
HEALED = (
    "healed: how often a rank whose model was no longer finite became the center and went on; where gradients are "
    "shared, a run diverges then"
)


def rows(records: Sequence[RunRecord], target: float | None = None) -> Table:
    """One row per experiment: one a run, or mean and standard deviation over the seeds where several were run.

    The time to target is that of the first evaluation at which the center meets the target. Chosen here, the target is
    the last value of the run that ends worst: the hardest target that every finished run holds at its end, so that no
    method is left out and none is favoured. (A target from the means would be missed by some of the seeds, and a mean
    over the others would flatter their method.) A run that diverged makes that target an easy one: give your own then.
    For a single experiment none is chosen.

    Args:
        records: finished and unfinished runs; the latter have rows of their own and no say in the target.
        target: value of the metric, or None for the one above.

    Raises:
        ConfigError: if there are no runs, or they are judged by different metrics.
    """
    experiments = group(records)
    finished = [record for record in records if record.status["state"] == "finished"]
    part = evaluated_part(finished or records)
    chosen = _hardest_common_target(finished, part) if target is None and len(experiments) > 1 else target
    return Table(
        rows=tuple(_row(label, runs, chosen, part) for label, runs in experiments.items()),
        setting=setting(records),
        metric=judged(records).metric,
        part=part,
        target=chosen,
        target_given=target is not None,
        higher_is_better=judged(records).higher_is_better,
    )


def markdown(table: Table, width: int = ENDLESS) -> str:
    """The table for people: a line that says what is compared, aligned Markdown, and a note on what the columns say.

    Where it is wider than ``width`` and that helps, experiments are its columns.
    """
    metric = table.metric
    amount = formatter(metric)
    repeated = any(row.runs > 1 for row in table)
    columns: list[tuple[str, Callable[[Row], str]]] = [("method", lambda row: row.label)]
    if repeated:
        columns.append(("runs", lambda row: str(row.runs)))

    def add(heading: str, key: str, form: Callable[[float], str], spread: bool = False, always: bool = True) -> None:
        if always or any(row.mean.get(key, 0.0) >= 0.05 for row in table):  # less is shown as none
            columns.append((heading, lambda row: _cell(row, key, form, spread)))

    add("center, test", f"center_test_{metric}", amount, spread=True)
    prefix = "center_test_"
    numbers = dict.fromkeys(key for row in table for key in row.mean if key.startswith(prefix))
    for key in (key for key in numbers if key not in (f"{prefix}loss", f"{prefix}{metric}")):
        name = key.removeprefix(prefix)
        add(f"{in_words(name)}, center, test", key, formatter(name), spread=True)
    for part in dict.fromkeys(row.best_part for row in table if row.best_part):
        columns.append((f"best, {part}", _best(part, f"best_center_{metric}", amount)))
    if any(p is not None for p in _against_best(table).values()):
        columns.append(("p", lambda row: _p(row, table)))
    add("mean, test", f"mean_test_{metric}", amount, spread=True)
    add("center, train", f"center_train_{metric}", amount, spread=True)
    add("gap", "gap", amount, spread=True)
    add("steps", "steps", _count)
    add("rounds", "rounds", _count)
    add("healed", "healed", _count, always=False)
    add("sent/rank", "bytes_sent", human_bytes)
    add("computing", "compute_seconds", _seconds)
    add("loading", "loading_seconds", _seconds)
    add("communicating", "communication_seconds", _seconds)
    add("hidden", "hidden_seconds", _seconds, always=False)
    add("waiting", "waiting_seconds", _seconds)
    if table.target is not None:
        columns.append((f"to {amount(table.target)}", _reached))
    for heading, key in FLATNESS.items():
        if any(key in row.mean for row in table):
            add(heading, key, lambda value: f"{value:.4g}", spread=True)

    grid = [[heading for heading, _ in columns], *([cell(row) for _, cell in columns] for row in table)]
    shapes = aligned(grid), aligned([list(column) for column in zip(*grid, strict=True)])
    lines = next((shape for shape in shapes if len(shape[0]) <= width), shapes[0])
    title = ": ".join(filter(None, (in_words(metric).capitalize(), table.setting)))
    return "\n".join([f"{title}.", "", *lines, "", *_notes(table, width)])


def write_csv(table: Table, path: str | Path) -> None:
    """Write raw numbers: accuracies as fractions, bytes, seconds; all there are in the summaries, not the table's few.

    One line a row. The standard deviation follows each number as ``<key>_std``, empty for a single run; ``target`` and
    ``reached`` (runs) come last.

    Raises:
        ConfigError: if the file cannot be written.
    """
    keys = list(dict.fromkeys(key for row in table for key in row.mean if key != "seconds_to_target"))
    keys.append("seconds_to_target")
    head = ["experiment", "method", "state", "runs", "seeds", "best_part"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*head, *(name for key in keys for name in (key, f"{key}_std")), "target", "reached"])
    for row in table:
        seeds = " ".join(map(str, row.seeds))
        numbers = (values.get(key, "") for key in keys for values in (row.mean, row.std))
        target = "" if table.target is None else table.target
        texts = [row.label, row.method, row.state, row.runs, seeds, row.best_part]
        writer.writerow([*texts, *numbers, target, row.reached])
    try:
        # A label may name a folder whose bytes are no text.
        Path(path).write_text(text.getvalue(), encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise ConfigError(f"the table {path} cannot be written: {error.strerror}") from error


def in_words(metric: str) -> str:
    """What people call a metric: ``bits per byte``."""
    return metric.replace("_", " ")


def formatter(metric: str) -> Callable[[float], str]:
    """How values of a metric are written for people: accuracies as ``97.2 %``, others to four digits."""
    return (lambda value: f"{100 * value:.1f} %") if metric.endswith("accuracy") else (lambda value: f"{value:.4g}")


def _row(label: str, runs: Sequence[RunRecord], target: float | None, part: str) -> Row:
    found = [run.status for run in runs]
    keys = [key for key in found[0] if key != "seed" and all(is_number(status.get(key)) for status in found)]
    seeds = [status["seed"] if _is_seed(status.get("seed")) else None for status in found]
    samples = {key: [float(status[key]) for status in found] for key in keys}
    times = [] if target is None else [run.time_to(target, part) for run in runs]
    if reached := [time for time in times if time is not None]:
        samples["seconds_to_target"] = reached
    return Row(
        label=label,
        experiment=runs[0].experiment,
        method=runs[0].method,
        network=runs[0].network,
        runs=len(runs),
        seeds=tuple(seed for seed in seeds if seed is not None),
        state=found[0]["state"],
        shares=not found[0].get("rounds") or runs[0].config.get("method.sharing") is not None,
        best_part=str(found[0].get("best_part") or ""),
        mean={key: statistics.fmean(values) for key, values in samples.items()},
        std={key: _std(values) for key, values in samples.items() if len(values) > 1},
        reached=len(reached),
        by_seed={
            int(seed): float(status[key])
            for seed, run, status in zip(seeds, runs, found, strict=True)
            if seed is not None and is_number(status.get(key := f"center_test_{run.metric}"))
        },
        last=statistics.fmean(ends) if (ends := [curve[-1][1] for run in runs if (curve := run.curve(part))]) else None,
        flatness_of=tuple(run.flatness_of for run in runs if run.flatness_of),
    )


def _hardest_common_target(finished: Sequence[RunRecord], part: str) -> float | None:
    ends = [curve[-1][1] for record in finished if (curve := record.curve(part)) and math.isfinite(curve[-1][1])]
    if not ends:
        return None
    return min(ends) if finished[0].higher_is_better else max(ends)


def p_value(one: Mapping[int, float], other: Mapping[int, float]) -> float | None:
    """Of the paired t-test over the seeds that both have; None with fewer than two of them, or without SciPy.

    Neither where all differ by one amount, which by chance accuracies on few examples do: their spread is no 0.

    Args:
        one: a value for each seed.
        other: likewise.
    """
    pairs = [(one[seed], other[seed]) for seed in one if seed in other]
    differences = [a - b for a, b in pairs]
    if len(pairs) < 2 or not all(map(math.isfinite, differences)):
        return None
    if not any(differences):
        return 1.0
    if max(differences) - min(differences) <= 1e-9 * max(map(abs, differences)):
        return None
    try:
        from scipy.stats import ttest_rel
    except ImportError:
        return None
    return float(ttest_rel(*zip(*pairs, strict=True)).pvalue)


def _against_best(table: Table) -> dict[str, float | None]:
    """The p-value of each other row beside the best one."""
    best = table.best
    others = [row for row in table if row is not best and row.state == "finished"]
    return {} if best is None else {row.label: p_value(best.by_seed, row.by_seed) for row in others}


def _p(row: Row, table: Table) -> str:
    if row is table.best:
        return "best"
    p = _against_best(table).get(row.label)
    return "-" if p is None else f"{p:.2g}"


def _is_seed(value: object) -> bool:
    return isinstance(value, int) and is_number(value)


def _std(values: Sequence[float]) -> float:
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def _cell(row: Row, key: str, form: Callable[[float], str], spread: bool) -> str:
    if key not in row.mean:
        return "-"
    text = form(row.mean[key])
    error = row.std.get(key, row.mean.get(f"{key}_error") if key in FLATNESS.values() else None)
    if not spread or error is None or not math.isfinite(error):
        return text
    number, _, unit = text.partition(" ")
    return " ".join(filter(None, (number, "±", form(error).partition(" ")[0], unit)))


def _best(part: str, key: str, form: Callable[[float], str]) -> Callable[[Row], str]:
    """The cells of the rows whose best center was chosen on ``part``."""
    return lambda row: _cell(row, key, form, spread=True) if row.best_part == part else "-"


def _reached(row: Row) -> str:
    text = _cell(row, "seconds_to_target", _seconds, spread=True)
    return text if row.reached in (0, row.runs) else f"{text} ({row.reached} of {row.runs})"


def flatness_note(shown: Sequence[Row]) -> str:
    """By what the flatness of rows was measured, or that it was not measured alike; empty where there is none."""
    told: dict[str, dict[str, None]] = {}  # what only some have belongs to a measure that the others lack
    for key, value in (pair for row in shown for how in row.flatness_of for pair in how.items()):
        told.setdefault(key, {})[value] = None
    if all(len(values) == 1 for values in told.values()):
        alike = ", ".join(value for values in told.values() for value in values)
        return f"flatness: of the center, on {alike}" if told else ""
    each = {row.label: dict.fromkeys(", ".join(how.values()) for how in row.flatness_of) for row in shown}
    ways = "; ".join(f"{label} on {' and '.join(hows)}" for label, hows in each.items() if hows)
    return f"flatness was not measured alike, so do not compare it: {ways}"


def _notes(table: Table, width: int) -> list[str]:
    """What the columns say."""
    metric, amount = in_words(table.metric), formatter(table.metric)
    uneven = len({row.runs for row in table}) > 1
    entries = [
        f"center, mean: {metric} of the method's center after the last round, and of the uniform mean of all ranks",
        "gap: by how much the center is better on training data than on test data",
    ]
    for part in dict.fromkeys(row.best_part for row in table if row.best_part):
        biased = "; too good for new data, so compare by center, test" if part == "test" else ""
        entries.append(f"best, {part}: the center's best evaluation in the run, chosen on the {part} data{biased}")
    if any(row.std for row in table):
        entries.append("±: standard deviation over the runs (other columns: their mean)")
    if any(f"{key}_error" in row.mean and row.runs == 1 for row in table for key in FLATNESS.values()):
        entries.append(
            "± of flatness, of a single run: the estimate's own error (of an eigenvalue a bound, else a standard error)"
        )
    for row in table:
        if again := [f"{seed}" for seed, times in Counter(row.seeds).items() if times > 1]:
            entries.append(f"{row.label} has several runs of seed {', '.join(again)}: they are not independent")
    if tests := sum(p is not None for p in _against_best(table).values()):
        by = "by the same numbers" if table.part == "test" else f"on {table.part} data"
        entries.append(
            "p: of a paired t-test, over the seeds that a row shares with the best one, that both are equally good on "
            "test data; above 0.05 the seeds do not tell them apart; the best one was picked "
            f"{by}, and p is not corrected for {counted(tests, 'test')}"
        )
    sent = [row for row in table if row.mean.get("communication_seconds")]
    if any(row.shares for row in sent) and any(row.mean.get("rounds") for row in sent):
        entries.append("communicating: of shared gradients, with the waiting for slower ranks")
    if any(row.mean.get("healed", 0.0) >= 0.05 for row in table):
        entries.append(HEALED)
    if table.chosen:
        test = f"center_test_{table.metric}"
        told = "; ".join(
            f"{row.label} of {counted(count, 'setting')} (test {_cell(row, test, amount, spread=True)}"
            + (f", {counted(row.runs, 'run')})" if uneven else ")")
            for row, count in table.chosen
        )
        fair = "" if table.part != "test" else ", which makes its test value too good (hold out data.validation)"
        entries.append(f"chosen by the center's last evaluation on {table.part} data{fair}: {told}")
    if table.target is not None:
        why = "" if table.target_given else ", the hardest target that every finished run holds at its end"
        entries.append(
            f"to {amount(table.target)}: training seconds until an evaluation of the center on {table.part} data first "
            f"finds that or better{why}"
        )
    finished = [row for row in table if row.state == "finished" and "training_seconds" in row.mean]
    trained = {row.label: row.mean["training_seconds"] for row in finished}
    if "of training time" in table.setting and trained and max(trained.values()) > 1.1 * min(trained.values()):
        told = ", ".join(f"{label} {_seconds(seconds)}" for label, seconds in trained.items())
        entries.append(f"not at equal training time: {told}")
    if flatness := flatness_note(list(table)):
        entries.append(flatness)
    return [fill(f"- {entry}.", width, subsequent_indent="  ") for entry in entries]


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _seconds(value: float) -> str:
    return f"{value:,.1f} s"


def aligned(grid: list[list[str]]) -> list[str]:
    """Markdown lines: the first column to the left, numbers to the right."""
    grid = [[as_shown(text) for text in cells] for cells in grid]
    widths = [max(3, *map(len, column)) for column in zip(*grid, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [[text.rjust(width) for text, width in zip(cells, widths, strict=True)] for cells in grid]
    for line, cells in zip(lines, grid, strict=True):
        line[0] = cells[0].ljust(widths[0])
    return [f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:])]
