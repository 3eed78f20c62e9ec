"""Ranks that stop, and what the others and a reader of the run's folder learn of it."""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import time
from pathlib import Path

import own
import pytest
from launcher import called, launch, launched, start
from test_cli import LINE, running

from hpc_grawa.errors import ConfigError
from hpc_grawa.report.status import describe
from hpc_grawa.runs.heartbeat import BEAT, read_heartbeats

HOST = platform.node()


@pytest.fixture(autouse=True)
def plain_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own.plain_process(monkeypatch)
    monkeypatch.chdir(tmp_path)


def words(tmp_path: Path, *more: str) -> tuple[str, ...]:
    where = (f"--run.dir={tmp_path}", "--run.name=a", "--backend=mpi", "--method.period=4", "--log.every=4")
    return ("train", *LINE, *more, *where)


@pytest.mark.slow
@launched
@pytest.mark.parametrize("activity", [pytest.param("evaluates", marks=pytest.mark.slow), "computes"])
def test_a_rank_that_hangs_ends_the_job_and_is_named(activity: str, tmp_path: Path) -> None:
    where = f"--model.evaluation={activity == 'evaluates'}"
    hangs = ("--model=own.Hanging", "--model.calls=20", where, "--budget.steps=100", "--comm-timeout=8")
    began = time.monotonic()
    status, _, errors = launch(*words(tmp_path, "--method=LocalSGD", *hangs), ranks=2)
    assert status != 0 and time.monotonic() - began < 150
    assert re.search(
        rf"rank 0 of 2 on {HOST} has waited \d+ s for (control|evaluate) \(comm_timeout is 8\): ending the job "
        rf"on all ranks; not waiting: rank 1 on {HOST} at step \d+ {activity}, heard of \d s ago",
        errors,
    ), errors
    beats = read_heartbeats(tmp_path / "a")
    assert [s.rank for s in beats] == [0, 1]
    assert beats[0].activity.startswith("waited for ") and beats[1].activity == activity
    for file in (tmp_path / "a" / "ranks").iterdir():  # as a minute later
        os.utime(file, (time.time() - 10 * BEAT,) * 2)
    assert re.match(
        rf"{tmp_path}/a: ended by rank 0 on {HOST}, which gave up waiting: rank 1 on {HOST} at step \d+ {activity}, ",
        describe(tmp_path / "a"),
    )


@pytest.mark.slow
@launched
@pytest.mark.parametrize("backend", ["mpi", pytest.param("gloo", marks=pytest.mark.slow)])
def test_a_rank_that_is_killed_ends_the_job_and_its_last_step_is_known(backend: str, tmp_path: Path) -> None:
    job = start(*words(tmp_path, "--model=own.Slow", "--budget.steps=10000"), f"--backend={backend}", ranks=2)
    end = time.monotonic() + 120

    def written() -> str:
        records = tmp_path / "a" / "metrics.jsonl"
        return records.read_text() if records.exists() else ""

    def begun() -> bool:
        beats = read_heartbeats(tmp_path / "a")
        return len(beats) == 2 and beats[0].used > 0 and '"train"' in written() and '"round"' in written()

    while not begun():
        assert time.monotonic() < end
        time.sleep(0.2)
    now = describe(tmp_path / "a")
    assert now.startswith(f"{tmp_path}/a: running\nprogress   step ")
    assert re.search(r"\d+\.\d s of training, [01]% of the budget, ETA \d+ s\n", now), now
    assert re.search(r"training   step \d+: loss [\d.e-]+, lr 0.05, examples_per_second [\d.]+\n", now), now
    assert re.search(r"^slowest    rank [01], in \d+ of \d+ rounds$", now, re.M), now
    assert all(re.search(rf"^\| {rank} +\| +{HOST} \| +\d+ \|", now, re.M) for rank in (0, 1)), now
    victim = max(running(f"--run.dir={tmp_path}"))
    killed = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    job.communicate(timeout=30)
    assert job.returncode != 0 and time.monotonic() - killed < 30
    files = sorted((tmp_path / "a" / "ranks").glob("*.json"))
    rank = next(json.loads(f.read_text())["rank"] for f in files if json.loads(f.read_text())["pid"] == victim)
    for file in files:  # as a minute later
        os.utime(file, (time.time() - 10 * BEAT,) * 2)
    then = describe(tmp_path / "a")
    assert re.match(
        rf"{tmp_path}/a: died without a word, killed or lost with its host: first rank {rank} on {HOST} at step \d+\n",
        then,
    ), then


def test_the_state_of_a_run_that_has_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = [word for word in words(tmp_path, "--budget.steps=9") if not word.startswith("--backend")]
    assert called(capsys, *alone)[0] == 0
    status, output, _ = called(capsys, "status", str(tmp_path / "a"))
    assert status == 0 and output.startswith(f"{tmp_path}/a: finished\ntraining   step 8: ")
    (tmp_path / "table.csv").touch()  # as beside the runs of a comparison, which its folder stands for
    assert called(capsys, "status", str(tmp_path)) == (0, output, "")
    status, _, errors = called(capsys, "status", str(tmp_path / "none"))
    assert (status, errors) == (
        2,
        f"hpc-grawa status: error: {tmp_path}/none is no run folder: there is no such folder\n",
    )
    with pytest.raises(ConfigError):
        describe(tmp_path / "none")
    summary = {"state": "failed", "cause": "OSError: no", "rank": 3, "host": "far", "steps": 7, "world_size": 4}
    (tmp_path / "a" / "summary.json").write_text(json.dumps(summary))
    assert describe(tmp_path / "a").startswith(f"{tmp_path}/a: failed by OSError: no (rank 3 on far)\n")
