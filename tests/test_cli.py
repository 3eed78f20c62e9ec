"""The program as it is used: started by mpirun, alone, interrupted, failing; comparisons, tables and plans."""

from __future__ import annotations

import csv
import fcntl
import gc
import json
import os
import platform
import pty
import re
import signal
import struct
import sys
import termios
import time
from pathlib import Path
from typing import Any

import own
import pytest
import torch
from launcher import HOROVOD, PROGRAM, ROOT, called, launch, launched, ours, start
from table import is_, plain

from hpc_grawa import LGRAWA, cli, simulate
from hpc_grawa.cli.compare import Comparison, Planned
from hpc_grawa.cli.parsing import parse
from hpc_grawa.comm import throttled
from hpc_grawa.runs import log
from hpc_grawa.training.loop import fit
from hpc_grawa.training.worker import Worker

BACKENDS = [
    "mpi",
    pytest.param("horovod", marks=(pytest.mark.slow, pytest.mark.skipif(not HOROVOD, reason="Horovod is not built"))),
]

LINE = ("--model=own.Line", "--data=own.Numbers", "--loss=MSELoss", "--metric=own.R2", "--optimizer.lr=0.05")
QUICK = (
    "--config=digits",
    "--budget.seconds=null",
    "--budget.steps=9",
    "--method.period=4",
    "--eval.train_examples=50",
)


@pytest.fixture(autouse=True)
def plain_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own.plain_process(monkeypatch)
    monkeypatch.chdir(tmp_path)


