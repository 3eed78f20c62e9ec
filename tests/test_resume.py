"""A run cut off anywhere and resumed is the uninterrupted run, bit for bit."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import own
import pytest
import torch
from test_cli import LINE, launch, launched, running, start

from hpc_grawa import simulate
from hpc_grawa.checkpoint import Checkpoints, Damaged
from hpc_grawa.cli import TRY_AGAIN
from hpc_grawa.comm import Communicator
from hpc_grawa.config import Config
from hpc_grawa.errors import ConfigError
from hpc_grawa.parsing import parse
from hpc_grawa.resume import Lock
from hpc_grawa.train import Worker, fit

WORLD, STEPS = 3, 18
METHODS = {
    "GRAWA": "GRAWA",
    "MGRAWA": "MGRAWA",
    "LGRAWA": "LGRAWA",
    "LGRAWA, averaged momenta and statistics": "LGRAWA --method.local_momentum=average --method.buffers=average",
    "LGRAWA, pooled": "LGRAWA --method.rounds=pooled",
    "LocalMGRAWA": "LocalMGRAWA",
    "LocalLGRAWA": "LocalLGRAWA",
    "EASGD": "EASGD",
    "LSGD": "LSGD",
    "LSGD of groups": "LSGD --method.group_period=2 --method.ranks_per_group=2",
    "LocalSGD": "LocalSGD",
    "DataParallel": "DataParallel",
}


@pytest.fixture(autouse=True)
def plain_process(monkeypatch: pytest.MonkeyPatch) -> None:
    own.plain_process(monkeypatch)


class Cut(Exception):
    """The job ends here."""


def config(method: str, *words: str) -> Config:
    period = [] if "DataParallel" in method else ["--method.period=4"]
    often = ["--save.unit=steps", "--save.every=5", "--eval.unit=steps", "--eval.every=6", "--log.every=3"]
    shape = ["--run.control_every=3", "--schedule=Cosine", "--budget.seconds=null", f"--budget.steps={STEPS}"]
    made = parse(
        ["--config=digits", f"--method={method.split()[0]}", *method.split()[1:], *period, *often, *shape, *words]
    )
    made.check(WORLD)
    return made


def run(made: Config, folder: Path) -> list[dict[str, Any]]:
    folder.mkdir(exist_ok=True)

    def body(comm: Communicator) -> dict[str, Any]:
        return fit(made, comm, None if comm.rank else lambda: folder, speaks=False)

    return simulate(WORLD, body)


def cut_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on every run ends before this local step."""
    take = Worker.step

    def cut(worker: Worker) -> Any:
        if worker.local_steps == step:
            raise Cut
        return take(worker)

    monkeypatch.setattr(Worker, "step", cut)


def result(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """The center, the records and the summary, without what a clock says."""
    state = {k: t.tolist() for k, t in torch.load(folder / "center.pt", weights_only=True).items()}
    clocked = ("seconds", "examples_per_second", "slowest", "started")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in record.items() if k not in clocked} for record in records]
    summary = json.loads((folder / "summary.json").read_text())
    same = ("steps", "rounds", "healed", "epochs", "bytes_sent", "payload_bytes", "consensus_distance", "best_step")
    return state, kept, {k: summary[k] for k in (*same, "local_test_loss", "center_train_loss", "center_test_loss")}


