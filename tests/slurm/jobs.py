"""What tests of jobs share: ``sbatch`` and what it says, and the folder of a user.

All runs start from a folder whose path has a space, on random images in place of CIFAR and ImageNet, and send over MPI.
The tests of one file come one after the other, those of several files at once: their jobs queue for nodes.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
#: Where ranks find the package and ``pixels``.
PYTHONPATH = f"{ROOT}:{Path(__file__).parent}"
#: Other data and a small model; and ranks that share what cores there are.
SMALL = [
    "--model=SmallCNN",
    "--data=pixels.Pixels",
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
LAB = ("--cpus-per-task=1", "--time=00:30:00")
#: In seconds, for hangs: jobs wait for those of other tests, and share cores with them.
LIMIT = 1000.0


def answers() -> bool:
    """Whether there is a controller."""
    try:
        return subprocess.run(["sinfo", "-h"], capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


#: Of every file: ``pytestmark``.
on_slurm = [
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
    environment |= {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": PYTHONPATH,
        **variables,
    }
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=LIMIT)
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
        self.jobs: list[str] = []
        shutil.copytree(ROOT / "data_prep", folder / "data_prep")
        shutil.copytree(ROOT / "slurm", folder / "slurm", ignore=shutil.ignore_patterns("site.sh", "*.out", "*.chain"))

    def cancel(self) -> None:
        """Have jobs that a failed test has left take no nodes and cores from others."""
        subprocess.run(["scancel", *self.jobs], capture_output=True, timeout=LIMIT, check=False)

    def submit(self, *words: str) -> str:
        self.jobs.append(command("sbatch", "--parsable", *LAB, *words).strip().partition(";")[0])
        return self.jobs[-1]

    def completed(self, *words: str) -> str:
        """Submit from its folder, wherever the tests are, and wait for the end."""
        here = Path.cwd()
        os.chdir(self.folder)
        try:
            job = self.submit(*words)
        finally:
            os.chdir(here)
        self.wait(job, "COMPLETED")
        return job

    def wait(self, job: str, *states: str) -> None:
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        until(f"job {job} is {states}", lambda: fact(job, "JobState") in (*states, *ended))
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
        until("SLURM tells it", lambda: "told to end: passed on to the ranks" in self.logs())

    def cut(self, job: str, run: str) -> None:
        """Tell it to end, as SLURM does ahead of the time limit, once a round is behind it."""
        self.trains(run)
        command("scancel", "--signal=USR2", "--batch", job)

    def beats(self, run: str) -> list[dict[str, object]]:
        """The last heartbeat of each rank."""
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
        """Random images in two class folders of ``train`` and of ``val``, in the folder that is returned."""
        for part in ("train", "val"):
            for name in ("n01440764", "n02979186"):
                (folder := self.folder / "jpegs" / part / name).mkdir(parents=True)
                for number in range(count):
                    image = Image.frombytes("RGB", (40, 30), os.urandom(3600))
                    image.save(folder / f"{name}_{number}.JPEG")
        return self.folder / "jpegs"
