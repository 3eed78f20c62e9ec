"""The loss between models as one figure: along lines, and on a plane."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ConfigError
from .figure import FAINT, INK, drawable, logarithmic, pen, saved_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZE = (12.0, 5.2)  # inches
_LEVELS = 24


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Draw losses along lines (on the left), and on a plane (on the right) if there is one.

    Args:
        found: ``from``, ``at``, ``lines`` (by the model at their end: ``distance``, ``losses``), ``how``, and perhaps
            ``plane`` (``through``, ``places``, ``across``, ``up``, ``losses``).
        path: of the figure; its suffix is the format.

    Raises:
        ConfigError: the file cannot be written.
    """
    how, plane = found["how"], found.get("plane")
    if not any(math.isfinite(loss) for one in found["lines"].values() for loss in one["losses"]):
        raise ConfigError("there is nothing to draw: no loss on a line is finite")
    with saved_figure(path, _SIZE) as figure:
        width = 0.9 if plane is None else 0.47
        _lines(figure.add_axes((0.065, 0.13, width, 0.7)), found)
        if plane is not None:
            axes = figure.add_axes((0.62, 0.13, 0.29, 0.7))
            bar = figure.add_axes((0.925, 0.13, 0.012, 0.7))
            _plane(axes, bar, plane)
        said = f"{how['examples']:,} of {how['of']:,} training examples, {how['dtype']}"
        said += "; BatchNorm by each batch" if how["statistics"] == "batch" else ""
        figure.text(0.02, 0.945, drawable(said), size=11, color=FAINT, va="center")


def _lines(axes: Axes, found: Mapping[str, Any]) -> None:
    for number, (name, one) in enumerate(found["lines"].items()):
        (colour, dashes), label = pen(number), drawable(f"{name}, at {one['distance']:.3g}")
        axes.plot(found["at"], one["losses"], color=colour, linestyle=dashes, linewidth=1.5, label=label)
    for at, name in ((0, found["from"]), (1, "the other model")):
        axes.axvline(at, color=FAINT, linewidth=0.8, linestyle=(0, (2, 2)), zorder=1)
        axes.annotate(drawable(name), (at, 1), (3, -3), xycoords=("data", "axes fraction"), textcoords="offset points",
                      va="top", size=9, color=FAINT)  # fmt: skip
    axes.set_xlabel(drawable(f"part of the way from {found['from']}"))
    axes.set_title("Loss along lines", size=13, weight="bold", loc="left", pad=8)
    if not any(loss <= 0 for one in found["lines"].values() for loss in one["losses"]):
        axes.set_yscale("log")
        logarithmic(axes.yaxis)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="best")


def _plane(axes: Axes, bar: Axes, plane: Mapping[str, Any]) -> None:
    losses = np.array(plane["losses"], dtype=float)
    finite = losses[np.isfinite(losses)]
    if not len(finite):
        raise ConfigError("there is nothing to draw: no loss on the plane is finite")
    low, high = float(finite.min()), float(np.percentile(finite, 95))
    high = max(high, low + 1e-3 * abs(low), low + 1e-12)
    from matplotlib.colors import LogNorm, Normalize

    shown = np.clip(np.nan_to_num(losses, nan=high, posinf=high), low, high)
    spaced, norm = (np.geomspace, LogNorm()) if low > 0 else (np.linspace, Normalize())
    levels = spaced(low, high, _LEVELS)
    drawn = axes.contourf(plane["across"], plane["up"], shown, levels, norm=norm, cmap="viridis", extend="both")
    axes.contour(plane["across"], plane["up"], shown, levels[::3], colors="white", linewidths=0.5, alpha=0.6)
    for name, (a, b) in plane["places"].items():
        inside = name in plane["through"]
        axes.plot(a, b, "o" if inside else "*", color="white", markersize=7 if inside else 12, markeredgecolor=INK)
        axes.annotate(drawable(name), (a, b), (6, 4), textcoords="offset points", size=9, color="white")
    axes.set_aspect("equal")
    axes.set_title("Loss on the plane through three", size=13, weight="bold", loc="left", pad=8)
    shade = axes.figure.colorbar(drawn, cax=bar, ticks=levels[:: _LEVELS // 5])
    shade.ax.set_yticklabels([f"{level:.3g}" for level in levels[:: _LEVELS // 5]], size=8)
    shade.ax.minorticks_off()
