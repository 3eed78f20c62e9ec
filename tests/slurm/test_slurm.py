"""The templates of ``slurm/``, run by a SLURM controller; ``make test-slurm`` brings one up where it can.

All runs start from a folder whose path has a space, on digits in place of CIFAR and ImageNet, and send over MPI.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from hpc_grawa.parsing import recipes

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))
TEMPLATES = [path.name for path in SCRIPTS if path.name not in ("common.sh", "chain.sh", "site.sh")]
#: Other data and a small model; and ranks that share what cores there are.
DIGITS = [
    "--model=SmallCNN",
    "--data=Digits",
    "--data.batch_size=16",
    "--metric=Accuracy",
    "--precision=fp32",
    "--backend=mpi",
]
BUDGET = [
    "--budget.seconds=null",
    "--budget.epochs=null",
    "--eval.unit=epochs",
    "--eval.every=100",
    "--run.control_every=8",
]
LAB = ("--cpus-per-task=1", "--time=00:10:00")
LIMIT = 180.0


def answers() -> bool:
    """Whether there is a controller."""
    try:
        return subprocess.run(["sinfo", "-h"], capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not answers(), reason="no SLURM controller answers sinfo (see make test-slurm)"),
]


def command(*words: str, **variables: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_")) or k == "SLURM_CONF"}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def until(what: str, condition: Callable[[], object], limit: float = LIMIT) -> None:
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, f"after {limit} s not yet: {what}"
        time.sleep(0.5)


def fact(job: str, name: str) -> str:
    found = re.search(rf"(?:^| ){name}=(\S*)", command("scontrol", "show", "job", job, "-o"))
    assert found, name
    return found[1]


class Site:
    """A folder that holds ``slurm/`` and ``data_prep/``, as a user has it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(ROOT / "data_prep", folder / "data_prep")
        shutil.copytree(ROOT / "slurm", folder / "slurm", ignore=shutil.ignore_patterns("site.sh", "*.out", "*.chain"))

    def submit(self, *words: str) -> str:
        return command("sbatch", "--parsable", *LAB, *words).strip().partition(";")[0]

    def wait(self, job: str, *states: str, limit: float = LIMIT) -> None:
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        until(f"job {job} is {states}", lambda: fact(job, "JobState") in (*states, *ended), limit)
        assert fact(job, "JobState") in states, self.logs()

    def start_again(self, job: str) -> None:
        """SLURM waits two minutes before it starts a requeued job; only the end of its old step need be awaited."""
        self.wait(job, "PENDING")
        time.sleep(5)
        command("scontrol", "update", f"JobId={job}", "StartTime=now")

    def logs(self) -> str:
        return "\n".join(f"== {path.name}\n{path.read_text()}" for path in (self.folder / "slurm/logs").glob("*.out"))

    def cut(self, job: str, run: str) -> None:
        """Tell it to end, as SLURM does ahead of the time limit, once a round is behind it."""
        metrics = self.folder / "runs" / run / "metrics.jsonl"
        until(f"{run} trains", lambda: metrics.is_file() and '"round"' in metrics.read_text())
        command("scancel", "--signal=USR2", "--batch", job)

    def summary(self, run: str) -> dict[str, object]:
        found: dict[str, object] = json.loads((self.folder / "runs" / run / "summary.json").read_text())
        return found

    def center(self, run: str) -> bytes:
        return (self.folder / "runs" / run / "center.pt").read_bytes()

    def pictures(self, count: int) -> Path:
        """Random images in two class folders."""
        for name in ("n01440764", "n02979186"):
            (self.folder / "jpegs" / name).mkdir(parents=True)
            for number in range(count):
                image = Image.frombytes("RGB", (40, 30), os.urandom(3600))
                image.save(self.folder / "jpegs" / name / f"{name}_{number}.JPEG")
        return self.folder / "jpegs"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    made = Site(tmp_path / "a site")
    monkeypatch.chdir(made.folder)
    return made


