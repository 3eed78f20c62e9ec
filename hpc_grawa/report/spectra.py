"""Spectra of the Hessian at several models as one figure: their densities, and the largest eigenvalues."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ConfigError
from ..flatness.lanczos import density
from .figure import FAINT, Array, drawable, logarithmic, pen, saved_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZE = (12.0, 4.6)  # inches
_POINTS = 2000
#: Of the density's bumps, in the width of all spectra.
_WIDTH = 0.004
#: Density below which nothing is shown, in parts of the largest.
_LEAST = 1e-7


def draw(found: Sequence[tuple[str, dict[str, Any]]], path: Path) -> None:
    """Draw the spectral densities (on the left, logarithmic) and the top eigenvalues (on the right) of models.

    Args:
        found: names, and what was measured; models of one name, such as an experiment's seeds, have lines of one kind,
            and those without a spectrum are left out.
        path: of the figure; its suffix is the format.

    Raises:
        ConfigError: there is no spectrum, or the file cannot be written.
    """
    seen = [(name, one) for name, one in found if one.get("spectra")]
    if not seen:
        raise ConfigError("there is nothing to draw: none of the models has a spectrum (--measures spectrum)")
    how, values = seen[0][1]["how"], seen[0][1]["ritz_values"]
    with saved_figure(path, _SIZE) as figure:
        left = figure.add_axes((0.065, 0.14, 0.49, 0.68))
        right = figure.add_axes((0.66, 0.14, 0.32, 0.68))
        title = f"{values} Ritz values; {how['examples']:,} of {how['of']:,} training examples, {how['dtype']}"
        figure.text(0.02, 0.935, drawable(title), size=11, color=FAINT, va="center")
        names = list(dict.fromkeys(name for name, _ in seen))
        _densities(left, [(names.index(name), _spectra(one)) for name, one in seen])
        _tops(right, [(names.index(name), one["top_eigenvalues"]) for name, one in seen], names)


def _spectra(one: dict[str, Any]) -> list[tuple[Array, Array]]:
    return [(np.array(values), np.array(weights)) for values, weights in one["spectra"]]


def _densities(axes: Axes, spectra: Sequence[tuple[int, list[tuple[Array, Array]]]]) -> None:
    ends = [values[at] for _, starts in spectra for values, _ in starts for at in (0, -1)]
    low, high = min(ends), max(ends)
    span = (high - low) or 1.0
    grid = np.linspace(low - 0.03 * span, high + 0.03 * span, _POINTS)
    tallest = 0.0
    for number, starts in spectra:
        found = density(starts, grid, _WIDTH * span)
        tallest = max(tallest, float(found.max()))
        colour, dashes = pen(number)
        axes.semilogy(grid, found, color=colour, linestyle=dashes, linewidth=1.3)
    axes.set_ylim(_LEAST * tallest, 2 * tallest)
    logarithmic(axes.yaxis, (1,))
    axes.set_xlim(grid[0], grid[-1])
    axes.set_xlabel("eigenvalue")
    axes.set_title("Spectral density of the Hessian", size=13, weight="bold", loc="left", pad=8)
    axes.spines[["top", "right"]].set_visible(False)


def _tops(axes: Axes, tops: Sequence[tuple[int, list[float]]], names: Sequence[str]) -> None:
    told: set[int] = set()
    for number, values in tops:
        colour, dashes = pen(number)
        label = None if number in told else drawable(names[number])
        told.add(number)
        at = range(1, len(values) + 1)
        axes.plot(at, values, marker="o", color=colour, linestyle=dashes, linewidth=1, markersize=5, label=label)
    axes.set_xlabel("number of the eigenvalue, the largest first")
    axes.set_title("Largest eigenvalues", size=13, weight="bold", loc="left", pad=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    if all(value >= 0 for _, values in tops for value in values):
        axes.set_ylim(bottom=0)
