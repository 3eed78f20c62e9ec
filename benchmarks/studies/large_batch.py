"""What each optimizer reaches at each size of the batch, with the best of its learning rates.

    python benchmarks/studies/large_batch.py runs/large_batch* --figure large_batch.png

Comparisons whose rows differ in learning rate, one for each size, such as those of ``large_batch.yaml``. Of each row
the learning rate whose center was best at the last evaluation on the way (of held out images) is shown.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hpc_grawa.cli.compare import runs_in
from hpc_grawa.report.figure import COLOURS, saved_figure
from hpc_grawa.report.table import Row, aligned, formatter, in_words, rows
from hpc_grawa.runs.record import RunRecord, group, judged, read_run


def batch(record: RunRecord) -> int:
    """Examples of a step of all ranks."""
    return int(record.config["data.batch_size"]) * int(record.status["world_size"])


def chosen(records: list[RunRecord]) -> dict[str, tuple[Row, RunRecord, list[float]]]:
    """The best row of each name, of those whose seeds have all finished, a run of it, and the rates that were tried."""
    experiments, table = group(records), rows(records)
    found: dict[str, tuple[Row, RunRecord, list[float]]] = {}
    sign = 1 if table.higher_is_better else -1
    for row in table.whole:
        record = experiments[row.label][0]
        # Variants of one method are told apart by their names in the recipe, which those of folders begin with.
        name = record.path.name.partition("-")[0]
        best = found[name][0].last if name in found else None
        tried = [*(found[name][2] if name in found else []), rate(record)]
        if row.last is not None and (best is None or sign * row.last > sign * best):
            found[name] = (row, record, tried)
        elif name in found:
            found[name] = (*found[name][:2], tried)
    return found


def rate(record: RunRecord) -> float:
    """Its learning rate."""
    return float(record.config.get("optimizer.lr") or record.config["optimizer.base.lr"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="of one comparison each")
    parser.add_argument("--figure", type=Path, default=Path("large_batch.png"))
    words = parser.parse_args()
    records = [read_run(run) for folder in words.folders for run in runs_in(folder)]
    by_batch: dict[int, list[RunRecord]] = {}
    for record in records:
        if (state := record.status["state"]) != "finished":
            print(f"not ended  {record.path} ({state}): its learning rate is left out unless another try has finished")
        if record.status.get("world_size"):
            by_batch.setdefault(batch(record), []).append(record)
    comparisons = {size: chosen(members) for size, members in by_batch.items()}
    metric = judged(records).metric
    amount = formatter(metric)
    grid = [["batch", "row", "learning rate", "on the way", f"{in_words(metric)}, test", "training", "gap", "steps"]]
    lines: dict[str, list[tuple[int, float, float]]] = {}
    for size, found in sorted(comparisons.items()):
        for name, (row, record, tried) in found.items():
            test, train = row.mean[f"center_test_{metric}"], row.mean[f"center_train_{metric}"]
            lines.setdefault(name, []).append((size, test, train))
            told = f"{rate(record):g} of {', '.join(f'{lr:g}' for lr in sorted(tried))}"
            reached = [amount(value) for value in (row.last or 0.0, test, train, row.mean["gap"])]
            grid.append([f"{size:,}", name, told, *reached, f"{row.mean['steps']:,.0f}"])
    print("\n".join(aligned(grid)))
    scale = 100 if metric.endswith("accuracy") else 1
    with saved_figure(words.figure, (10.0, 4.4)) as figure:
        for place, title in enumerate(("test", "training")):
            axes = figure.add_axes((0.06 + 0.48 * place, 0.14, 0.43, 0.73))
            for number, (name, points) in enumerate(lines.items()):
                sizes, values = [point[0] for point in points], [scale * point[1 + place] for point in points]
                axes.plot(sizes, values, "o-", color=COLOURS[number % len(COLOURS)], linewidth=1.5, label=name)
            axes.set_xscale("log", base=2)
            axes.set_xticks(sorted(comparisons), [f"{size:,}" for size in sorted(comparisons)])
            axes.minorticks_off()
            axes.set_xlabel("batch of all ranks")
            unit = ", %" if scale == 100 else ""
            axes.set_title(f"{in_words(metric).capitalize()}, {title}{unit}", size=13, weight="bold", loc="left")
            axes.spines[["top", "right"]].set_visible(False)
            if not place:
                axes.legend(frameon=False, loc="lower left")
    print(f"\nfigure  {words.figure}")


if __name__ == "__main__":
    main()