def test_all_scripts_pass_shellcheck() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", *SCRIPTS, ROOT / "slurm" / "site.sh.example"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_scheduler_takes_every_template(template: str, site: Site) -> None:
    said = command("sbatch", "--test-only", f"slurm/{template}")
    nodes = {"cifar10.sh": 1, "cifar100.sh": 2, "scaling.sh": 3, "seeds.sh": 1}.get(template.rpartition("_")[2], 3)
    processors = int(re.search(r"using (\d+) processors", said)[1])  # type: ignore[index]
    header = (site.folder / "slurm" / template).read_text()
    each, cpus = (int(re.search(rf"--{key}=(\d+)", header)[1]) for key in ("ntasks-per-node", "cpus-per-task"))  # type: ignore[index]
    assert processors == (1 if template == "prepare_imagenet.sh" else nodes) * each * cpus


@pytest.mark.parametrize(
    ("launcher", "words", "template", "size"),
    [
        ("srun", [], "lgrawa_cifar10", 4),
        ("srun", ["--nodes=2"], "easgd_cifar10", 8),
        ("srun", [], "lsgd_cifar100", 8),
        ("srun", [], "mgrawa_imagenet", 12),
        ("mpirun", [], "lgrawa_cifar10", 4),
        ("mpirun", [], "lsgd_cifar100", 8),
        ("mpirun", [], "mgrawa_imagenet", 12),
    ],
)
def test_a_template_of_each_size_runs(launcher: str, words: list[str], template: str, size: int, site: Site) -> None:
    """Options behind the script win; every rank has the node's GPUs; the interface is the one of site.sh."""
    recipe = next(re.finditer(r"\w+_resnet\d+_\w+", (site.folder / f"slurm/{template}.sh").read_text()))[0]
    if recipe not in recipes():
        pytest.skip(f"there is no recipe {recipe}")
    (site.folder / "slurm/site.sh").write_text(f"LAUNCHER={launcher}\nNET_IF=eth0\nRUNS='my runs'\n$UNSET\n")
    job = site.submit(*words, f"slurm/{template}.sh", *DIGITS, *BUDGET, "--budget.steps=20")
    site.wait(job, "COMPLETED")
    summary = json.loads((site.folder / "my runs" / f"{template}-{job}" / "summary.json").read_text())
    assert (summary["state"], summary["world_size"], summary["steps"]) == ("finished", size, 20)
    assert (
        summary["method"]
        in {"lgrawa": "LGRAWA", "lsgd": "LSGD", "mgrawa": "MGRAWA", "easgd": "EASGD"}[template.partition("_")[0]]
    )
    assert f"(started by {launcher}, asked for), {size} ranks" in site.logs()


