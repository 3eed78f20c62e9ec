"""What differs from site to site: launchers, settings, containers, folders."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import pytest
from jobs import BUDGET, ROOT, SMALL, Site, command, fact, on_slurm

pytestmark = on_slurm


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
    job = site.submit("slurm/cifar10.sh", *SMALL, *BUDGET, "--budget.steps=3")
    site.wait(job, "COMPLETED")
    assert json.loads((other / f"runs/cifar10-{job}/summary.json").read_text())["state"] == "finished"
    said = stand_in.with_name("apptainer.said").read_text().splitlines()
    common = f"exec|--nv|--bind|{site.folder}|--bind|{other}/cifar|--bind|{other}|--bind|/dev/shm"
    assert [line.partition("|train|")[0] for line in said] == [f"{common}|image.sif|hpc-grawa"] * 4

    pictures = site.pictures(3).rename(other / "pictures")
    parts = (f"--train={pictures}/train", "--val", f"{pictures}/val")
    site.completed("slurm/prepare_imagenet.sh", *parts, "--out=data/packed")
    line = stand_in.with_name("apptainer.said").read_text().splitlines()[-1]
    assert f"|--bind|{pictures}/train|--bind|{pictures}/val|image.sif|python|data_prep/imagenet.py|" in line


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
