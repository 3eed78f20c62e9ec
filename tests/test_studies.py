"""The scripts of benchmarks/studies run as they stand, on little."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import own
import pytest
from launcher import called, environment
from test_config import cifar
from test_examine_runs import trained

from hpc_grawa.runs.record import read_run

STUDIES = Path(__file__).parents[1] / "benchmarks/studies"

pytestmark = pytest.mark.slow


def output(script: str, *words: str | Path) -> str:
    command = [sys.executable, STUDIES / script, *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(autouse=True)
def plain_process(monkeypatch: pytest.MonkeyPatch) -> None:
    own.plain_process(monkeypatch)


@pytest.fixture
def comparison(tmp_path: Path) -> Path:
    for method in ("DataParallel", "LocalSGD"):
        for seed in (1, 2):
            trained(tmp_path / f"a/{method}-{seed}", f"--method={method}", f"--run.seed={seed}", "--budget.steps=8")
    return tmp_path / "a"


def test_what_is_sent(comparison: Path, tmp_path: Path) -> None:
    said = output("volume.py", comparison, "--figure", tmp_path / "volume.png")
    rows = {line.split("|")[1].strip(): line for line in said.splitlines() if line.startswith("|")}
    assert "100.0 %" in rows["DataParallel"] and "LocalSGD" in rows
    assert (tmp_path / "volume.png").stat().st_size > 10_000


def test_large_batches(comparison: Path, tmp_path: Path) -> None:
    """Of each row the learning rate that was best on the way."""
    words = ("--method=DataParallel", "--budget.steps=8", "--optimizer.lr=1e-6")
    trained(tmp_path / "a/DataParallel-slow-1", *words, "--run.seed=1")
    said = output("large_batch.py", comparison, "--figure", tmp_path / "large_batch.png")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in said.splitlines() if line.startswith("|")]
    (rate,) = {record.config["optimizer.lr"] for record in map(read_run, comparison.glob("*-2"))}
    assert [row[1:3] for row in rows[2:]] == [
        ["DataParallel", f"{rate:g} of 1e-06, {rate:g}"],
        ["LocalSGD", f"{rate:g} of {rate:g}"],
    ]
    assert (tmp_path / "large_batch.png").stat().st_size > 10_000


def test_gradient_norm_and_gap(comparison: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, errors = called(capsys, "flatness", str(comparison), "--measures", "loss", "--examples", "50")
    assert status == 0, errors
    said = output("gap.py", comparison, "--figure", tmp_path / "gap.png", "--trained", "0")
    assert "4 runs, 4 of them measured, 4 finite; 4 trained" in said
    assert (tmp_path / "gap.png").stat().st_size > 10_000


def test_convex_rates(tmp_path: Path) -> None:
    said = output("convex.py", "--steps", "200", "--seeds", "2", "--figure", tmp_path / "convex.png")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in said.splitlines() if line.startswith("|")]
    ends = {row[0]: float(row[3]) for row in rows[2:]}
    assert 0 < ends["LGRAWA"] < 2 and 0 < ends["DataParallel"] < 2  # 28 at the start
    assert (tmp_path / "convex.png").stat().st_size > 10_000


def test_replicas_with_few_images() -> None:
    said = output("thousand.py", "--replicas", "20", "--rounds", "4").splitlines()
    assert [line.split(",")[0] for line in said] == ["Parle", "one replica alone", "SGD"]


def test_trust_ratios(tmp_path: Path) -> None:
    data = cifar(tmp_path / "data", 10, train=5000)
    said = output("trust.py", data, "--steps", "10", "--batch_size", "32", "--figure", tmp_path / "trust.png")
    assert [line.split("|")[1].strip() for line in said.splitlines() if "step 1 " in line] == ["LARS", "LAMB"]
    assert (tmp_path / "trust.png").stat().st_size > 10_000
