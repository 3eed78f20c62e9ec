"""What launchers' variables say about a process, and the backend that follows from it."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from hpc_grawa import comm
from hpc_grawa.comm import Backend, choose
from hpc_grawa.comm.torch_dist import TorchCommunicator
from hpc_grawa.errors import ConfigError
from hpc_grawa.launch import RankFacts, Wanted, default_threads, local_device, rank_facts

OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
MPICH = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
GLOO = {"HOROVOD_RANK": "3", "HOROVOD_SIZE": "4", "HOROVOD_LOCAL_RANK": "1", "HOROVOD_LOCAL_SIZE": "2"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
SLURM = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}


@pytest.mark.parametrize(
    ("variables", "launcher"),
    [
        (OPEN_MPI, "mpirun"),
        (MPICH, "mpirun"),
        (GLOO, "horovodrun --gloo"),
        (OPEN_MPI | {"_": "/usr/bin/horovodrun"}, "horovodrun"),
        (TORCHRUN, "torchrun"),
        (SLURM, "srun"),
        # srun --mpi=pmi2
        (SLURM | {"PMI_RANK": "3", "PMI_SIZE": "4"}, "srun"),
        # A job of SLURM whose one task per host was started by mpirun's daemons: the ranks are mpirun's.
        ({**SLURM, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"} | OPEN_MPI, "mpirun"),
    ],
)
def test_each_launcher_tells_rank_and_size(variables: dict[str, str], launcher: str) -> None:
    assert rank_facts(variables) == RankFacts(launcher, rank=3, size=4, local_rank=1, local_size=2)  # type: ignore[arg-type]


def test_a_plain_process_is_a_world_of_one() -> None:
    assert rank_facts({}) == RankFacts(None, 0, 1, 0, 1)
    # The script of a batch job, before any srun.
    assert rank_facts({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}) == RankFacts()


def test_threads_are_the_ranks_share_of_this_host(monkeypatch: pytest.MonkeyPatch) -> None:
    processors = len(os.sched_getaffinity(0))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert default_threads(RankFacts()) == processors
    assert default_threads(RankFacts("mpirun", 0, 8, 0, 2 * processors)) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert default_threads(RankFacts()) is None


MPIRUN, SRUN = RankFacts("mpirun", 0, 4, 0, 4), RankFacts("srun", 0, 4, 0, 4)


@pytest.mark.parametrize(
    ("asked", "facts", "built", "expected", "why"),
    [
        ("auto", RankFacts(), True, "single", "no launcher"),
        ("auto", MPIRUN, True, "horovod", "started by mpirun, Horovod is built"),
        ("auto", MPIRUN, False, "mpi", "started by mpirun, Horovod is not built"),
        ("auto", SRUN, True, "horovod", "started by srun, Horovod is built"),
        ("auto", SRUN, False, "mpi", "started by srun, Horovod is not built"),
        ("auto", RankFacts("horovodrun --gloo", 0, 4), True, "horovod", "started by horovodrun --gloo"),
        ("auto", RankFacts("torchrun", 0, 4, 0, 4), True, "gloo", "started by torchrun, 0 GPUs for 4 ranks"),
        ("gloo", SRUN, True, "gloo", "started by srun, asked for"),
        ("mpi", MPIRUN, True, "mpi", "started by mpirun, asked for"),
        ("horovod", SRUN, True, "horovod", "started by srun, asked for"),
        ("single", RankFacts(), True, "single", "no launcher, asked for"),
    ],
)
def test_the_backend_that_is_chosen_and_why(
    asked: Backend, facts: RankFacts, built: bool, expected: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comm, "_built", lambda module: built)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    backend, reason = choose(asked, facts)
    assert backend == expected and reason.startswith(why)


@pytest.mark.parametrize(
    ("asked", "facts", "built", "message"),
    [
        ("mpi", RankFacts("torchrun", 0, 4), True, "backend is mpi under torchrun: .*use gloo or nccl"),
        ("horovod", RankFacts("torchrun", 0, 4), True, "backend is horovod under torchrun: .*use gloo or nccl"),
        ("auto", RankFacts("horovodrun --gloo", 0, 4), False, "backend is auto under horovodrun --gloo: needs Horovod"),
        ("mpi", RankFacts("horovodrun --gloo", 0, 4), True, "backend is mpi under horovodrun --gloo: .*use mpirun"),
        ("single", MPIRUN, True, "backend is single under mpirun with 4 ranks: .*must be another"),
        ("horovod", MPIRUN, False, "backend is horovod: .*not installed"),
    ],
)
def test_a_backend_that_cannot_run_there_is_refused(
    asked: Backend, facts: RankFacts, built: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comm, "_built", lambda module: built)
    with pytest.raises(ConfigError, match=message):
        choose(asked, facts)


@pytest.mark.parametrize(
    ("gpus", "wanted", "device"),
    [(4, "auto", "cuda:2"), (4, "cuda", "cuda:2"), (1, "auto", "cuda:0"), (2, "auto", "cuda:0"), (0, "auto", "cpu")],
)
def test_a_rank_takes_the_gpu_of_its_local_rank(
    gpus: int, wanted: Wanted, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all that the node has, or the only one that it sees; ranks that outnumber GPUs share them in turn."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    facts = RankFacts("srun", 6, 8, 2, 4)
    assert str(local_device(facts, wanted)) == device
    assert str(local_device(facts, "cpu")) == "cpu"
    if not gpus:
        with pytest.raises(ConfigError, match=r"device is cuda: rank 6 on .* sees no GPU; must be cpu or auto"):
            local_device(facts, "cuda")


def test_ranks_that_would_share_a_gpu_under_nccl_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what the ranks tell each other; NCCL itself would only hang or abort."""
    comm = object.__new__(TorchCommunicator)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(uuid="GPU-1"))
    monkeypatch.setattr(comm, "gather_bytes", lambda message: [b"a GPU-1", b"b GPU-1", b"a GPU-2"], raising=False)
    comm._check_devices()
    monkeypatch.setattr(comm, "gather_bytes", lambda message: [b"a GPU-1", b"a GPU-2", b"a GPU-1"], raising=False)
    with pytest.raises(ConfigError, match="ranks 0 and 2 would share a GPU, which NCCL cannot; must be gloo, mpi"):
        comm._check_devices()


def test_horovod_counts_as_built_where_it_can_be_imported() -> None:
    assert (choose("auto", MPIRUN)[0] == "horovod") == (find_spec("horovod") is not None)


def test_only_launch_reads_launchers_variables() -> None:
    package = Path(comm.__file__).parents[1]
    readers = {
        path.name
        for path in package.rglob("*.py")
        if any(name in path.read_text() for name in (*OPEN_MPI, *MPICH, *GLOO, *SLURM, "LOCAL_WORLD_SIZE"))
    }
    assert readers == {"launch.py"}
