"""The templates of ``slurm/``, run by a SLURM controller; ``make test-slurm`` brings one up where it can.

All runs start from a folder whose path has a space, on digits in place of CIFAR and ImageNet, and send over MPI.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from ilsvrc import real_archive
from PIL import Image
from torchvision.models import resnet50

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


#: The script that brought the controller up: nodes that may be taken down, and whose processes are seen here.
LAB_SCRIPT = Path(os.environ.get("LAB", ""))
on_the_lab = pytest.mark.skipif(
    not (LAB_SCRIPT.is_file() and Path("/sys/class/net/slabv1").exists()),
    reason="needs LAB, the script of a lab whose nodes have networks of their own: other nodes are not to be broken",
)


def command(*words: str, **variables: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_")) or k == "SLURM_CONF"}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def until(what: str, condition: Callable[[], object], limit: float = LIMIT, every: float = 0.5) -> None:
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, f"after {limit} s not yet: {what}"
        time.sleep(every)


def fact(job: str, name: str) -> str:
    found = re.search(rf"(?:^| ){name}=(\S*)", command("scontrol", "show", "job", job, "-o"))
    assert found, name
    return found[1]


def stand_in_for_ssh(folder: Path) -> None:
    """Hands on no variables, as ssh does."""
    folder.mkdir()
    labrsh = shlex.quote(str(LAB_SCRIPT.parent / "labrsh"))
    (folder / "ssh").write_text(f'#!/bin/sh\nexec env -i PATH=/usr/bin:/bin HOME="$HOME" {labrsh} "$@"\n')
    (folder / "ssh").chmod(0o755)


class Site:
    """A folder that holds ``slurm/`` and ``data_prep/``, as a user has it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(ROOT / "data_prep", folder / "data_prep")
        shutil.copytree(ROOT / "slurm", folder / "slurm", ignore=shutil.ignore_patterns("site.sh", "*.out", "*.chain"))

    def submit(self, *words: str) -> str:
        return command("sbatch", "--parsable", *LAB, *words).strip().partition(";")[0]

    def completed(self, *words: str, limit: float = LIMIT) -> str:
        """Submit from its folder, wherever the tests are, and wait for the end."""
        here = Path.cwd()
        os.chdir(self.folder)
        try:
            job = self.submit(*words)
        finally:
            os.chdir(here)
        self.wait(job, "COMPLETED", limit=limit)
        return job

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

    def trains(self, run: str) -> None:
        metrics = self.folder / "runs" / run / "metrics.jsonl"
        # At once: on many cores the whole run takes no longer than a second or two.
        until(f"{run} trains", lambda: metrics.is_file() and '"round"' in metrics.read_text(), every=0.05)

    def cut_by_limit(self, job: str, run: str) -> None:
        """Bring its time limit so near, once a round is behind it, that SLURM tells it to end within half a minute."""
        self.trains(run)
        hours, minutes, seconds = map(int, fact(job, "RunTime").split(":"))
        minutes = math.ceil((3600 * hours + 60 * minutes + seconds + 90) / 60)
        command("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")
        until("SLURM tells it", lambda: "told to end: passed on to the ranks" in self.logs(), 60)

    def cut(self, job: str, run: str) -> None:
        """Tell it to end, as SLURM does ahead of the time limit, once a round is behind it."""
        self.trains(run)
        command("scancel", "--signal=USR2", "--batch", job)

    def signs(self, run: str) -> list[dict[str, object]]:
        """The last sign of life of each rank."""
        return [json.loads(f.read_text()) for f in sorted((self.folder / "runs" / run / "ranks").glob("[0-9]*.json"))]

    def saved(self, run: str) -> int:
        """The step of the last checkpoint, 0 without one."""
        latest = self.folder / "runs" / run / "checkpoints/latest"
        return int(latest.read_text()) if latest.is_file() else 0

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
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    made = Site(tmp_path / "a site")
    monkeypatch.chdir(made.folder)
    yield made
    print(made.logs())  # shown where the test failed


