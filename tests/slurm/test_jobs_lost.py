"""Jobs whose ranks fail, hang or are killed, or whose nodes are lost: theirs alone, as --exclusive says."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from jobs import (
    BUDGET,
    LAB,
    LAB_SCRIPT,
    LIMIT,
    PYTHONPATH,
    ROOT,
    SMALL,
    Site,
    command,
    fact,
    on_slurm,
    on_the_lab,
    stand_in_for_ssh,
    until,
)

pytestmark = on_slurm


LASTING = (
    *("--nodes=2", "--ntasks-per-node=2", "slurm/cifar10.sh", *SMALL, *BUDGET, "--budget.steps=1200"),
    *("--method.period=8", "--save.unit=steps", "--save.every=100", "--log.tensorboard=false"),
)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The center of a run of ``LASTING``."""
    made = Site(tmp_path_factory.mktemp("undisturbed") / "a site")
    job = made.completed(*LASTING)
    return made.center(f"cifar10-{job}")


def join(number: int) -> None:
    """Let a node be part of the lab again."""
    command("ip", "link", "set", f"slabv{number}", "up")
    words = ["scontrol", "update", f"NodeName=node{number}", "State=RESUME"]
    subprocess.run(words, capture_output=True, timeout=60, check=False)  # refused where it has come back by itself


@pytest.fixture
def whole_lab() -> Iterator[None]:
    """The lab's nodes and links are there again afterwards."""
    yield
    for number in (1, 2, 3):
        join(number)
    words = ("sinfo", "-h", "-N", "-p", "main", "-t", "idle,mix,alloc", "-o", "%N %t")
    until("all nodes answer", lambda: len(re.findall(r"^node[123] \w+$", command(*words), re.M)) == 3)


def goes_on(site: Site, job: str, undisturbed: bytes) -> None:
    """It was requeued once, and ends as if nothing had happened."""
    site.wait(job, "COMPLETED")
    assert fact(job, "Restarts") == "1"
    assert re.search(r"resumed    at step \d{3,}, after", site.logs())
    assert site.center(f"cifar10-{job}") == undisturbed


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@on_the_lab
def test_a_job_whose_rank_is_killed_is_requeued_and_the_rank_is_named(site: Site, undisturbed: bytes) -> None:
    job = site.submit(*LASTING)
    run = f"cifar10-{job}"
    until("a checkpoint", lambda: site.saved(run) and len(site.beats(run)) == 4)
    victim, others = site.beats(run)[3], site.beats(run)[:3]
    told = command("hpc-grawa", "status", f"runs/{run}")
    assert (
        re.match(rf"runs/{run}: running\n", told)
        and "ETA" in told
        and re.search(rf"^\| 3 +\| +{victim['host']} \|", told, re.M)
    ), told
    os.kill(int(victim["pid"]), signal.SIGKILL)
    until("all ranks are gone", lambda: not any(alive(int(beat["pid"])) for beat in others), 120)
    for file in (site.folder / "runs" / run / "ranks").iterdir():  # as a minute later
        os.utime(file, (time.time() - 60,) * 2)
    died = rf"died without a word, killed or lost with its host: first rank 3 on {victim['host']} at step \d+\n"
    assert re.match(rf"runs/{run}: {died}", command("hpc-grawa", "status", f"runs/{run}"))
    site.start_again(job)
    said = (
        rf"the ranks died \(status 137\), last checkpoint: 0+{site.saved(run)}; hpc-grawa status runs/{run} says more"
    )
    assert re.search(said, site.logs()) and f"requeued as {job}\n" in site.logs()
    goes_on(site, job, undisturbed)
    assert re.search(rf"^before     {died}", site.logs(), re.M)


def test_a_job_whose_program_fails_is_not_requeued(site: Site) -> None:
    """On one rank, here: all others are gone within half a minute, and who it was is known."""
    shutil.copy(ROOT / "tests/own.py", site.folder)
    own = ("--config=digits", "--model=own.Failing", "--model.calls=300", "--data=own.Numbers", "--loss=MSELoss")
    words = (*own, "--metric=own.R2", "--method=LGRAWA", "--method.period=8", "--budget.seconds=null")
    limits = ("--budget.steps=100000", "--backend=mpi", "--run.control_every=8", "--eval.bn_batches=1")
    job = site.submit("slurm/cifar10.sh", *words, *limits)
    site.wait(job, "FAILED")
    run, restarts = f"cifar10-{job}", fact(job, "Restarts")
    assert restarts == "0" and "requeued" not in site.logs()
    cause = r"failed by ZeroDivisionError: this model has failed on purpose \(rank 1 on \S+\)\n"
    assert re.match(rf"runs/{run}: {cause}", command("hpc-grawa", "status", f"runs/{run}"))
    ended = time.mktime(time.strptime(fact(job, "EndTime"), "%Y-%m-%dT%H:%M:%S"))
    assert ended - (site.folder / "runs" / run / "summary.json").stat().st_mtime < 30


