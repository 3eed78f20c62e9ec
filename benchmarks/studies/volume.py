"""What each row of a comparison sends, in per cent of DataParallel's, beside what it reaches; and H over training.

    python benchmarks/studies/volume.py runs/qsr --figure qsr.png

A comparison with a row named DataParallel and its rivals, such as ``qsr.yaml``'s. Means and standard deviations are of
seeds; H is that of each row's first seed.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from hpc_grawa.cli.compare import runs_in
from hpc_grawa.report.figure import INK, logarithmic, pen, saved_figure
from hpc_grawa.report.table import aligned, formatter, in_words
from hpc_grawa.runs.record import RunRecord, group, read_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--figure", type=Path, default=Path("volume.png"))
    words = parser.parse_args()
    found = [read_run(run) for run in runs_in(words.folder)]
    records = [record for record in found if record.status["state"] == "finished"]
    for record in found:
        if (state := record.status["state"]) != "finished":
            print(f"left out   {record.path} ({state})")
    # Variants of one method are told apart by their names in the recipe, which those of folders begin with.
    rows: dict[str, list[RunRecord]] = {}
    for members in group(records).values():
        rows[members[0].path.name.rpartition("-")[0]] = members
    if "DataParallel" not in rows:
        raise SystemExit(f"{words.folder} has no row DataParallel, whose bytes are the measure")
    metric = records[0].metric
    amount = formatter(metric)
    whole = _mean(rows["DataParallel"], "bytes_sent")
    grid = [["row", "seeds", f"{in_words(metric)}, test", "rounds", "sent per rank", "of DataParallel's"]]
    places = {}
    for name, members in rows.items():
        values = [float(record.status[f"center_test_{metric}"]) for record in members]
        sent, spread = _mean(members, "bytes_sent"), statistics.stdev(values) if len(values) > 1 else 0.0
        places[name] = (100 * sent / whole, statistics.fmean(values), spread)
        shown = amount(places[name][1]) + (f" ± {amount(spread).split(' ')[0]}" if spread else "")
        rounds = f"{_mean(members, 'rounds'):,.0f}"
        grid.append([name, f"{len(members)}", shown, rounds, f"{sent / 1e6:,.1f} MB", f"{places[name][0]:.1f} %"])
    print("\n".join(aligned(grid)))
    scale = 100 if metric.endswith("accuracy") else 1
    with saved_figure(words.figure, (12.0, 4.8)) as figure:
        left, right = figure.add_axes((0.05, 0.14, 0.36, 0.73)), figure.add_axes((0.48, 0.14, 0.36, 0.73))
        for number, (name, members) in enumerate(rows.items()):
            colour, dashes = pen(number)
            rounds = [(e["step"], e["period"]) for e in members[0].events.get("round", []) if e.get("period")]
            if rounds:
                left.step(*zip(*rounds, strict=True), color=colour, linestyle=dashes, linewidth=1.5, where="pre")
            volume, value, spread = places[name]
            right.errorbar(volume, scale * value, scale * spread, fmt="none", ecolor=colour, capsize=3)
            # Dashed lines have open points.
            inside = colour if dashes == pen(0)[1] else "white"
            right.plot(volume, scale * value, "o", color=colour, markerfacecolor=inside, markersize=7, zorder=3)
            left.plot([], [], "o", color=colour, markerfacecolor=inside, linestyle=dashes, label=name)
        reached = f"{in_words(metric).capitalize()}, test" + (", %" if scale == 100 else "")
        for axes, title, below in (
            (left, "Local steps of a round, H", "step"),
            (right, reached, "sent, % of DataParallel"),
        ):
            axes.set_title(title, size=13, weight="bold", loc="left", color=INK)
            axes.set_xlabel(below)
            axes.spines[["top", "right"]].set_visible(False)
        left.set_yscale("log", base=2)
        left.yaxis.set_major_formatter("{x:,.0f}")
        right.set_xscale("log")
        logarithmic(right.xaxis, (1, 2, 5))
        figure.legend(frameon=False, loc="center left", bbox_to_anchor=(0.85, 0.5), handlelength=3)
    print(f"\nfigure  {words.figure}")


def _mean(records: list[RunRecord], key: str) -> float:
    return statistics.fmean(float(record.status[key]) for record in records)


if __name__ == "__main__":
    main()