def test_all_scripts_pass_shellcheck() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    others = [ROOT / "slurm/site.sh.example", ROOT / ".ci/run", *sorted((ROOT / "tests").rglob("*.sh"))]
    done = subprocess.run(["shellcheck", *SCRIPTS, *others], capture_output=True, text=True)
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
    ("launcher", "words", "template", "method", "size"),
    [
        ("srun", [], "cifar10", "LGRAWA", 4),
        ("srun", ["--nodes=2"], "cifar10", "EASGD", 8),
        ("srun", [], "cifar100", "LSGD", 8),
        ("srun", [], "imagenet", "MGRAWA", 12),
        ("mpirun", [], "cifar10", "LGRAWA", 4),
        ("mpirun", [], "imagenet", "MGRAWA", 12),
    ],
)
def test_a_template_of_each_size_runs(
    launcher: str, words: list[str], template: str, method: str, size: int, site: Site
) -> None:
    """Options behind the script win; every rank has the node's GPUs; the interface is the one of site.sh."""
    (site.folder / "slurm/site.sh").write_text(f"LAUNCHER={launcher}\nNET_IF=eth0\nRUNS='my runs'\n$UNSET\n")
    named = [] if method == "LGRAWA" else [f"--method={method}"]
    job = site.submit(*words, f"slurm/{template}.sh", *named, *DIGITS, *BUDGET, "--budget.steps=20")
    site.wait(job, "COMPLETED")
    summary = json.loads((site.folder / "my runs" / f"{template}-{job}" / "summary.json").read_text())
    assert (summary["state"], summary["world_size"], summary["steps"]) == ("finished", size, 20)
    assert summary["method"] == method
    assert f"(started by {launcher}, asked for), {size} ranks" in site.logs()


