"""Where descents end, as a table."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..report.table import aligned
from .vincent import Descent, valley, vincent


def table(descents: Mapping[str, Descent]) -> str:
    """Markdown: where each rank and the center end, f there, and the valley; those that end alike share a line.

    Curvature is the largest second derivative at the valley's minimum, 100/(D min_d x_d²): small in flat ones.

    Args:
        descents: by the name of the method.
    """
    grid = [["method", "ends", "x", "f(x)", "valley", "curvature"]]
    for method, descent in descents.items():
        lines: dict[tuple[str, ...], list[str]] = {}
        for rank, x in enumerate(descent.ranks[:, -1]):
            lines.setdefault(_cells(x), []).append(f"{rank}")
        where = {cells: f"rank {' '.join(ranks)}" for cells, ranks in lines.items()}
        if bool(descent.center[-1].isfinite().all()):
            cells = _cells(descent.center[-1])
            where[cells] = f"{where[cells]}, center" if cells in where else "center"
        grid += [[method, who, *cells] for cells, who in where.items()]
    return "\n".join(aligned(grid))


def _cells(x: Tensor) -> tuple[str, ...]:
    minimum = valley(x)
    curvature = 100 / (len(x) * float(minimum.min()) ** 2)
    return _point(x), f"{float(vincent(x)):.4f}", _point(minimum), f"{curvature:.3g}"


def _point(x: Tensor) -> str:
    return f"({', '.join(f'{value:.3f}' for value in x.tolist())})"
