"""Templates of every size and doctor, by a SLURM controller; ``make test-slurm`` brings one up where it can."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from jobs import BUDGET, LAB, LIMIT, ROOT, SMALL, Site, command, fact, on_slurm

pytestmark = on_slurm
SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))
TEMPLATES = [path.name for path in SCRIPTS if path.name not in ("common.sh", "chain.sh", "site.sh")]


def test_all_scripts_pass_shellcheck() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    others = [ROOT / "slurm/site.sh.example", ROOT / ".ci/run", *sorted((ROOT / "tests").rglob("*.sh"))]
    done = subprocess.run(["shellcheck", *SCRIPTS, *others], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_scheduler_takes_every_template(template: str, site: Site) -> None:
    said = command("sbatch", "--test-only", f"slurm/{template}")
    nodes = {"cifar10.sh": 1, "cifar100.sh": 2, "scaling.sh": 3, "compare.sh": 1}.get(template.rpartition("_")[2], 3)
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
    job = site.submit(*words, f"slurm/{template}.sh", *named, *SMALL, *BUDGET, "--budget.steps=20")
    site.wait(job, "COMPLETED")
    summary = json.loads((site.folder / "my runs" / f"{template}-{job}" / "summary.json").read_text())
    assert (summary["state"], summary["world_size"], summary["steps"]) == ("finished", size, 20)
    assert summary["method"] == method
    assert f"(started by {launcher}, asked for), {size} ranks" in site.logs()


def test_scaling_trains_on_more_and_more_nodes(site: Site) -> None:
    job = site.submit("--nodes=2", "slurm/scaling.sh", *SMALL, *BUDGET, "--budget.steps=20")
    site.wait(job, "COMPLETED")
    for nodes in (1, 2):
        assert site.summary(f"scaling-{job}-{nodes}nodes")["world_size"] == 4 * nodes


def test_a_dry_run_ends_without_a_run(site: Site) -> None:
    job = site.submit("slurm/lgrawa_imagenet.sh", *SMALL, "--dry-run")
    site.wait(job, "COMPLETED")
    assert "12 ranks" in site.logs() and not (site.folder / "runs").exists()


def test_a_script_that_forgets_the_launcher_does_not_train(site: Site) -> None:
    words = shlex.join([sys.executable, "-m", "hpc_grawa", "train", *SMALL[:-1], *BUDGET, "--budget.steps=3"])
    job = site.submit("--nodes=2", "--ntasks-per-node=2", "--output=slurm/logs/%j.out", f"--wrap={words}")
    site.wait(job, "FAILED")
    assert fact(job, "ExitCode") == "2:0"
    assert "backend is auto in a SLURM job of 4 tasks, but no launcher started this process" in site.logs()


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