@pytest.mark.parametrize("name", METHODS)
def test_a_run_cut_off_twice_equals_the_uninterrupted_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With momentum, a schedule, words under way at the saves, saves between rounds (pooled: after the next one)."""
    made = config(METHODS[name])
    run(made, tmp_path / "whole")
    for step in (9, 17):
        with monkeypatch.context() as patched:
            cut_at(step, patched)
            with pytest.raises(Cut):
                run(made, tmp_path / "cut")
    run(made, tmp_path / "cut")
    for cut, whole in zip(result(tmp_path / "cut"), result(tmp_path / "whole"), strict=True):
        assert cut == whole


def test_saving_changes_nothing(tmp_path: Path) -> None:
    run(config("LGRAWA"), tmp_path / "with")
    run(config("LGRAWA", "--save.every=.inf"), tmp_path / "without")
    assert result(tmp_path / "with") == result(tmp_path / "without")
    assert not (tmp_path / "without" / "checkpoints").exists()
    saved = sorted(p.name for p in (tmp_path / "with" / "checkpoints").iterdir())
    assert saved == ["000000010", "000000015", "latest"]


def test_a_run_cut_off_before_its_first_checkpoint_starts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = config("LGRAWA")
    run(made, tmp_path / "whole")
    with monkeypatch.context() as patched:
        cut_at(4, patched)
        with pytest.raises(Cut):
            run(made, tmp_path / "cut")
    run(made, tmp_path / "cut")
    assert result(tmp_path / "cut") == result(tmp_path / "whole")


# ---------------------------------------------------------------------------------------------------------
# Checkpoints.
# ---------------------------------------------------------------------------------------------------------


def saved(folder: Path, steps: tuple[int, ...], keep: int = 2) -> None:
    def body(comm: Communicator) -> None:
        checkpoints = Checkpoints(folder, comm, keep)
        for step in steps:
            state = {"x": torch.full((5,), float(comm.rank)), "step": step, "nested": [None, (1, "a")]}
            assert checkpoints.save(step, state, {"seconds": 1.5}) is None

    simulate(WORLD, body)


def loaded(folder: Path) -> list[tuple[int, Any, tuple[str, ...]]]:
    def body(comm: Communicator) -> tuple[int, Any, tuple[str, ...]]:
        restored = Checkpoints(folder, comm).load()
        assert restored is not None and (restored.world_size, restored.facts["seconds"]) == (WORLD, 1.5)
        assert restored.state["x"].tolist() == [comm.rank] * 5
        return restored.step, restored.state["nested"], restored.skipped

    return simulate(WORLD, body)


def test_the_newest_is_loaded_and_the_last_are_kept(tmp_path: Path) -> None:
    assert simulate(WORLD, lambda comm: Checkpoints(tmp_path / "none", comm).load()) == [None] * WORLD
    saved(tmp_path, (10, 20, 30, 30))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000000020", "000000030", "latest"]
    assert loaded(tmp_path) == [(30, [None, (1, "a")], ())] * WORLD


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "manifest"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(tmp_path: Path, damage: str) -> None:
    saved(tmp_path, (10, 20))
    file = tmp_path / "000000020" / ("manifest.json" if damage == "manifest" else "rank-0001.pt")
    data = bytearray(file.read_bytes())
    if damage == "gone":
        file.unlink()
    elif damage == "flipped":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    else:
        file.write_bytes(data[: len(data) // 2])
    for step, _, skipped in loaded(tmp_path):
        assert step == 10
        assert all(str(file) in told for told in skipped) and skipped[0].startswith("rank ")
    for place in tmp_path.glob("0*"):
        (place / "rank-0002.pt").write_bytes(b"")

    def body(comm: Communicator) -> str:
        with pytest.raises(Damaged, match=r"no checkpoint in .* is whole: ") as error:
            Checkpoints(tmp_path, comm).load()
        return str(error.value)

    assert len(set(simulate(WORLD, body))) == 1


def test_a_rank_that_cannot_write_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks are told, whichever it is; nothing of the new one remains."""
    saved(tmp_path, (10,))

    def body(comm: Communicator) -> str | None:
        class Full:
            def __reduce__(self) -> Any:
                raise OSError(28, "No space left on device")

        state = {"x": Full() if comm.rank == 1 else 0}
        return Checkpoints(tmp_path, comm).save(20, state, {})

    told = simulate(WORLD, body)
    assert told == ["rank 1: [Errno 28] No space left on device"] * WORLD
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000000010", "latest"]
    assert loaded(tmp_path)[0][0] == 10


def test_too_little_space_is_an_error_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr("hpc_grawa.checkpoint.shutil.disk_usage", lambda place: usage)
    with pytest.raises(ConfigError, match=r"save.keep is 2: 3 checkpoints of 3 ranks need 2.23 MB, .* has 1 MB free"):
        run(config("LGRAWA"), tmp_path / "a")
    run(config("LGRAWA", "--save.every=.inf"), tmp_path / "b")


def test_what_an_interrupted_save_left_is_no_checkpoint(tmp_path: Path) -> None:
    saved(tmp_path, (10,))
    left = tmp_path / "000000020.partial"
    left.mkdir()
    (left / "rank-0000.pt").write_bytes(b"half")
    assert loaded(tmp_path)[0][0] == 10
    saved(tmp_path, (20,))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000000010", "000000020", "latest"]