LONG = ("slurm/lgrawa_cifar10.sh", *DIGITS, *BUDGET, "--budget.steps=240", "--method.period=8")


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The center of a run of ``LONG``."""
    made, here = Site(tmp_path_factory.mktemp("whole") / "a site"), Path.cwd()
    os.chdir(made.folder)
    try:
        job = made.submit(*LONG)
    finally:
        os.chdir(here)
    made.wait(job, "COMPLETED")
    return made.center(f"lgrawa_cifar10-{job}")


def test_a_job_cut_ahead_of_its_limit_is_requeued_and_ends_as_if_it_had_not_been(
    site: Site, uninterrupted: bytes
) -> None:
    job = site.submit(*LONG)
    run = f"lgrawa_cifar10-{job}"
    site.cut(job, run)
    site.start_again(job)
    assert site.summary(run)["cause"] == "SIGUSR2"
    site.wait(job, "COMPLETED")
    assert fact(job, "Restarts") == "1"
    assert site.logs().count(f"lgrawa_cifar10: requeued as {job}\n") == 1
    assert site.center(run) == uninterrupted


def test_of_an_array_only_the_task_that_was_cut_is_requeued(site: Site) -> None:
    words = (*DIGITS, *BUDGET, "--budget.steps=300")
    array = site.submit("--array=2,8", "slurm/seeds.sh", *words)
    until("both train", lambda: len(list(site.folder.glob("runs/*/metrics.jsonl"))) == 2)
    site.cut(f"{array}_8", f"seeds-{array}_8")
    site.start_again(f"{array}_8")
    for task, seed, restarts in ((2, 36, "0"), (8, 720, "1")):
        site.wait(f"{array}_{task}", "COMPLETED")
        assert fact(f"{array}_{task}", "Restarts") == restarts
        summary = site.summary(f"seeds-{array}_{task}")
        assert (summary["state"], summary["method"], summary["seed"]) == ("finished", "EASGD", seed)


def test_what_is_to_end_is_not_requeued(site: Site) -> None:
    """By a file STOP, or cancelled by its user: saved all the same."""
    words = ("slurm/lgrawa_cifar10.sh", *DIGITS, *BUDGET, "--budget.steps=100000")
    job = site.submit(*words)
    run = site.folder / "runs" / f"lgrawa_cifar10-{job}"
    until("it trains", lambda: (run / "metrics.jsonl").is_file())
    (run / "STOP").touch()
    site.wait(job, "FAILED")
    assert (fact(job, "ExitCode"), fact(job, "Restarts")) == ("75:0", "0")
    assert f"ended by runs/lgrawa_cifar10-{job}/STOP: not requeued" in site.logs()

    job = site.submit(*words)
    run = site.folder / "runs" / f"lgrawa_cifar10-{job}"
    until("it trains", lambda: (run / "metrics.jsonl").is_file() and '"round"' in (run / "metrics.jsonl").read_text())
    command("scancel", job)
    site.wait(job, "CANCELLED")
    time.sleep(5)
    assert (fact(job, "JobState"), fact(job, "Restarts")) == ("CANCELLED", "0")


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


def test_a_chain_ends_after_two_links_without_progress(site: Site) -> None:
    said = command("bash", "slurm/chain.sh", "5", *LAB, "slurm/lgrawa_cifar10.sh", *DIGITS, "--optimizer.lr=-1")
    jobs = re.findall(r"job (\d+)", said)
    site.wait(jobs[-1], "CANCELLED")
    assert [fact(job, "JobState") for job in jobs] == ["FAILED"] * 3 + ["CANCELLED"] * 2
    assert fact(jobs[2], "ExitCode") == "1:0"
    assert "no progress in two links (at step none): the chain ends here" in site.logs()


def test_imagenet_is_prepared_by_a_job(site: Site) -> None:
    folder = site.pictures(3)
    job = site.submit(
        "slurm/prepare_imagenet.sh", "--train", str(folder), "--val", str(folder), "--out", "data/imagenet"
    )
    site.wait(job, "COMPLETED")
    assert (site.folder / "data/imagenet/meta.json").is_file()
    assert re.search(r"train +6 images", site.logs())


def test_scaling_trains_on_more_and_more_nodes(site: Site) -> None:
    job = site.submit("--nodes=2", "slurm/scaling.sh", *DIGITS, *BUDGET, "--budget.steps=20")
    site.wait(job, "COMPLETED")
    for nodes in (1, 2):
        assert site.summary(f"scaling-{job}-{nodes}nodes")["world_size"] == 4 * nodes


def test_submitted_from_elsewhere_it_says_so_in_one_line(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where SLURM can write a log: where it cannot, as without SBATCH_OUTPUT, it ends the job itself."""
    monkeypatch.chdir(tmp_path)
    for template in ("lgrawa_imagenet", "prepare_imagenet"):
        log = tmp_path / f"{template}.out"
        job = site.submit(f"--output={log}", str(site.folder / f"slurm/{template}.sh"))
        site.wait(job, "FAILED")
        assert fact(job, "ExitCode") == "2:0"
        assert log.read_text() == f"must be submitted by sbatch in the folder that holds slurm/, not in {tmp_path}\n"


def test_the_example_of_site_settings_puts_logs_where_they_belong(site: Site, tmp_path: Path) -> None:
    shutil.copy("slurm/site.sh.example", "slurm/site.sh")
    said = command(
        "bash",
        "-euc",
        'source slurm/site.sh; cd ..; sbatch --parsable --cpus-per-task=1 "a site/slurm/easgd_cifar10.sh"',
    )
    job = said.strip()
    site.wait(job, "FAILED")
    assert f"must be submitted by sbatch in the folder that holds slurm/, not in {tmp_path}\n" in site.logs()