@pytest.mark.parametrize("works_again", [True, False])
def test_a_start_that_fails_before_any_rank_trains_is_made_once_more(works_again: bool, site: Site) -> None:
    """Here a rank is killed before Python starts."""
    program = site.folder / "bin/hpc-grawa"
    program.parent.mkdir()
    first = "mkdir first 2>/dev/null" if works_again else '[ "$SLURM_PROCID" = 1 ]'
    program.write_text(
        f'#!/bin/bash\nif {first}; then kill -KILL $$; fi\nexec {shlex.quote(sys.executable)} -m hpc_grawa "$@"\n'
    )
    program.chmod(0o755)
    (site.folder / "slurm/site.sh").write_text("PATH=$PWD/bin:$PATH\n")
    job = site.submit("slurm/cifar10.sh", *SMALL, *BUDGET, "--budget.steps=3")
    site.wait(job, "COMPLETED" if works_again else "FAILED")
    # Of the first that was killed, or of those that srun ends then.
    assert (
        len(re.findall(r"no rank came as far as training \(status 1(?:37|43)\): started once more", site.logs())) == 1
    )
    assert fact(job, "Restarts") == "0"
    assert site.logs().count("finished ") == works_again


def test_a_job_whose_rank_hangs_is_requeued(site: Site) -> None:
    shutil.copy(ROOT / "tests/own.py", site.folder)
    own = ("--config=digits", "--model=own.Hanging", "--model.calls=300", "--data=own.Numbers", "--loss=MSELoss")
    words = (*own, "--metric=own.R2", "--method=LGRAWA", "--method.period=8", "--budget.seconds=null")
    limits = ("--budget.steps=100000", "--backend=mpi", "--run.control_every=8", "--eval.bn_batches=1")
    job = site.submit("slurm/cifar10.sh", *words, *limits, "--comm-timeout=5")
    until("it is requeued", lambda: f"requeued as {job}\n" in site.logs())
    assert re.search(r"has waited \d+ s for .* \(comm_timeout is 5\): ending the job on all ranks; ", site.logs())
    command("scancel", job)


@on_the_lab
def test_a_job_whose_ranks_are_killed_again_and_again_is_not_requeued_without_end(site: Site) -> None:
    words = [word for word in LASTING if not word.startswith("--save")]
    job = site.submit(*words, "--budget.steps=100000")
    run = f"cifar10-{job}"
    for attempt in range(2):
        until(f"it trains, attempt {attempt}", lambda: len(site.beats(run)) == 4)
        os.kill(int(site.beats(run)[3]["pid"]), signal.SIGKILL)
        if not attempt:
            site.wait(job, "PENDING")
            (site.folder / "runs" / run / "ranks/0003.json").unlink()
            site.start_again(job)
    site.wait(job, "FAILED")
    assert (fact(job, "ExitCode"), fact(job, "Restarts")) == ("137:0", "1")
    assert "no progress since the last requeue: not requeued again" in site.logs()


@on_the_lab
def test_a_chain_goes_on_after_a_rank_was_killed(site: Site, undisturbed: bytes) -> None:
    (site.folder / "slurm/site.sh").write_text("LAUNCHER=mpirun\n")
    jobs = re.findall(r"job (\d+)", command("bash", "slurm/chain.sh", "2", *LAB, *LASTING, CHAIN="lasting"))
    until("a checkpoint", lambda: site.saved("lasting") and len(site.beats("lasting")) == 4)
    os.kill(int(site.beats("lasting")[1]["pid"]), signal.SIGKILL)
    for job, state in zip(jobs, ("FAILED", "COMPLETED"), strict=True):
        site.wait(job, state)
    assert "not requeued, as CHAIN or REQUEUE=no want it" in site.logs() and "waiting    up to" not in site.logs()
    assert site.center("lasting") == undisturbed