@launched
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_from_one_command_on_two_ranks(backend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Training, its folder, and the evaluation of what it saved; the result is that of simulated ranks."""
    status, output, errors = launch("train", *QUICK, f"--backend={backend}", "--run.name=a", "--run.seed=3", ranks=2)
    assert (status, ours(errors)) == (0, []), errors
    assert output.splitlines()[0] == f"backend    {backend} (started by mpirun, asked for), 2 ranks"
    assert output.count("backend ") == 1 and output.splitlines()[-1].endswith("see runs/a")
    files = sorted(path.name for path in (tmp_path / "runs" / "a").iterdir() if not path.name.startswith("events.out"))
    assert files == ["center.pt", "config.yaml", "environment.json", "metrics.jsonl", "models", "ranks", "summary.json"]
    summary = json.loads((tmp_path / "runs" / "a" / "summary.json").read_text())
    assert (summary["backend"], summary["world_size"], summary["steps"], summary["rounds"]) == (backend, 2, 9, 3)

    config = parse([*QUICK, "--run.seed=3"])
    (tmp_path / "b").mkdir()
    simulated = simulate(
        2, lambda comm: fit(config, comm, new_folder=None if comm.rank else lambda: tmp_path / "b", speaks=False)
    )[0]
    centers = [
        torch.load(folder / "center.pt", weights_only=True) for folder in (tmp_path / "runs" / "a", tmp_path / "b")
    ]
    torch.testing.assert_close(centers[0], centers[1], rtol=1e-4, atol=1e-5)
    for key in ("bytes_sent", "payload_bytes", "epochs", "parameters"):
        assert summary[key] == simulated[key]
    assert summary["center_test_loss"] == pytest.approx(simulated["center_test_loss"], rel=1e-3)

    status, output, errors = called(capsys, "evaluate", "runs/a")
    assert status == 0, errors
    assert f"test accuracy {summary['center_test_accuracy']:.4f}" in output


@launched
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_exception_on_one_rank_ends_the_job_with_its_traceback(
    backend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run says where and why, to whoever reads its folder and in a table."""
    began = time.monotonic()
    status, _, errors = launch(
        *("train", *LINE, "--model=own.Failing", "--model.calls=20", f"--backend={backend}"),
        *("--budget.seconds=1000", "--method=DataParallel", "--run.name=a"),
        ranks=2,
    )
    assert time.monotonic() - began < 150  # of which starting takes most; the limit for messages is 600
    assert status not in (0, 2)
    assert errors.count("rank 1 of 2 failed") == 1
    assert "ZeroDivisionError: this model has failed on purpose" in errors
    assert "in forward\n" in errors
    assert "rank 0 of 2 failed" not in errors
    summary = json.loads((tmp_path / "runs" / "a" / "summary.json").read_text())
    assert (summary["state"], summary["rank"]) == ("failed", 1)
    assert summary["cause"] == "ZeroDivisionError: this model has failed on purpose"
    output = called(capsys, "table", "runs/a").output
    assert "DataParallel" in output and "(failed)" in output


@pytest.mark.slow
@launched
def test_an_exception_on_one_rank_before_training(tmp_path: Path) -> None:
    status, _, errors = launch("train", *LINE, "--data=own.BrokenNumbers", "--budget.steps=9", "--backend=mpi", ranks=2)
    assert status not in (0, 2)
    assert "rank 1 of 2 failed" in errors
    assert "OSError: these data have failed on purpose" in errors
    assert list((tmp_path / "runs").iterdir()) == []  # the name is free for the next attempt


@launched
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_that_does_not_fit_is_one_line_and_leaves_no_folder(backend: str, tmp_path: Path) -> None:
    words = ("--model.num_classes=5", f"--backend={backend}", "--run.name=a")
    status, _, errors = launch("train", *QUICK, *words, ranks=2)
    assert status == 2
    assert ours(errors) == [
        "hpc-grawa train: error: loss is CrossEntropyLoss: must make one number of outputs of SmallCNN [32, 5] "
        "(float32) and targets of Digits [32] (int64); IndexError: Target 9 is out of bounds."
    ]
    assert "Traceback" not in errors
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_model_that_does_not_fit_alone_in_a_plan_and_in_a_comparison(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["train", "--run.name=a"], ["train", "--dry_run"], ["compare", "--methods=EASGD", "--run.name=b"]):
        status, _, errors = called(capsys, *words, *LINE, "--budget.steps=1", "--model=character_model.Transformer")
        assert (status, errors.count("\n")) == (2, 1)
        assert "error: model is Transformer: must take inputs [8, 1] (float32); " in errors
        assert re.search(r"\(character_model.py, line \d+\)$", errors)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["b"]
    assert list((tmp_path / "runs" / "b").iterdir()) == []


CHARACTERS = (
    "--model=character_model.Transformer",
    "--data=character_model.Text",
    f"--data.path={ROOT / 'LICENSE'}",
    "--loss=character_model.NextCharacter",
    "--metric=character_model.Perplexity",
    "--model.dropout=0.05",
    "--method=LGRAWA",
    "--method.period=8",
    "--optimizer=AdamW",
    "--optimizer.lr=0.01",
    "--eval.train_examples=50",
)


@launched
@pytest.mark.slow
def test_a_language_model_of_own_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its targets are as many as its inputs, its vocabulary is the data's, and its metric falls."""
    cadence = ("--eval.unit=steps", "--eval.every=8", "--run.name=text")
    status, output, errors = launch("train", *CHARACTERS, *cadence, "--budget.steps=40", ranks=2)
    assert (status, ours(errors)) == (0, []), errors
    assert "image" not in output and "accura" not in output
    summary = json.loads(Path("runs/text/summary.json").read_text())
    distinct = len(set((ROOT / "LICENSE").read_text()))
    curve = [
        event["perplexity"]
        for event in map(json.loads, Path("runs/text/metrics.jsonl").read_text().splitlines())
        if event["event"] == "evaluate"
    ]
    assert curve[0] > distinct / 2 and curve[-1] == summary["center_test_perplexity"] < distinct / 3
    assert summary["best_center_perplexity"] == min(curve) and not summary["higher_is_better"]
    gap = summary["center_test_perplexity"] - summary["center_train_perplexity"]
    assert summary["gap"] == gap  # positive where the center is better on what it was trained on
    assert summary["rounds"] == 5

    status, output, errors = launch("evaluate", "runs/text", ranks=2)
    assert status == 0, errors
    assert output.splitlines()[-1].endswith(f"test perplexity {summary['center_test_perplexity']:.4f}")
    cli.main(["train", *CHARACTERS, "--budget.steps=40", "--dry_run", "--world_size=3"])
    assert re.search(r"effective batch +16 per rank x 3 ranks = 48\n", capsys.readouterr().out)
    cli.main(["table", "runs/text", "--figure=f.png", f"--target={distinct / 3}"])
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| LGRAWA")).split("|")
    assert row[2].strip() == f"{summary['center_test_perplexity']:.4g}" and row[-2].strip().endswith(" s")
    assert Path("f.png").stat().st_size > 10_000


@pytest.mark.slow
@launched
@pytest.mark.parametrize(
    ("data", "more", "error"),
    [
        ("own.ElsewhereMissing", (), "data.path is /there: must be a folder"),
        ("own.Numbers", ("--config=there.yaml",), "config is there.yaml: must be a file or one of the recipes"),
    ],
)
def test_what_is_wrong_on_another_host_only_is_said_there(data: str, more: tuple[str, ...], error: str) -> None:
    words = ("train", *LINE, f"--data={data}", "--budget.steps=9")
    there = ("env", "OMPI_COMM_WORLD_LOCAL_RANK=0", "OMPI_COMM_WORLD_LOCAL_SIZE=1")  # as on a second host
    job = launch(*words, ":", "-np", "1", *there, sys.executable, *PROGRAM, *words, *more, ranks=1)
    assert job.status == 2
    assert len(lines := ours(job.errors)) == 1
    assert lines[0].startswith(f"hpc-grawa train: error: on {platform.node()}: {error}")


@launched
def test_a_bad_key_is_one_line_in_all(tmp_path: Path) -> None:
    status, output, errors = launch("train", *QUICK, "--method.perod=3", ranks=2)
    assert (status, output) == (2, "")
    assert len(ours(errors)) == 1 and "did you mean method.period?" in errors
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


@launched
def test_an_existing_folder_is_never_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text("precious")
    status, output, errors = launch("train", *QUICK, "--run.name=a", ranks=2)
    assert (status, output) == (2, "")
    assert len(ours(errors)) == 1 and "run.name is a: runs/a exists and is never overwritten" in errors
    assert [path.name for path in folder.iterdir()] == ["summary.json"]
    assert (folder / "summary.json").read_text() == "precious"


@pytest.mark.slow
def test_a_launcher_that_starts_worlds_of_one_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As srun does where it and the MPI library do not know each other: here without any launcher."""
    pytest.importorskip("mpi4py")
    if (Path(sys.prefix) / "bin" / "orted").exists():
        monkeypatch.setenv("OPAL_PREFIX", sys.prefix)  # the wheel's Open MPI finds its parts only by its own mpirun
    for name, value in {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"}.items():
        monkeypatch.setenv(name, value)
    jobs = []
    for rank in "01":
        monkeypatch.setenv("SLURM_PROCID", rank)
        jobs.append(start("train", *QUICK, "--backend=mpi", "--run.name=a"))
    (_, errors), (_, silence) = (job.communicate(timeout=100) for job in jobs)
    assert [job.returncode for job in jobs] == [2, 0]
    assert ours(errors) == [
        "hpc-grawa train: error: srun started 2 ranks, but mpi finds a world of 1: launcher and MPI library do not "
        "know each other; under SLURM use srun --mpi=pmix, else this MPI's own mpirun, or backend gloo"
    ]
    assert ours(silence) == []
    assert list((tmp_path / "runs").iterdir()) == []


def running(mark: str) -> list[int]:
    """Processes that were started with this word."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (entry / "cmdline").read_text() and "State:\tZ" not in (entry / "status").read_text():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def wait_for(path: Path, text: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < end, f"{path} never had {text}"
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [None, pytest.param(2, marks=launched)])
def test_ctrl_c_ends_all_ranks(ranks: int | None, tmp_path: Path) -> None:
    job = start(
        "train",
        *LINE,
        "--model=own.Slow",
        "--budget.seconds=1000",
        "--log.every=1",
        f"--run.dir={tmp_path}/c",
        "--run.name=c",
        ranks=ranks,
    )
    wait_for(tmp_path / "c" / "c" / "metrics.jsonl", '"train"')
    assert len(running(f"--run.dir={tmp_path}/c")) == (1 if ranks is None else 3)
    began = time.monotonic()
    job.send_signal(signal.SIGINT)
    _, errors = job.communicate(timeout=40)
    assert time.monotonic() - began < 30
    assert job.returncode != 0
    if ranks is None:  # mpirun kills its ranks a second later, saved or not
        assert (job.returncode, errors) == (130, "")
        assert json.loads((tmp_path / "c" / "c" / "summary.json").read_text())["cause"] == "SIGINT"
    while running(f"--run.dir={tmp_path}/c"):
        assert time.monotonic() - began < 40
        time.sleep(0.1)


