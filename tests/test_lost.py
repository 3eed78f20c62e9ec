"""Ranks that are lost, wherever: no job hangs, none ends as if it had done its work, and the rank is named."""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import own
import pytest
from launcher import HOROVOD, environment, launch, launched, start
from test_cli import LINE, running

from hpc_grawa.comm.store import StoreCounter, join
from hpc_grawa.errors import LostContact
from hpc_grawa.report.status import describe
from hpc_grawa.runs.heartbeat import BEAT, Watch

HOST = platform.node()
HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def plain_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own.plain_process(monkeypatch)
    monkeypatch.chdir(tmp_path)


def wanted(backend: str) -> None:
    if backend == "horovod" and not HOROVOD:
        pytest.skip("Horovod is not built")


def train(backend: str, ranks: int, *words: str) -> tuple[int, str]:
    """Exit status and errors of a run named ``a`` with a limit of 8 s."""
    wanted(backend)
    where = (f"--backend={backend}", "--run.name=a", "--comm-timeout=8", "--budget.steps=30", "--method.period=4")
    status, _, errors = launch("train", *LINE, *where, *words, ranks=ranks)
    return status, errors


def loop(backend: str, method: str, fault: str, ranks: int = 2) -> tuple[int, str]:
    """Exit status and output of ``lost.py``, a loop of a user's own."""
    wanted(backend)
    done = launch(backend, method, fault, "8", program=(str(HERE / "lost.py"),), ranks=ranks)
    return done.status, done.said


def summary(folder: Path) -> tuple[str, str, int]:
    found = json.loads((folder / "runs" / "a" / "summary.json").read_text())
    return found["state"], found["cause"].partition(":")[0], found["rank"]


