"""The table of the GRAWA paper: of each method its best setting's error, communication, gap and flatness."""

from __future__ import annotations

from collections.abc import Sequence

from ..runs.record import RunRecord, group
from ..screen import counted, wrapped
from .table import FLATNESS, HEALED, Row, Table, aligned, flatness_note, in_words, rows


def _chosen(table: Table) -> list[Row]:
    """Of each method one setting: whose center was best at the last evaluation on the way, on the mean over seeds."""
    best = {(row.method, row.network): row for row, _ in table.chosen}
    return [row for row in table.whole if best.get((row.method, row.network), row) is row]


def chosen_runs(records: Sequence[RunRecord]) -> list[RunRecord]:
    """The runs of the settings that the table is to show."""
    experiments = group(records)
    return [record for row in _chosen(rows(records)) for record in experiments[row.label]]


def paper_table(records: Sequence[RunRecord], paper: str) -> str:
    """The table as text.

    Args:
        records: the runs of a comparison.
        paper: whose it is, as in ``compare --paper``.
    """
    table = rows(records)
    shown = _chosen(table)
    metric = table.metric
    accuracy = metric.endswith("accuracy")
    of, unit = ("test error", ", %") if accuracy else (f"{in_words(metric)}, test", "")

    def spread(row: Row, key: str, scale: float = 1.0, error: bool = False) -> str:
        if key not in row.mean:
            return "-"
        mean = 100 * (1 - row.mean[key]) if error else scale * row.mean[key]
        std = row.std.get(key)
        amount = 100 if error else scale
        return f"{mean:.4g}" if std is None else f"{mean:.4g} ± {amount * std:.2g}"

    head = [
        "method",
        "seeds",
        f"{of}, mean{unit}",
        f"center{unit}",
        "communication (rounds)",
        f"gap{unit}",
    ]
    flat = {heading: key for heading, key in FLATNESS.items() if any(key in row.mean for row in shown)}
    grid = [[*head, *flat]]
    for row in shown:
        communication = row.mean.get("communication_seconds", 0.0)
        grid.append(
            [
                row.label,
                f"{len(set(row.seeds)) or row.runs}",
                spread(row, f"mean_test_{metric}", error=accuracy),
                spread(row, f"center_test_{metric}", error=accuracy),
                f"{communication:,.0f} s ({row.mean.get('rounds', 0):,.0f})",
                spread(row, "gap", 100.0 if accuracy else 1.0),
                *(spread(row, key) for key in flat.values()),
            ]
        )
    on = f"{table.part} data" + (", so its test error is too good" if table.part == "test" else "")
    notes = ["", f"- Of each method the setting whose center was best at the last evaluation on {on}; mean ± standard"]
    notes.append("  deviation over seeds.")
    notes.append(
        "- Gap and flatness: of the center. Communication of shared gradients: with the waiting for slower ranks."
    )
    if paper == "grawa":
        notes.append("- Published errors are those of the mean of the ranks, published seconds hold what scores take.")
    if healed := [f"{row.label} {times:,.0f}" for row in shown if (times := row.mean.get("healed", 0.0)) >= 0.05]:
        notes.append(wrapped(f"- {HEALED}: {'; '.join(healed)}.", 120, "", "  "))
    left = [f"{row.label}, {counted(row.runs, 'seed')}" for row in table.incomplete]
    if left:
        notes.append(wrapped(f"- Left out: {'; '.join(left)}.", 120, "", "  "))
    flatness = flatness_note(shown) or "flatness: hpc-grawa flatness RUN... measures it"
    notes.append(f"- {flatness[0].upper()}{flatness[1:]}.")
    return "\n".join([*aligned(grid), *notes])