COMPARED = """
method: LGRAWA
model: own.Slow
data: own.Numbers
loss: MSELoss
metric: own.R2
optimizer: {{class_path: SGD, init_args: {{lr: 0.05}}}}
budget: {{steps: 4}}
log: {{every: 1}}
run: {{name: study}}
compare:
  methods: {{LocalSGD: {{}}, LGRAWA: {{method.period: 2, budget: {{steps: {steps}}}}}, DataParallel: {{}}}}
  seeds: [36]
"""


@pytest.mark.slow
def test_a_comparison_continues_where_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, study = tmp_path / "recipe.yaml", tmp_path / "runs" / "study"
    recipe.write_text(COMPARED.format(steps=1_000_000))
    job = start("compare", "--config=recipe.yaml")
    wait_for(study / "LGRAWA-36" / "metrics.jsonl", '"train"')
    job.kill()
    job.communicate()
    finished = (study / "LocalSGD-36" / "summary.json").read_text()
    assert not (study / "LGRAWA-36" / "summary.json").exists()
    cut = {path.name: path.read_bytes() for path in (study / "LGRAWA-36").iterdir() if path.is_file()}
    said = called(capsys, "compare", "--config=recipe.yaml", "--dry_run").said
    far = r"LocalSGD-36  finished\n  LGRAWA-36  unfinished after [\d,]+ steps\n  DataParallel-36  not begun\n"
    assert re.fullmatch(f"runs/study: 3 runs, 2 to go\n  {far}", said), said

    recipe.write_text(COMPARED.format(steps=6))  # of the run that was cut off; it may change
    cli.main(["compare", "--config=recipe.yaml"])
    printed = capsys.readouterr().out
    assert "LocalSGD-36 (1 of 3) is in runs/study/LocalSGD-36 already" in printed
    assert {p.name for p in study.iterdir() if p.is_dir()} == {
        "LocalSGD-36",
        "LGRAWA-36",
        "LGRAWA-36.2",
        "DataParallel-36",
    }
    assert (study / "LocalSGD-36" / "summary.json").read_text() == finished
    assert {name: (study / "LGRAWA-36" / name).read_bytes() for name in cut} == cut
    again = json.loads((study / "LGRAWA-36.2" / "summary.json").read_text())
    assert (again["steps"], again["rounds"], again["seed"]) == (6, 3, 36)
    with (study / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["LocalSGD", "LGRAWA", "DataParallel"]
    assert (study / "figure.png").stat().st_size > 10_000
    assert [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("| ")][2:] == [
        row["experiment"] for row in rows
    ]

    cli.main(["compare", "--config=recipe.yaml"])
    assert capsys.readouterr().out.count(" already\n") == 3

    for words, difference in (
        (["--optimizer.lr=0.2"], "was made with 'lr: 0.05', now it is 'lr: 0.2'"),
        (["--data.noise=0.5"], "was made with 'noise: 0.1', now it is 'noise: 0.5'"),
        (["--network=1gbit,1us"], "was made with 'network: None', now it is 'network: 1gbit,1us'"),
    ):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["compare", "--config=recipe.yaml", *words])
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"runs/study/LocalSGD-36 {difference}" in error
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["compare", "--config=recipe.yaml"])
    assert "was made with '1 ranks', now it is '2 ranks'" in capsys.readouterr().err