def test_another_world_starts_from_the_center_if_it_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks go on where three stopped: all from the last center, to the same number of steps."""
    made = config("LGRAWA")
    with monkeypatch.context() as patched:
        cut_at(13, patched)
        with pytest.raises(Cut):
            run(made, tmp_path)

    def body(comm: Communicator, any_world: bool = False) -> dict[str, Any]:
        return fit(made, comm, None if comm.rank else lambda: tmp_path, speaks=False, any_world=any_world)

    with pytest.raises(ConfigError, match=r"the launcher started 2 ranks: must be 3, as when .* --resume-world any"):
        simulate(2, body)
    summary = simulate(2, lambda comm: body(comm, any_world=True))[0]
    assert (summary["world_size"], summary["steps"]) == (2, STEPS)
    rounds = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if '"round"' in line]
    assert [(event["step"], len(event["ranks"])) for event in rounds] == [(4, 3), (8, 3), (14, 2), (18, 2)]
    assert summary["center_test_accuracy"] > 0.3


# ---------------------------------------------------------------------------------------------------------
# The program.
# ---------------------------------------------------------------------------------------------------------

WORDS = (
    *("train", "--config=digits", "--run.name=a", "--run.resume=auto", "--save.unit=steps", "--save.every=7"),
    *("--method.period=4", "--budget.seconds=null", "--eval.train_examples=50", "--log.every=5", "--backend=mpi"),
)


@launched
@pytest.mark.slow
def test_a_killed_job_started_again_equals_one_that_was_not(tmp_path: Path) -> None:
    """SIGKILL of both ranks wherever they are, three times; then the finished run is left as it is."""
    words = (*WORDS, "--budget.steps=150", "--eval.unit=steps", "--eval.every=40")
    status, _, errors = launch(*words, f"--run.dir={tmp_path}/whole", ranks=2)
    assert status == 0, errors
    again = (*words, f"--run.dir={tmp_path}/cut")
    folder = tmp_path / "cut" / "a"
    for saves in (1, 3, 6):
        job = start(*again, ranks=2, start_new_session=True)
        wait_for(folder / "checkpoints" / "latest", "", saves * 7)
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
        for process in running(f"--run.dir={tmp_path}/cut"):
            os.kill(process, signal.SIGKILL)
        assert not (folder / "summary.json").exists()
        os.utime(folder / "lock.json", (0, 0))  # as a minute would
    status, output, errors = launch(*again, ranks=2)
    assert status == 0 and "resumed    at step " in output, errors
    for cut, whole in zip(result(folder), result(tmp_path / "whole" / "a"), strict=True):
        assert cut == whole
    before = sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*"))
    status, output, errors = launch(*again, ranks=2)
    assert (status, output) == (0, f"hpc-grawa train: {folder} is finished\n"), errors
    assert sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*")) == before


def wait_for(latest: Path, _: str, step: int) -> None:
    end = time.monotonic() + 90
    while not (latest.exists() and int(latest.read_text() or 0) >= step):
        assert time.monotonic() < end, f"step {step} was never saved"
        time.sleep(0.02)


def test_what_a_run_does_not_go_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another configuration, unless it is allowed; another job at work; no name where none can be found again."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    words = (*WORDS, "--backend=single", f"--run.dir={tmp_path}")
    folder = tmp_path / "a"

    def refused(*more: str) -> str:
        status, output, errors = launch(*words, *more)
        assert (status, output) == (2, "backend    single (no launcher, asked for), 1 rank\n"[: len(output)])
        return errors.removeprefix("hpc-grawa train: error: ").strip()

    assert launch(*words, "--budget.steps=8")[0] == 0
    (folder / "summary.json").unlink()
    assert refused("--budget.steps=8", "--method.pull=0.7") == (
        f"method.pull is 0.7: must be 0.5, as it was when {folder} began; give the run another name, or allow this "
        f"with --allow-change method.pull"
    )
    holder = Lock(folder, "job 17_2")
    assert re.match(
        rf"run.name is a: job 17_2 on .* \(process {os.getpid()}\) is at work in {folder}, its last sign of life \d+ s",
        refused("--budget.steps=8"),
    )
    holder.release()
    status, output, errors = launch(*words, "--budget.steps=12", "--allow-change", "budget")
    assert status == 0 and "resumed    at step 7" in output, errors
    assert json.loads((folder / "summary.json").read_text())["steps"] == 12
    assert refused("--run.name=null", "--budget.steps=8") == (
        "run.resume is auto: must be never without run.name, where SLURM gives the job no number"
    )


def test_a_job_of_slurm_finds_its_run_by_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "17")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    words = (*WORDS, "--backend=single", f"--run.dir={tmp_path}", "--run.name=null", "--budget.steps=8")
    assert launch(*words)[0] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["LGRAWA-17_2"]
    assert launch(*words)[1].endswith("LGRAWA-17_2 is finished\n")


def preempted(job: Any, folder: Path, cause: str) -> dict[str, Any]:
    """The summary of a job that was told to end, and says so."""
    output, errors = job.communicate(timeout=90)
    assert job.returncode == TRY_AGAIN, errors
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    assert (summary["state"], summary["cause"]) == ("preempted", cause)
    assert f"preempted  by {cause} (rank {summary['rank']}), saved at step {summary['steps']}" in output
    return summary


@launched
@pytest.mark.slow
@pytest.mark.parametrize("method", ["LGRAWA", "DataParallel"])
def test_a_signal_to_one_rank_has_all_save_at_one_step(method: str, tmp_path: Path) -> None:
    """Ahead of a limit, say; the next job goes on, and equals one that was never told."""
    period = [] if method == "DataParallel" else ["--method.period=4"]
    words = ["train", *LINE, "--model=own.Slow", f"--method={method}", *period, "--budget.steps=100", "--backend=mpi"]
    words += ["--log.every=2", "--run.control_every=4", "--run.name=a", "--run.resume=auto"]
    assert launch(*words, f"--run.dir={tmp_path}/whole", ranks=2)[0] == 0
    folder, again = tmp_path / "cut" / "a", (*words, f"--run.dir={tmp_path}/cut")
    for cause, rank in (("SIGUSR2", 1), ("STOP", 0)):
        job = start(*again, ranks=2)
        records, sizes, end = folder / "metrics.jsonl", [0], time.monotonic() + 60
        while len(sizes) < 6:  # it has been growing for a while
            size = records.stat().st_size if records.exists() else 0
            sizes = [*sizes, size] if size > sizes[-1] else sizes if size == sizes[-1] else [size]
            assert time.monotonic() < end
            time.sleep(0.02)
        if cause == "STOP":
            (folder / "STOP").touch()
        else:
            ranks = [p for p in running(f"--run.dir={tmp_path}/cut") if rank_of(p) == str(rank)]
            os.kill(ranks[0], signal.SIGUSR2)
        summary = preempted(job, folder, cause)
        assert summary["rank"] == rank and 0 < summary["steps"] < 100
        saved = {len(json.loads(m.read_text())["files"]) for m in folder.glob("checkpoints/0*/manifest.json")}
        assert saved == {2} and not (folder / "STOP").exists()
    status, output, errors = launch(*again, ranks=2)
    assert status == 0 and f"resumed    at step {summary['steps']}" in output, errors
    for cut, whole in zip(result(folder), result(tmp_path / "whole" / "a"), strict=True):
        assert cut == whole


def rank_of(process: int) -> str | None:
    variables = Path(f"/proc/{process}/environ").read_text().split("\0")
    return next((v.partition("=")[2] for v in variables if v.startswith("OMPI_COMM_WORLD_RANK=")), None)


@launched
def test_a_run_that_failed_says_where_and_why(tmp_path: Path) -> None:
    words = (*LINE, "--model=own.Failing", "--model.calls=20", f"--run.dir={tmp_path}", "--run.name=a", "--backend=mpi")
    assert launch("train", *words, "--budget.steps=100", ranks=2)[0] != 0
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert (summary["state"], summary["rank"]) == ("failed", 1)
    assert summary["cause"] == "ZeroDivisionError: this model has failed on purpose"
    output = launch("table", str(tmp_path / "a"))[1]
    assert "LGRAWA" in output and "(failed)" in output
