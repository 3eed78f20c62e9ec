"""Jobs that are cut ahead of their limit, and jobs that are to end."""

from __future__ import annotations

import re
import time

import pytest
from jobs import BUDGET, LAB, SMALL, Site, command, fact, on_slurm, on_the_lab, stand_in_for_ssh, until

pytestmark = on_slurm


LONG = ("slurm/cifar10.sh", *SMALL, *BUDGET, "--budget.steps=360", "--method.period=8")


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The center of a run of ``LONG``."""
    made = Site(tmp_path_factory.mktemp("whole") / "a site")
    job = made.completed(*LONG)
    return made.center(f"cifar10-{job}")


@pytest.mark.parametrize(
    "launcher",
    [
        "srun",
        "mpirun",
        "mpirun of MPICH",
        *(pytest.param(by, marks=on_the_lab) for by in ("horovodrun", "horovodrun --gloo")),
    ],
)
def test_a_job_cut_ahead_of_its_limit_is_requeued_and_ends_as_if_it_had_not_been(
    launcher: str, site: Site, uninterrupted: bytes
) -> None:
    settings, words = f"LAUNCHER={launcher.partition(' ')[0]}\n", LONG
    if launcher.startswith("horovodrun"):
        stand_in_for_ssh(site.folder / "bin")
        settings, words = f"{settings}PATH=$PWD/bin:$PATH\n", ("--nodes=2", "--ntasks-per-node=2", *LONG)
    if launcher.endswith("MPICH"):  # which would die of USR2: so its words are another's here
        settings += 'mpirun() { if [ "$1" = --version ]; then echo HYDRA; else command mpirun "$@"; fi; }\n'
    if launcher.endswith("--gloo"):  # as horovodrun does by itself where it finds no MPI
        settings += 'horovodrun() { command horovodrun --gloo "$@"; }\n'
        words = (*words, "--backend=horovod")
    (site.folder / "slurm/site.sh").write_text(settings)
    job = site.submit(*words)
    run = f"cifar10-{job}"
    site.cut(job, run)
    ends = fact(job, "EndTime").replace("T", " ")
    assert f"cifar10: the limit ends this job at {ends}\n" in site.logs()
    site.start_again(job)
    assert (site.summary(run)["state"], site.summary(run)["cause"]) == ("timed out", "SIGUSR2")
    site.wait(job, "COMPLETED")
    assert fact(job, "Restarts") == "1"
    assert site.logs().count(f"cifar10: requeued as {job}\n") == 1
    assert site.center(run) == uninterrupted or "--backend=horovod" in words


def test_of_an_array_only_the_task_that_was_cut_is_requeued(site: Site) -> None:
    compared = "--config=cifar10_resnet20", "--methods=EASGD", "--seeds=36,720", "--run.name=compared"
    words = (*compared, *SMALL, *BUDGET, "--budget.steps=300", f"--submit={' '.join(LAB)} slurm/compare.sh")
    submit = 'source slurm/site.sh.example; hpc-grawa compare "$@"'
    said = command("bash", "-euc", submit, "-", *words)
    array = re.match(r"Submitted batch job (\d+): 2 of 2 runs; hpc-grawa table runs/compared shows them\n", said)[1]  # type: ignore[index]
    site.cut(f"{array}_1", "compared/EASGD-720")
    site.start_again(f"{array}_1")
    for task, seed, restarts in ((0, 36, "0"), (1, 720, "1")):
        site.wait(f"{array}_{task}", "COMPLETED")
        assert fact(f"{array}_{task}", "Restarts") == restarts
        assert (site.folder / f"slurm/logs/compare-{array}_{task}.out").is_file()
        summary = site.summary(f"compared/EASGD-{seed}")
        assert (summary["state"], summary["method"], summary["seed"]) == ("finished", "EASGD", seed)
    assert command("bash", "-euc", submit, "-", *words) == "nothing to submit: all 2 runs are in runs/compared\n"
    more = command("bash", "-euc", submit, "-", *words, "--seeds=36,720,1042")
    left = re.match(r"Submitted batch job (\d+): 1 of 3 runs; ", more)
    command("scancel", left[1])  # type: ignore[index]


def test_what_is_to_end_is_not_requeued(site: Site) -> None:
    """By a file STOP, after which another job goes on with it; or cancelled by its user: saved all the same."""
    words = ("slurm/cifar10.sh", *SMALL, *BUDGET, "--budget.steps=100000")
    job = site.submit(*words)
    run = site.folder / "runs" / f"cifar10-{job}"
    until("it trains", lambda: (run / "metrics.jsonl").is_file())
    (run / "STOP").touch()
    site.wait(job, "FAILED")
    assert (fact(job, "ExitCode"), fact(job, "Restarts")) == ("75:0", "0")
    assert f"ended by runs/cifar10-{job}/STOP: not requeued" in site.logs()

    job = site.submit(*words, f"--run.name=cifar10-{job}")
    until("it goes on", lambda: "resumed    at step" in site.logs())
    command("scancel", job)
    site.wait(job, "CANCELLED")
    time.sleep(5)
    assert (fact(job, "JobState"), fact(job, "Restarts")) == ("CANCELLED", "0")
    summary = site.summary(run.name)
    assert (summary["state"], summary["cause"]) == ("preempted", "SIGTERM")
    assert summary["steps"] == site.saved(run.name) > 0


def test_a_chain_goes_on_with_one_run_and_its_last_link_has_nothing_to_do(site: Site, uninterrupted: bytes) -> None:
    said = command("bash", "slurm/chain.sh", "3", *LAB, *LONG, CHAIN="long")
    jobs = re.findall(r"job (\d+)", said)
    assert len(jobs) == 3 and said.endswith("run long\n")
    site.cut(jobs[0], "long")
    for job, state in zip(jobs, ("FAILED", "COMPLETED", "COMPLETED"), strict=True):
        site.wait(job, state)
    assert fact(jobs[0], "ExitCode") == "75:0"
    assert "hpc-grawa train: runs/long is finished" in site.logs()
    assert site.center("long") == uninterrupted


def test_a_run_that_is_stopped_ends_its_chain(site: Site) -> None:
    words = ("slurm/cifar10.sh", *SMALL, *BUDGET, "--budget.steps=100000")
    jobs = re.findall(r"job (\d+)", command("bash", "slurm/chain.sh", "3", *LAB, *words, CHAIN="stopped"))
    run = site.folder / "runs" / "stopped"
    until("it trains", lambda: (run / "metrics.jsonl").is_file())
    (run / "STOP").touch()
    for job, state in zip(jobs, ("FAILED", "CANCELLED", "CANCELLED"), strict=True):
        site.wait(job, state)
    assert fact(jobs[0], "ExitCode") == "75:0" and "ended by runs/stopped/STOP: not requeued" in site.logs()


def test_a_chain_ends_after_two_links_without_progress(site: Site) -> None:
    said = command("bash", "slurm/chain.sh", "5", *LAB, "slurm/cifar10.sh", *SMALL, "--optimizer.lr=-1")
    jobs = re.findall(r"job (\d+)", said)
    for job, state in zip(jobs, ["FAILED"] * 3 + ["CANCELLED"] * 2, strict=True):
        site.wait(job, state)
    assert fact(jobs[2], "ExitCode") == "1:0"
    assert "no progress in two links (at step none): the chain ends here" in site.logs()