def test_doctor_on_two_nodes(site: Site) -> None:
    srun = ("srun", *LAB, "--nodes=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1")
    said = command(*srun, "--mpi=pmix", "hpc-grawa", "doctor", "--backend=mpi")
    assert re.search(r"^ +PMI +PMIx$", said, re.M) and re.search(r"^ +SLURM .*pmix.* nodes 2, tasks 2", said, re.M)
    assert re.search(r"^ +ranks +1 on \S+, 1 on \S+$", said, re.M) and "seen on 2 hosts" in said
    assert "backend mpi works here, on 2 ranks\n" in said
    lacks = subprocess.run(
        [*srun, "--mpi=none", sys.executable, "-m", "hpc_grawa", "doctor", "--backend=mpi"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert lacks.returncode == 1, lacks.stdout + lacks.stderr
    assert re.search(r"^  fails  PMI .*\n +fix: srun --mpi=pmix", lacks.stdout, re.M)
    assert "\nbackend mpi would fail: none: srun started 2 tasks" in lacks.stdout


@pytest.mark.parametrize("backend", ["gloo", "horovod"])
def test_doctor_on_two_nodes_with_other_backends(backend: str, site: Site) -> None:
    words = (*LAB, "--nodes=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1", "--mpi=pmix")
    said = command("srun", *words, "hpc-grawa", "doctor", f"--backend={backend}")
    assert f"backend {backend} works here, on 2 ranks\n" in said and "seen on 2 hosts" in said


def test_what_the_templates_set_reaches_every_rank(site: Site) -> None:
    """Where sbatch hands on nothing, too."""
    shutil.copy(ROOT / "tests/own.py", site.folder)
    (site.folder / "env/bin").mkdir(parents=True)
    activate = f"export PATH={Path(sys.executable).parent}:$PATH PYTHONPATH={ROOT}\n"
    (site.folder / "env/bin/activate").write_text(activate)
    (site.folder / "slurm/site.sh").write_text("VENV=$PWD/env NET_IF=eth0\n")
    own = ("--config=digits", "--model=own.Telling", "--data=own.Numbers", "--loss=MSELoss", "--metric=own.R2")
    words = ("--method=LGRAWA", "--method.period=2", *BUDGET, "--budget.steps=4", "--backend=mpi")
    limits = ("--export=NONE", "--nodes=2", "--cpus-per-task=3")
    job = site.submit(*limits, "slurm/cifar10.sh", *own, *words, "--eval.bn_batches=1")
    site.wait(job, "COMPLETED")
    found = [json.loads(file.read_text()) for file in sorted(site.folder.glob("environment.*"))]
    assert len(found) == 8
    wanted = {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "OMP_NUM_THREADS": "3", "PYTHONNOUSERSITE": "1"}
    names = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "HOROVOD_GLOO_IFACE", "OMPI_MCA_btl_tcp_if_include")
    wanted |= dict.fromkeys(names, "eth0")
    for environment in found:
        assert {name: environment.get(name) for name in wanted} == wanted
        assert int(environment["HPC_GRAWA_ENDS"]) > time.time()


def test_a_script_that_forgets_the_launcher_does_not_train(site: Site) -> None:
    words = shlex.join([sys.executable, "-m", "hpc_grawa", "train", *DIGITS[:-1], *BUDGET, "--budget.steps=3"])
    job = site.submit("--nodes=2", "--ntasks-per-node=2", "--output=slurm/logs/%j.out", f"--wrap={words}")
    site.wait(job, "FAILED")
    assert fact(job, "ExitCode") == "2:0"
    assert "backend is auto in a SLURM job of 4 tasks, but no launcher started this process" in site.logs()


LONG = ("slurm/cifar10.sh", *DIGITS, *BUDGET, "--budget.steps=360", "--method.period=8")


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The center of a run of ``LONG``."""
    made = Site(tmp_path_factory.mktemp("whole") / "a site")
    job = made.completed(*LONG)
    return made.center(f"cifar10-{job}")


@pytest.mark.parametrize(
    "launcher",
    ["srun", "mpirun", *(pytest.param(by, marks=on_the_lab) for by in ("horovodrun", "horovodrun --gloo"))],
)
def test_a_job_cut_ahead_of_its_limit_is_requeued_and_ends_as_if_it_had_not_been(
    launcher: str, site: Site, uninterrupted: bytes
) -> None:
    settings, words = f"LAUNCHER={launcher.partition(' ')[0]}\n", LONG
    if launcher.startswith("horovodrun"):
        stand_in_for_ssh(site.folder / "bin")
        settings, words = f"{settings}PATH=$PWD/bin:$PATH\n", ("--nodes=2", "--ntasks-per-node=2", *LONG)
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
    words = (*DIGITS, *BUDGET, "--budget.steps=300")
    submit = 'source slurm/site.sh.example; sbatch --parsable "$@"'
    array = command("bash", "-euc", submit, "-", *LAB, "--array=2,8", "slurm/seeds.sh", *words).strip()
    until("both train", lambda: len(list(site.folder.glob("runs/*/metrics.jsonl"))) == 2)
    site.cut(f"{array}_8", f"seeds-{array}_8")
    site.start_again(f"{array}_8")
    for task, seed, restarts in ((2, 36, "0"), (8, 720, "1")):
        site.wait(f"{array}_{task}", "COMPLETED")
        assert fact(f"{array}_{task}", "Restarts") == restarts
        assert (site.folder / f"slurm/logs/seeds-{array}_{task}.out").is_file()
        summary = site.summary(f"seeds-{array}_{task}")
        assert (summary["state"], summary["method"], summary["seed"]) == ("finished", "EASGD", seed)


def test_what_is_to_end_is_not_requeued(site: Site) -> None:
    """By a file STOP, or cancelled by its user: saved all the same."""
    words = ("slurm/cifar10.sh", *DIGITS, *BUDGET, "--budget.steps=100000")
    job = site.submit(*words)
    run = site.folder / "runs" / f"cifar10-{job}"
    until("it trains", lambda: (run / "metrics.jsonl").is_file())
    (run / "STOP").touch()
    site.wait(job, "FAILED")
    assert (fact(job, "ExitCode"), fact(job, "Restarts")) == ("75:0", "0")
    assert f"ended by runs/cifar10-{job}/STOP: not requeued" in site.logs()

    job = site.submit(*words)
    run = site.folder / "runs" / f"cifar10-{job}"
    until("it trains", lambda: (run / "metrics.jsonl").is_file() and '"round"' in (run / "metrics.jsonl").read_text())
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


def test_a_chain_ends_after_two_links_without_progress(site: Site) -> None:
    said = command("bash", "slurm/chain.sh", "5", *LAB, "slurm/cifar10.sh", *DIGITS, "--optimizer.lr=-1")
    jobs = re.findall(r"job (\d+)", said)
    for job, state in zip(jobs, ["FAILED"] * 3 + ["CANCELLED"] * 2, strict=True):
        site.wait(job, state)
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


#: ResNet-50 on images of 32 pixels: 12 ranks share what cores there are.
IMAGENET = (
    *("slurm/lgrawa_imagenet.sh", "--precision=fp32", "--backend=mpi", "--data.batch_size=4", "--data.crop=32"),
    *("--data.resize=36", "--optimizer.lr=0.001", "--method.period=2", "--budget.epochs=null", "--budget.steps=20"),
    *("--eval.bn_batches=1", "--eval.train_examples=100", "--run.control_every=2", "--log.tensorboard=false"),
)


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds ``imagenet``, 1,500 JPEGs packed by a job."""
    made = Site(tmp_path_factory.mktemp("packed") / "a site")
    with tarfile.open(real_archive()) as archive:
        archive.extractall(made.folder, filter="data")
    images = made.folder / "imagenette2-224"
    parts = ("--train", str(images / "train"), "--val", str(images / "val"))
    made.completed("slurm/prepare_imagenet.sh", *parts, "--out", "data/imagenet")
    return made.folder / "data"


@pytest.fixture
def imagenet(site: Site, packed: Path) -> Site:
    """A site with these data."""
    (site.folder / "slurm/site.sh").write_text(f"DATA={shlex.quote(str(packed))}\n")
    return site


@pytest.fixture(scope="session")
def whole_imagenet(tmp_path_factory: pytest.TempPathFactory, packed: Path) -> Path:
    """The run folder of an uninterrupted run of ``IMAGENET``."""
    made = Site(tmp_path_factory.mktemp("imagenet") / "a site")
    (made.folder / "slurm/site.sh").write_text(f"DATA={shlex.quote(str(packed))}\n")
    job = made.completed(*IMAGENET, limit=400)
    return made.folder / "runs" / f"lgrawa_imagenet-{job}"


def test_imagenet_trains_on_three_nodes(whole_imagenet: Path) -> None:
    summary = json.loads((whole_imagenet / "summary.json").read_text())
    assert (summary["state"], summary["world_size"], summary["steps"]) == ("finished", 12, 20)
    assert 0 <= summary["center_test_accuracy"] <= summary["center_test_top5_accuracy"] <= 1
    assert len(summary["local_test_top5_accuracy"]) == 12
    model = resnet50(num_classes=10)
    model.load_state_dict(torch.load(whole_imagenet / "center.pt", weights_only=True))
    assert torch.isfinite(model(torch.zeros(2, 3, 32, 32))).all()


@pytest.mark.parametrize("way", ["requeue", "chain"])
def test_imagenet_cut_by_its_time_limit_goes_on(way: str, imagenet: Site, whole_imagenet: Path) -> None:
    """The chain reads copies of its images on each node, which changes nothing."""
    if way == "chain":
        with (imagenet.folder / "slurm/site.sh").open("a") as settings:
            settings.write('STAGE="/dev/shm/$SLURM_JOB_ID"\n')
        said = command("bash", "slurm/chain.sh", "2", *LAB, *IMAGENET, CHAIN="long")
        jobs, run = re.findall(r"job (\d+)", said), "long"
    else:
        jobs = [imagenet.submit(*IMAGENET)]
        run = f"lgrawa_imagenet-{jobs[0]}"
    imagenet.cut_by_limit(jobs[0], run)
    if way == "chain":
        imagenet.wait(jobs[0], "FAILED")
        assert fact(jobs[0], "ExitCode") == "75:0"
    else:
        imagenet.wait(jobs[0], "PENDING")
        command("scontrol", "update", f"JobId={jobs[0]}", "TimeLimit=10")
        imagenet.start_again(jobs[0])
    imagenet.wait(jobs[-1], "COMPLETED", limit=400)
    assert (f"images of this node's ranks to /dev/shm/{jobs[-1]}/" in imagenet.logs()) == (way == "chain")
    assert re.search(r"^before     timed out by SIGUSR2 \(rank \d+\)$", imagenet.logs(), re.M)
    assert imagenet.center(run) == (whole_imagenet / "center.pt").read_bytes()


def test_in_a_container_templates_see_all_folders_and_no_environment_is_activated(site: Site) -> None:
    """In what stands in for Apptainer: notes its arguments and runs the command."""
    other, stand_in = site.folder.parent / "other disk", site.folder / "bin/apptainer"
    (other / "cifar").mkdir(parents=True)
    (site.folder / "data").symlink_to(other / "cifar")
    stand_in.parent.mkdir()
    stand_in.write_text(
        '#!/bin/bash\n(IFS="|"; echo "$*" >>"$0.said")\nwhile [ "$1" != image.sif ]; do shift; done\nshift\nexec "$@"\n'
    )
    stand_in.chmod(0o755)
    (site.folder / "slurm/site.sh").write_text(
        f"PATH=$PWD/bin:$PATH CONTAINER=image.sif VENV=/none RUNS='{other}/runs' STAGE=/dev/shm/$SLURM_JOB_ID\n"
    )
    job = site.submit("slurm/cifar10.sh", *DIGITS, *BUDGET, "--budget.steps=3")
    site.wait(job, "COMPLETED")
    assert json.loads((other / f"runs/cifar10-{job}/summary.json").read_text())["state"] == "finished"
    said = stand_in.with_name("apptainer.said").read_text().splitlines()
    common = f"exec|--nv|--bind|{site.folder}|--bind|{other}/cifar|--bind|{other}|--bind|/dev/shm"
    assert [line.partition("|train|")[0] for line in said] == [f"{common}|image.sif|hpc-grawa"] * 4

    pictures = site.pictures(3).rename(other / "pictures")
    job = site.submit("slurm/prepare_imagenet.sh", f"--train={pictures}", "--val", str(pictures), "--out=data/packed")
    site.wait(job, "COMPLETED")
    line = stand_in.with_name("apptainer.said").read_text().splitlines()[-1]
    assert f"|--bind|{pictures}|image.sif|python|data_prep/imagenet.py|" in line


def test_scaling_trains_on_more_and_more_nodes(site: Site) -> None:
    job = site.submit("--nodes=2", "slurm/scaling.sh", *DIGITS, *BUDGET, "--budget.steps=20")
    site.wait(job, "COMPLETED")
    for nodes in (1, 2):
        assert site.summary(f"scaling-{job}-{nodes}nodes")["world_size"] == 4 * nodes


def test_a_dry_run_ends_without_a_run(site: Site) -> None:
    job = site.submit("slurm/lgrawa_imagenet.sh", *DIGITS, "--dry-run")
    site.wait(job, "COMPLETED")
    assert "12 ranks" in site.logs() and not (site.folder / "runs").exists()


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
    """With the line for it, jobs that are submitted elsewhere too have one."""
    example = Path("slurm/site.sh.example").read_text()
    Path("slurm/site.sh").write_text(example.replace("#export SBATCH_OUTPUT=", "export SBATCH_OUTPUT="))
    said = command(
        "bash",
        "-euc",
        'source slurm/site.sh; cd ..; sbatch --parsable --cpus-per-task=1 "a site/slurm/cifar10.sh"',
    )
    job = said.strip()
    site.wait(job, "FAILED")
    assert f"must be submitted by sbatch in the folder that holds slurm/, not in {tmp_path}\n" in site.logs()


LASTING = (
    *("--nodes=2", "--ntasks-per-node=2", "slurm/cifar10.sh", *DIGITS, *BUDGET, "--budget.steps=1200"),
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
    until("all nodes answer", lambda: len(re.findall(r"^node\d \w+$", command(*words), re.M)) == 3)


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
    until("a checkpoint", lambda: site.saved(run) and len(site.signs(run)) == 4)
    victim, others = site.signs(run)[3], site.signs(run)[:3]
    told = command("hpc-grawa", "status", f"runs/{run}")
    assert (
        re.match(rf"runs/{run}: running\n", told) and "ETA" in told and re.search(r"^\| 3 +\| +node2 \|", told, re.M)
    ), told
    os.kill(int(victim["pid"]), signal.SIGKILL)
    until("all ranks are gone", lambda: not any(alive(int(sign["pid"])) for sign in others), 30)
    for file in (site.folder / "runs" / run / "ranks").iterdir():  # as a minute later
        os.utime(file, (time.time() - 60,) * 2)
    died = r"died without a word, killed or lost with its host: first rank 3 on node2 at step \d+\n"
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
    job = site.submit("slurm/cifar10.sh", *DIGITS, *BUDGET, "--budget.steps=3")
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
        until(f"it trains, attempt {attempt}", lambda: (site.folder / "runs" / run / "ranks/0003.json").is_file())
        os.kill(int(site.signs(run)[3]["pid"]), signal.SIGKILL)
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
    until("a checkpoint", lambda: site.saved("lasting") and len(site.signs("lasting")) == 4)
    os.kill(int(site.signs("lasting")[1]["pid"]), signal.SIGKILL)
    for job, state in zip(jobs, ("FAILED", "COMPLETED"), strict=True):
        site.wait(job, state)
    assert "not requeued, as CHAIN or REQUEUE=no want it" in site.logs() and "waiting    up to" not in site.logs()
    assert site.center("lasting") == undisturbed


@on_the_lab
def test_a_job_whose_node_goes_down_is_requeued(site: Site, undisturbed: bytes, whole_lab: None) -> None:
    job = site.submit("--nodelist=node1,node2", *LASTING)
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
    job = site.submit("--nodelist=node1,node2", *LASTING)
    run = f"cifar10-{job}"
    until("a checkpoint", lambda: site.saved(run) and len(site.signs(run)) == 4)
    orphans = [int(sign["pid"]) for sign in site.signs(run)[:2]]
    command("ip", "link", "set", "slabv1", "down")
    site.wait(job, "PENDING")
    assert all(map(alive, orphans))
    command("scontrol", "update", f"JobId={job}", "ReqNodeList=node2,node3")
    before = site.saved(run)
    site.start_again(job)
    until("it goes on", lambda: site.saved(run) > before)
    elsewhere = ["node2"] * 2 + ["node3"] * 2
    until("its ranks say so", lambda: [sign["host"] for sign in site.signs(run)] == elsewhere, 30)
    stopped = f"runs/{run}/lock.json is job {job}'s now: stopped\n"
    until("the orphan that had the lock sees it", lambda: stopped in site.logs(), 30)
    join(1)
    # SLURM may take the end of the orphans' step for that of the new one, which has its number: requeued once more.
    site.wait(job, "COMPLETED", "PENDING")
    if fact(job, "JobState") == "PENDING":
        site.start_again(job)
    site.wait(job, "COMPLETED")
    assert site.center(run) == undisturbed
    assert [sign["host"] for sign in site.signs(run)] == elsewhere
    until("the orphans are gone", lambda: not any(map(alive, orphans)), 60)


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

    It hands on no variables; the tree under test, which is not installed, needs one.
    """
    readme = (ROOT / "slurm/README.md").read_text()
    for node, host in (("node1", "a"), ("node2", "b"), ("node3", "c")):
        readme = readme.replace(f"{host}:4", f"{node}:4")
    assert f"{launcher} hpc-grawa train" in readme
    stand_in_for_ssh(tmp_path / "bin")
    (tmp_path / "HOSTS").write_text("".join(f"node{number} slots=4\n" for number in (1, 2, 3)))
    path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
    environment |= {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    own = "" if launcher.startswith("horovodrun") else "-x PYTHONPATH -x OMP_NUM_THREADS"
    words = ["--config", "digits", *DIGITS[:-1], *BUDGET, "--budget.steps=20", "--run.name=adhoc"]
    done = subprocess.run(
        ["bash", str(LAB_SCRIPT), "node", "1", "bash", "-c", f'{launcher} {own} hpc-grawa train "$@"', "-", *words],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads((tmp_path / "runs/adhoc/summary.json").read_text())
    assert (summary["state"], summary["world_size"]) == ("finished", 12)
    hosts = [json.loads(sign.read_text())["host"] for sign in sorted((tmp_path / "runs/adhoc/ranks").iterdir())]
    assert hosts == ["node1"] * 4 + ["node2"] * 4 + ["node3"] * 4
