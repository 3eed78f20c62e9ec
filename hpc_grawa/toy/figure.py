"""Descents as one figure: each method's ways over the contour of the function."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..report.figure import COLOURS, FAINT, INK, drawable, saved_figure
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
    cells = len(descents) + 1  # the last is the legend's
    columns = cells if cells <= 3 else math.ceil(math.sqrt(cells))
    rows = math.ceil(cells / columns)
    width, height = columns * (_PANEL + _TICKS) + 0.1, rows * (_PANEL + _TITLE + _TICKS)
    with saved_figure(path, (width, height), _DPI) as figure:

        def panel(cell: int) -> Axes:
            row, column = divmod(cell, columns)
            left = column * (_PANEL + _TICKS) + _TICKS
            bottom = height - (row + 1) * (_PANEL + _TITLE + _TICKS) + _TICKS
            return figure.add_axes((left / width, bottom / height, _PANEL / width, _PANEL / height))

        for cell, (method, descent) in enumerate(descents.items()):
            _draw_panel(panel(cell), method, descent)
        _draw_legend(panel(len(descents)), len(next(iter(descents.values())).ranks), setting)


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
    axes.text(0.02, 0.0, f"{_CAPTION}\n{setting}", size=9, color=FAINT, va="bottom", linespacing=1.5)


def _colour(rank: int) -> str:
    return COLOURS[rank % len(COLOURS)]


def _together(descent: Descent) -> bool:
    """Whether all ranks end in one place, as far as can be seen."""
    ends = descent.ranks[:, -1]
    return float((ends - ends[0]).abs().max()) < 0.02