@on_the_lab
def test_a_job_whose_node_goes_down_is_requeued(site: Site, undisturbed: bytes, whole_lab: None) -> None:
    job = site.submit("--exclusive", "--nodelist=node1,node2", *LASTING)
    run = f"cifar10-{job}"
    until("a checkpoint", lambda: site.saved(run))
    command("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=test")
    site.wait(job, "PENDING")
    site.start_again(job)  # the lab's nodes return by themselves
    goes_on(site, job, undisturbed)


@on_the_lab
def test_a_job_whose_first_node_is_cut_off_goes_on_elsewhere_whatever_its_orphans_do(
    site: Site, undisturbed: bytes, whole_lab: None
) -> None:
    """What runs on the lost node, script and rank 0 with the lock among it, lives on until its link is back."""
    job = site.submit("--exclusive", "--nodelist=node1,node2", *LASTING)
    run = f"cifar10-{job}"
    until("a checkpoint", lambda: site.saved(run) and len(site.beats(run)) == 4)
    orphans = [int(beat["pid"]) for beat in site.beats(run)[:2]]
    command("ip", "link", "set", "slabv1", "down")
    site.wait(job, "PENDING")
    assert all(map(alive, orphans))
    command("scontrol", "update", f"JobId={job}", "ReqNodeList=node2,node3")
    before = site.saved(run)
    site.start_again(job)
    until("it goes on", lambda: site.saved(run) > before)
    elsewhere = ["node2"] * 2 + ["node3"] * 2
    until("its ranks say so", lambda: [beat["host"] for beat in site.beats(run)] == elsewhere)
    stopped = f"runs/{run}/lock.json is job {job}'s now: stopped\n"
    until("the orphan that had the lock sees it", lambda: stopped in site.logs())
    join(1)
    # SLURM may take the end of the orphans' step for that of the new one, which has its number: requeued once more.
    site.wait(job, "COMPLETED", "PENDING")
    if fact(job, "JobState") == "PENDING":
        site.start_again(job)
    site.wait(job, "COMPLETED")
    assert site.center(run) == undisturbed
    assert [beat["host"] for beat in site.beats(run)] == elsewhere
    until("the orphans are gone", lambda: not any(map(alive, orphans)))


@on_the_lab
@pytest.mark.parametrize(
    "launcher",
    [
        "$(which mpirun) --hostfile HOSTS -np 12 --map-by ppr:4:node --bind-to none -x PATH",
        'horovodrun -np 12 -H node1:4,node2:4,node3:4 --mpi-args="--prefix $(dirname $(dirname $(which mpirun)))"',
        "horovodrun --gloo -np 12 -H node1:4,node2:4,node3:4",
    ],
    ids=["mpirun", "horovodrun", "horovodrun --gloo"],
)
def test_hosts_without_slurm(launcher: str, tmp_path: Path) -> None:
    """The commands of slurm/README.md, on one host of three that reach each other by what is called ssh on PATH.

    It hands on no variables; the tree under test, which is not installed, needs one. Six ranks, not 12: beside those of
    ResNet-50 in another test, memory is short.
    """
    readme = (ROOT / "slurm/README.md").read_text()
    for node, host in (("node1", "a"), ("node2", "b"), ("node3", "c")):
        readme = readme.replace(f"{host}:4", f"{node}:4")
    assert f"{launcher} hpc-grawa train" in readme
    launcher = launcher.replace("-np 12", "-np 6").replace(":4", ":2")
    stand_in_for_ssh(tmp_path / "bin")
    (tmp_path / "HOSTS").write_text("".join(f"node{number} slots=2\n" for number in (1, 2, 3)))
    path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
    environment |= {"PATH": path, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    own = "" if launcher.startswith("horovodrun") else "-x PYTHONPATH -x OMP_NUM_THREADS"
    words = ["--config", "digits", *SMALL[:-1], *BUDGET, "--budget.steps=20", "--run.name=adhoc"]
    done = subprocess.run(
        ["bash", str(LAB_SCRIPT), "node", "1", "bash", "-c", f'{launcher} {own} hpc-grawa train "$@"', "-", *words],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads((tmp_path / "runs/adhoc/summary.json").read_text())
    assert (summary["state"], summary["world_size"]) == ("finished", 6)
    hosts = [json.loads(beat.read_text())["host"] for beat in sorted((tmp_path / "runs/adhoc/ranks").iterdir())]
    assert hosts == ["node1"] * 2 + ["node2"] * 2 + ["node3"] * 2