@launched
@pytest.mark.parametrize(
    ("backend", "fault", "evaluation", "cause"),
    [
        pytest.param("mpi", "exits", True, "SystemExit", marks=pytest.mark.slow),
        pytest.param("gloo", "exits", False, "SystemExit", marks=pytest.mark.slow),
        pytest.param("horovod", "closes", True, "GeneratorExit", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_leaves_by_itself_ends_the_run_at_once_as_failed(
    backend: str, fault: str, evaluation: bool, cause: str, tmp_path: Path
) -> None:
    lost = ("--model=own.Lost", f"--model.fault={fault}", f"--model.evaluation={evaluation}", "--comm-timeout=600")
    status, errors = train(backend, 2, *lost)
    assert status not in (0, 2, 75)
    assert "rank 1 of 2 failed: ending the job on all ranks" in errors
    assert summary(tmp_path) == ("failed", cause, 1)


@pytest.mark.slow
def test_a_run_alone_whose_model_calls_sys_exit_has_failed(tmp_path: Path) -> None:
    status, _, errors = launch(
        *("train", *LINE, "--model=own.Lost", "--model.fault=exits", "--run.name=a", "--budget.steps=30")
    )
    assert status == 1 and "rank 0 was told to leave in mid-work: sys.exit(0)" in errors
    assert summary(tmp_path) == ("failed", "SystemExit", 0)


@launched
@pytest.mark.slow
def test_a_rank_stopped_before_it_starts_is_missed() -> None:
    status, output = loop("mpi", "LocalSGD", "stopped before it starts", ranks=3)
    assert status != 0
    assert re.search(
        rf"rank [02] of 3 on {HOST} has waited \d+ s for the others to start \(comm_timeout is 8\): ending the job on "
        r"all ranks; no sign of life of rank 1",
        output,
    ), output


@launched
@pytest.mark.slow
def test_a_rank_stopped_while_it_loads_its_data_is_named() -> None:
    status, errors = train("mpi", 3, "--data=own.LostNumbers")
    assert status != 0
    assert re.search(
        rf"rank [01] of 3 on {HOST} has waited \d+ s for \w+ \(comm_timeout is 8\): .*"
        rf"silent: rank 2 on {HOST} at step 0 (loads its data|computes), heard of \d+ s ago",
        errors,
    ), errors


@launched
@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "method", "fault", "named"),
    [
        ("mpi", "LocalSGD", "returns early", r"rank 0 of 2 .*; has left: rank 1 on \S+ at step 5; itself at step 8"),
        ("gloo", "LocalSGD", "ends at once", r"rank 0 of 2 failed at step 8 \(gone: rank 1 on \S+ at step \d"),
        ("gloo", "DataParallel", "skips", r"all wait, so their steps or calls differ: rank [01] on \S+ at step 11 "),
        ("horovod", "DataParallel", "counts twice", r"all wait, so .*: rank [01] on \S+ at step 1[012] wait\w+ for "),
    ],
)
def test_a_loop_of_a_user_s_own_that_ranks_leave_or_make_differently_ends(
    backend: str, method: str, fault: str, named: str
) -> None:
    status, output = loop(backend, method, fault)
    assert status != 0
    assert re.search(named, output), output


@launched
@pytest.mark.slow
def test_a_process_forked_from_a_rank_cannot_send_its_messages() -> None:
    status, output = loop("mpi", "LocalSGD", "forks")
    assert status == 0 and output.count("is through") == 2
    assert re.search(r"process \d+ was forked from rank 1 of 2 at step 8, whose messages it cannot send: ", output)


@pytest.mark.slow
@launched
def test_ranks_on_gloo_end_with_their_launcher(tmp_path: Path) -> None:
    words = ("train", *LINE, "--model=own.Slow", "--budget.steps=100000", "--backend=gloo", "--comm-timeout=8")
    job = start(*words, f"--run.dir={tmp_path}", "--run.name=a", ranks=2, stdout=None, stderr=None)
    until = time.monotonic() + 90
    while not (tmp_path / "a" / "metrics.jsonl").exists():
        assert time.monotonic() < until
        time.sleep(0.2)
    assert len(running(f"--run.dir={tmp_path}")) >= 2
    job.kill()
    job.wait()
    until = time.monotonic() + 60
    while running(f"--run.dir={tmp_path}"):
        assert time.monotonic() < until
        time.sleep(0.2)


@pytest.mark.slow
def test_ranks_started_by_hand_outlive_the_shell_that_started_them(tmp_path: Path) -> None:
    rank = f"{sys.executable} {HERE / 'lost.py'} gloo LocalSGD pauses 8"
    by_hand = "WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 MASTER_ADDR=127.0.0.1"
    shell = " ".join(f"RANK={m} LOCAL_RANK={m} {by_hand} nohup {rank} >> out 2>&1 &" for m in range(2))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    subprocess.run(["sh", "-c", shell], cwd=tmp_path, env=environment(MASTER_PORT=str(port)), check=True)
    (tmp_path / "out").touch()  # the shell may be gone before its first rank has opened it
    until = time.monotonic() + 150
    while (out := (tmp_path / "out").read_text()).count("is through") < 2:
        assert time.monotonic() < until and "ending" not in out, out
        time.sleep(0.2)


@pytest.mark.slow
def test_ranks_that_outlive_the_one_that_keeps_the_tickets_do_not_say_that_the_run_has_failed(tmp_path: Path) -> None:
    """Started by hand, as no launcher ends them; the counter's store is rank 0's."""
    lost = ("--model=own.Lost", "--model.fault=killed", "--model.rank=0", "--model.calls=40")
    words = ("train", *LINE, *lost, "--backend=gloo", "--run.name=a", "--method=LocalSGD", "--method.rounds=pooled")
    budget = ("--budget.steps=1000", "--method.period=500", "--comm-timeout=30")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    by_hand = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    each = [environment(**by_hand, RANK=str(m), LOCAL_RANK=str(m)) for m in range(2)]
    ranks = [start(*words, *budget, env=variables) for variables in each]
    try:
        errors = [rank.communicate(timeout=400)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert ranks[0].returncode == -signal.SIGKILL and ranks[1].returncode not in (0, 2, 75)
    assert re.search(r"rank 1 of 2 failed at step \d+ \(gone: rank 0 on ", errors[1]), errors[1]
    assert not (tmp_path / "runs" / "a" / "summary.json").exists()


COUNTED_BY_ANOTHER = """
import sys
from hpc_grawa.comm.store import serve
store = serve(0, "ours")
print(store.port, flush=True)
sys.stdin.read()
"""


def test_a_counter_whose_rank_is_gone_says_so() -> None:
    keeper = start(program=("-c", COUNTED_BY_ANOTHER), stdin=subprocess.PIPE)
    try:
        assert keeper.stdout is not None
        counter = object.__new__(StoreCounter)
        counter._store, counter._key = join(["127.0.0.1"], int(keeper.stdout.readline()), "ours", ports=1), "sum 0"
        assert [counter.add(1), counter.add(2)] == [1, 3]
    finally:
        keeper.kill()
        keeper.communicate()
    with pytest.raises(LostContact):
        for _ in range(3):  # the first may still find the socket open
            counter.add(1)


ENDED_BY_ANOTHER = """
import time
import torch
import horovod.torch as hvd
from hpc_grawa.comm import connect
from hpc_grawa.errors import LostContact
comm = connect("horovod", device="cpu")
comm.barrier()
if comm.rank:
    hvd.shutdown()
else:
    until = time.monotonic() + 60
    try:
        while time.monotonic() < until:  # computes, and hears of it when it sends
            time.sleep(1)
            comm._launch("allreduce", torch.ones(1), "center", time.monotonic_ns(), 0)
        print("sent")
    except LostContact as error:
        print("lost contact")
    hvd.shutdown()
    try:
        comm._launch("allreduce", torch.ones(1), "center", 0, 0)
    except LostContact:
        print("lost contact")
    except RuntimeError as error:
        print(error)
"""


LEAVES = """
import sys, time
import torch
from hpc_grawa.comm import connect
comm = connect(sys.argv[1], device="cpu")
comm.barrier()
if not comm.rank:
    time.sleep(3)
work = comm.allgather(torch.ones(1), "control")  # as the last step may, which nobody reads
print("ended")
"""


@launched
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["horovod", "gloo", "mpi"])
def test_a_rank_that_is_first_to_end_waits_for_its_last_message(backend: str) -> None:
    wanted(backend)
    done = launch(backend, program=("-c", LEAVES), ranks=2)
    assert (done.status, done.output) == (0, "ended\nended\n"), done.said


@launched
@pytest.mark.slow
def test_a_message_begun_when_horovod_has_lost_a_rank_says_so() -> None:
    wanted("horovod")
    done = launch(program=("-c", ENDED_BY_ANOTHER), ranks=2)
    assert done.output.splitlines() == ["lost contact", "Horovod has not been initialized; use hvd.init()."], done.said


SPAWNED = """
import sys
import torch, torch.distributed as dist, torch.multiprocessing as mp
import hpc_grawa
from hpc_grawa.comm import choose, connect
from hpc_grawa.errors import ConfigError

def work(rank, file):
    dist.init_process_group(sys.argv[2] or None, init_method=f"file://{file}", rank=rank, world_size=2)
    try:
        connect("mpi")
        raise AssertionError
    except ConfigError as error:
        assert "backend is mpi: must be auto or gloo, as this program has started a process group of 2" in str(error)
    assert choose() == ("gloo", "no launcher, a process group of 2 ranks")
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = hpc_grawa.DistributedOptimizer(optimizer, model, hpc_grawa.DataParallel())
    assert (optimizer.run.comm.rank, optimizer.run.comm.size) == (rank, 2)
    model(torch.full((4, 2), rank + 1.0)).square().mean().backward()
    optimizer.step()
    both = [torch.empty_like(model.weight) for _ in range(2)]
    dist.all_gather(both, model.weight.detach())  # beside ours
    assert torch.equal(*both)
    parts = connect().split([0, 1])
    assert parts.size == 1 and parts.allreduce(torch.ones(1), "setup").wait() == 1
    optimizer.run.comm.close()
    optimizer.run.comm.close()
    dist.all_gather(both, model.weight.detach())  # by the program's own group, which is its to end

if __name__ == "__main__":
    mp.spawn(work, (sys.argv[1],), nprocs=2)
    print("trained together")
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["gloo", ""], ids=["gloo", "none said"])
def test_without_a_launcher_the_program_s_own_process_group_trains_together(backend: str, tmp_path: Path) -> None:
    (tmp_path / "spawned.py").write_text(SPAWNED)
    done = launch(str(tmp_path / "store"), backend, program=(str(tmp_path / "spawned.py"),))
    assert (done.status, done.output) == (0, "trained together\n"), done.errors


def test_a_sign_s_age_outweighs_its_words(tmp_path: Path) -> None:
    """A rank that was stopped while it waited is silent, not waiting; one that has left is known to have."""
    watch = Watch(0, 4, timeout=20)
    try:
        (tmp_path / "lock.json").write_text("{}")
        watch.begin(tmp_path)
        for rank, told, age in ((1, "", 4 * BEAT), (2, "has left", BEAT), (3, "", 0)):
            file = tmp_path / "ranks" / f"{rank:04d}.json"
            beat = {"rank": rank, "host": "far", "step": 7, "activity": "waits for control", "seconds": 1, "used": 0}
            file.write_text(json.dumps({**beat, "training": 1, "told": told}))
            os.utime(file, (time.time() - age,) * 2)
        assert re.fullmatch(
            r"has left: rank 2 on far at step 7; silent: rank 1 on far at step 7 waits for control, heard of 2\d s ago",
            watch.news(),
        )
    finally:
        watch.end("finished")
        watch.close()


@launched
@pytest.mark.slow
def test_a_rank_stopped_in_training_is_named_in_the_folder_too() -> None:
    status, errors = train("gloo", 3, "--model=own.Lost", "--model.fault=stopped", "--budget.steps=1000")
    assert status != 0 and re.search(rf"silent: rank 2 on {HOST} at step \d", errors), errors
    for file in Path("runs/a/ranks").iterdir():
        os.utime(file, (time.time() - 10 * BEAT,) * 2)
    assert re.search(rf"which gave up waiting: silent: rank 2 on {HOST} at step \d", describe(Path("runs/a")))
