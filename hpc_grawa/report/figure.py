"""Runs as one figure: how fast each method learns, and how the weights spread over ranks, layers and rounds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError
from ..runs.record import RunRecord, evaluated_part, group, judged, setting
from .table import formatter, in_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.colors import ListedColormap, Normalize
    from matplotlib.figure import Figure, FigureBase
    from matplotlib.text import Text

Array = npt.NDArray[np.float64]
#: Seconds, mean and standard deviation.
_Curve: TypeAlias = tuple[Array, Array, Array]

#: After Okabe and Ito: apart for colour-blind readers, the pale ones darkened to carry text, yellow left out.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#B5578F", "#C98A00", "#555555", "#4FA8DE")
#: Tell a second and third round of the colours apart.
_DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)))
INK, FAINT, _RULE = "#222222", "#6B6B6B", "#E4E4E4"
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name may hold a $
}
_SIZE = (12.0, 5.4)  # inches; 1200 pixels wide on a page at 100 per inch
_FURTHER = 3.9  # inches, of a row below for another network
_COURSE = 2.6  # inches, of a row below for the course of one run
_DPI = 200
_SUFFIXES = (".png", ".pdf", ".svg")

_CAPTION = 0.045  # where the names of the horizontal axes stand
_MOST_RANKS = 24  # with their own panel; of more, the layers' mean is shown


def draw(records: Sequence[RunRecord], path: str | Path, target: float | None = None) -> None:
    """Draw runs as one figure of 2400 x 1080 pixels (or the same as vectors).

    Where some were made over another network (an emulated one), their curves are a row below, as wide as the figure. A
    single experiment has a row of its learning rate, H and consensus distance over training instead.

    On the left what the center is judged by over training seconds, a line per experiment: accuracies as errors, and
    over several seeds the mean with a band of one standard deviation. On the right the weights of the first run that
    weights layers, rank by rank; else of the first whose ranks get unequal weights; else the left has all the width.

    Args:
        records: finished or unfinished runs.
        path: of the figure; its suffix is the format, .png, .pdf or .svg.
        target: value of the metric that is marked, or None.

    Raises:
        ConfigError: if the suffix is another, Matplotlib is missing, no run was evaluated, the runs are judged by
            different metrics, or the file cannot be written.
    """
    path = Path(path)
    check_drawable(path)
    group(records)  # raises unless they are judged by one metric
    part = evaluated_part(records)
    networks: dict[str | None, list[RunRecord]] = {}
    for record in records:
        networks.setdefault(record.network, []).append(record)
    rows = [(network, _curves(runs, part)) for network, runs in networks.items()]
    rows = [(network, curves) for network, curves in rows if curves]
    if not rows:
        raise ConfigError(f"there is nothing to draw in {records[0].path}: the center was not evaluated yet")
    shown = networks[rows[0][0]]
    weighted = _weighted_run(shown)
    # A line has its colour in every row.
    pens = {label: i for i, label in enumerate(dict.fromkeys(label for _, curves in rows for label in curves))}
    course = records[0].course() if len(pens) == len(networks) == 1 else {}
    whose = f" of {_short(drawable(records[0].path.name), 40)}" if len(records) > 1 else ""
    heights = [_SIZE[1], *[_FURTHER] * (len(rows) - 1), *([_COURSE] if course else [])]
    with saved_figure(path, (_SIZE[0], sum(heights))) as figure:
        first, *others = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
        _draw_title(first, shown)
        right = 0.985 if weighted is None else 0.53
        _draw_curves(first, judged(shown), part, rows[0][1], pens, target, _Place(right, 0.125, 0.83, 0.87, _CAPTION))
        if weighted is not None:
            _draw_weights(first, weighted, 0.565, sum(run.method == weighted.method for run in shown))
        if course:
            _draw_course(others.pop(), course, whose)
        for row, (network, curves) in zip(others, rows[1:], strict=True):
            place = _Place(0.985, 0.17, 0.855, 0.92, 0.06)
            note = f"over an emulated network of {network}" if network else "over the network that there is"
            _draw_curves(row, judged(networks[network]), part, curves, pens, target, place, note)


class _Place(NamedTuple):
    """Where curves are drawn, in fractions of a row: the right end with their names, the rest from below."""

    right: float
    bottom: float
    top: float
    heading: float
    caption: float


def check_drawable(path: Path) -> None:
    """Raise ``ConfigError`` if no figure can be drawn to ``path``: format, Matplotlib or folder is missing."""
    if path.suffix.lower() not in _SUFFIXES:
        raise ConfigError(f"the figure's name is {path}: must end in {', '.join(_SUFFIXES)}")
    try:
        import matplotlib  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        missing = "Matplotlib" if error.name == "matplotlib" else "scikit-learn"
        raise ConfigError(f"figures need {missing}, which is not installed: pip install 'hpc-grawa[demo]'") from error
    if not path.parent.is_dir():
        raise ConfigError(f"the figure {path} cannot be written: there is no folder {path.parent}")


@contextmanager
def saved_figure(path: Path, size: tuple[float, float], dpi: int = _DPI) -> Iterator[Figure]:
    """An empty figure of ``size`` inches in this package's style, saved at the end of the block.

    Raises:
        ConfigError: the file cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=size, dpi=dpi, facecolor="white")
        FigureCanvasAgg(figure)
        yield figure
        try:
            figure.savefig(path)
        except OSError as error:
            raise ConfigError(f"the figure {path} cannot be written: {error.strerror}") from error


