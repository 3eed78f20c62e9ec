"""ResNet-50 on pictures, by 12 ranks in about 15 GB: one such job at a time."""

from __future__ import annotations

import json
import re
import shlex
import tarfile
from pathlib import Path

import pytest
import torch
from ilsvrc import real_archive
from jobs import LAB, Site, command, fact, on_slurm
from torchvision.models import resnet50

pytestmark = on_slurm


def test_imagenet_is_prepared_by_a_job(site: Site) -> None:
    folder = site.pictures(3)
    parts = ("--train", str(folder / "train"), "--val", str(folder / "val"))
    site.completed("slurm/prepare_imagenet.sh", *parts, "--out", "data/imagenet")
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
    job = made.completed(*IMAGENET)
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
        command("scontrol", "update", f"JobId={jobs[0]}", "TimeLimit=30")
        imagenet.start_again(jobs[0])
    imagenet.wait(jobs[-1], "COMPLETED")
    assert (f"images of this node's ranks to /dev/shm/{jobs[-1]}/" in imagenet.logs()) == (way == "chain")
    assert re.search(r"^before     timed out by SIGUSR2 \(rank \d+\)$", imagenet.logs(), re.M)
    assert imagenet.center(run) == (whole_imagenet / "center.pt").read_bytes()
