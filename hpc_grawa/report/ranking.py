"""How well measures rank runs by their generalisation gap, as one figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

from ..generalisation.ranking import Ranking
from .figure import COLOURS, FAINT, INK, drawable, saved_figure

_WIDTH, _ROW, _EDGES = 9.0, 0.26, 1.7  # inches
#: Characters of a line of the caption.
_LINE = 110


def draw(rankings: Sequence[Ranking], path: Path, setting: str) -> None:
    """Draw τ, Ψ and the τ along each axis of every measure that has one, the best above.

    Args:
        rankings: of the measures.
        path: of the figure; its suffix is the format.
        setting: what was ranked.

    Raises:
        ConfigError: the file cannot be written.
    """
    known = [one for one in rankings if not math.isnan(one.tau)]
    shown = sorted(known, key=lambda one: one.psi if not math.isnan(one.psi) else one.tau)
    height = _ROW * len(shown) + _EDGES
    with saved_figure(path, (_WIDTH, height)) as figure:
        axes = figure.add_axes((0.27, 0.62 / height, 0.7, 1 - _EDGES / height))
        rows = range(len(shown))
        for row, one in zip(rows, shown, strict=True):
            along = [value for value in one.along.values() if not math.isnan(value)]
            axes.plot(along, [row] * len(along), "|", color=FAINT, markersize=8)
        axes.plot([one.tau for one in shown], rows, "o", color=COLOURS[1], markersize=6, label="τ over all pairs")
        axes.plot([one.psi for one in shown], rows, "D", color=COLOURS[0], markersize=5, label="Ψ, mean over axes")
        axes.plot([], [], "|", color=FAINT, markersize=8, label="τ along one axis")
        axes.axvline(0, color=FAINT, linewidth=0.8)
        axes.set_yticks(rows, [drawable(_label(one)) for one in shown])
        axes.set(xlim=(-1.05, 1.05), ylim=(-0.7, len(shown) - 0.3))
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", color="#EEEEEE", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.set_xlabel("agreement with the generalisation gap")
        place = (0.99, 1 - 0.13 / height)
        figure.legend(frameon=False, fontsize=9, loc="upper right", bbox_to_anchor=place, ncols=3, columnspacing=1.2)
        figure.text(0.02, 1 - 0.3 / height, "What foretells the gap", size=13, weight="bold", color=INK, va="center")
        told = fill(drawable(setting), _LINE, max_lines=2, placeholder=" ...")
        figure.text(0.02, 1 - 0.5 / height, told, size=10, color=FAINT, va="top", linespacing=1.4)


def _label(one: Ranking) -> str:
    name = one.name.replace("_", " ")
    return f"{name} (not of {one.left_out} runs)" if one.left_out else name