def logarithmic(axis: Axis, subs: Sequence[float] = (1, 2, 5)) -> None:
    """Label a logarithmic axis by plain numbers, at these multiples of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if 1 <= value < 1e6 else f"{value:.4g}"))
    axis.set_minor_formatter(NullFormatter())


def drawable(text: str) -> str:
    """``text`` with escapes for what the font has no picture of (and a figure would end with, or warn of)."""
    return "".join(c if ord(c) in _pictures() else c.encode("unicode_escape").decode() for c in text)


@cache
def _pictures() -> frozenset[int]:
    """The characters that the font has, in regular and bold."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    fonts = (get_font(findfont(FontProperties(family="sans-serif", weight=w))) for w in ("regular", "bold"))
    regular, bold = (frozenset(font.get_charmap()) for font in fonts)
    return regular & bold


def _draw_title(figure: FigureBase, records: Sequence[RunRecord]) -> None:
    experiments = group(records)
    title = setting(records)
    repeats = {len(runs) for runs in experiments.values()}
    if max(repeats) > 1:
        many = f"{min(repeats)} to {max(repeats)}" if len(repeats) > 1 else f"{max(repeats)}"
        title += f"{'; ' if title else ''}mean ± standard deviation of {many} runs"
    figure.text(0.02, 0.945, drawable(title), size=11, color=FAINT, va="center")


def _draw_heading(figure: FigureBase, left: float, text: str, note: str = "", y: float = 0.87) -> None:
    heading = figure.text(left, y, drawable(text), size=13, weight="bold", va="baseline")
    figure.text(left + _width(heading) + 0.01, y, drawable(note), size=10, color=FAINT, va="baseline")


def _text_width(figure: FigureBase, content: str, size: float) -> float:
    text = figure.text(0, 0, content, size=size)
    width = _width(text)
    text.remove()
    return width


def _width(text: Text) -> float:
    """Of a text, as a fraction of the figure's."""
    return float(text.get_window_extent().width) / (_SIZE[0] * _DPI)


# Left: what was learned, and when


def _mean_curve(runs: Sequence[RunRecord], part: str) -> _Curve | None:
    """Seconds ``[N]``, mean and standard deviation ``[N]`` of the metric over the runs; None without an evaluation.

    Every run on its own clock. One that has finished keeps its last value, so that the curve ends in the mean of the
    last values, when the slowest ends; of runs that have not, it ends where the first does.
    """
    points = [[point for point in run.curve(part) if math.isfinite(point[1])] for run in runs]
    every = [np.array(curve, dtype=np.float64) for curve in points if curve]
    if not every:
        return None
    begin, ends = max(curve[0, 0] for curve in every), [curve[-1, 0] for curve in every]
    end = max(ends) if runs[0].status["state"] == "finished" else max(begin, min(ends))
    seconds = np.unique(np.concatenate([curve[:, 0] for curve in every]))
    seconds = seconds[(seconds >= begin) & (seconds <= end)]
    values = np.stack([np.interp(seconds, curve[:, 0], curve[:, 1]) for curve in every])
    return seconds, values.mean(0), values.std(0, ddof=1) if len(every) > 1 else np.zeros(len(seconds))


def _curves(records: Sequence[RunRecord], part: str) -> dict[str, _Curve]:
    """Those of all experiments that were evaluated."""
    found = {label: _mean_curve(runs, part) for label, runs in group(records).items()}
    return {label: curve for label, curve in found.items() if curve is not None}


