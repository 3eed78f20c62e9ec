"""How ranks on torch.distributed find each other, whatever launcher started them."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from launcher import launch, torchrun
from torch.distributed import HashStore

from hpc_grawa.comm import choose, connect, torch_dist
from hpc_grawa.comm.store import join, serve
from hpc_grawa.comm.torch_dist import check_backends, shared_interface
from hpc_grawa.errors import ConfigError
from hpc_grawa.launch import Slot
from hpc_grawa.network import first_host, first_port, interface_of, way_to

PROGRAM = """
import os, torch
from hpc_grawa.comm import connect
from hpc_grawa.launch import Slot, own_slot
slot = own_slot()
{change}
comm = connect("gloo", slot)
total = comm.allreduce(torch.ones(1), "setup").wait().item()
# one write, even where PYTHONUNBUFFERED has print make two: launchers mix the ranks' writes
print(f"rank {{comm.rank}} of {{comm.size}} {{comm.backend}} sums {{total:.0f}}\\n", end="", flush=True)
comm.close()
"""
EXPECTED = ["rank 0 of 3 gloo sums 3", "rank 1 of 3 gloo sums 3", "rank 2 of 3 gloo sums 3"]


@pytest.fixture
def port() -> Iterator[int]:
    """A port that something listens at, without ever answering."""
    with socket.socket() as silent:
        silent.bind(("0.0.0.0", 0))
        silent.listen()
        yield silent.getsockname()[1]


@pytest.mark.slow
def test_rank_0_moves_on_from_a_port_that_is_taken_and_others_follow(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpc_grawa.comm.store.ANSWER", 3.0)
    other = serve(port, "another job")
    ours = serve(port, "ours")
    assert port < other.port < ours.port < port + 16
    ours.set("key", "value")
    found = join(["127.0.0.1"], port, "ours", seconds=60)
    assert found.get("key") == b"value"


def test_a_missing_rank_0_is_a_named_error(port: int) -> None:
    store = serve(0, "another job")
    with pytest.raises(TimeoutError, match=rf"127.0.0.1, port {store.port} within 1 s: set MASTER_ADDR"):
        join(["127.0.0.1"], store.port, "ours", ports=1, seconds=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        "",
        "os.environ['MASTER_ADDR'] = 'localhost'",
        # as if each rank were on a host of its own: MPI tells where rank 0 is
        "slot = Slot('mpirun', slot.rank, slot.size, 0, 1, slot.job)",
    ],
    ids=["one host", "MASTER_ADDR", "several hosts"],
)
def test_under_mpirun(change: str) -> None:
    done = launch(program=("-c", PROGRAM.format(change=change)), ranks=3)
    assert done.status == 0, done.said
    assert sorted(line for line in done.output.splitlines() if line.startswith("rank ")) == EXPECTED


@pytest.mark.slow
def test_under_torchrun() -> None:
    done = launch(program=("-c", PROGRAM.format(change="")), by=torchrun(3))
    assert done.status == 0, done.errors
    assert sorted(done.output.splitlines()) == EXPECTED


def test_a_host_whose_name_is_its_own_loopback_takes_the_interface_to_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ways = {"node1": ["127.0.0.1"], "10.0.0.2": ["10.0.0.1"]}
    monkeypatch.setenv("MASTER_ADDR", "node1")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(torch_dist, "own_name_is_reachable", lambda: False)
    monkeypatch.setattr(torch_dist, "interface_of", {"10.0.0.1": "ib0", "10.0.0.2": "ib1"}.get)
    monkeypatch.setattr(torch_dist, "way_to", lambda host: ways.get(host, []))
    store = HashStore()
    store.set("way of 0", "")
    store.set("way of 1", "")
    assert shared_interface(Slot("srun", 0, 2), store) is None  # the hosts are one
    monkeypatch.setitem(ways, "node1", ["10.0.0.2"])
    assert shared_interface(Slot("srun", 1, 2), store) == "ib1"
    monkeypatch.setitem(ways, "node1", ["127.0.0.1"])
    assert shared_interface(Slot("srun", 0, 2), store) == "ib0"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth1")
    assert shared_interface(Slot("srun", 0, 2), store) is None  # the site's choice
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setattr(torch_dist, "own_name_is_reachable", lambda: True)
    assert shared_interface(Slot("srun", 0, 2), store) is None  # Gloo's choice


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_interfaces_and_ways_are_told() -> None:
    assert interface_of("127.0.0.1") == "lo" and interface_of("192.0.2.1") is None
    assert way_to("127.0.0.1") == ["127.0.0.1"] and way_to("no such host.invalid") == []


def test_in_one_process(tmp_path: Path) -> None:
    program = PROGRAM.format(change="")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "rank 0 of 1 gloo sums 1\n", done.stderr


def test_several_hosts_that_say_nothing_of_rank_0_are_a_named_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ConfigError, match=r"under horovodrun --gloo, which does not say.*set MASTER_ADDR"):
        connect("gloo", Slot("horovodrun --gloo", 1, 2, 0, 1, "job"))


def test_nccl_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match="backend is nccl: PyTorch sees no GPU here; must be gloo, mpi or horovod"):
        choose("nccl", Slot("torchrun", 0, 2, 0, 2))


def test_ranks_that_have_chosen_other_backends_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torchrun, auto goes by the GPUs of the rank's own host."""
    store, limit = HashStore(), timedelta(seconds=60)
    for time in (1, 2):  # that they ask each other, as a program may connect again
        for rank in (0, 2):
            store.set(f"backend {time} of {rank}", "nccl")
    check_backends(Slot("torchrun", 1, 3), store, "nccl", limit)
    with pytest.raises(ConfigError, match="backend is gloo on rank 1 and nccl on rank 0: must be one on all"):
        check_backends(Slot("torchrun", 1, 3), store, "gloo", limit)


def test_a_process_group_of_no_backend_in_particular_is_of_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """init_process_group() alone takes Gloo for CPUs, NCCL for GPUs."""
    dist.init_process_group(init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        for gpus, expected in ((False, "gloo"), (True, "nccl")):
            monkeypatch.setattr("torch.cuda.is_available", lambda gpus=gpus: gpus)
            assert choose("auto", Slot()) == (expected, "no launcher, a process group of 1 ranks")
    finally:
        dist.destroy_process_group()


def test_ports_come_from_the_job() -> None:
    slots = [Slot("srun", size=2, job=job) for job in ("17.0", "17.1")]
    ports = [first_port(slot, {}) for slot in slots]
    assert len(set(ports)) == 2 and all(20_000 <= port < 32_000 for port in ports)
    assert first_port(slots[0], {"MASTER_PORT": "4711"}) == 4711


def test_the_first_host_is_not_rank_0s_where_ranks_are_placed_at_will() -> None:
    slot, step = Slot("srun", 0, 4, 0, 2, "17.0"), {"SLURM_STEP_NODELIST": "node[1-3]"}
    assert first_host(slot, step | {"SLURM_DISTRIBUTION": "cyclic"}) == "node1"
    assert first_host(slot, step | {"SLURM_DISTRIBUTION": "arbitrary"}) is None
