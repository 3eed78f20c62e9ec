"""Descents as one figure: each method's ways over the contour of the function."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..report.figure import COLOURS, FAINT, INK, drawable, saved_figure
from .rounds import Pulled
from .vincent import DOMAIN, Descent, vincent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DPI = 150
_PANEL, _TITLE, _TICKS = 2.6, 0.33, 0.36  # inches
_LEVELS = (-1, -0.85, -0.55, -0.15, 1)
_SHADES = ("#8AA6C0", "#B8CADA", "#DCE5ED", "#F8FAFB")
_TICKED = (0.33, 1.17, 2.19, 4.11, 7.71)  # the valleys, but one for which there is no room
_MOST_RANKS = 8  # in the legend
_START: dict[str, Any] = {"marker": "o", "linestyle": "none", "markersize": 6, "color": "white", "markeredgewidth": 1.6}
_CENTER: dict[str, Any] = {"color": INK, "linewidth": 1, "linestyle": (0, (1, 1.2))}
_CENTER_END: dict[str, Any] = {"color": INK, "marker": "+", "markersize": 14, "markeredgewidth": 1}
_WEIGHTS = "Dots on the axes: weights there;\narrows: the pull; dashed: the hull."
_CAPTION = "f(x) = −½ Σ sin(10 ln x); dark is low.\nAll valleys are as deep,\nthe farther from 0 the flatter."


def draw(descents: Mapping[str, Descent], path: Path, setting: str) -> None:
    """Draw descents of two coordinates, a panel per method and a legend, on axes of √x.

    (On logarithmic axes all valleys would look alike; on linear ones the sharp ones would not be seen.)

    Args:
        descents: by the name of the method.
        path: of the figure; its suffix is the format.
        setting: what the panels have in common, for the legend.

    Raises:
        ConfigError: the file cannot be written.
    """
    with _panels(len(descents), path) as panel:
        for cell, (method, descent) in enumerate(descents.items()):
            _draw_panel(panel(cell), method, descent)
        _draw_legend(panel(len(descents)), len(next(iter(descents.values())).ranks), f"{_CAPTION}\n{setting}")


def draw_surfaces(descents: Mapping[str, Descent], path: Path, setting: str) -> None:
    """Draw the same in three dimensions: the function as a surface, seen from above the flat valleys."""
    with _panels(len(descents), path) as panel:
        for cell, (method, descent) in enumerate(descents.items()):
            _draw_surface(panel(cell, projection="3d"), method, descent)
        _draw_legend(panel(len(descents)), len(next(iter(descents.values())).ranks), f"{_CAPTION}\n{setting}")


def draw_weights(rounds: Mapping[str, Pulled], path: Path, setting: str) -> None:
    """Draw what weights do in a round: where ranks are, what each weighs on each axis, the center, and the pull to it.

    A method with one weight per rank makes a center inside the ranks' hull; one with a weight per layer (here a
    coordinate) anywhere in the box around them.
    """
    with _panels(len(rounds), path) as panel:
        for cell, (method, pulled) in enumerate(rounds.items()):
            _draw_round(panel(cell), method, pulled)
        _draw_legend(panel(len(rounds)), len(next(iter(rounds.values())).before), f"{_WEIGHTS}\n{setting}")


@contextmanager
def _panels(count: int, path: Path) -> Iterator[Callable[..., Any]]:
    """A figure of so many square panels, and one for the legend; yields what makes each by its number."""
    cells = count + 1
    columns = cells if cells <= 3 else math.ceil(math.sqrt(cells))
    rows = math.ceil(cells / columns)
    width, height = columns * (_PANEL + _TICKS) + 0.1, rows * (_PANEL + _TITLE + _TICKS)
    with saved_figure(path, (width, height), _DPI) as figure:

        def panel(cell: int, **options: Any) -> Any:
            row, column = divmod(cell, columns)
            left = column * (_PANEL + _TICKS) + _TICKS
            bottom = height - (row + 1) * (_PANEL + _TITLE + _TICKS) + _TICKS
            return figure.add_axes((left / width, bottom / height, _PANEL / width, _PANEL / height), **options)

        yield panel


def _draw_panel(axes: Axes, method: str, descent: Descent) -> None:
    edges = 0.87 * DOMAIN[0], 1.06 * DOMAIN[1]
    x = torch.linspace(edges[0] ** 0.5, edges[1] ** 0.5, 400, dtype=torch.float64).square()
    f = vincent(torch.stack(torch.meshgrid(x, x, indexing="xy"), -1))
    axes.contourf(x, x, f, levels=_LEVELS, colors=_SHADES)
    for scale, axis in ((axes.set_xscale, axes.xaxis), (axes.set_yscale, axes.yaxis)):
        scale("function", functions=(lambda v: np.sqrt(np.maximum(v, 0)), np.square))
        axis.set_ticks(_TICKED, [f"{tick:.2g}" for tick in _TICKED])
    axes.set(xlim=edges, ylim=edges)
    axes.tick_params(length=2, pad=2, labelsize=8, color=FAINT)
    together = _together(descent)
    for rank, way in enumerate(descent.ranks):
        colour = _colour(rank)
        size = 12 - 8 * rank / max(1, len(descent.ranks) - 1) if together else 7  # all are seen, as rings
        axes.plot(*way.T, color=colour, linewidth=1.5, solid_joinstyle="round")
        axes.plot(*way[0], **_START, markeredgecolor=colour, zorder=3, clip_on=False)
        axes.plot(*way[-1], "o", markersize=size, color=colour, markeredgewidth=0, zorder=4)
    axes.plot(*descent.center.T, **_CENTER)
    axes.plot(*descent.center[-1], **_CENTER_END, zorder=5)
    axes.set_title(drawable(method), size=11, weight="bold", loc="left", pad=5, color=INK)
    end = f"ends at ({', '.join(f'{x:.2f}' for x in descent.ranks[0, -1].tolist())})" if together else "ranks end apart"
    axes.set_title(end, size=9, loc="right", pad=5, color=FAINT)


def _draw_surface(axes: Any, method: str, descent: Descent) -> None:
    """The ways lie on the surface, each axis as √x."""
    x = torch.linspace(DOMAIN[0] ** 0.5, DOMAIN[1] ** 0.5, 160, dtype=torch.float64)
    a, b = torch.meshgrid(x, x, indexing="xy")
    f = vincent(torch.stack((a, b), -1).square())
    axes.computed_zorder = False  # ways over the surface that they lie on
    axes.plot_surface(a, b, f, cmap="Blues_r", rcount=160, ccount=160, linewidth=0, antialiased=False, alpha=0.85)
    for rank, way in enumerate(descent.ranks):
        colour, heights = _colour(rank), vincent(way) + 0.02
        axes.plot(*way.sqrt().T, heights, color=colour, linewidth=1.5, zorder=10)
        for place, face in ((0, "white"), (-1, colour)):
            spot = (*way[place].sqrt().tolist(), float(heights[place]))
            axes.plot(*([v] for v in spot), "o", markersize=5, color=face, markeredgecolor=colour, zorder=11)
    axes.view_init(elev=58, azim=-122)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks([tick**0.5 for tick in _TICKED[1:]], [f"{tick:.2g}" for tick in _TICKED[1:]])
    axes.set_zticks([-1, 0, 1])
    axes.tick_params(labelsize=7, pad=-3, color=FAINT)
    axes.set_title(drawable(method), size=11, weight="bold", loc="left", pad=0, color=INK)


def _draw_round(axes: Axes, method: str, pulled: Pulled) -> None:
    low, high = pulled.before.min(0).values, pulled.before.max(0).values
    span = torch.clamp(high - low, min=1e-3)
    margin = 0.22 * span
    axes.set(xlim=(float(low[0] - margin[0]), float(high[0] + 0.12 * span[0])))
    axes.set(ylim=(float(low[1] - margin[1]), float(high[1] + 0.12 * span[1])))
    edges = float(axes.get_xlim()[0]), float(axes.get_ylim()[0])
    axes.plot(*_hull(pulled.before).T, color=FAINT, linewidth=0.8, linestyle=(0, (3, 2)), zorder=1)
    for rank, (x, weight, after) in enumerate(zip(pulled.before, pulled.weights, pulled.after, strict=True)):
        colour = _colour(rank)
        axes.annotate("", after.tolist(), x.tolist(), arrowprops={"arrowstyle": "->", "color": colour, "lw": 1.3})
        axes.plot(*x, **_START, markeredgecolor=colour, zorder=3)
        for place, share in (((float(x[0]), edges[1]), weight[0]), ((edges[0], float(x[1])), weight[1])):
            axes.plot(*place, "o", markersize=2 + 22 * float(share) ** 0.5, color=colour, alpha=0.6, clip_on=False)
            axes.plot((x[0], place[0]), (x[1], place[1]), color=colour, linewidth=0.5, linestyle=(0, (1, 2)))
    axes.plot(*pulled.center, **_CENTER_END, zorder=5)
    axes.ticklabel_format(useOffset=False)
    axes.tick_params(length=2, pad=8, labelsize=8, color=FAINT)
    axes.set_title(drawable(method), size=11, weight="bold", loc="left", pad=5, color=INK)


def _hull(points: Tensor) -> Tensor:
    """The corners of the convex hull of points ``[W, 2]``, in order, the first one again at the end."""
    from scipy.spatial import ConvexHull, QhullError

    try:
        corners = ConvexHull(points.numpy()).vertices.tolist()
    except (QhullError, ValueError):  # on one line, or fewer than three
        corners = list(range(len(points)))
    return points[[*corners, corners[0]]]


def _draw_legend(axes: Axes, ranks: int, setting: str) -> None:
    from matplotlib.lines import Line2D

    axes.set_axis_off()
    entries = [
        Line2D([], [], color=_colour(rank), linewidth=1.5, marker="o", markersize=6, label=f"rank {rank}")
        for rank in range(min(ranks, _MOST_RANKS))
    ]
    entries += [
        Line2D([], [], **{**_CENTER, **_CENTER_END}, label="center"),
        Line2D([], [], **_START, markeredgecolor=FAINT, label="start"),
        Line2D([], [], linestyle="none", marker="o", markersize=7, color=FAINT, markeredgewidth=0, label="end"),
    ]
    axes.legend(handles=entries, loc="upper left", frameon=False, fontsize=10, labelspacing=0.45, borderaxespad=0)
    axes.text(0.02, 0.0, setting, size=9, color=FAINT, va="bottom", linespacing=1.5)


def _colour(rank: int) -> str:
    return COLOURS[rank % len(COLOURS)]


def _together(descent: Descent) -> bool:
    """Whether all ranks end in one place, as far as can be seen."""
    ends = descent.ranks[:, -1]
    return float((ends - ends[0]).abs().max()) < 0.02