def _draw_curves(
    figure: FigureBase,
    record: RunRecord,
    part: str,
    curves: Mapping[str, _Curve],
    pens: Mapping[str, int],
    target: float | None,
    place: _Place,
    note: str = "",
) -> None:
    """Lines from the left up to the right end of their place, each named where it ends."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    as_error = record.metric.endswith("accuracy") and record.higher_is_better
    name = in_words(record.metric.replace("accuracy", "error") if as_error else record.metric)
    amount = formatter(record.metric)

    def shown(values: Array) -> Array:
        return 1 - values if as_error else values

    ends = {label: float(shown(means[-1:])[0]) for label, (_, means, _) in curves.items()}
    only = record.method if len(curves) > 1 and all(label.startswith(f"{record.method} ") for label in curves) else ""
    names = {
        label: f"{_short(drawable(label.removeprefix(only).strip()), 40)}  {amount(end)}" for label, end in ends.items()
    }
    left, right, bottom, top = 0.062, place.right, place.bottom, place.top
    room = min(0.028 + max(_text_width(figure, name, 10) for name in names.values()), 0.6 * (right - left))
    axes = figure.add_axes((left, bottom, right - room - left, top - bottom))
    note = ", ".join(filter(None, (only, note)))
    _draw_heading(figure, 0.02, f"{part.capitalize()} {name} of the center", note, place.heading)

    seconds_end = max(float(seconds[-1]) for seconds, _, _ in curves.values())
    axes.set_xlim(0, seconds_end or 1.0)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    figure.text((left + right - room) / 2, place.caption, "training time (s)", ha="center", va="baseline")
    everything = np.concatenate([shown(means) for _, means, _ in curves.values()])
    falls = as_error or not record.higher_is_better
    logarithmic = falls and bool(everything.min() > 0) and float(everything.max() / everything.min()) > 5
    lowest, highest = float(everything.min()), float(everything.max())
    if logarithmic:
        axes.set_yscale("log")
        axes.set_ylim(lowest / 1.25, highest * 1.12)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        margin = 0.06 * ((highest - lowest) or abs(highest) or 1.0)
        axes.set_ylim(lowest - margin, highest + margin)
    scale = 100 if record.metric.endswith("accuracy") else 1
    unit = " %" if scale == 100 else ""
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{scale * value:.4g}{unit}"))
    axes.grid(axis="y", color=_RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)

    floor = axes.get_ylim()[0]
    for label, (seconds, means, stds) in curves.items():
        colour, dashes = pen(pens[label])
        values = shown(means)
        if stds.any():
            low = np.maximum(values - stds, floor) if logarithmic else values - stds
            axes.fill_between(seconds, low, values + stds, color=colour, alpha=0.14, linewidth=0)
        axes.plot(seconds, values, color=colour, linestyle=dashes, linewidth=1.8, solid_capstyle="round", label=label)
        axes.plot(seconds[-1:], values[-1:], "o", color=colour, markersize=4.5, clip_on=False, zorder=3)
    if target is not None:
        level = 1 - target if as_error else target
        axes.axhline(level, color=FAINT, linewidth=0.9, linestyle=(0, (2, 2)), zorder=1)
        axes.annotate(
            f"target {amount(level)}",
            (0, level),
            (3, 3),
            textcoords="offset points",
            size=8.5,
            color=FAINT,
            bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1},
            zorder=4,
        )
    _name_ends(axes, curves, pens, ends, names)


def _draw_course(figure: FigureBase, course: Mapping[str, Sequence[tuple[float, float]]], whose: str) -> None:
    """A small panel for each, side by side."""
    from matplotlib.ticker import MaxNLocator

    width = 0.97 / len(course)
    for number, (name, points) in enumerate(course.items()):
        left = 0.02 + number * width
        seconds, values = np.array(points).T
        figure.text(left, 0.9, f"{name[0].upper()}{name[1:]}", size=11, weight="bold", va="baseline")
        axes = figure.add_axes((left + 0.042, 0.21, width - 0.077, 0.6))
        axes.plot(seconds, values, color=COLOURS[1], linewidth=1.6, solid_capstyle="round")
        axes.plot(seconds[-1:], values[-1:], "o", color=COLOURS[1], markersize=4, clip_on=False, zorder=3)
        axes.set_xlim(0, float(seconds.max()) or 1.0)
        axes.set_ylim(0, 1.08 * float(values[np.isfinite(values)].max(initial=0.0)) or 1.0)
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        axes.grid(axis="y", color=_RULE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        below = f"training time{whose} (s)"
        figure.text(left + 0.042 + (width - 0.077) / 2, 0.03, below, ha="center", va="baseline")


def pen(index: int) -> tuple[str, Any]:
    """Colour and dashes of a line."""
    return COLOURS[index % len(COLOURS)], _DASHES[index // len(COLOURS) % len(_DASHES)]


def _name_ends(
    axes: Axes,
    curves: Mapping[str, _Curve],
    pens: Mapping[str, int],
    ends: Mapping[str, float],
    names: Mapping[str, str],
) -> None:
    """Write each line's name to the right of where it ends, moved apart as little as makes them readable."""
    to_fraction = axes.transData + axes.transAxes.inverted()
    points = {label: tuple(to_fraction.transform((curves[label][0][-1], end))) for label, end in ends.items()}
    height, width = (72 * pixels / _DPI for pixels in (axes.bbox.height, axes.bbox.width))
    gap = 18 / width
    order = sorted(reversed(list(ends)), key=lambda label: round(points[label][1], 6))
    heights = _spread([float(points[label][1]) for label in order], 14 / height)
    for label, y in zip(order, heights, strict=True):
        colour, _ = pen(pens[label])
        axes.annotate(
            names[label],
            xy=points[label],
            xytext=(1 + gap, y),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            color=colour,
            size=10,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.7,
                "linestyle": (0, (1, 2)),  # no part of the curve, which may end early
                "relpos": (0, 0.5),
                "shrinkA": 0,
                "shrinkB": 3,
            },
            annotation_clip=False,
        )


