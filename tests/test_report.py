"""Reports: what the tables and figures say is what the run folders hold, computed by hand."""

from __future__ import annotations

import csv
import json
import statistics
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpc_grawa.cli.compare import report
from hpc_grawa.errors import ConfigError, Damaged
from hpc_grawa.report import draw, group, markdown, read_run, rows, write_csv
from hpc_grawa.report.figure import _mean_curve, _scaled, _spread, _ticks, _weighted_run
from hpc_grawa.report.paper import paper_table
from hpc_grawa.runs.record import RunRecord

RANKS = 4
LAYERS = ["conv.weight", "conv.bias", "head.weight"]


def make_run(
    folder: Path,
    method: str = "LGRAWA",
    seed: int = 36,
    curve: Sequence[tuple[float, float]] = ((0, 0.1), (5, 0.8), (10, 0.95)),
    metric: str = "accuracy",
    layers: int = len(LAYERS),
    finished: bool = True,
    settings: dict[str, Any] | None = None,
    part: str = "test",
    **summary: Any,
) -> Path:
    """A run folder as train.py writes it; ``curve`` holds (seconds, metric)."""
    path = folder / (f"{method}-{seed}" if settings is None else f"{method}-{seed}-{len(list(folder.iterdir()))}")
    path.mkdir(parents=True)
    arguments = "".join(f"    {key}: {value}\n" for key, value in {"pull": 0.5, **(settings or {})}.items())
    (path / "config.yaml").write_text(
        f"method:\n  class_path: hpc_grawa.methods.{method}\n  init_args:\n{arguments}"
        "model:\n  class_path: hpc_grawa.models.SmallCNN\ndata:\n  class_path: hpc_grawa.data.Digits\n"
        f"budget:\n  seconds: 10\n  epochs: null\nrun:\n  name: {path.name}\n  dir: {folder}\n  seed: {seed}\n"
    )
    events: list[dict[str, Any]] = [{"event": "start", "method": method, "world_size": RANKS, "layers": LAYERS}]
    for step, (seconds, value) in enumerate(curve):
        where = {"step": 10 * step, "epoch": step / 2, "seconds": seconds, "part": part, "model": "center"}
        events.append({"event": "evaluate", **where, "loss": 1.0, metric: value})
    generator = np.random.default_rng(seed)
    for number in range(1, 6):
        weights = generator.dirichlet(np.full(RANKS, 5.0), size=layers).T.tolist()
        where = {"step": 4 * number, "seconds": 2.0 * number, "period": 4, "lr": 0.1}
        events.append({"event": "round", "round": number, **where, "weights": weights, "leader": 0, "healed": []})
    (path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    if finished:
        final = curve[-1][1]
        facts = {
            "state": "finished",
            "name": path.name,
            "method": method,
            "world_size": RANKS,
            "steps": 1040,
            "rounds": 5,
            "training_seconds": curve[-1][0],
            "compute_seconds": 7.5,
            "loading_seconds": 0.5,
            "communication_seconds": 1.5,
            "waiting_seconds": 0.5,
            "hidden_seconds": 0.0,
            "bytes_sent": 12_345_678,
            "metric": metric,
            "higher_is_better": metric != "perplexity",
            f"center_test_{metric}": final,
            f"mean_test_{metric}": final - 0.01,
            f"local_test_{metric}": [final] * RANKS,
            f"center_train_{metric}": final + 0.02,
            "gap": 0.02,
            f"final_center_{metric}": final,
            "seed": seed,
            "versions": {"torch": "2"},
            "commit": None,
            **summary,
        }
        (path / "summary.json").write_text(json.dumps(facts))
    return path


def cells(text: str) -> list[dict[str, str]]:
    """The rows of a Markdown table by heading."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def test_a_row_per_run_says_what_the_summary_says(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, "LGRAWA"), make_run(tmp_path, "EASGD", curve=((0, 0.1), (5, 0.7), (10, 0.9)))]
    text = markdown(rows([read_run(run) for run in runs]))
    assert text.startswith("Accuracy: SmallCNN on Digits, 4 ranks, 10 s of training time each.\n")
    assert cells(text)[0] == {
        "method": "LGRAWA",
        "center, test": "95.0 %",
        "mean, test": "94.0 %",
        "center, train": "97.0 %",
        "gap": "2.0 %",
        "steps": "1,040",
        "rounds": "5",
        "sent/rank": "12.3 MB",
        "computing": "7.5 s",
        "loading": "0.5 s",
        "communicating": "1.5 s",
        "waiting": "0.5 s",
        "to 90.0 %": "10.0 s",
    }
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(line) for line in table}) == 1, "columns are not aligned"


def test_a_narrow_screen_has_experiments_in_columns(tmp_path: Path) -> None:
    table = rows([read_run(make_run(tmp_path, name)) for name in ("LGRAWA", "EASGD")])
    narrow = markdown(table, width=80)
    assert all(len(line) <= 80 for line in narrow.splitlines())
    wide = cells(markdown(table))
    assert [(line["method"], line["LGRAWA"], line["EASGD"]) for line in cells(narrow)] == [
        (key, wide[0][key], wide[1][key]) for key in wide[0] if key != "method"
    ]
    assert cells(markdown(table, width=20)) == wide  # neither fits


def test_several_seeds_give_mean_and_sample_deviation(tmp_path: Path) -> None:
    finals = (0.94, 0.95, 0.99)
    runs = [
        make_run(tmp_path, seed=seed, curve=((0, 0.1), (10 + seed, final)), bytes_sent=1000 * seed)
        for seed, final in zip((1, 2, 3), finals, strict=True)
    ]
    runs.append(make_run(tmp_path, "EASGD", curve=((0, 0.1), (5, 0.7))))
    table = rows([read_run(run) for run in runs])
    first, second = table
    assert (first.label, first.runs, first.seeds, second.runs) == ("LGRAWA", 3, (1, 2, 3), 1)
    assert first.mean["center_test_accuracy"] == pytest.approx(0.96, abs=1e-15)
    # deviations -.02, -.01, .03: squares sum to .0014, over n - 1 = 2
    assert first.std["center_test_accuracy"] == pytest.approx(0.0007**0.5, rel=1e-12)
    assert first.mean["bytes_sent"] == 2000
    assert not second.std
    line, single = cells(markdown(table))
    assert (line["runs"], line["center, test"], single["center, test"]) == ("3", "96.0 ± 2.6 %", "70.0 %")
    assert line["to 70.0 %"] == "12.0 ± 1.0 s"


def test_rows_are_held_against_the_best_one_seed_by_seed(tmp_path: Path) -> None:
    """Differences .01, .02, .03: t = .02 / (.01 / √3) = 2√3, with two degrees of freedom p = 1 - t / √(t² + 2)."""
    values = {"LGRAWA": (0.95, 0.96, 0.97), "EASGD": (0.94, 0.94, 0.94), "LocalSGD": (0.95, 0.96, 0.97)}
    runs = [
        make_run(tmp_path, name, seed=seed, curve=((0, 0.1), (9, value)))
        for name, found in values.items()
        for seed, value in enumerate(found, start=36)
    ]
    table = rows([read_run(run) for run in runs])
    assert table.best is table[0]
    t = 2 * 3**0.5
    by_row = {line["method"]: line["p"] for line in cells(markdown(table))}
    assert by_row == {"LGRAWA": "best", "EASGD": f"{1 - t / (t**2 + 2) ** 0.5:.2g}", "LocalSGD": "1"}
    assert "paired t-test" in markdown(table)
    alone = make_run(tmp_path, "LSGD", seed=1, curve=((0, 0.1), (9, 0.5)))  # shares no seed
    assert cells(markdown(rows([read_run(run) for run in [*runs, alone]])))[-1]["p"] == "-"
    assert "p" not in cells(markdown(rows([read_run(run) for run in runs[::3]])))[0]


def test_differences_of_one_amount_have_no_spread_to_test_them_by(tmp_path: Path) -> None:
    values = {"LGRAWA": (0.3, 0.4), "EASGD": (0.2, 0.3)}
    runs = [
        make_run(tmp_path, name, seed=seed, curve=((0, 0.1), (9, value)))
        for name, found in values.items()
        for seed, value in enumerate(found)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "p" not in cells(markdown(rows([read_run(run) for run in runs])))[1]


@pytest.mark.parametrize("state", ["diverged", "failed", "unfinished"])
@pytest.mark.parametrize("more", [(), ("a", "b", "c")])
def test_a_setting_of_which_seeds_are_missing_is_neither_best_nor_chosen(
    tmp_path: Path, state: str, more: tuple[str, ...]
) -> None:
    """Those that are left may flatter it; however many settings differ, and so however it is called."""
    for lr, values in ((0.1, (0.8, 0.9, 0.8)), (0.4, (None, 0.95, None)), (0.8, (None, None, None))):
        for seed, value in enumerate(values):
            settings = {"lr": lr, **dict.fromkeys(more, lr)}
            run = make_run(tmp_path, seed=seed, curve=((0, 0.1), (9, value or 0.1)), settings=settings)
            if value is None:
                (run / "summary.json").write_text(json.dumps({"state": state, "seed": seed, "steps": 3}))
    table = rows([read_run(run) for run in sorted(tmp_path.iterdir())])
    assert table.best is not None and table.best.seeds == (0, 1, 2)
    assert [(row, count) for row, count in table.chosen] == [(table.best, 3)]
    for seed in (0, 2):  # another try
        make_run(tmp_path, seed=seed, curve=((0, 0.1), (9, 0.95)), settings={"lr": 0.4, **dict.fromkeys(more, 0.4)})
    again = rows([read_run(run) for run in sorted(tmp_path.iterdir())]).best
    assert again is not None and again.mean["center_test_accuracy"] == pytest.approx(0.95)
    assert len({row.label for row in table}) == 4 and all("(" not in row.label or state in row.label for row in table)


def test_the_best_row_is_picked_by_the_data_on_the_way_where_they_are_no_test_data(tmp_path: Path) -> None:
    found = {"LGRAWA": (0.9, 0.8), "EASGD": (0.8, 0.9), "LSGD": (0.7, 0.7)}  # on validation data, and on test data
    for method, (way, test) in found.items():
        for seed in (1, 2):
            curve = ((0, 0.1), (9, way))
            make_run(
                tmp_path,
                method,
                seed=seed,
                part="validation",
                curve=curve,
                center_test_accuracy=test + seed * len(method) / 99,
            )
    text = markdown(rows([read_run(run) for run in sorted(tmp_path.iterdir())]))
    assert {row["method"]: row["p"] == "best" for row in cells(text)} == {name: name == "LGRAWA" for name in found}
    assert "picked on validation data, and p is not corrected for 2 tests" in " ".join(text.split())


def test_a_run_that_ended_before_it_said_by_what_it_is_judged_is_in_any_table(tmp_path: Path) -> None:
    made = make_run(tmp_path, seed=1, metric="bits_per_byte", higher_is_better=False)
    left = make_run(tmp_path, seed=2, metric="bits_per_byte", finished=False)
    (left / "metrics.jsonl").write_text("")
    table = rows([read_run(path) for path in (left, made)])
    assert (table.metric, table.higher_is_better) == ("bits_per_byte", False)
    assert [row.state for row in table] == ["unfinished", "finished"]
    draw([read_run(path) for path in (left, made)], tmp_path / "figure.png")


def test_a_metric_of_one_s_own_that_ends_in_error_is_no_error_of_another(tmp_path: Path) -> None:
    run = make_run(tmp_path, center_test_top5=0.99, center_test_top5_error=0.01, center_test_accuracy_error=0.3)
    line = cells(markdown(rows([read_run(run)])))[0]
    assert (line["center, test"], line["top5, center, test"]) == ("95.0 %", "0.99")


def test_repeated_seeds_and_healed_ranks_are_said(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        make_run(tmp_path / folder, seed=1, healed=57)
    make_run(tmp_path / "a", seed=2, healed=57)
    records = [read_run(tmp_path / name) for name in ("a/LGRAWA-1", "b/LGRAWA-1", "a/LGRAWA-2")]
    text = markdown(rows(records))
    assert cells(text)[0]["healed"] == "57" and "became the center" in text
    assert "LGRAWA has several runs of seed 1: they are not independent" in " ".join(text.split())
    printed = paper_table(records, "grawa")
    assert "diverges then: LGRAWA 57." in " ".join(printed.split())
    assert [cell.strip() for cell in printed.splitlines()[2].split("|")][1:3] == ["LGRAWA", "2"]


def test_what_shared_gradients_wait_is_said_of_rows_that_share_for_a_while(tmp_path: Path) -> None:
    note = "communicating: of shared gradients, with the waiting for slower ranks"
    rival = read_run(make_run(tmp_path, "EASGD"))
    for sharing, said in (("hpc_grawa.methods.DataParallel", True), ("null", False)):
        shares = read_run(make_run(tmp_path, settings={"sharing": sharing}))
        assert (note in markdown(rows([shares, rival]))) is said


def test_a_run_that_went_on_on_other_ranks_is_an_experiment_of_its_own(tmp_path: Path) -> None:
    records = [make_run(tmp_path, seed=seed) for seed in (1, 2)]
    with (records[1] / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"event": "changed", "step": 9, "settings": {"ranks": [8, 4]}}) + "\n")
    text = markdown(rows([read_run(run) for run in records]))
    assert [row["method"] for row in cells(text)] == ["LGRAWA ranks=4", "LGRAWA ranks=8, then 4"]
    assert ", 4 and 8, then 4 ranks, " in text


def test_the_estimates_own_error_stands_beside_the_flatness_of_a_single_run(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    measured = {"how": {"examples": 9, "of": 9, "dtype": "float32"}, "measures": {"trace": {"samples": 5}}}
    (run / "flatness.json").write_text(json.dumps({"center": [{**measured, "trace": 830.0, "trace_error": 35.0}]}))
    text = markdown(rows([read_run(run)]))
    assert cells(text)[0]["trace"] == "830 ± 35" and "samples of the trace 5" in text
    assert "of a single run: the estimate's own error" in text


def test_a_run_that_went_on_over_another_network_is_of_both(tmp_path: Path) -> None:
    for seed in (1, 2):
        make_run(tmp_path, seed=seed, network="10mbit,1ms" if seed == 2 else None)
    with (tmp_path / "LGRAWA-2/metrics.jsonl").open("a") as file:
        file.write(json.dumps({"event": "changed", "step": 9, "settings": {"network": [None, "10mbit,1ms"]}}) + "\n")
    records = [read_run(tmp_path / f"LGRAWA-{seed}") for seed in (1, 2)]
    assert [record.network for record in records] == [None, "None, then 10mbit,1ms"]
    assert len(group(records)) == 2


def test_a_run_that_is_named_twice_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, end in ((1, 0.8), (2, 0.9)):
        make_run(tmp_path / "all", seed=seed, curve=((0, 0.1), (9, end)))
    report([tmp_path / "all", tmp_path / "all/LGRAWA-1"], None, None, None)
    (row,) = cells(capsys.readouterr().out)
    assert (row["runs"], row["center, test"]) == ("2", "85.0 ± 7.1 %")


@pytest.mark.parametrize("part", ["validation", "test"])
def test_a_setting_is_chosen_by_what_was_evaluated_on_the_way(tmp_path: Path, part: str) -> None:
    """Held out data choose another setting than test data would, and it is said which of them did."""
    found = {8: (0.92, 0.97), 16: (0.96, 0.95)}  # on that data, and on test data
    runs = [
        make_run(
            tmp_path, seed=seed, settings={"period": period}, part=part, curve=((0, 0.1), (9, way + seed / 1000)),
            center_test_accuracy=test,
        )
        for period, (way, test) in found.items()
        for seed in (1, 2)
    ]  # fmt: skip
    table = rows([read_run(run) for run in [*runs, make_run(tmp_path, "EASGD", part=part)]])
    assert [(row.label, count) for row, count in table.chosen] == [("LGRAWA period=16", 2)]
    said = " ".join(markdown(table).split())
    fair = "" if part == "validation" else ", which makes its test value too good (hold out data.validation)"
    assert f"on {part} data{fair}: LGRAWA period=16 of 2 settings (test 95.0 ± 0.0 %, 2 runs)." in said


def test_a_setting_is_chosen_over_each_network(tmp_path: Path) -> None:
    runs = {
        (period, network): read_run(
            make_run(tmp_path, settings={"period": period}, curve=((0, 0.1), (9, way)), seed=n, network=network)
        )
        for n, (period, network, way) in enumerate(((8, None, 0.9), (8, "10mbit,1ms", 0.6), (16, "10mbit,1ms", 0.7)))
    }
    assert rows(list(runs.values())[:2]).chosen == []
    table = rows(list(runs.values()))
    assert [(row.mean["center_test_accuracy"], count) for row, count in table.chosen] == [(0.7, 2)]


def test_a_setting_is_chosen_by_a_metric_of_several_words_too(tmp_path: Path) -> None:
    runs = [
        make_run(
            tmp_path, settings={"period": period}, metric="bits_per_byte", part="validation", curve=((0, 4), (9, way)),
            center_test_bits_per_byte=way + 1, higher_is_better=False,
        )
        for period, way in ((8, 2.5), (16, 2.25))
    ]  # fmt: skip
    said = " ".join(markdown(rows([read_run(run) for run in runs])).split())
    assert "on validation data: LGRAWA period=16 of 2 settings (test 3.25)." in said


def test_a_single_run_has_a_row_of_its_course(tmp_path: Path) -> None:
    """Learning rate and H at rounds of all ranks, and the consensus distance at evaluations."""
    run = make_run(tmp_path)
    log = run / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for line in lines:
        if line["event"] == "evaluate":
            line["consensus_distance"] = line["seconds"] / 10
        if line["event"] == "round":
            line["ranks"] = list(range(RANKS if line["round"] % 2 else 2))  # every other one is of a group
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = read_run(run)
    assert record.course() == {
        "learning rate": [(2.0, 0.1), (6.0, 0.1), (10.0, 0.1)],
        "local steps of a round, H": [(2.0, 4), (6.0, 4), (10.0, 4)],
        "consensus distance": [(0, 0), (5, 0.5), (10, 1)],
    }
    draw([record], tmp_path / "one.svg")
    draw([record, read_run(make_run(tmp_path, "EASGD"))], tmp_path / "two.svg")
    for name in record.course():
        heading = f">{name[0].upper()}{name[1:]}</text>"
        assert heading in (tmp_path / "one.svg").read_text() and heading not in (tmp_path / "two.svg").read_text()


def test_settings_make_experiments_seeds_do_not(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, seed=seed, settings={"period": period}) for period in (8, 16) for seed in (1, 2)]
    labels = {label: len(members) for label, members in group([read_run(run) for run in runs]).items()}
    assert labels == {"LGRAWA period=8": 2, "LGRAWA period=16": 2}


def test_where_and_how_fast_a_run_was_made_makes_no_experiment(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, seed=seed) for seed in (1, 2)]
    for run in runs:
        with (run / "config.yaml").open("a") as file:
            file.write(f"comm_timeout: {len(run.name)}{run.name[-1]}\n")
    assert list(group([read_run(run) for run in runs])) == ["LGRAWA"]


@pytest.mark.parametrize(("late", "said"), [(10.9, False), (11.1, True)])
def test_unequal_training_time_is_said(tmp_path: Path, late: float, said: bool) -> None:
    """Of a budget in seconds: a tenth more than the shortest."""
    runs = [make_run(tmp_path, "LGRAWA"), make_run(tmp_path, "DataParallel", training_seconds=late)]
    runs.append(make_run(tmp_path, "EASGD", curve=((0, 0.1), (3, 0.8)), finished=False))
    text = markdown(rows([read_run(run) for run in runs]))
    told = "not at equal training time: LGRAWA 10.0 s, DataParallel"
    assert (told in " ".join(text.split())) == said


def test_time_to_target_is_that_of_the_first_evaluation_that_meets_it(tmp_path: Path) -> None:
    quick = make_run(tmp_path, "LGRAWA", curve=((0, 0.1), (2, 0.93), (4, 0.89), (10, 0.96)))
    slow = make_run(tmp_path, "EASGD", curve=((0, 0.1), (2, 0.5), (9, 0.90), (10, 0.92)))
    records = [read_run(quick), read_run(slow)]
    assert records[0].time_to(0.9, "test") == 2 and records[1].time_to(0.9, "test") == 9
    assert records[1].time_to(0.95, "test") is None
    table = rows(records)
    assert table.target == 0.92  # EASGD ends worst
    assert [row.mean["seconds_to_target"] for row in table] == [2, 10]
    assert [cell["to 95.0 %"] for cell in cells(markdown(rows(records, target=0.95)))] == ["10.0 s", "-"]


@pytest.mark.parametrize("state", ["unfinished", "interrupted", "preempted", "failed", "diverged"])
def test_the_target_is_taken_from_finished_runs_only(tmp_path: Path, state: str) -> None:
    """A run that was cut off ends low, and on other data: neither is a target for those that ended."""
    cut = make_run(tmp_path, "LSGD", curve=[(t, 0.1) for t in range(9)], finished=False, part="validation")
    if state != "unfinished":
        (cut / "summary.json").write_text(json.dumps({"state": state, "cause": "USR2", "rank": 0, "steps": 3}))
    done = [make_run(tmp_path, name, curve=((0, 0.1), (5, end))) for name, end in (("LGRAWA", 0.95), ("EASGD", 0.9))]
    table = rows([read_run(run) for run in (cut, *done)])
    assert (table.target, table.part) == (0.9, "test")
    assert [row.mean.get("seconds_to_target") for row in table] == [None, 5, 5]
    assert rows([read_run(cut), read_run(done[1])]).target == 0.9
    assert rows([read_run(cut)]).target is None


def test_the_best_center_is_shown_with_the_data_it_was_chosen_on(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path, "LGRAWA", best_part="validation", best_center_accuracy=0.97, best_step=10),
        make_run(tmp_path, "EASGD", best_part="test", best_center_accuracy=0.96, best_step=20),
        make_run(tmp_path, "LSGD"),
    ]
    table = rows([read_run(run) for run in runs])
    text = markdown(table)
    assert [(row["best, validation"], row["best, test"]) for row in cells(text)] == [
        ("97.0 %", "-"),
        ("-", "96.0 %"),
        ("-", "-"),
    ]
    for part in ("validation", "test"):
        assert f"chosen on the {part} data" in text
    write_csv(table, tmp_path / "table.csv")
    with (tmp_path / "table.csv").open(newline="") as file:
        assert [line["best_part"] for line in csv.DictReader(file)] == ["validation", "test", ""]


def test_seeds_that_miss_the_target_are_counted(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, seed=seed, curve=((0, 0.1), (seed, 0.9 + 0.02 * seed))) for seed in (1, 2, 3)]
    table = rows([read_run(run) for run in runs], target=0.93)
    assert (table[0].reached, table[0].mean["seconds_to_target"]) == (2, 2.5)
    assert cells(markdown(table))[0]["to 93.0 %"] == "2.5 ± 0.7 s (2 of 3)"
    assert rows([read_run(run) for run in runs]).target is None  # nothing to compare with


def test_validation_is_the_target_where_it_was_evaluated(tmp_path: Path) -> None:
    path = make_run(tmp_path, part="validation")
    table = rows([read_run(path)], target=0.8)
    assert (table.part, table[0].mean["seconds_to_target"]) == ("validation", 5)
    assert "validation" in markdown(table)


def test_csv_holds_the_numbers_themselves(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, seed=seed, curve=((0, 0.1), (5, 1 - seed / 77))) for seed in (1, 2, 3)]
    runs.append(make_run(tmp_path, "EASGD", curve=((0, 0.1), (7, 2 / 3))))
    table = rows([read_run(run) for run in runs])
    write_csv(table, tmp_path / "table.csv")
    with (tmp_path / "table.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["method"], line["runs"], line["seeds"]) for line in lines] == [
        ("LGRAWA", "3", "1 2 3"),
        ("EASGD", "1", "36"),
    ]
    for line, row in zip(lines, table, strict=True):
        assert {key: float(line[key]) for key in row.mean} == row.mean
        assert {key: float(line[f"{key}_std"]) for key in row.std} == row.std
    values = [1 - seed / 77 for seed in (1, 2, 3)]
    assert float(lines[0]["center_test_accuracy"]) == statistics.fmean(values)
    assert float(lines[0]["center_test_accuracy_std"]) == statistics.stdev(values)
    assert lines[1]["center_test_accuracy_std"] == "" and float(lines[1]["target"]) == 2 / 3


def test_an_unfinished_run_tells_what_it_can(tmp_path: Path) -> None:
    done, running = make_run(tmp_path), make_run(tmp_path, seed=7, finished=False)
    with (running / "metrics.jsonl").open("a") as file:
        file.write('{"event": "evaluate", "step": 99, "seco')
    record = read_run(running)
    assert record.summary is None and len(record.events["evaluate"]) == 3 and len(record.weights) == 5
    records = [read_run(done), record]
    row = cells(markdown(rows(records)))[1]
    assert (row["method"], row["center, test"], row["steps"], row["rounds"], row["mean, test"]) == (
        "LGRAWA (unfinished)",
        "95.0 %",
        "20",
        "5",
        "-",
    )
    draw(records, tmp_path / "figure.png")


def test_what_is_no_run_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for name in ("empty", "file", "missing"):
        with pytest.raises(ConfigError, match=f"{tmp_path / name} is no run folder"):
            read_run(tmp_path / name)
    broken = make_run(tmp_path, finished=False)
    with pytest.raises(ConfigError, match=r"give the run folders in it"):
        read_run(tmp_path)
    with (broken / "metrics.jsonl").open("a") as file:
        file.write("{\n{}\n")
    with pytest.raises(Damaged, match=r"metrics\.jsonl, line 10, is not JSON"):
        read_run(broken)
    with pytest.raises(ConfigError, match="no runs"):
        rows([])
    with pytest.raises(ConfigError, match=r"accuracy.*perplexity"):
        rows([read_run(make_run(tmp_path, "A")), read_run(make_run(tmp_path, "B", metric="perplexity"))])


def test_another_metric_lower_is_better(tmp_path: Path) -> None:
    quick = make_run(tmp_path, "LGRAWA", metric="perplexity", curve=((0, 80.0), (2, 12.345), (10, 4.5)))
    slow = make_run(tmp_path, "EASGD", metric="perplexity", curve=((0, 80.0), (2, 30.0), (10, 12.5)))
    records = [read_run(quick), read_run(slow)]
    table = rows(records)
    assert table.target == 12.5
    text = markdown(table)
    assert [(row["center, test"], row["to 12.5"]) for row in cells(text)] == [("4.5", "2.0 s"), ("12.5", "10.0 s")]
    write_csv(table, tmp_path / "table.csv")
    draw(records, tmp_path / "figure.svg", target=12.5)
    drawn = (tmp_path / "figure.svg").read_text()
    assert "Test perplexity of the center" in drawn and "target 12.5" in drawn
    for output in (text, (tmp_path / "table.csv").read_text(), drawn):
        assert "accuracy" not in output.lower() and "error" not in output.lower() and "%" not in markdown(table)


@pytest.mark.parametrize(("metric", "higher", "seconds"), [("bits_per_byte", False, 10.0), ("r2", True, 0.0)])
def test_a_run_that_is_not_finished_says_by_itself_what_is_better(
    metric: str, higher: bool, seconds: float, tmp_path: Path
) -> None:
    """Ended early or still under way, whatever the metric is called; people read its name in words."""
    folder = make_run(tmp_path, metric=metric, curve=((0, 4.5), (10, 2.5)), finished=False)
    log = folder / "metrics.jsonl"
    first, *lines = log.read_text().splitlines()
    start = json.loads(first) | {"metric": metric, "higher_is_better": higher}
    log.write_text("\n".join([json.dumps(start), *lines]) + "\n")
    for ended in (False, True):
        if ended:
            (folder / "summary.json").write_text(json.dumps({"state": "stopped", "steps": 9}))
        record = read_run(folder)
        assert (record.metric, record.higher_is_better, record.time_to(3.0, "test")) == (metric, higher, seconds)
        assert markdown(rows([record])).startswith(f"{metric.replace('_', ' ').capitalize()}: ")
    draw([record], tmp_path / "figure.svg")
    assert f"Test {metric.replace('_', ' ')} of the center" in (tmp_path / "figure.svg").read_text()


@pytest.mark.parametrize("finished", [True, False])
def test_the_mean_of_seeds_stretches_no_clock(tmp_path: Path, finished: bool) -> None:
    """One seed takes 10 s, the other 20: on its way from .1 to .5 that one has .3 when the first has its .9."""
    quick = make_run(tmp_path, seed=1, curve=((0, 0.1), (5, 0.6), (10, 0.9)), finished=finished)
    slow = make_run(tmp_path, seed=2, curve=((0, 0.1), (20, 0.5)), finished=finished)
    curve = _mean_curve([read_run(quick), read_run(slow)], "test")
    assert curve is not None
    seconds, means, deviations = curve
    expected = {0: (0.1, 0.1), 5: (0.6, 0.2), 10: (0.9, 0.3), **({20: (0.9, 0.5)} if finished else {})}
    assert seconds.tolist() == list(expected)
    assert means == pytest.approx([statistics.fmean(values) for values in expected.values()])
    assert deviations == pytest.approx([statistics.stdev(values) for values in expected.values()])


def test_the_curve_of_one_run_is_its_evaluations(tmp_path: Path) -> None:
    points = [(0.0, 0.1), (1 / 3, 0.5), (7.123456789012345, 0.25)]
    curve = _mean_curve([read_run(make_run(tmp_path, curve=points))], "test")
    assert curve is not None and not curve[2].any()
    assert list(zip(curve[0].tolist(), curve[1].tolist(), strict=True)) == points


@pytest.mark.parametrize(
    ("methods", "layers"),
    [(("LGRAWA", "EASGD"), 3), (("LSGD",), 1), (("LGRAWA",), 170), ((*"ABCDEFGHIJ",), 1)],
    ids=["layers", "per-model", "many-layers", "many-methods"],
)
def test_the_figure_is_a_png_that_shows_something(tmp_path: Path, methods: tuple[str, ...], layers: int) -> None:
    from matplotlib.image import imread

    runs = [make_run(tmp_path, method, seed, layers=layers) for method in methods for seed in (1, 2)]
    draw([read_run(run) for run in runs], tmp_path / "figure.png", target=0.9)
    assert (tmp_path / "figure.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    pixels = imread(tmp_path / "figure.png")[:, :, :3]
    assert pixels.shape[:2] == (1080 if len(methods) > 1 else 1600, 2400)  # one has a row of its course
    for half in (pixels[::2, :1200:2], pixels[::2, 1200::2]):
        colours = np.unique((half * 15).round() @ (1, 16, 256))
        assert len(colours) > 20 and 0.3 < half.mean() < 0.995
    border = np.concatenate([pixels[:8].reshape(-1, 3), pixels[-8:].reshape(-1, 3), pixels[:, -8:].reshape(-1, 3)])
    assert (border == 1).all(), "something is cut off"


def test_equal_weights_have_no_panel_though_they_were_rounded() -> None:
    def run(*weights: float) -> RunRecord:
        return RunRecord(Path("run"), None, {"round": [{"weights": [[w] for w in weights]}]}, {})

    equal, unequal = run(0.333333, 0.333333, 0.333333), run(0.3, 0.3, 0.4)
    assert _weighted_run([equal]) is None and _weighted_run([equal, unequal]) is unequal


def test_the_figure_comes_without_weights_and_in_other_formats(tmp_path: Path) -> None:
    path = make_run(tmp_path, "DataParallel")
    lines = [line for line in (path / "metrics.jsonl").read_text().splitlines(True) if '"round"' not in line]
    (path / "metrics.jsonl").write_text("".join(lines))
    draw([read_run(path)], tmp_path / "figure.svg")
    drawn = (tmp_path / "figure.svg").read_text()
    assert "Test error of the center" in drawn and "DataParallel  5.0 %" in drawn and "Weights of" not in drawn
    draw([read_run(path)], tmp_path / "figure.pdf")
    assert (tmp_path / "figure.pdf").read_bytes().startswith(b"%PDF")
    with pytest.raises(ConfigError, match=r"\.png, \.pdf, \.svg"):
        draw([read_run(path)], tmp_path / "figure.gif")
    with pytest.raises(ConfigError, match="cannot be written"):
        draw([read_run(path)], tmp_path / "nowhere" / "figure.png")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_csv(rows([read_run(path)]), tmp_path / "nowhere" / "table.csv")
    with pytest.raises(ConfigError, match="not evaluated"):
        draw([read_run(make_run(tmp_path, seed=9, curve=(), finished=False))], tmp_path / "figure.png")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("suffix", [".png", ".svg"])
@pytest.mark.parametrize("name", ["läufe", "実験🎉", "l\udcffufe", "a$b_{$", "tab\tline\n", 80 * "長"], ids=ascii)
def test_any_name_can_be_drawn(tmp_path: Path, name: str, suffix: str) -> None:
    """Of folders, classes and layers; what the font has no picture of is written as an escape."""
    folder = tmp_path / name
    folder.mkdir()
    runs = []
    for seed in (1, 2):
        run = make_run(tmp_path, seed=seed, settings={f"s{i}": i * seed for i in range(1, 5)})
        (run / "config.yaml").write_text(
            (run / "config.yaml").read_text().replace("SmallCNN", "模型"), encoding="utf-8"
        )
        log = (run / "metrics.jsonl").read_text().replace(json.dumps(LAYERS), json.dumps([name, "β", "γ"]))
        (run / "metrics.jsonl").write_text(log)
        runs.append(run.rename(folder / f"{name}{seed}"))
    records = [read_run(run) for run in runs]
    draw(records, folder / f"{name}{suffix}")
    if suffix == ".svg":
        drawn = (folder / f"{name}{suffix}").read_text(encoding="utf-8")
        assert "β" in drawn and r"\u6a21\u578b" in drawn and "\ufffd" not in drawn
    write_csv(rows(records), folder / f"{name}.csv")


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"need Matplotlib, .*\[demo\]"):
        draw([read_run(make_run(tmp_path))], tmp_path / "figure.png")


def test_colours_are_centered_at_the_equal_share_and_end_at_one() -> None:
    leader = np.array([[[1.0], [0.0]], [[0.0], [1.0]]])
    ratio, limit = _scaled(leader)
    assert limit == 1 and ratio.max() == 1 and ratio.min() == -np.inf
    near = np.array([[[0.2], [0.2], [0.2], [0.4]]] * 50 + [[[0.001], [0.001], [0.001], [0.997]]])
    ratio, limit = _scaled(near)
    assert ratio[0, 3, 0] == pytest.approx(np.log2(1.6)) and limit == 2
    assert _scaled(np.full((5, 4, 3), 0.25))[1] == 0.05


def test_names_are_moved_apart_no_more_than_needed() -> None:
    assert _spread([0.1, 0.5, 0.9], 0.2) == pytest.approx([0.1, 0.5, 0.9])
    assert _spread([0.5, 0.5, 0.5], 0.1) == pytest.approx([0.4, 0.5, 0.6])
    assert _spread([0.0, 0.01], 0.1) == pytest.approx([0.0, 0.1])
    assert _spread([0.99, 1.0], 0.1) == pytest.approx([0.9, 1.0])
    assert np.diff(_spread([0.2, 0.2, 0.25, 0.8, 0.81], 0.1)).min() >= 0.1 - 1e-12
    assert _spread([0.5] * 5, 1.0) == pytest.approx([0, 0.25, 0.5, 0.75, 1])


@pytest.mark.parametrize(("count", "most"), [(1, 5), (5, 5), (14, 30), (161, 12), (10, 3)])
def test_ticks_include_both_ends(count: int, most: int) -> None:
    ticks = _ticks(count, most)
    assert ticks[0] == 0 and ticks[-1] == count - 1 and len(ticks) <= most + 1 and ticks == sorted(set(ticks))


def test_the_table_of_a_paper(tmp_path: Path) -> None:
    """Of each method the setting that was best at the last evaluation: its error, seconds, rounds and gap."""
    for period, ends in ((16, (0.90, 0.92)), (32, (0.80, 0.99))):
        for seed, end in zip((1, 2), ends, strict=True):
            make_run(tmp_path, seed=seed, curve=((0, 0.1), (10, end)), settings={"period": period})
    make_run(tmp_path, method="EASGD", seed=1, curve=((0, 0.1), (10, 0.5)))
    make_run(tmp_path, method="EASGD", seed=2, curve=((0, 0.1), (10, 0.5)), finished=False)
    for seed in (1, 2):  # where seeds diverge, those that are left flatter a setting
        make_run(tmp_path, seed=seed, curve=((0, 0.1), (10, 0.999)), settings={"period": 64}, finished=seed == 1)
    left = max(tmp_path.glob("LGRAWA-2-*"), key=lambda path: path.stat().st_ctime_ns)
    (left / "summary.json").write_text(json.dumps({"state": "diverged", "cause": "NonFinite", "steps": 3}))
    lines = paper_table([read_run(path) for path in sorted(tmp_path.iterdir())], "grawa").splitlines()
    grid = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert grid[0] == ["method", "seeds", "test error, mean, %", "center, %", "communication (rounds)", "gap, %"]
    assert ["LGRAWA period=16", "2", "10 ± 1.4", "9 ± 1.4", "2 s (5)", "2 ± 0"] in grid
    assert ["EASGD", "1", "51", "50", "2 s (5)", "2"] in grid and len(grid) == 4
    assert "- Left out: EASGD (unfinished), 1 seed; LGRAWA period=64 (diverged), 1 seed." in lines
    assert "on test data, so its test error is too good" in "\n".join(lines)
