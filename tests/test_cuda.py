"""What only a GPU can show; `test_methods` and `test_comm` run their rows on it too, where there is one."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import own
import pytest
import torch
from launcher import launch
from table import plain
from torch import nn

from hpc_grawa.cli.parsing import parse
from hpc_grawa.comm import Communicator, connect
from hpc_grawa.comm.meter import Meter
from hpc_grawa.comm.single import SingleCommunicator
from hpc_grawa.methods.base import _state_told
from hpc_grawa.training.worker import Worker

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU here")
WORDS = "--config=digits --data.batch_size=32 --budget.seconds=null --budget.steps=1000 --run.control_every=100"


@pytest.fixture(autouse=True)
def plain_process(monkeypatch: pytest.MonkeyPatch) -> None:
    own.plain_process(monkeypatch)


@pytest.fixture
def nccl() -> Iterator[Communicator]:
    comm = connect("nccl")
    yield comm
    comm.close()


def worker(comm: Communicator, *words: str) -> Worker:
    made = parse([*WORDS.split(), *words])
    made.check(comm.size)
    return Worker(made, comm)


def steps(made: Worker, count: int, mode: str) -> None:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        for _ in range(count):
            made.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("extra", [[], ["--precision=bf16"], ["--optimizer=AdamW"], ["--optimizer.clip_norm=1"]])
@pytest.mark.parametrize("name", plain("averages"))
def test_no_local_step_stops_the_host(name: str, extra: list[str]) -> None:
    """After the first round, so that the pull to its center counts too; only a round may wait for the device."""
    made = worker(SingleCommunicator(), f"--method={name}", "--method.period=10", *extra)
    steps(made, 11, "default")
    steps(made, 8, "error")
    assert made.run.synchronizers[0].completed == 1


def test_no_step_of_data_parallel_stops_the_host(nccl: Communicator) -> None:
    """Its gradients travel by NCCL, and whether they are finite is read one step later."""
    made = worker(nccl, "--method=DataParallel")
    steps(made, 3, "default")
    steps(made, 8, "error")


def test_time_on_the_device_is_counted(nccl: Communicator) -> None:
    """A wait returns before its message has arrived; the clock waits for it."""
    made = worker(nccl, "--method=LGRAWA", "--method.period=2")
    x = torch.zeros(64_000_000, device="cuda")
    began = time.perf_counter()
    for _ in range(8):
        work = nccl.allreduce(x, "center")
        work.wait()
    torch.cuda.synchronize()
    took = time.perf_counter() - began
    assert 0 <= nccl.meter.communication_seconds <= took
    made.clock.restart()
    for _ in range(20):
        x.add_(1)
    assert made.clock.settled >= 0
    assert torch.cuda.current_stream().query()  # nothing is left to do once the clock was read


def test_loading_counts_what_the_device_has_nothing_to_do_for(nccl: Communicator) -> None:
    meter, device = Meter(), torch.device("cuda", torch.cuda.current_device())
    x = torch.rand(4096, 4096, device=device)
    for _ in range(2):  # the first call sets libraries up
        torch.cuda.synchronize()
        began = time.perf_counter()
        y = x
        for _ in range(100):
            y = y @ x
        torch.cuda.synchronize()
        work = time.perf_counter() - began
    with meter.loading(device):
        time.sleep(0.1)
    idle = meter.loading_seconds
    assert idle > 0.099
    for _ in range(100):
        y = y @ x
    with meter.loading(device):
        time.sleep(work / 2)
    assert meter.loading_seconds - idle < work / 4


def test_ranks_that_share_a_gpu_are_refused_under_nccl(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("from hpc_grawa.comm import connect\nconnect('nccl')\n")
    ranks = torch.cuda.device_count() + 1
    done = launch(program=(str(program),), ranks=ranks)
    assert done.status != 0
    assert f"backend is nccl: ranks 0 and {ranks - 1} would share a GPU, which NCCL cannot" in done.said


ELSEWHERE = """
import sys
import torch, torch.distributed as dist, torch.multiprocessing as mp
import hpc_grawa

def work(rank, file):
    dist.init_process_group(init_method=f"file://{file}", rank=rank, world_size=2)
    model = torch.nn.Linear(2, 1).to(f"cuda:{rank}")  # where GPU 0 is the current one
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = hpc_grawa.DistributedOptimizer(optimizer, model, hpc_grawa.DataParallel())
    assert optimizer.run.comm.backend == "nccl" and torch.cuda.current_device() == rank
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.full((4, 2), rank + 1.0, device=model.weight.device)).square().mean().backward()
        optimizer.step()
    optimizer.run.finish()
    both = optimizer.run.comm.allgather(model.weight.detach(), "evaluate").wait()
    assert torch.equal(*both)

if __name__ == "__main__":
    mp.spawn(work, (sys.argv[1],), nprocs=2)
    print("trained together")
"""


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="PyTorch sees no two GPUs here")
def test_a_model_trains_on_a_gpu_that_is_not_the_current_one(tmp_path: Path) -> None:
    """Ranks of the program's own process group, all of whose current device is the first, do not share it."""
    (tmp_path / "elsewhere.py").write_text(ELSEWHERE)
    done = launch(str(tmp_path / "store"), program=(str(tmp_path / "elsewhere.py"),))
    assert (done.status, done.output) == (0, "trained together\n"), done.errors


def test_momenta_are_told_alike_on_every_device() -> None:
    """Ranks of a host have them on GPUs of different numbers, and are to find no difference in that."""
    told = set()
    for device in ("cpu", "cuda"):
        p = nn.Parameter(torch.ones(3, device=device))
        p.grad = torch.ones_like(p)
        sgd = torch.optim.SGD([p], 0.1, momentum=0.9)
        sgd.step()
        told.add(_state_told(sgd))
    assert len(told) == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("backend", ["mpi", "gloo"])
def test_ranks_train_on_gpus_and_the_center_is_loaded_on_a_cpu(backend: str, precision: str, tmp_path: Path) -> None:
    """Two ranks, which share a GPU where there is one only."""
    words = f"{WORDS} --method=LGRAWA --method.period=8 --budget.steps=200 --precision={precision} --backend={backend}"
    where = (f"--run.dir={tmp_path}", "--run.name=a", "--device=cuda")
    done = launch("train", *words.split(), *where, ranks=2)
    assert done.status == 0, done.said
    assert re.search(r"^device +cuda:0, ", done.said, re.M)
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert summary["center_test_accuracy"] > 0.8
    assert summary["gpu_memory"] > 0
    center = torch.load(tmp_path / "a" / "center.pt", weights_only=True)
    assert {t.device.type for t in center.values()} == {"cpu"}