def _spread(positions: Sequence[float], gap: float, low: float = 0.0, high: float = 1.0) -> list[float]:
    """The nearest positions (least squares) that are at least ``gap`` apart and in [low, high]; given in order.

    Without the gaps this is a regression onto increasing numbers.
    """
    from sklearn.isotonic import isotonic_regression

    gap = min(gap, (high - low) / max(1, len(positions) - 1))
    gaps = gap * np.arange(len(positions))
    flat = isotonic_regression(np.asarray(positions) - gaps, y_min=low, y_max=high - (len(positions) - 1) * gap)
    return [float(position) for position in flat + gaps]


# Right: the weights


def _weighted_run(records: Sequence[RunRecord]) -> RunRecord | None:
    """The first run that weights layers, else the first that gives its ranks unequal weights."""
    for record in records:
        if record.weights and len(record.weights[0]) > 1 and len(record.weights[0][0]) > 1:
            return record
    for record in records:
        if any(abs(row[0] - 1 / len(ranks)) > 1e-5 for ranks in record.weights for row in ranks):
            return record
    return None


def _draw_weights(figure: FigureBase, record: RunRecord, left: float, siblings: int) -> None:
    """Weights from ``left`` on: a panel per rank, rounds to the right, layers from input (top) to output (bottom).

    Args:
        figure: to draw in.
        record: with ``weights``.
        left: fraction of the figure's width.
        siblings: runs of that method in the figure, of which this is one.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import FixedLocator, NullLocator

    weights = np.array(record.weights, dtype=np.float64)  # [R, W, K]
    rounds, ranks, layers = weights.shape
    note = f"{ranks} ranks × {layers} layers × {rounds} rounds" if layers > 1 else f"{ranks} ranks × {rounds} rounds"
    if layers > 1 and ranks > _MOST_RANKS:
        weights = weights.mean(2, keepdims=True)
        note = f"{ranks} ranks × {rounds} rounds, mean of {layers} layers"
    ratio, limit = _scaled(weights)
    norm = Normalize(-limit, limit)
    right, bottom, top = 0.915, 0.125, 0.8
    run = f" (run {_short(drawable(record.path.name), 40)})" if siblings > 1 else ""
    _draw_heading(figure, left, f"Weights of {record.method}", note)
    if ratio.shape[2] > 1:
        names = record.layers if len(record.layers) == layers else [f"layer {i + 1}" for i in range(layers)]
        left = _draw_ranks(figure, ratio, names, norm, (left, bottom, right, top))
    else:
        left += 0.035
        axes = figure.add_axes((left, bottom, right - left, top - bottom))
        _draw_image(axes, ratio[:, :, 0].T, norm)
        axes.set_yticks(_ticks(ranks, 20))
        axes.set_ylabel("rank")
        axes.set_xticks([1, rounds] if rounds > 1 else [1])
    figure.text((left + right) / 2, _CAPTION, f"round{run}", ha="center", va="baseline")

    figure.text(right + 0.013, top + 0.018, "weight", size=9)
    bar_axes = figure.add_axes((right + 0.014, bottom, 0.011, top - bottom))
    extend = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}
    clipped = bool((ratio < -limit - 1e-9).any()), bool((ratio > limit + 1e-9).any())
    bar = figure.colorbar(
        ScalarMappable(norm, _colour_map()), cax=bar_axes, extend=extend[clipped], extendfrac=0.02, drawedges=False
    )
    bar.ax.spines["outline"].set_visible(False)
    ticks = [-limit, 0.0, limit]
    bar.ax.yaxis.set_major_locator(FixedLocator(ticks))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    shares = [2**tick / ranks for tick in ticks]
    bar.ax.set_yticklabels([f"{shares[0]:.2g}", f"1/W =\n{shares[1]:.3g}", f"{shares[2]:.2g}"])
    bar.ax.tick_params(length=0, labelsize=9)


def _scaled(weights: Array) -> tuple[Array, float]:
    """log2 of weight over equal share, so that half and twice the share are equally far from 0; where colours end.

    They end at a weight of 1 at the latest, and before it where 99 in 100 weights are nearer to the equal share.
    """
    ranks = weights.shape[1]
    with np.errstate(divide="ignore"):
        ratio = np.log2(weights * ranks)
    finite = np.abs(ratio[np.isfinite(ratio)])
    usual = float(np.quantile(finite, 0.99)) if finite.size else 0.0
    return ratio, max(min(usual, math.log2(ranks)), 0.05)


def _draw_ranks(
    figure: FigureBase, ratio: Array, names: Sequence[str], norm: Normalize, box: tuple[float, float, float, float]
) -> float:
    """A grid of panels, one per rank, of ``ratio`` ``[R, W, K]``; returns where they begin, right of the names."""
    rounds, ranks, layers = ratio.shape
    left, bottom, right, top = box
    lines = 1 if ranks <= 8 else 2
    columns = math.ceil(ranks / lines)
    gap_x, gap_y = 0.005, 0.055
    height = (top - bottom - (lines - 1) * gap_y) / lines
    shown = _ticks(layers, int(height * _SIZE[1] * 72 / 9.5))
    labels = [_short(drawable(names[i])) for i in shown]
    left += max(_text_width(figure, label, 7.5) for label in labels) + 0.006
    width = (right - left - (columns - 1) * gap_x) / columns
    roomy = _text_width(figure, f"1  {rounds}", 8.5) < width
    for rank in range(ranks):
        line, column = divmod(rank, columns)
        axes = figure.add_axes((left + column * (width + gap_x), top - height - line * (height + gap_y), width, height))
        _draw_image(axes, ratio[:, rank].T, norm)
        axes.set_title(f"rank {rank}" if columns <= 4 or column == 0 else f"{rank}", size=9, pad=3, color=INK)
        axes.set_yticks(shown if column == 0 else [], labels if column == 0 else [])
        axes.tick_params(axis="y", labelsize=7.5, pad=2)
        ends = {1: roomy or column == 0, rounds: roomy or column == columns - 1 or rank == ranks - 1}
        shown_rounds = [end for end, fits in ends.items() if fits and rank + columns >= ranks]  # no panel below it
        axes.set_xticks(shown_rounds)
        axes.tick_params(axis="x", labelsize=8.5, pad=2)
        for tick, end in zip(axes.get_xticklabels(), shown_rounds, strict=True):
            tick.set_horizontalalignment("left" if end == 1 else "right")
    return left


def _draw_image(axes: Axes, ratio: Array, norm: Normalize) -> None:
    """A heat map of ``[Y, R]``, rounds counted from 1."""
    lines, rounds = ratio.shape
    axes.imshow(
        np.clip(ratio, norm.vmin, norm.vmax),
        cmap=_colour_map(),
        norm=norm,
        aspect="auto",
        extent=(0.5, rounds + 0.5, lines - 0.5, -0.5),
        interpolation="auto",
    )
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _colour_map() -> ListedColormap:
    """Blue: less than an equal share, red: more; without the darkest ends."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps["RdBu_r"](np.linspace(0.07, 0.93, 255)))


def _ticks(count: int, most: int) -> list[int]:
    """At most about ``most`` evenly spaced indices of ``count``, the first and the last among them."""
    step = math.ceil(count / max(1, most))
    ticks = list(range(0, count, step))
    if 0 < count - 1 - ticks[-1] < 0.8 * step and len(ticks) > 1:
        ticks.pop()
    return list(dict.fromkeys([*ticks, count - 1]))


def _short(name: str, most: int = 22) -> str:
    return name if len(name) <= most else "…" + name[1 - most :]