def test_a_comparison_of_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*LINE, "--budget.steps=40", "--log.every=10", "--eval.unit=steps", "--eval.every=5"]
    words = ["compare", "--methods=EASGD,DataParallel", "--seeds=36,720,1042", "--target=-0.5", *words]
    names = [f"{method}-{seed}" for seed in (36, 720, 1042) for method in ("EASGD", "DataParallel")]
    lines = ["runs/comparison: 6 runs, 6 to go, at most 120 s of training", *(f"  {name}  not begun" for name in names)]
    assert called(capsys, *words, "--dry_run", "--budget.seconds=20").said.splitlines() == lines
    assert not Path("runs").exists()
    cli.main(words)
    printed = capsys.readouterr().out
    assert re.findall(r"^(\S+) \(\d of 6\)$", printed, re.M) == names
    summaries = {name: json.loads((Path("runs/comparison") / name / "summary.json").read_text()) for name in names}
    with Path("runs/comparison/table.csv").open() as file:
        for row in csv.DictReader(file):
            values = torch.tensor([s["center_test_r2"] for s in summaries.values() if s["method"] == row["method"]])
            assert row["seeds"] == "36 720 1042"
            assert float(row["center_test_r2"]) == pytest.approx(values.mean().item(), rel=1e-4)
            assert float(row["center_test_r2_std"]) == pytest.approx(values.std().item(), rel=1e-3, abs=1e-6)


def test_without_matplotlib_a_comparison_has_no_figure_and_one_that_is_asked_for_is_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    lacks = "figures need Matplotlib, which is not installed: pip install 'hpc-grawa[demo]'\n"
    status, output, errors = called(capsys, "compare", "--methods=EASGD", *LINE, "--budget.steps=4")
    assert (status, errors) == (0, "") and output.endswith(f"runs/comparison/table.csv\nfigure  none: {lacks}")
    assert Path("runs/comparison/table.csv").is_file()
    words = ("table", "runs/comparison", "--csv=t.csv", "--figure=f.png")
    assert called(capsys, *words) == (2, "", f"hpc-grawa table: error: {lacks}")
    assert not Path("t.csv").exists()


@pytest.mark.slow
def test_runs_train_where_no_extra_is_installed(tmp_path: Path) -> None:
    """And what needs one says so in a line, before any work."""
    extras = "scipy", "sklearn", "matplotlib", "torchvision", "tqdm", "tensorboard", "timm", "schedulefree"
    code = f"import sys; sys.modules.update(dict.fromkeys({extras})); from hpc_grawa import cli; cli.main()"
    words = ("--methods=EASGD", *LINE, "--budget.steps=4", f"--run.dir={tmp_path}")
    status, output, errors = launch("compare", *words, program=("-c", code))
    assert (status, errors) == (0, "") and "\nfigure  none: figures need Matplotlib" in output
    needs = "needs SciPy: pip install 'hpc-grawa[demo]'\n"
    for refused in (("flatness", str(tmp_path / "comparison/EASGD-0")), ("compare", "--paper", *words)):
        status, _, errors = launch(*refused, program=("-c", code))
        assert status == 2 and errors.endswith(needs) and errors.count("\n") == 1, errors


