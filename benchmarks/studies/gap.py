"""How the norm of the center's gradient goes with the gap between training and test error, over the runs of a grid.

    python benchmarks/studies/gap.py runs/gap --figure gap.png

Each run needs its gradient norm: hpc-grawa flatness runs/gap --measures loss. Correlations are those of trained
runs, whose training accuracy is above ``--trained``, and those of all. Errors are of 1,000 resamplings of the runs.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from hpc_grawa.cli.compare import runs_in
from hpc_grawa.report.figure import COLOURS, FAINT, logarithmic, saved_figure
from hpc_grawa.report.table import aligned

CORRELATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "Pearson": lambda a, b: stats.pearsonr(a, b)[0],
    "Spearman": lambda a, b: stats.spearmanr(a, b)[0],
    "Kendall's tau": lambda a, b: stats.kendalltau(a, b)[0],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--trained", type=float, default=0.9, help="training accuracy of a trained run (0.9)")
    parser.add_argument("--figure", type=Path, default=Path("gap.png"))
    words = parser.parse_args()
    rows = []
    for file in sorted(words.folder.glob("*/flatness.json")):
        summary = json.loads((file.parent / "summary.json").read_text())
        measured = json.loads(file.read_text())["center"]
        norm = next(one["gradient_norm"] for one in reversed(measured) if "gradient_norm" in one)
        rows.append((norm, 100 * summary["gap"], summary["center_train_accuracy"]))
    table = np.array([row for row in rows if np.isfinite(row).all()])
    trained = table[:, 2] >= words.trained
    known = len(runs_in(words.folder))
    print(f"{known} runs, {len(rows)} of them measured, {len(table)} finite; ", end="")
    print(f"{trained.sum()} trained to {words.trained:.0%} accuracy\n")
    kinds = {"trained": table[trained], "all": table, "trained, log": _log(table[trained]), "all, log": _log(table)}
    grid = [["runs", *CORRELATIONS]]
    for name, some in kinds.items():
        grid.append([name, *(_shown(correlation, some) for correlation in CORRELATIONS.values())])
    print("\n".join(aligned(grid)))
    with saved_figure(words.figure, (7.5, 5.0)) as figure:
        axes = figure.add_axes((0.1, 0.12, 0.87, 0.78))
        for number, (name, of) in enumerate((("trained", trained), ("not trained", ~trained))):
            axes.semilogx(table[of, 0], table[of, 1], "o", color=(COLOURS[1], FAINT)[number], markersize=4, label=name)
        logarithmic(axes.xaxis)
        axes.set_xlabel("norm of the center's gradient on the training images")
        axes.set_title("Gap between training and test accuracy, %", size=13, weight="bold", loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="center left")
    print(f"\nfigure  {words.figure}")


def _log(table: Any) -> Any:
    return np.column_stack((np.log(np.maximum(table[:, 0], 1e-12)), table[:, 1]))


def _shown(correlation: Callable[[Any, Any], Any], table: Any) -> str:
    if len(table) < 3:
        return "-"
    draw = np.random.default_rng(0)
    again = [table[draw.integers(len(table), size=len(table))] for _ in range(1000)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)  # of few runs some samples are one run
        error = np.nanstd([correlation(some[:, 0], some[:, 1]) for some in again])
    return f"{correlation(table[:, 0], table[:, 1]):+.3f} +- {error:.3f}"


if __name__ == "__main__":
    main()