def test_a_run_of_a_comparison_that_diverges_is_told_and_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those after it are made, the status says so, and the same command does not try it again."""
    words = ["compare", "--methods=LGRAWA", "--grid=optimizer.lr=1e30,.1", *LINE, "--budget.steps=8"]
    status, output, errors = called(capsys, *words)
    assert status == 1 and errors.startswith("LGRAWA-lr1e30-0 has diverged: no rank has a finite score for layer")
    lines = [line for line in output.splitlines() if line.startswith("| LGRAWA")]
    assert len(lines) == 2 and sum("(diverged)" in line for line in lines) == 1
    before = Path("runs/comparison/LGRAWA-lr1e30-0/summary.json").read_text()
    assert json.loads(before)["state"] == "diverged"
    status, output, errors = called(capsys, *words)
    assert (status, errors) == (1, "") and output.count("already") == 2
    assert Path("runs/comparison/LGRAWA-lr1e30-0/summary.json").read_text() == before
    alone = ["compare", "--methods=LGRAWA", "--grid=optimizer.lr=1e30", *LINE, "--budget.steps=8"]
    status, output, errors = called(capsys, *alone, "--seeds=0", "--paper")
    assert (status, errors) == (1, "") and "LGRAWA" in output


def test_a_run_of_a_comparison_leaves_its_memory_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that is left over would have no room beside that of the next run."""
    honest, left = Worker.__init__, []

    def init(self: Worker, *args: Any) -> None:
        left.append(sum(isinstance(one, Worker) for one in gc.get_objects()) - 1)
        honest(self, *args)

    gc.collect()
    monkeypatch.setattr(Worker, "__init__", init)
    gc.disable()
    try:
        cli.main(["compare", "--methods=LGRAWA,DataParallel,EASGD", *LINE, "--budget.steps=2"])
    finally:
        gc.enable()
    assert left == [0, 0, 0]
    capsys.readouterr()


def test_variants_of_a_method_are_told_by_their_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the table of a comparison, and in the folder of a run without a name."""
    (tmp_path / "variants.yaml").write_text(
        "methods: {Rare: {method: LocalSGD, method.period: 4}, Rarest: {method: LocalSGD, method.period: 8}}"
    )
    words = [f"--config={tmp_path / 'variants.yaml'}", *LINE, "--budget.steps=8"]
    cli.main(["compare", "--methods=Rare,LocalSGD,Rarest", *words])
    with Path("runs/comparison/table.csv").open() as file:
        rows = [(row["experiment"], row["method"], row["rounds"]) for row in csv.DictReader(file)]
    assert rows == [("Rare", "Rare", "2.0"), ("LocalSGD", "LocalSGD", "1.0"), ("Rarest", "Rarest", "1.0")]
    cli.main(["train", "--method=Rarest", "--run.dir=alone", *words])
    assert [path.name.partition("-")[0] for path in Path("alone").iterdir()] == ["Rarest"]
    capsys.readouterr()


def plan(*words: str) -> list[Planned]:
    return Comparison.read(None, "1,2", None, None, ["--config=digits", *words], "hpc-grawa compare").plan


def test_a_grid_combines_the_settings_that_a_method_has(tmp_path: Path) -> None:
    """In a file and on the command line; folders, the command of each run, and the order they are made in."""
    (tmp_path / "said.yaml").write_text(
        "compare: {methods: [LGRAWA, EASGD, DataParallel], grid: {method.period: [8, 16], method.prox: [0.1],"
        " optimizer.lr: [0.1, 0.2]}}"
    )
    planned = plan(f"--config={tmp_path / 'said.yaml'}")
    names = [config.run.name for _, config in planned]
    assert len(set(names)) == len(names) == 2 * (4 + 4 + 2)
    assert names[:4] == [f"LGRAWA-period{p}-prox0.1-lr{lr}-1" for p in (8, 16) for lr in (0.1, 0.2)]
    assert names[4:10] == [
        *(f"EASGD-period{p}-lr{lr}-1" for p in (8, 16) for lr in (0.1, 0.2)),
        *(f"DataParallel-lr{lr}-1" for lr in (0.1, 0.2)),
    ]
    for words, config in planned:
        assert parse(words, "hpc-grawa train").text == config.text
    (_, first), (_, second) = planned[0], planned[3]
    assert first.method == LGRAWA(period=8, prox=0.1) and second.method == LGRAWA(period=16, prox=0.1)
    assert (first.optimizer.lr, second.optimizer.lr, first.run.seed, planned[-1].config.run.seed) == (0.1, 0.2, 1, 2)
    words = ["--config=digits"]
    other = Comparison.read("LGRAWA", None, None, " method.period=4 ;--method.pull=.3,.5", words, "hpc-grawa compare")
    assert [config.run.name for _, config in other.plan] == ["LGRAWA-period4-pull.3-0", "LGRAWA-period4-pull.5-0"]


@pytest.mark.slow
def test_a_comparison_by_a_launcher_goes_on_where_it_was_cut(tmp_path: Path) -> None:
    """Every run is a start of its own: one that fails does not keep the others, one that was cut goes on."""
    words = ["compare", *LINE, "--methods=LGRAWA,LocalSGD", "--seeds=1", "--log.every=1", "--run.name=study"]
    words += ["--method.period=2", "--grid=optimizer.lr=0.05,1e30", "--launcher=mpirun -np 2"]
    slow = [*words, "--budget.steps=400"]
    job, study = start(*slow), tmp_path / "runs" / "study"
    wait_for(study / "LGRAWA-lr0.05-1" / "metrics.jsonl", '"train"')
    job.send_signal(signal.SIGUSR2)
    out, errors = job.communicate()
    assert job.returncode == 75, errors
    assert json.loads((study / "LGRAWA-lr0.05-1" / "summary.json").read_text())["state"] == "timed out"
    job = start(*slow)
    out, errors = job.communicate()
    states = {run.name: json.loads((run / "summary.json").read_text()) for run in study.iterdir() if run.is_dir()}
    assert {name: (s["state"], s["world_size"]) for name, s in states.items()} == {
        "LGRAWA-lr0.05-1": ("finished", 2),
        "LocalSGD-lr0.05-1": ("finished", 2),
        "LGRAWA-lr1e30-1": ("diverged", 2),
        "LocalSGD-lr1e30-1": ("diverged", 2),
    }
    assert job.returncode == 1 and "LGRAWA-lr1e30-1 has ended with status 1" in errors
    assert "LocalSGD" in out and (study / "figure.png").is_file()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ("methods is missing", "--methods LGRAWA,EASGD")),
        (["--methods=EASGD", "--grid=method.period"], ("grid is method.period", "KEY=VALUE,VALUE")),
        (["--methods=EASGD", "--grid=method.period=4,4"], ("grid is method.period=4,4", "different values")),
        (["--methods=EASGD", "--grid=run.seed=4"], ("grid is run.seed=4", "sets itself")),
        (["--methods=EASGD", "--grid=method.perod=4"], ("method.perod is no setting", "did you mean method.period")),
        (["--methods=EASGD", "--grid=method.period=x"], ("method.period is x",)),
        (["--methods=EASGD", "--grid=method.pull=1;method.pull=0"], ("must not name a key twice",)),
        (["--methods=EASGD", "--launcher=no-such-launcher"], ("launcher is no-such-launcher", "cannot be found")),
        (["--methods=EASGD", "--launcher=a", "--submit=b"], ("not allowed with argument",)),
        (["--methods=EASGD", "--launcher="], ("launcher", "must begin with a program")),
        (["--methods=EASGD", "--launcher=mpirun 'a"], ("launcher is mpirun 'a", "No closing quotation")),
        (["--methods=EASGD", "--submit="], ("submit", "must be options of sbatch, if any, and the script")),
        (["--methods=EASGD", "--submit='a"], ("submit is 'a", "No closing quotation")),
        (["--methods=LGRAWA,NoSuch"], ("method is NoSuch", "LGRAWA")),
        (["--methods=LGRAWA,LGRAWA"], ("methods is LGRAWA,LGRAWA", "twice")),
        (["--methods=LGRAWA,own.LGRAWA"], ("methods is LGRAWA,LGRAWA", "twice")),
        (["--methods=LGRAWA", "--seeds=1,x"], ("seeds is 1,x", "whole numbers")),
        (["--methods=LGRAWA", "--seeds=1,1"], ("seeds is 1,1", "twice")),
        (["--methods=LGRAWA", "--seeds=1,01"], ("seeds is 1,1", "twice")),
        (["--methods=LGRAWA", "--seeds=²"], ("seeds is ²", "whole numbers")),
        (["--methods=LGRAWA", f"--seeds={'9' * 5000}"], ("seeds is 9", "whole numbers")),
        (["--methods=LGRAWA", "--target=high"], ("--target", "'high'")),
        (["--methods=LGRAWA", "--target=nan"], ("target is nan", "a finite number")),
        (["--methods=LGRAWA", "--method=EASGD"], ("--method=EASGD", "--methods")),
        (["--methods=LGRAWA", "--method.class_path", "EASGD"], ("--method.class_path", "--methods")),
        (["--methods=LGRAWA", "--run.seed", "3"], ("--run.seed", "--seeds")),
        (["--methods=LGRAWA", "--run.resume", "auto"], ("--run.resume=auto", "left out", "goes on by itself")),
        (["--methods=EASGD,LGRAWA", "--method.power=2"], ("method.power is no setting of EASGD", "pull")),
        (["--methods=EASGD", "--data.batch_size=2000"], ("data.batch_size is 2000", "at most 1437")),
        (["--methods=EASGD", "--run.dir=/dev/null"], ("run.dir is /dev/null", "Not a directory")),
        (["--methods=EASGD", "--grid=optimizer.lr=.1,.10"], ("grid is optimizer.lr=.1,.10", "with different values")),
        (["--methods="], ("method: must be ",)),
        (["--methods=EASGD", "--seeds="], ("seeds: must be whole numbers",)),
    ],
)
def test_what_cannot_be_compared(words: list[str], parts: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["compare", "--config=digits", *words])
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    for part in parts:
        assert part in printed.err


@pytest.mark.parametrize(
    ("section", "error"),
    [
        ("{methods: 'LGRAWA,EASGD'}", "compare.methods is LGRAWA,EASGD: must be a list of names ([LGRAWA, EASGD])"),
        ("{methods: [LGRAWA, 3]}", "compare.methods is ['LGRAWA', 3]: must be a list of names ([LGRAWA, EASGD])"),
        ("{methods: [LGRAWA], seeds: 36}", "compare.seeds is 36: must be a list of numbers ([1, 2])"),
        ("{methods: [LGRAWA], seeds: []}", "compare.seeds is []: must be a list of numbers ([1, 2])"),
        (
            "{methods: [LGRAWA], networks: {5: [LGRAWA]}}",
            "compare.networks is {5: ['LGRAWA']}: must hold those of the methods ({'1gbit,100us': [LGRAWA]})",
        ),
        (
            "{methods: [LGRAWA], grid: {network: ['1gbit,1us', '1gbit, 1us']}}",
            "grid is {'network': ['1gbit,1us', '1gbit, 1us']}: gives two runs the name LGRAWA-network1gbit_1us-0: "
            "must have one of them in a comparison of its own",
        ),
        ("{methods: [LGRAWA], target: high}", "compare.target is high: must be a number"),
        (
            "{methods: [LGRAWA], networks: {'1gbit,1us': [EASGD]}}",
            "compare.networks is {'1gbit,1us': ['EASGD']}: must hold those of the methods ({'1gbit,100us': [LGRAWA]})",
        ),
        ("{methods: [LGRAWA], networks: {1foo: [LGRAWA]}}", f"network is 1foo: {throttled.MUST}"),
        (
            "{methods: [LGRAWA], grid: {optimizer.groups: [[{match: ndim<2}], [{match: ndim>2}]]}}",
            "grid is {'optimizer.groups': [[{'match': 'ndim<2'}], [{'match': 'ndim>2'}]]}: gives two runs the name "
            "LGRAWA-groups_match_ndim_2_-0: must have one of them in a comparison of its own",
        ),
    ],
)
def test_what_a_comparison_cannot_say(
    section: str, error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "said.yaml").write_text(f"compare: {section}")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["compare", "--config=digits", f"--config={tmp_path / 'said.yaml'}"])
    assert capsys.readouterr().err == f"hpc-grawa compare: error: {error}\n"


def test_a_table_of_any_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["train", *QUICK, "--run.name=one"])
    other = ("--config=digits", "--method=DataParallel", "--budget.seconds=null", "--budget.steps=5")
    cli.main(["train", *other, "--run.dir=other", "--run.name=two"])
    capsys.readouterr()
    cli.main(["table", "runs/one", "other/two", "--csv=t.csv", "--figure=f.png", "--target=0.2"])
    printed = capsys.readouterr().out
    assert re.search(r"^\| LGRAWA +\|", printed, re.M) and re.search(r"^\| DataParallel +\|", printed, re.M)
    with Path("t.csv").open() as file:
        assert [int(float(row["steps"])) for row in csv.DictReader(file)] == [9, 5]
    assert Path("f.png").stat().st_size > 10_000
    cli.main(["train", *QUICK, "--run.name=three", "--run.seed=1"])
    capsys.readouterr()
    cli.main(["table", "runs", "other/two"])
    assert re.search(r"^\| LGRAWA +\| +2 \|", capsys.readouterr().out, re.M)  # both of its runs
    for words in (["nowhere"], ["."]):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["table", *words])
        error = capsys.readouterr().err
        assert error.startswith("hpc-grawa table: error: ") and error.count("\n") == 1


def test_evaluate_needs_a_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["evaluate", "nowhere"], ["evaluate"], ["evaluate", "."]):
        with pytest.raises(SystemExit, match="2"):
            cli.main(words)
        error = capsys.readouterr().err
        assert error.startswith("hpc-grawa evaluate: error: ") and error.count("\n") == 1


def test_a_dry_run_says_what_a_run_would_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schedule = ("--schedule=Step", "--schedule.milestones=[4, 7]", "--budget.seconds=null", "--budget.epochs=10")
    cli.main(["train", "--config=digits", "--dry_run", "--world_size=12", "--method.period=8", *schedule])
    lines = {line[:18].strip(): line[18:] for line in capsys.readouterr().out.splitlines()}
    assert lines["effective batch"] == "32 per rank x 12 ranks = 384"
    assert lines["learning rate"] == "0.1 at 0%, 0.1 at 25%, 0.01 at 50%, 0.001 at 75%, 0.001 at 100%"
    assert lines["split"] == "disjoint: each rank keeps 119 or 120 examples, which no other has"
    assert lines["budget"] == "40 steps; 4 steps per epoch"
    assert lines["rounds"] == "0.5 per epoch, every 8 local steps"
    sent = 2 * 4 * 15_418 * 11 / 12 + 8 * (10 + 11) * 11  # the center; control word and scores
    assert lines["sent per rank"] == f"{sent / 1000:.3g} kB per round, 0 B per step, {sent / 2000:.3g} kB per epoch"
    assert re.search(r"[MG]B at its peak here; parameters 61.7 kB$", lines["memory per rank"])
    assert re.search(r"timed over 5", lines["time per epoch"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("period", [1, 3, 6, 1000])
@pytest.mark.parametrize("method", [plain("leader")[0], plain("uniform")[0]])
def test_a_dry_run_counts_one_round_whatever_the_period(
    method: str, period: int, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["train", *QUICK, f"--method={method}", f"--method.period={period}", "--dry_run", "--world_size=2"])
    center = 4 * 15_418 * (0.5 if is_(method, "leader") else 1)
    assert f"{(center + 8 * 11) / 1000:.3g} kB per round" in capsys.readouterr().out


def test_words_of_an_option_may_be_joined_by_a_hyphen(capsys: pytest.CaptureFixture[str]) -> None:
    """Values stay as they are."""
    shown = []
    for joint in ("_", "-"):
        options = (f"--optimizer.weight{joint}decay=1e-3", f"--comm{joint}timeout", "5", "--run.name=a-b")
        with pytest.raises(SystemExit, match="0"):
            cli.main(["train", *QUICK, *options, f"--print{joint}config"])
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert all(line in shown[0] for line in ("weight_decay: 0.001\n", "comm_timeout: 5.0\n", "name: a-b\n"))
    cli.main(["train", *QUICK, "--dry-run", "--world-size=2"])
    assert "per rank x 2 ranks" in capsys.readouterr().out


def test_world_size_of_a_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    for size, part in (
        ("0", "world_size is 0: must be at least 1"),
        ("x", "world_size: invalid int value: 'x'"),
        ("2000", "data.batch_size is 32: must be at most 0"),
    ):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["train", *QUICK, "--dry_run", "--world_size", size])
        error = capsys.readouterr().err
        assert error.startswith("hpc-grawa train: error: ") and part in error and error.count("\n") == 1


def test_plain_lines_where_the_screen_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "LINE_EVERY", 0)
    cli.main(["train", *QUICK])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "backend    single (no launcher), 1 rank"
    steps = [
        line for line in lines if re.match(r" +\d+\.\d s  step \d+  epoch \d\.\d\d  loss \d\.\d{4}  lr 0\.1  ", line)
    ]
    assert len(steps) == 9
    parts = r"compute \d+ %  load \d+ %  communicate \d+ %  wait \d+ %  sent .* ETA \d+ s"
    assert all(re.search(parts, line) for line in steps)
    assert not any("\r" in line or "\x1b" in line for line in lines)


@pytest.mark.slow
def test_a_live_bar_on_a_terminal(tmp_path: Path) -> None:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    words = [*LINE, "--model=own.Slow", "--budget.steps=30", "--run.name=a", "--method.period=2"]
    process = start("train", *words, stdout=slave)
    os.close(slave)
    shown = b""
    while True:
        try:
            if not (piece := os.read(master, 1000)):
                break
        except OSError:  # the other end is closed
            break
        shown += piece
    os.close(master)
    assert process.wait(60) == 0
    assert re.search(rb"\r +\d+% \|.*\| .*step \d+", shown)
    assert b"see runs/a" in shown.splitlines()[-1]


def test_names_of_runs_without_one(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        cli.main(["train", *LINE, "--budget.steps=1"])
    names = sorted(path.name for path in Path("runs").iterdir())
    assert len(names) == 2
    for name in names:
        assert re.fullmatch(r"LGRAWA-\d{8}-\d{6}(\.2)?", name)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    for words, parts in (
        (["--help"], ("train", "evaluate", "table", "compare", "toy")),
        (["train", "--help"], ("--config", "--budget.seconds", "--dry_run", "--run.seed")),
        (["train", "--help", "--nosuch"], ("--method", "--budget.seconds")),
        (["train", "--config=digits", "--help"], ("--method.pull", "--model.width", "--budget.seconds")),
        (["train", "--method.help=EASGD"], ("--method.pull", "β")),
        (["train", "--method=EASGD", "--method.help"], ("--method.pull", "β")),
        (["train", "--method.period.help", "QSR"], ("--method.period.alpha",)),
        (["train", "--budget.help"], ("--budget.seconds",)),
        (["--version"], ("hpc-grawa ",)),
        (["compare", "--help"], ("--methods", "--seeds")),
        (["table", "--help"], ("--csv", "--figure")),
        (["evaluate", "--help"], ("run",)),
        (["toy", "--help"], ("--methods", "--figure", "--period")),
    ):
        with pytest.raises(SystemExit) as end:
            cli.main(words)
        printed = capsys.readouterr()
        assert (end.value.code, printed.err) == (0, "")
        for part in parts:
            assert part in printed.out
        assert "torch.ao" not in printed.out  # not every module that torch has
    cli.main(["methods"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line and line[0] != " "]
    assert {line for line in lines if line[0] != "-"} == set(plain())
    for what in ("learning rate", "center.pt", "run.finish()", "run.state_dict()"):  # to know of all of them
        assert any(line[0] == "-" and what in line for line in lines)
    for words in ([], ["tran"]):
        with pytest.raises(SystemExit, match="2"):
            cli.main(words)
        assert re.match(r"hpc-grawa: error: no command.*must be one of train, evaluate,", capsys.readouterr().err)


def test_a_reader_that_has_read_enough_ends_a_command_without_a_word() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    ended = launch("methods", "LGRAWA", stdout=writer)
    os.close(writer)
    assert (ended.status, ended.errors) == (128 + signal.SIGPIPE, "")
